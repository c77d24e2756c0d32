"""Recover what compression lost, by training on the labels and on the answers of the model as it was.

The loss is (1 - alpha) * loss(labels) + alpha * loss(teacher at a temperature) (Hinton et al. 2015). Everything else is the
user's own recipe: on Frappe the same pruned net ended .0024 AUC below its teacher after a short recovery without the
embedding regularizer, and .0012 above it with the whole recipe. Matching inner activations was the alternative; widths
differ after pruning, and it adds weights to be tuned. What it costs is epochs, up to a training's.

Training the uncompressed model so gains too (.0010 there), which is not compression's doing: compare with that control.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, cast

from torch import nn

from pennyweight.compress.rewrite import chosen, there
from pennyweight.core.config import named
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.data.dataset import Dataset
from pennyweight.model.bundle import Bundle
from pennyweight.model.ensemble import Ensemble, Retrievers
from pennyweight.model.losses import ROWS
from pennyweight.model.spec import Model, Spec
from pennyweight.model.train import Recipe, fit
from pennyweight.model.transform import Env, Transform


@named("distill")
@dataclasses.dataclass(frozen=True)
class Distill(Transform):
    """Training with ``env.recipe`` on ``env.train``, with ``env.teachers`` beside the labels, best epoch on ``env.valid`` kept.

    Only floating-point parameters move: codes and quantized weights are frozen.
    """

    family: ClassVar[Literal["compress"]] = "compress"
    stage: ClassVar[Literal["training"]] = "training"

    epochs: int = 4
    """At most; the recipe's patience may stop earlier."""
    alpha: float = 0.5
    """Weight of the teacher against the labels, 0 to 1."""
    temperature: float = 1.0
    """Softens both models' probabilities; 1 is right for click rates, which are soft already."""
    lr: float | None = None
    """Learning rate; None is the recipe's."""
    dealt: float = 0.0
    """Weight of the teacher's answers about pairs nobody labelled: each batch's items are dealt anew to its users. Needs item
    columns; without them it is 0."""
    mixup: float = 0.0
    """Rows blended two and two, labels too, by shares of Beta(mixup, mixup), and the teacher asked about the blends; for models
    that read numbers only. 0 is the recipe's own."""
    regularize: float = 1.0
    """Factor on the recipe's decays and the model's dropout: answers without end leave less to overfit."""
    schedule: Literal["plateau", "cosine"] = "plateau"
    """``cosine`` for a recovery of few epochs; ``plateau`` is the recipe's own decay."""
    skip: tuple[str, ...] = ()
    """Patterns of paths of layers that stay as they are."""

    def __post_init__(self) -> None:
        if min(self.dealt, self.mixup, self.regularize) < 0:
            told = f"dealt = {self.dealt}, mixup = {self.mixup}, regularize = {self.regularize}"
            raise ConfigError(f"{told}: none may be negative")
        if self.epochs < 0 or not 0 <= self.alpha <= 1 or self.temperature <= 0 or (self.lr is not None and self.lr <= 0):
            raise ConfigError(
                f"epochs = {self.epochs}, alpha = {self.alpha}, temperature = {self.temperature}, lr = {self.lr}: "
                "epochs must not be negative, alpha between 0 and 1, temperature and lr above 0"
            )

    def change(self, bundle: Bundle, env: Env) -> Bundle:
        """The bundle with its model trained."""
        if not self.epochs:
            raise PlanError("0 epochs of distillation change nothing; give at least 1")
        module = bundle.model.build(env.allow, copy=True)
        self.train(module, bundle.model.spec, env)
        return bundle.replace(model=Model.of(module, bundle.model.spec))

    def train(self, module: nn.Module, spec: Spec, env: Env) -> None:
        """Train a module of this spec in place.

        Raises:
            PlanError: something of ``env`` is missing, the model cannot be trained, or no epoch was better than none.
        """
        teachers = cast(tuple[Model, ...], env.need("teachers", self))
        train, valid = cast(Dataset, env.need("train", self)), cast(Dataset, env.need("valid", self))
        recipe = self.recipe(cast(Recipe, env.need("recipe", self)))
        built = [m.build(env.allow) for m in teachers]
        teacher = Ensemble(built, recipe.loss, spec.inputs) if recipe.loss in ROWS else Retrievers(built)
        there(module, self.skip)
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Dropout):
                layer.p *= self.regularize
            if not chosen(path, (), self.skip):
                _freeze(layer)
        try:
            done = fit(
                module,
                train,
                valid,
                recipe,
                inputs=spec.inputs,
                seed=env.seed,
                teacher=teacher.eval(),
                progress=env.watch,
                deadline_s=env.deadline_s,
            )
        except ConfigError as error:
            raise PlanError(f"Distill cannot train this model: {error}") from error
        if done.stopped == "interrupted":
            raise KeyboardInterrupt  # fit took the signal to end a step; whoever runs the plan must hear it too
        if done.best_epoch == 0:
            found = f"{recipe.metric} {done.metric:.4f} in {len(done.history)} epochs"
            raise PlanError(f"distillation found nothing better than {found}; give more epochs or a smaller lr")

    def recipe(self, given: Recipe) -> Recipe:
        """The user's recipe with this transform's epochs, weight and rate."""
        lr = given.lr if self.lr is None else self.lr
        return dataclasses.replace(
            given,
            epochs=self.epochs,
            distill_alpha=self.alpha,
            temperature=self.temperature,
            lr=lr,
            # Accuracy on 500 rows moves by .002 a row and picks an epoch by chance: on digits that cost .002 on 1,000 others.
            select="refined_log_loss" if given.selector == "accuracy" else given.select,
            dealt=self.dealt,
            mixup=self.mixup or given.mixup,
            schedule=self.schedule,
            patience=self.epochs if self.schedule == "cosine" else given.patience,  # its last epochs are its best
            embedding_l2=given.embedding_l2 * self.regularize,
            weight_decay=given.weight_decay * self.regularize,
        )

    def describe(self) -> str:
        """What it does."""
        extra = ", asked about unrated pairs too" if self.dealt else ", about blended rows" if self.mixup else ""
        return f"up to {self.epochs} epochs of distillation from the teachers{extra}"


def _freeze(layer: nn.Module) -> None:
    """Keep a layer as it is while the module around it trains; a norm's statistics too."""
    layer.requires_grad_(False).eval()
    layer.train = lambda mode=True: layer  # type: ignore[method-assign]
