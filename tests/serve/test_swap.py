"""Another bundle takes over while requests come, or does not; variants under load; requests cut over workers."""

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from pennyweight.core.curve import Curve
from pennyweight.core.errors import Conflict
from pennyweight.model.bundle import Policy, Priority, Variant, save
from pennyweight.serve import messages as m
from pennyweight.serve import shadow as shadows
from pennyweight.serve.shadow import Difference, Shadow, apart
from pennyweight.serve.worker import Query, Ranked
from tests.serve.conftest import Client, Frail, known, pooled

TOKEN = "a token"
POLICY = Policy(deadline_ms=600_000, variants=known("one"))
ENTITLED = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def service(frail: Frail, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = frail.save("one", POLICY)
    client = pooled(folder, tmp_path_factory.mktemp("swap") / "log.db", workers=1, token=TOKEN, spares=0)
    yield client
    client.close()


def swap(client: Client, bundle: str, **more: Any) -> httpx.Response:
    return client("POST", "/swap", json={"bundle": bundle, **more}, headers=ENTITLED)


def score(client: Client, *items: int) -> list[float]:
    scores: list[float] = client("POST", "/score", json={"user": 15, "items": items}).json()["scores"]
    return scores


def error(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()["error"]
    return f"{found['message']}; {found['remedy']}"


async def busy(client: Client, during: Callable[[], Any]) -> tuple[Any, list[httpx.Response]]:
    """Requests all the time, one after another on two connections, while something else is done."""
    done, answers = asyncio.Event(), list[httpx.Response]()

    async def ask() -> None:
        while not done.is_set():
            answers.append(await client.http.post("/score", json={"user": 15, "items": [1, 2, 50, 318]}))
            await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(ask()) for _ in range(2)]
    try:
        return await during(), answers
    finally:
        done.set()
        await asyncio.gather(*tasks)


def test_who_has_no_token_exchanges_nothing(service: Client) -> None:
    assert "not the service's token" in error(service("POST", "/swap", json={}), 403)
    assert "not the service's token" in error(
        service("POST", "/swap", json={}, headers={"authorization": "Bearer another"}), 403
    )


@pytest.mark.parametrize("name", ["../one", "..", "/etc", "a/b"])
def test_a_bundle_is_a_name_beside_the_served_one(service: Client, name: str) -> None:
    assert "no folder's name" in error(swap(service, name), 400)


def test_a_bundle_that_is_not_there_changes_nothing(service: Client) -> None:
    before = score(service, 1, 2, 50)
    assert "holds no bundle" in error(swap(service, "nowhere"), 409)
    assert score(service, 1, 2, 50) == before


def test_another_catalogue_is_refused(service: Client, frail: Frail) -> None:
    bundle = frail.bundle(POLICY)
    assert bundle.catalog is not None and bundle.catalog.items is not None
    fewer = bundle.replace(catalog=bundle.catalog.replace(items=bundle.catalog.items.head(50)))
    save(fewer, frail.folder / "fewer")
    assert "another catalogue" in error(swap(service, "fewer"), 409)


def test_other_classes_are_refused(service: Client, frail: Frail) -> None:
    frail.save("classes", Policy(classes=(Priority("new"),), variants=known("one")))
    assert "other classes or tenants" in error(swap(service, "classes"), 409)


def test_scores_that_differ_are_rolled_back_while_requests_go_on(service: Client, frail: Frail) -> None:
    frail.save("another", POLICY, modulus=89)
    before = score(service, 1, 2, 50, 318)

    async def during() -> httpx.Response:
        return await service.http.post("/swap", json={"bundle": "another", "requests": 8}, headers=ENTITLED)

    answer, answers = service.run(busy(service, during))
    assert "the scores differ by" in error(answer, 409)
    assert answers and all(a.status_code == 200 and a.json()["scores"] == before for a in answers)
    assert score(service, 1, 2, 50, 318) == before and len(service.service.engine.members) == 1


def test_a_bundle_that_fails_on_live_requests_is_rolled_back(service: Client, frail: Frail) -> None:
    """It loads and warms up well; a user who comes here breaks it."""
    bundle = frail.bundle(POLICY)
    fifteen = frail.catalog.vocabulary("user").id(15)
    args = {**bundle.model.spec.args, "users": (0, fifteen, 0, 0)}
    import dataclasses

    model = dataclasses.replace(bundle.model, spec=dataclasses.replace(bundle.model.spec, args=args))
    save(bundle.replace(model=model), frail.folder / "breaks")

    async def during() -> httpx.Response:
        return await service.http.post("/swap", json={"bundle": "breaks", "requests": 4}, headers=ENTITLED)

    answer, answers = service.run(busy(service, during))
    assert "could not score" in error(answer, 409)
    assert all(a.status_code == 200 for a in answers)


def test_an_exchange_is_let_go_when_the_service_stops(service: Client, frail: Frail) -> None:
    frail.save("never", POLICY)
    ours = service.service

    async def scene() -> httpx.Response:
        ask = {"bundle": "never", "seconds": 600}
        task = asyncio.create_task(service.http.post("/swap", json=ask, headers=ENTITLED))
        while ours._exchange is None or ours._exchange.done():
            await asyncio.sleep(0.01)
        ours.leave()
        return await task

    assert "the service is stopping" in error(service.run(scene()), 409)
    assert len(ours.engine.members) == 1 and score(service, 1)


def test_scores_that_agree_take_over_without_an_error(service: Client, frail: Frail) -> None:
    """Twice the scores and a thousandth more of the first: the order is the same within the tolerance."""
    frail.save("two", POLICY, scale=1.001)
    old = [m.process for m in service.service.engine.members]
    before = score(service, 1, 2, 50, 318)

    async def during() -> httpx.Response:
        first = service.http.post("/swap", json={"bundle": "two", "requests": 8, "tolerance": 0.05}, headers=ENTITLED)
        task = asyncio.create_task(first)
        await asyncio.sleep(0.1)
        second = await service.http.post("/swap", json={"bundle": "two"}, headers=ENTITLED)
        assert "another bundle is being loaded" in error(second, 409)
        return await task

    answer, answers = service.run(busy(service, during))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["bundle"] == "two" and body["compared"] == 8 and 0 < body["difference"] < 0.01
    assert answers and all(a.status_code == 200 for a in answers)
    after = score(service, 1, 2, 50, 318)
    assert after == pytest.approx([1.001 * s for s in before]) and after != before
    for process in old:
        assert process.wait(60) is not None
    text = service("GET", "/metrics").text
    assert 'pennyweight_swaps_total{outcome="done"} 1.0' in text and 'outcome="refused"' in text


def test_a_thread_of_the_service_is_not_exchanged(client: Any) -> None:
    with pytest.raises(Conflict, match="start the service with workers"):
        client.run(client.service.swap(m.Swap()))
    assert "started without one" in error(client("POST", "/swap", json={}), 403)


# -- variants, and requests in parts -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(frail: Frail, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Three variants, each ten times cheaper by their profiles; the cheapest is not proven."""
    curves = [Curve(0.1, 0.0, item_ms) for item_ms in (20.0, 2.0, 0.2)]
    variants = (
        Variant("full", costs={"cpu": curves[0]}),
        Variant("mid", "../mid", gap=0.005, costs={"cpu": curves[1]}),
        Variant("small", "../small", gap=0.03, within=False, costs={"cpu": curves[2]}),
    )
    policy = Policy(deadline_ms=60_000, variants=variants, classes=(Priority("page"), Priority("mail", degrade=True)))
    frail.save("mid", Policy(), scale=2.0)
    frail.save("small", Policy(), scale=3.0)
    folder = frail.save("full", policy, scale=1.0)
    client = pooled(folder, tmp_path_factory.mktemp("three") / "log.db", spares=0)
    yield client
    client.close()


def test_a_large_request_is_cut_over_idle_workers_and_joined(three: Client) -> None:
    """By its profile it takes 20 seconds, a third of its time."""
    items = three.service.catalog.vocabulary("item").decode(three.service.catalog.item_ids[:1000])
    body = three("POST", "/score", json={"user": 15, "items": items}).json()
    assert body["scores"] == (three.service.catalog.item_ids[:1000] % 97).tolist() and body["variant"] == "full"
    assert "pennyweight_batch_requests_count 2.0" in three("GET", "/metrics").text, "it was not cut"
    top = three("GET", "/recommend?user=15&k=9").json()
    scale = {"full": 1.0, "mid": 2.0}[top["variant"]]  # whether the full one is trusted with all items by now is the machine's
    best = sorted((scale * (three.service.catalog.item_ids % 97)).tolist(), reverse=True)[:9]
    assert [item["score"] for item in top["items"]] == best


def test_load_is_answered_by_cheaper_variants_and_the_unproven_one_only_where_that_is_allowed(three: Client) -> None:
    three.service.engine.scheduler.adopt(three.service.engine.edition.policy)  # what was learned is forgotten

    async def crowd() -> list[dict[str, Any]]:
        asks = [{"user": 15, "items": [1, 2, 50] * 60, "priority": "mail" if k % 2 else "page"} for k in range(60)]
        first = asyncio.create_task(three.http.post("/score", json=asks[0]))
        while not three.service.engine.scheduler.inside:  # it meets no crowd yet
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        rest = await asyncio.gather(*(three.http.post("/score", json=ask) for ask in asks[1:]))
        answers = [await first, *rest]
        assert all(a.status_code == 200 for a in answers), [a.text for a in answers if a.status_code != 200][:1]
        return [{**a.json(), "priority": ask["priority"]} for a, ask in zip(answers, asks, strict=True)]

    answers = three.run(crowd())
    scale, gap = {"full": 1.0, "mid": 2.0, "small": 3.0}, {"full": 0.0, "mid": 0.005, "small": 0.03}
    expected = three.service.lookup.ids([1, 2, 50]) % 97
    for answer in answers:
        assert answer["scores"][:3] == (scale[answer["variant"]] * expected).tolist()
        assert answer["gap"] == gap[answer["variant"]]
        assert answer["variant"] != "small" or answer["priority"] == "mail"
    assert len({a["variant"] for a in answers}) > 1


# -- what agreement is -----------------------------------------------------------------------------------------------------


def floats(*values: float) -> Any:
    return np.array(values, np.float32)


def test_a_shift_of_all_scores_is_no_difference() -> None:
    assert apart(floats(1, 2, 3), floats(11, 12, 13)) == 0
    assert apart(floats(1, 2, 3), floats(3, 2, 1)) == pytest.approx(2.0)
    assert apart(floats(1, 2, 3), floats(1, math.nan, 3)) == math.inf
    assert apart(floats(1, 1, 1), floats(1, 2, 3)) == math.inf and apart(floats(1, 1), floats(2, 2)) == 0


def test_the_median_decides_and_a_failure_always() -> None:
    assert Difference(3, 0.01, 5.0).within(0.1) and not Difference(3, 0.2, 5.0).within(0.1)
    assert not Difference(3, 0.0, 0.0, failed=1).within(math.inf) and Difference(0, 0.0, 0.0).within(0.0)


def test_a_shadow_scores_the_candidates_of_the_answer_and_stops_when_it_has_enough() -> None:
    asked: list[Any] = []

    async def score(query: Query, variant: str) -> Ranked:
        assert query.items is not None
        asked.append((query.items.tolist(), variant, query.k))
        return Ranked(query.items, floats(1, 2))

    async def scene() -> Difference:
        shadow = Shadow(score, 2)
        query = Query(1, np.empty(0, np.int64), k=2)
        shadow.feed(query, Ranked(np.array([7]), floats(1)), "one")  # one score has no order
        for _ in range(3):
            shadow.feed(query, Ranked(np.array([7, 9]), floats(3, 4)), "one")
        return await shadow.judged(10)

    assert asyncio.run(scene()) == Difference(2, 0.0, 0.0)
    assert asked == [([7, 9], "one", 0)] * 2


def test_a_bundle_that_hangs_is_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadows, "ANSWER_S", 0.01)

    async def hang(query: Query, variant: str) -> Ranked:
        await asyncio.sleep(3600)
        raise AssertionError

    async def scene() -> Difference:
        shadow = Shadow(hang, 1)
        shadow.feed(Query(1, np.empty(0, np.int64)), Ranked(np.array([7, 9]), floats(3, 4)), "one")
        return await shadow.judged(10)

    assert not asyncio.run(scene()).within(math.inf)


def test_a_shadow_without_traffic_does_not_wait_for_ever() -> None:
    async def never(query: Query, variant: str) -> Ranked:
        raise AssertionError

    assert asyncio.run(Shadow(never, 2).judged(0.01)) == Difference(0, 0.0, 0.0)
