"""Hot rows answer as the table does, follow what is asked, and keep within their bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pennyweight.accelerate.cache import OWN, HotTable, KeepHot, cacheable, hit_rate
from pennyweight.accelerate.runner import Runner
from pennyweight.core.errors import BundleError, ConfigError
from pennyweight.core.measure import peak_memory
from pennyweight.data.schema import Column
from pennyweight.model.bundle import Bundle, Runtime, load, save
from pennyweight.model.placement import Placement
from pennyweight.model.ranking import DNN
from pennyweight.model.spec import Model, build, spec_of
from pennyweight.model.tables import Table

ROWS, DIM = 20_000, 16
TYPES = ("fp32", "fp16", "int8", "int4", "int2")


def table(data_type: str = "fp32", **settings: object) -> nn.Module:
    layer = Table(ROWS, DIM, data_type=data_type, **settings)  # type: ignore[arg-type]
    module = layer.build()
    module.load_state_dict(layer.encode(torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))))
    return module.eval()


def asked(n: int, seed: int = 0, shift: int = 0) -> Tensor:
    """Ids by a power law, the frequent ones scattered over the table."""
    draw = np.random.default_rng(seed)
    rank = np.minimum(draw.zipf(1.2, n), ROWS) + shift
    return torch.from_numpy(rank * 7919 % ROWS)


@pytest.mark.parametrize("data_type", TYPES)
def test_answers_are_the_tables_bit_for_bit(data_type: str) -> None:
    plain, hot = table(data_type), HotTable(table(data_type), 100_000)
    for k in range(30):
        ids = asked(1000, k).reshape(20, 50)
        assert torch.equal(hot(ids), plain(ids))
    assert 0.5 < hot.hit_rate < 1 and hot.hits > 0


@pytest.mark.parametrize("bag", ["sum", "mean", "max"])
def test_bags_are_joined_as_the_tables_are(bag: str) -> None:
    plain, hot = table("int8", bag=bag, padding=0), HotTable(table("int8", bag=bag, padding=0), 50_000)
    for k in range(10):
        ids = asked(600, k).reshape(60, 10)
        ids[:, 7:] = 0
        assert torch.allclose(hot(ids), plain(ids), atol=1e-5)


@pytest.mark.parametrize("data_type", TYPES)
@pytest.mark.parametrize("room", [0, 10_000, 100_000, 10**9])
def test_the_bytes_are_kept(data_type: str, room: int) -> None:
    hot = HotTable(table(data_type), room)
    for k in range(20):
        hot(asked(2000, k))
    assert hot.bytes <= max(room, 0) and hot.size == min(ROWS, room // (hot._rows.element_size() * hot._rows.shape[1] + OWN))
    assert (hot.hit_rate > 0) == (room > 0)


def test_what_is_asked_becomes_hot() -> None:
    """A twentieth of the rows answers most lookups, nearly as many as the best set of that size would."""
    hot = HotTable(table(), (DIM * 4 + OWN) * ROWS // 20)
    for k in range(40):
        hot(asked(4000, k))
    hot.hits = hot.lookups = 0
    late = asked(40_000, 99)
    hot(late)
    best = torch.bincount(late, minlength=ROWS).sort(descending=True).values[: hot.size].sum() / len(late)
    assert hot.hit_rate > 0.9 * float(best) > 0.6


def test_a_set_follows_a_change_and_survives_a_scan() -> None:
    hot = HotTable(table(), (DIM * 4 + OWN) * 1000)
    for k in range(30):
        hot(asked(4000, k))
    kept = set(hot._ids.tolist())
    hot(torch.arange(ROWS))
    assert len(kept & set(hot._ids.tolist())) > 0.5 * len(kept), "a scan counts each row once"
    for k in range(40):
        hot(asked(4000, k, shift=5000))
    hot.hits = hot.lookups = 0
    hot(asked(4000, 77, shift=5000))
    assert hot.hit_rate > 0.6


def test_a_ranking_is_hot_from_the_first_lookup() -> None:
    hot = HotTable(table("int8"), 50_000)
    ids = asked(1, 5).repeat(100)
    hot.rank(torch.cat([ids[:1], torch.arange(5000)]).unique())
    hot.rank(torch.arange(ROWS).flip(0))
    hot(torch.tensor([ROWS - 1, 0]))
    assert hot.hits == 1


def test_it_is_a_transform() -> None:
    assert KeepHot(1000).describe() == "keep 1,000 bytes of hot rows near the compute"
    with pytest.raises(ConfigError, match="-1"):
        KeepHot(-1)


def test_only_tables_with_rows() -> None:
    shared = Table(100, 8, layout="codebook", parts=2, codes=16).build()
    assert not cacheable(shared) and not cacheable(nn.Linear(2, 2)) and cacheable(nn.Embedding(3, 2))
    with pytest.raises(ConfigError, match="CodebookTable has no rows to keep hot"):
        HotTable(shared, 100)


COLUMNS = (Column("user", "user", "categorical", 400_000), Column("item", "item", "categorical", 50))


def large(folder: Path) -> Bundle:
    """25 MB of users on disk, 1 MB of memory for the hot ones."""
    spec = spec_of(DNN, columns=COLUMNS, dim=16, hidden=(8,), norm=False)
    bundle = Bundle(Model.of(build(spec), spec))
    path = next(k for k, t in bundle.model.state.items() if len(t) >= 400_000).rpartition(".")[0]
    return bundle.replace(placement=Placement(tables={path: "disk"}), runtime=Runtime(threads=1, hot_bytes=1 << 20))


def requests(n: int) -> list[dict[str, Tensor]]:
    draw = np.random.default_rng(0)
    users = np.minimum(draw.zipf(1.3, (n, 200)), 399_000) + 2
    return [{"user": torch.from_numpy(u), "item": torch.arange(200) % 48 + 2} for u in users]


def test_a_bundle_says_so_and_serves(tmp_path: Path) -> None:
    bundle = large(tmp_path)
    plain = bundle.replace(placement=Placement(), runtime=Runtime(threads=1))
    given = load(save(bundle, tmp_path / "bundle"), mapped=True)
    assert given.runtime.hot_bytes == 1 << 20
    with Runner(given) as runner, Runner(plain) as other:
        for batch in requests(60):
            assert runner.score(batch) == pytest.approx(other.score(batch), abs=1e-6)
        assert hit_rate(runner.hot) > 0.6 and sum(t.bytes for t in runner.hot.values()) <= 1 << 20


def _anonymous() -> int:
    """Bytes this process holds that no file could give back: pages of a mapped file are the kernel's to drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def _serve(path: str, most: int) -> None:
    before = _anonymous()
    with Runner(load(path, mapped=True)) as runner:
        for batch in requests(20):
            runner.score(batch)
        assert (held := _anonymous() - before) < most, f"{held:,} bytes are held"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to ask what a process holds")
def test_a_model_larger_than_its_memory_serves(tmp_path: Path) -> None:
    """Loading and answering must hold less than half the weights, code and buffers included."""
    bundle = large(tmp_path).replace(catalog=None)
    whole = bundle.bytes
    assert whole > 25_000_000
    path = save(bundle, tmp_path / "bundle")
    peak_memory(_serve, str(path), whole // 2 + 5_000_000)
    with pytest.raises(AssertionError, match="bytes are held"):
        peak_memory(_serve, str(path), 1 << 20)


def test_a_mapped_bundle_is_checked(tmp_path: Path) -> None:
    path = save(large(tmp_path), tmp_path / "bundle")
    weights = path / "weights.safetensors"
    whole = weights.read_bytes()
    first, second = load(path), load(path, mapped=True)
    assert all(torch.equal(t, second.model.state[k]) for k, t in first.model.state.items())
    for damaged in (whole[:-1], whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:], b""):
        weights.write_bytes(damaged)
        with pytest.raises(BundleError, match="SHA-256"):
            load(path, mapped=True)
    weights.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        load(path, mapped=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("data_type", TYPES)
def test_hot_rows_on_a_gpu(data_type: str) -> None:
    plain, hot = table(data_type), HotTable(table(data_type), 100_000, "cuda")
    for k in range(20):
        ids = asked(1000, k)
        assert torch.allclose(hot(ids.cuda()).cpu(), plain(ids), atol=1e-6)
    assert hot.hit_rate > 0.5 and hot._rows.device.type == "cuda"
