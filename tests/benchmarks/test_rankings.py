"""Drops of a ranking are shares of what the given model gets, over draws of the same users for both models."""

import numpy as np

from benchmarks.rankings import relative


def test_a_tenth_less_for_everybody_is_a_tenth_in_every_draw() -> None:
    before = np.random.default_rng(0).random(500)
    found = relative(before, 0.9 * before)
    assert np.allclose([found.drop, found.low, found.upper], 0.1) and found.baseline == before.mean()


def test_the_bound_is_wider_for_fewer_users_and_holds_the_drop() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(4000)
    after = before - 0.02 + rng.normal(0, 0.2, 4000)
    few, many = relative(before[:200], after[:200]), relative(before, after)
    assert few.upper - few.drop > many.upper - many.drop
    assert many.low < 0.02 / before.mean() < many.upper


def test_users_without_a_right_item_leave_no_draw_undefined() -> None:
    before = np.array([0.0, 0.0, 1.0])
    assert np.isfinite(relative(before, before).upper)
