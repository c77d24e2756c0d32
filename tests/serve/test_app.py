"""HTTP: every way to get an error and its one shape, the pages, and a real server that stops and is killed."""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pennyweight.core.errors import BundleError, DeviceError
from pennyweight.data.events import EventLog
from pennyweight.model.bundle import Bundle, Policy, save
from pennyweight.model.spec import Model
from pennyweight.serve import app as server
from pennyweight.serve import messages as m
from pennyweight.serve import reply, wire

Serve = Callable[[Bundle], Any]


def failure(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of an answer, in the one shape there is."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) - {"remedy"} == {"status", "code", "message"}
    assert (error["status"], error["code"]) == (status, code)
    assert error["message"]
    assert "Traceback" not in answer.text and ".py" not in answer.text
    return error


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/recommend", b'{"user": 1,', "not JSON"),
        ("/recommend", b"", "not JSON"),
        ("/recommend", b"\xff\xfe", "not JSON"),
        ("/recommend", b'{"user": NaN}', "not JSON"),
        ("/recommend", b"[1]", "Expected `object`"),
        ("/recommend", b'{"user": 1, "k": "5"}', "$.k"),
        ("/recommend", b'{"user": 1, "k": -1}', ">= 1 - at `$.k`"),
        ("/recommend", b'{"user": 1, "k": 1e999}', "$.k"),
        ("/recommend", b'{"user": 1, "k": 1001}', "<= 1000 - at `$.k`"),
        ("/recommend", b'{"user": true}', "$.user"),
        ("/recommend", b'{"user": 1, "limit": 3}', "unknown field `limit`"),
        ("/recommend", b"{}", "nothing says whom"),
        ("/recommend", b'{"user": 1, "context": {"mood": 1}}', "mood"),
        ("/score", b'{"user": 1}', "missing required field `items`"),
        ("/score", b'{"user": 1, "items": []}', "$.items"),
        ("/score", b'{"user": 1, "items": [1, null]}', "$.items[1]"),
        ("/events", b'{"user": 1}', "missing required field `item`"),
        ("/events", b'{"user": 1, "item": 1, "kind": "love"}', "$.kind"),
        ("/events", b'{"user": 1, "item": 1, "kind": "rating"}', "a rating needs a value"),
        ("/events", b'[{"user": 1, "item": 1}, {"user": 1}]', "$[1]"),
        ("/events", b'{"user": "", "item": 1}', "$.user"),
        ("/events", b'{"user": 1, "item": 1, "time": -1}', "$.time"),
    ],
)
def test_a_wrong_body_is_400_and_says_where(client: Any, path: str, body: bytes, says: str) -> None:
    assert says in failure(client("POST", path, content=body), 400, "bad_request")["message"]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("", "nothing says whom"),
        ("?user=1&k=-3", ">= 1"),
        ("?user=1&k=many", "$.k"),
        ("?user=1&exclude_seen=perhaps", "$.exclude_seen"),
        ("?usr=1", "unknown field `usr`"),
        ("?user=1&user=2", "'user' is given twice"),
        ("?user=", "$.user"),
        ("?user=1&context=x", "$.context"),
    ],
)
def test_a_wrong_query_is_400_and_says_where(client: Any, query: str, says: str) -> None:
    error = failure(client("GET", f"/recommend{query}"), 400, "bad_request")
    assert says in error["message"] and error["remedy"]


def test_unknown_field_is_told_the_known_ones(client: Any) -> None:
    remedy = failure(client("POST", "/events", json={"user": 1, "movie": 1}), 400, "bad_request")["remedy"]
    assert "user, item, kind, value, id, time" in remedy


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/score", {"user": 1, "items": [1, "nothing like it"]}),
        ("POST", "/score", {"user": 1, "items": [10**15]}),
        ("POST", "/recommend", {"liked": ["nothing like it"]}),
        ("POST", "/events", {"user": 1, "item": 987654321}),
    ],
)
def test_an_unknown_item_is_404_and_says_where_to_look(client: Any, method: str, path: str, body: object) -> None:
    error = failure(client(method, path, json=body), 404, "not_found")
    assert "no item" in error["message"] and "/items?q=" in error["remedy"]


def test_an_unknown_path_is_404(client: Any) -> None:
    error = failure(client("GET", "/recommendations"), 404, "not_found")
    assert "'/recommendations'" in error["message"] and "/recommend" in error["remedy"]
    failure(client("GET", "/page/%2e%2e/secret"), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("DELETE", "/recommend", "GET, POST, HEAD"), ("GET", "/score", "POST"), ("POST", "/", "GET, HEAD")],
)
def test_a_wrong_method_is_405_and_says_what_is_allowed(client: Any, method: str, path: str, allow: str) -> None:
    answer = client(method, path)
    failure(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allow


def test_one_candidate_too_many_is_413(client: Any) -> None:
    assert client.service.policy.candidates == 10_000
    assert client("POST", "/score", json={"user": 1, "items": [1] * 10_000}).status_code == 200
    error = failure(client("POST", "/score", json={"user": 1, "items": [1] * 10_001}), 413, "too_large")
    assert "10001 items" in error["message"] and "10000" in error["message"] and "parts" in error["remedy"]


def test_one_event_too_many_is_413_and_nothing_is_stored(client: Any) -> None:
    events = [{"user": "many", "item": 1, "id": str(i)} for i in range(10_001)]
    failure(client("POST", "/events", json=events), 413, "too_large")
    assert client("POST", "/events", json=events[:2]).json() == {"stored": 2, "duplicates": 0}


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_too_large_is_413_before_it_is_read(client: Any, announced: bool) -> None:
    sent = 0

    async def chunks() -> Any:
        nonlocal sent
        for _ in range(64):
            sent += 1
            yield b" " * 2**18

    headers = {"content-length": str(2**24)} if announced else {}
    error = failure(client("POST", "/events", content=chunks(), headers=headers), 413, "too_large")
    assert "1048576" in error["message"]
    assert sent <= (1 if announced else 6)


def test_a_body_that_does_not_arrive_is_400(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "BODY_S", 0.02)

    async def never() -> Any:
        yield b"{"
        await asyncio.sleep(60)

    assert "did not arrive" in failure(client("POST", "/recommend", content=never()), 400, "bad_request")["message"]


def test_another_sites_page_may_not_write(client: Any) -> None:
    event = {"user": "victim", "item": 1}
    failure(client("POST", "/events", json=event, headers={"origin": "https://elsewhere.example"}), 403, "foreign_origin")
    assert client("POST", "/events", json=event, headers={"origin": "http://localhost"}).status_code == 200


class Held:
    """Keeps the model's thread busy until left."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool, self.go = pool, threading.Event()

    def __enter__(self) -> None:
        self.pool.submit(self.go.wait, 60)

    def __exit__(self, *_: object) -> None:
        self.go.set()


def test_a_full_queue_is_429_with_retry_after(serve: Serve, cascade: Bundle) -> None:
    client = serve(cascade.replace(policy=Policy(queue=1, deadline_ms=60_000)))

    async def crowd() -> list[httpx.Response]:
        with Held(client.service.engine.thread):
            accepted = [asyncio.create_task(client.http.get("/recommend?user=1")) for _ in range(2)]
            while len(client.service.engine.scheduler.queue) < 1:
                await asyncio.sleep(0.001)
            refused = await client.http.get("/recommend?user=2")
        return [refused, *await asyncio.gather(*accepted)]

    refused, *accepted = client.run(crowd())
    error = failure(refused, 429, "overloaded")
    assert "the queue holds 1" in error["message"] and "try again" in error["remedy"]
    assert int(refused.headers["retry-after"]) >= 1
    assert [answer.status_code for answer in accepted] == [200, 200]


def test_a_missed_deadline_is_429(serve: Serve, cascade: Bundle) -> None:
    client = serve(cascade.replace(policy=Policy(deadline_ms=200)))

    async def crowd() -> list[httpx.Response]:
        with Held(client.service.engine.thread):
            first = asyncio.create_task(client.http.get("/recommend?user=1"))
            await asyncio.sleep(0.001)
            refused = await client.http.get("/recommend?user=2")
        return [refused, await first]

    refused, first = client.run(crowd())
    assert "not started within 200 ms" in failure(refused, 429, "overloaded")["message"]
    assert first.status_code == 200


def test_a_bug_is_500_without_its_trace_which_is_in_the_log(
    client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(q: str, k: int) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(client.service.lookup, "items", broken)
    with caplog.at_level(logging.ERROR):
        answer = client("GET", "/items?q=x")
    error = failure(answer, 500, "internal")
    assert "secret" not in answer.text and "Zero" not in answer.text
    number = re.search(r"under (\w+)", error["remedy"])
    assert number and number[1] in caplog.text and "a secret" in caplog.text


def test_scores_that_are_no_numbers_are_500_and_never_json(serve: Serve, cascade: Bundle) -> None:
    state = {k: torch.full_like(t, float("nan")) if "mlp" in k else t for k, t in cascade.model.state.items()}
    client = serve(cascade.replace(model=Model(cascade.model.spec, state)))
    for answer in (client("GET", "/recommend?user=1"), client("POST", "/score", json={"user": 1, "items": [1, 2]})):
        failure(answer, 500, "internal")
        assert "NaN" not in answer.text and "null" not in answer.text


def test_a_full_disk_is_507_and_the_rest_goes_on(client: Any) -> None:
    log = client.service.store._log
    pages = log._writer.execute("PRAGMA page_count").fetchone()[0]
    log._writer.execute(f"PRAGMA max_page_count = {pages}")
    events = [{"user": "full", "item": 1, "id": f"{i}" * 60} for i in range(1000, 1500)]
    failure(client("POST", "/events", json=events), 507, "storage")
    assert client("GET", "/recommend?user=full").json()["history"] == []
    log._writer.execute(f"PRAGMA max_page_count = {pages + 10_000}")
    assert client("POST", "/events", json=events).json() == {"stored": 500, "duplicates": 0}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["user", "item", "items", "liked", "k", "context", "kind", "value", "time", "id", "exclude_seen"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(path=st.sampled_from(["/recommend", "/score", "/events"]), body=JSON | st.dictionaries(NAMES, JSON, max_size=5))
def test_no_json_is_a_500(client: Any, path: str, body: object) -> None:
    answer = client("POST", path, content=json.dumps(body))
    if answer.status_code != 200:
        failure(answer, answer.status_code, reply.CODES[answer.status_code])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(query=st.text(max_size=40) | st.dictionaries(NAMES, st.text(max_size=8), max_size=4))
def test_no_query_is_a_500(client: Any, query: str | dict[str, str]) -> None:
    for path in ("/recommend", "/items", "/users"):
        assert client("GET", path, params=query).status_code in (200, 400, 404)


def test_pages_come_with_a_policy_that_keeps_them_to_themselves(client: Any) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/docs", "text/html"),
        ("/page/app.js", "text/javascript"),
        ("/page/style.css", "text/css"),
    ):
        answer = client("GET", path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert not re.search(r"https?://(?!www\.w3\.org)", answer.text), "a page reaches for the network"


def test_head_is_get_without_its_body(client: Any) -> None:
    answer = client("HEAD", "/health")
    assert answer.status_code == 200 and answer.content == b""
    assert int(answer.headers["content-length"]) > 50


def test_metrics_count_requests_by_path_and_status_latency_queue_and_batches(client: Any) -> None:
    client("GET", "/recommend?user=1")
    client("GET", "/recommend?user=1&k=-1")
    client("GET", "/no/such/path")
    answer = client("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    for line in (
        'pennyweight_requests_total{path="/recommend",status="200"} 1.0',
        'pennyweight_requests_total{path="/recommend",status="400"} 1.0',
        'pennyweight_requests_total{path="other",status="404"} 1.0',
        'pennyweight_request_seconds_count{path="/recommend"} 2.0',
        "pennyweight_batch_requests_count 1.0",
        "pennyweight_queue_requests 0.0",
    ):
        assert line in answer.text.splitlines()


def test_get_answers_without_a_port(cascade_folder: Path, tmp_path: Path) -> None:
    status, body = asyncio.run(server.get(cascade_folder, "/recommend?user=1&k=5", store=tmp_path / "log.db"))
    assert status == 200 and len(json.loads(body)["items"]) == 5
    status, body = asyncio.run(server.get(cascade_folder, "/recommend?user=1&k=0", store=tmp_path / "log.db"))
    assert status == 400 and json.loads(body)["error"]["code"] == "bad_request"


def test_the_log_lies_beside_the_bundle_unless_named(cascade: Bundle, tmp_path: Path) -> None:
    asyncio.run(server.get(save(cascade, tmp_path / "bundle"), "/health"))
    assert (tmp_path / "events.db").is_file()


def test_two_services_share_the_events_of_a_server(cascade_folder: Path, valkey: Any) -> None:
    """What one of them was told, the other knows in its next answer: nothing of a shared server is kept."""

    async def scene() -> list[dict[str, Any]]:
        services = [server.App.open(cascade_folder, valkey.url).service for _ in range(2)]
        ask = m.Recommend(user="new", k=5)
        before = await services[1].recommend(ask)
        assert (await services[0].events(m.Event(user="new", item=318, id="e1"))).stored == 1
        after = await services[1].recommend(ask)
        assert (await services[1].events(m.Event(user="new", item=318, id="e1"))).duplicates == 1
        for service in services:
            await service.close()
        return [{"by": a.by, "history": [i.id for i in a.history]} for a in (before, after)]

    before, after = asyncio.run(scene())
    assert before == {"by": "popularity", "history": []}
    assert after["by"] != "popularity" and after["history"] == [318]


def test_a_missing_bundle_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="holds no bundle"):
        asyncio.run(server.get(tmp_path, "/health"))


def test_a_port_in_use_says_so_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(DeviceError, match=f"port {port} of 127.0.0.1 is in use; .*--port"):
            server.run(tmp_path / "no bundle here", port=port)


def test_a_host_that_is_not_ours_says_so(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"cannot listen on 192\.0\.2\.1:0"):
        server.run(tmp_path, host="192.0.2.1", port=0)


class Server:
    """The service in a process of its own, on a free port."""

    def __init__(self, bundle: Path, store: Path) -> None:
        code = "import sys; from pennyweight.serve.app import run; run(sys.argv[1], port=0, store=sys.argv[2])"
        path = {**os.environ, "PYTHONPATH": str(Path(server.__file__).parents[2])}
        command = [sys.executable, "-c", code, str(bundle), str(store)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=path)
        assert self.process.stderr
        line = self.process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + self.process.stderr.read()
        self.url = found[0]

    def end(self, how: signal.Signals) -> tuple[int, str]:
        self.process.send_signal(how)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture
def started() -> Iterator[Callable[[Path, Path], Server]]:
    servers: list[Server] = []

    def start(bundle: Path, store: Path) -> Server:
        servers.append(Server(bundle, store))
        return servers[-1]

    yield start
    for one in servers:
        if one.process.poll() is None:
            one.end(signal.SIGKILL)


def test_stopping_finishes_what_was_accepted(cascade: Bundle, tmp_path: Path, started: Callable[[Path, Path], Server]) -> None:
    slow = cascade.replace(policy=Policy(batch=50, wait_ms=30_000, deadline_ms=120_000))
    one = started(save(slow, tmp_path / "bundle"), tmp_path / "log.db")

    async def scene() -> tuple[list[int], tuple[int, str]]:
        async with httpx.AsyncClient(base_url=one.url, timeout=120) as http:
            assert (await http.get("/health")).status_code == 200
            accepted = [asyncio.create_task(http.get(f"/recommend?user={i}")) for i in range(1, 5)]
            while "queue_requests 4.0" not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.01)
            ended = await asyncio.to_thread(one.end, signal.SIGTERM)
            return [answer.status_code for answer in await asyncio.gather(*accepted)], ended

    statuses, (code, said) = asyncio.run(scene())
    assert statuses == [200] * 4
    assert code == 0 and said == ""


def test_what_was_answered_survives_a_kill(
    cascade_folder: Path, tmp_path: Path, started: Callable[[Path, Path], Server]
) -> None:
    one = started(cascade_folder, tmp_path / "log.db")
    events = [{"user": "u", "item": item, "id": f"e{item}"} for item in (1, 2, 3)]
    assert httpx.post(f"{one.url}/events", json=events).json() == {"stored": 3, "duplicates": 0}
    one.end(signal.SIGKILL)
    with EventLog(tmp_path / "log.db") as log:
        assert log.history("u", 10) == ["1", "2", "3"]
