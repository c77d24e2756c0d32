"""TorchRec's own planner, asked how it would cut tables: JSON models on standard input, their placements on standard output.

A model is ``{"workers": W, "batch": rows, "tables": [{"name", "rows", "dim", "lookups"}]}``; an answer holds for each table its
sharding type and its ranks. It plans for the CPU and for the batch of one worker, as its documentation has it, with each
table's number of ids; all else is its defaults.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import torch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection


def placed(model: dict[str, Any]) -> dict[str, Any]:
    """Table -> sharding type and ranks."""
    tables = model["tables"]
    configs = [
        EmbeddingBagConfig(name=t["name"], embedding_dim=t["dim"], num_embeddings=t["rows"], feature_names=[t["name"]])
        for t in tables
    ]
    bags = EmbeddingBagCollection(device=torch.device("meta"), tables=configs)
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=model["workers"], compute_device="cpu"),
        batch_size=model["batch"] // model["workers"],
        constraints={t["name"]: ParameterConstraints(pooling_factors=[float(t["lookups"])]) for t in tables},
    )
    sharders: Any = [EmbeddingBagCollectionSharder()]
    plan = planner.plan(bags, sharders).plan
    return {
        name: {"type": shard.sharding_type, "ranks": list(shard.ranks or [])}
        for shards in plan.values()
        for name, shard in shards.items()
    }


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    json.dump([placed(model) for model in json.load(sys.stdin)], sys.stdout)
