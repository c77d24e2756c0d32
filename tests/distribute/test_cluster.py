"""Workers on a Ray cluster: the same training, also when one is killed or a machine is lost; what is wrong is said at once."""

import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pennyweight.cli import app
from pennyweight.core.errors import ConfigError, DeviceError
from pennyweight.distribute import cluster
from pennyweight.distribute.launch import Many
from tests.distribute.test_launch import LONGER, RECIPE, Heard, alone, at, model, same, signalled, together

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="no Ray here: pip install 'pennyweight[ray]'")


@needs_ray
@pytest.mark.slow
def test_ray_starts_the_workers_and_starts_them_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, many = model("deepfm", folder), Many(2, "row", every=5, cluster="local")
    heard = Heard(at(2, 8, signalled(tmp_path, 1, signal.SIGKILL)))
    same(alone(spec, folder, LONGER, monkeypatch), together(spec, folder, LONGER, tmp_path, many, heard))
    assert (tmp_path / "tries.json").read_text().count(",") == 1, "started twice"


@pytest.fixture
def two() -> Iterator[tuple[str, object, object]]:
    """A cluster of two machines with a processor each, as far as Ray can tell."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = made.add_node(num_cpus=1)
    yield made.address, made, other
    made.shutdown()


@needs_ray
@pytest.mark.slow
def test_a_lost_machine_leaves_the_rest_to_go_on(
    two: tuple[str, object, object], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, made, other = two
    monkeypatch.setenv("RAY_ADDRESS", address)
    spec, many = model("deepfm", folder), Many(2, "row", every=5, cluster="auto", least=1)
    heard = Heard(at(2, 8, lambda: made.remove_node(other, allow_graceful=False)))  # type: ignore[attr-defined]
    done = together(spec, folder, LONGER, tmp_path, many, heard)
    same(alone(spec, folder, LONGER, monkeypatch), done)
    assert done[2].steps["workers"] == 1


@needs_ray
@pytest.mark.slow
def test_more_workers_than_processors_are_refused_at_once(
    folder: Path, tmp_path: Path, two: tuple[str, object, object]
) -> None:
    many = Many(3, cluster="auto")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeviceError, match="2 CPUs, and 3 workers"):
        patch.setenv("RAY_ADDRESS", two[0])
        together(model("deepfm", folder), folder, RECIPE, tmp_path, many)


@needs_ray
@pytest.mark.slow
def test_no_cluster_there_is_one_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(DeviceError, match="Ray cluster at auto is not reached"):
        together(model("deepfm", folder), folder, RECIPE, tmp_path, Many(2, cluster="auto"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cluster", "10.0.0.1"], "is not ray://HOST:PORT"),
        (["--cluster", "auto", "--hosts", "hosts.txt"], "give one"),
        (["--cluster", "auto", "--workers", "2", "--least", "3"], "3 workers are to be enough, of 2"),
    ],
)
def test_a_cluster_named_wrongly_is_one_error(words: list[str], said: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("127.0.0.1\n")
    words = [str(tmp_path / w) if w == "hosts.txt" else w for w in words]
    done = CliRunner().invoke(app, ["train", str(folder), "--out", str(tmp_path / "run"), *words])
    assert isinstance(done.exception, ConfigError) and said in str(done.exception)


def test_without_ray_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="pennyweight"):
        cluster.run(Many(2, cluster="auto"), 1, "", "")
