"""A worker process: every variant of one bundle, loaded once, answering batches out of shared memory.

The front starts it as a program of its own, never as a fork: a fork of a process with threads inherits locks that nobody
holds any more. It loads in a thread of low priority, so that a spare or another bundle takes no time from those who serve,
and answers in its main thread, which has the usual one. It ends when the front's end of the socket does, however that died;
a signal to the whole group (Ctrl-C in a terminal, a container's stop) is for the front alone, which finishes what it accepted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

LENGTH = struct.Struct("<I")
RUN = struct.Struct("<BBxxIIIQQ")
"""A batch to run: ``G``; which slot; number of the batch, variant, requests; where answers go; bytes of the slot."""
RAN = struct.Struct("<BxxxId")
"""A batch that was run: ``G``; its number; seconds it took here."""
GO = ord("G")
WATCH_S = 0.05
"""Seconds between two looks at whether the front is there, while loading."""
GENTLE = 5
"""Niceness of a loader that lets others go first: a third of what they get; at 19 it may never be ready on a busy machine."""


class Start(msgspec.Struct, tag=True):
    """Load these bundles, one a variant."""

    folders: list[str]
    allow: list[str]
    threads: int
    gentle: bool = False
    """Let those who serve go first."""


class Measure(msgspec.Struct, tag=True):
    """Time each variant on requests of several sizes."""

    batch: int
    candidates: int
    seconds: float


class Ready(msgspec.Struct, tag=True):
    """The bundles are loaded, and what they are."""

    model: str
    engine: str
    similar: bool
    """Whether likes can be compared with items."""
    every: int
    """Items a recommendation scores where nothing retrieves: all of them. 0 where something does."""
    notes: list[str] = []


class Measured(msgspec.Struct, tag=True):
    """Requests, items and milliseconds, of each variant."""

    samples: list[list[tuple[int, int, float]]]


class Failed(msgspec.Struct, tag=True):
    """Something went wrong: with a batch (its number), or with loading."""

    text: str
    kind: str
    batch: int = -1


Told = Start | Measure
Tells = Ready | Measured | Failed
encode = msgspec.msgpack.Encoder().encode
told = msgspec.msgpack.Decoder(Told)
tells = msgspec.msgpack.Decoder(Tells)


def main() -> None:
    """Serve one front: the descriptors of the socket and of the slots are the arguments."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _Child(control, [int(number) for number in sys.argv[2:]]).run()


class _Child:
    def __init__(self, control: socket.socket, descriptors: Sequence[int]) -> None:
        self.control, self.descriptors = control, descriptors
        self.workers: list[Any] = []

    def run(self) -> None:
        """Answer until the front is gone."""
        start = told.decode(self._received() or sys.exit(0))
        assert isinstance(start, Start)
        thread = threading.Thread(target=self._load, args=(start,))
        thread.start()
        while thread.is_alive():
            if select.select([self.control], [], [], WATCH_S)[0] and not self.control.recv(1, socket.MSG_PEEK):
                os._exit(0)  # the front is gone: nobody waits for what is being loaded
            thread.join(WATCH_S)
        if not self.workers:
            return
        while (message := self._received()) is not None:
            if message[0] == GO and len(message) == RUN.size:
                self._batch(*RUN.unpack(message)[1:])
            else:
                asked = told.decode(message)
                assert isinstance(asked, Measure)
                self._send(encode(Measured([self._measure(w, asked) for w in self.workers])))

    def _load(self, start: Start) -> None:
        if start.gentle:
            with contextlib.suppress(OSError, AttributeError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), GENTLE)  # of this thread alone, on Linux
        try:
            logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
            import torch

            from pennyweight.core import memory
            from pennyweight.model import bundle as bundles
            from pennyweight.serve.slot import Slot
            from pennyweight.serve.worker import Worker

            torch.set_num_threads(start.threads)
            workers = [Worker(bundles.load(folder), start.allow) for folder in start.folders]
            for worker in workers:
                _warm(worker)
            self.slots = [Slot(descriptor) for descriptor in self.descriptors]
            memory.settled()
            best = workers[0]
            every = len(best.ids) if best.index is None else 0
            notes = [f"{Path(f).name}: {w.runner.note}" for f, w in zip(start.folders, workers, strict=True) if w.runner.note]
            model = type(best.runner.module).__name__
            self._send(encode(Ready(model, best.runner.engine, best.vectors is not None, every, notes)))
            self.workers = workers
        except Exception as error:
            self._send(encode(Failed(str(error), type(error).__name__)))

    def _batch(self, which: int, number: int, variant: int, requests: int, at: int, size: int) -> None:
        from pennyweight.serve.slot import read_queries, write_answers

        start = time.perf_counter()
        try:
            slot = self.slots[which]
            slot.fit(size)
            queries = read_queries(slot, requests)
            write_answers(slot, at, queries, _answers(self.workers[variant], queries))
        except Exception as error:
            logging.getLogger("pennyweight.serve").exception("a batch of %d requests failed", requests)
            self._send(encode(Failed(str(error), type(error).__name__, number)))
        else:
            self._send(RAN.pack(GO, number, time.perf_counter() - start))

    def _measure(self, worker: Any, asked: Measure) -> list[tuple[int, int, float]]:
        """Requests of several sizes, alone and joined, in turns until the time is over; each twice at least."""
        rng = np.random.default_rng(0)
        most = min(len(worker.ids), asked.candidates, 1000)
        sizes = [(n, k) for n in sorted({1, min(4, asked.batch), asked.batch}) for k in sorted({1, max(1, most // 10), most})]
        found: list[tuple[int, int, float]] = []
        end = time.perf_counter() + asked.seconds
        while len(found) < 2 * len(sizes) or time.perf_counter() < end:
            for requests, items in sizes:
                queries = _queries(worker, requests, items, rng)
                began = time.perf_counter()
                worker.answer(queries)
                found.append((requests, requests * items, 1000 * (time.perf_counter() - began)))
        return found[len(sizes) :]

    def _received(self) -> bytes | None:
        """The next message; None when the front is gone."""
        head = self._exactly(LENGTH.size)
        return None if head is None else self._exactly(LENGTH.unpack(head)[0])

    def _exactly(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            try:
                more = self.control.recv(size - len(data))
            except ConnectionResetError:
                return None
            if not more:
                return None
            data += more
        return data

    def _send(self, message: bytes) -> None:
        self.control.sendall(LENGTH.pack(len(message)) + message)


def _answers(worker: Any, queries: Sequence[Any]) -> Sequence[Any]:
    """The answers; where something fails each is asked alone, so that one request fails for itself and for no other."""
    try:
        return worker.answer(queries)  # type: ignore[no-any-return]
    except Exception as error:
        logging.getLogger("pennyweight.serve").exception("a batch of %d requests failed", len(queries))
        return [error] if len(queries) == 1 else [_answers(worker, [query])[0] for query in queries]


def _queries(worker: Any, requests: int, items: int, rng: np.random.Generator) -> Sequence[Any]:
    from pennyweight.serve.worker import Query

    none = np.empty(0, np.int64)
    return [Query(None, none, items=worker.ids[rng.integers(0, len(worker.ids), items)]) for _ in range(requests)]


def _warm(worker: Any) -> None:
    """What a first request would wait for: pages of the weights, the index, lists that are made when they are needed."""
    from pennyweight.serve.worker import Query

    none = np.empty(0, np.int64)
    worker.answer([Query(None, none, k=10), Query(None, none, "popularity", k=10)])
    worker.answer([Query(None, none, items=worker.ids[:50])])
    if worker.vectors is not None:
        worker.answer([Query(None, worker.ids[:1], "similarity", k=10)])


if __name__ == "__main__":
    main()
