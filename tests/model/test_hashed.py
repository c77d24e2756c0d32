"""Tables that share numbers: one contract for every method, and what each promises beside it."""

import copy
import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pennyweight.core.config import dumps, loads
from pennyweight.core.errors import ConfigError
from pennyweight.model.hashed import (
    PRIME,
    Clustered,
    Hashed,
    HotRows,
    Narrow,
    Quotient,
    Robe,
    Shared,
    SharedTable,
    TensorTrain,
    salt,
    spread,
)
from pennyweight.model.spec import Layer, replace
from pennyweight.model.tables import Table

ROWS = 1000
KINDS: dict[str, tuple[type[Shared], dict[str, object]]] = {
    "hashed": (Hashed, {"size": 50}),
    "hot-rows": (HotRows, {"hot": 20, "size": 40}),
    "quotient": (Quotient, {"size": 60}),
    "quotient-add": (Quotient, {"size": 60, "operation": "add"}),
    "robe": (Robe, {"size": 701, "block": 4}),
    "tensor-train": (TensorTrain, {"rank": 5}),
    "clustered": (Clustered, {"size": 30, "codes": 16}),
    "narrow": (Narrow, {"width": 3}),
}
every = pytest.mark.parametrize("kind", KINDS)


def layer(kind: str, dim: int = 12, rows: int = ROWS, **more: object) -> Shared:
    cls, fields = KINDS[kind]
    return cls(rows=rows, dim=dim, **fields, **more)  # type: ignore[arg-type]


def table(made: Shared, std: float = 0.5, seed: int = 0) -> SharedTable:
    module = made.build()
    state = made.start(std, seed)
    if isinstance(made, HotRows):
        state |= made.owned(torch.arange(made.rows, 0, -1.0))
    module.load_state_dict(state)
    return module


@every
@pytest.mark.parametrize("dim", [12, 7, 1])
def test_answers_like_an_embedding_of_its_rows(kind: str, dim: int) -> None:
    if kind == "clustered" and dim < 4:
        pytest.skip("four chunks need four numbers")
    module = table(layer(kind, dim, padding=3)).eval()
    weight = module.weight.detach()
    assert weight.shape == (ROWS, dim) and weight.dtype == torch.float32 and not weight[3].any()
    plain = nn.Embedding.from_pretrained(weight, padding_idx=3)
    for shape in ((), (5,), (2, 3), (2, 3, 4), (0,), (0, 3)):
        ids = torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(module(ids), plain(ids), atol=1e-6, rtol=1e-5)
    assert torch.equal(module(torch.arange(9, dtype=torch.int32)), module(torch.arange(9)))
    assert (module.num_embeddings, module.embedding_dim, module.padding_idx) == (ROWS, dim, 3)


@every
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_joins_bags_as_embedding_bag_does(kind: str, mode: str) -> None:
    module = table(layer(kind, padding=0, bag=mode))
    plain = nn.EmbeddingBag.from_pretrained(module.weight.detach(), mode=mode, padding_idx=0)
    g = torch.Generator().manual_seed(2)
    square, flat = torch.randint(0, ROWS, (6, 5), generator=g), torch.randint(0, ROWS, (9,), generator=g)
    square[0], square[1, 2:] = 0, 0
    offsets = torch.tensor([0, 4, 4, 7])
    torch.testing.assert_close(module(square), plain(square), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(module(flat, offsets), plain(flat, offsets), atol=1e-6, rtol=1e-5)
    if mode == "sum":
        weights = torch.rand(9, generator=g)
        got, want = (m(flat, offsets, per_sample_weights=weights) for m in (module, plain))
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
        square_weights = torch.rand(6, 5, generator=g)
        got, want = (m(square, per_sample_weights=square_weights) for m in (module, plain))
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    last = table(layer(kind, padding=0, bag=mode, include_last_offset=True))
    ends = torch.tensor([0, 4, 4, 9])
    torch.testing.assert_close(last(flat, ends), plain(flat, ends[:-1]), atol=1e-6, rtol=1e-5)


@every
def test_bytes_are_those_of_the_state(kind: str) -> None:
    made = layer(kind)
    module = table(made)
    assert made.bytes() == sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert made.bytes() < Table(ROWS, 12).bytes() and made.flops() > 0


@every
def test_a_state_and_a_layer_are_all_there_is(kind: str) -> None:
    """No map is drawn anew: what JSON and a state dict say gives the same rows."""
    made = layer(kind, padding=0)
    module = table(made)
    again = loads(Layer, dumps(made)).build()  # type: ignore[type-abstract]
    again.load_state_dict(module.state_dict())
    torch.manual_seed(5)
    assert torch.equal(again.weight, module.weight)
    assert set(again.state_dict()) == set(made.start(1.0, 0))


@every
def test_the_first_numbers_are_as_wide_as_asked_and_of_the_seed(kind: str) -> None:
    cls, _ = KINDS[kind]
    fields = {"hot": 400, "size": 4000, "rank": 8, "width": 16, "codes": 256, "operation": "add"}
    known = {f for f in cls.__dataclass_fields__ if f in fields}
    if kind == "quotient":
        known -= {"operation"}
    made = cls(rows=20_000, dim=16, **{f: fields[f] for f in known})  # type: ignore[arg-type]
    first, second, other = (made.start(0.02, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[n], second[n]) for n in first) and any(not torch.equal(first[n], other[n]) for n in first)
    module = made.build()
    module.load_state_dict(first)
    weight = module.weight.detach()
    assert 0.017 < float(weight.std()) < 0.023 and abs(float(weight.mean())) < 0.004


@every
def test_everything_is_trained_and_padding_is_not(kind: str) -> None:
    """A table fits rows it can hold, with gradients to every part; the padding row stays zero."""
    made = layer(kind, padding=2, rows=40)
    module = table(made)
    target = torch.randn(40, 12, generator=torch.Generator().manual_seed(3))
    target[2] = 0
    optimizer = torch.optim.Adam(module.parameters(), 0.03)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (module(torch.arange(40)) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and not module(torch.tensor([2])).any()


@every
def test_no_gradient_comes_from_padding(kind: str) -> None:
    module = table(layer(kind, padding=5))
    module(torch.full((3,), 5)).sum().backward()
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


@every
def test_parts_take_other_data_types(kind: str) -> None:
    """Layout and data type are two choices: a part becomes fp16 like any table."""
    module = table(layer(kind))
    want = module.weight.detach()
    for name, part in module.layer.parts().items():
        if isinstance(part, Table):
            half = Table(part.rows, part.dim, data_type="fp16")
            new = half.build()
            new.load_state_dict(half.encode(getattr(module, name).weight.detach()))
            replace(module, name, new)
    got = module.eval().requires_grad_(False).weight
    assert 0 < (got - want).abs().max() < 1e-2 * want.abs().max()


class Beside(nn.Module):
    """A table of each kind, all asked for the same ids."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(table(layer(kind, padding=0)) for kind in KINDS)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([t(ids) for t in self.tables], 1)


def test_onnx_runtime_gives_the_same_rows(tmp_path: Path) -> None:
    """They are graphs of ordinary operations, the hashes too."""
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = Beside().eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(module, (torch.arange(8),), tmp_path / "t.onnx", dynamic_shapes=({0: "n"},), verbose=False)
    ids = torch.arange(ROWS)
    session = ort.InferenceSession(tmp_path / "t.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    np.testing.assert_allclose(got, module(ids).numpy(), atol=1e-6, rtol=1e-5)


def test_hashes_are_fixed_and_even() -> None:
    """Stored bundles depend on these numbers: they are of the words alone."""
    assert salt(7, 0) == (1410680900, 1640609043)
    ids = torch.arange(200_000)
    counts = torch.bincount(spread(ids, 100, 7, 0), minlength=100)
    assert counts.min() > 1900 and counts.max() < 2100
    both = spread(ids, 100, 7, 0) * 100 + spread(ids, 100, 7, 1)
    assert torch.bincount(both, minlength=10_000).max() < 80, "two hashes of a seed are independent"
    assert not torch.equal(spread(ids, 100, 7, 0), spread(ids, 100, 8, 0))
    assert spread(torch.tensor([PRIME - 1]), 100, 7, 0).ge(0).all(), "no overflow at the largest id"


def test_hot_ids_own_a_row_and_the_hottest_of_a_slot_wins() -> None:
    made = layer("hot-rows")
    counts = torch.zeros(ROWS)
    counts[[5, 17, 400]] = torch.tensor([9.0, 3.0, 1.0])
    owners = made.owned(counts)["owners"]
    assert owners.dtype == torch.int32 and set(owners.tolist()) <= {-1, 5, 17, 400} and 5 in owners
    everybody = made.owned(torch.arange(ROWS, 0, -1.0))["owners"].long()
    slots = spread(torch.arange(ROWS), made.hot, made.seed, 0)
    first = {int(s): i for i, s in reversed(list(enumerate(slots.tolist())))}
    assert {s: int(o) for s, o in enumerate(everybody)} == first
    module = table(made)
    hot = everybody[0]
    rest = torch.tensor([i for i in range(ROWS) if i not in set(everybody.tolist())])
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.hot.weight += 1
    changed = (module.weight.detach() - before).abs().sum(1) > 0
    assert changed[hot] and not changed[rest].any() and int(changed.sum()) == len(set(everybody.tolist()))


@pytest.mark.parametrize("operation", ["multiply", "add"])
def test_no_two_ids_have_the_same_quotient_and_remainder(operation: str) -> None:
    weight = table(Quotient(rows=500, dim=4, size=23, operation=operation)).weight.detach()
    assert len(torch.unique(weight, dim=0)) == 500


@pytest.mark.parametrize(("rows", "dim"), list(itertools.product((1, 2, 7, 1000, 1001, 12_345), (1, 7, 10, 16, 64))))
def test_a_tensor_train_has_a_row_for_every_id(rows: int, dim: int) -> None:
    made = TensorTrain(rows=rows, dim=dim, rank=2)
    assert math.prod(made.digits) >= rows and math.prod(made.widths) == dim
    assert max(made.digits) <= 2 * rows ** (1 / 3) + 1
    assert table(made)(torch.tensor([0, rows - 1])).shape == (2, dim)


def test_a_tensor_train_of_full_rank_is_its_cores_product() -> None:
    made = TensorTrain(rows=24, dim=8, rank=3)
    module = table(made)
    (p, q, r), (a, b, c), k = made.digits, made.widths, made.rank
    cores = [module.first.weight.view(p, a, k), module.middle.weight.view(q, k, b, k), module.last.weight.view(r, k, c)]
    dense = torch.einsum("pax,qxby,ryc->pqrabc", *cores).reshape(p * q * r, a * b * c)
    torch.testing.assert_close(module.weight, dense[:24], atol=1e-6, rtol=1e-5)


def test_a_robe_row_is_cut_block_by_block() -> None:
    made = Robe(rows=100, dim=8, size=31, block=4)
    module = table(made)
    array, weight = module.array.weight.detach().flatten(), module.weight.detach()
    for id in (0, 7, 99):
        for k in range(2):
            place = int(spread(torch.tensor(id), 31, 0, k, 0))
            piece = array.roll(-place)[:4] if place + 4 > 31 else array[place : place + 4]
            assert torch.equal(weight[id, 4 * k : 4 * k + 4].abs(), piece.abs())
    share = float((table(Robe(rows=4000, dim=8, size=31, block=4)).weight.sign() > 0).float().mean())
    assert 0.3 < share < 0.7


def test_a_narrow_table_has_low_rank() -> None:
    assert torch.linalg.matrix_rank(table(layer("narrow")).weight.detach()) == 3


def test_a_table_in_a_module_is_found_deep_copied_and_printed() -> None:
    module = nn.Sequential(table(layer("hot-rows")))
    twin = copy.deepcopy(module)
    assert torch.equal(twin(torch.arange(9)), module(torch.arange(9))) and "HotRows(rows=1000" in repr(module)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hashed(rows=10, dim=4, size=0), r"at least 1 of everything, got \{'size': 0\}"),
        (lambda: Narrow(rows=0, dim=4, width=2), "at least 1 of everything"),
        (lambda: Hashed(rows=2**31, dim=4, size=9), "up to 2147483647 ids"),
        (lambda: Clustered(rows=10, dim=4, size=9, codes=300), "up to 256 clusters in 4 chunks"),
        (lambda: Clustered(rows=10, dim=4, size=9, chunks=5), "not 256 in 5"),
    ],
)
def test_impossible_shapes_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
