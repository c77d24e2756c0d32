"""Tables trained by touched rows: PyTorch's optimizers where they claim to be, and nothing happens to other rows."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pennyweight.compress.substitute import SubstituteTables
from pennyweight.core.errors import ConfigError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema
from pennyweight.model import losses, sparse, train
from pennyweight.model.bundle import Bundle
from pennyweight.model.ranking import DNN, DeepFM
from pennyweight.model.retrieval import MatrixFactorization, TwoTower
from pennyweight.model.sparse import Matrix, Sparse, rounded, summed
from pennyweight.model.spec import Model, seeded, spec_of
from pennyweight.model.tables import unpack_rows
from pennyweight.model.train import EpochLog, Learner, Progress, Recipe, fit
from pennyweight.model.transform import Env
from tests.model.test_train import COLUMNS, RECIPE, dnn, rows, same

KINDS = ("adagrad", "lazy-adam", "sgd")


def nets(n: int = 2, **args: Any) -> list[nn.Module]:
    """The same model several times."""
    made = []
    for _ in range(n):
        torch.manual_seed(0)
        made.append(DeepFM(COLUMNS, dim=4, hidden=(16,), **args))
    return made


def learned(module: nn.Module, recipe: Recipe, batches: list[dict[str, Tensor]]) -> nn.Module:
    loss = losses.row_loss(module, "bce", "label", (), 0.5, 1.0)
    with Learner(module.train(), loss, recipe) as learner:
        for batch in batches:
            learner.learn(batch, recipe.lr)
    return module


def test_repeated_rows_are_summed_in_order() -> None:
    ids = torch.tensor([7, 2, 7, 0, 2, 7])
    gradients = torch.arange(12.0).view(6, 2)
    found, sums = summed(ids, gradients)
    assert found.tolist() == [0, 2, 7]
    assert sums.tolist() == [[6.0, 7.0], [2.0 + 8, 3.0 + 9], [0.0 + 4 + 10, 1.0 + 5 + 11]]


def test_lazy_adam_is_pytorchs_sparse_adam() -> None:
    torch.manual_seed(0)
    table, theirs = nn.Embedding(50, 6), nn.Embedding(50, 6, sparse=True)
    theirs.load_state_dict(table.state_dict())
    matrix = Matrix([table], "lazy-adam", 0.0)
    table.sparse = True
    optimizer = torch.optim.SparseAdam(theirs.parameters(), lr=0.05)
    for _ in range(20):
        ids, by = torch.randint(0, 50, (9,)), torch.randn(9, 6)
        for t in (table, theirs):
            t.weight.grad = None
            (t(ids) * by).sum().backward()
        with torch.no_grad():
            matrix.gather()
            matrix.step(0.05)
        optimizer.step()
    assert torch.allclose(table.weight, theirs.weight, atol=3e-5), "their epsilons differ"


def test_lazy_adam_is_adam_where_every_row_is_touched_each_time() -> None:
    batch = next(rows(n=3000).batches(3000))
    dense, lazy = nets()
    recipe = Recipe(lr=0.01, embedding_l2=0.01, weight_decay=0.001)
    for module, how in ((dense, "dense"), (lazy, "lazy-adam")):
        learned(module, dataclasses.replace(recipe, tables=how), [batch] * 10)  # type: ignore[arg-type]
    for name, table in dense.embeddings.tables.items():
        touched = batch[name].unique()
        assert torch.allclose(table.weight[touched], lazy.embeddings.tables[name].weight[touched], atol=2e-5)


def test_sgd_is_sgd_and_adagrad_is_row_wise_adagrad() -> None:
    torch.manual_seed(0)
    start = torch.randn(30, 4)
    plan = [(torch.randint(0, 30, (12,)), torch.randn(12, 4)) for _ in range(15)]
    for kind in ("sgd", "adagrad"):
        table = nn.Embedding(30, 4, _weight=start.clone(), sparse=True)
        matrix = Matrix([table], kind, 0.0)
        expected, squares = start.clone(), torch.zeros(30)
        for ids, by in plan:
            matrix.clear()
            (table(ids) * by).sum().backward()
            gradient = torch.zeros(30, 4).index_add_(0, ids, by)
            with torch.no_grad():
                matrix.gather()
                matrix.step(0.1)
            squares += gradient.square().mean(1)
            scale = 1.0 if kind == "sgd" else 1 / (squares.sqrt() + sparse.EPS).unsqueeze(1)
            expected -= 0.1 * gradient * scale
        assert torch.allclose(table.weight, expected, atol=1e-5), kind


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_no_batch_touches_stay_as_they_are_and_so_does_padding(kind: Any) -> None:
    batches = list(rows(n=600).batches(200))
    for batch in batches:
        batch["user"] = batch["user"] % 7  # 0 is padding
    (module,) = nets(1)
    before = module.embeddings.tables["user"].weight.detach().clone()
    learned(module, Recipe(lr=0.1, tables=kind, embedding_l2=0.1), batches)
    after = module.embeddings.tables["user"].weight.detach()
    assert torch.equal(before[7:], after[7:]) and torch.equal(after[0], torch.zeros(4))
    assert not torch.isclose(before[1:7], after[1:7]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_is_as_large_as_a_table(kind: Any) -> None:
    (module,) = nets(1)
    with Learner(module.train(), losses.row_loss(module, "bce", "label", (), 0.5, 1.0), Recipe(tables=kind)) as learner:
        learner.learn(next(rows().batches(64)), 0.01)
        assert learner.sparse is not None
        found = [w.grad for m in learner.sparse.matrices for w, _ in m.sources if w.grad is not None]
        assert len(found) == 1 and found[0].is_sparse and found[0]._nnz() == 128
        assert all(p.grad is None for p in learner.sparse.parameters)
    assert not module.embeddings.tables["user"].sparse and "forward" not in module.embeddings.__dict__


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_keeps_names_and_the_same_seed_gives_the_same_bits(kind: Any) -> None:
    recipe = dataclasses.replace(RECIPE, tables=kind, lr=0.03, epochs=4)
    one, two, names = dnn(), dnn(), list(dnn().state_dict())
    done = fit(one, rows(), rows(1), recipe, seed=3)
    fit(two, rows(), rows(1), recipe, seed=3)
    assert done.metric > 0.8 and same(one, two) and list(one.state_dict()) == names
    spec = spec_of(DNN, columns=COLUMNS, dim=4, hidden=[16], dropout=0.2)
    assert same(Model.of(one, spec).build(), one)


class Stop:
    def __init__(self, epoch: int, step: int) -> None:
        self.at = (epoch, step)

    def __call__(self, where: Progress | EpochLog) -> None:
        if isinstance(where, Progress) and (where.epoch, where.step) == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_interrupted_and_resumed_is_the_uninterrupted_run(
    kind: Any, clip: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "TICK_S", 0.0)
    recipe = dataclasses.replace(RECIPE, tables=kind, clip=clip, epochs=3)
    whole, parts, fresh, file = dnn(), dnn(), dnn(77), tmp_path / "c"
    expected = fit(whole, rows(), rows(1), recipe, seed=5)
    assert fit(parts, rows(), rows(1), recipe, seed=5, checkpoint=file, progress=Stop(2, 5)).stopped == "interrupted"
    done = fit(fresh, rows(), rows(1), recipe, seed=5, checkpoint=file)
    assert same(whole, fresh)
    assert [e.loss for e in done.history] == [e.loss for e in expected.history]


def test_a_model_of_tables_alone_and_towers_that_share_one() -> None:
    for module in (MatrixFactorization(COLUMNS, 8), TwoTower(COLUMNS, 8)):
        recipe = Recipe(loss="bpr", metric="ndcg@10", batch=128, epochs=3, patience=3, lr=0.1, tables="adagrad")
        first, *_, last = fit(module, rows(), rows(1), recipe).history
        assert last.loss < 0.95 * first.loss


@pytest.mark.parametrize("method", ["hash", "robe", "hot"])
def test_tables_inside_shared_ones_are_trained_so_too(method: Any) -> None:
    spec = spec_of(DNN, columns=COLUMNS, dim=8, hidden=[16])
    module = seeded(spec, 0)
    bundle = Bundle(Model.of(module, spec), rows().catalog)
    made = SubstituteTables(method, 2.0, min_rows=10).apply(bundle, Env(train=rows())).model.build(copy=True)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    assert fit(made, rows(), rows(1), dataclasses.replace(RECIPE, tables="adagrad", epochs=3)).metric > 0.6
    inner = [k for k in before if ".tables." in k and before[k].is_floating_point()]
    assert inner and all(not torch.equal(before[k], made.state_dict()[k]) for k in inner)


class Bags(nn.Module):
    """Bags of ids, one joined by its maximum, and a table that is read as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.most = nn.EmbeddingBag(40, 4, mode="mean"), nn.EmbeddingBag(40, 4, mode="max")
        self.users, self.out = nn.Embedding(30, 4), nn.Linear(4, 1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["item"].unsqueeze(1)
        near = self.users(batch["user"]) @ self.users.weight.T
        both: Tensor = self.out(self.mean(ids) + self.most(ids))
        return both.squeeze(1) + near.mean(1)


def test_bags_and_tables_read_as_a_matrix() -> None:
    dense, lazy = Bags(), Bags()
    lazy.load_state_dict(dense.state_dict())
    assert list(sparse.trained(lazy)) == [lazy.mean, lazy.users]
    batches = list(rows(n=512).batches(256))
    learned(dense, Recipe(optimizer="sgd", lr=0.1), batches[:1])
    learned(lazy, Recipe(optimizer="sgd", lr=0.1, tables="sgd"), batches[:1])
    for a, b in zip(dense.parameters(), lazy.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_sequences_are_pooled_alike() -> None:
    history = Column("history", "user", "sequence", 40, 5, shares="item")
    columns = (*COLUMNS[:3], history, COLUMNS[3])
    plain = rows()
    past = np.random.default_rng(0).integers(0, 40, (len(plain), 5)) * (np.arange(5) > 1)
    data = Dataset.from_arrays({**{c.name: plain.column(c.name) for c in COLUMNS}, "history": past}, Schema(columns))
    torch.manual_seed(0)
    module = DNN(columns, dim=4, hidden=(16,)).train()
    batch = next(data.batches(128))
    expected = module(batch)
    held = Sparse(module, "sgd", 0.0)
    assert torch.allclose(module(batch), expected, atol=1e-6)
    held.release()
    assert torch.equal(module(batch), expected)


def test_auto_goes_by_size_and_by_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = dnn()
    assert sparse.numbers(module) == 70 * 4
    assert train._kind(module, Recipe(tables="auto")) == "dense"
    monkeypatch.setattr(sparse, "LARGE", 280)
    kinds = {o: train._kind(module, Recipe(tables="auto", optimizer=o)) for o in ("adam", "adamw", "adagrad", "sgd")}  # type: ignore[arg-type]
    assert kinds == {"adam": "lazy-adam", "adamw": "lazy-adam", "adagrad": "adagrad", "sgd": "sgd"}


def test_tables_that_lie_end_to_end_stay_there() -> None:
    tables = [nn.Embedding(n, 4) for n in (5, 3, 7)]
    before = [t.weight.detach().clone() for t in tables]
    one = Matrix(tables, "sgd", 0.0)
    two = Matrix(tables, "sgd", 0.0)
    other = Matrix(tables[1:], "sgd", 0.0)
    assert one.rows.data_ptr() == two.rows.data_ptr() != other.rows.data_ptr()
    assert [start for _, start in two.sources] == [0, 0, 5, 8] and [start for _, start in other.sources] == [0, 0, 3]
    assert all(torch.equal(t.weight, b) for t, b in zip(tables, before, strict=True))


# -- int8 rows -------------------------------------------------------------------------------------------------------------

INT8 = dataclasses.replace(RECIPE, tables="adagrad", lr=0.02, rows="int8", epochs=4, patience=9)


def test_rounding_by_chance_keeps_the_mean_and_is_within_a_level() -> None:
    torch.manual_seed(0)
    given = torch.randn(20, 8)
    level = (given.amax(1) - given.amin(1)) / 255
    made = torch.stack([unpack_rows(rounded(given, torch.rand(20, 8)), 8) for _ in range(2000)])
    assert ((made - given).abs() <= level.unsqueeze(1) * 1.001).all()
    assert ((made.mean(0) - given).abs() < 0.05 * level.unsqueeze(1)).all()
    assert torch.equal(unpack_rows(rounded(torch.zeros(2, 8), torch.rand(2, 8)), 8), torch.zeros(2, 8))


def test_the_chance_is_even_and_belongs_to_the_row_and_the_step() -> None:
    ids = torch.arange(1000)
    drawn = sparse._chance(ids, 16, 3, 7)
    counts = torch.histc(drawn, 10, 0.0, 1.0)
    assert drawn.min() >= 0 and drawn.max() < 1 and (counts - 1600).abs().max() < 200
    assert torch.equal(sparse._chance(ids[500:510], 16, 3, 7), drawn[500:510])
    for other in (sparse._chance(ids, 16, 4, 7), sparse._chance(ids, 16, 3, 8)):
        assert abs(torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1]) < 0.03


def test_int8_rows_learn_as_well_in_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    plain, one, two = (DeepFM(COLUMNS, dim=16, hidden=(32,)) for _ in range(3))
    for module in (one, two):
        module.load_state_dict(plain.state_dict())
    best = fit(plain, rows(), rows(1), dataclasses.replace(INT8, rows="fp32"))
    done = fit(one, rows(), rows(1), INT8)
    fit(two, rows(), rows(1), INT8)
    assert same(one, two) and abs(best.metric - done.metric) < 0.01
    made = sparse.layers(one)
    assert {p: (t.rows, t.data_type, t.padding) for p, t in made.items()} == {
        "embeddings.tables.user": (30, "int8", 0), "embeddings.tables.item": (40, "int8", 0)
    }  # fmt: skip
    for table in one.embeddings.tables.values():
        assert table.packed.shape[1] == 24 and not unpack_rows(table.packed, 8)[0].any()
    spec = spec_of(DeepFM, columns=COLUMNS, dim=16, hidden=(32,)).with_layers(made)
    again = Model.of(one, spec).build()
    batch = next(rows(1).batches(64))
    with torch.inference_mode():
        assert torch.allclose(again(batch), one.eval()(batch), atol=1e-6)
    more = fit(again := Model.of(one, spec).build(copy=True), rows(2), rows(1), INT8)
    assert more.metric >= done.metric - 0.01 and sparse.layers(again) == made, "packed tables go on learning"


def test_int8_rows_stopped_and_gone_on_with_are_the_same(tmp_path: Path) -> None:
    whole, parts, fresh = nets(3)
    done = fit(whole, rows(), rows(1), INT8)

    def stop(event: Progress | EpochLog) -> None:
        if isinstance(event, EpochLog) and event.epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)

    fit(parts, rows(), rows(1), INT8, checkpoint=tmp_path / "c", progress=stop)
    assert fit(fresh, rows(), rows(1), INT8, checkpoint=tmp_path / "c").metric == done.metric and same(fresh, whole)


def test_a_model_of_int8_tables_alone_learns() -> None:
    torch.manual_seed(0)
    module = MatrixFactorization(COLUMNS, dim=8)
    assert fit(module, rows(), rows(1), dataclasses.replace(INT8, loss="bce", lr=0.1)).metric > 0.6


def test_int8_rows_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="let tables be auto"):
        Recipe(rows="int8")

    class Matrix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(40, 4)

        def forward(self, batch: Any) -> Tensor:
            return (self.table(batch["item"]) @ self.table.weight.T).sum(1)

    with pytest.raises(ConfigError, match="trained by lookups only"):
        fit(Matrix(), rows(), rows(1), INT8)
