"""A client that talks to the application in this process, on an event loop of its own; worker processes that can be hurt."""

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pennyweight.core.curve import Curve
from pennyweight.data.dataset import Dataset
from pennyweight.model.bundle import Bundle, Policy, Variant, save
from pennyweight.model.spec import Model, build, spec_of
from pennyweight.serve.app import App
from pennyweight.serve.pool import Pool
from pennyweight.serve.service import Service


class Client:
    """Requests without a socket: ``client("GET", "/health")``."""

    def __init__(self, app: App, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.app = app
        self.service = app.service
        self.loop = loop or asyncio.new_event_loop()
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost", timeout=120)

    def __call__(self, method: str, path: str, **request: Any) -> httpx.Response:
        return self.run(self.http.request(method, path, **request))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def close(self) -> None:
        self.run(self.http.aclose())
        self.run(self.app.close())
        self.run(self.loop.shutdown_default_executor())
        self.loop.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Bundle], Client]]:
    """Serves a bundle with an event log of its own."""
    clients: list[Client] = []

    def start(bundle: Bundle) -> Client:
        clients.append(Client(App(Service(bundle, tmp_path / f"events-{len(clients)}.db"))))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def client(serve: Callable[[Bundle], Client], cascade: Bundle) -> Client:
    return serve(cascade)


FRAIL = '''
import os
import time

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Scores by item id; for one user the process dies, for one it fails, for one it takes long, for one it never ends."""

    def __init__(self, users: tuple[int, ...], scale: float = 1.0, modulus: int = 97, seconds: float = 1.0) -> None:
        super().__init__()
        self.users, self.modulus, self.seconds = users, modulus, seconds
        self.weight = nn.Parameter(torch.tensor(scale))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        deadly, broken, slow, stuck = (bool((user == u).any()) for u in self.users)
        if deadly:
            os.kill(os.getpid(), 9)
        if broken:
            raise ValueError("a secret of the model")
        if slow or stuck:
            time.sleep(3600 if stuck else self.seconds)
        return self.weight * (item % self.modulus).float()
'''
DEADLY, BROKEN, SLOW, STUCK = 1, 2, 3, 4
"""Users by name."""


@dataclasses.dataclass(frozen=True)
class Frail:
    """Bundles of a model that can be hurt, on disk."""

    folder: Path
    catalog: Any

    def bundle(self, policy: Policy, **args: Any) -> Bundle:
        import frail  # type: ignore[import-not-found]

        users = tuple(self.catalog.vocabulary("user").id(u) for u in (DEADLY, BROKEN, SLOW, STUCK))
        spec = spec_of(frail.Net, inputs=("user", "item"), users=users, **args)
        return Bundle(Model.of(build(spec, ["frail"]), spec), self.catalog, policy=policy)

    def save(self, name: str, policy: Policy, **args: Any) -> Path:
        return save(self.bundle(policy, **args), self.folder / name)


@pytest.fixture(scope="session")
def frail(movies: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Frail]:
    folder = tmp_path_factory.mktemp("frail")
    (folder / "frail.py").write_text(FRAIL)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield Frail(folder, movies.catalog)


def known(*names: str, **more: Any) -> tuple[Variant, ...]:
    """Variants whose work is known, so that nothing is timed; the first is the bundle itself."""
    curve = Curve(0.5, 0.1, 0.002, safety=2.0)
    return tuple(Variant(n, f"../{n}" if k else "", gap=0.01 * k, costs={"cpu": curve}, **more) for k, n in enumerate(names))


def pooled(folder: Path, log: Path, workers: int = 2, token: str = "", **options: Any) -> Client:
    """A service over worker processes, started."""
    from pennyweight.model.bundle import load

    bundle = load(folder)
    pools: list[Pool] = []

    def engine(metrics: Any) -> Pool:
        pools.append(Pool(folder, bundle.policy, workers, metrics, allow=["frail"], **options))
        return pools[0]

    made = Client(App(Service(bundle, log, engine=engine), token))
    try:
        made.run(pools[0].start())
    except BaseException:
        made.loop.close()
        raise
    return made
