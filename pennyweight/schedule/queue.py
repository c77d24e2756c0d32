"""The first scheduling transform: how many requests are joined, how long one waits, when one is refused.

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
from pennyweight.model.bundle import Bundle, Policy
from pennyweight.model.transform import Env, Transform


@named("queue")
@dataclasses.dataclass(frozen=True)
class SetPolicy(Transform):
    """Set the queue's numbers; one left out stays as the bundle has it."""

    family = "schedule"
    stage = "policy"

    batch: int | None = None
    """Requests joined into one forward at most."""
    wait_ms: float | None = None
    """How long the first request of a batch waits for others; 0 takes whoever is there."""
    queue: int | None = None
    """Requests that may wait."""
    deadline_ms: float | None = None
    """A request not started by then is refused."""
    candidates: int | None = None
    """Items one request may ask to be scored."""

    def __post_init__(self) -> None:
        for name in ("batch", "queue", "deadline_ms", "candidates"):
            _check(name, getattr(self, name), "a number above 0", lambda v: v > 0)
        _check("wait_ms", self.wait_ms, "0 or more", lambda v: v >= 0)

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with these numbers in its policy.

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
        """The numbers that are set, in a sentence."""
        words = {
            "batch": "join up to {} requests",
            "wait_ms": "wait {:g} ms for others",
            "queue": "let {} wait",
            "deadline_ms": "refuse what did not start in {:g} ms",
            "candidates": "score at most {} items a request",
        }
        return ", ".join(words[name].format(value) for name, value in self._given().items()) or "keep the policy"

    def _given(self) -> dict[str, Any]:
        return {f.name: v for f in dataclasses.fields(Policy) if (v := getattr(self, f.name)) is not None}


def _check(name: str, value: float | None, wanted: str, holds: Callable[[float], bool]) -> None:
    if value is not None and not (math.isfinite(value) and holds(value)):
        raise ConfigError(f"queue.{name} is {value}; give {wanted}")
