"""What was tried and what came of it, as plain values: the record the search writes and the report draws.

A Trial is a plan with its predicted cost, its measured cost and its measured quality with an interval. A Result is the
whole record of one ``optimize``: JSON in, JSON out, nothing that needs the model to be read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pennyweight.model.transform import Plan

Verdict = Literal["proven", "worse", "cannot tell"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a deployment spends."""

    bytes: int
    """The weights file."""
    p50_ms: float
    p99_ms: float
    """Milliseconds for one user with ``candidates`` candidates, features and forward."""
    candidates: int
    flops: int = 0
    """Floating point operations for one candidate."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """A paired comparison with the baseline on the same rows."""

    metric: str
    rows: int
    baseline: float
    value: float
    drop: float
    """Quality lost, towards worse whatever the metric: negative is better than the baseline."""
    drop_low_95: float
    drop_upper_95: float
    """One-sided 95 % bounds of the drop."""
    margin: float
    verdict: Verdict
    method: str
    """The test in words, e.g. ``DeLong clustered by 671 users``."""
    rows_needed: int = 0
    """For *cannot tell*: about how many rows would decide it at this drop and spread; 0 if no number would."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One plan and what came of it."""

    name: str
    plan: Plan
    predicted: Cost
    measured: Cost | None = None
    validation: Quality | None = None
    """On the validation rows, which the search chooses on."""
    proof: Quality | None = None
    """On the untouched test rows; only for the few plans that were put to the proof."""
    against_control: Quality | None = None
    """The same rows, against the control instead of the baseline: what compression alone cost."""
    seconds: float = 0.0
    note: str = ""
    """Why it was dropped, or what a transform said."""
    guards: tuple[Quality, ...] = ()
    """Other metrics compared on the test rows, such as the recall of the retrieval stage; reported, not decided on."""
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """How far the model's answers move (Kullback and Leibler's divergence) by what the plan does to each of these layers alone;
    for plans that were chosen so."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One table or layer: where bytes and milliseconds are."""

    name: str
    kind: str
    """What it is, e.g. ``table int4 9068x16`` or ``dense fp32 128x64``."""
    bytes: int
    ms: float
    flops: int
    lookups: int = 0
    """How often one candidate uses it: rows a table looks up, positions of a convolution."""


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One epoch of training."""

    run: str
    """Which training: ``baseline``, ``control``, or the trial's name."""
    epoch: int
    loss: float
    metric: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Price:
    """What machine time costs, to turn a frontier into money."""

    core_hour: float = 0.0
    gpu_hour: float = 0.0
    gb_month: float = 0.0
    currency: str = "USD"


@dataclasses.dataclass(frozen=True)
class Tuned:
    """One way to run a plan that was tried when its runtime was chosen."""

    plan: str
    """The plan it was tried for, in words."""
    runtime: str
    """Engine, threads and cut, in words."""
    p50_ms: float | None
    """None where it was not timed."""
    note: str = ""
    """Why it was dropped or never timed; empty for those that were timed to the end."""
    chosen: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """The record of one ``optimize``."""

    budget: str
    baseline: Trial
    control: Trial | None
    """The baseline after the same extra training, with no compression."""
    chosen: Trial | None
    """The cheapest plan that was proven; None if there is none."""
    trials: tuple[Trial, ...]
    parts_before: tuple[Part, ...]
    parts_after: tuple[Part, ...]
    epochs: tuple[Epoch, ...]
    references: tuple[tuple[str, float], ...]
    """Simple models on the same test rows, e.g. ("popularity", 0.71): name and metric."""
    verdict: Verdict
    explanation: str
    """The verdict in a sentence, with its numbers."""
    seconds: float
    compute_cap_s: float
    seed: int
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str
    data: str = ""
    """One line on the data and its split."""
    request: str = "one user with 500 candidates"
    """What is timed."""
    price: Price | None = None
    model: str = ""
    """What was optimized, e.g. ``DeepFM``."""
    skip: tuple[str, ...] = ()
    """Patterns of layers that were to be left alone."""
    savings: tuple[str, ...] = ()
    """What the chosen plan saves per million requests, in plain sentences."""
    tuning: tuple[Tuned, ...] = ()
    """Every engine, number of threads and cut that was tried, plan by plan."""
