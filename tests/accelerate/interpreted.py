"""Every kernel beside its table: run with a device, and with TRITON_INTERPRET=1 where that is the CPU."""

import itertools
import sys

import torch

from pennyweight.accelerate.kernels import lookup
from pennyweight.model.tables import CodebookTable, RowwiseTable, Table


def main(device: str) -> int:
    torch.manual_seed(0)
    alike = 0
    for data_type, dim in itertools.product(("int8", "int4", "int2"), (1, 4, 10, 16, 33, 64)):
        layer = Table(50, dim, data_type=data_type)  # type: ignore[arg-type]
        table = layer.build()
        table.load_state_dict(layer.encode(torch.randn(50, dim)))
        alike += same(table.to(device), device)
    for (codes, parts), data_type in itertools.product([(256, 4), (16, 3), (4, 5), (2, 8)], ("fp32", "int8")):
        layer = Table(50, 16, "codebook", data_type, parts=parts, codes=codes)  # type: ignore[arg-type]
        table = layer.build()
        drawn = torch.randint(0, codes, (50, parts), dtype=torch.uint8)
        table.load_state_dict(layer.encode_codebook(drawn, torch.randn(parts, codes, layer.width)))
        alike += same(table.to(device), device)
    none = Table(50, 16, data_type="int8").build().to(device)
    assert lookup(none, torch.empty(0, dtype=torch.int64, device=device)).shape == (0, 16)  # type: ignore[arg-type]
    for wide in (200, 256):
        layer = Table(20, wide, data_type="int8")
        table = layer.build()
        table.load_state_dict(layer.encode(torch.randn(20, wide)))
        alike += same(table.to(device), device)
    layer = Table(50, 8, data_type="int8", padding=0)
    weight = torch.randn(50, 8)
    weight[0] = 0
    table = layer.build()
    table.load_state_dict(layer.encode(weight))
    alike += same(table.to(device), device)
    return alike


def same(table: RowwiseTable | CodebookTable, device: str) -> bool:
    rows = table.layer.rows
    ids = torch.cat([torch.arange(rows), torch.randint(0, rows, (37,))]).to(device)
    want, got = table(ids), lookup(table, ids)
    assert torch.allclose(got, want, atol=1e-5), f"{table.layer}: largest difference {(got - want).abs().max():.3g}"
    return True


if __name__ == "__main__":
    with torch.no_grad():
        print(main(sys.argv[1]), "alike")
