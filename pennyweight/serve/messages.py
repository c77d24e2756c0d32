"""What goes over the wire: one struct a body, read strictly.

These structs are all there is: bodies and query strings are decoded into them, the OpenAPI document is generated from
them, so neither can say what the other does not. An unknown field, a wrong type or a number out of range is refused with
its path by msgspec, in C. Pydantic with FastAPI is the known way to the same; it costs ten times the decoding time and
coerces, so that ``"k": "5"`` would pass in JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Scheduled(Struct, forbid_unknown_fields=True, kw_only=True):
    """How a request wants to be scheduled; headers (x-priority, x-tenant, x-deadline-ms, x-degrade) say the same."""

    priority: Annotated[str, Meta(max_length=256, description="Its class, of the policy's; the first one if left out.")] = ""
    tenant: Annotated[str, Meta(max_length=256, description="Whose quota it is charged to.")] = ""
    deadline_ms: Annotated[
        Annotated[float, Meta(gt=0)] | None, Meta(description="Milliseconds it is given, at most what its class has.")
    ] = None
    degrade: Annotated[
        bool | None,
        Meta(description="Whether variants not proven within the margin may answer; by default as its class says."),
    ] = None


class Recommend(Scheduled, forbid_unknown_fields=True, kw_only=True):
    """Ask for the top k items of the whole catalogue."""

    user: Annotated[
        Id | None, Meta(description="The user as named in the data; one the model has not met is answered too.")
    ] = None
    liked: Liked = []
    k: K = 10
    exclude_seen: Annotated[bool, Meta(description="Leave out what the user has seen and what liked names.")] = True
    context: Context = {}


class Asking(Scheduled, forbid_unknown_fields=True, kw_only=True):
    """For whom items are scored."""

    user: Id | None = None
    liked: Liked = []
    context: Context = {}


class Score(Asking, forbid_unknown_fields=True, kw_only=True):
    """Ask for the score of these items for one person."""

    items: Annotated[list[Id], Meta(min_length=1, description="Ids of the candidates; their number is limited by the policy.")]


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
    variant: Annotated[str, Meta(description="The model that answered, of those that may; empty where there is one.")] = ""
    gap: Annotated[float, Meta(description="What it loses at most against the best, in the policy's metric, as proven.")] = 0.0


class Scores(Struct):
    """Scores in the order of the request's items."""

    user: str | int | None
    known: bool
    scores: Sequence[float]
    """A list, or an array of NumPy's."""
    variant: str = ""
    gap: float = 0.0


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
    variants: list[str] = []
    workers: Annotated[int, Meta(description="Processes that score and are there; 0 where the service's own does.")] = 0


class Swap(Struct, forbid_unknown_fields=True):
    """Serve what the bundle's folder holds now, or another bundle beside it."""

    bundle: Annotated[
        str, Meta(max_length=256, description="A folder's name beside the served one; empty is the same folder.")
    ] = ""
    tolerance: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(description="Largest difference of scores, over their deviation, that is agreement; null takes any numbers."),
    ] = 0.1
    requests: Annotated[int, Meta(ge=0, le=10_000, description="Live requests scored by both.")] = 32
    seconds: Annotated[float, Meta(ge=0, le=600, description="How long to wait for those; what came by then decides.")] = 10.0


class Swapped(Struct):
    """The other bundle serves now."""

    bundle: str
    compared: int
    difference: Annotated[float, Meta(description="Median over the requests compared.")]


class Problem(Struct, omit_defaults=True):
    """Why there is no answer."""

    status: int
    code: str
    message: str
    remedy: str = ""


class Failure(Struct):
    """The body of every answer that is not a success."""

    error: Problem
