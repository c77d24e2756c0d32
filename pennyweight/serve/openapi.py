"""The OpenAPI document, generated from the routes and their structs.

Written by hand it would drift from what the service takes; generated, the only thing that can be wrong is a sentence.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec

from pennyweight.serve.binary import KIND
from pennyweight.serve.messages import Failure, Item, Problem

ABOUT = (
    "Recommendations by a Pennyweight bundle. Every answer that is not a success has the same body: "
    '{"error": {"status", "code", "message", "remedy"}}.'
)


Codec = tuple[Callable[[bytes], Any], Callable[[Any], bytes]]


@dataclasses.dataclass(frozen=True)
class Route:
    """One operation: what it takes (the query of a GET, the JSON of a POST), what it gives, and who answers."""

    method: str
    path: str
    summary: str
    takes: Any
    gives: Any
    """None for an answer that is no JSON message."""
    answer: Callable[[Any, Any], Awaitable[Any]]
    """Takes the service and the message."""
    packed: Codec | None = None
    """How a binary body becomes the message, and the answer a binary body; None where there is JSON alone."""


def document(routes: Iterable[Route], version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these routes, as plain JSON values."""
    routes = list(routes)
    kinds = [
        *dict.fromkeys(r.takes for r in routes),
        *dict.fromkeys(r.gives for r in routes if r.gives),
        Failure,
        Item,
        Problem,
    ]
    references, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(map(id, kinds), references, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas, components)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pennyweight", "version": version, "description": ABOUT},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(route: Route, schemas: dict[int, Any], components: dict[str, Any]) -> dict[str, Any]:
    media = {"application/json": {"schema": schemas[id(route.gives)]}} if route.gives else {"text/plain": {}}
    failure = {"application/json": {"schema": schemas[id(Failure)]}}
    taken: dict[str, Any] = {}
    if route.method == "POST":
        binary = {KIND: {"schema": {"type": "string", "format": "binary"}}} if route.packed else {}
        taken["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schemas[id(route.takes)]}, **binary},
        }
    elif parameters := _parameters(components[route.takes.__name__]):
        taken["parameters"] = parameters
    return {
        "summary": route.summary,
        **taken,
        "responses": {
            "200": {"description": inspect.getdoc(route.gives) or "" if route.gives else "Text.", "content": media},
            "default": {"description": "Any failure.", "content": failure},
        },
    }


def _parameters(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of a struct as query parameters; an object does not fit into a query string."""
    return [
        {
            "name": name,
            "in": "query",
            "required": name in schema["required"],
            "description": field.get("description", ""),
            "schema": {k: v for k, v in field.items() if k != "description"},
        }
        for name, field in schema["properties"].items()
        if field.get("type") != "object"
    ]
