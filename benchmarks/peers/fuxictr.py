"""FuxiCTR: its wheel has layers and the training loop, not the model zoo, so the two models are put together here as there."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import CrossNetV2, FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

from benchmarks.peers.training import Batches, Task, main


class DeepFM(BaseModel):  # type: ignore[misc]
    def __init__(self, features: FeatureMap, task: Task, **base: Any) -> None:
        super().__init__(features, **base)
        width = len(task.fields) * task.dim
        self.embedding_layer = FeatureEmbedding(features, task.dim)
        self.fm = FactorizationMachine(features)
        self.mlp = MLP_Block(width, task.hidden, "ReLU", 1, None, task.dropout, batch_norm=True)

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        x = self.get_inputs(inputs)
        rows = self.embedding_layer(x)
        return {"y_pred": self.output_activation(self.fm(x, rows) + self.mlp(rows.flatten(start_dim=1)))}


class DCNv2(BaseModel):  # type: ignore[misc]
    def __init__(self, features: FeatureMap, task: Task, **base: Any) -> None:
        super().__init__(features, **base)
        width = len(task.fields) * task.dim
        self.embedding_layer = FeatureEmbedding(features, task.dim)
        self.crossnet = CrossNetV2(width, task.cross)
        self.parallel_dnn = MLP_Block(width, task.hidden, "ReLU", None, None, task.dropout, batch_norm=True)
        self.fc = nn.Linear(width + task.hidden[-1], 1)

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        rows = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        last = torch.cat([self.crossnet(rows), self.parallel_dnn(rows)], dim=-1)
        return {"y_pred": self.output_activation(self.fc(last))}


class Labelled:
    """Batches as one mapping, as its loaders give them."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for ids, label in self.batches:
            yield {**ids, "label": label}


class FuxiCTR:
    packages = ("fuxictr", "torch")

    def __init__(self, task: Task) -> None:
        logging.disable()
        features = FeatureMap("rows", tempfile.gettempdir())
        features.labels = ["label"]
        features.num_fields = len(task.fields)
        for name, size in task.fields.items():
            features.features[name] = {"source": "", "type": "categorical", "vocab_size": size}
        base: dict[str, Any] = {
            "gpu": -1, "embedding_regularizer": task.l2 or None, "verbose": 0, "metrics": ["AUC"],
            "model_root": tempfile.mkdtemp(), "eval_steps": None,
        }  # fmt: skip
        self.model = (DeepFM if task.model == "deepfm" else DCNv2)(features, task, **base)
        self.model.compile({"adam": "adam", "adagrad": "Adagrad"}[task.optimizer], "binary_crossentropy", task.lr)
        self.model.reset_parameters()
        self.model._max_gradient_norm, self.model._total_steps, self.model._stop_training = 10.0, 0, False
        self.model._eval_steps = 1 << 60
        self.optimizer = self.model.optimizer

    def epoch(self, batches: Batches) -> None:
        self.model.train_epoch(Labelled(batches))

    def score(self, ids: Mapping[str, Tensor]) -> Tensor:
        said: Tensor = self.model.eval()({**ids, "label": torch.zeros(len(next(iter(ids.values()))))})["y_pred"]
        return said


if __name__ == "__main__":
    main(FuxiCTR, FuxiCTR.packages)
