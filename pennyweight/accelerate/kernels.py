"""On a GPU: lookups that dequantize as they read, graphs of small batches, copies that overlap.

*Lookup.* A packed table answered by ordinary operations reads its rows, writes bytes, reads them, writes floats, scales them:
five passes over memory for one. The Triton kernels here read a row's bytes once and write fp32 once, for rows in FBGEMM's
row-wise format (int8, int4, int2) and for codebooks. FBGEMM's own CUDA operators are the alternative; they take one
version of PyTorch each, and know no codebooks of ours. The kernels are plain enough to run in Triton's interpreter
(``TRITON_INTERPRET=1``), where a machine without a GPU checks them against ``model.tables``.

*Graphs.* A small batch is launch overhead: fifty kernels of 5 µs each and nothing to compute. ``Graphed`` records a forward
once for each of a few sizes and replays it as one launch; a batch is padded to the next size.

*Copies.* ``moved`` goes through pinned memory, without which a copy waits for the device; ``streamed`` copies the next batch
while this one is computed.

*Precision.* TF32 and bf16 are the runtime's ``precision``; ``Float8Linear`` is for GPUs from compute capability 8.9, weights a
scale an output, inputs a scale a row.
"""

# Kernels have no types that mypy knows.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.core.errors import DeviceError
from pennyweight.model.layers import height
from pennyweight.model.spec import Batch, replace
from pennyweight.model.tables import CodebookTable, Lookup, RowwiseTable, joined

log = logging.getLogger(__name__)

FOUND = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed; it comes with PyTorch's CUDA builds."""

if FOUND:
    import triton
    import triton.language as tl

    @triton.jit
    def _rowwise(
        packed, ids, out, count, stride, dim, bits: tl.constexpr, tail: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr
    ):
        """Rows [count, dim] of FBGEMM's format: whole numbers, then a scale and a bias of ``tail`` / 2 bytes each."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        live = row < count
        start = tl.load(ids + row, mask=live, other=0).to(tl.int64) * stride
        column = tl.arange(0, DIM)
        inside = live[:, None] & (column < dim)[None, :]
        each: tl.constexpr = 8 // bits
        byte = tl.load(packed + start[:, None] + (column // each)[None, :], mask=inside, other=0).to(tl.int32)
        whole = (byte >> ((column % each) * bits)[None, :]) & ((1 << bits) - 1)
        end = start + stride - tail
        if tail == 8:
            scale = _word(packed, end, live)
            bias = _word(packed, end + 4, live)
        else:
            scale = _half(packed, end, live)
            bias = _half(packed, end + 2, live)
        value = whole.to(tl.float32) * scale[:, None] + bias[:, None]
        tl.store(out + row.to(tl.int64)[:, None] * dim + column[None, :], value, mask=inside)

    @triton.jit
    def _word(packed, at, live):
        """An fp32 from four bytes: rows begin anywhere."""
        a = tl.load(packed + at, mask=live, other=0).to(tl.uint32)
        b = tl.load(packed + at + 1, mask=live, other=0).to(tl.uint32)
        c = tl.load(packed + at + 2, mask=live, other=0).to(tl.uint32)
        d = tl.load(packed + at + 3, mask=live, other=0).to(tl.uint32)
        return (a | (b << 8) | (c << 16) | (d << 24)).to(tl.float32, bitcast=True)

    @triton.jit
    def _half(packed, at, live):
        """An fp16 from two bytes, as fp32."""
        a = tl.load(packed + at, mask=live, other=0).to(tl.uint16)
        b = tl.load(packed + at + 1, mask=live, other=0).to(tl.uint16)
        return (a | (b << 8)).to(tl.float16, bitcast=True).to(tl.float32)

    @triton.jit
    def _coded(
        codes, books, ids, out, count, stride, dim, width, size, bits: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr
    ):
        """Rows [count, dim] of codes of ``bits`` into fp32 books [parts, size, width]."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        live = row < count
        start = tl.load(ids + row, mask=live, other=0).to(tl.int64) * stride
        column = tl.arange(0, DIM)
        inside = live[:, None] & (column < dim)[None, :]
        part = column // width
        each: tl.constexpr = 8 // bits
        byte = tl.load(codes + start[:, None] + (part // each)[None, :], mask=inside, other=0).to(tl.int32)
        code = (byte >> ((part % each) * bits)[None, :]) & ((1 << bits) - 1)
        place = (part[None, :] * size + code) * width + (column % width)[None, :]
        value = tl.load(books + place, mask=inside, other=0.0)
        tl.store(out + row.to(tl.int64)[:, None] * dim + column[None, :], value, mask=inside)


ROWS = 16
"""Rows one program of a kernel writes."""


def lookup(table: Lookup, ids: Tensor) -> Tensor:
    """fp32 rows [n, dim] of ids [n], by one kernel.

    Raises:
        DeviceError: Triton is missing, or there is no kernel for this table.
    """
    if not FOUND:
        raise DeviceError("fused lookups need Triton, which comes with PyTorch's CUDA builds; ordinary operations do the same")
    layer, count = table.layer, len(ids)
    out = torch.empty(count, layer.dim, device=ids.device)
    grid, block = (triton.cdiv(count, ROWS),), triton.next_power_of_2(layer.dim)
    if not count:
        return out
    if isinstance(table, RowwiseTable):
        packed = table.packed
        tail = 8 if table.bits == 8 else 4
        _rowwise[grid](packed, ids, out, count, packed.shape[1], layer.dim, table.bits, tail, ROWS, block)
    elif isinstance(table, CodebookTable):
        codes, books = table.codes, table.books().detach().contiguous()
        shape = count, codes.shape[1], layer.dim, layer.width, layer.codes
        _coded[grid](codes, books, ids, out, *shape, layer.code_bits, ROWS, block)
    else:
        raise DeviceError(f"there is no kernel for a {type(table).__name__}; ordinary operations look it up")
    return out


class FusedTable(nn.Module):
    """A packed table looked up by one kernel; answers are the table's."""

    def __init__(self, table: Lookup) -> None:
        super().__init__()
        self.table = table

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As the table: rows [..., dim], or joined rows [bags, dim]."""
        rows = lookup(self.table, input.reshape(-1).contiguous())
        if self.table.layer.bag is not None:
            return joined(self.table.layer, input, rows, offsets, per_sample_weights)
        return rows.reshape(*input.shape, self.table.layer.dim)


def fuse_tables(module: nn.Module) -> int:
    """Put every packed table of a module on a GPU behind a kernel, in place; how many there were."""
    found = {
        path: table
        for path, table in module.named_modules()
        if isinstance(table, (RowwiseTable, CodebookTable)) and next(table.buffers()).is_cuda and not table._forward_hooks
    }
    for path, table in found.items() if FOUND else ():
        replace(module, path, FusedTable(table))
    return len(found) if FOUND else 0


def moved(batch: Batch, where: str) -> dict[str, Tensor]:
    """A batch on a GPU, by way of pinned memory and without waiting; on the CPU as it is."""
    if where == "cpu":
        return dict(batch)
    return {n: (t if t.is_cuda else t.pin_memory()).to(where, non_blocking=True) for n, t in batch.items()}


def streamed(score: Callable[[Batch], Tensor], batches: Iterable[Batch], where: str = "cuda") -> Iterator[Tensor]:
    """Logits of one batch after the other; the next is copied on a stream of its own while this one is computed."""
    if not where.startswith("cuda"):
        yield from (score(b) for b in batches)
        return
    copying, computing = torch.cuda.Stream(), torch.cuda.current_stream()
    ahead: dict[str, Tensor] | None = None
    for batch in [*batches, None]:
        now = ahead
        if now is not None:
            computing.wait_stream(copying)
            for tensor in now.values():
                tensor.record_stream(computing)
        if batch is not None:
            with torch.cuda.stream(copying):
                ahead = moved(batch, where)
        if now is not None:
            yield score(now)


SIZES = (16, 64, 256, 1024)
"""Rows that graphs are recorded for; a larger batch runs without."""


class Graphed:
    """A scorer on a GPU replayed as one launch for batches up to the largest size; shapes but the rows must stay.

    A forward that cannot be recorded (it waits for the device, or allocates by what it finds) runs as it is; ``note`` says so.
    """

    def __init__(self, score: Callable[[Batch], Tensor], sizes: tuple[int, ...] = SIZES) -> None:
        self.score, self.sizes, self.note = score, sizes, ""
        self._held: dict[int, tuple[Any, dict[str, Tensor], Tensor]] = {}

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of a batch on the GPU."""
        rows = height(batch)
        size = next((s for s in self.sizes if rows <= s), None)
        if size is None or self.note:
            return self.score(batch)
        if size not in self._held and not self._record(size, batch):
            return self.score(batch)
        graph, inputs, output = self._held[size]
        for name, tensor in inputs.items():
            tensor[:rows].copy_(batch[name], non_blocking=True)
        graph.replay()
        return output[:rows].clone()

    def _record(self, size: int, batch: Mapping[str, Tensor]) -> bool:
        inputs = {n: t[:1].expand(size, *t.shape[1:]).clone() for n, t in batch.items()}
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.score(inputs)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.score(inputs)
        except (RuntimeError, AssertionError) as error:  # PyTorch's own, whatever could not be recorded
            self.note = f"no CUDA graph: {' '.join(str(error).split())[:160]}"
            log.warning(self.note)
            return False
        self._held[size] = graph, inputs, output
        return True


class Float8Linear(nn.Module):
    """A dense layer in fp8 (e4m3): a scale an output for weights, one a row for inputs, sums in fp32, answers in bf16.

    Raises:
        DeviceError: no GPU from compute capability 8.9.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 9):
            raise DeviceError("fp8 needs a GPU from compute capability 8.9; use bf16")
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            raise DeviceError(f"fp8 needs widths that are multiples of 16, this layer has {tuple(weight.shape)}; use bf16")
        self.weight, self.scale = _float8(weight)
        self.bias = None if layer.bias is None else layer.bias.detach().bfloat16()

    def forward(self, input: Tensor) -> Tensor:
        """[..., outputs] of [..., inputs]."""
        rows, scale = _float8(input.reshape(-1, input.shape[-1]))
        out = torch._scaled_mm(
            rows, self.weight.t(), scale_a=scale, scale_b=self.scale.t(), bias=self.bias, out_dtype=torch.bfloat16
        )
        return out.reshape(*input.shape[:-1], -1)


def _float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as e4m3 and their scales [n, 1]."""
    scale = rows.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 448.0
    return (rows / scale).to(torch.float8_e4m3fn), scale
