"""A cost curve is found from measurements, follows a device that changes, and is not thrown by one odd time."""

import random

import pytest

from pennyweight.core.config import decode, encode
from pennyweight.core.curve import Curve, Learned
from pennyweight.core.errors import ConfigError

TRUE = Curve(2.0, 0.3, 0.01)


def work(n: int, seed: int = 0, noise: float = 0.05, curve: Curve = TRUE) -> list[tuple[int, int, float]]:
    draw = random.Random(seed)
    sizes = [(r, sum(draw.randint(10, 500) for _ in range(r))) for r in (draw.randint(1, 8) for _ in range(n))]
    return [(r, i, curve.ms(r, i) * draw.lognormvariate(0, noise)) for r, i in sizes]


def near(curve: Curve, wanted: Curve, share: float) -> bool:
    return all(abs(curve.ms(*w) / wanted.ms(*w) - 1) <= share for w in ((1, 10), (1, 500), (8, 80), (8, 2000)))


def test_a_profile_is_fitted() -> None:
    exact = Curve.fit(work(30, noise=0.0))
    assert (exact.fixed_ms, exact.request_ms, exact.item_ms) == pytest.approx((2.0, 0.3, 0.01))
    assert exact.safety == pytest.approx(1.0)
    noisy = Curve.fit(work(300))
    assert near(noisy, TRUE, 0.03) and noisy.safety == pytest.approx(1.085, abs=0.03), "exp(1.645 x .05)"
    assert noisy.safe_ms(1, 100) == noisy.safety * noisy.ms(1, 100)


def test_no_coefficient_is_negative() -> None:
    """Times that fall with the number of requests: chance, or a cache that warmed up."""
    curve = Curve.fit([(1, 100, 5.0), (2, 100, 4.0), (3, 100, 3.0), (1, 200, 6.0)])
    assert min(curve.fixed_ms, curve.request_ms, curve.item_ms) >= 0
    learned = Learned(curve)
    for k in range(100):
        learned.observe(1 + k % 3, 100, 5.0 - k % 3)
    assert min(learned.curve.fixed_ms, learned.curve.request_ms, learned.curve.item_ms) >= 0


def test_what_is_measured_replaces_a_wrong_prior() -> None:
    learned = Learned(Curve(8.0, 0.0, 0.001))
    assert learned.ms(1, 500) == 8.5, "the prior, before anything was seen"
    for sample in work(200):
        learned.observe(*sample)
    assert near(learned.curve, TRUE, 0.1) and learned.count == 200


def test_a_device_that_slows_down_is_followed() -> None:
    learned = Learned(TRUE)
    slow = Curve(6.0, 0.9, 0.03)
    for sample in work(250, curve=slow):
        learned.observe(*sample)
    assert near(learned.curve, slow, 0.1)


def test_a_direction_nobody_uses_stays_at_the_prior() -> None:
    """Ten thousand times one request of 100 items: the item's share must not wander off, and eight requests stay sane."""
    learned = Learned(TRUE)
    draw = random.Random(1)
    for _ in range(10_000):
        learned.observe(1, 100, TRUE.ms(1, 100) * draw.lognormvariate(0, 0.1))
    assert learned.ms(1, 100) == pytest.approx(TRUE.ms(1, 100), rel=0.05)
    assert learned.ms(8, 2000) == pytest.approx(TRUE.ms(8, 2000), rel=0.5)


def test_one_odd_time_moves_little() -> None:
    learned = Learned(TRUE)
    for sample in work(100):
        learned.observe(*sample)
    before = learned.ms(1, 100)
    learned.observe(1, 100, 1000 * before)
    assert learned.ms(1, 100) == pytest.approx(before, rel=0.15)


@pytest.mark.parametrize("ms", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clock_that_went_back_teaches_nothing(ms: float) -> None:
    learned = Learned(TRUE)
    learned.observe(1, 100, ms)
    assert learned.curve == TRUE and learned.count == 0


def test_the_safety_factor_covers_the_tail() -> None:
    learned = Learned(Curve(2.0, 0.3, 0.01, safety=2.0))
    draws = work(400, noise=0.2)
    for sample in draws[:10]:
        learned.observe(*sample)
    assert learned.curve.safety >= 2.0, "the prior's until there is enough"
    for sample in draws[10:]:
        learned.observe(*sample)
    late = sum(ms > learned.safe_ms(r, i) for r, i, ms in work(1000, seed=9, noise=0.2)) / 1000
    assert 0.01 < late < 0.10


def test_it_is_stored_as_json() -> None:
    assert decode(Curve, encode(TRUE)) == TRUE


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Curve(-1.0, 0, 0), "-1"),
        (lambda: Curve(0, 0, 0), "one above"),
        (lambda: Curve(1.0, 0, 0, safety=0.5), "0.5"),
        (lambda: Curve.fit([]), "0 samples"),
        (lambda: Curve.fit([(1, 1, 0.0)]), "above 0 ms"),
        (lambda: Learned(TRUE, forgetting=0.0), "forgetting"),
    ],
)
def test_bad_input(wrong, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=said):
        wrong()
