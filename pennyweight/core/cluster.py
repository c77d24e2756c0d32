"""A connection to a Ray cluster, which training and serving place their processes on.

An address is ``ray://HOST:PORT`` (a client, also from far away), ``auto`` (this machine is part of a cluster) or ``local``,
which starts a cluster of this machine. Ray is an extra; whoever uses it connects here first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pennyweight.core.errors import ConfigError, DeviceError

QUIET = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_TRAIN_METRICS_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
TOKEN = Path.home() / ".ray" / "auth_token"
"""Where Ray keeps the token of a cluster."""


def check(address: str) -> None:
    """That a cluster is named as one can be.

    Raises:
        ConfigError: it is not.
    """
    if address not in ("auto", "local") and not address.startswith("ray://"):
        raise ConfigError(
            f"cluster {address!r} is not ray://HOST:PORT, auto (this machine is part of a cluster) or local (this one alone)"
        )


@contextlib.contextmanager
def connected(address: str, cpus: int) -> Iterator[Any]:
    """Ray, connected, in a ``with``; a cluster of this machine that ``local`` asks for has so many CPUs.

    Raises:
        ConfigError: no such kind of address, or Ray is missing.
        DeviceError: the cluster is not reached.
    """
    check(address)
    os.environ.update(QUIET)
    secured = os.environ.get("RAY_AUTH_TOKEN") or TOKEN.exists()
    if address.startswith("ray://") and secured:  # a client does not look for the token by itself
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "a Ray cluster needs Ray: pip install 'pennyweight[ray]', or 'pennyweight[ray-serve]' to serve"
        ) from error
    path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH", ""))))
    where: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False} if address == "local" else {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": QUIET | {"PYTHONPATH": path}}, **where)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, ImportError) as error:
        raise DeviceError(
            f"the Ray cluster at {address} is not reached ({str(error).splitlines()[0]}); look whether it runs, and whether "
            "this machine has its token (RAY_AUTH_TOKEN)"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
