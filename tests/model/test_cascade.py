"""The cascade: one state dict, retrieval's vectors, ranking's logits, each stage trained by itself."""

import json

import numpy as np
import pytest
import torch

from pennyweight.core.config import decode, encode
from pennyweight.core.errors import ConfigError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema
from pennyweight.model.cascade import Cascade
from pennyweight.model.ranking import DeepFM
from pennyweight.model.retrieval import TwoTower
from pennyweight.model.spec import Model, Spec, build, spec_of
from pennyweight.model.train import Recipe, fit, scores

COLUMNS = (
    Column("user", "user", "categorical", 20),
    Column("item", "item", "categorical", 20),
    Column("label", "label", "numeric"),
)


def stage(factory: type, **args: object) -> dict[str, object]:
    spec = spec_of(factory, columns=COLUMNS, **args)
    return {"factory": spec.factory, "args": spec.args}


def cascade() -> Spec:
    made = spec_of(Cascade, retrieval=stage(TwoTower, dim=8), ranking=stage(DeepFM, dim=4, hidden=[8]))
    return decode(Spec, json.loads(json.dumps(encode(made))))


def rows() -> Dataset:
    rng = np.random.default_rng(0)
    u, i = rng.integers(2, 20, (2, 1000))
    return Dataset.from_arrays({"user": u, "item": i, "label": ((u + i) % 3 == 0).astype(np.float32)}, Schema(COLUMNS))


def test_stages_train_apart_and_live_in_one_state() -> None:
    torch.manual_seed(0)
    module, data = build(cascade()), rows()
    assert isinstance(module, Cascade)
    fit(
        module.retrieval,
        data,
        data,
        Recipe(loss="sampled-softmax", negatives=0, metric="recall@5", lr=0.01, batch=128, epochs=3),
    )
    fit(module.ranking, data, data, Recipe(lr=0.01, batch=128, epochs=3))
    again = Model.of(module, cascade()).build()
    assert np.array_equal(scores(again, data), scores(module.ranking, data))
    batch = next(data.batches(7))
    assert torch.equal(again.user_vectors(batch), module.retrieval.user_vectors(batch))
    assert torch.equal(again.item_vectors(batch), module.retrieval.item_vectors(batch))


def test_training_the_whole_by_its_logits_leaves_retrieval_alone() -> None:
    module, data = build(cascade()), rows()
    before = {k: v.clone() for k, v in module.retrieval.state_dict().items()}
    fit(module, data, data, Recipe(epochs=2, batch=128, embedding_l2=0.1))
    assert all(torch.equal(before[k], v) for k, v in module.retrieval.state_dict().items())


def test_stages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot retrieve"):
        Cascade(stage(DeepFM), stage(DeepFM))
    with pytest.raises(ConfigError, match="'factory' and 'args', got factory"):
        Cascade({"factory": "x"}, stage(DeepFM))
