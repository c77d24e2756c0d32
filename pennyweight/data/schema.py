"""What a row holds: columns with a role and a kind, and the vocabularies that turn values into ids.

A *role* says whom a column describes (user, item, context), or that it is the label or the time; a *kind* says how it is
fed to a model. Everything above reads this and nothing else: which columns are shared by a request's candidates, which
table a feature needs, how a history is built from events.

Ids: 0 is padding, 1 is out of vocabulary, known values start at 2. Hashed columns have no vocabulary: a value's id is
``2 + xxh3(value) % (size - 2)``.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pennyweight.core.errors import ConfigError

PAD, OOV, FIRST = 0, 1, 2

Role = Literal["user", "item", "context", "label", "time"]
Kind = Literal["categorical", "numeric", "sequence", "time"]


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a Dataset, as a model sees it."""

    name: str
    role: Role
    kind: Kind
    size: int = 0
    """Ids of a categorical or sequence column, the two reserved ones included; 0 for numbers. Classes of a label."""
    length: int = 0
    """Ids a row of a sequence holds (padded with 0), or numbers a row of a numeric vector holds; 0 for a scalar."""
    shares: str = ""
    """The column whose vocabulary (and table) this one uses; empty for its own. A user's history shares the item's."""
    hashed: bool = False
    """Ids come from a hash, not from a learned vocabulary."""

    def __post_init__(self) -> None:
        if self.kind in ("categorical", "sequence") and self.role != "label" and self.size < FIRST + 1:
            raise ConfigError(
                f"column {self.name!r}: size {self.size}, but {FIRST} ids are reserved; give at least {FIRST + 1}"
            )
        if self.kind == "sequence" and self.length < 1:
            raise ConfigError(f"column {self.name!r}: a sequence needs a length of at least 1, got {self.length}")

    @property
    def table(self) -> str:
        """The name of the embedding table this column looks up."""
        return self.shares or self.name


@dataclasses.dataclass(frozen=True)
class Schema:
    """The columns of a Dataset in order; vocabularies are kept beside it, since they can be large."""

    columns: tuple[Column, ...]

    def __post_init__(self) -> None:
        names = [c.name for c in self.columns]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise ConfigError(f"columns named twice: {', '.join(sorted(twice))}")
        for c in self.columns:
            if c.shares and c.shares not in names:
                raise ConfigError(f"column {c.name!r} shares the vocabulary of {c.shares!r}, which is not a column")

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise ConfigError(f"no column {name!r}; known: {', '.join(c.name for c in self.columns)}")

    def __contains__(self, name: object) -> bool:
        return any(c.name == name for c in self.columns)

    def role(self, *roles: Role) -> tuple[Column, ...]:
        """The columns of these roles, in order."""
        return tuple(c for c in self.columns if c.role in roles)

    @property
    def features(self) -> tuple[Column, ...]:
        """What a model may read: every column but label and time."""
        return self.role("user", "item", "context")

    @property
    def label(self) -> Column:
        """The one column of role ``label``."""
        return self._one("label")

    @property
    def user(self) -> Column:
        """The column that identifies the user: the first categorical user column."""
        return self._id("user")

    @property
    def item(self) -> Column:
        """The column that identifies the item: the first categorical item column."""
        return self._id("item")

    @property
    def history(self) -> Column | None:
        """The user's sequence of items, if there is one: a user sequence that shares the item's vocabulary."""
        items = [c.name for c in self.role("item") if c.kind == "categorical"]
        return next((c for c in self.role("user") if c.kind == "sequence" and c.shares in items[:1]), None)

    def _one(self, role: Role) -> Column:
        found = self.role(role)
        if len(found) != 1:
            raise ConfigError(f"expected one column of role {role!r}, found {len(found)}")
        return found[0]

    def _id(self, role: Role) -> Column:
        for column in self.role(role):
            if column.kind == "categorical":
                return column
        raise ConfigError(f"no categorical column of role {role!r}; a recommender needs one to name the {role}")
