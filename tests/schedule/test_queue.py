import math

import pytest
import torch

from pennyweight.core.config import dumps, loads
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.model.bundle import Bundle, Policy
from pennyweight.model.spec import Model, Spec
from pennyweight.model.transform import Env, Transform
from pennyweight.schedule.queue import SetPolicy


@pytest.fixture
def bundle() -> Bundle:
    return Bundle(Model(Spec("pennyweight.model.ranking:DNN"), {"weight": torch.ones(2)}))


def test_sets_what_is_named_and_keeps_the_rest(bundle: Bundle) -> None:
    after = SetPolicy(batch=8, wait_ms=2.0).apply(bundle.replace(policy=Policy(queue=7)), Env())
    assert after.policy == Policy(batch=8, wait_ms=2.0, queue=7)
    assert after.plan == (
        {"transform": "queue", "batch": 8, "wait_ms": 2.0, "queue": None, "deadline_ms": None, "candidates": None},
    )
    assert bundle.policy == Policy()


def test_goes_through_json(bundle: Bundle) -> None:
    transform = SetPolicy(deadline_ms=50.0)
    assert loads(Transform, dumps(transform)) == transform


@pytest.mark.parametrize("transform", [SetPolicy(), SetPolicy(batch=1, queue=1000)])
def test_a_change_that_is_none_is_refused(bundle: Bundle, transform: SetPolicy) -> None:
    with pytest.raises(PlanError, match="would change nothing"):
        transform.apply(bundle, Env())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch", 0),
        ("batch", -1),
        ("queue", 0),
        ("deadline_ms", 0.0),
        ("candidates", 0),
        ("wait_ms", -1.0),
        ("wait_ms", math.nan),
        ("deadline_ms", math.inf),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"queue\.{field} is {value}"):
        SetPolicy(**{field: value})  # type: ignore[arg-type]


def test_waiting_longer_than_the_deadline_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="wait_ms 20 is not below deadline_ms 10"):
        SetPolicy(wait_ms=20.0, deadline_ms=10.0).apply(bundle, Env())


def test_says_what_it_sets() -> None:
    assert SetPolicy(batch=8, wait_ms=0.5).describe() == "join up to 8 requests, wait 0.5 ms for others"
