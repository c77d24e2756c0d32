"""Many deadlines for the price of one timer: they are all of one length, so they are due in the order they came.

A timer of the event loop costs as much as parsing a small request, and nearly every request is over before its deadlines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Alarm:
    """Calls back what is still set so many seconds after it was; use it inside one event loop."""

    def __init__(self) -> None:
        self._due: dict[int, tuple[float, Callable[[], object]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._number = 0

    def set(self, seconds: float, call: Callable[[], object]) -> int:
        """Have ``call`` called then, unless the number returned is put off before; ``seconds`` is the same each time."""
        self._number += 1
        self._due[self._number] = time.monotonic() + seconds, call
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._ring)
        return self._number

    def off(self, number: int) -> None:
        """Forget it."""
        self._due.pop(number, None)

    def _ring(self) -> None:
        self._timer, now = None, time.monotonic()
        while self._due:
            number, (when, call) = next(iter(self._due.items()))
            if when > now:
                self._timer = asyncio.get_running_loop().call_later(when - now, self._ring)
                return
            del self._due[number]
            call()
