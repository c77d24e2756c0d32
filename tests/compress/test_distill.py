"""Distillation: it recovers, carries the user's recipe, freezes what is quantized, and says when it cannot."""

import dataclasses

import pytest
import torch

from pennyweight.compress import distill
from pennyweight.compress.distill import Distill
from pennyweight.compress.prune import PruneNeurons
from pennyweight.compress.quantize import QuantizeTables
from pennyweight.compress.share import ShareRows
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.model import metrics
from pennyweight.model.bundle import Bundle
from pennyweight.model.train import Recipe, scores
from pennyweight.model.transform import Env


def auc(bundle: Bundle, env: Env) -> float:
    module = bundle.model.build(env.allow)
    return metrics.auc(env.valid.column("label"), scores(module, env.valid, inputs=bundle.model.spec.inputs))


def distance(a: Bundle, b: Bundle, env: Env) -> float:
    x, y = (scores(m.model.build(env.allow), env.valid, inputs=m.model.spec.inputs) for m in (a, b))
    return float(abs(x - y).mean())


def test_it_brings_back_what_pruning_and_sharing_lost(given: Bundle, env: Env) -> None:
    small = ShareRows(parts=2, codes=16).apply(PruneNeurons(keep=0.25, score="weight").apply(given, env), env)
    back = Distill(epochs=3).apply(small, env)
    assert auc(back, env) > auc(small, env) + 0.005
    assert distance(back, given, env) < distance(small, given, env)
    assert back.model.spec == small.model.spec
    assert torch.equal(back.model.state["item.codes"], small.model.state["item.codes"])
    assert not torch.equal(back.model.state["item.codebooks"], small.model.state["item.codebooks"])
    assert not back.model.state["item.codebooks"][:, 0].any()


def test_quantized_tables_are_frozen_and_the_rest_trains(given: Bundle, env: Env) -> None:
    small = PruneNeurons(keep=0.25, score="weight").apply(QuantizeTables("int4").apply(given, env), env)
    back = Distill(epochs=2).apply(small, env)
    assert torch.equal(back.model.state["item.packed"], small.model.state["item.packed"])
    assert auc(back, env) > auc(small, env)


def test_the_teacher_is_heard(given: Bundle, env: Env) -> None:
    """With labels that say nothing, all that is learnt comes from the teacher."""
    small = PruneNeurons(keep=0.25, score="weight").apply(given, env)
    near = Distill(epochs=2, alpha=1.0).apply(small, env)
    assert distance(near, given, env) < 0.7 * distance(small, given, env)


def test_the_users_recipe_is_carried_whole(given: Bundle, env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Recipe(optimizer="adagrad", lr=0.03, weight_decay=1e-4, embedding_l2=1e-3, batch=333, patience=5, lr_decay=0.5)
    seen = {}

    def fit(module, train, valid, recipe, **rest):
        seen.update(recipe=recipe, **rest)
        raise ConfigError("far enough")

    monkeypatch.setattr(distill, "fit", fit)
    with pytest.raises(PlanError, match="far enough"):
        Distill(epochs=7, alpha=0.25, temperature=2.0).apply(given, dataclasses.replace(env, recipe=mine))
    assert seen["recipe"] == dataclasses.replace(mine, epochs=7, distill_alpha=0.25, temperature=2.0)
    assert seen["inputs"] == given.model.spec.inputs and seen["seed"] == env.seed
    assert not seen["teacher"].training and not any(p.requires_grad for p in seen["teacher"].parameters())
    assert Distill(lr=0.5).recipe(mine).lr == 0.5


def test_the_same_seed_gives_the_same_weights(given: Bundle, env: Env) -> None:
    small = PruneNeurons(keep=0.25, score="weight").apply(given, env)
    one, two = (Distill(epochs=1).apply(small, env).model.state for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("missing", ["teachers", "train", "valid", "recipe"])
def test_what_is_missing_is_named(missing: str, given: Bundle, env: Env) -> None:
    with pytest.raises(PlanError, match=rf"needs env\.{missing}"):
        Distill().apply(given, dataclasses.replace(env, **{missing: None}))


def test_training_that_finds_nothing_better_is_no_change(given: Bundle, env: Env) -> None:
    with pytest.raises(PlanError, match="found nothing better than auc"):
        Distill(epochs=1, lr=10.0).apply(given, env)
    with pytest.raises(PlanError, match="0 epochs"):
        Distill(epochs=0).apply(given, env)


def test_blends_are_for_models_of_numbers(given: Bundle, env: Env) -> None:
    with pytest.raises(PlanError, match=r"cannot train this model: mixup blends numbers, and .* holds ids"):
        Distill(mixup=0.4).apply(given, env)
    assert Distill(mixup=0.4).recipe(Recipe()).mixup == 0.4
    assert Distill().recipe(Recipe(mixup=0.2)).mixup == 0.2, "the user's own recipe is carried"
    with pytest.raises(ConfigError, match="none may be negative"):
        Distill(mixup=-1.0)


@pytest.mark.parametrize("fields", [{"epochs": -1}, {"alpha": 1.5}, {"temperature": 0.0}, {"lr": 0.0}])
def test_impossible_settings_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="alpha between 0 and 1"):
        Distill(**fields)
