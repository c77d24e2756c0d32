"""Tables whose rows share numbers from the first step of training: for vocabularies that no memory holds whole.

A shared table is a formula over a few small layers: where in them an id looks, and how what it finds becomes its row. Each
method below is such a formula, a frozen dataclass; one module runs them all, with the call of ``nn.Embedding`` or
``nn.EmbeddingBag``. The small layers are ordinary tables and dense layers at ``PATH.hot``, ``PATH.cold`` ..., so they are
quantized, placed, trained and exported like any other, and layout and data type stay independent. One module a method with
tensors of its own was the alternative: every transform and every exporter would have had to learn each of them.

Hashes are computed, (a id + b) mod p mod size with p = 2**31 - 1 (Carter and Wegman 1979), a and b from the layer's seed: no
map is stored, which would cost 4 bytes an id where rows should cost less. Two methods store what they learn about ids: which
are hot (``HotRows``), and which are alike (``Clustered``); ``bytes`` counts it. The cost is arithmetic, about 5 ns an id and
hash, in 64-bit whole numbers: an engine that computes them in 32 bits gives other rows, which the check of an export shows.

A table that can be trained whole is better off so, and shared afterwards (``compress/share``).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError
from pennyweight.model import compact
from pennyweight.model.dense import Dense
from pennyweight.model.spec import Layer
from pennyweight.model.tables import Table, joined

PRIME = 2**31 - 1
_CHUNK = 1 << 16


@functools.cache
def salt(*words: int) -> tuple[int, int]:
    """The two numbers of a hash, the same for the same words on any machine: 0 < a < p and 0 <= b < p."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=16).digest()
    return 1 + int.from_bytes(digest[:8], "big") % (PRIME - 1), int.from_bytes(digest[8:], "big") % PRIME


def spread(ids: Tensor, size: int, *words: int) -> Tensor:
    """Ids below 2**31 to int64 places below ``size``; ``words`` are a seed and the number of the hash."""
    a, b = salt(*words)
    return (ids * a + b) % PRIME % size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared(Layer):
    """A table that is a formula over smaller layers, drop-in for ``nn.Embedding`` or, with ``bag``, for ``nn.EmbeddingBag``."""

    rows: int
    dim: int
    padding: int | None = None
    """The id whose row is zero and counts in no bag."""
    bag: Literal["sum", "mean", "max"] | None = None
    """How a bag of ids is joined; None for one row an id."""
    include_last_offset: bool = False
    """Bags only: as in ``nn.EmbeddingBag``."""

    def __post_init__(self) -> None:
        if self.rows > PRIME:
            raise ConfigError(f"a shared table holds up to {PRIME} ids (2**31 - 1, the hashes' modulus), got {self.rows}")
        wrong = {n: v for n, v in vars(self).items() if type(v) is int and v < 1 and n not in ("seed", "padding")}
        if wrong:
            raise ConfigError(f"a {type(self).__name__} has at least 1 of everything, got {wrong}")

    @abc.abstractmethod
    def parts(self) -> dict[str, Layer]:
        """The layers it is made of, by name."""

    @abc.abstractmethod
    def look(self, ids: Tensor, at: Any) -> Tensor:
        """Rows [n, dim] of ids int64 [n]; ``at`` has the parts and maps as attributes."""

    @abc.abstractmethod
    def start(self, std: float, seed: int) -> dict[str, Tensor]:
        """A state to train from: random numbers such that a row's have this standard deviation."""

    def maps(self) -> dict[str, Tensor]:
        """Whole numbers stored beside the parts, as yet empty."""
        return {}

    def build(self) -> SharedTable:
        """The table, its numbers zero."""
        return SharedTable(self)

    def bytes(self) -> int:
        """Bytes of parts and maps."""
        return sum(p.bytes() for p in self.parts().values()) + sum(m.numel() * m.element_size() for m in self.maps().values())

    def flops(self) -> int:
        """Operations to look one id up: its parts', and one a number to join them."""
        return sum(p.flops() for p in self.parts().values()) + self.dim

    def _normal(self, seed: int, **std: float) -> dict[str, Tensor]:
        """Normal numbers of the given deviations for the weights of parts."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {n: (p.rows, p.dim) for n, p in self.parts().items() if isinstance(p, Table)}
        return {f"{n}.weight": torch.empty(shapes[n]).normal_(0, s, generator=generator) for n, s in std.items()}


class SharedTable(nn.Module):
    """The module of every shared table: it looks ids up by its layer's formula and joins bags."""

    def __init__(self, layer: Shared) -> None:
        super().__init__()
        self.layer = layer
        self.num_embeddings, self.embedding_dim, self.padding_idx = layer.rows, layer.dim, layer.padding
        for name, part in layer.parts().items():
            self.add_module(name, part.build())
        for name, tensor in layer.maps().items():
            self.register_buffer(name, tensor)

    def look(self, ids: Tensor) -> Tensor:
        """Rows [n, dim] of ids [n]; the padding's is zero and takes no gradient."""
        found = self.layer.look(ids.long(), self)
        return found if self.padding_idx is None else found * ids.ne(self.padding_idx).unsqueeze(1)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Rows [..., dim] of ids of any shape; with ``bag``, joined rows [bags, dim] as ``nn.EmbeddingBag`` joins them."""
        found = self.look(input.reshape(-1))
        if self.layer.bag is None:
            return found.reshape(*input.shape, self.layer.dim)
        if input.dim() == 2 and per_sample_weights is None:
            return compact.pooled(found.reshape(*input.shape, -1), input, self.layer.bag, self.padding_idx)
        return joined(self.layer, input, found, offsets, per_sample_weights)

    @property
    def weight(self) -> Tensor:
        """All rows, fp32 [rows, dim]: made at each call, for code that reads a table's weight."""
        ids = torch.arange(self.layer.rows, device=next(iter(self.state_dict().values())).device)
        return torch.cat([self.look(chunk) for chunk in torch.split(ids, _CHUNK)])

    def extra_repr(self) -> str:
        """The layer, as ``print(module)`` shows it."""
        return str(self.layer)


@named("hashed")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Hashed(Shared):
    """The hashing trick (Weinberger et al. 2009): ids that collide are one."""

    size: int
    seed: int = 0

    def parts(self) -> dict[str, Layer]:
        """The rows there are."""
        return {"shared": Table(self.size, self.dim)}

    def look(self, ids: Tensor, at: Any) -> Tensor:
        """The row at the id's hash."""
        found: Tensor = at.shared(spread(ids, self.size, self.seed, 0))
        return found

    def start(self, std: float, seed: int) -> dict[str, Tensor]:
        """Normal rows."""
        return self._normal(seed, shared=std)


@named("hot-rows")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HotRows(Shared):
    """Hot ids own a row, of the others each is the sum of two hashed rows (Zhang et al. 2020, arXiv 2007.14523).

    An id can own one slot, that of its hash, and of those that fall there the most frequent does (the sketch of Zhang et al.
    2024, CAFE). A sorted list of the very hottest needs a binary search, which exporters do not know; this is one lookup
    and a comparison, and costs the few of them that meet a hotter one.
    """

    hot: int
    """Slots, each with the 4 bytes of its owner's id."""
    size: int
    seed: int = 0

    def parts(self) -> dict[str, Layer]:
        """Owned rows and shared rows."""
        return {"hot": Table(self.hot, self.dim), "cold": Table(self.size, self.dim)}

    def maps(self) -> dict[str, Tensor]:
        """The owner of each slot; -1 for none."""
        return {"owners": torch.full((self.hot,), -1, dtype=torch.int32)}

    def look(self, ids: Tensor, at: Any) -> Tensor:
        """The id's own row, or the sum of two."""
        slot = spread(ids, self.hot, self.seed, 0)
        first, second = (at.cold(spread(ids, self.size, self.seed, k)) for k in (1, 2))
        return torch.where((at.owners[slot] == ids).unsqueeze(1), at.hot(slot), first + second)

    def start(self, std: float, seed: int) -> dict[str, Tensor]:
        """Normal rows, two cold ones as wide as a hot one; nobody is hot yet."""
        return {**self._normal(seed, hot=std, cold=std / math.sqrt(2)), **self.maps()}

    def owned(self, counts: Tensor) -> dict[str, Tensor]:
        """The owners by how often each id is looked up [rows]; an id that never is owns nothing."""
        order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
        slots = spread(order, self.hot, self.seed, 0)
        last = len(order)
        first = torch.full((self.hot,), last).scatter_reduce_(0, slots, torch.arange(last), "amin")
        return {"owners": torch.cat([order, order.new_full((1,), -1)])[first].int()}


@named("quotient")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quotient(Shared):
    """Quotient and remainder by ``size`` each name a row, multiplied or added (Shi et al. 2020, arXiv 1909.02107)."""

    size: int
    operation: Literal["multiply", "add"] = "multiply"

    def parts(self) -> dict[str, Layer]:
        """A row for each quotient and each remainder."""
        return {"quotient": Table(-(-self.rows // self.size), self.dim), "remainder": Table(self.size, self.dim)}

    def look(self, ids: Tensor, at: Any) -> Tensor:
        """The two rows, joined: no two ids have both alike."""
        whole, rest = at.quotient(ids // self.size), at.remainder(ids % self.size)
        joined: Tensor = whole * rest if self.operation == "multiply" else whole + rest
        return joined

    def start(self, std: float, seed: int) -> dict[str, Tensor]:
        """Normal rows; factors start around one, or products of two small numbers would hardly move."""
        if self.operation == "add":
            return self._normal(seed, quotient=std / math.sqrt(2), remainder=std / math.sqrt(2))
        state = self._normal(seed, quotient=0.1, remainder=std)
        return {**state, "quotient.weight": state["quotient.weight"] + 1}


@named("robe")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Robe(Shared):
    """Rows cut out of one circular array, block by block from hashed places, with hashed signs (Desai et al. 2022)."""

    size: int
    """Numbers in the array."""
    block: int = 8
    """Numbers that lie side by side; the paper's fastest is a whole row."""
    seed: int = 0

    def parts(self) -> dict[str, Layer]:
        """The array, as a table of single numbers: a block may start anywhere."""
        return {"array": Table(self.size, 1)}

    def look(self, ids: Tensor, at: Any) -> Tensor:
        """Block by block; each is a hash of the id and the block's number."""
        blocks = range(-(-self.dim // self.block))
        inside = torch.arange(self.block, device=ids.device)
        places = [(spread(ids, self.size, self.seed, k, 0).unsqueeze(1) + inside) % self.size for k in blocks]
        signs = [spread(ids, 2, self.seed, k, 1).unsqueeze(1).expand(-1, self.block) * 2 - 1 for k in blocks]
        found: Tensor = at.array(torch.cat(places, 1)[:, : self.dim]).squeeze(2) * torch.cat(signs, 1)[:, : self.dim]
        return found

    def start(self, std: float, seed: int) -> dict[str, Tensor]:
        """A normal array."""
        return self._normal(seed, array=std)


@named("tensor-train")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorTrain(Shared):
    """The table as a product of three cores, one for each digit of an id (Yin et al. 2021, TT-Rec, arXiv 2101.11714)."""

    rank: int

    @property
    def digits(self) -> tuple[int, int, int]:
        """About the cube root of the rows, three times: their product is at least the rows."""
        first = next(p for p in itertools.count(max(1, round(self.rows ** (1 / 3)) - 1)) if p**3 >= self.rows)
        second = math.isqrt(-(-self.rows // first) - 1) + 1
        return first, second, -(-self.rows // (first * second))

    @property
    def widths(self) -> tuple[int, int, int]:
        """The three factors of the dim with the least sum, rising."""
        divisors = [d for d in range(1, self.dim + 1) if self.dim % d == 0]
        pairs = [(a, b) for a in divisors for b in divisors if a <= b and self.dim % (a * b) == 0 and b <= self.dim // (a * b)]
        a, b = min(pairs, key=lambda p: p[0] + p[1] + self.dim // (p[0] * p[1]))
        return a, b, self.dim // (a * b)

    def parts(self) -> dict[str, Layer]:
        """The cores; a row holds what one digit contributes."""
        sizes = (self.rank, self.rank * self.rank, self.rank)
        cores = [Table(p, q * r) for p, q, r in zip(self.digits, self.widths, sizes, strict=True)]
        return dict(zip(("first", "middle", "last"), cores, strict=True))

    def look(self, ids: Tensor, at: Any) -> Tensor:
        """Two small matrix products an id."""
        (_, second, third), (a, b, c), r = self.digits, self.widths, self.rank
        high, low = ids // (second * third), ids % third
        left = torch.bmm(at.first(high).view(-1, a, r), at.middle(ids // third % second).view(-1, r, b * r))
        return torch.bmm(left.reshape(-1, a * b, r), at.last(low).view(-1, r, c)).flatten(1)

    def start(self, std: float, seed: int) -> dict[str, Tensor]:
        """Normal cores; a number of the table is the sum of rank**2 products of three."""
        each = (std / self.rank) ** (1 / 3)
        return self._normal(seed, first=each, middle=each, last=each)

    def flops(self) -> int:
        """Both products of one id."""
        a, b, c = self.widths
        return 2 * a * b * self.rank * (self.rank + c)


@named("clustered")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Clustered(Shared):
    """Clustered compositional embeddings (Tsitsulin and Ahle 2023, CCE, arXiv 2210.05974).

    A row is ``chunks`` pieces, each the sum of the centre of its cluster and of a hashed piece that tells it from the others
    there. Clusters are random at first, and found anew from the rows between epochs (``compress.substitute.recluster``),
    when what they do not explain moves into the hashed pieces. A cluster's number is a byte an id and chunk: the paper does
    not count it, ``bytes`` does.
    """

    size: int
    """Hashed pieces a chunk."""
    codes: int = 256
    """Clusters a chunk, at most 256."""
    chunks: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codes > 256 or self.chunks > self.dim:
            raise ConfigError(
                f"up to 256 clusters in {self.dim} chunks (its dim) there can be, not {self.codes} in {self.chunks}"
            )

    @property
    def width(self) -> int:
        """Numbers in one piece: dim / chunks, rounded up."""
        return -(-self.dim // self.chunks)

    def parts(self) -> dict[str, Layer]:
        """The chunks' centres end to end, and their hashed pieces."""
        return {"near": Table(self.chunks * self.codes, self.width), "rest": Table(self.chunks * self.size, self.width)}

    def maps(self) -> dict[str, Tensor]:
        """Each id's clusters, and the a and b of each chunk's hash."""
        codes = torch.zeros(self.rows, self.chunks, dtype=torch.uint8)
        return {"codes": codes, "salts": torch.zeros(2, self.chunks, dtype=torch.int64)}

    def look(self, ids: Tensor, at: Any) -> Tensor:
        """Centre and hashed piece, chunk by chunk."""
        chunk = torch.arange(self.chunks, device=ids.device)
        near = at.near(at.codes[ids].long() + chunk * self.codes)
        found: Tensor = (near + at.rest(self.places(ids, at.salts) + chunk * self.size)).flatten(1)
        return found[:, : self.dim]

    def places(self, ids: Tensor, salts: Tensor) -> Tensor:
        """Where each chunk's hashed piece is, int64 [n, chunks] below ``size``."""
        return (ids.unsqueeze(1) * salts[0] + salts[1]) % PRIME % self.size

    def salted(self, round: int) -> Tensor:
        """The hashes' numbers of a round of clustering, int64 [2, chunks]."""
        return torch.tensor([salt(self.seed, round, k) for k in range(self.chunks)]).T.contiguous()

    def start(self, std: float, seed: int) -> dict[str, Tensor]:
        """Normal pieces and random clusters."""
        ids = torch.arange(self.rows)
        codes = torch.stack([spread(ids, self.codes, self.seed, -1, k).to(torch.uint8) for k in range(self.chunks)], 1)
        half = std / math.sqrt(2)
        return {**self._normal(seed, near=half, rest=half), "codes": codes, "salts": self.salted(0)}


@named("narrow")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Narrow(Shared):
    """A row of its own for each id, of fewer numbers, and a matrix that widens them: the table has low rank.

    With a width for each table by its rows this is mixed dimensions (Ginart et al. 2019, arXiv 1909.11810).
    """

    width: int

    def parts(self) -> dict[str, Layer]:
        """Short rows and the matrix."""
        return {"short": Table(self.rows, self.width), "wide": Dense(self.width, self.dim, bias=False)}

    def look(self, ids: Tensor, at: Any) -> Tensor:
        """The short row, widened."""
        found: Tensor = at.wide(at.short(ids))
        return found

    def start(self, std: float, seed: int) -> dict[str, Tensor]:
        """Normal short rows, and a matrix that keeps their deviation."""
        generator = torch.Generator().manual_seed(seed + 1)
        wide = torch.empty(self.dim, self.width).normal_(0, self.width**-0.5, generator=generator)
        return {**self._normal(seed, short=std), "wide.weight": wide}


def like(table: Table) -> dict[str, Any]:
    """What a table and one put in its place have in common."""
    return {name: getattr(table, name) for name in ("rows", "dim", "padding", "bag", "include_last_offset")}


def shared(module: nn.Module) -> Mapping[str, SharedTable]:
    """The shared tables of a module, by path."""
    return {path: child for path, child in module.named_modules() if isinstance(child, SharedTable)}
