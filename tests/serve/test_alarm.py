"""One timer for many deadlines: each rings in its turn, and not if it was put off."""

import asyncio

import pytest

from pennyweight.serve.alarm import Alarm


def test_what_is_still_set_rings_in_the_order_it_came_and_not_before_its_time() -> None:
    async def scene() -> list[tuple[str, float]]:
        alarm, rang = Alarm(), []
        loop = asyncio.get_running_loop()
        began = loop.time()
        marks = {}
        for name in "abc":
            marks[name] = alarm.set(0.2, lambda name=name: rang.append((name, loop.time() - began)))
            await asyncio.sleep(0.05)
        alarm.off(marks["a"])
        alarm.off(marks["a"])
        while len(rang) < 2:
            await asyncio.sleep(0.01)
        alarm.set(0.2, lambda: rang.append(("d", loop.time() - began)))
        while len(rang) < 3:
            await asyncio.sleep(0.01)
        return rang

    rang = asyncio.run(scene())
    assert [name for name, _ in rang] == ["b", "c", "d"]
    assert rang[0][1] >= 0.25 and rang[1][1] >= 0.3 and rang[2][1] >= 0.5


def test_nothing_set_leaves_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> int:
        alarm, loop, timers = Alarm(), asyncio.get_running_loop(), 0
        later = loop.call_later

        def counted(delay: float, call: object, *more: object) -> asyncio.TimerHandle:
            nonlocal timers
            timers += 1
            return later(delay, call, *more)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "call_later", counted)
        for _ in range(1000):
            alarm.off(alarm.set(30.0, list))
        return timers

    assert asyncio.run(scene()) == 1
