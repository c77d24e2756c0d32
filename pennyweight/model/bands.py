"""Tables whose rows are treated by how much they are used: up to four bands, each a table of its own.

Clicks follow a power law, so a few rows answer most lookups, and the same bits on every row are spent on rows that nobody
asks for. A band is an ordinary table at ``PATH.band0``, ``PATH.band1`` ..., so hot rows and cold ones are quantized, shared,
trained and placed each in their own way by patterns of paths. A cold band may be one row for all its ids (a ``Hashed`` of size
1): rows of no bits, which is what pruning rows comes to. Mixed precision over frequency groups is the same idea inside one
kernel (MPE, arXiv 2409.20305), which every transform and exporter would have had to learn.

Of a row its band is stored, in one bit or two. Its place there is its rank among the band's ids, counted once when the table
is made ready; a stored map, the known alternative, is 4 bytes an id, as much as eight numbers of 4 bits. What it costs: the
counted places do take those 4 bytes in memory, and an id is looked up twice, about 50 microseconds a call.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.core.config import named
from pennyweight.core.errors import BundleError, ConfigError
from pennyweight.model import compact
from pennyweight.model.hashed import Shared, SharedTable
from pennyweight.model.packed import Packed, pack_bits, unpack_bits
from pennyweight.model.spec import Layer
from pennyweight.model.tables import Table

MOST = 4
"""Bands a table has at most."""
_CHUNK = 1 << 20


@named("bands")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bands(Shared):
    """A table in bands of ``sizes`` rows, the hottest first, and a code an id that says in which it is.

    A band of no rows holds a number's place: whoever names ``band2`` means the same tier in every table.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= len(self.sizes) <= MOST or min(self.sizes) < 0 or len(self.parts()) < 2:
            raise ConfigError(f"a table has 2 to {MOST} bands, two of them with rows, got {list(self.sizes)}")
        if sum(self.sizes) != self.rows:
            raise ConfigError(f"bands of {list(self.sizes)} rows hold {sum(self.sizes)} ids, and the table has {self.rows}")

    @property
    def bits(self) -> int:
        """Bits of an id's code."""
        return 1 if len(self.sizes) == 2 else 2

    @property
    def ends(self) -> dict[str, tuple[int, int]]:
        """Where each band that has rows begins and ends among the rows of all of them."""
        at = list(itertools.accumulate(self.sizes, initial=0))
        return {f"band{k}": (start, end) for k, (start, end) in enumerate(itertools.pairwise(at)) if end > start}

    def parts(self) -> dict[str, Layer]:
        """The bands."""
        return {name: Table(end - start, self.dim) for name, (start, end) in self.ends.items()}

    def maps(self) -> dict[str, Tensor]:
        """The ids' codes; in the order of the ids, as yet."""
        return self.coded(torch.arange(len(self.sizes), dtype=torch.uint8).repeat_interleave(torch.tensor(self.sizes)))

    def coded(self, bands: Tensor) -> dict[str, Tensor]:
        """The codes as they are stored, for the band of each id, uint8 [rows]."""
        return {"codes": pack_bits(F.pad(bands, (0, -self.rows % (8 // self.bits))), self.bits)}

    def build(self) -> BandedTable:
        """The table, its numbers zero."""
        return BandedTable(self)

    def bytes(self) -> int:
        """Bytes of codes and bands."""
        return -(-self.rows * self.bits // 8) + sum(part.bytes() for part in self.parts().values())

    def look(self, ids: Tensor, at: Any) -> Tensor:
        """Rows band by band: each is asked for its own ids alone, so its lookups are its use."""
        places = at.ready()[ids]
        found = torch.zeros(len(ids), self.dim, device=ids.device)
        for name, (start, end) in self.ends.items():
            inside = ((places >= start) & (places < end)).nonzero().squeeze(1)
            found.index_copy_(0, inside, getattr(at, name)(places[inside] - start))
        return found

    def start(self, std: float, seed: int) -> dict[str, Tensor]:
        """Normal rows; the first ids are the hot ones, as in a vocabulary sorted by counts."""
        return {**self._normal(seed, **dict.fromkeys(self.parts(), std)), **self.maps()}

    def flops(self) -> int:
        """Operations to look one id up: those of the dearest band."""
        return max(part.flops() for part in self.parts().values()) + self.dim

    def places(self, codes: Tensor) -> Tensor:
        """Where each id's row is among the rows of all bands, int32 [rows].

        Raises:
            BundleError: the codes name other numbers of ids than the bands hold.
        """
        at, left, found = list(itertools.accumulate(self.sizes, initial=0)), self.rows, []
        ends = at[1:]
        for chunk in torch.split(codes, _CHUNK):
            band = unpack_bits(chunk, self.bits)[:left]
            place = torch.zeros(len(band), dtype=torch.int32, device=band.device)
            for k in range(len(self.sizes)):
                inside = band == k
                rank = inside.cumsum(0, dtype=torch.int32)
                place = torch.where(inside, rank + (at[k] - 1), place)
                at[k] += int(rank[-1])
            found.append(place)
            left -= len(band)
        if at[: len(ends)] != ends:
            raise BundleError(
                f"the codes of a table in bands of {list(self.sizes)} rows name other numbers of ids; the weights are damaged"
            )
        return torch.cat(found)


class BandedTable(SharedTable, Packed):
    """The module of a table in bands."""

    codes: Tensor

    def prepare(self) -> Tensor:
        """The place of each id."""
        places: Tensor = self.layer.places(self.codes)  # type: ignore[attr-defined]
        return places

    def plain(self) -> nn.Module:
        """Every band asked for every id, since a graph has one shape; places are 4 bytes an id."""
        return _Form(self, _Places(self.ready())).eval()

    def small(self) -> nn.Module:
        """The same with the codes as they are, and counts between them."""
        return _Form(self, _Ranks(self.layer, self.codes)).eval()  # type: ignore[arg-type]


class _Form(SharedTable):
    """A table in bands in ordinary operations. Bands keep their names: whoever puts this in place puts them in theirs."""

    def __init__(self, table: BandedTable, places: nn.Module) -> None:
        nn.Module.__init__(self)
        self.layer, self.places = table.layer, places
        self.num_embeddings, self.embedding_dim, self.padding_idx = table.num_embeddings, table.embedding_dim, table.padding_idx
        for name in self.layer.parts():
            self.add_module(name, table.get_submodule(name))

    def look(self, ids: Tensor) -> Tensor:
        """Rows [n, dim] of ids [n]."""
        places, found = self.places(ids), torch.empty(0)
        for k, (name, (start, end)) in enumerate(self.layer.ends.items()):  # type: ignore[attr-defined]
            rows = self.get_submodule(name)((places - start).clamp(0, end - start - 1))
            found = torch.where((places >= start).unsqueeze(1), rows, found) if k else rows
        return found if self.padding_idx is None else found * ids.ne(self.padding_idx).unsqueeze(1)


class _Places(nn.Module):
    """Places that were counted."""

    held: Tensor

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.register_buffer("held", places.unsqueeze(1))

    def forward(self, ids: Tensor) -> Tensor:
        """int32 places [n] of ids [n]."""
        return F.embedding(ids, self.held).squeeze(1)


class _Ranks(nn.Module):
    """Places counted for the ids that are asked: codes in blocks, and the place each band has reached before a block.

    Those are half a bit an id and band; an id costs as many comparisons as a block has ids.
    """

    BLOCK = 64
    blocks: Tensor
    before: Tensor
    inside: Tensor

    def __init__(self, layer: Bands, codes: Tensor) -> None:
        super().__init__()
        self.bits, self.bands = layer.bits, len(layer.sizes)
        width = self.BLOCK * layer.bits // 8
        self.register_buffer("blocks", F.pad(codes, (0, -len(codes) % width)).reshape(-1, width))
        self.register_buffer("before", self._before(layer))
        self.register_buffer("inside", torch.arange(self.BLOCK))

    def _before(self, layer: Bands) -> Tensor:
        """int32 [blocks * bands, 1]."""
        chunks = (unpack_bits(blocks, self.bits) for blocks in torch.split(self.blocks, _CHUNK // self.BLOCK))
        held = torch.cat([torch.stack([(chunk == k).sum(1) for k in range(self.bands)], 1) for chunk in chunks])
        starts = torch.tensor([0, *itertools.accumulate(layer.sizes)][:-1], device=held.device)
        return (held.cumsum(0) - held + starts).int().reshape(-1, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """int32 places [n] of ids [n]."""
        block = ids.div(self.BLOCK, rounding_mode="floor")
        within = (ids - block * self.BLOCK).unsqueeze(1)
        codes = compact.numbers(F.embedding(block, self.blocks), self.bits)
        band = (codes * (self.inside == within)).sum(1)
        rank = ((codes == band.unsqueeze(1)) & (self.inside < within)).to(torch.int32).sum(1)
        before = F.embedding(block * self.bands + band.to(block.dtype), self.before).squeeze(1)
        return before + rank
