import json
from typing import Any

import pytest

from pennyweight.serve.app import ROUTES
from pennyweight.serve.openapi import document


@pytest.fixture(scope="module")
def api() -> dict[str, Any]:
    return document(ROUTES, "1.2.3")


def test_holds_every_route_and_nothing_else(api: dict[str, Any]) -> None:
    assert {(m.upper(), p) for p, methods in api["paths"].items() for m in methods} == {(r.method, r.path) for r in ROUTES}
    assert api["info"]["version"] == "1.2.3" and api["openapi"] == "3.1.0"


def test_every_reference_leads_somewhere(api: dict[str, Any]) -> None:
    text = json.dumps(api)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(api["components"]["schemas"])
    assert {"Recommend", "Scored", "Event", "Failure", "Problem"} <= names | set(api["components"]["schemas"])


def test_says_what_is_required_and_within_which_limits(api: dict[str, Any]) -> None:
    schemas = api["components"]["schemas"]
    assert schemas["Event"]["required"] == ["user", "item"] and schemas["Event"]["additionalProperties"] is False
    k = next(p for p in api["paths"]["/recommend"]["get"]["parameters"] if p["name"] == "k")
    assert (k["schema"]["minimum"], k["schema"]["maximum"], k["schema"]["default"], k["required"]) == (1, 1000, 10, False)
    assert "context" not in [p["name"] for p in api["paths"]["/recommend"]["get"]["parameters"]]


def test_is_served(client: Any, api: dict[str, Any]) -> None:
    assert client("GET", "/openapi.json").json()["paths"] == api["paths"]
