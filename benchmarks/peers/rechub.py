"""torch-rechub: its models, its ``CTRTrainer``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch_rechub.basic.features import SparseFeature
from torch_rechub.models.ranking import DCNv2, DeepFM
from torch_rechub.trainers import CTRTrainer

from benchmarks.peers.training import Batches, Task, main


class Rechub:
    packages = ("torch-rechub", "torch")

    def __init__(self, task: Task) -> None:
        features = [SparseFeature(n, vocab_size=s, embed_dim=task.dim) for n, s in task.fields.items()]
        mlp = {"dims": task.hidden, "dropout": task.dropout, "activation": "relu"}
        model = (
            DeepFM(features, features, mlp)
            if task.model == "deepfm"
            else DCNv2(features, task.cross, mlp, use_low_rank_mixture=False)
        )
        kind = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}[task.optimizer]
        regular = {"embedding_l2": task.l2 / 2} if task.l2 else None
        self.trainer = CTRTrainer(model, kind, {"lr": task.lr}, regular)
        self.optimizer = self.trainer.optimizer

    def epoch(self, batches: Batches) -> None:
        self.trainer.train_one_epoch(batches)

    def score(self, ids: Mapping[str, Tensor]) -> Tensor:
        said: Tensor = self.trainer.model.eval()(ids)
        return said


if __name__ == "__main__":
    main(Rechub, Rechub.packages)
