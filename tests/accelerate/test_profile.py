"""What a bundle's work takes, measured: a curve that says what the measured sizes took."""

import dataclasses
from pathlib import Path

import pytest

from pennyweight.accelerate.profile import profile, profiled
from pennyweight.accelerate.runner import Runner
from pennyweight.core.curve import Curve
from pennyweight.core.errors import BundleError, ConfigError, DataError
from pennyweight.data.requests import Trace
from pennyweight.model.bundle import Bundle, Policy, Variant, save


class Device:
    """A runner whose forwards take no time worth a name, and says how often it was asked for what."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def score(self, batch: dict) -> None:  # type: ignore[type-arg]
        self.asked.append(len(next(iter(batch.values()))))


def test_small_and_large_alone_and_together_are_timed_in_turns(cascade: Bundle) -> None:
    requests = Trace.sample(cascade.catalog, 4, 100).batches(cascade.catalog)  # type: ignore[arg-type]
    device = Device()
    profile(device, requests, joined=(1, 3), shares=(0.1, 1.0), seconds=0.0)  # type: ignore[arg-type]
    assert device.asked == [10, 100, 30, 300] * 8, "once to warm up, and seven rounds"


def test_a_larger_request_takes_longer(cascade: Bundle) -> None:
    requests = Trace.sample(cascade.catalog, 4, 1000).batches(cascade.catalog)  # type: ignore[arg-type]
    with Runner(cascade) as runner:
        curve = profile(runner, requests, seconds=0.3)
    assert 0 < curve.ms(1, 100) < curve.ms(8, 8000) and curve.safety >= 1


def test_a_policy_gets_the_curves_it_lacks(cascade: Bundle, tmp_path: Path) -> None:
    known = Curve(1.0, 2.0, 3.0)
    save(cascade, tmp_path / "small")
    policy = Policy(variants=(Variant("known", costs={"cpu": known}), Variant("small", "../small", 0.01)))
    found = profiled(save(cascade.replace(policy=policy), tmp_path / "best"), 50, seconds=0.0)
    assert found.variants[0].costs == {"cpu": known}
    assert set(found.variants[1].costs) == {"cpu"} and found.variants[1].costs["cpu"].ms(1, 50) > 0
    assert dataclasses.replace(found, variants=policy.variants) == policy
    (alone,) = profiled(tmp_path / "small", 50, seconds=0.0).variants
    assert alone.name == "the model" and set(alone.costs) == {"cpu"}


def test_bad_input(cascade: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs requests to time"):
        profile(Device(), [])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no catalogue of items to make requests of"):
        profiled(save(cascade.replace(catalog=None), tmp_path / "bare"))
    lost = Policy(variants=(Variant("a"), Variant("b", "../nowhere")))
    with pytest.raises(BundleError, match="nowhere holds no bundle"):
        profiled(save(cascade.replace(policy=lost), tmp_path / "b"), 10, seconds=0.0)
