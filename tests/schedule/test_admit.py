"""Quotas in device time, and the guard against what nobody predicted."""

from hypothesis import given
from hypothesis import strategies as st

from pennyweight.schedule.admit import Bucket, Guard


def test_a_bucket_refills_and_holds_no_more_than_its_burst() -> None:
    bucket = Bucket(quota=100.0, burst_s=2.0, now=0.0)
    assert bucket.wait(150.0, 0.0) == 0.0
    bucket.spend(150.0)
    assert bucket.wait(100.0, 0.0) == 0.5 and bucket.wait(100.0, 0.5) == 0.0
    assert bucket.wait(200.0, 1000.0) == 0.0 and bucket.level == 200.0


def test_more_than_a_bucket_holds_may_be_spent_when_it_is_full_and_is_a_debt() -> None:
    bucket = Bucket(quota=100.0, burst_s=1.0, now=0.0)
    assert bucket.wait(500.0, 0.0) == 0.0
    bucket.spend(500.0)
    assert bucket.wait(1.0, 0.0) == 4.01 and bucket.wait(1.0, 4.01) == 0.0


def test_a_clock_that_stands_refills_nothing() -> None:
    bucket = Bucket(quota=100.0, burst_s=1.0, now=5.0)
    bucket.spend(100.0)
    assert bucket.wait(10.0, 4.0) == 0.1 == bucket.wait(10.0, 5.0)


def test_the_guard_leaves_alone_what_goes_as_predicted() -> None:
    guard = Guard(100)
    for _ in range(500):
        guard.answered(0.010, 0.015, 90)
    assert guard.limit == 100


def test_the_guard_closes_on_what_takes_longer_than_predicted_and_opens_again() -> None:
    guard = Guard(100)
    for _ in range(100):
        guard.answered(0.010, 0.100, 50)
    assert guard.limit < 20
    low = guard.limit
    for _ in range(20):
        guard.answered(0.010, 0.010, 2)
    assert guard.limit == low, "nobody needs more"
    for _ in range(300):
        guard.answered(0.010, 0.010, 90)
    assert guard.limit > 90


@given(st.lists(st.tuples(st.floats(-1, 10), st.floats(-1, 10), st.integers(0, 200)), max_size=200))
def test_the_guard_stays_within_its_bounds(samples: list[tuple[float, float, int]]) -> None:
    guard = Guard(100, least=8)
    for predicted, actual, inside in samples:
        guard.answered(predicted, actual, inside)
        assert 8 <= guard.limit <= 100
