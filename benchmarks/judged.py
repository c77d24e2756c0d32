"""What all benchmarks of compression share: a training that is kept, what one seed of a row came to, and the row of several.

A row shows the worst of its seeds: the least ratio, the highest upper bound of the drop, the most seconds; the drop itself is
their mean.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Options, Row
from pennyweight.core.config import decode, dumps, encode, loads, write
from pennyweight.core.errors import ConfigError
from pennyweight.data.dataset import Split
from pennyweight.model.bundle import Bundle, save
from pennyweight.model.spec import Model, Spec, seeded
from pennyweight.model.train import Fit, Recipe, fit
from pennyweight.optimize.trial import Quality

PROUD = 3.0
"""Paired deviations of a gain above which something is wrong, or the given model was not trained out."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was asked for on the command line."""

    options: Options
    cache: Path
    """Folder of checkpoints and what is made of them."""
    venvs: Path | None
    """Folder of the peers' environments."""

    def folder(self, name: str) -> Path:
        """The part of the cache for a subject, whose place the sample takes in a quick run."""
        return self.cache / ("quick" if self.options.quick else name)


def trained(spec: Spec, parts: Split, recipe: Recipe, seed: int, out: Path) -> Fit:
    """Train on one thread; seconds are the processor's, which others on the machine do not lengthen."""
    module, began = seeded(spec, seed), time.process_time()
    done = fit(module, parts.train, parts.valid, recipe, seed=seed)
    save(Bundle(Model.of(module, spec)), out)
    return dataclasses.replace(done, seconds=time.process_time() - began)


def kept(spec: Spec, parts: Split, recipe: Recipe, seed: int, folder: Path) -> Fit:
    """The training whose model is in ``folder / "bundle"``; it is done where it was not yet, by this recipe, in the cache."""
    asked, file = (encode(recipe), encode(spec)), folder / "trained.json"
    if file.exists() and _asked(known := json.loads(file.read_text())) == (recipe, spec):
        return _paced(loads(Fit, json.dumps(known["fit"]), str(file)))
    done = trained(spec, parts, recipe, seed, folder / "bundle")
    write(file, dumps({"asked": asked, "fit": done}))
    return _paced(done)


def _paced(fit: Fit) -> Fit:
    """The record with its epochs' seconds in the processor's time too: a clock also counts what others used."""
    clock = sum(e.seconds for e in fit.history)
    each = tuple(dataclasses.replace(e, seconds=e.seconds * fit.seconds / clock) for e in fit.history)
    return dataclasses.replace(fit, history=each)


def _asked(known: Mapping[str, Any]) -> tuple[Recipe, Spec] | None:
    """What was trained; a field that came since has its default, which is what was done before it was there."""
    try:
        return decode(Recipe, known["asked"][0], "recipe"), decode(Spec, known["asked"][1], "spec")
    except ConfigError:
        return None


def size(folder: Path) -> int:
    """Bytes a loader reads to score with a bundle."""
    return sum((folder / name).stat().st_size for name in ("manifest.json", "weights.safetensors"))


@dataclasses.dataclass(frozen=True)
class Found:
    """What one seed of a row came to."""

    ratio: float
    drop: float
    upper: float
    """95 % bound of the drop."""
    seconds: float
    what: str
    deviations: float = 0.0
    """The drop in standard errors of the paired difference."""
    control: Quality | None = None
    """Against the control."""
    gain: float = 0.0
    """Of the control over the given model."""
    above: float = 0.0
    """The largest ratio tried whose test AUC was no lower than the given model's."""
    proven: bool = True
    total: float = 0.0
    """Seconds of all budgets tried."""


@dataclasses.dataclass(frozen=True)
class Bars:
    """What a row must reach; None is not judged."""

    ratio: float | None = None
    margin: float | None = None
    seconds: float | None = None
    control: bool = True
    """Whether the margin is one against the control too, where there is one."""


def rows_of(id: str, each: Sequence[Found], bars: Bars = Bars(), note: str = "", peer: str | None = None) -> list[Row]:
    """The metrics of one row: worst over seeds for ratio, bound and seconds, mean for the drop."""
    said = [note] if note else []
    said += [f"against the control: drop {listed(f.control.drop for f in each if f.control)}"] if each[0].control else []
    said += [f"the control gains {listed(f.gain for f in each)}"] if each[0].control else []
    if proud := [f for f in each if f.deviations < -PROUD]:
        said.append(f"FLAG: a gain of {listed((-f.deviations for f in proud), '.1f')} paired deviations, to be accounted for")
    said += [f"seeds: {' | '.join(dict.fromkeys(f.what for f in each))}"]
    made = functools.partial(_row, id, "; ".join(said), peer, len(each))
    rows = [
        made("compression_ratio", [f.ratio for f in each], min, bars.ratio, False),
        made("drop", [f.drop for f in each], statistics.fmean, bars.margin, True),
        made("drop_upper_95", [f.upper for f in each], max, bars.margin, True),
        made("seconds", [f.seconds for f in each], max, bars.seconds, True),
    ]
    if all(f.control for f in each):
        against, margin = [f.control for f in each if f.control], bars.margin if bars.control else None
        rows += [
            made("drop_against_control", [c.drop for c in against], statistics.fmean, margin, True),
            made("drop_against_control_upper_95", [c.drop_upper_95 for c in against], max, margin, True),
        ]
    return rows


def _row(
    id: str, note: str, peer: str | None, seeds: int, metric: str, values: list[float],
    of: Callable[[list[float]], float], bar: float | None, at_most: bool,
) -> Row:  # fmt: skip
    value, shown = of(values), note if metric == "compression_ratio" else ""
    ours = value if peer else None
    return Row(id, metric, value, min(values), max(values), seeds, bar, note=shown, at_most=at_most, peer=peer, peer_value=ours)


def listed(values: Iterable[Any], form: str = ".4f") -> str:
    return ", ".join(format(v, form) for v in values)
