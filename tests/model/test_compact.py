"""A compact form gives what the packed layer gives, from no more bytes."""

import pytest
import torch
from torch import nn

from pennyweight.model import compact
from pennyweight.model.dense import Dense
from pennyweight.model.tables import Table

ROWS, DIM = 300, 10  # a dim that fills no whole bytes at int2


def held(module: nn.Module) -> int:
    return sum(t.nbytes for t in module.state_dict().values())


def table(layer: Table) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    module, weight = layer.build(), torch.randn(layer.rows, layer.dim, generator=g)
    weight[0] = 0
    if layer.layout == "codebook":
        codes = torch.randint(layer.codes, (layer.rows, layer.parts), generator=g).to(torch.uint8)
        state = layer.encode_codebook(codes, torch.randn(layer.parts, layer.codes, layer.width, generator=g))
    else:
        state = layer.encode(weight)
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()


TABLES = [Table(ROWS, DIM, data_type=t, padding=0) for t in ("fp16", "int8", "int4", "int2")]  # type: ignore[arg-type]
TABLES += [Table(ROWS, DIM, "codebook", t, 3, 9) for t in ("fp32", "fp16", "int8", "int4")]  # type: ignore[arg-type]
TABLES += [Table(ROWS, DIM, "codebook", "fp32", DIM, c) for c in (2, 4, 16)] + [Table(ROWS, DIM, "codebook", "int4", 3, 200)]
TABLES += [Table(ROWS, DIM, data_type="int4", padding=p, bag=b) for p in (None, 0) for b in ("sum", "mean", "max")]  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", TABLES, ids=str)
def test_a_table(layer: Table) -> None:
    ids = torch.randint(ROWS, (9, 5), generator=torch.Generator().manual_seed(1))
    ids[3], ids[4, 2:] = 0, 0
    packed = table(layer)
    small = packed.small()  # type: ignore[operator]
    torch.testing.assert_close(small(ids), packed(ids), rtol=1e-6, atol=1e-6)
    assert held(small) <= layer.bytes() + 4 * layer.parts
    assert (small.num_embeddings, small.embedding_dim) == (ROWS, DIM)
    if layer.bag is None:
        torch.testing.assert_close(small.weight, packed.weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("data_type", ["fp16", "bf16", "int8", "int4", "int3", "int2"])
def test_a_dense_layer(data_type: str) -> None:
    g = torch.Generator().manual_seed(0)
    layer = Dense(33, 7, data_type=data_type)  # type: ignore[arg-type]
    packed = layer.build()
    packed.load_state_dict(layer.encode(torch.randn(7, 33, generator=g), torch.randn(7, generator=g)), assign=True)
    x, small = torch.randn(5, 33, generator=g), packed.small()  # type: ignore[operator]
    torch.testing.assert_close(small(x), packed(x))
    torch.testing.assert_close(small.weight, packed.weight)
    assert held(small) == layer.bytes()


@pytest.mark.parametrize("data_type", ["int4", "int3", "int2"])
def test_wider_forms_hold_the_same_numbers(data_type: str) -> None:
    dense = Dense(33, 7, data_type=data_type)  # type: ignore[arg-type]
    shared = table(Table(ROWS, DIM, "codebook", "int4", 3, 9)).small()  # type: ignore[operator]
    packed = dense.build()
    packed.load_state_dict(dense.encode(torch.randn(7, 33, generator=torch.Generator().manual_seed(0)), torch.zeros(7)))
    linear = packed.small()  # type: ignore[operator]
    before = linear.weight, shared.weight
    for layer in (*linear.modules(), *shared.modules()):
        if isinstance(layer, (compact.Codes, compact.Weight)):
            layer.widen()
    assert torch.equal(linear.weight, before[0]) and linear.stored.packed.dtype == torch.int8
    assert torch.equal(shared.weight, before[1]) and shared.books.scale is None
