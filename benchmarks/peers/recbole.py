"""RecBole: its models and its trainer's epoch, by pins it does not declare; its file formats and splits are left aside."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

np.long = np.int64  # type: ignore[attr-defined]  # a name NumPy took away and gave back in 2.0; RecBole cannot run there

from recbole.config import Config  # noqa: E402
from recbole.data.interaction import Interaction  # noqa: E402
from recbole.model.context_aware_recommender import DCNV2, DeepFM  # type: ignore[attr-defined]  # noqa: E402
from recbole.trainer import Trainer  # noqa: E402
from recbole.utils import FeatureType  # noqa: E402

from benchmarks.peers.training import Batches, Task, main  # noqa: E402


class Described:
    """What its models ask of a data set: names, kinds and counts of the fields."""

    def __init__(self, fields: Mapping[str, int]) -> None:
        self.sizes = dict(fields)
        self.field2type = dict.fromkeys(fields, FeatureType.TOKEN)

    def fields(self, source: Any = None) -> list[str]:
        return list(self.sizes)

    def num(self, field: str) -> int:
        return self.sizes[field]


class Interactions:
    """Batches as its loaders give them."""

    shuffle = False

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Interaction]:
        for ids, label in self.batches:
            yield Interaction({**ids, "label": label})


class RecBole:
    packages = ("recbole", "torch")

    def __init__(self, task: Task) -> None:
        user, item = list(task.fields)[:2]
        config = Config(
            model="DeepFM" if task.model == "deepfm" else "DCNV2",
            dataset="rows",
            config_dict={
                "use_gpu": False, "embedding_size": task.dim, "mlp_hidden_size": task.hidden, "dropout_prob": task.dropout,
                "mixed": False, "structure": "parallel", "cross_layer_num": task.cross, "reg_weight": 0.0,
                "learning_rate": task.lr, "learner": task.optimizer, "train_batch_size": task.batch, "LABEL_FIELD": "label",
                "USER_ID_FIELD": user, "ITEM_ID_FIELD": item, "data_path": tempfile.gettempdir(), "valid_metric": "AUC",
                "checkpoint_dir": tempfile.mkdtemp(), "show_progress": False, "state": "ERROR",
                "enable_amp": task.precision == "bf16", "metrics": ["AUC"], "eval_args": {"mode": "labeled"},
            },
        )  # fmt: skip
        config["numerical_features"] = []
        data = Described(task.fields)
        self.model = (DeepFM if task.model == "deepfm" else DCNV2)(config, data)
        self.trainer = Trainer(config, self.model)
        self.optimizer = self.trainer.optimizer

    def epoch(self, batches: Batches) -> None:
        self.trainer._train_epoch(Interactions(batches), 0)

    def score(self, ids: Mapping[str, Tensor]) -> Tensor:
        rows = Interaction({**ids, "label": torch.zeros(len(next(iter(ids.values()))))})
        said: Tensor = self.model.eval().predict(rows)
        return said


if __name__ == "__main__":
    main(RecBole, RecBole.packages)
