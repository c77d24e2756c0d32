"""Several machines under Ray Serve: which replica a request goes to; where Ray Serve is not installed, what the error says."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pennyweight.core.errors import ConfigError
from pennyweight.model.bundle import Bundle, save
from pennyweight.serve import replicas

THERE = find_spec("ray") is not None and find_spec("starlette") is not None and find_spec("fastapi") is not None
needs_serve = pytest.mark.skipif(not THERE, reason="no Ray Serve here: pip install 'pennyweight[ray-serve]'")


def replica(name: str, inside: float, answer: float, count: int = 1) -> Any:
    return SimpleNamespace(replica_id=name, routing_stats={"inside_s": inside, "answer_s": answer, "count": count})


@needs_serve
def test_the_quickest_that_is_not_hot_comes_first_and_grows_by_what_it_is_sent() -> None:
    router = object.__new__(replicas.Balanced)
    router.initialize_state(seed=1)
    slow, busy, free = replica("slow", 0.0, 0.09), replica("busy", 0.5, 0.53), replica("free", 0.0, 0.03)

    def chosen(*replicas: Any) -> str:
        ranks = asyncio.run(router.choose_replicas(list(replicas)))
        assert sorted(r.replica_id for rank in ranks for r in rank) == sorted(r.replica_id for r in replicas)
        assert len(ranks[0]) == 1
        return str(ranks[0][0].replica_id)

    sent = [chosen(slow, busy, free) for _ in range(4)]
    assert sent[0] == "free" and "slow" in sent and "busy" not in sent, "until told otherwise, each request is work"
    assert chosen(slow, busy, replica("free", 0.0, 0.03, count=2)) == "free"
    assert chosen(slow) == "slow" and asyncio.run(router.choose_replicas([])) == []
    assert chosen(SimpleNamespace(replica_id="new", routing_stats={})) == "new"


@needs_serve
@pytest.mark.slow
def test_two_replicas_answer_over_http_until_ctrl_c(cascade: Bundle, tmp_path: Path) -> None:
    bundle = save(cascade, tmp_path / "bundle")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", str(bundle), "--cluster", "local", "--workers", "2", "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", "pennyweight", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "replicas on" in line)
        assert f"http://127.0.0.1:{port}" in line
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            assert json.load(answer)["status"] == "ok"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def test_without_ray_serve_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="pennyweight"):
        replicas.run("bundle", "local")
