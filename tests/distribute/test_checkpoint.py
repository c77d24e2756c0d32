"""A checkpoint is there whole or not at all; a disk that fills up costs one, and damage is refused by name."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pennyweight.core.errors import ConfigError, StorageError
from pennyweight.distribute import checkpoint
from pennyweight.distribute.checkpoint import Folder
from pennyweight.distribute.shard import Held
from pennyweight.model.placement import Shard


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.new_group()
    dist.destroy_process_group()


def state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        "module.table.weight": torch.randn(50, 4, generator=generator),
        "optimizer.table.weight.exp_avg": torch.randn(50, 4, generator=generator),
        "optimizer.table.weight.step": torch.tensor(7.0),
        "tables.table.weight.squares": torch.rand(50, generator=generator),
        "module.mlp.weight": torch.randn(3, 5, generator=generator).T,
        "total": torch.tensor(1.5, dtype=torch.float64),
        "random": torch.arange(16, dtype=torch.uint8),
    }
    return made


def folder(path: Path, group: dist.ProcessGroup, lean: bool = False) -> Folder:
    table = Held("table", nn.Embedding(50, 4), Shard("row", (0,)), 0)
    return Folder(path / "checkpoint", {"table.weight": table}, group, lean)


@contextmanager
def full(room: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("lean", [False, True])
def test_what_is_saved_is_loaded_bit_for_bit(lean: bool, tmp_path: Path, group: dist.ProcessGroup) -> None:
    keeper, given = folder(tmp_path, group, lean), state()
    keeper.save(given, {"state": "{}", "identity": "me"})
    if not lean:
        given["module.table.weight"].add_(1)  # training goes on while it is written
    assert keeper.wait() is None
    found, notes = folder(tmp_path, group).load() or ({}, {})
    assert notes["identity"] == "me"
    for name, tensor in state().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    whole, _ = checkpoint.whole(tmp_path / "checkpoint")
    assert all(torch.equal(whole[name], tensor) for name, tensor in state().items())


def test_it_is_read_into_tensors_that_are_there(tmp_path: Path, group: dist.ProcessGroup) -> None:
    folder(tmp_path, group, True).save(state(), {})
    here = torch.zeros(50, 4)
    found, _ = folder(tmp_path, group, True).load({"module.table.weight": here}) or ({}, {})
    assert torch.equal(here, state()["module.table.weight"])
    assert found["module.table.weight"].data_ptr() == here.data_ptr()


def test_only_the_last_is_kept_and_a_torn_one_is_not_there(tmp_path: Path, group: dist.ProcessGroup) -> None:
    keeper = folder(tmp_path, group)
    assert keeper.load() is None and checkpoint.newest(tmp_path / "checkpoint") == 0
    for seed in range(3):
        keeper.save(state(seed), {})
    keeper.wait()
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["step-3"]
    torn = tmp_path / "checkpoint" / "step-4.part"
    torn.mkdir()
    (torn / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoint" / "step-9").mkdir()  # without its state it is no checkpoint
    again = folder(tmp_path, group)
    found, _ = again.load() or ({}, {})
    assert torch.equal(found["module.mlp.weight"], state(2)["module.mlp.weight"])
    again.save(state(5), {})
    assert again.wait() is None and not torn.exists()


def test_a_full_disk_costs_one_checkpoint(tmp_path: Path, group: dist.ProcessGroup, capsys: pytest.CaptureFixture[str]) -> None:
    keeper = folder(tmp_path, group)
    keeper.save(state(1), {})
    assert keeper.wait() is None
    with full(500):
        keeper.save(state(2), {})
        failed = keeper.wait()
    assert isinstance(failed, StorageError) and "step-2 was not written, the checkpoint before stays" in str(failed)
    assert str(failed) in capsys.readouterr().err
    found, _ = folder(tmp_path, group).load() or ({}, {})
    assert torch.equal(found["module.table.weight"], state(1)["module.table.weight"])
    keeper.save(state(3), {})
    assert keeper.wait() is None
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["step-3"]


def test_damage_other_shapes_and_a_file_are_refused(tmp_path: Path, group: dist.ProcessGroup) -> None:
    folder(tmp_path, group, True).save(state(), {})
    other = Held("table", nn.Embedding(60, 4), Shard("row", (0,)), 0)
    with pytest.raises(ConfigError, match=r"^module\.table\.weight is \(50, 4\) in the checkpoint and \(60, 4\) in"):
        Folder(tmp_path / "checkpoint", {"table.weight": other}, group).load()
    (file,) = (tmp_path / "checkpoint" / "step-1").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ConfigError, match="cannot be read"):
        folder(tmp_path, group).load()
    notes = tmp_path / "checkpoint" / "step-1" / "state.json"
    notes.write_text(json.dumps({})[:-1])
    with pytest.raises(ConfigError, match="cannot be read"):
        folder(tmp_path, group).load()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "checkpoint").write_bytes(b"of one worker")
    with pytest.raises(ConfigError, match="is of a training by one worker"):
        folder(tmp_path / "one", group).load()
