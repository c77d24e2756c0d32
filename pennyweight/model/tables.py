"""What an embedding table has become: layout and data type are two independent fields.

*Layout* says which numbers there are: ``full`` (a row per id) or ``codebook`` (product quantization, Jegou et al. 2011:
a row is ``parts`` one-byte codes, each naming one of ``codes`` vectors shared by all rows). *Data type* says how those
numbers are written: the rows of a full table, or the codebooks of a shared one. Were they one field, quantizing after
sharing would do nothing and say nothing.

Full int8, int4 and int2 tables are FBGEMM's row-wise format, a scale and a bias behind each row, with Guan et al.'s
greedy range search (2019, arXiv 1911.02079) below 8 bits, looked up by the operators inside PyTorch: as fast as fp32
rows. torchao was the alternative; on x86 it keeps an int4 in a whole byte. Where the operators are missing (a GPU, a
later PyTorch) plain tensor code gives the same numbers, slower. A row shorter than about 4 numbers does not pay: its
scale and bias weigh more than it saves (see ``bytes``).

Rows are padded to whole bytes inside (dim 10 at int2 is stored as 12), codebook rows to a multiple of ``parts``; callers
never see the padding. The row of ``padding`` stays exactly zero in every format, also while codebooks are trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError
from pennyweight.model.packed import Packed, pack_bits, scaled, unpack_bits
from pennyweight.model.spec import Layer

BITS = {"int8": 8, "int4": 4, "int2": 2}
_NAMES = {8: "embedding_bag_byte", 4: "embedding_bag_4bit", 2: "embedding_bag_2bit"}
_CHUNK = 1 << 16


@named("table")
@dataclasses.dataclass(frozen=True)
class Table(Layer):
    """An embedding table, drop-in for ``nn.Embedding`` or, with ``bag``, for ``nn.EmbeddingBag``."""

    rows: int
    dim: int
    layout: Literal["full", "codebook"] = "full"
    data_type: Literal["fp32", "fp16", "int8", "int4", "int2"] = "fp32"
    parts: int = 0
    """Codebook only: one-byte codes a row."""
    codes: int = 0
    """Codebook only: vectors in each part's codebook, at most 256."""
    padding: int | None = None
    """The id whose row is zero and counts in no bag."""
    bag: Literal["sum", "mean", "max"] | None = None
    """How a bag of ids is joined; None for one row an id."""
    include_last_offset: bool = False
    """Bags only: as in ``nn.EmbeddingBag``."""

    def __post_init__(self) -> None:
        if self.layout == "full" and (self.parts or self.codes):
            raise ConfigError(f"a full table has no parts or codes, got {self.parts} and {self.codes}; layout='codebook' has")
        if self.layout == "codebook":
            if not 1 <= self.parts <= self.dim or not 2 <= self.codes <= 256:
                raise ConfigError(f"a codebook has 1 to dim = {self.dim} parts of 2 to 256 codes, got {self.parts} of {self.codes}")
            if self.data_type == "int2":
                raise ConfigError("a codebook cannot be int2: with four levels it holds nothing; use int4 or wider")

    @property
    def width(self) -> int:
        """Numbers in one codebook vector: dim / parts, rounded up."""
        return -(-self.dim // self.parts)

    def build(self) -> nn.Module:
        """The module of this layout and data type."""
        if self.layout == "codebook":
            return CodebookTable(self)
        if self.data_type == "fp16":
            return HalfTable(self)
        if self.data_type in BITS:
            return RowwiseTable(self)
        if self.bag is None:
            return nn.Embedding(self.rows, self.dim, padding_idx=self.padding)
        last = self.include_last_offset
        return nn.EmbeddingBag(self.rows, self.dim, mode=self.bag, padding_idx=self.padding, include_last_offset=last)

    def bytes(self) -> int:
        """Bytes of codes, rows, scales and codebooks."""
        if self.layout == "full":
            return self.rows * _row_bytes(self.dim, self.data_type)
        numbers, scales = self.parts * self.codes * self.width, 4 * self.parts * self.width
        books = {"fp32": 4 * numbers, "fp16": 2 * numbers, "int8": numbers + scales, "int4": -(-numbers // 2) + scales}
        return self.rows * self.parts + books[self.data_type]

    def flops(self) -> int:
        """Operations to look one id up: a multiply and an add a number where rows are dequantized, an add in a bag."""
        dequantize = 2 * self.dim if self.layout == "full" and self.data_type in BITS else 0
        return dequantize + (self.dim if self.bag else 0)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """A full table's state from fp32 rows [rows, dim]."""
        if self.data_type == "fp32":
            return {"weight": weight.clone()}
        if self.data_type == "fp16":
            return {"packed": weight.half()}
        return {"packed": pack_rows(weight, BITS[self.data_type])}

    def encode_codebook(self, codes: Tensor, codebooks: Tensor) -> dict[str, Tensor]:
        """A codebook table's state from uint8 codes [rows, parts] and fp32 codebooks [parts, codes, width]."""
        if self.data_type == "fp32":
            return {"codes": codes, "codebooks": codebooks.clone()}
        if self.data_type == "fp16":
            return {"codes": codes, "packed": codebooks.half()}
        whole, scale = scaled(codebooks, BITS[self.data_type], (1,))
        if self.data_type == "int4":
            return {"codes": codes, "packed": pack_bits(_even((whole + 8).to(torch.uint8).flatten()), 4), "scale": scale}
        return {"codes": codes, "packed": whole, "scale": scale}

    @classmethod
    def of(cls, module: nn.Module) -> Table | None:
        """What table a module is; None for anything else, and for tables trained in another precision than fp32."""
        if isinstance(module, Lookup):
            return module.layer
        if type(module) not in (nn.Embedding, nn.EmbeddingBag) or module.weight.dtype != torch.float32:
            return None
        rows, dim, padding = module.num_embeddings, module.embedding_dim, module.padding_idx
        if isinstance(module, nn.Embedding):
            return cls(rows, dim, padding=padding)
        return cls(rows, dim, padding=padding, bag=module.mode, include_last_offset=module.include_last_offset)


def rows_of(module: nn.Module) -> Tensor:
    """The fp32 rows [rows, dim] a table answers with, dequantized; ``max_norm`` is applied."""
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr,operator]
    limit = getattr(module, "max_norm", None)
    return weight if limit is None else torch.renorm(weight, module.norm_type, 0, limit)  # type: ignore[arg-type]


class Lookup(Packed):
    """A table that is not plain fp32 rows; subclasses give ``rows``, the rest of ``nn.Embedding(Bag)`` is here."""

    def __init__(self, layer: Table) -> None:
        super().__init__()
        self.layer = layer
        self.num_embeddings, self.embedding_dim, self.padding_idx = layer.rows, layer.dim, layer.padding

    def rows(self, ids: Tensor) -> Tensor:
        """fp32 rows [n, dim] of ids [n]."""
        raise NotImplementedError

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Rows [..., dim] of ids of any shape; with ``bag``, joined rows [bags, dim] as ``nn.EmbeddingBag`` joins them."""
        if self.layer.bag is not None:
            return self.join(ids, offsets, per_sample_weights)
        return self.rows(ids.reshape(-1)).reshape(*ids.shape, self.layer.dim)

    def join(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        """Bags [bags, dim]: the rows looked up, then joined by PyTorch's own bag over their positions."""
        flat = ids.reshape(-1)
        rows = torch.cat([self.rows(flat), torch.zeros(1, self.layer.dim, device=flat.device)])
        none = len(flat)  # the position of the zero row, which the bag is told to leave out
        positions = torch.arange(none, device=flat.device)
        if self.layer.padding is not None:
            positions = torch.where(flat == self.layer.padding, none, positions)
        return F.embedding_bag(
            positions.reshape(ids.shape),
            rows,
            None if offsets is None else offsets.long(),
            mode=self.layer.bag or "sum",
            per_sample_weights=weights,
            include_last_offset=self.layer.include_last_offset,
            padding_idx=none,
        )

    @property
    def weight(self) -> Tensor:
        """All rows, fp32 [rows, dim]: made at each call, for code that reads a table's weight."""
        chunks = torch.arange(self.layer.rows, device=self._device()).split(_CHUNK)
        return torch.cat([self.rows(ids) for ids in chunks])

    def plain(self) -> nn.Module:
        """The same table as plain fp32 rows."""
        module = dataclasses.replace(self.layer, layout="full", data_type="fp32", parts=0, codes=0).build()
        module.weight = nn.Parameter(self.weight, requires_grad=False)
        return module.eval()

    def _device(self) -> torch.device:
        return next(self.buffers()).device

    def extra_repr(self) -> str:
        """The layer, as ``print(module)`` shows it."""
        return str(self.layer)


class HalfTable(Lookup):
    """fp16 rows, answered as fp32."""

    packed: Tensor

    def __init__(self, layer: Table) -> None:
        super().__init__(layer)
        self.register_buffer("packed", torch.zeros(layer.rows, layer.dim, dtype=torch.float16))

    def prepare(self) -> None:
        """Nothing: rows are executed as stored."""

    def rows(self, ids: Tensor) -> Tensor:
        """fp32 rows [n, dim]."""
        return F.embedding(ids, self.packed).float()


class RowwiseTable(Lookup):
    """int8, int4 or int2 rows in FBGEMM's format, looked up by its operators or by plain tensor code."""

    packed: Tensor

    def __init__(self, layer: Table) -> None:
        super().__init__(layer)
        self.bits = BITS[layer.data_type]
        self.register_buffer("packed", torch.zeros(layer.rows, _row_bytes(layer.dim, layer.data_type), dtype=torch.uint8))

    def prepare(self) -> Any:
        """The lookup operator, or False where there is none for this device."""
        operator = _operator(_NAMES[self.bits] + "_rowwise_offsets") if self.packed.device.type == "cpu" else None
        return operator or False

    def rows(self, ids: Tensor) -> Tensor:
        """fp32 rows [n, dim]."""
        operator = self.ready()
        rows = operator(self.packed, ids.unsqueeze(1)) if operator else unpack_rows(F.embedding(ids, self.packed), self.bits)
        return rows[:, : self.layer.dim]

    def join(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        """Bags [bags, dim]; sums in one operator, since a padding row is zero anyway."""
        operator = self.ready()
        if not operator or self.layer.bag != "sum":
            return super().join(ids, offsets, weights)
        if ids.dim() == 2:
            offsets = torch.arange(0, ids.numel(), ids.shape[1]) if ids.shape[1] else torch.zeros(len(ids), dtype=torch.long)
        last = self.layer.include_last_offset and ids.dim() == 1
        flat, weights = ids.reshape(-1), None if weights is None else weights.reshape(-1)
        bags = operator(self.packed, flat, offsets.to(flat.dtype), per_sample_weights=weights, include_last_offset=last)
        return bags[:, : self.layer.dim]


class CodebookTable(Lookup):
    """``parts`` codes a row into small shared codebooks; fp32 codebooks can be trained, codes are frozen."""

    codes: Tensor
    base: Tensor

    def __init__(self, layer: Table) -> None:
        super().__init__(layer)
        shape = (layer.parts, layer.codes, layer.width)
        numbers = layer.parts * layer.codes * layer.width
        self.register_buffer("codes", torch.zeros(layer.rows, layer.parts, dtype=torch.uint8))
        self.register_buffer("base", torch.arange(layer.parts, dtype=torch.int32) * layer.codes, persistent=False)
        if layer.data_type == "fp32":
            self.codebooks = nn.Parameter(torch.zeros(shape))
        elif layer.data_type == "fp16":
            self.register_buffer("packed", torch.zeros(shape, dtype=torch.float16))
        else:
            packed = torch.zeros(shape, dtype=torch.int8) if layer.data_type == "int8" else torch.zeros(-(-numbers // 2), dtype=torch.uint8)
            self.register_buffer("packed", packed)
            self.register_buffer("scale", torch.ones(layer.parts, 1, layer.width))

    def books(self) -> Tensor:
        """The codebooks, fp32 [parts, codes, width]."""
        state: Mapping[str, Tensor] = {**dict(self.named_buffers()), **dict(self.named_parameters())}
        if self.layer.data_type == "fp32":
            return state["codebooks"]
        if self.layer.data_type == "fp16":
            return state["packed"].float()
        shape = (self.layer.parts, self.layer.codes, self.layer.width)
        whole = state["packed"]
        if self.layer.data_type == "int4":
            whole = unpack_bits(whole, 4).flatten()[: shape[0] * shape[1] * shape[2]].reshape(shape).to(torch.int8) - 8
        return whole * state["scale"]

    def prepare(self) -> Tensor:
        """All codebooks under one another, fp32 [parts * codes, width]: a few KB, whatever they are stored as."""
        return self.books().flatten(0, 1)

    def rows(self, ids: Tensor) -> Tensor:
        """fp32 rows [n, dim]: the codes of each id, then one lookup of all their vectors."""
        books = self._trained() if self.layer.data_type == "fp32" else self.ready()
        vectors = F.embedding(self.codes.index_select(0, ids) + self.base, books)
        return vectors.flatten(1)[:, : self.layer.dim]

    def _trained(self) -> Tensor:
        books = self.codebooks
        if self.layer.padding is not None and books.requires_grad and torch.is_grad_enabled():
            # Code 0 is the zero vector that the padding row points to; multiplied, it gets no gradient.
            books = books * (torch.arange(self.layer.codes, device=books.device) > 0).unsqueeze(1)
        return books.flatten(0, 1)

    def plain(self) -> nn.Module:
        """The same table with fp32 codebooks (gathers and an add, which export); plain rows where it joins bags."""
        if self.layer.bag is not None:
            return super().plain()
        module = CodebookTable(dataclasses.replace(self.layer, data_type="fp32"))
        module.load_state_dict({"codes": self.codes, "codebooks": self.books()}, assign=True)
        return module.requires_grad_(False).eval()


def pack_rows(weight: Tensor, bits: int) -> Tensor:
    """FBGEMM's row-wise format: fp32 [rows, dim] -> uint8 [rows, bytes], a scale and a bias behind each row.

    Rows that do not fill whole bytes repeat their last number, which leaves the range of the row as it was.
    """
    short = -weight.shape[1] % (8 // bits)
    weight = F.pad(weight[None], (0, short), mode="replicate")[0] if short else weight.contiguous()
    operator = _operator(_NAMES[bits] + "_prepack")
    if operator is None:
        return torch.cat([_pack_chunk(rows, bits) for rows in weight.split(_CHUNK)])
    packed: Tensor = operator(weight) if bits == 8 else operator(weight, optimized_qparams=True)
    return packed


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """fp32 [rows, dim] from FBGEMM's row-wise format, in plain tensor code."""
    real, behind = (torch.float32, 8) if bits == 8 else (torch.float16, 4)
    scale, bias = packed[:, -behind:].contiguous().view(real).float().split(1, dim=1)
    values = packed[:, :-behind] if bits == 8 else unpack_bits(packed[:, :-behind], bits)
    return values.float() * scale + bias


def _pack_chunk(weight: Tensor, bits: int) -> Tensor:
    low, high = torch.aminmax(weight, dim=1, keepdim=True)
    if bits == 8:
        # The byte format keeps its bias in fp32, and divides by the range a trifle larger.
        values = ((weight - low) * (255 / (high - low + 1e-8))).round().clamp(0, 255).to(torch.uint8)
        return torch.cat([values, torch.cat([(high - low) / 255, low], 1).view(torch.uint8)], 1)
    low, high = _search(weight, low, high, bits)
    values, scale, low = _levels(weight, low, high, bits)
    return torch.cat([pack_bits(values.to(torch.uint8), bits), torch.cat([scale, low], 1).half().view(torch.uint8)], 1)


def _levels(weight: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The level of each number, and each row's scale and bias. FBGEMM rounds the bias to fp16 first, then takes the range."""
    top = 2**bits - 1
    low = low.half().float()
    scale = ((high - low) / top).half().float()
    scale = torch.where(scale > 0, scale, 1.0)
    return ((weight - low) / scale).round().clamp(0, top), scale, low


def _search(weight: Tensor, low: Tensor, high: Tensor, bits: int, bins: int = 200, ratio: float = 0.16) -> tuple[Tensor, Tensor]:
    """Guan et al.'s greedy range search, all rows at once: step one end inwards while it may pay, keep the best local minimum."""

    def loss(low: Tensor, high: Tensor) -> Tensor:
        values, scale, bias = _levels(weight, low, high, bits)
        return (weight - values * scale - bias).square().sum(1, keepdim=True).sqrt()

    step = (high - low) / bins
    narrowest = int(bins * (1 - ratio)) * step
    best_low, best_high, best = low, high, loss(low, high)
    now_low, now_high, now = low, high, best
    while (going := now_low + narrowest < now_high).any():
        left, right = loss(now_low + step, now_high), loss(now_low, now_high - step)
        better = going & (now < left) & (now < right) & (now < best)
        best_low, best_high, best = (torch.where(better, a, b) for a, b in ((now_low, best_low), (now_high, best_high), (now, best)))
        move = left < right
        now_low = torch.where(going & move, now_low + step, now_low)
        now_high = torch.where(going & ~move, now_high - step, now_high)
        now = torch.where(going, torch.minimum(left, right), now)
    return best_low, best_high


def _operator(name: str) -> Any:
    return getattr(torch.ops.quantized, name, None)


def _row_bytes(dim: int, data_type: str) -> int:
    if data_type in BITS:
        bits = BITS[data_type]
        return -(-dim * bits // 8) + (8 if bits == 8 else 4)
    return dim * (4 if data_type == "fp32" else 2)


def _even(values: Tensor) -> Tensor:
    return F.pad(values, (0, len(values) % 2))
