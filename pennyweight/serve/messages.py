"""What goes over the wire: one struct a body, read strictly.

These structs are all there is: bodies and query strings are decoded into them, the OpenAPI document is generated from
them, so neither can say what the other does not. An unknown field, a wrong type or a number out of range is refused with
its path by msgspec, in C. Pydantic with FastAPI is the known way to the same; it costs ten times the decoding time and
coerces, so that ``"k": "5"`` would pass in JSON.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

Id = Annotated[str, Meta(min_length=1, max_length=256)] | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Time = Annotated[int, Meta(ge=0, le=2**40)]
K = Annotated[int, Meta(ge=1, le=1000, description="How many to answer with at most.")]
Context = Annotated[
    dict[str, Any], Meta(description="Values of the model's user and context columns by name; what is left out is unknown.")
]
Liked = Annotated[
    list[Id],
    Meta(
        max_length=1000, description="Ids or titles of items this person likes, oldest first, after what is stored of the user."
    ),
]


class Recommend(Struct, forbid_unknown_fields=True):
    """Ask for the top k items of the whole catalogue."""

    user: Annotated[
        Id | None, Meta(description="The user as named in the data; one the model has not met is answered too.")
    ] = None
    liked: Liked = []
    k: K = 10
    exclude_seen: Annotated[bool, Meta(description="Leave out what the user has seen and what liked names.")] = True
    context: Context = {}


class Score(Struct, forbid_unknown_fields=True):
    """Ask for the score of these items for one person."""

    items: Annotated[list[Id], Meta(min_length=1, description="Ids of the candidates; their number is limited by the policy.")]
    user: Id | None = None
    liked: Liked = []
    context: Context = {}


class Event(Struct, forbid_unknown_fields=True):
    """Something a user did."""

    user: Id
    item: Annotated[Id, Meta(description="An item's id.")]
    kind: Annotated[
        Literal["like", "dislike", "view", "rating"],
        Meta(description="What happened; a view is no opinion, a rating has a value."),
    ] = "like"
    value: Annotated[float | None, Meta(description="The stars of a rating.")] = None
    id: Annotated[
        str, Meta(max_length=256, description="Sent twice, an event is stored once; without an id each sending is a new event.")
    ] = ""
    time: Annotated[Time | None, Meta(description="Seconds since 1970; now if left out.")] = None


class Search(Struct, forbid_unknown_fields=True):
    """Look something up by a part of its name."""

    q: Annotated[str, Meta(max_length=256, description="Part of a title or of a user's id; empty for the most frequent.")] = ""
    k: K = 10


class Nothing(Struct, forbid_unknown_fields=True):
    """A request that takes no parameters."""


class Item(Struct):
    """An item as shown."""

    id: str | int
    title: str
    year: int | None
    genres: list[str]


class Scored(Item):
    """An item with its score."""

    score: Annotated[
        float, Meta(description="Comparable within one answer only; higher is better. For by=model, the model's logit.")
    ]


class Recommendations(Struct):
    """The top k, best first."""

    user: str | int | None
    known: Annotated[bool, Meta(description="Whether the model was trained on this user.")]
    by: Annotated[
        str,
        Meta(description="model; for somebody it can say nothing about, similarity (to what was liked) or popularity."),
    ]
    history: Annotated[list[Item], Meta(description="What the answer is based on: the last ten liked items, newest first.")]
    items: list[Scored]


class Scores(Struct):
    """Scores in the order of the request's items."""

    user: str | int | None
    known: bool
    scores: list[float]


class Stored(Struct):
    """What became of the events; they are on disk by the time of this answer."""

    stored: int
    duplicates: Annotated[int, Meta(description="Those whose id was stored before.")]


class Items(Struct):
    """Items found, best match first, the more popular first among equals."""

    items: list[Item]


class User(Struct):
    """A user found."""

    id: str | int
    known: bool


class Users(Struct):
    """Users found, best match first."""

    users: list[User]


class Health(Struct):
    """The service answers, and what it serves."""

    status: str
    model: str
    items: int
    bytes: int
    engine: str
    version: str


class Problem(Struct, omit_defaults=True):
    """Why there is no answer."""

    status: int
    code: str
    message: str
    remedy: str = ""


class Failure(Struct):
    """The body of every answer that is not a success."""

    error: Problem
