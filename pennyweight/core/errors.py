"""Every error Pennyweight raises on purpose, on one page.

Each says what is wrong, with the name and the numbers, and what to do next. The command line prints the message and
exits with 2; the service answers it as JSON with the status given here. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

from typing import ClassVar


class PennyweightError(Exception):
    """Base of all errors a user can cause or meet; ``status`` is the HTTP status the service answers with."""

    status: ClassVar[int] = 400


class ConfigError(PennyweightError, ValueError):
    """A value, field or name in a configuration, plan or command is wrong; the message names its path."""


class DataError(PennyweightError, ValueError):
    """Data is missing, empty, of the wrong type or outside its vocabulary."""


class BundleError(PennyweightError, ValueError):
    """A bundle on disk is missing, truncated, corrupted or not ours."""


class PlanError(PennyweightError, ValueError):
    """A transform cannot be applied to this bundle, or would change nothing."""


class BudgetError(PennyweightError, ValueError):
    """A budget cannot be understood."""


class Infeasible(PennyweightError):
    """No plan meets the budget; ``frontier`` holds the trials that came nearest and ``missing`` what each lacked."""

    def __init__(self, message: str, frontier: tuple[object, ...] = (), missing: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.frontier = frontier
        self.missing = missing


class NotWorthIt(PennyweightError):
    """The model is so small or so dense that compressing it would not pay; the message says why."""


class DeviceError(PennyweightError, RuntimeError):
    """A device, engine or optional extra that was asked for is not there; the message names the remedy."""


class StorageError(PennyweightError, OSError):
    """A file could not be written (disk full, no permission); what was there before is untouched."""

    status: ClassVar[int] = 507


class RequestError(PennyweightError, ValueError):
    """A request to the service is malformed or outside its limits."""


class NotFound(RequestError):
    """The path, user or item asked for does not exist."""

    status: ClassVar[int] = 404


class TooLarge(RequestError):
    """The request holds more than the policy allows."""

    status: ClassVar[int] = 413


class Poison(RequestError):
    """Workers died with this request; it is not tried again."""

    status: ClassVar[int] = 422


class Conflict(RequestError):
    """What is asked for cannot be done beside, or to, what is there."""

    status: ClassVar[int] = 409


class Forbidden(RequestError):
    """Who asks may not."""

    status: ClassVar[int] = 403


class Overloaded(RequestError):
    """The queue is full, the deadline cannot be met or a quota is spent; try again after ``retry_after`` seconds."""

    status: ClassVar[int] = 429

    def __init__(self, message: str, retry_after: float = 1.0, reason: str = "") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reason = reason
        """``late``, ``full``, ``quota``, ``guard`` or ``swap``: what sheds are counted by."""
