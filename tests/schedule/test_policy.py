import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pennyweight.core.config import dumps, loads
from pennyweight.core.curve import Curve
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.model.bundle import Bundle, Policy, Priority, Tenant, Variant, load, save
from pennyweight.model.spec import Model, Spec
from pennyweight.model.transform import Env, Transform
from pennyweight.schedule.policy import SetPolicy


@pytest.fixture
def bundle() -> Bundle:
    return Bundle(Model(Spec("pennyweight.model.ranking:DNN"), {"weight": torch.ones(2)}))


def test_sets_what_is_named_and_keeps_the_rest(bundle: Bundle) -> None:
    after = SetPolicy(batch=8, wait_ms=2.0).apply(bundle.replace(policy=Policy(queue=7)), Env())
    assert after.policy == Policy(batch=8, wait_ms=2.0, queue=7)
    (step,) = after.plan
    assert {name: value for name, value in step.items() if value is not None} == {
        "transform": "queue",
        "batch": 8,
        "wait_ms": 2.0,
    }
    assert bundle.policy == Policy()


def test_goes_through_json(bundle: Bundle) -> None:
    transform = SetPolicy(deadline_ms=50.0)
    assert loads(Transform, dumps(transform)) == transform


def test_classes_tenants_and_variants_travel_in_a_bundle(bundle: Bundle, tmp_path: Path) -> None:
    after = SetPolicy(
        classes=(Priority("page", deadline_ms=50.0), Priority("mail", share=0.3, degrade=True)),
        tenants=(Tenant("shop", quota=500.0), Tenant("*", quota=50.0, burst_s=2.0)),
        variants=(Variant("full", costs={"cpu": Curve(0.1, 0.0, 0.01)}), Variant("small", "../small", 0.003, False, 8)),
        metric="auc",
        margin=0.001,
    ).apply(bundle, Env())
    save(after, tmp_path / "bundle")
    assert load(tmp_path / "bundle").policy == after.policy


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Priority("a", share=0.0), "class 'a'.*share 0"),
        (lambda: Priority("a", deadline_ms=-1.0), "deadline_ms -1"),
        (lambda: Tenant("t", quota=0.0), "tenant 't': quota 0"),
        (lambda: Policy(classes=(Priority("a"), Priority("a"))), "classes a, a: each name may stand once"),
        (lambda: Policy(variants=(Variant("small", within=False),)), "'small', is not within the margin"),
        (lambda: SetPolicy(hedge=1.0), r"queue\.hedge is 1.0"),
    ],
)
def test_policies_that_make_no_sense_are_refused(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        wrong()


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
