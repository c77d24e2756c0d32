import msgspec
import numpy as np
import pytest

from pennyweight.core.errors import BundleError, ConfigError
from pennyweight.data.catalog import Vocabulary
from pennyweight.data.synthetic import Clicks
from pennyweight.model.bundle import Bundle, Runtime
from pennyweight.model.ranking import DLRM, DNN
from pennyweight.model.spec import Model, build, spec_of
from pennyweight.serve.worker import Query, Worker


@pytest.fixture(scope="module")
def worker(cascade: Bundle) -> Worker:
    return Worker(cascade)


def query(worker: Worker, user: int, history: list[int], **more: object) -> Query:
    ids = np.array(history, np.int64)
    return Query(user, ids, **more)  # type: ignore[arg-type]


def test_retrieval_is_exact(worker: Worker) -> None:
    one = query(worker, 15, [4, 9, 30], hidden=np.array([7, 8]), count=40)
    (found,) = worker.answer([one])
    vectors = worker.runner.item_vectors(worker.catalog.item_batch(worker.ids))
    scores = (vectors @ worker.runner.user_vectors(one.asker(worker.catalog)).T)[:, 0]
    scores[np.isin(worker.ids, [7, 8])] = -np.inf
    assert found.items.tolist() == worker.ids[np.argsort(-scores)][:40].tolist()


def test_joined_queries_are_answered_as_alone(worker: Worker) -> None:
    rng = np.random.default_rng(0)
    queries = [
        query(worker, 1, [4, 5], count=30),
        query(worker, 2, [], items=rng.choice(worker.ids, 7)),
        query(worker, 3, [9], count=3, hidden=worker.ids[5:]),
        query(worker, 4, [9], hidden=worker.ids),
        query(worker, 5, [], by="popularity", count=4),
        query(worker, 6, [8], by="similarity", count=5),
    ]
    for together, one in zip(worker.answer(queries), queries, strict=True):
        (alone,) = worker.answer([one])
        assert together.items.tolist() == alone.items.tolist()
        assert np.allclose(together.scores, alone.scores, atol=1e-5)


def test_the_top_keeps_retrievals_order_among_equals(worker: Worker) -> None:
    (found,) = worker.answer([query(worker, 5, [], by="popularity", count=50)])
    level = msgspec.structs.replace(found, scores=np.zeros(50, np.float32))
    assert level.top(3).items.tolist() == found.items[:3].tolist()


def test_hidden_items_without_a_row_in_the_catalogue_are_no_matter(cascade: Bundle) -> None:
    assert cascade.catalog is not None and cascade.catalog.items is not None
    some = Worker(cascade.replace(catalog=cascade.catalog.replace(items=cascade.catalog.items.head(20))))
    (found,) = some.answer([query(some, 1, [], hidden=np.array([2, 500]), count=100)])
    assert sorted(found.items.tolist()) == some.ids[1:].tolist()


def test_an_item_that_the_table_lacks_is_scored_where_items_are_kept_too() -> None:
    catalog = Clicks(sizes=(20, 60, 9)).dataset(3000).catalog
    assert catalog.items is not None
    spec = spec_of(DLRM, columns=catalog.schema.columns, dim=4, bottom=(8, 4), hidden=(8,))
    given = Bundle(Model.of(build(spec).eval(), spec), catalog.replace(items=catalog.items.head(20)))
    plain, shared = (Worker(given.replace(runtime=Runtime("eager", 1, shared=s))) for s in (False, True))
    assert shared.kept and not plain.kept
    asked = [query(plain, 3, [], items=np.arange(2, 62))]
    assert not set(asked[0].items.tolist()) <= set(plain.ids.tolist())
    (expected,), (found,) = plain.answer(asked), shared.answer(asked)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_a_bundle_without_items_is_refused(cascade: Bundle) -> None:
    with pytest.raises(BundleError, match="no catalogue of items"):
        Worker(cascade.replace(catalog=None))


def test_hashed_items_are_refused(cascade: Bundle) -> None:
    assert cascade.catalog is not None
    hashed = {**cascade.catalog.vocabularies, "item": Vocabulary.hashed(cascade.catalog.schema.item.size)}
    with pytest.raises(BundleError, match="hashed"):
        Worker(cascade.replace(catalog=cascade.catalog.replace(vocabularies=hashed)))


def test_a_classifier_is_refused(cascade: Bundle) -> None:
    assert cascade.catalog is not None
    spec = spec_of(DNN, columns=cascade.catalog.schema.columns, dim=4, hidden=(8,), outputs=3, norm=False)
    with pytest.raises(ConfigError, match=r"shape \(2, 3\)"):
        Worker(Bundle(Model.of(build(spec), spec), cascade.catalog))
