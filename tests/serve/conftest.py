"""A client that talks to the application in this process, on an event loop of its own."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pennyweight.model.bundle import Bundle
from pennyweight.serve.app import App
from pennyweight.serve.service import Service


class Client:
    """Requests without a socket: ``client("GET", "/health")``."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.service = app.service
        self.loop = asyncio.new_event_loop()
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost")

    def __call__(self, method: str, path: str, **request: Any) -> httpx.Response:
        return self.run(self.http.request(method, path, **request))

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def close(self) -> None:
        self.run(self.http.aclose())
        self.run(self.app.close())
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
