"""Compressing as a user meets it: a model with every awkward part there is, and each input that cannot be right."""

import dataclasses
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import pennyweight
from pennyweight.compress.aware import TrainRounded
from pennyweight.compress.prune import PruneNeurons
from pennyweight.compress.quantize import QuantizeTables
from pennyweight.compress.residual import SubtractCentres
from pennyweight.compress.share import ShareRows
from pennyweight.core.errors import ConfigError, DataError, Infeasible, NotWorthIt, PlanError
from pennyweight.data.catalog import Vocabulary
from pennyweight.data.dataset import Dataset, Split
from pennyweight.data.synthetic import Clicks
from pennyweight.model.bundle import Bundle, load
from pennyweight.model.spec import Model, Spec, call, seeded
from pennyweight.model.tables import rows_of
from pennyweight.model.train import Recipe, fit
from pennyweight.model.transform import Env, Plan, plan
from pennyweight.optimize.search import Outcome, Step
from pennyweight.report import layers, render, table, tried, view

RECIPE = Recipe(batch=256, epochs=3, lr=5e-3, patience=1)
QUICK = {"recipe": RECIPE, "seconds": 60.0, "epochs": 1, "tries": 1, "teachers": 0, "rows": 20, "allow": ["corners"]}


class Corners(nn.Module):
    """A table of one row, two whose rows no four bits fill, and a layer of a kind that no compression knows."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item, self.level = nn.Embedding(602, 13), nn.Embedding(402, 7), nn.Embedding(1, 5)
        self.mix = nn.Bilinear(13, 7, 8)
        self.net = nn.Sequential(nn.Linear(33, 96), nn.ReLU(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        u, i = self.user(user), self.item(item)
        level = self.level(torch.zeros_like(user))
        return self.net(torch.cat([u, i, level, self.mix(u, i)], 1)).squeeze(1)


class Strange(nn.Module):
    """Nothing here can be made smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Bilinear(3, 3, 1)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.gate(numbers, numbers).squeeze(1)


class Dense(nn.Module):
    """No tables."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.net(numbers).squeeze(1)


@pytest.fixture(scope="module", autouse=True)
def corners() -> Iterator[None]:
    module = types.ModuleType("corners")
    module.Corners, module.Strange, module.Dense = Corners, Strange, Dense  # type: ignore[attr-defined]
    sys.modules["corners"] = module
    yield
    sys.modules.pop("corners")


@pytest.fixture(scope="module")
def parts() -> Split:
    return Clicks(sizes=(600, 400), numbers=3, seed=1, strength=0.7).dataset(16_000).split("random")


def trained(name: str, inputs: tuple[str, ...], parts: Split) -> Bundle:
    spec = Spec(f"corners:{name}", {}, {}, inputs)
    module = seeded(spec, 0, ["corners"])
    fit(module, parts.train, parts.valid, RECIPE, inputs=inputs)
    return Bundle(Model.of(module, spec), parts.train.catalog)


@pytest.fixture(scope="module")
def given(parts: Split) -> Bundle:
    return trained("Corners", ("user", "item"), parts)


def compress(bundle: Bundle, parts: Split, budget: str, **more: object) -> Outcome:
    settings = {**QUICK, "watch": lambda step: None, "objective": "bytes", **more}
    return pennyweight.optimize(bundle, parts, budget, **settings)  # type: ignore[no-any-return, operator]


def printed(*shown: object) -> str:
    console = Console(width=160, color_system=None)
    with console.capture() as captured:
        for each in shown:
            console.print(each)
    return captured.get()


@pytest.fixture(scope="module")
def outcome(given: Bundle, parts: Split, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path, list[Step]]:
    """The first of the dense layers may not be touched."""
    out, told = tmp_path_factory.mktemp("compress") / "out", list[Step]()
    found = compress(given, parts, "bytes <= 28.5kB, auc drop <= 0.02", skip=["net.0"], out=out, watch=told.append)
    return found, out, told


def test_a_model_with_awkward_parts_is_compressed(outcome: tuple[Outcome, Path, list[Step]], given: Bundle) -> None:
    (found, out, told), state = outcome, given.model.state
    chosen = found.result.chosen
    assert chosen is not None and chosen.measured is not None and found.result.verdict == "proven"
    small = load(out / "best")
    assert small.bytes == chosen.measured.bytes <= 28_500 < given.bytes / 2
    assert any(step.trial for step in told) and all(0 <= step.share <= 1 for step in told)
    # What may not be touched has every number it had, through pruning, training and rounding; so has what nobody knows.
    assert any(t.stage == "training" for trial in found.result.trials for t in trial.plan.transforms)
    assert torch.equal(small.model.state["net.0.weight"], state["net.0.weight"]) and "net.0" not in small.model.spec.layers
    assert small.model.state["mix.weight"].dtype == torch.float32


def test_no_trial_touched_what_may_not_be(outcome: tuple[Outcome, Path, list[Step]], given: Bundle, parts: Split) -> None:
    env = Env(parts.train, parts.valid, parts.train, None, None, (given.model,), RECIPE, allow=("corners",))
    untrained = {Plan(tuple(t for t in trial.plan.transforms if t.stage != "training")) for trial in outcome[0].result.trials}
    for made in untrained:
        state = made.apply(given, env).model.state
        assert all(torch.equal(state[f"net.0.{n}"], given.model.state[f"net.0.{n}"]) for n in ("weight", "bias"))


def test_the_tables_say_what_was_done_and_what_was_left(outcome: tuple[Outcome, Path, list[Step]]) -> None:
    result = outcome[0].result
    rows = {row.name: row for row in view(result).layers}
    assert rows["net.0"].done == "left alone, as asked" and rows["net.0"].bytes[0] == rows["net.0"].bytes[1]
    assert rows["mix"].done == "left alone: no compression knows this kind of layer" and rows["mix"].before == "other Bilinear"
    assert any(word in rows["user"].done for word in ("fp32 → ", "in 2: short: ")) and rows["user"].smaller.endswith("×")
    assert rows["all"].bytes[0].endswith("kB") and set(rows) >= {"level", "item", "net.2", "net.4"}
    said = printed(tried(result), layers(result), table(result))
    assert said.count("quantize-tables") >= 4 and "chosen: the cheapest that was proven" in said
    assert "mix (Bilinear, 2.94 kB): no compression knows this kind of layer" in said and "net.0: as asked" in said
    page = render(result)
    assert 'id="layers"' in page and "left alone, as asked" in page and "no compression knows this kind of layer" in page


def test_what_each_choice_was_measured_to_lose_is_shown(outcome: tuple[Outcome, Path, list[Step]]) -> None:
    result = outcome[0].result
    part = next(
        p.name for p in result.parts_after if p.name.partition(".")[0] == "user"
    )  # the table, or what it is made of now
    chosen = dataclasses.replace(result.chosen, losses={part: 0.00041})  # type: ignore[type-var]
    known = dataclasses.replace(result, chosen=chosen)
    assert {row.name: row.loss for row in view(known).layers}["user"] == "0.0004"
    assert "moves by" in printed(layers(known)) and "0.0004" in render(known)
    unknown = dataclasses.replace(result, chosen=dataclasses.replace(chosen, losses={}))
    assert not any(row.loss for row in view(unknown).layers) and "moves by" not in render(unknown)


@pytest.mark.parametrize("data_type", ["fp16", "int8", "int4", "int2"])
def test_one_row_and_rows_of_odd_width_are_packed(data_type: str, given: Bundle, parts: Split) -> None:
    env = Env(parts.train, allow=("corners",))
    small = QuantizeTables(data_type).apply(given, env)  # type: ignore[arg-type]
    for path, off in (("user", 0.5), ("item", 0.5), ("level", 0.5)):
        before, after = (rows_of(b.model.build(env.allow).get_submodule(path)) for b in (given, small))
        assert before.shape == after.shape and (before - after).abs().max() <= off * (before.max() - before.min())
    batch = next(parts.test.batches(100))
    assert call(small.model.build(env.allow), batch, small.model.spec.inputs).isfinite().all()


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (QuantizeTables("int4"), "no table would get smaller as int4; tables: none"),
        (ShareRows(), "no table would get smaller by 256 codes in 4 parts; tables: none"),
        (SubtractCentres(), "no full fp32 table has 512 rows for 256 centres; tables: none"),
        (TrainRounded("int4"), "tables: none"),
    ],
)
def test_a_model_without_tables_is_told_so_and_searched_all_the_same(
    transform: pennyweight.Transform, said: str, parts: Split
) -> None:
    bundle = trained("Dense", ("numbers",), parts)
    with pytest.raises(PlanError, match=said):
        transform.apply(bundle, Env(parts.train, parts.valid, allow=("corners",)))
    if isinstance(transform, QuantizeTables):
        found = compress(bundle, parts, "bytes <= 1150B, auc drop <= 0.3", tries=0)
        assert found.bundle.bytes <= 1150


def test_a_model_of_which_nothing_can_be_made_smaller(parts: Split) -> None:
    with pytest.raises(Infeasible, match=r"nothing in the model could be made smaller.*left alone: gate \(Bilinear, 40 B\)"):
        compress(trained("Strange", ("numbers",), parts), parts, "bytes <= 50B", tries=0)


def test_everything_forbidden(given: Bundle, parts: Split) -> None:
    with pytest.raises(Infeasible, match=r"nothing in the model could be made smaller.*\* \(as asked\)"):
        compress(given, parts, "bytes <= 20kB", tries=0, skip=["*"])


def test_a_layer_to_leave_alone_that_is_not_there(given: Bundle, parts: Split) -> None:
    with pytest.raises(
        ConfigError, match=r"no layer matches 'nett.*', which was to be left alone; there are: user, item, level, mix"
    ):
        compress(given, parts, "bytes <= 20kB", skip=["nett.*"])


def test_weights_that_are_no_numbers(given: Bundle, parts: Split) -> None:
    state = {n: t.clone() for n, t in given.model.state.items()}
    state["item.weight"][3, 2:4] = torch.nan
    with pytest.raises(DataError, match=r"layer item holds 2 NaN weights of 2,814; train the model again"):
        compress(given.replace(model=Model(given.model.spec, state)), parts, "bytes <= 20kB")


def test_rows_of_another_schema(given: Bundle, parts: Split) -> None:
    other = Clicks(sizes=(600, 500), numbers=3, seed=1).dataset(2_000)
    with pytest.raises(DataError, match=r"the rows are of another schema than the model: it reads .*'item'.*they hold"):
        compress(given, Split(*[other] * 3), "bytes <= 20kB")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="of another schema than the model: it reads"):
        plan(PruneNeurons()).apply(given, Env(calib=other, allow=("corners",)))


def test_rows_whose_ids_stand_for_other_values(given: Bundle, parts: Split) -> None:
    """As many of them, and each would look up another's row."""
    words = {"user": Vocabulary.of([f"u{n}" for n in range(600)]), "item": Vocabulary.of([f"i{n}" for n in range(400)])}
    turned = {**words, "item": Vocabulary.of([f"i{n}" for n in reversed(range(400))])}
    schema = parts.train.schema
    rows = {c.name: np.asarray(parts.train.head(500).column(c.name)) for c in schema.columns}
    known, other = (Dataset.from_arrays(rows, schema, w) for w in (words, turned))
    bundle = given.replace(catalog=known.catalog)
    with pytest.raises(DataError, match="both have ids for 'item', and they stand for other values"):
        compress(bundle, Split(other, other, other), "bytes <= 20kB")


def test_a_budget_nobody_can_meet_shows_the_frontier(given: Bundle, parts: Split, tmp_path: Path) -> None:
    with pytest.raises(Infeasible, match="nothing tried meets bytes <= 300 B") as caught:
        compress(given, parts, "bytes <= 300B, auc drop <= 0.02", tries=0, out=tmp_path)
    assert caught.value.frontier and (tmp_path / "report.html").exists() and not (tmp_path / "best").exists()


def test_a_model_within_the_budget(given: Bundle, parts: Split) -> None:
    with pytest.raises(NotWorthIt, match="is within bytes <= 10 MB"):
        compress(given, parts, "bytes <= 10MB")
