"""Worker processes behind the front: they are killed, they hang, they fail, and nothing that was accepted is lost."""

import asyncio
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pennyweight.core.errors import BundleError, ConfigError
from pennyweight.model.bundle import Bundle, Policy, Priority, Tenant
from pennyweight.serve import binary, reply
from pennyweight.serve import pool as pools
from pennyweight.serve.app import _devices
from pennyweight.serve.slot import Packed, Slot, read_answers, read_queries, write_answers, write_queries
from pennyweight.serve.worker import Query, Ranked
from tests.serve.conftest import BROKEN, DEADLY, SLOW, STUCK, Client, Frail, known, pooled

CLASSES = (Priority("page", deadline_ms=600_000), Priority("mail", deadline_ms=1_200_000, share=0.5))
TENANTS = (Tenant("shop", quota=10_000.0, burst_s=10.0), Tenant("poor", quota=0.001, burst_s=1.0), Tenant("*", quota=1e6))
POLICY = Policy(batch=4, queue=100, classes=CLASSES, tenants=TENANTS, variants=known("best"))


@pytest.fixture(scope="module")
def hurt(frail: Frail, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Two workers and a spare; each test leaves them as many as it found them."""
    client = pooled(frail.save("best", POLICY), tmp_path_factory.mktemp("hurt") / "log.db")
    yield client
    client.close()


async def until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


def whole(client: Client) -> bool:
    pool = client.service.engine
    return sorted(m.state for m in pool.members) == ["serving", "serving", "spare"]


def score(client: Client, user: Any, items: list[int], **more: Any) -> httpx.Response:
    return client("POST", "/score", json={"user": user, "items": items, "tenant": "shop", **more})


def ids(client: Client, *names: int) -> Any:
    return client.service.lookup.ids(list(names))


def test_answers_name_their_variant_and_are_the_models(hurt: Client) -> None:
    body = score(hurt, 15, [1, 2, 50, 318]).json()
    assert body["scores"] == (ids(hurt, 1, 2, 50, 318) % 97).tolist()
    assert (body["variant"], body["gap"]) == ("best", 0.0)
    top = hurt("GET", "/recommend?user=15&k=5&tenant=shop").json()
    every = hurt.service.catalog.item_ids % 97
    assert [item["score"] for item in top["items"]] == sorted(every.tolist(), reverse=True)[:5]
    assert (top["variant"], top["by"]) == ("best", "model")
    assert hurt("GET", "/health").json()["variants"] == ["best"] and hurt("GET", "/health").json()["workers"] == 2


def test_binary_is_answered_as_json_is(hurt: Client) -> None:
    names = [1, 2, 50, 318, 296, 356, 593, 260, 480, 527]
    ask = binary.ask(names, user=15, tenant="shop")
    answer = hurt("POST", "/score", content=ask, headers={"content-type": binary.KIND})
    assert answer.status_code == 200 and answer.headers["content-type"] == binary.KIND
    about, scores = binary.answer(answer.content)
    assert scores.tolist() == score(hurt, 15, names).json()["scores"]
    assert about == {"user": 15, "known": True, "variant": "best", "gap": 0.0}


def test_headers_say_what_bodies_do(hurt: Client) -> None:
    ask = {"user": 15, "items": [1, 2]}
    headers = {"x-tenant": "poor", "x-priority": "mail", "x-deadline-ms": "1e4"}
    said = [hurt("POST", "/score", json=ask, headers=headers) for _ in range(2)][1]  # a full bucket lets one in
    assert said.status_code == 429 and "'poor'" in said.json()["error"]["message"]
    assert hurt("POST", "/score", json=ask | {"tenant": "shop"}, headers={"x-tenant": "poor"}).status_code == 200


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"priority": "urgent"}, "no class 'urgent'"),
        ({"deadline_ms": 0}, "$.deadline_ms"),
        ({"deadline_ms": -5}, "$.deadline_ms"),
        ({"degrade": "yes"}, "$.degrade"),
        ({"context": {"mood": 1}}, "no user or context column 'mood'"),
        ({"context": {"user": 2**70}}, "64 bits"),
    ],
)
def test_a_wrong_wish_is_400(hurt: Client, more: dict[str, Any], says: str) -> None:
    answer = score(hurt, 15, [1, 2], **more)
    assert answer.status_code == 400 and says in answer.text


def test_what_cannot_be_in_time_is_429_at_once_and_counted(hurt: Client) -> None:
    hopeless = {"deadline_ms": 0.01, "priority": "mail"}
    answer = [score(hurt, 15, [1] * 10_000, **hopeless) for _ in range(3)][-1]  # one is let in to see whether it is so
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    text = hurt("GET", "/metrics").text
    assert 'pennyweight_sheds_total{class="mail",reason="late",tenant="shop"}' in text
    assert 'pennyweight_answers_total{variant="best"}' in text
    assert (
        "pennyweight_predicted_over_actual_count" in text
        and "pennyweight_batch_seconds_count{variant=" in text
        and 'pennyweight_workers{state="idle"} 2.0' in text
    )


def test_a_tenant_without_quota_left_is_refused_and_others_are_not(hurt: Client) -> None:
    statuses = [score(hurt, 15, [1, 2], tenant="poor").status_code for _ in range(3)]
    assert 429 in statuses and score(hurt, 15, [1, 2]).status_code == 200
    assert 'reason="quota",tenant="poor"' in hurt("GET", "/metrics").text


def test_a_killed_worker_loses_nothing(hurt: Client) -> None:
    pool = hurt.service.engine

    async def scene() -> list[httpx.Response]:
        await until(lambda: whole(hurt))
        tasks = []
        for k in range(20):
            ask = {"user": SLOW if k < 2 else 15, "items": [1, 2], "tenant": "shop"}
            tasks.append(asyncio.create_task(hurt.http.post("/score", json=ask)))
            await until(lambda k=k: sum(bool(m.flights) for m in pool.members) == min(2, k + 1))  # type: ignore[misc]
        victim = next(m for m in pool.members if m.flights)
        victim.process.send_signal(signal.SIGKILL)
        answers = await asyncio.gather(*tasks)
        await until(lambda: whole(hurt))
        assert victim.name not in pool.scheduler.workers
        return answers

    answers = hurt.run(scene())
    assert [a.status_code for a in answers] == [200] * 20
    assert pool.scheduler.inside == 0
    assert "pennyweight_worker_deaths_total 1.0" in hurt("GET", "/metrics").text


def test_a_request_that_kills_workers_is_refused_as_poison_and_the_others_are_answered(hurt: Client) -> None:
    async def scene() -> list[httpx.Response]:
        await until(lambda: whole(hurt))
        asks = [{"user": DEADLY if k == 3 else 15, "items": [1, 2, 3], "tenant": "shop"} for k in range(16)]
        answers = await asyncio.gather(*(hurt.http.post("/score", json=ask) for ask in asks))
        await until(lambda: whole(hurt))
        return answers

    answers = hurt.run(scene())
    assert [a.status_code for a in answers] == [200] * 3 + [422] + [200] * 12
    error = answers[3].json()["error"]
    assert error["code"] == "poison" and "two workers" in error["message"] and "do not send it again" in error["remedy"]
    assert "pennyweight_poison_total 1.0" in hurt("GET", "/metrics").text


def test_a_model_that_fails_is_500_for_that_request_alone(hurt: Client, caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> list[httpx.Response]:
        users = [SLOW, SLOW, 15, BROKEN, 15]  # two hold the workers, so that three are joined
        tasks = []
        for user in users:
            tasks.append(asyncio.create_task(hurt.http.post("/score", json={"user": user, "items": [1], "tenant": "shop"})))
            await asyncio.sleep(0.05)
        return await asyncio.gather(*tasks)

    answers = hurt.run(scene())
    assert [a.status_code for a in answers] == [200, 200, 200, 500, 200]
    assert "secret" not in answers[3].text and len(hurt.service.engine.scheduler.workers) == 2
    assert "a secret of the model" in caplog.text


def test_a_client_that_leaves_is_forgotten(hurt: Client) -> None:
    pool = hurt.service.engine

    async def asked(user: int, leave: asyncio.Event) -> list[Any]:
        body = iter([{"type": "http.request", "body": b'{"user": %d, "items": [1], "tenant": "shop"}' % user}])
        sent: list[Any] = []

        async def receive() -> Any:
            message = next(body, None)
            if message is None:
                await leave.wait()
                return {"type": "http.disconnect"}
            return message

        async def send(message: Any) -> None:
            sent.append(message)

        await hurt.app({"type": "http", "method": "POST", "path": "/score", "query_string": b"", "headers": []}, receive, send)
        return sent

    async def scene() -> list[list[Any]]:
        leave, stay = asyncio.Event(), asyncio.Event()
        tasks = []
        for k, (user, event) in enumerate(((SLOW, stay), (SLOW, stay), (15, leave), (15, stay))):
            tasks.append(asyncio.create_task(asked(user, event)))
            await until(lambda k=k: pool.scheduler.inside == k + 1)  # type: ignore[misc]
        leave.set()
        await until(lambda: pool.scheduler.inside == 3)
        return await asyncio.gather(*tasks)

    sent = hurt.run(scene())
    assert sent[2] == [] and all(s[0]["status"] == 200 for s in (sent[0], sent[1], sent[3]))
    assert "pennyweight_clients_left_total 1.0" in hurt("GET", "/metrics").text


def test_a_worker_that_hangs_is_ended(hurt: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "STALL_S", 0.2)

    async def scene() -> httpx.Response:
        await until(lambda: whole(hurt))
        answer = await hurt.http.post("/score", json={"user": STUCK, "items": [1], "tenant": "shop"})
        await until(lambda: whole(hurt))
        return answer

    assert hurt.run(scene()).status_code == 422
    assert score(hurt, 15, [1]).status_code == 200


def test_a_bundle_that_cannot_be_served_says_so_and_leaves_no_process(frail: Frail, tmp_path: Path) -> None:
    folder = frail.save("unallowed", POLICY)
    with pytest.raises((BundleError, ConfigError), match="frail"):
        pooled_without_leave(folder, tmp_path / "log.db")


def pooled_without_leave(folder: Path, log: Path) -> None:
    from pennyweight.model.bundle import load
    from pennyweight.serve.metrics import Metrics

    async def start() -> None:
        pool = pools.Pool(folder, load(folder).policy, 1, Metrics(POLICY))
        try:
            await pool.start()
        finally:
            assert not pool.members

    asyncio.run(start())


# -- the memory between the processes --------------------------------------------------------------------------------------


def test_queries_and_answers_come_out_as_they_went_in() -> None:
    slot = Slot.made(64)
    queries = [
        Query(None, np.empty(0, np.int64)),
        Query("Ада", np.array([3, 4]), "similarity", hidden=np.array([9]), count=7, k=3),
        Query(-5, np.array([1]), items=np.array([5, 6, 7]), context={"age": 3, "tags": ["x"], "none": None}, start=0),
    ]
    parts = [(Packed.of(q), 0, None) for q in queries[:2]] + [(Packed.of(queries[2]), 1, 3)]
    at = write_queries(slot, parts)
    other = Slot(os.dup(slot.descriptor))
    found = read_queries(other, 3)
    for got, given in zip(found, queries, strict=True):
        assert (got.user, got.by, got.count, got.k, got.context) == (given.user, given.by, given.count, given.k, given.context)
        assert got.history.tolist() == given.history.tolist() and got.hidden.tolist() == given.hidden.tolist()
        assert (got.items is None) == (given.items is None)
    assert found[2].items is not None and found[2].items.tolist() == [5, 6, 7] and (found[2].start, found[2].stop) == (1, 3)
    answers = [
        Ranked(np.array([8, 2]), np.array([0.5, 0.25], np.float32)),
        ValueError("boom"),
        Ranked(np.array([6, 7]), np.array([1.5, math.pi], np.float32)),
    ]
    write_answers(other, at, found, answers)
    first, second, third = read_answers(slot, at, parts)
    assert isinstance(first, Ranked) and first.items.tolist() == [8, 2] and first.scores.tolist() == [0.5, 0.25]
    assert isinstance(second, RuntimeError) and "ValueError: boom" in str(second)
    assert isinstance(third, Ranked) and third.items.tolist() == [6, 7] and third.scores[1] == np.float32(math.pi)
    other.close()
    slot.close()


def test_a_slot_grows_for_a_batch_that_needs_it_and_the_worker_sees_that() -> None:
    slot = Slot.made(64)
    other = Slot(os.dup(slot.descriptor))
    query = Query(1, np.arange(1000), items=np.arange(5000))
    at = write_queries(slot, [(Packed.of(query), 0, None)])
    other.fit(slot.size)
    (found,) = read_queries(other, 1)
    assert found.history.sum() == 499_500 and len(found.items) == 5000  # type: ignore[arg-type]
    write_answers(other, at, [found], [Ranked(query.items, np.ones(5000, np.float32))])  # type: ignore[arg-type]
    (answer,) = read_answers(slot, at, [(Packed.of(query), 0, None)])
    assert isinstance(answer, Ranked) and answer.scores.sum() == 5000
    other.close()
    slot.close()


# -- binary bodies that lie ----------------------------------------------------------------------------------------------------

GOOD = binary.ask([1, 2, 50], user=15)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "begins with 16 bytes of head"),
        (b"PW01", "begins with 16 bytes"),
        (b"NOPE" + GOOD[4:], "begins with 16 bytes"),
        (GOOD[:-1], "its head says"),
        (GOOD + b"\0", "its head says"),
        (binary.HEAD.pack(b"PW01", 0, 2**32 - 1, 0), "its head says"),
        (binary.HEAD.pack(b"PW01", 2**32 - 1, 1, 0) + b"\0" * 8, "its head says"),
        (binary.HEAD.pack(b"PW01", 0, 0, 0), "no items"),
        (binary.HEAD.pack(b"PW01", 0, 1, 7) + b"\0" * 8, "must be 0"),
        (binary.HEAD.pack(b"PW01", 3, 1, 0) + b'{"u' + b"\0" * 8, "the JSON of the body"),
        (binary.HEAD.pack(b"PW01", 2, 1, 0) + b"\xff\xfe" + b"\0" * 8, "the JSON of the body"),
        (binary.ask([1], k=3), "unknown field `k`"),
        (binary.ask([1], deadline_ms=-1), "deadline_ms"),
    ],
)
def test_a_binary_body_that_lies_is_400(client: Any, body: bytes, says: str) -> None:
    answer = client("POST", "/score", content=body, headers={"content-type": binary.KIND})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


def test_a_binary_body_of_items_that_are_not_there_is_404(client: Any) -> None:
    answer = client("POST", "/score", content=binary.ask([1, 2**62]), headers={"content-type": binary.KIND})
    assert answer.status_code == 404 and str(2**62) in answer.json()["error"]["message"]


def test_a_binary_body_of_too_many_is_413(client: Any) -> None:
    answer = client("POST", "/score", content=binary.ask([1] * 10_001), headers={"content-type": binary.KIND})
    assert answer.status_code == 413


def test_binary_is_for_scores_alone(client: Any) -> None:
    answer = client("POST", "/recommend", content=GOOD, headers={"content-type": binary.KIND})
    assert answer.status_code == 400 and "not JSON" in answer.text


def test_statuses_have_a_code() -> None:
    from pennyweight.core import errors

    ours = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.RequestError)]
    assert {e.status for e in ours} <= set(reply.CODES)


def test_an_empty_bundle_argument_is_no_worker(cascade: Bundle) -> None:
    assert _devices(cascade)[0] == "cpu" and _devices(cascade)[1] >= 1
