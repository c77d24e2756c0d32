"""The runner scores as the bundle says, leaves the process as it was, and holds only what it needs."""

import gc
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pennyweight.accelerate import compile as engines
from pennyweight.accelerate.runner import Runner
from pennyweight.core import hardware
from pennyweight.core.errors import ConfigError, DeviceError
from pennyweight.data.schema import Column
from pennyweight.model.bundle import Bucket, Bundle, Runtime
from pennyweight.model.placement import Placement
from pennyweight.model.ranking import DeepFM
from pennyweight.model.retrieval import TwoTower
from pennyweight.model.spec import Batch, Model, Spec, build, call, spec_of

COLUMNS = (
    Column("user", "user", "categorical", 40),
    Column("item", "item", "categorical", 300),
    Column("history", "user", "sequence", 300, 5, shares="item"),
    Column("age", "user", "numeric"),
)
ITEMS = "embeddings.tables.item"


def batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "user": torch.full((rows,), 7),
        "item": torch.randint(2, 300, (rows,), generator=g),
        "history": torch.randint(0, 300, (1, 5), generator=g).expand(rows, 5),
        "age": torch.randn(1, generator=g).expand(rows),
    }


def bundle(factory: type[nn.Module] = DeepFM, **changes: object) -> Bundle:
    torch.manual_seed(0)
    spec = spec_of(factory, columns=COLUMNS, dim=8, hidden=(16,))
    module = build(spec)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.3)
    return Bundle(Model.of(module, spec)).replace(**changes)


def expected(given: Bundle, rows: int = 20) -> np.ndarray:
    with torch.inference_mode():
        return call(given.model.build(), batch(rows)).numpy()


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_scores_are_float32_logits() -> None:
    given = bundle()
    scores = Runner(given).score(batch(20))
    assert scores.dtype == np.float32 and scores.shape == (20,)
    np.testing.assert_array_equal(scores, expected(given))


@pytest.mark.parametrize("size", [1, 7, 20, 1000])
def test_a_request_is_cut(size: int) -> None:
    runner = Runner(bundle(runtime=Runtime("eager", 1, size)))
    sizes: list[int] = []
    runner.module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]["item"])))
    np.testing.assert_allclose(runner.score(batch(20)), expected(bundle()), rtol=1e-5, atol=1e-6)
    assert sum(sizes) == 20 and max(sizes) == min(size, 20)


@pytest.mark.parametrize(("threads", "inside"), [(1, 1), (3, 3), (0, 2)])
def test_threads_are_its_own_for_a_call_only(threads: int, inside: int) -> None:
    runner = Runner(bundle(runtime=Runtime("eager", threads)))
    seen: list[int] = []
    runner.module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    runner.score(batch(3))
    assert seen == [inside] and torch.get_num_threads() == 2
    with pytest.raises(KeyError):
        runner.score({"user": torch.ones(1, dtype=torch.int64)})
    assert torch.get_num_threads() == 2, "also after an error"


def test_no_gradients_are_kept() -> None:
    runner = Runner(bundle())
    seen: list[bool] = []
    runner.module.register_forward_pre_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
    runner.score(batch(3))
    assert seen == [True]


def test_vectors_pass_through_or_say_why_not() -> None:
    given = bundle(TwoTower)
    runner, module = Runner(given), given.model.build()
    with torch.inference_mode():
        np.testing.assert_array_equal(runner.user_vectors(batch(4)), module.user_vectors(batch(4)))  # type: ignore[operator]
        np.testing.assert_array_equal(runner.item_vectors(batch(4)), module.item_vectors(batch(4)))  # type: ignore[operator]
    with pytest.raises(ConfigError, match="DeepFM has no item_vectors"):
        Runner(bundle()).item_vectors(batch(4))


def test_an_unallowed_factory_stays_unallowed() -> None:
    model = Model(Spec("collections:OrderedDict"), {})
    with pytest.raises(ConfigError, match="not allowed"):
        Runner(Bundle(model))
    with pytest.raises(ConfigError, match=r"must return a torch\.nn\.Module"):
        Runner(Bundle(model), allow=["collections"])


def test_an_engine_is_made_from_the_first_batch_or_the_probe() -> None:
    probes: list[int] = []

    def maker(module: nn.Module, runtime: Runtime, probe: Batch, inputs: object) -> engines.Scorer:
        probes.append(len(probe["item"]))
        assert torch.get_num_threads() == runtime.threads and not torch.is_inference_mode_enabled()
        return engines.eager(module)

    given = bundle(runtime=Runtime("onnxruntime", 1))
    late = Runner(given, maker=maker)
    assert probes == []
    late.score(batch(20))
    late.score(batch(3))
    assert probes == [20]
    Runner(given, probe=batch(5), maker=maker)
    assert probes == [20, 5]


def test_a_missing_engine_raises_or_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given = bundle(runtime=Runtime("onnxruntime", 1, 7))
    with pytest.raises(DeviceError, match="pip install onnxruntime"):
        Runner(given, probe=batch(20))
    runner = Runner(given, probe=batch(20), fallback=True)
    assert runner.engine == "eager" and "eager runs instead" in runner.note and "pip install onnxruntime" in caplog.text
    np.testing.assert_allclose(runner.score(batch(20)), expected(given), rtol=1e-5, atol=1e-6)


def test_a_table_on_disk_is_mapped_from_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    given = bundle(placement=Placement(tables={ITEMS: "disk", "embeddings.tables.user": "cpu"}))
    with Runner(given) as runner:
        np.testing.assert_array_equal(runner.score(batch(20)), expected(given))
        weight = runner.module.get_parameter(f"{ITEMS}.weight")
        where = next(line for line in Path("/proc/self/maps").read_text().splitlines() if _holds(line, weight.data_ptr()))
        assert f"{tmp_path}/pennyweight-" in where and where.endswith("(deleted)")
        assert not list(tmp_path.iterdir())
        del weight
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(), "closing lets the mapping go"


def _holds(line: str, address: int) -> bool:
    low, _, high = line.split(" ")[0].partition("-")
    return int(low, 16) <= address < int(high, 16)


def test_a_table_on_disk_leaves_memory_with_its_bundle() -> None:
    given = bundle(placement=Placement(tables={ITEMS: "disk"}))
    held = weakref.ref(given.model.state[f"{ITEMS}.weight"])
    runner = Runner(given)
    del given
    gc.collect()
    assert held() is None
    assert runner.score(batch(3)).shape == (3,)


def test_a_closed_runner_says_so() -> None:
    runner = Runner(bundle())
    runner.close()
    with pytest.raises(DeviceError, match="closed"):
        runner.score(batch(3))


def test_a_placement_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"names embeddings\.tables\.shop, which this model does not have"):
        Runner(bundle(placement=Placement(tables={"embeddings.tables.shop": "disk"})))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="cuda:0 and PyTorch sees no GPU"):
        Runner(bundle(placement=Placement(tables={ITEMS: "cuda:0"})))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rest", ["cuda:0", "cpu", "disk"])
def test_tables_on_a_gpu_and_beside_it(rest: str) -> None:
    placement = Placement(tables={ITEMS: "cuda:0", "embeddings.tables.user": rest})
    np.testing.assert_allclose(Runner(bundle(placement=placement)).score(batch(20)), expected(bundle()), rtol=1e-4, atol=1e-4)


def test_a_request_is_scored_in_parts_and_other_batches_are_not() -> None:
    given = bundle(runtime=Runtime("eager", 1, shared=True))
    runner = Runner(given, probe=batch(5))
    assert runner.shared is not None and runner.shared.user is not None
    seen: list[int] = []
    runner.module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]["item"])))
    request = {n: t if n == "item" else t[:1].expand(20, *t.shape[1:]) for n, t in batch(20).items()}
    np.testing.assert_allclose(runner.score(request), expected(given), rtol=1e-4, atol=1e-5)
    assert seen == [], "the plain module was not asked"
    np.testing.assert_allclose(runner.score(batch(20)), expected(given), rtol=1e-5, atol=1e-6)
    assert seen == [20], "a user column of its own for each row"


def test_kept_items_are_ranked_by_id() -> None:
    given = bundle(runtime=Runtime("eager", 1, shared=True))
    with Runner(given, probe=batch(5)) as runner:
        with pytest.raises(ConfigError, match="no items were kept"):
            runner.ranked([{}], [np.asarray([2])])
        ids = np.arange(2, 300)
        assert runner.keep(batch(5), {"item": torch.from_numpy(ids)}, ids, 300)
        whole = batch(20)
        asker = {n: t[:1] for n, t in whole.items() if n != "item"}
        some = np.asarray([2, 299])
        found = runner.ranked([asker, asker, asker], [whole["item"].numpy(), some[:0], some])
        np.testing.assert_allclose(found[0], expected(given), rtol=1e-4, atol=1e-5)
        assert [len(one) for one in found] == [20, 0, 2]
    assert not Runner(bundle(), probe=batch(5)).keep(batch(5), {"item": torch.from_numpy(ids)}, ids, 300)


def test_what_cannot_be_shared_is_scored_whole_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = bundle(TwoTower, runtime=Runtime("eager", 1, shared=True))
    monkeypatch.setattr("pennyweight.accelerate.runner._roles", lambda bundle: ({}, ""))
    runner = Runner(given)
    request = {n: t[:1].expand(20, *t.shape[1:]) if n != "item" else t for n, t in batch(20).items()}
    for _ in range(2):
        np.testing.assert_allclose(runner.score(request), expected(given), rtol=1e-5, atol=1e-6)
    assert caplog.text.count("every candidate is computed whole") == 1


def test_each_size_of_batch_has_its_engine() -> None:
    made: list[str] = []

    def maker(module: nn.Module, runtime: Runtime, probe: Batch, inputs: object) -> engines.Scorer:
        def score(batch: Batch) -> Tensor:
            made.append(f"{runtime.engine} {len(batch['item'])}")
            return call(module, batch)

        return score

    runtime = Runtime("fused", 1, 16, buckets=(Bucket(1, "onnxruntime", 1), Bucket(8, "eager", 2)))
    runner = Runner(bundle(runtime=runtime), probe=batch(5), maker=maker)
    for rows in (1, 2, 8, 20):
        np.testing.assert_allclose(runner.score(batch(rows)), expected(bundle(), rows), rtol=1e-5, atol=1e-6)
    assert made == ["onnxruntime 1", "eager 2", "eager 8", "fused 16", "fused 4"]
    with pytest.raises(ConfigError, match="buckets end at 8, 8 rows"):
        Runtime(buckets=(Bucket(8), Bucket(8)))


def test_a_runtime_of_another_machine_is_not_trusted(caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = Runtime("compile", 7, buckets=(Bucket(4, "aot"),), machine="a Cray, 1 cores")
    runner = Runner(bundle(runtime=elsewhere), probe=batch(5))
    assert runner.engine == "eager" and runner.runtime == Runtime("eager", 1)
    assert "chosen on 'a Cray, 1 cores'" in runner.note and "until it is tuned here" in caplog.text
    here = Runner(bundle(runtime=Runtime("eager", 2, machine=hardware.fingerprint())))
    assert not here.note and here.runtime.threads == 2
