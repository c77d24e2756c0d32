"""What an embedding table has become: layout and data type are two independent fields.

*Layout* says which numbers there are: ``full`` (a row per id), ``codebook`` (product quantization, Jegou et al. 2011:
a row is ``parts`` codes, each naming one of ``codes`` vectors shared by all rows) or ``axes`` (transform coding: a row is
its places along a few axes that the table has, each in as many ``bits`` as that axis is worth). *Data type* says how those
numbers are written: the rows of a full table, or the codebooks of a shared one. Were they one field, quantizing after sharing
would do nothing and say nothing.

A code takes the fewest of 1, 2, 4 and 8 bits. With a part for each number, 16 codes are 4-bit rows on levels of the table's
own, without the scale and bias that a row of int4 carries: 8 bytes at dim 16 where int4 takes 12.

Full int8, int4 and int2 tables are FBGEMM's row-wise format, a scale and a bias behind each row, with Guan et al.'s
greedy range search (2019, arXiv 1911.02079) below 8 bits, looked up by the operators inside PyTorch: as fast as fp32
rows once there are many ids, 5 microseconds a call slower for few. So a table of at most 2**18 numbers (1 MiB, what stays
in a core's cache) is shipped packed and executed from fp32 rows made once; a larger one stays packed in memory. torchao
was the alternative; on x86 it keeps an int4 in a whole byte. Where the operators are missing (a GPU, a later PyTorch)
plain tensor code gives the same numbers, slower. A row shorter than about 4 numbers does not pay: its scale and bias
weigh more than it saves (see ``bytes``).

Rows are padded to whole bytes inside (dim 10 at int2 is stored as 12), codebook rows to a multiple of ``parts``; callers
never see the padding. The row of ``padding`` stays exactly zero in every format, also while codebooks are trained.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError
from pennyweight.model import compact
from pennyweight.model.packed import Packed, blank, pack_bits, scaled, unpack_bits
from pennyweight.model.spec import Layer

BITS = {"int8": 8, "int4": 4, "int2": 2}
_NAMES = {8: "embedding_bag_byte", 4: "embedding_bag_4bit", 2: "embedding_bag_2bit"}
SMALL = 1 << 18
"""Numbers up to which a table is executed from fp32 rows made once after loading."""
HELD = 1 << 22
"""The same for a table along axes, whose rows cost a product each to make: 16 MiB."""
_CHUNK = 1 << 16


@named("table")
@dataclasses.dataclass(frozen=True)
class Table(Layer):
    """An embedding table, drop-in for ``nn.Embedding`` or, with ``bag``, for ``nn.EmbeddingBag``."""

    rows: int
    dim: int
    layout: Literal["full", "codebook", "axes"] = "full"
    data_type: Literal["fp32", "fp16", "int8", "int4", "int2"] = "fp32"
    parts: int = 0
    """Codebook only: codes a row."""
    codes: int = 0
    """Codebook only: vectors in each part's codebook, at most 256."""
    padding: int | None = None
    """The id whose row is zero and counts in no bag."""
    bag: Literal["sum", "mean", "max"] | None = None
    """How a bag of ids is joined; None for one row an id."""
    include_last_offset: bool = False
    """Bags only: as in ``nn.EmbeddingBag``."""
    bits: tuple[int, ...] = ()
    """Axes only: of a row's place along each axis, 1 to 8."""

    def __post_init__(self) -> None:
        if (self.layout == "axes") != bool(self.bits):
            raise ConfigError(f"bits of axes are what layout='axes' has, and only that; got {self.layout} with {self.bits}")
        if self.layout == "axes":
            if not all(1 <= b <= 8 for b in self.bits) or len(self.bits) > self.dim or self.parts or self.codes:
                raise ConfigError(f"a table has at most its dim of axes ({self.dim}), of 1 to 8 bits each, got {self.bits}")
            if self.data_type != "fp16":
                raise ConfigError(f"axes and their levels are written in fp16, got {self.data_type}")
        if self.layout == "full" and (self.parts or self.codes):
            raise ConfigError(f"a full table has no parts or codes, got {self.parts} and {self.codes}; layout='codebook' has")
        if self.layout == "codebook":
            if not 1 <= self.parts <= self.dim or not 2 <= self.codes <= 256:
                wanted = f"1 to {self.dim} parts (its dim) of 2 to 256 codes"
                raise ConfigError(f"a codebook has {wanted}, got {self.parts} of {self.codes}")
            if self.data_type == "int2":
                raise ConfigError("a codebook cannot be int2: with four levels it holds nothing; use int4 or wider")

    @property
    def width(self) -> int:
        """Numbers in one codebook vector: dim / parts, rounded up."""
        return -(-self.dim // self.parts)

    @property
    def code_bits(self) -> int:
        """Bits of a stored code."""
        return next(bits for bits in (1, 2, 4, 8) if self.codes <= 1 << bits)

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's codes."""
        return -(-(sum(self.bits) or self.parts * self.code_bits) // 8)

    def build(self) -> nn.Module:
        """The module of this layout and data type."""
        if self.layout == "codebook":
            return CodebookTable(self)
        if self.layout == "axes":
            return AxesTable(self)
        if self.data_type == "fp16":
            return HalfTable(self)
        if self.data_type in BITS:
            return RowwiseTable(self)
        if self.bag is None:
            return blank(nn.Embedding, self.rows, self.dim, padding_idx=self.padding)
        rest = {"mode": self.bag, "padding_idx": self.padding, "include_last_offset": self.include_last_offset}
        return blank(nn.EmbeddingBag, self.rows, self.dim, **rest)

    def bytes(self) -> int:
        """Bytes of codes, rows, scales and codebooks."""
        if self.layout == "full":
            return self.rows * _row_bytes(self.dim, self.data_type)
        if self.layout == "axes":
            return self.rows * self.code_bytes + 2 * sum(1 << b for b in self.bits) + 2 * len(self.bits) * self.dim
        numbers, scales = self.parts * self.codes * self.width, 4 * self.parts * self.width
        books = {"fp32": 4 * numbers, "fp16": 2 * numbers, "int8": numbers + scales, "int4": -(-numbers // 2) + scales}
        return self.rows * self.code_bytes + books[self.data_type]

    def flops(self) -> int:
        """Operations to look one id up: a multiply and an add a number where rows are dequantized, an add in a bag."""
        if self.layout == "axes":
            return (2 * len(self.bits) + bool(self.bag)) * self.dim
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
        return {"codes": self.pack_codes(codes), **self.encode_books(codebooks)}

    def encode_axes(self, places: Tensor, levels: Sequence[Tensor], axes: Tensor) -> dict[str, Tensor]:
        """The state of a table along axes: of each row the number of its level on each axis, the levels, and the axes.

        Args:
            places: whole numbers [rows, axes], below ``2**bits`` of their axis.
            levels: fp32 [2**bits] for each axis.
            axes: fp32 [axes, dim], by which levels become rows.
        """
        stream = torch.zeros(len(places), self.code_bytes + 1, dtype=torch.int32)
        for axis, at in enumerate(_starts(self.bits)):
            shifted = places[:, axis].to(torch.int32) << at % 8
            stream[:, at // 8] |= shifted & 255
            stream[:, at // 8 + 1] |= shifted >> 8
        return {
            "codes": stream[:, :-1].to(torch.uint8),
            "levels": torch.cat([level.half() for level in levels]),
            "axes": axes.half(),
        }

    def encode_books(self, codebooks: Tensor) -> dict[str, Tensor]:
        """The part of that state that the codebooks are."""
        if self.data_type == "fp32":
            return {"codebooks": codebooks.clone()}
        if self.data_type == "fp16":
            return {"packed": codebooks.half()}
        whole, scale = scaled(codebooks, BITS[self.data_type], (1,))
        if self.data_type == "int4":
            return {"packed": pack_bits(_even((whole + 8).to(torch.uint8).flatten()), 4), "scale": scale}
        return {"packed": whole, "scale": scale}

    def pack_codes(self, codes: Tensor) -> Tensor:
        """Codes uint8 [..., parts] as they are stored, uint8 [..., code_bytes]; bytes stay as they are."""
        if self.code_bits == 8:
            return codes
        return pack_bits(F.pad(codes, (0, self.code_bytes * 8 // self.code_bits - self.parts)), self.code_bits)

    def unpack_codes(self, stored: Tensor) -> Tensor:
        """The inverse of ``pack_codes``."""
        return stored if self.code_bits == 8 else unpack_bits(stored, self.code_bits)[..., : self.parts]

    @classmethod
    def of(cls, module: nn.Module) -> Table | None:
        """What table a module is; None for anything else, and for tables trained in another precision than fp32."""
        if isinstance(module, Lookup):
            return module.layer
        # Not a subclass, which may look up differently.
        if isinstance(module, nn.Embedding) and type(module) is nn.Embedding and module.weight.dtype == torch.float32:
            return cls(module.num_embeddings, module.embedding_dim, padding=module.padding_idx)
        if isinstance(module, nn.EmbeddingBag) and type(module) is nn.EmbeddingBag and module.weight.dtype == torch.float32:
            rest = {"padding": module.padding_idx, "bag": module.mode, "include_last_offset": module.include_last_offset}
            return cls(module.num_embeddings, module.embedding_dim, **rest)  # type: ignore[arg-type]
        return None


def rows_of(module: nn.Module) -> Tensor:
    """The fp32 rows [rows, dim] a table answers with, dequantized; ``max_norm`` is applied."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        return torch.renorm(weight, module.norm_type, 0, module.max_norm)
    return weight


class Lookup(Packed):
    """A table that is not plain fp32 rows; subclasses say how ids are looked up, the rest of ``nn.Embedding(Bag)`` is here."""

    def __init__(self, layer: Table) -> None:
        super().__init__()
        self.layer = layer
        self.num_embeddings, self.embedding_dim, self.padding_idx = layer.rows, layer.dim, layer.padding

    @abc.abstractmethod
    def form(self) -> Any:
        """What ``look`` executes from."""

    @abc.abstractmethod
    def look(self, ids: Tensor, form: Any) -> Tensor:
        """fp32 rows [n, dim] of ids [n]."""

    def lend(self, forward: Callable[..., Tensor] | None) -> None:
        """Let somebody else answer, who trains the rows; with None not any more."""
        self.__dict__.pop("forward", None)
        if forward is not None:
            self.__dict__["forward"] = forward

    @property
    def lent(self) -> bool:
        """Whether somebody else answers."""
        return "forward" in self.__dict__

    def prepare(self) -> tuple[Tensor | None, Any]:
        """Plain rows if the table is small, and the form to look up from if it is not."""
        return (self.weight, None) if self.layer.rows * self.layer.dim <= self.most() else (None, self.form())

    def most(self) -> int:
        """Numbers up to which plain rows are made once."""
        return SMALL

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Rows [..., dim] of ids of any shape; with ``bag``, joined rows [bags, dim] as ``nn.EmbeddingBag`` joins them."""
        if self.layer.bag is not None:
            return self.join(input, offsets, per_sample_weights)
        plain, form = self.ready()
        if plain is not None:
            return F.embedding(input, plain)
        return self.look(input.reshape(-1), form).reshape(*input.shape, self.layer.dim)

    def join(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        """Bags [bags, dim]; where there are no plain rows, those of these ids are looked up and joined by their positions."""
        rows, form = self.ready()
        if rows is None:
            return joined(self.layer, ids, self.look(ids.reshape(-1), form), offsets, weights)
        return _bags(self.layer, ids, rows, self.layer.padding, offsets, weights)

    @property
    def weight(self) -> Tensor:
        """All rows, fp32 [rows, dim]: made at each call, for code that reads a table's weight.

        Raises:
            ConfigError: the rows are being trained, who would never hear of what is done with these.
        """
        if self.lent and self.training and torch.is_grad_enabled():
            raise ConfigError(
                "this model reads a table's weight as a matrix, and int8 rows are trained by lookups only; use fp32"
            )
        form = self.form()
        ids = torch.arange(self.layer.rows, device=next(self.buffers()).device)
        return torch.cat([self.look(chunk, form) for chunk in torch.split(ids, _CHUNK)])

    def plain(self) -> nn.Module:
        """The same table as plain fp32 rows."""
        module = dataclasses.replace(self.layer, layout="full", data_type="fp32", parts=0, codes=0, bits=()).build()
        module.load_state_dict({"weight": self.weight}, assign=True)
        return module.requires_grad_(False).eval()

    def small(self) -> nn.Module:
        """The same table with its packed rows; a bag takes a matrix of ids there, no offsets and no weights."""
        rows = self.rows()
        return (rows if self.layer.bag is None else compact.Bag(rows, self.layer.bag, self.layer.padding)).eval()

    @abc.abstractmethod
    def rows(self) -> compact.Lookup:
        """The packed rows in ordinary operations: ids of any shape to fp32 rows."""

    def extra_repr(self) -> str:
        """The layer, as ``print(module)`` shows it."""
        return str(self.layer)


def joined(layer: Any, ids: Tensor, rows: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
    """Bags [bags, dim] of the rows [n, dim] that n ids of any shape looked up; ``layer`` says how, as a ``Table`` does."""
    positions = torch.arange(len(rows), device=rows.device)
    if layer.padding is not None:
        positions = torch.where(ids.reshape(-1) == layer.padding, len(rows), positions)
    padded = torch.cat([rows, rows.new_zeros(1, layer.dim)])
    return _bags(layer, positions.reshape(ids.shape), padded, len(rows), offsets, weights)


def _bags(layer: Any, ids: Tensor, rows: Tensor, padding: int | None, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
    return F.embedding_bag(
        ids,
        rows,
        None if offsets is None else offsets.to(ids.dtype),
        mode=layer.bag or "sum",
        per_sample_weights=weights,
        include_last_offset=layer.include_last_offset,
        padding_idx=padding,
    )


class HalfTable(Lookup):
    """fp16 rows, answered as fp32."""

    packed: Tensor

    def __init__(self, layer: Table) -> None:
        super().__init__(layer)
        self.register_buffer("packed", torch.zeros(layer.rows, layer.dim, dtype=torch.float16))

    def rows(self) -> compact.Lookup:
        """fp16 rows."""
        return compact.Halves(self.packed)

    def form(self) -> None:
        """Nothing: rows are executed as stored."""

    def look(self, ids: Tensor, form: None) -> Tensor:
        """fp32 rows [n, dim]."""
        return F.embedding(ids, self.packed).float()


class RowwiseTable(Lookup):
    """int8, int4 or int2 rows in FBGEMM's format, looked up by its operators or by plain tensor code."""

    packed: Tensor

    def __init__(self, layer: Table) -> None:
        super().__init__(layer)
        self.bits = BITS[layer.data_type]
        self.register_buffer("packed", torch.zeros(layer.rows, _row_bytes(layer.dim, layer.data_type), dtype=torch.uint8))

    def rows(self) -> compact.Lookup:
        """Values and, apart from them, each row's scale and bias."""
        values, affine = split_rows(self.packed, self.bits)
        return compact.Rows(values, affine, self.bits, self.layer.dim)

    def form(self) -> Any:
        """The lookup operator; None where there is none for this device."""
        return _operator(_NAMES[self.bits] + "_rowwise_offsets") if self.packed.device.type == "cpu" else None

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Put packed rows, uint8 [n, bytes], in the place of these."""
        self.packed.index_copy_(0, ids, rows)
        self._ready = None

    def look(self, ids: Tensor, form: Any) -> Tensor:
        """fp32 rows [n, dim]."""
        rows = form(self.packed, ids.unsqueeze(1)) if form else unpack_rows(F.embedding(ids, self.packed), self.bits)
        return rows if rows.shape[1] == self.layer.dim else rows[:, : self.layer.dim]


class CodebookTable(Lookup):
    """``parts`` codes a row into small shared codebooks; fp32 codebooks can be trained, codes are frozen."""

    codes: Tensor
    codebooks: nn.Parameter
    packed: Tensor
    scale: Tensor

    def __init__(self, layer: Table) -> None:
        super().__init__(layer)
        shape = (layer.parts, layer.codes, layer.width)
        self.register_buffer("codes", torch.zeros(layer.rows, layer.code_bytes, dtype=torch.uint8))
        if layer.data_type == "fp32":
            self.codebooks = nn.Parameter(torch.zeros(shape))
            return
        # int4 is two numbers a byte; the scales are one for each part and position.
        stored = {"fp16": torch.zeros(shape, dtype=torch.float16), "int8": torch.zeros(shape, dtype=torch.int8)}
        pairs = torch.zeros(-(-math.prod(shape) // 2), dtype=torch.uint8)
        self.register_buffer("packed", stored.get(layer.data_type, pairs))
        if layer.data_type in BITS:
            self.register_buffer("scale", torch.ones(layer.parts, 1, layer.width))

    def books(self) -> Tensor:
        """The codebooks, fp32 [parts, codes, width]."""
        layer = self.layer
        if layer.data_type == "fp32":
            return self.codebooks
        if layer.data_type == "fp16":
            return self.packed.float()
        if layer.data_type == "int8":
            return self.packed * self.scale
        pairs = unpack_bits(self.packed, 4)[: layer.parts * layer.codes * layer.width]
        return (pairs.reshape(layer.parts, layer.codes, layer.width).to(torch.int8) - 8) * self.scale

    def rows(self) -> compact.Lookup:
        """The codes as they are, and the codebooks as they are stored."""
        layer = self.layer
        stored = self.codebooks.detach() if layer.data_type == "fp32" else self.packed
        books = compact.Weight(stored, (layer.parts, layer.codes, layer.width), getattr(self, "scale", None))
        return compact.Codes(self.codes, books, layer.dim, layer.code_bits)

    def ready(self) -> Any:
        """As ever, but nothing is kept of codebooks in training: optimizers write into them unseen."""
        training = self.layer.data_type == "fp32" and self.codebooks.requires_grad
        return (None, self.form()) if training else super().ready()

    def form(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, each part's first row and all fp32 codebooks under one another, a few KB whatever they are stored as."""
        books = self.books()
        if self.layer.padding is not None and books.requires_grad and torch.is_grad_enabled():
            # Code 0 is the zero vector that the padding row points to; multiplied, it gets no gradient.
            books = books * (torch.arange(self.layer.codes, device=books.device) > 0).unsqueeze(1)
        base = torch.arange(self.layer.parts, dtype=torch.int32, device=books.device) * self.layer.codes
        return self.codes, base, books.flatten(0, 1)

    def look(self, ids: Tensor, form: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """fp32 rows [n, dim]."""
        codes, base, books = form
        return _joined(self.layer.unpack_codes(F.embedding(ids, codes)) + base, books, self.layer.dim)

    def plain(self) -> nn.Module:
        """Plain rows for a small table or one that joins bags; else two gathers and an add, so that it stays small."""
        if self.layer.rows * self.layer.dim <= SMALL or self.layer.bag is not None:
            return super().plain()
        codes, base, books = (part.detach() for part in self.form())
        return Gather(self.layer.unpack_codes(codes), base, books, self.layer.dim).eval()


class AxesTable(Lookup):
    """A row as its places along axes: one run of bits a row, a few levels an axis, and the axes."""

    codes: Tensor
    levels: Tensor
    axes: Tensor

    def __init__(self, layer: Table) -> None:
        super().__init__(layer)
        self.register_buffer("codes", torch.zeros(layer.rows, layer.code_bytes, dtype=torch.uint8))
        self.register_buffer("levels", torch.zeros(sum(1 << b for b in layer.bits), dtype=torch.float16))
        self.register_buffer("axes", torch.zeros(len(layer.bits), layer.dim, dtype=torch.float16))

    def most(self) -> int:
        """More than for others, as rows cost more to make."""
        return HELD

    def rows(self) -> compact.Lookup:
        """The bits as they are."""
        return compact.Axes(self.codes, self.levels, self.axes, self.layer.bits, _starts(self.layer.bits), self.layer.padding)

    def form(self) -> tuple[Tensor, ...]:
        """Where each axis' bits begin, their mask, its first level, and all levels and axes in fp32."""
        device, bits = self.codes.device, self.layer.bits
        starts, masks, base = (
            _starts(bits),
            [(1 << b) - 1 for b in bits],
            list(accumulate([1 << b for b in bits[:-1]], initial=0)),
        )
        where = (torch.tensor(each, dtype=torch.int32, device=device) for each in (starts, masks, base))
        return (*where, self.levels.float(), self.axes.float())

    def look(self, ids: Tensor, form: tuple[Tensor, ...]) -> Tensor:
        """fp32 rows [n, dim]."""
        starts, masks, base, levels, axes = form
        stream = F.pad(F.embedding(ids, self.codes), (0, 1)).to(torch.int32)
        byte = (starts // 8).long()
        words = stream[:, byte] | stream[:, byte + 1] << 8  # eight bits lie in two bytes, wherever they begin
        places = (words >> starts % 8 & masks) + base
        found = levels[places.long()]
        # Axis by axis, and not as a product of matrices, whose last digits depend on where in memory its parts lie.
        rows = found.new_zeros(len(ids), axes.shape[1])
        for axis, along in enumerate(axes):
            rows.addcmul_(found[:, axis : axis + 1], along)
        return rows if self.padding_idx is None else rows * ids.ne(self.padding_idx).unsqueeze(1)


def _starts(bits: Sequence[int]) -> list[int]:
    """The first bit of each axis in a row's run of bits."""
    return list(accumulate(bits[:-1], initial=0))


class Gather(nn.Module):
    """A codebook table in ordinary operations, for engines that export a graph."""

    def __init__(self, codes: Tensor, base: Tensor, books: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        for name, tensor in (("codes", codes), ("base", base), ("books", books)):
            self.register_buffer(name, tensor)

    def forward(self, input: Tensor) -> Tensor:
        """fp32 rows [..., dim] of ids of any shape."""
        codes = F.embedding(input, self.get_buffer("codes"))
        return _joined(codes + self.get_buffer("base"), self.get_buffer("books"), self.dim)


def _joined(at: Tensor, books: Tensor, dim: int) -> Tensor:
    """Rows [..., dim] of the vectors at these places [..., parts] of all codebooks under one another."""
    rows = F.embedding(at, books).flatten(-2)
    return rows if rows.shape[-1] == dim else rows[..., :dim]


def pack_rows(weight: Tensor, bits: int) -> Tensor:
    """FBGEMM's row-wise format: fp32 [rows, dim] -> uint8 [rows, bytes], a scale and a bias behind each row.

    Rows that do not fill whole bytes repeat their last number, which leaves the range of the row as it was.
    """
    short = -weight.shape[1] % (8 // bits)
    weight = F.pad(weight[None], (0, short), mode="replicate")[0] if short else weight.contiguous()
    operator = _operator(_NAMES[bits] + "_prepack")
    if operator is None:
        return torch.cat([_pack_chunk(rows, bits) for rows in torch.split(weight, _CHUNK)])
    packed: Tensor = operator(weight) if bits == 8 else operator(weight, optimized_qparams=True)
    return packed


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """fp32 [rows, dim] from FBGEMM's row-wise format, in plain tensor code."""
    values, affine = split_rows(packed, bits)
    values, affine = values if bits == 8 else unpack_bits(values, bits), affine.float()
    return torch.addcmul(affine[:, 1:], values.float(), affine[:, :1])


def split_rows(packed: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """FBGEMM's row-wise format taken apart: bytes [rows, n], and each row's scale and bias [rows, 2] in fp32 or fp16."""
    real, behind = (torch.float32, 8) if bits == 8 else (torch.float16, 4)
    # Cloned, since a single row's slice counts as contiguous where it is, at an offset no fp32 may have.
    return packed[:, :-behind].contiguous(), packed[:, -behind:].clone(memory_format=torch.contiguous_format).view(real)


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


def _search(weight: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Guan et al.'s greedy search of each row's range, all rows at once.

    One end steps inwards by 1/200 of the range, the one that loses less, until the range is 16 % narrower; the best local
    minimum on the way is kept.
    """

    def loss(low: Tensor, high: Tensor) -> Tensor:
        values, scale, bias = _levels(weight, low, high, bits)
        return (weight - values * scale - bias).square().sum(1, keepdim=True).sqrt()

    step = (high - low) / 200
    now_low, now_high, now = low, high, loss(low, high)
    least = now
    while (going := now_low + 168 * step < now_high).any():
        left, right = loss(now_low + step, now_high), loss(now_low, now_high - step)
        better = going & (now < left) & (now < right) & (now < least)
        low, high = torch.where(better, now_low, low), torch.where(better, now_high, high)
        least = torch.where(better, now, least)
        up, down = going & (left < right), going & (left >= right)
        now_low, now_high = torch.where(up, now_low + step, now_low), torch.where(down, now_high - step, now_high)
        now = torch.where(going, torch.minimum(left, right), now)
    return low, high


def _operator(name: str) -> Any:
    return getattr(torch.ops.quantized, name, None)


def _row_bytes(dim: int, data_type: str) -> int:
    if data_type in BITS:
        bits = BITS[data_type]
        return -(-dim * bits // 8) + (8 if bits == 8 else 4)
    return dim * (4 if data_type == "fp32" else 2)


def _even(values: Tensor) -> Tensor:
    return F.pad(values, (0, len(values) % 2))
