"""Tables: every layout and data type against plain rows, with FBGEMM's operators and without."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from pennyweight.core.config import dumps, loads
from pennyweight.core.errors import ConfigError
from pennyweight.model import tables
from pennyweight.model.spec import Layer
from pennyweight.model.tables import Table, rows_of

ROWS = 37
BITS = {"int8": 8, "int4": 4, "int2": 2}
ERROR = {"fp32": 0.0, "fp16": 1e-3, "int8": 0.02, "int4": 0.25, "int2": 1.2}
"""Largest error of standard normal rows."""


def rows(dim: int, seed: int = 0) -> Tensor:
    weight = torch.randn(ROWS, dim, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    return weight


def full(data_type: str, dim: int = 16, **fields: object) -> tuple[Table, nn.Module]:
    layer = Table(ROWS, dim, data_type=data_type, **fields)
    return layer, loaded(layer, layer.encode(rows(dim)))


def codebook(data_type: str, dim: int = 16, parts: int = 4, count: int = 200, **fields: object) -> tuple[Table, nn.Module]:
    layer = Table(ROWS, dim, "codebook", data_type, parts, count, **fields)
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, count, (ROWS, parts), generator=g, dtype=torch.uint8)
    books = torch.randn(parts, count, layer.width, generator=g)
    if layer.padding is not None:
        codes[layer.padding], books[:, 0] = 0, 0
    return layer, loaded(layer, layer.encode_codebook(codes, books))


def loaded(layer: Table, state: dict[str, Tensor]) -> nn.Module:
    module = layer.build()
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


def bag(module: nn.Module, mode: str, **fields: object) -> nn.EmbeddingBag:
    weight = rows_of(module)
    return nn.EmbeddingBag(*weight.shape, mode=mode, _weight=weight, padding_idx=0, **fields).eval()


every = [
    *(pytest.param(lambda t=t, d=d, **f: full(t, d, **f), id=f"full-{t}-{d}") for t in ERROR for d in (16, 7)),
    *(
        pytest.param(lambda t=t, d=d, **f: codebook(t, d, **f), id=f"codebook-{t}-{d}")
        for t in list(ERROR)[:-1]
        for d in (16, 7)
    ),
    *(
        pytest.param(lambda t=t, d=d, c=c, **f: codebook(t, d, d, c, **f), id=f"codebook-{c}-{t}-{d}")
        for c, t in ((16, "fp32"), (5, "int8"), (4, "fp32"), (3, "int4"), (2, "fp16"))
        for d in (16, 7)
    ),
]


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small tables are executed from plain rows, large ones as they are stored."""
    if request.param == "large":
        monkeypatch.setattr(tables, "SMALL", 0)
    return str(request.param)


@pytest.mark.parametrize("made", every)
def test_answers_like_an_embedding_of_its_rows(made, size: str) -> None:
    layer, module = made(padding=0)
    plain = nn.Embedding.from_pretrained(rows_of(module), padding_idx=0)
    for shape in ((), (5,), (2, 3), (2, 3, 4), (0,), (0, 3)):
        ids = torch.randint(0, ROWS, shape)
        with torch.inference_mode():
            torch.testing.assert_close(module(ids), plain(ids), atol=1e-6, rtol=0)
    assert rows_of(module).dtype == torch.float32 and not rows_of(module)[0].any()
    assert (module.num_embeddings, module.embedding_dim, module.padding_idx) == (ROWS, layer.dim, 0)


@pytest.mark.parametrize("made", every)
def test_bytes_are_the_bytes_of_its_state(made) -> None:
    layer, module = made()
    assert layer.bytes() == sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert loads(Layer, dumps(layer)) == layer == Table.of(module)


@pytest.mark.parametrize(("codes", "bits"), [(2, 1), (3, 2), (4, 2), (5, 4), (16, 4), (17, 8), (256, 8)])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_codes_take_the_bits_they_need(codes: int, bits: int, parts: int) -> None:
    layer = Table(ROWS, 8, "codebook", parts=parts, codes=codes)
    given = torch.randint(0, codes, (ROWS, parts), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    stored = layer.pack_codes(given)
    assert layer.code_bits == bits and stored.shape == (ROWS, -(-parts * bits // 8))
    assert torch.equal(layer.unpack_codes(stored), given)
    assert (bits == 8) == (stored is given)


@pytest.mark.parametrize(("data_type", "dim"), list(itertools.product(ERROR, (16, 7, 1))))
def test_rounding_is_as_small_as_the_bits_allow(data_type: str, dim: int) -> None:
    _, module = full(data_type, dim)
    assert (rows_of(module) - rows(dim)).abs().max() <= ERROR[data_type]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("made", every)
def test_joins_bags_as_pytorch_does(made, mode: str, size: str) -> None:
    _, module = made(padding=0, bag=mode)
    plain = bag(module, mode)
    square = torch.tensor([[0, 3, 4], [0, 0, 0], [5, 0, 5]])
    flat, offsets = torch.tensor([1, 2, 0, 3, 4, 4]), torch.tensor([0, 2, 2, 3])
    with torch.inference_mode():
        torch.testing.assert_close(module(square), plain(square), atol=1e-5, rtol=0)
        torch.testing.assert_close(module(flat, offsets), plain(flat, offsets), atol=1e-5, rtol=0)
        torch.testing.assert_close(module(flat.int(), offsets), plain(flat, offsets), atol=1e-5, rtol=0)
        if mode == "sum":
            w, weights = torch.rand(6), torch.rand(3, 3)
            torch.testing.assert_close(module(flat, offsets, w), plain(flat, offsets, w), atol=1e-5, rtol=0)
            torch.testing.assert_close(module(square, None, weights), plain(square, None, weights), atol=1e-5, rtol=0)


@pytest.mark.parametrize("made", every)
def test_bags_may_name_their_last_offset(made, size: str) -> None:
    _, module = made(padding=0, bag="sum", include_last_offset=True)
    flat, offsets = torch.tensor([1, 2, 0, 3]), torch.tensor([0, 2, 4])
    want = bag(module, "sum", include_last_offset=True)
    torch.testing.assert_close(module(flat, offsets), want(flat, offsets), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("data_type", "dim"), list(itertools.product(BITS, (16, 7))))
def test_without_the_operators_the_numbers_are_the_same(data_type: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SMALL", 0)
    layer, with_operators = full(data_type, dim)
    ids = torch.arange(ROWS)
    want = with_operators(ids)
    monkeypatch.setattr(tables, "_operator", lambda name: None)
    without = loaded(layer, with_operators.state_dict())
    torch.testing.assert_close(without(ids), want, atol=1e-6, rtol=0)
    # Packing without them searches ranges in another order of sums: a row may end at a neighbouring local minimum.
    repacked = loaded(layer, layer.encode(rows(dim)))
    torch.testing.assert_close((repacked(ids) - rows(dim)).norm(), (want - rows(dim)).norm(), atol=0, rtol=0.01)
    same = (repacked.packed == with_operators.packed).all(1)
    assert same.float().mean() > 0.9


def test_the_range_search_is_worth_it() -> None:
    weight = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    searched = tables.unpack_rows(tables.pack_rows(weight, 4), 4)
    plain = tables.unpack_rows(torch.ops.quantized.embedding_bag_4bit_prepack(weight), 4)
    assert (searched - weight).norm() < 0.95 * (plain - weight).norm()


@pytest.mark.parametrize("data_type", BITS)
def test_a_table_of_one_row(data_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Table(1, 6, data_type=data_type)
    module = loaded(layer, layer.encode(rows(6, seed=3)[5:6]))
    want = rows_of(module)
    torch.testing.assert_close(module.small().weight, want)
    monkeypatch.setattr(tables, "_operator", lambda name: None)
    torch.testing.assert_close(loaded(layer, layer.encode(want)).weight, want, atol=1e-2, rtol=0)


@pytest.mark.parametrize("data_type", ["int8", "int4", "int2"])
def test_constant_and_huge_rows_survive(data_type: str) -> None:
    weight = torch.tensor([[0.0] * 8, [0.5] * 8, [3e4, *[-3e4] * 7]])
    layer = Table(3, 8, data_type=data_type)
    got = rows_of(loaded(layer, layer.encode(weight)))
    torch.testing.assert_close(got, weight, rtol=2e-3, atol=0)


@pytest.mark.parametrize("made", every)
def test_plain_is_the_same_table(made, size: str) -> None:
    _, module = made(padding=0)
    plain = module.plain() if hasattr(module, "plain") else module
    ids = torch.randint(0, ROWS, (3, 4))
    torch.testing.assert_close(plain(ids), module(ids), atol=1e-6, rtol=0)
    assert all(t.dtype == torch.float32 for n, t in plain.state_dict().items() if "book" in n or "weight" in n)


@pytest.mark.parametrize("data_type", ["fp32", "int8"])
def test_a_large_codebook_exports_small(data_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SMALL", 0)
    _, module = codebook(data_type, dim=7)
    program = torch.export.export(module.plain(), (torch.randint(0, ROWS, (5,)),))
    ids = torch.randint(0, ROWS, (5,))
    torch.testing.assert_close(program.module()(ids), module(ids))
    assert not any(t.shape == (ROWS, 7) for t in program.state_dict.values())


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("made", every)
def test_new_weights_are_seen_at_once(made, size: str, copied: bool) -> None:
    _, module = made(padding=0)
    ids = torch.arange(ROWS)
    module(ids)
    other = copy.deepcopy(module) if copied else module
    state = {name: t.roll(1, 0) if t.shape[0] == ROWS else t for name, t in module.state_dict().items()}
    other.load_state_dict({n: t.clone() for n, t in state.items()}, assign=copied)
    torch.testing.assert_close(other(ids), rows_of(other))
    assert other(ids)[1:].any() and not other(ids)[1].any()


def test_codebooks_train_and_the_padding_row_stays_zero(size: str) -> None:
    _, module = codebook("fp32", padding=0)
    module.requires_grad_(True)
    ids = torch.arange(ROWS)
    with torch.no_grad():
        before = module(ids).clone()
    optimizer = torch.optim.Adam(module.parameters(), 0.1, weight_decay=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        (module(ids) - 1).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        after = module(ids)  # validation inside a training sees the codebooks as they are now
    assert (after - before).abs().max() > 0.1 and not after[0].any()
    torch.testing.assert_close(after, module(ids))
    assert [n for n, _ in module.named_parameters()] == ["codebooks"]


@pytest.mark.parametrize("made", every)
def test_only_fp32_numbers_are_trainable(made) -> None:
    layer, module = made()
    assert bool(list(module.parameters())) == (layer.data_type == "fp32")


def test_max_norm_is_part_of_the_rows() -> None:
    module = nn.Embedding(ROWS, 4, max_norm=0.5)
    assert rows_of(module).norm(dim=1).max() <= 0.5 + 1e-6
    ids = torch.arange(ROWS)
    torch.testing.assert_close(rows_of(module), module(ids).detach())


def test_what_is_no_plain_table_is_not_taken_for_one() -> None:
    class Odd(nn.Embedding):
        pass

    for module in (Odd(3, 2), nn.Embedding(3, 2, dtype=torch.float64), nn.Linear(3, 2), nn.Sequential()):
        assert Table.of(module) is None
    assert Table.of(nn.Embedding(3, 2, padding_idx=1)) == Table(3, 2, padding=1)
    assert Table.of(nn.EmbeddingBag(3, 2, mode="max")) == Table(3, 2, bag="max")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"parts": 2}, "a full table has no parts"),
        ({"layout": "codebook", "parts": 9, "codes": 16}, "1 to 8 parts"),
        ({"layout": "codebook", "parts": 2, "codes": 257}, "2 to 256 codes"),
        ({"layout": "codebook", "parts": 2, "codes": 16, "data_type": "int2"}, "cannot be int2"),
    ],
)
def test_impossible_tables_are_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Table(10, 8, **fields)


def test_operations_are_counted() -> None:
    assert Table(10, 8).flops() == 0
    assert Table(10, 8, data_type="int4").flops() == 16
    assert Table(10, 8, data_type="int4", bag="sum").flops() == 24
    assert Table(10, 8, "codebook", "int8", 2, 16).flops() == 0
