"""Histories against the obvious slow way, and nothing from the row's own moment or later."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.data.history import ends, held_out, histories

ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(2, 9), st.integers(0, 4), st.booleans()), min_size=1, max_size=40)


def slow(rows: list[tuple[int, int, int, bool]], length: int) -> list[list[int]]:
    found = []
    for user, _, time, _ in rows:
        earlier = [(t, k) for k, (u, _, t, liked) in enumerate(rows) if u == user and t < time and liked]
        last = [rows[k][1] for _, k in sorted(earlier)][-length:]
        found.append([0] * (length - len(last)) + last)
    return found


@given(ROWS, st.integers(1, 5))
def test_as_the_slow_way(rows: list[tuple[int, int, int, bool]], length: int) -> None:
    user, item, time, liked = (np.array(c) for c in zip(*rows, strict=True))
    made = histories(user, item, time, liked, length)
    assert made.tolist() == slow(rows, length)
    some = np.arange(len(rows))[::-2]
    assert np.array_equal(histories(user, item, time, liked, length, some), made[some])


@given(ROWS, st.integers(1, 5))
def test_without_times_the_order_stands(rows: list[tuple[int, int, int, bool]], length: int) -> None:
    placed = [(u, i, k, liked) for k, (u, i, _, liked) in enumerate(rows)]
    user, item, _, liked = (np.array(c) for c in zip(*placed, strict=True))
    assert histories(user, item, None, liked, length).tolist() == slow(placed, length)


def test_nobody_liked_anything() -> None:
    nothing = histories(np.array([1, 1]), np.array([2, 3]), None, np.zeros(2, bool), 3)
    assert nothing.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_the_last_rows_are_held_out() -> None:
    user = np.array([5, 7, 5, 5, 7, 5, 9])
    time = np.array([1, 1, 4, 2, 2, 3, 1])
    assert held_out(user, time).tolist() == [0, 0, 2, 0, 0, 1, 0]
    assert held_out(user).tolist() == [0, 0, 0, 1, 0, 2, 0]


@pytest.mark.parametrize(("least", "users"), [(1, [5, 7, 9]), (2, [5, 7]), (3, [5]), (9, [])])
def test_ends_of_users_with_enough_rows(least: int, users: list[int]) -> None:
    user = np.array([5, 7, 5, 5, 7, 9])
    order, last = ends(user, least=least)
    assert user[order[last]].tolist() == users
