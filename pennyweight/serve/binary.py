"""Scoring without JSON: numbers as they lie in memory, behind a head that says how many there are.

All little-endian. A request is 16 bytes of head (``PW01``, then three unsigned 32-bit integers: bytes of ``about``, number of
items, and 0), ``about`` (a JSON object with the fields of ``/score`` except ``items``, or nothing), and the items' ids as
signed 64-bit integers. An answer has the same head, ``about`` (the fields except ``scores``), and a 32-bit float an item. A
body that is not exactly as long as its head says is refused before anything is read from it. Failures are JSON, as everywhere.

Protocol buffers or Arrow would do as well; both need a library on the other side for what is one ``struct.pack``.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import msgspec
import numpy as np

from pennyweight.core.errors import RequestError
from pennyweight.serve import messages as m

KIND = "application/octet-stream"
HEAD = struct.Struct("<4sIII")
MAGIC = b"PW01"
IDS, SCORES = np.dtype("<i8"), np.dtype("<f4")


class Packed(m.Asking, forbid_unknown_fields=True, kw_only=True):
    """A request to score as it comes in binary."""

    items: Any = None
    """Items' ids as named in the data, int64."""


class About(msgspec.Struct):
    """An answer's fields without its scores."""

    user: str | int | None
    known: bool
    variant: str
    gap: float


_about = msgspec.json.Decoder(m.Asking)


def decode(body: bytes) -> Packed:
    """A request.

    Raises:
        RequestError: it is not what the head says, or not ours.
    """
    if len(body) < HEAD.size or body[:4] != MAGIC:
        raise RequestError(
            f"a binary body begins with {HEAD.size} bytes of head, the first four {MAGIC.decode()}; see /docs, or send JSON"
        )
    _, about, items, rest = HEAD.unpack_from(body)
    wanted = HEAD.size + about + 8 * items
    if rest or len(body) != wanted:
        raise RequestError(
            f"the body has {len(body)} bytes, and its head says {wanted} ({about} of JSON, {items} items)"
            f"{' and ends in a number that must be 0' if rest else ''}; send what the head says"
        )
    if not items:
        raise RequestError("the body holds no items; give at least one")
    ids = np.frombuffer(body, IDS, items, HEAD.size + about).astype(np.int64, copy=False)
    if not about:
        return Packed(items=ids)
    try:
        said = _about.decode(body[HEAD.size : HEAD.size + about])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the JSON of the body: {error}; it takes the fields of /score except items") from error
    return Packed(**msgspec.structs.asdict(said), items=ids)


def encode(scores: m.Scores) -> bytes:
    """An answer."""
    about = _said(scores.user, scores.known, scores.variant, scores.gap)
    values = np.asarray(scores.scores, SCORES).tobytes()
    return b"".join((HEAD.pack(MAGIC, len(about), len(values) // 4, 0), about, values))


@functools.lru_cache(1024)
def _said(user: str | int | None, known: bool, variant: str, gap: float) -> bytes:
    return msgspec.json.encode(About(user, known, variant, gap))


def ask(items: Any, **about: Any) -> bytes:
    """A request's body, for who asks: items' ids, and the other fields of ``/score``."""
    said = msgspec.json.encode(about) if about else b""
    values = np.asarray(items, IDS).tobytes()
    return b"".join((HEAD.pack(MAGIC, len(said), len(values) // 8, 0), said, values))


def answer(body: bytes) -> tuple[dict[str, Any], Any]:
    """An answer's fields, and its scores as float32 [N]."""
    _, about, items, _ = HEAD.unpack_from(body)
    said = msgspec.json.decode(body[HEAD.size : HEAD.size + about])
    return said, np.frombuffer(body, SCORES, items, HEAD.size + about)
