"""Frozen dataclasses to JSON and back, strictly: the one codec of plans, specs, manifests and results.

``encode`` gives plain JSON values; ``decode`` checks them against the type hints and refuses an unknown field, a missing
one or a wrong type with its path and the known names. msgspec and pydantic were tried first: the former drops unknown
fields of a dataclass silently, the latter coerces strings to numbers, and neither lists the names it would have taken,
which is what somebody who mistyped a plan needs to read.

A class hierarchy is written with a tag: ``tagged(Base, "transform")`` makes ``{"transform": "quantize", ...}`` from a
registered subclass, so one list can hold values of many classes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import tempfile
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pennyweight.core.errors import ConfigError, StorageError

T = TypeVar("T")
C = TypeVar("C", bound=type)

_FAMILIES: dict[type, tuple[str, dict[str, type]]] = {}


def family(tag: str) -> Callable[[C], C]:
    """Class decorator: values of this base class are written with ``tag`` naming their registered subclass."""

    def mark(base: C) -> C:
        _FAMILIES[base] = (tag, {})
        return base

    return mark


def named(name: str) -> Callable[[C], C]:
    """Class decorator: register a frozen dataclass under ``name`` in the family its bases belong to."""

    def mark(cls: C) -> C:
        base = _base(cls)
        if base is None:
            raise TypeError(f"{cls.__name__} belongs to no family")
        _FAMILIES[base][1][name] = cls
        cls.__config_name__ = name  # type: ignore[attr-defined]
        return cls

    return mark


def members(base: type) -> Mapping[str, type]:
    """The registered subclasses of a family by name."""
    return dict(_FAMILIES[base][1])


def _base(cls: type) -> type | None:
    return next((b for b in cls.__mro__ if b in _FAMILIES), None)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def encode(value: Any, *, slim: bool = False) -> Any:
    """Plain JSON values (dict, list, str, int, float, bool, None) from dataclasses, tuples and mappings.

    ``slim`` leaves out fields that have their default: what is shipped, as no reader needs them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if not (slim and _usual(f, value))}
        out = {name: encode(v, slim=slim) for name, v in given.items()}
        base = _base(type(value))
        return {_FAMILIES[base][0]: type(value).__config_name__, **out} if base else out  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        return {str(k): encode(v, slim=slim) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v, slim=slim) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{value} cannot be written as JSON; only finite numbers can")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ConfigError(f"a {type(value).__name__} cannot be written as JSON: {value!r}")


def _usual(field: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a field has its default."""
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return bool(getattr(value, field.name) == made)


def decode(hint: Any, value: Any, path: str = "$") -> Any:
    """A value of type ``hint`` from plain JSON values.

    Raises:
        ConfigError: an unknown or missing field, an unknown name, or a wrong type; the message holds the path.
    """
    if hint is Any:
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _decode_union(args, value, path)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{path}: {value!r} is not one of {', '.join(map(repr, args))}")
    if origin in (tuple, list):
        return _decode_sequence(origin, args, value, path)
    if origin is not None and issubclass(origin, Mapping):
        _expect(isinstance(value, Mapping), path, "an object", value)
        return {k: decode(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if isinstance(hint, type) and (base := _base(hint)) is not None:
        return _decode_member(base, hint, value, path)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else _decode_fields(hint, value, path)
    return _decode_scalar(hint, value, path)


def _decode_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    faults = []
    for arg in (a for a in args if a is not type(None)):
        try:
            return decode(arg, value, path)
        except ConfigError as error:
            faults.append(str(error))
    raise ConfigError("; or ".join(faults))


def _decode_sequence(origin: type, args: tuple[Any, ...], value: Any, path: str) -> Any:
    _expect(isinstance(value, (list, tuple)), path, "a list", value)
    if origin is list or (len(args) == 2 and args[1] is Ellipsis):
        return origin(decode(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    _expect(len(value) == len(args), path, f"a list of {len(args)}", value)
    return tuple(decode(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


def _decode_member(base: type, hint: type, value: Any, path: str) -> Any:
    """A member of a family, of the class ``hint``: its base, or one of them."""
    if isinstance(value, hint):
        return value
    tag, known = _FAMILIES[base]
    _expect(isinstance(value, Mapping), path, f"an object with a {tag!r}", value)
    name = value.get(tag)
    if name not in known:
        raise ConfigError(f"{path}.{tag}: unknown {tag} {name!r}; known: {', '.join(sorted(known))}")
    _expect(issubclass(known[name], hint), f"{path}.{tag}", repr(getattr(hint, "__config_name__", tag)), name)
    return _decode_fields(known[name], {k: v for k, v in value.items() if k != tag}, path)


def _decode_fields(cls: Any, value: Any, path: str) -> Any:
    _expect(isinstance(value, Mapping), path, f"an object ({cls.__name__})", value)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in value:
        if key not in fields:
            raise ConfigError(f"{path}.{key}: unknown field of {cls.__name__}; known: {', '.join(fields) or 'none'}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{path}.{name}: missing; {cls.__name__} needs it")
    hints = _hints(cls)
    found = {k: decode(hints[k], v, f"{path}.{k}") for k, v in value.items()}
    try:
        return cls(**found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _decode_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool):
        right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
        _expect(right, path, {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint], value)
        return value
    if hint is type(None):
        _expect(value is None, path, "null", value)
        return None
    if hint in (dict, list, tuple):
        _expect(isinstance(value, (dict, list, tuple)), path, hint.__name__, value)
        return value
    raise TypeError(f"{path}: no codec for {hint!r}")


def _expect(right: bool, path: str, wanted: str, value: Any) -> None:
    if not right:
        raise ConfigError(f"{path}: expected {wanted}, got {value!r}")


def dumps(value: Any) -> str:
    """JSON text of a value, the same text every time (sorted keys, two spaces, a final newline)."""
    return json.dumps(encode(value), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def loads(hint: Any, text: str | bytes, name: str = "$") -> Any:
    """A value of type ``hint`` from JSON text; ``name`` stands in messages for where the text came from."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: not JSON ({error})") from error
    return decode(hint, value, name)


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file whole or not at all: a temporary neighbour, flushed to disk, then renamed over ``path``.

    Raises:
        StorageError: the disk is full or the folder not writable; an older file stays as it was.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files for their owner alone
        os.replace(temporary, target)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise StorageError(f"could not write {target}: {error.strerror}; free some room or name another folder") from error
