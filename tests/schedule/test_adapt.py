"""The ladder: down at once, up with patience."""

from pennyweight.schedule.adapt import Ladder


def ladder() -> Ladder:
    return Ladder(3, limit=0.5, room=0.6, patience=1.0)


def test_down_at_once_as_far_as_needed() -> None:
    steps = ladder()
    assert steps.step([0.4, 0.2, 0.1], 0.0) == 0
    assert steps.step([0.6, 0.3, 0.1], 0.0) == 1
    assert steps.step([5.0, 3.0, 1.0], 0.0) == 2, "the last one whatever the pressure"


def test_up_one_at_a_time_after_it_was_permitted_with_room_for_a_while() -> None:
    steps = ladder()
    steps.step([5.0, 3.0, 1.0], 0.0)
    calm = [0.2, 0.1, 0.0]
    assert [steps.step(calm, t) for t in (1.0, 1.9, 2.0, 2.5, 3.0)] == [2, 2, 1, 1, 0]


def test_a_moment_of_pressure_starts_the_wait_anew() -> None:
    steps = ladder()
    steps.step([0.6, 0.1, 0.0], 0.0)
    assert steps.step([0.2, 0.1, 0.0], 0.1) == 1
    assert steps.step([0.4, 0.2, 0.0], 0.9) == 1, "permitted, without room"
    assert steps.step([0.2, 0.1, 0.0], 1.2) == 1
    assert steps.step([0.2, 0.1, 0.0], 2.2) == 0


def test_one_variant_stays() -> None:
    assert Ladder(1, limit=0.5, room=0.6, patience=1.0).step([9.0], 0.0) == 0
