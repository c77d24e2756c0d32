"""What is answered, against the model asked directly."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pennyweight.accelerate.runner import Runner
from pennyweight.data.dataset import Dataset
from pennyweight.model.bundle import Bundle, Policy
from pennyweight.model.ranking import DNN
from pennyweight.model.retrieval import MatrixFactorization
from pennyweight.model.spec import Model, build, spec_of

Serve = Callable[[Bundle], Any]


def names(answer: Any) -> list[Any]:
    return [item["id"] for item in answer.json()["items"]]


def like(client: Any, user: Any, *items: Any, **more: Any) -> Any:
    return client("POST", "/events", json=[{"user": user, "item": item, **more} for item in items]).json()


def test_scores_are_the_models_in_the_order_asked(client: Any, cascade: Bundle) -> None:
    like(client, 15, 318, 296)
    assert cascade.catalog is not None
    ids = cascade.catalog.vocabulary("item").encode([1, 2, 50, 1])
    batch = cascade.catalog.request(15, cascade.catalog.vocabulary("item").encode([318, 296]), ids)
    answer = client("POST", "/score", json={"user": 15, "items": [1, "2", 50, 1]}).json()
    assert answer["known"] is True
    assert np.allclose(answer["scores"], Runner(cascade).score(batch), atol=1e-6)


def test_the_top_k_are_the_best_of_what_retrieval_found(client: Any) -> None:
    answer = client("GET", "/recommend?user=15&k=7")
    body = answer.json()
    assert (body["user"], body["known"], body["by"]) == ("15", True, "model")
    shown = [item["score"] for item in body["items"]]
    assert len(shown) == 7 and shown == sorted(shown, reverse=True)
    assert set(body["items"][0]) == {"id", "title", "year", "genres", "score"}
    assert np.allclose(client("POST", "/score", json={"user": 15, "items": names(answer)}).json()["scores"], shown, atol=1e-6)
    assert names(client("POST", "/recommend", json={"user": 15, "k": 7})) == names(answer)


def test_what_a_user_did_changes_the_next_answer(client: Any) -> None:
    before = names(client("GET", "/recommend?user=15"))
    assert like(client, 15, before[0], id="click-1") == {"stored": 1, "duplicates": 0}
    answer = client("GET", "/recommend?user=15")
    after = names(answer)
    assert before[0] not in after
    assert after[:9] != before[1:], "the history must reach the model, not only the filter"
    assert [item["id"] for item in answer.json()["history"]] == [before[0]]


def test_an_event_sent_twice_counts_once(client: Any) -> None:
    event = {"user": "u", "item": 318, "id": "once"}
    assert client("POST", "/events", json=event).json() == {"stored": 1, "duplicates": 0}
    assert client("POST", "/events", json=event).json() == {"stored": 0, "duplicates": 1}
    assert client("POST", "/events", json=[event, event | {"id": "twice"}]).json() == {"stored": 1, "duplicates": 1}


def test_events_without_an_id_are_each_new(client: Any) -> None:
    assert like(client, "u", 318)["stored"] == like(client, "u", 318)["stored"] == 1


def test_a_list_with_one_unknown_item_stores_nothing(client: Any) -> None:
    assert client("POST", "/events", json=[{"user": "u", "item": 318}, {"user": "u", "item": -5}]).status_code == 404
    assert client("GET", "/recommend?user=u").json()["history"] == []


def test_only_likes_are_history_and_everything_is_seen(client: Any) -> None:
    like(client, "u", 1, kind="view")
    like(client, "u", 318, kind="rating", value=5)
    like(client, "u", 296, kind="rating", value=2)
    like(client, "u", 356, kind="dislike")
    body = client("GET", "/recommend?user=u&k=1000").json()
    assert [item["id"] for item in body["history"]] == [318]
    assert not {1, 318, 296, 356} & {item["id"] for item in body["items"]}


def test_seen_items_come_back_when_asked_for(client: Any) -> None:
    best = names(client("GET", "/recommend?user=15"))[0]
    like(client, 15, best, kind="view")
    assert best not in names(client("GET", "/recommend?user=15&k=1000"))
    assert best in names(client("GET", "/recommend?user=15&k=1000&exclude_seen=false"))


def test_likes_of_nobody_are_by_the_model_and_not_recommended_back(client: Any) -> None:
    answer = client("GET", "/recommend?liked=318&liked=Heat+(1995)&liked=toy%20story&k=20")
    body = answer.json()
    assert (body["user"], body["known"], body["by"]) == (None, False, "model")
    assert [item["title"] for item in body["history"]] == ["Toy Story", "Heat", "Shawshank Redemption, The"]
    assert not {1, 6, 318} & set(names(answer))
    assert names(answer) != names(client("GET", "/recommend?liked=260&k=20"))


def test_likes_come_after_what_is_stored_of_the_user(client: Any) -> None:
    like(client, 15, 318)
    body = client("GET", "/recommend?user=15&liked=296").json()
    assert [item["id"] for item in body["history"]] == [296, 318]


def test_an_unknown_user_gets_what_is_popular_then_what_fits_their_likes(client: Any, movies: Dataset) -> None:
    body = client("GET", "/recommend?user=somebody+new&k=3").json()
    assert (body["known"], body["by"]) == (False, "popularity")
    counts = np.sort(movies.catalog.popularity)[::-1]
    assert [item["score"] for item in body["items"]] == counts[:3].tolist()
    like(client, "somebody new", body["items"][0]["id"])
    after = client("GET", "/recommend?user=somebody+new&k=3").json()
    assert (after["known"], after["by"]) == (False, "model")


def test_a_number_and_its_text_are_one_user(client: Any) -> None:
    like(client, 15, 318)
    number, text = (client("POST", "/recommend", json={"user": user}).json() for user in (15, "15"))
    assert number["history"] == text["history"] != []
    assert number["items"] == text["items"]


def test_more_than_there_is_gives_all_there_is(serve: Serve, cascade: Bundle) -> None:
    assert cascade.catalog is not None and cascade.catalog.items is not None
    small = cascade.replace(catalog=cascade.catalog.replace(items=cascade.catalog.items.head(12)))
    client = serve(small)
    everything = names(client("GET", "/recommend?user=15&k=50"))
    assert len(everything) == 12
    for item in everything:
        like(client, 15, item)
    assert names(client("GET", "/recommend?user=15&k=50")) == []


def test_a_model_without_histories_answers_strangers_by_similarity(serve: Serve, movies: Dataset) -> None:
    spec = spec_of(MatrixFactorization, columns=movies.schema.columns, dim=8)
    schema = movies.schema
    without = type(schema)(tuple(c for c in schema.columns if c.name != "history"))
    client = serve(Bundle(Model.of(build(spec), spec), movies.catalog.replace(schema=without)))
    assert client("GET", "/recommend?user=15").json()["by"] == "model"
    answer = client("GET", "/recommend?liked=318")
    assert answer.json()["by"] == "similarity"
    assert 318 not in names(answer)
    assert client("GET", "/recommend?liked=318&exclude_seen=false").json()["items"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert client("GET", "/recommend?user=stranger").json()["by"] == "popularity"


def test_a_model_that_only_ranks_scores_everything(serve: Serve, movies: Dataset) -> None:
    spec = spec_of(DNN, columns=movies.schema.columns, dim=4, hidden=(8,), norm=False)
    client = serve(Bundle(Model.of(build(spec).eval(), spec), movies.catalog))
    values = movies.catalog.vocabulary("item").decode(movies.catalog.item_ids)
    scores = np.array(client("POST", "/score", json={"user": 15, "items": values}).json()["scores"])
    best = [item["score"] for item in client("GET", "/recommend?user=15&k=5").json()["items"]]
    assert np.allclose(best, np.sort(scores)[::-1][:5], atol=1e-6)


def test_requests_that_are_joined_get_the_answers_of_those_alone(serve: Serve, cascade: Bundle) -> None:
    paths = [*(f"/recommend?user={u}&k=9" for u in (1, 15, 30, "nobody")), "/recommend?liked=318", "/recommend?liked=1&k=3"]
    alone = serve(cascade)
    want = [names(alone("GET", path)) for path in paths]
    joined = serve(cascade.replace(policy=Policy(batch=32, wait_ms=50)))

    async def together() -> list[Any]:
        return await asyncio.gather(*(joined.http.get(path) for path in paths))

    assert [names(answer) for answer in joined.run(together())] == want
    assert 'pennyweight_batch_requests_bucket{le="4.0"} 0.0' in joined("GET", "/metrics").text


def test_items_and_users_are_found(client: Any) -> None:
    assert [i["title"] for i in client("GET", "/items?q=toy+st").json()["items"]] == ["Toy Story", "Toy Story 2", "Toy Story 3"]
    assert len(client("GET", "/items?k=4").json()["items"]) == 4
    like(client, "15 and more", 318)
    users = client("GET", "/users?q=15&k=1000").json()["users"]
    assert users[0] == {"id": 15, "known": True}
    assert {"id": "15 and more", "known": False} in users


def test_health_says_what_is_served(client: Any, cascade: Bundle) -> None:
    body = client("GET", "/health").json()
    assert (body["status"], body["model"], body["engine"], body["bytes"]) == ("ok", "Cascade", "eager", cascade.bytes)
