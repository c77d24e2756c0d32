"""Many workers give what one gives: every loss, every metric, the weights; whatever is cut, killed or started again."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from pennyweight.cli import app
from pennyweight.core.config import dumps
from pennyweight.core.errors import ConfigError, DataError, DeviceError
from pennyweight.data.dataset import Dataset
from pennyweight.distribute import launch, worker
from pennyweight.distribute.launch import Many
from pennyweight.model import ranking, retrieval, sequential, train
from pennyweight.model.bundle import load
from pennyweight.model.hashed import Hashed
from pennyweight.model.placement import Placement, Shard
from pennyweight.model.spec import Spec, seeded, spec_of
from pennyweight.model.train import EpochLog, Progress, Recipe, fit

PARTS = ("random", (0.8, 0.1, 0.1))
RECIPE = Recipe(batch=96, epochs=2, lr=3e-3, embedding_l2=1e-4, weight_decay=1e-5, clip=3.0)
LONGER = dataclasses.replace(RECIPE, epochs=4, patience=4)
PAIRS = dataclasses.replace(RECIPE, metric="ndcg@10", negatives=32, clip=0.0)
SASREC = dataclasses.replace(PAIRS, loss="gbce")


def model(name: str, folder: Path) -> Spec:
    columns = Dataset.open(folder).schema.columns
    if name in ("dnn", "deepfm", "dcnv2", "dlrm"):
        factory = {"dnn": ranking.DNN, "deepfm": ranking.DeepFM, "dcnv2": ranking.DCNv2, "dlrm": ranking.DLRM}[name]
        rest = {} if name == "dlrm" else {"dropout": 0.2}
        return spec_of(factory, columns=columns, dim=8, hidden=(24, 16), **rest)
    if name == "hashed":
        tables = {
            f"embeddings.tables.{t}": Hashed(rows=n, dim=8, padding=0, size=40) for t, n in (("user", 300), ("item", 400))
        }
        return spec_of(ranking.DNN, columns=columns, dim=8, hidden=(24, 16)).with_layers(tables)
    if name == "sasrec":
        return spec_of(sequential.SASRec, columns=columns, dim=8, heads=2)
    if name == "mf":
        return spec_of(retrieval.MatrixFactorization, columns=columns, dim=8)
    return spec_of(retrieval.TwoTower, columns=columns, dim=8, hidden=(16,), dropout=0.1, scale=5.0)


class Heard:
    """The loss of every step and the metric of every epoch, by where they were; and somebody who disturbs."""

    def __init__(self, disturb: Callable[[Progress], None] = lambda _: None) -> None:
        self.means: dict[tuple[int, int], float] = {}
        self.metrics: dict[int, float] = {}
        self.disturb = disturb

    def __call__(self, event: Progress | EpochLog) -> None:
        if isinstance(event, EpochLog):
            self.metrics[event.epoch] = event.metric
            return
        self.means[event.epoch, event.step] = event.loss
        self.disturb(event)

    @property
    def losses(self) -> list[float]:
        sums = {(e, s): mean * s for (e, s), mean in self.means.items()}
        return [total - sums.get((e, s - 1), 0.0) for (e, s), total in sorted(sums.items())]


def alone(spec: Spec, folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> tuple[Heard, dict[str, Tensor]]:
    """One process, no workers."""
    monkeypatch.setattr(train, "TICK_S", -1.0)
    heard, parts, module = Heard(), Dataset.open(folder).split(*PARTS, 3), seeded(spec, 3)
    fit(module, parts.train, parts.valid, recipe, inputs=spec.inputs, seed=3, progress=heard)
    return heard, dict(module.state_dict())


def together(
    spec: Spec, folder: Path, recipe: Recipe, home: Path, many: Many, heard: Heard | None = None
) -> tuple[Heard, dict[str, Tensor], launch.Told]:
    """The same by workers."""
    heard = heard or Heard()
    many = dataclasses.replace(many, tick_s=-1.0)
    made, told = launch.train(spec, folder, PARTS, recipe, 3, home, many, watch=heard)
    return heard, dict(made.state), told


def same(one: tuple[Heard, dict[str, Tensor]], many: tuple[Heard, dict[str, Tensor], launch.Told]) -> None:
    """Every loss within 1e-5 of itself, metrics to 4 digits, weights close."""
    assert len(one[0].losses) == len(many[0].losses) >= 24
    assert max(abs(a - b) / abs(a) for a, b in zip(one[0].losses, many[0].losses, strict=True)) < 1e-5
    assert {e: round(m, 4) for e, m in one[0].metrics.items()} == pytest.approx(many[0].metrics, abs=1e-4)
    assert one[1].keys() == many[1].keys()
    for name, tensor in one[1].items():
        assert torch.allclose(tensor.double(), many[1][name].double(), rtol=1e-3, atol=1e-4), name


CASES = [
    ("dnn", RECIPE, Many(2, "data")),
    ("deepfm", RECIPE, Many(2, "row")),
    ("dcnv2", RECIPE, Many(2, "table")),
    ("dlrm", dataclasses.replace(RECIPE, tables="lazy-adam"), Many(3, "column")),
    ("deepfm", dataclasses.replace(RECIPE, tables="adagrad"), Many(4, "row", replicas=2)),
    ("hashed", dataclasses.replace(RECIPE, tables="sgd"), Many(2, "row")),
    ("mf", dataclasses.replace(PAIRS, loss="bpr"), Many(2, "grid")),
    ("two-tower", dataclasses.replace(PAIRS, loss="sampled-softmax"), Many(4, "grid")),
    ("two-tower", dataclasses.replace(PAIRS, loss="sampled-softmax", negatives=0), Many(2, "row")),
    ("sasrec", SASREC, Many(2, "row")),
    ("deepfm", RECIPE, Many(3, Placement(3, dense={"mlp.0": "column", "mlp.4": "row"}))),
    ("sasrec", dataclasses.replace(SASREC, clip=1.0), Many(2, "pipeline")),
    ("sasrec", SASREC, Many(3, Placement(3, pipeline="blocks", micro=2))),
    ("sasrec", SASREC, Many(4, Placement(4, pipeline="blocks", micro=1, replicas=2))),
    ("sasrec", dataclasses.replace(SASREC, clip=1.0), Many(4, Placement(4, dense={"blocks.0.wide": "column"}, replicas=2))),
]


QUICK = 3
"""Cases that every run of the tests goes through; each starts its own workers, so the others are with the slow tests."""


@pytest.mark.parametrize(
    ("name", "recipe", "many"),
    [*CASES[:QUICK], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[QUICK:])],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_losses_metrics_and_weights_are_those_of_one_worker(
    name: str, recipe: Recipe, many: Many, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = model(name, folder)
    same(alone(spec, folder, recipe, monkeypatch), together(spec, folder, recipe, tmp_path, many))


def test_int8_rows_over_workers_are_rounded_as_by_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in another order is rounded otherwise now and then, so losses are close and not equal."""
    spec, recipe = model("deepfm", folder), dataclasses.replace(RECIPE, tables="adagrad", lr=0.02, rows="int8")
    one, two = alone(spec, folder, recipe, monkeypatch), together(spec, folder, recipe, tmp_path, Many(2, "row"))
    apart = [abs(a - b) / abs(a) for a, b in zip(one[0].losses, two[0].losses, strict=True)]
    assert max(apart[:5]) < 1e-4 and max(apart) < 1e-2
    assert {k: (v.shape, v.dtype) for k, v in one[1].items()} == {k: (v.shape, v.dtype) for k, v in two[1].items()}
    assert two[1]["embeddings.tables.user.packed"].dtype == torch.uint8
    with pytest.raises(ConfigError, match="cut by columns"):
        together(spec, folder, dataclasses.replace(recipe, tables="sgd"), tmp_path / "other", Many(2, "column"))


def at(epoch: int, step: int, act: Callable[[], None]) -> Callable[[Progress], None]:
    """Does something once, when a training is there or past it."""
    left = [act]

    def hear(event: Progress) -> None:
        if left and (event.epoch, event.step) >= (epoch, step):
            left.pop()()

    return hear


def signalled(home: Path, rank: int, number: int) -> Callable[[], None]:
    return lambda: os.kill(int((home / f"rank-{rank}.pid").read_text()), number)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "wait"), [(signal.SIGKILL, 60.0), (signal.SIGSTOP, 20.0)], ids=["killed", "stalled"])
def test_a_lost_worker_costs_no_sample(
    number: int, wait: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, many = model("deepfm", folder), Many(2, "row", every=5, timeout_s=wait)
    heard = Heard(at(2, 8, signalled(tmp_path, 1, number)))
    same(alone(spec, folder, LONGER, monkeypatch), together(spec, folder, LONGER, tmp_path, many, heard))
    starts = (tmp_path / "tries.json").read_text()
    assert starts.startswith("[0, ") and starts.count(",") == 1  # started twice, the second time from a checkpoint


@pytest.mark.slow
def test_stopped_on_three_workers_and_gone_on_with_by_two(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = model("deepfm", folder)
    heard = Heard(at(1, 9, (tmp_path / "stop").touch))
    _, _, told = together(spec, folder, LONGER, tmp_path, Many(3, "row"), heard)
    assert told.fit.stopped == "interrupted"
    done = together(spec, folder, LONGER, tmp_path, Many(2, "table"), heard)
    assert done[2].fit.stopped == "epochs"
    same(alone(spec, folder, LONGER, monkeypatch), done)


def test_the_same_command_leaves_the_same_bundle(folder: Path, tmp_path: Path) -> None:
    words = ["train", str(folder), "--split", "random", "--batch", "96", "--epochs", "2", "--dim", "8", "--hidden", "24,16"]
    for name, more in (("one", []), ("two", ["--workers", "2", "--placement", "grid", "--every", "9"])):
        done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / name), *more])
        assert done.exit_code == 0, done.output
    one, two = (json.loads((tmp_path / name / "bundle" / "manifest.json").read_text()) for name in ("one", "two"))
    weights = [made["files"].pop("weights.safetensors") for made in (one, two)]
    assert one == two and weights[0]["bytes"] == weights[1]["bytes"]
    first, second = (load(tmp_path / name / "bundle").model.state for name in ("one", "two"))
    assert all(torch.allclose(first[k].double(), second[k].double(), rtol=1e-3, atol=1e-4) for k in first)
    assert not (tmp_path / "two" / "workers").exists()


def test_a_checkpoint_of_another_model_is_refused_by_one_error(folder: Path, tmp_path: Path) -> None:
    heard = Heard(at(1, 3, (tmp_path / "stop").touch))
    together(model("deepfm", folder), folder, RECIPE, tmp_path, Many(2), heard)
    with pytest.raises(ConfigError, match="another"):
        together(model("dnn", folder), folder, RECIPE, tmp_path, Many(2))


def test_workers_that_never_begin_are_not_started_for_ever(folder: Path, tmp_path: Path) -> None:
    """A script without a guard: each worker imports it, and so wants to start workers itself."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from pennyweight.data.dataset import Dataset\n"
        "from pennyweight.distribute import launch\n"
        "from pennyweight.model.ranking import DNN\n"
        "from pennyweight.model.spec import spec_of\n"
        "from pennyweight.model.train import Recipe\n"
        f"data, home = Path({str(folder)!r}), Path({str(tmp_path / 'home')!r})\n"
        "spec = spec_of(DNN, columns=Dataset.open(data).schema.columns, dim=8, hidden=(8,))\n"
        "launch.train(spec, data, ('random', (0.8, 0.1, 0.1)), Recipe(epochs=1), 0, home, launch.Many(2))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "4 starts of the workers ended before they had begun" in done.stderr, done.stderr[-2000:]


def test_workers_that_disagree_or_cannot_divide_say_so_once(folder: Path, tmp_path: Path) -> None:
    spec = model("deepfm", folder)
    with pytest.raises(ConfigError, match="3 workers in 2 replicas"):
        together(spec, folder, RECIPE, tmp_path / "a", Many(3, replicas=2))
    with pytest.raises(ConfigError, match="batch of 1 rows cannot be parted among 2 workers"):
        together(spec, folder, dataclasses.replace(RECIPE, batch=1), tmp_path / "b", Many(2))
    wrong = Placement(2, shards={"embeddings.tables.shop": Shard("row", (0, 1))})
    with pytest.raises(ConfigError, match=r"the placement cuts embeddings\.tables\.shop, which cannot be; tables here: "):
        together(spec, folder, RECIPE, tmp_path / "c", Many(2, wrong))
    with pytest.raises(ConfigError, match="row-wise adagrad needs whole rows"):
        together(spec, folder, dataclasses.replace(RECIPE, tables="adagrad"), tmp_path / "d", Many(2, "column"))
    with pytest.raises(DataError, match="lower the learning rate"):
        together(spec, folder, dataclasses.replace(RECIPE, lr=1e30, clip=0.0), tmp_path / "e", Many(2))


def test_a_taken_port_and_a_host_that_does_not_come_are_named(folder: Path, tmp_path: Path) -> None:
    spec = model("deepfm", folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        hosts = (launch.Host("127.0.0.1", taken.getsockname()[1]), launch.Host("127.0.0.2"))
        with pytest.raises(DeviceError, match=r"cannot be opened .* name another port"):
            together(spec, folder, RECIPE, tmp_path, Many(1, hosts=hosts, timeout_s=3))
    hosts = (hosts[0], launch.Host("192.0.2.1"))
    with pytest.raises(DeviceError, match=r"not all of 127\.0\.0\.1, 192\.0\.2\.1 came within 3 s \(--timeout\)"):
        together(spec, folder, RECIPE, tmp_path, Many(1, hosts=hosts, timeout_s=3))
    with pytest.raises(ConfigError, match=r"none of the addresses 192\.0\.2\.1"):
        together(spec, folder, RECIPE, tmp_path, Many(1, hosts=hosts[1:]))


def test_address_files_are_read_or_refused_by_line(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# two machines\n10.0.0.1:29501 4\n\n10.0.0.2  # the slow one\n")
    assert launch.read_hosts(file) == (launch.Host("10.0.0.1", 29501, 4), launch.Host("10.0.0.2"))
    for text, says in (("10.0.0.1 four", "line 1: '10.0.0.1 four'"), ("a\na", "names 2 hosts"), ("", "names 0 hosts")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=says):
            launch.read_hosts(file)
    with pytest.raises(ConfigError, match="No such file"):
        launch.read_hosts(tmp_path / "none")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("data", "rank 1 has other data than rank 0"),
        ("versions", "rank 1 has other versions than rank 0; install the same packages"),
        ("job", "rank 1 was given another command than rank 0"),
    ],
)
def test_ranks_that_were_given_different_things_say_so_once(folder: Path, tmp_path: Path, what: str, says: str) -> None:
    """Two workers as two hosts' launchers would start them, each with what its own host has."""
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    Dataset.open(folder).head(200).save(other)
    script = (
        "import sys\n"
        "from pennyweight.core import hardware\n"
        "from pennyweight.distribute import worker\n"
        "if sys.argv[3] == 'versions':\n"
        "    hardware.versions = lambda: {'torch': '1.0'}\n"
        "worker.main(sys.argv[1], sys.argv[2])\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in (0, 1):
        odd = what if rank else ""
        job = worker.Job(
            model("dnn", folder), str(other if odd == "data" else folder), *PARTS, RECIPE, int(odd == "job"),
            Many(2, timeout_s=60),
        )  # fmt: skip
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{k: str(v) for k, v in (world | where).items()}}
        command = [sys.executable, "-c", script, str(home), dumps(job), odd]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    ended = [(one.communicate(timeout=240)[1], one.returncode) for one in started]
    assert [code for _, code in ended] == [1, 1], ended
    found = worker.told(home)
    assert isinstance(found, ConfigError) and says in str(found), (found, ended)
