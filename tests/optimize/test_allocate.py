"""Bits by an integer programme: against trying everything, and what is measured for it."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from pennyweight.compress.bands import DropFields
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.core.errors import PlanError
from pennyweight.data.synthetic import Clicks
from pennyweight.model.bundle import Bundle
from pennyweight.model.ranking import DNN
from pennyweight.model.retrieval import MatrixFactorization
from pennyweight.model.spec import Model, seeded, spec_of
from pennyweight.model.train import Recipe
from pennyweight.model.transform import Env, plan
from pennyweight.optimize.allocate import Choice, Group, Judge, Menu, menu
from pennyweight.optimize.cost import described


def drawn(groups: int, choices: int, seed: int) -> Menu:
    """Random choices, losses over seven orders of magnitude."""
    g = np.random.default_rng(seed)

    def choice(k: int, i: int) -> Choice:
        return Choice(
            (QuantizeTables(only=(f"{k}.{i}",)),), int(g.integers(1, 1000)), float(10 ** g.uniform(-8, -1)), g.uniform()
        )

    return Menu(tuple(Group((f"{k}",), tuple(choice(k, i) for i in range(choices))) for k in range(groups)), rest=77)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_mix_within_the_caps_loses_less(seed: int) -> None:
    found = drawn(5, 4, seed)
    for share in (0.0, 0.2, 0.6, 1.0):
        cap = int(found.least + share * (found.most - found.least))
        for limit in (math.inf, 2.0):
            every = list(itertools.product(*(g.choices for g in found.groups)))
            fit = [p for p in every if 77 + sum(c.bytes for c in p) <= cap and sum(c.ms for c in p) <= limit]
            got = found.within(cap, limit)
            if not fit:
                assert got is None
                continue
            best = min(sum(c.loss for c in p) for p in fit)
            assert got is not None and got.bytes <= cap and got.ms <= limit
            assert got.loss == pytest.approx(best, rel=1e-4, abs=1e-9)


def test_a_cap_below_the_smallest_mix_has_no_answer() -> None:
    found = drawn(3, 3, 0)
    assert found.within(found.least - 1) is None
    tight = found.within(found.least)
    assert tight is not None and tight.bytes == found.least


@pytest.fixture(scope="module")
def given() -> tuple[Bundle, Env]:
    data = Clicks(sizes=(600, 800, 30), seed=1, strength=0.7).dataset(4000)
    train, valid, _ = data.split("random")
    spec = spec_of(DNN, columns=data.schema.columns, dim=8, hidden=[64, 64])
    return Bundle(Model.of(seeded(spec, 0), spec), train.catalog), Env(train, valid, train, recipe=Recipe())


def test_each_choice_is_measured_and_the_mix_is_made(given: tuple[Bundle, Env]) -> None:
    bundle, env = given
    found = menu(bundle, env)
    assert found is not None and {p for g in found.groups for p in g.paths} <= set(described(bundle))
    assert found.most == sum(t.nbytes for t in bundle.model.state.values())
    for group in found.groups:
        sizes, losses = zip(*sorted((c.bytes, c.loss) for c in group.choices), strict=True)
        assert list(losses) == sorted(losses, reverse=True), "more bytes that lose more were kept"
        assert losses[-1] == 0 or sizes[-1] < found.most
    judge, before = Judge(bundle, env), math.inf
    for share in (0.12, 0.2, 0.4):
        mix = found.within(int(share * found.most))
        assert mix is not None
        made = plan(mix.transforms).apply(bundle, env)
        assert sum(t.nbytes for t in made.model.state.values()) == mix.bytes <= share * found.most
        assert judge.loss(made) < before
        before = judge.loss(made)


def test_data_types_differ_where_layers_do(given: tuple[Bundle, Env]) -> None:
    bundle, env = given
    state = {n: t * (50 if n == "mlp.0.weight" else 1) for n, t in bundle.model.state.items()}
    found = menu(bundle.replace(model=Model(bundle.model.spec, state)), env)
    assert found is not None
    mix = found.within(int(0.15 * found.most))
    assert mix is not None and len({type(t).__name__ + str(getattr(t, "data_type", "")) for t in mix.transforms}) > 1
    assert len(mix.transforms) == len(set(mix.transforms)), "transforms that differ in their paths alone are one"


def test_what_the_smallest_mix_drops_is_one_row(given: tuple[Bundle, Env]) -> None:
    bundle, env = given
    found = menu(bundle, env)
    assert found is not None
    mix = found.within(found.least)
    assert mix is not None and any(isinstance(t, DropFields) for t in mix.transforms)
    made = plan(mix.transforms).apply(bundle, env)
    assert sum(t.nbytes for t in made.model.state.values()) == mix.bytes == found.least


def test_layers_that_nobody_may_touch_have_no_choice(given: tuple[Bundle, Env]) -> None:
    found = menu(*given, skip=("mlp.0", "*.tables.*"))
    assert found is not None and not {p for g in found.groups for p in g.paths} & {"mlp.0", "embeddings.tables.f0"}
    assert found.rest > 0
    assert menu(*given, seconds=0.0) is None


def test_answers_are_those_that_the_loss_is_about(given: tuple[Bundle, Env]) -> None:
    bundle, env = given
    assert Judge(bundle, env).loss(bundle) == 0
    other = QuantizeDense("int2").apply(bundle, env)
    as_clicks = Judge(bundle, env).loss(other)
    as_numbers = Judge(bundle, dataclasses.replace(env, recipe=Recipe("mse", metric="mse"))).loss(other)
    assert 0 < as_clicks < as_numbers  # a divergence of probabilities is at most an eighth of the squared logits
    with pytest.raises(PlanError, match=r"rows to look at: env\.calib"):
        Judge(bundle, Env())


def test_a_model_that_retrieves_is_judged_by_its_whole_catalogue() -> None:
    data = Clicks(sizes=(300, 400), seed=1, strength=0.7).dataset(4000)
    spec = spec_of(MatrixFactorization, columns=data.schema.columns, dim=8)
    bundle, env = Bundle(Model.of(seeded(spec, 0), spec), data.catalog), Env(data, recipe=Recipe("bpr", metric="ndcg@10"))
    losses = [Judge(bundle, env).loss(QuantizeTables(t).apply(bundle, env)) for t in ("fp16", "int4", "int2")]  # type: ignore[arg-type]
    assert 0 <= losses[0] < losses[1] < losses[2]
