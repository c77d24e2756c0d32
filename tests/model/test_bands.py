"""Tables in bands: an embedding to whoever calls, a table of its own for every band, and nothing stored but a code an id."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pennyweight.accelerate import compile
from pennyweight.core.config import dumps, loads
from pennyweight.core.errors import BundleError, ConfigError
from pennyweight.export import graph
from pennyweight.model.bands import BandedTable, Bands
from pennyweight.model.hashed import Hashed
from pennyweight.model.packed import Packed
from pennyweight.model.spec import Layer, replace
from pennyweight.model.tables import Table

ROWS, DIM = 1000, 6
SIZES = [(100, 900), (60, 240, 700), (10, 90, 300, 600), (0, 1, 999), (0, 400, 0, 600)]
every = pytest.mark.parametrize("sizes", SIZES, ids=str)


def member(sizes: tuple[int, ...], seed: int = 0) -> Tensor:
    """The band of each id, in no order."""
    bands = torch.arange(len(sizes), dtype=torch.uint8).repeat_interleave(torch.tensor(sizes))
    return bands[torch.randperm(len(bands), generator=torch.Generator().manual_seed(seed))]


def table(sizes: tuple[int, ...], dim: int = DIM, **more: object) -> BandedTable:
    layer = Bands(rows=sum(sizes), dim=dim, sizes=sizes, **more)  # type: ignore[arg-type]
    module = layer.build()
    module.load_state_dict({**layer.start(0.5, 0), **layer.coded(member(sizes))})
    return module


def mixed(sizes: tuple[int, ...], **more: object) -> BandedTable:
    """Every band stored in another way, the last as one row."""
    module = table(sizes, **more)
    kinds = [Table(9, DIM, data_type="int8"), Table(9, DIM, "codebook", parts=3, codes=16), Table(9, DIM, data_type="int4")]
    names = list(module.layer.parts())
    for name, kind in zip(names, itertools.cycle(kinds)):
        rows, dim = module.get_submodule(name).weight.shape
        if name == names[-1]:
            layer: Layer = Hashed(rows=rows, dim=dim, size=1)
            state = {"shared.weight": torch.randn(1, dim, generator=torch.Generator().manual_seed(1))}
        else:
            layer = Table(rows, dim, kind.layout, kind.data_type, kind.parts, kind.codes)
            g = torch.Generator().manual_seed(2)
            codes = torch.randint(16, (rows, 3), generator=g).to(torch.uint8)
            weight = torch.randn(rows, dim, generator=g)
            state = layer.encode_codebook(codes, torch.randn(3, 16, 2)) if kind.parts else layer.encode(weight)  # type: ignore[attr-defined]
        made = layer.build()
        made.load_state_dict(state)
        replace(module, name, made)
    return module.requires_grad_(False).eval()


def plain(module: nn.Module) -> nn.Module:
    return compile.plain(nn.Sequential(module))[0]  # type: ignore[index]


def small(module: nn.Module) -> nn.Module:
    return graph.small(nn.Sequential(module))[0]  # type: ignore[index]


@every
def test_an_id_has_its_row_in_its_band(sizes: tuple[int, ...]) -> None:
    """Ids of a band are its rows in their order."""
    module, bands = table(sizes).eval(), member(sizes)
    weight = module.weight.detach()
    for k, size in enumerate(sizes):
        if size:
            assert torch.equal(weight[bands == k], module.get_submodule(f"band{k}").weight.detach())
    assert weight.shape == (ROWS, DIM) and weight.dtype == torch.float32


@every
@pytest.mark.parametrize("made", [table, mixed])
def test_answers_like_an_embedding_of_its_rows(sizes: tuple[int, ...], made) -> None:
    module = made(sizes, padding=3).eval()
    weight = module.weight.detach()
    assert not weight[3].any()
    embedding = nn.Embedding.from_pretrained(weight, padding_idx=3)
    forms = module, plain(module), small(module)
    assert not any(isinstance(m, Packed) for form in forms[1:] for m in form.modules())
    for shape in ((), (5,), (2, 3), (2, 3, 4), (0,), (0, 3)):
        ids = torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(1))
        for form in forms:
            torch.testing.assert_close(form(ids), embedding(ids), atol=1e-6, rtol=1e-5)
    for form in forms:
        assert torch.equal(form(torch.arange(9, dtype=torch.int32)), form(torch.arange(9)))
        assert (form.num_embeddings, form.embedding_dim, form.padding_idx) == (ROWS, DIM, 3)


@every
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_joins_bags_as_embedding_bag_does(sizes: tuple[int, ...], mode: str) -> None:
    module = mixed(sizes, padding=0, bag=mode)
    bag = nn.EmbeddingBag.from_pretrained(module.weight.detach(), mode=mode, padding_idx=0)
    g = torch.Generator().manual_seed(2)
    square, flat = torch.randint(0, ROWS, (6, 5), generator=g), torch.randint(0, ROWS, (9,), generator=g)
    square[0], square[1, 2:] = 0, 0
    offsets = torch.tensor([0, 4, 4, 7])
    for form in (module, plain(module)):
        torch.testing.assert_close(form(square), bag(square), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(form(flat, offsets), bag(flat, offsets), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(small(module)(square), bag(square), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [2, 3, 7, 8, 9, 63, 64, 65, 129])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_codes_that_fill_no_whole_bytes_or_blocks(rows: int, count: int) -> None:
    sizes = (*[0] * (count - 2), rows // 2, rows - rows // 2)
    module = table(sizes)
    assert module.codes.shape == (-(-rows * (1 if count == 2 else 2) // 8),)
    ids = torch.arange(rows)
    for form in (plain(module), small(module)):
        assert torch.equal(form(ids), module(ids))
    assert len(torch.unique(module(ids), dim=0)) == rows


@every
def test_bytes_are_those_of_the_state_and_nothing_but_codes_is_stored(sizes: tuple[int, ...]) -> None:
    module = table(sizes)
    held = {name: t.nbytes for name, t in module.state_dict().items()}
    assert module.layer.bytes() == sum(held.values())
    assert held["codes"] == ROWS // (8 if len(sizes) == 2 else 4)
    module(torch.arange(ROWS))
    assert {name: t.nbytes for name, t in module.state_dict().items()} == held
    one = mixed((100, 900))
    per_block = sum(t.nbytes for t in small(one).state_dict().values()) - sum(t.nbytes for t in one.state_dict().values())
    assert per_block <= 16 * 8 + 8 * 64 + 32, "counts for each of 16 blocks, the places in a block, and no map"


@every
def test_a_state_and_a_layer_are_all_there_is(sizes: tuple[int, ...]) -> None:
    module = table(sizes, padding=0)
    again = loads(Layer, dumps(module.layer)).build()  # type: ignore[type-abstract]
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.weight, module.weight)
    assert set(again.state_dict()) == set(module.layer.start(1.0, 0))


def test_new_codes_are_seen_at_once() -> None:
    module, ids = table((100, 900)), torch.arange(ROWS)
    before = module(ids)
    twin = copy.deepcopy(module)
    twin.load_state_dict({**module.state_dict(), **module.layer.coded(member((100, 900), seed=5))})
    assert not torch.equal(twin(ids), before) and torch.equal(module(ids), before)
    assert torch.equal(twin(ids), small(twin)(ids))


def test_codes_of_another_table_are_refused() -> None:
    module = table((100, 900))
    module.load_state_dict({**module.state_dict(), **module.layer.coded(member((101, 899)))})
    with pytest.raises(BundleError, match=r"in bands of \[100, 900\] rows name other numbers of ids"):
        module(torch.tensor([1]))


def test_large_tables_are_counted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = table((0, 400, 0, 600))
    want, compact = module.weight, small(module).weight
    monkeypatch.setattr("pennyweight.model.bands._CHUNK", 64)
    again = table((0, 400, 0, 600))
    assert torch.equal(again.weight, want) and torch.equal(small(again).weight, compact)


@every
def test_bands_are_trained_and_padding_is_not(sizes: tuple[int, ...]) -> None:
    module = table(sizes, padding=2)
    target = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(3))
    target[2] = 0
    optimizer = torch.optim.Adam(module.parameters(), 0.03)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (module(torch.arange(ROWS)) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and not module(torch.tensor([2])).any()


def test_a_band_is_asked_for_its_own_ids_alone() -> None:
    """Its lookups are its use: what counts them, or trains by them, sees no others."""
    sizes = (10, 90, 900)
    module, bands = table(sizes), member(sizes)
    seen: dict[str, Tensor] = {}
    for name in module.layer.parts():
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    ids = torch.randint(0, ROWS, (50,), generator=torch.Generator().manual_seed(4))
    module(ids).sum().backward()
    assert [len(seen[f"band{k}"]) for k in range(3)] == torch.bincount(bands[ids].long(), minlength=3).tolist()
    touched = module.get_submodule("band2").weight.grad.any(1)
    assert torch.equal(touched.nonzero().squeeze(1), seen["band2"].unique())


class Beside(nn.Module):
    """Tables of all kinds, asked for the same ids."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(mixed(sizes, padding=0) for sizes in SIZES)
        self.bag = mixed((100, 900), padding=0, bag="mean")

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([*(t(ids) for t in self.tables), self.bag(ids.unsqueeze(1))], 1)


@pytest.mark.parametrize("form", [compile.plain, graph.small])
def test_onnx_runtime_gives_the_same_rows(form) -> None:
    """The form with counted places, and the one with the codes alone."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = Beside().eval().requires_grad_(False)
    score = compile.export(form(module), {"ids": torch.arange(8)}, ("ids",)).scorer(1)
    ids = torch.arange(ROWS)
    np.testing.assert_allclose(score({"ids": ids}).numpy(), module(ids).numpy(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1000,), r"2 to 4 bands, two of them with rows, got \[1000\]"),
        ((0, 1000), "two of them with rows"),
        ((-1, 500, 501), "two of them with rows"),
        ((200,) * 5, "2 to 4 bands"),
        ((100, 100), r"bands of \[100, 100\] rows hold 200 ids, and the table has 1000"),
    ],
)
def test_impossible_bands_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Bands(rows=ROWS, dim=4, sizes=sizes)
