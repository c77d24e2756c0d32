"""Asks a service whatever its OpenAPI description allows, and more, and looks for an answer of 500 or above (``make fuzz``).

Schemathesis has an environment of its own, since what it needs meets our pins. The bundle is a small net with random weights:
what is asked for is the service's manners, not its taste. ``/swap`` is left out, which may wait for minutes as it is told to.
"""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.load import Process
from pennyweight.data.sample import prepare
from pennyweight.model.bundle import save
from pennyweight.model.ranking import DNN
from pennyweight.model.spec import spec_of
from tests.conftest import initialized


def main(schemathesis: str, *options: str) -> int:
    """The exit status of Schemathesis."""
    with tempfile.TemporaryDirectory() as place:
        data = prepare(Path(place) / "data")
        bundle = initialized(spec_of(DNN, columns=data.schema.columns, dim=4, hidden=(8,), norm=False), data)
        folder = save(bundle, Path(place) / "bundle")
        serve = [sys.executable, "-m", "pennyweight", "serve", str(folder), "--port", "0", "--workers", "1", "--spares", "0"]
        with Process(serve) as service:
            url = f"http://{service.host}:{service.port}/openapi.json"
            ask = [
                str(Path(schemathesis).absolute()),
                "run",
                url,
                "--checks",
                "not_a_server_error",
                "--exclude-path",
                "/swap",
                "--seed",
                "1",
            ]
            found = subprocess.run([*ask, *options], check=False, cwd=place).returncode
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(60) == 0, "the service did not stop well"
        return found


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
