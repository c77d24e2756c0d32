"""Blocks of a table hold the very numbers that one process draws, and what is drawn after it is the same too."""

import pytest
import torch

from pennyweight.data.schema import Column
from pennyweight.distribute import blocks
from pennyweight.distribute.shard import cut, held
from pennyweight.model import spec as specs
from pennyweight.model.placement import Placement, Shard
from pennyweight.model.ranking import DNN
from pennyweight.model.spec import seeded, spec_of

COLUMNS = (
    Column("user", "user", "categorical", 1003),
    Column("item", "item", "categorical", 517),
    Column("small", "item", "categorical", 20),
    Column("label", "label", "numeric"),
)
USER, ITEM = "embeddings.tables.user", "embeddings.tables.item"
SHARDS = [Shard("row", (0, 1, 2)), Shard("column", (2, 0)), Shard("grid", (0, 1, 2, 3), columns=2), Shard("table", (1,)), None]


@pytest.mark.parametrize("dim", [3, 16])
@pytest.mark.parametrize("shard", SHARDS, ids=lambda s: s.kind if s else "whole")
def test_blocks_are_cut_out_of_the_same_numbers(shard: Shard | None, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "LARGE", 1000)
    monkeypatch.setattr(blocks, "CHUNK", 16 * 20 * dim)
    spec = spec_of(DNN, columns=COLUMNS, dim=dim, hidden=(8,))
    whole = seeded(spec, 5).state_dict()
    before = torch.get_rng_state()
    for rank in range(4):
        module, fills = blocks.built(spec, 5)
        assert module.get_parameter(f"{USER}.weight").is_meta
        shards = {} if shard is None else {USER: shard, ITEM: shard}
        tables = held(module, Placement(4, shards=shards), rank)
        cut(tables, fills)
        mine = {h.path: h.mine for h in tables}
        for name, tensor in module.state_dict().items():
            piece = mine.get(name.removesuffix(".weight"))
            want = whole[name] if piece is None else whole[name][slice(*piece.rows), slice(*piece.columns)]
            assert torch.equal(tensor, want), (name, rank)
    assert torch.equal(before, torch.get_rng_state())
