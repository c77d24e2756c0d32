"""Requests and answers in memory that two processes see: arrays as they are, nothing pickled, nothing sent.

A worker runs one batch at a time and may have the next one already, so it has two slots in turns: the front writes a batch's
requests into one, the worker its answers behind them, and the socket between the two carries a few numbers that say where. A
queue of pickles, the usual way, copies every array four times and runs whatever bytes it is handed.

The memory has no name (``memfd_create``; elsewhere a temporary file that is removed at once) and its descriptor is inherited.
``multiprocessing.shared_memory`` gives names that outlive a killed process, and a tracker that removes them under the others.
The slot grows when a batch needs more; the worker maps it again when it is told.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from pennyweight.core.errors import RequestError
from pennyweight.serve.worker import By, Ids, Query, Ranked

WAYS: tuple[By, ...] = get_args(By)
QUERY = struct.Struct("<BxxxIIIiIIIixxxx")
"""By whom; bytes of user and context; numbers of history, hidden, items (-1: none given); count, k, start, stop (-1: end)."""
ANSWER = struct.Struct("<BxxxI")
"""What follows: scores; items and scores; what is wrong with the request; what failed here. How many, or how long."""
SCORES, RANKED, WRONG, FAULT = range(4)
FIRST = 1 << 20
"""Bytes of a new slot."""
NONE = np.empty(0, np.int64)


class Slot:
    """Memory that is shared through a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.memory = mmap.mmap(descriptor, 0)

    @classmethod
    def made(cls, size: int = FIRST) -> Slot:
        """New memory of zeros."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("pennyweight")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, size)
        return cls(descriptor)

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.memory)

    def fit(self, size: int) -> None:
        """See at least so many bytes, made larger where it is smaller; arrays over the old mapping stay valid."""
        if size > self.size:
            if size > os.fstat(self.descriptor).st_size:
                os.ftruncate(self.descriptor, size)
            self.memory = mmap.mmap(self.descriptor, 0)

    def close(self) -> None:
        """Let go of the descriptor; the memory goes with the last who sees it."""
        os.close(self.descriptor)


class Packed(msgspec.Struct, frozen=True, eq=False):
    """A query as it is written, made once however often it is sent."""

    query: Query
    head: tuple[int, ...]
    body: bytes

    @classmethod
    def of(cls, query: Query) -> Packed:
        """The query packed.

        Raises:
            RequestError: its context holds what does not fit, such as a number of more than 64 bits.
        """
        try:
            asked = b"" if query.user is None and not query.context else _encoder.encode((query.user, query.context))
        except (OverflowError, TypeError, ValueError) as error:
            raise RequestError(f"the context cannot be passed on: {error}; give numbers of at most 64 bits") from error
        items = NONE if query.items is None else query.items
        head = (
            WAYS.index(query.by), len(asked), len(query.history), len(query.hidden),
            -1 if query.items is None else len(items), query.count, query.k,
        )  # fmt: skip
        body = b"".join((asked, bytes(-len(asked) % 8), query.history.tobytes(), query.hidden.tobytes(), items.tobytes()))
        return cls(query, head, body)

    @property
    def bytes(self) -> int:
        """What it takes in a slot."""
        return QUERY.size + len(self.body)

    @property
    def answer_bytes(self) -> int:
        """What its answer takes at most."""
        query = self.query
        most = query.k or query.count if query.items is None else len(query.items)
        return ANSWER.size + 12 * most + 8 + WORDS


WORDS = 4096
"""Bytes of an error's text at most."""
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder()

Part = tuple[Packed, int, int | None]
"""A query and which of its candidates, from and to."""


def write_queries(slot: Slot, parts: Sequence[Part]) -> int:
    """Write the requests of a batch at the slot's start; where its answers go, with room for them."""
    end = sum(packed.bytes for packed, _, _ in parts)
    slot.fit(end + sum(packed.answer_bytes for packed, _, _ in parts))
    memory, at = slot.memory, 0
    for packed, start, stop in parts:
        QUERY.pack_into(memory, at, *packed.head, start, -1 if stop is None else stop)
        at += QUERY.size
        memory[at : at + len(packed.body)] = packed.body
        at += len(packed.body)
    return end


def read_queries(slot: Slot, count: int) -> list[Query]:
    """The requests of a batch; their arrays are views of the slot."""
    memory, at, found = slot.memory, 0, []
    for _ in range(count):
        by, asked, history, hidden, items, most, k, start, stop = QUERY.unpack_from(memory, at)
        at += QUERY.size
        user, context = _decoder.decode(memory[at : at + asked]) if asked else (None, {})
        at += asked + -asked % 8
        lengths = (history, hidden, max(0, items))
        arrays = []
        for length in lengths:
            arrays.append(np.frombuffer(memory, np.int64, length, at) if length else NONE)
            at += 8 * length
        candidates = None if items < 0 else arrays[2]
        found.append(
            Query(
                user, arrays[0], WAYS[by], candidates, arrays[1], most, context, k, start, None if stop < 0 else stop
            )
        )  # fmt: skip
    return found


Outcome = Ranked | Exception


def write_answers(slot: Slot, at: int, queries: Iterable[Query], answers: Iterable[Outcome]) -> None:
    """Write the answers of a batch from ``at`` on."""
    memory = slot.memory
    for query, answer in zip(queries, answers, strict=True):
        if isinstance(answer, Exception):
            asked = isinstance(answer, RequestError)
            text = (str(answer) if asked else f"{type(answer).__name__}: {answer}").encode()[:WORDS]
            at = _put(memory, at, WRONG if asked else FAULT, len(text), text)
        else:
            scores = np.ascontiguousarray(answer.scores, np.float32)
            ranked = query.items is None or bool(query.k)
            items = np.ascontiguousarray(answer.items, np.int64).tobytes() if ranked else b""
            at = _put(memory, at, RANKED if ranked else SCORES, len(scores), items + scores.tobytes())


def _put(memory: mmap.mmap, at: int, kind: int, count: int, data: bytes) -> int:
    ANSWER.pack_into(memory, at, kind, count)
    at += ANSWER.size
    memory[at : at + len(data)] = data
    return at + len(data) + -len(data) % 8


def read_answers(slot: Slot, at: int, parts: Sequence[Part]) -> list[Outcome]:
    """The answers of a batch, copied out of the slot."""
    memory, found = slot.memory, list[Outcome]()
    for packed, start, stop in parts:
        kind, count = ANSWER.unpack_from(memory, at)
        at += ANSWER.size
        if kind in (WRONG, FAULT):
            text = memory[at : at + count].decode(errors="replace")
            found.append(RequestError(text) if kind == WRONG else RuntimeError(text))
            at += count + -count % 8
            continue
        items: Ids
        if kind == RANKED:
            items = _copy(memory, np.int64, count, at)
            at += 8 * count
        else:
            assert packed.query.items is not None
            items = packed.query.items[start:stop]
        found.append(Ranked(items, _copy(memory, np.float32, count, at)))
        at += 4 * count + -(4 * count) % 8
    return found


def _copy(memory: mmap.mmap, kind: Any, count: int, at: int) -> npt.NDArray[Any]:
    return np.frombuffer(memory, kind, count, at).copy()
