"""The scheduling transform: how requests are joined, ordered and limited, and which models may answer them.

Joining pays where a forward has a high fixed cost (a GPU, a compiled graph); on a CPU a ranking request of 500 candidates
is nearly all per-item cost, so the default joins nothing. A queue without a bound or a deadline answers everybody too
late under overload; with both, those who are answered are answered in time and the others know at once. An unbounded
queue with client timeouts is the usual alternative: the work is done for clients that have left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError
from pennyweight.model.bundle import Bundle, Policy, Priority, Tenant, Variant
from pennyweight.model.transform import Env, Transform


@named("queue")
@dataclasses.dataclass(frozen=True)
class SetPolicy(Transform):
    """Set the policy's fields; one left out stays as the bundle has it."""

    family = "schedule"
    stage = "policy"

    batch: int | None = None
    """Requests joined into one forward at most."""
    wait_ms: float | None = None
    """How long the first request of a batch waits for others; 0 takes whoever is there."""
    queue: int | None = None
    """Requests that may wait."""
    deadline_ms: float | None = None
    """A request is answered within this time or refused."""
    candidates: int | None = None
    """Items one request may ask to be scored."""
    classes: tuple[Priority, ...] | None = None
    """Classes of requests, the most important first."""
    tenants: tuple[Tenant, ...] | None = None
    """Who may use how much of the devices."""
    variants: tuple[Variant, ...] | None = None
    """Models that may answer, the best first."""
    metric: str | None = None
    """What the variants' gaps are measured in."""
    margin: float | None = None
    """The gap that was allowed."""
    age_ms: float | None = None
    """How much later a class counts as due than the one above it."""
    hedge: float | None = None
    """Share of the work that may be done twice."""

    def __post_init__(self) -> None:
        for name in ("batch", "queue", "deadline_ms", "candidates"):
            _check(name, getattr(self, name), "a number above 0", lambda v: v > 0)
        for name in ("wait_ms", "margin", "age_ms"):
            _check(name, getattr(self, name), "0 or more", lambda v: v >= 0)
        _check("hedge", self.hedge, "a share of 0 or more and below 1", lambda v: 0 <= v < 1)

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with these in its policy.

        Raises:
            ConfigError: requests would wait for others longer than their deadline.
        """
        policy = dataclasses.replace(bundle.policy, **self._given())
        if policy.wait_ms >= policy.deadline_ms:
            raise ConfigError(
                f"wait_ms {policy.wait_ms:g} is not below deadline_ms {policy.deadline_ms:g}, so a lone request would be "
                "refused; lower wait_ms or raise deadline_ms"
            )
        return bundle.replace(policy=policy)

    def describe(self) -> str:
        """What is set, in a sentence."""
        words = {
            "batch": "join up to {} requests",
            "wait_ms": "wait {:g} ms for others",
            "queue": "let {} wait",
            "deadline_ms": "answer within {:g} ms or refuse",
            "candidates": "score at most {} items a request",
            "classes": "classes {}",
            "tenants": "quotas for {}",
            "variants": "answer by {}",
            "metric": "gaps in {}",
            "margin": "a margin of {:g}",
            "age_ms": "{:g} ms between classes",
            "hedge": "hedge {:.0%} of the work",
        }
        return ", ".join(words[name].format(_shown(value)) for name, value in self._given().items()) or "keep the policy"

    def _given(self) -> dict[str, Any]:
        return {f.name: v for f in dataclasses.fields(Policy) if (v := getattr(self, f.name)) is not None}


def _shown(value: Any) -> Any:
    """A value as a sentence has it: the names of what is listed."""
    return (", ".join(entry.name for entry in value) or "nobody") if isinstance(value, tuple) else value


def _check(name: str, value: float | None, wanted: str, holds: Callable[[float], bool]) -> None:
    if value is not None and not (math.isfinite(value) and holds(value)):
        raise ConfigError(f"queue.{name} is {value}; give {wanted}")
