"""Fewer bits a weight, without training.

Row-wise int4 tables and per-channel int8 dense layers cost recommenders next to nothing (at most .0001 AUC on three models
measured for this project, 4 to 5 times smaller) and take a second, so they are the first thing to try. Quantization-aware
training was the alternative: on Criteo it ended below plain rounding (.8073 against .8085 AUC, pintonos/xsDeepFwFM), and it
takes as long as training. What it costs: int2 rows and retrieval by dot products do lose, which only a measurement tells.
Dense layers lose below 8 bits, and much less where ``feedback`` fits them to calibration rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

from torch import Tensor, nn

from pennyweight.compress.couple import strided
from pennyweight.compress.feedback import MOST, WIDE, Moments, fed
from pennyweight.compress.observe import batches, calibration, observe
from pennyweight.compress.rewrite import Change, finite, rewrite, targets, which
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.model.bundle import Bundle
from pennyweight.model.conv import Conv
from pennyweight.model.dense import Dense
from pennyweight.model.packed import BITS
from pennyweight.model.spec import Model, replace
from pennyweight.model.tables import CodebookTable, Table, rows_of
from pennyweight.model.transform import Env, Transform


@named("quantize-tables")
@dataclasses.dataclass(frozen=True)
class QuantizeTables(Transform):
    """Embedding tables to a smaller data type.

    A shared (codebook) table keeps its codes and has its codebooks written so; int2 makes those int4. A table whose rows
    are too short to carry a scale of their own (up to 3 numbers at int4, 8 at int8) becomes fp16, and one that would not get
    smaller at all stays as it is.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["data type"]] = "data type"

    data_type: Literal["fp16", "int8", "int4", "int2"] = "int4"
    min_rows: int = 0
    """Tables with fewer rows stay as they are."""
    only: tuple[str, ...] = ()
    """Patterns of paths to quantize; all tables if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths to leave alone."""

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its tables quantized."""
        found = targets(bundle.model.build(env.allow), Table.of, self.only, self.skip)
        new = {p: (m, to) for p, (m, t) in found.items() if t.rows >= self.min_rows and (to := self._smallest(t)) is not None}
        if not new:
            have = ", ".join(f"{p} ({t.data_type}, {t.rows} x {t.dim})" for p, (_, t) in found.items()) or "none"
            raise PlanError(f"no table would get smaller as {self.data_type}; tables: {have}")
        return bundle.replace(model=rewrite(bundle.model, {p: _table(p, m, to) for p, (m, to) in new.items()}))

    def describe(self) -> str:
        """What it does."""
        return f"embedding tables{which(self.only)} stored as {self.data_type}"

    def _smallest(self, table: Table) -> Table | None:
        """The smaller of the data type asked for and fp16, if that is smaller than the table is."""
        asked = "int4" if table.layout == "codebook" and self.data_type == "int2" else self.data_type
        forms = [dataclasses.replace(table, data_type=t) for t in ("fp16", asked)]
        least = min(forms, key=Table.bytes)
        return least if least.bytes() < table.bytes() else None


@named("quantize-dense")
@dataclasses.dataclass(frozen=True)
class QuantizeDense(Transform):
    """Dense layers and convolutions to a smaller data type; whole numbers have a scale an output (channel) and run in int8."""

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["data type"]] = "data type"

    data_type: Literal["fp16", "bf16", "int8", "int4", "int3", "int2"] = "int8"
    only: tuple[str, ...] = ()
    """Patterns of paths to quantize; all dense layers and convolutions if empty."""
    skip: tuple[str, ...] = ()
    """Patterns of paths to leave alone."""
    feedback: bool = False
    """Whether weights are solved anew on ``env.calib`` (or else ``env.train``) to make up for rounding; whole numbers only."""

    def __post_init__(self) -> None:
        if self.feedback and self.data_type not in BITS:
            raise ConfigError(f"feedback is for whole numbers, and {self.data_type} is none; ask for {', '.join(BITS)}")

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its dense layers and convolutions quantized."""
        module = bundle.model.build(env.allow)
        found: dict[str, tuple[nn.Module, Dense | Conv]] = targets(module, multiplied, self.only, self.skip)
        new = {p: (m, dataclasses.replace(d, data_type=self.data_type)) for p, (m, d) in found.items()}
        new = {p: (m, to) for p, (m, to) in new.items() if to.bytes() < found[p][1].bytes()}
        if not new:
            have = ", ".join(f"{p} ({d.data_type}, {d.inputs} x {d.outputs})" for p, (_, d) in found.items()) or "none"
            raise PlanError(f"no dense layer would get smaller as {self.data_type}; dense layers and convolutions: {have}")
        if any(isinstance(to, Conv) for _, to in new.values()) and not strided(module):
            new = {p: (m, _last(to)) for p, (m, to) in new.items()}
        if self.feedback:
            rows = calibration(bundle, env, self)
            return bundle.replace(model=rewrite(bundle.model, _fed(bundle.model, new, rows, env)))
        return bundle.replace(model=rewrite(bundle.model, {p: _dense(p, m, to) for p, (m, to) in new.items()}))

    def sketch(self) -> QuantizeDense:
        """Rounded plainly: the same bytes."""
        return dataclasses.replace(self, feedback=False)

    def describe(self) -> str:
        """What it does."""
        how = ", with error feedback" if self.feedback else ""
        return f"dense layers and convolutions{which(self.only)} stored as {self.data_type}{how}"


def multiplied(module: nn.Module) -> Dense | Conv | None:
    """What dense layer or convolution a module is; None for anything else."""
    return Dense.of(module) or Conv.of(module)


def _last(layer: Dense | Conv) -> Dense | Conv:
    """A convolution that may give its channels last, since nothing behind it asks how they lie in memory."""
    return dataclasses.replace(layer, memory="channels_last") if isinstance(layer, Conv) else layer


def _fed(model: Model, new: Mapping[str, tuple[nn.Module, Dense | Conv]], rows: Dataset, env: Env) -> dict[str, Change]:
    """What layers become, in the order they run: each is fitted to what those before it give by then, and it gave at first."""
    given, module, inputs = model.build(env.allow), model.build(env.allow), model.spec.inputs
    scored = list(batches(given, rows))
    order = [path for batch in scored[:1] for path in observe(given, new, batch, inputs, 1)]
    changes = {}
    for path in dict.fromkeys((*order, *new)):
        layer, to = new[path]
        moments = Moments(layer)
        for batch in scored if path in order and _weights(layer)[0][0].numel() <= WIDE else ():
            now, first = (observe(m, [path], batch, inputs, MOST)[path] for m in (module, given))
            for (x, _), (_, y) in zip(now, first, strict=True):
                moments.add(x, y)
        changes[path] = _dense(path, layer, to, moments)
        made = to.build()
        made.load_state_dict(changes[path][1], assign=True)
        replace(module, path, made.requires_grad_(False).eval())
    return changes


def _table(path: str, module: nn.Module, new: Table) -> Change:
    if isinstance(module, CodebookTable):
        return new, {"codes": module.codes, **new.encode_books(finite(path, module.books().detach(), new.data_type))}
    return new, new.encode(finite(path, rows_of(module), new.data_type))


def _weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    return weight.detach(), None if bias is None else bias.detach()


def _dense(path: str, module: nn.Module, new: Dense | Conv, moments: Moments | None = None) -> Change:
    weight, bias = _weights(module)
    if bias is not None:
        finite(path, bias)
    # Whole numbers here have fp32 scales, so only fp16 itself has fp16's range.
    finite(path, weight, new.data_type if new.data_type == "fp16" else "fp32")
    if moments is None or not moments.rows:
        return new, new.encode(weight, bias)
    rows, bias, scale = fed(weight.flatten(1), bias, moments, BITS[new.data_type])
    return new, new.encode(rows.reshape(weight.shape), bias, scale)
