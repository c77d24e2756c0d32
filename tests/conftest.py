"""The shipped sample as data, a small cascade over it as a bundle (made once for all tests that need one); a Valkey server."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pennyweight.data.dataset import Dataset
from pennyweight.data.sample import prepare
from pennyweight.model.bundle import Bundle, save
from pennyweight.model.cascade import Cascade
from pennyweight.model.ranking import DNN
from pennyweight.model.retrieval import TwoTower
from pennyweight.model.spec import Model, Spec, build, spec_of


def initialized(spec: Spec, data: Dataset, seed: int = 0) -> Bundle:
    """A bundle of a model with random weights; enough for all that does not ask how good it is."""
    torch.manual_seed(seed)
    return Bundle(Model.of(build(spec).eval(), spec), data.catalog)


@pytest.fixture(scope="session")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(tmp_path_factory.mktemp("movies") / "data")


@pytest.fixture(scope="session")
def cascade(movies: Dataset) -> Bundle:
    """Two towers and a DNN; their tables are wide enough apart for a history to matter."""
    columns = movies.schema.columns
    stages = {
        "retrieval": spec_of(TwoTower, columns=columns, dim=8, std=1.0),
        "ranking": spec_of(DNN, columns=columns, dim=4, hidden=(16,), norm=False),
    }
    return initialized(spec_of(Cascade, **{n: {"factory": s.factory, "args": dict(s.args)} for n, s in stages.items()}), movies)


@pytest.fixture(scope="session")
def cascade_folder(cascade: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(cascade, tmp_path_factory.mktemp("cascade") / "bundle")


class Valkey:
    """The server of one test, as durable as the service asks for: Valkey, or Redis where that is missing."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.folder = program, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"valkey://127.0.0.1:{self.port}"
        self.start()

    def start(self, **options: str) -> None:
        """Start it (again), and wait until it answers."""
        given = {"appendonly": "yes", "appendfsync": "always", "save": "", "bind": "127.0.0.1"} | options
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        command = [self.program, "--port", str(self.port), "--dir", str(self.folder), *words]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 5) as hello:
                    hello.sendall(b"PING\r\n")
                    if hello.recv(64).startswith((b"+PONG", b"-NOAUTH")):
                        return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, f"{self.program} did not start"
            time.sleep(0.02)

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    pytest.importorskip("valkey", reason="its client is missing: pip install valkey")
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        pytest.skip("no valkey-server and no redis-server here; on Debian: apt-get install redis-server")
    (tmp_path / "valkey").mkdir()
    server = Valkey(program, tmp_path / "valkey")
    yield server
    server.kill()
