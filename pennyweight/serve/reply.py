"""An answer before it is sent, and the one shape of every failure."""

from __future__ import annotations

import functools
import math

import msgspec

from pennyweight.core.errors import Overloaded, PennyweightError
from pennyweight.serve import messages as m

CODES = {
    400: "bad_request", 403: "forbidden", 404: "not_found", 409: "conflict", 413: "too_large", 422: "poison", 429: "overloaded",
    507: "storage",
}  # fmt: skip


class Reply(msgspec.Struct, frozen=True):
    """An answer before it is sent."""

    status: int
    body: bytes
    kind: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


@functools.lru_cache(256)
def fields(kind: str, more: tuple[tuple[str, str], ...]) -> list[tuple[bytes, bytes]]:
    """What stands before an answer, but for its length."""
    every = [("content-type", kind), ("cache-control", "no-cache"), ("x-content-type-options", "nosniff"), *more]
    return [(k.encode(), v.encode()) for k, v in every]


def problem(status: int, code: str, text: str, *more: tuple[str, str]) -> Reply:
    """A failure: what was wrong and, after a semicolon, what to do."""
    message, _, remedy = text.partition("; ")
    return Reply(status, msgspec.json.encode(m.Failure(m.Problem(status, code, message, remedy))), headers=more)


def failed(error: PennyweightError) -> Reply:
    """An error of ours as its status."""
    again = [("retry-after", str(max(1, math.ceil(error.retry_after))))] if isinstance(error, Overloaded) else []
    return problem(error.status, CODES[error.status], str(error), *again)
