"""Builds the Dockerfile and asks what it serves, on a machine without a container engine (``make image-check``).

A container engine needs a daemon, and a base image needs a registry. buildah needs neither: with chroot isolation it runs a
Dockerfile's own steps (stages, arguments, ``.dockerignore``, ``COPY --from``, ``USER``) in an ordinary root folder, as root.
The base comes from debootstrap: a fresh Debian of the suite that the Dockerfile's base is tagged with, and Debian's own
Python of the same minor version. A parser of our own would check what we think a Dockerfile says.

The image is then used as an engine would: its command, as its user, healthy by its own health check, asked over HTTP, ended
by its stop signal. What the stand-in cannot show is in docs/deploy.md: the registry's base, a read-only root, cgroups, CUDA.

pip reaches whatever the pip of this machine reaches: its settings, and the local folders they name, are lent to the build and
are in no layer. All of it lies in one temporary folder (some GB) and happens in namespaces of its own for processes and
mounts, so that nothing is left at work or mounted, whatever happens.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).parents[1]
BASE, IMAGE = "localhost/base", "localhost/pennyweight"
START_S, STOP_S = 120, 40
"""Seconds the service has to become healthy, and to stop."""
ASKED = "/recommend?user=1&k=3"


class Builder:
    """buildah with its store in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = f'[storage]\ndriver = "overlay"\nrunroot = "{folder}/run"\ngraphroot = "{folder}/graph"\n'
        (folder / "storage.conf").write_text(settings)
        (folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self.env = {**os.environ, "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"), "BUILDAH_ISOLATION": "chroot"}

    def __call__(self, *words: str) -> None:
        """Run a command, its output as our own."""
        subprocess.run(["buildah", *words], env=self.env, check=True)

    def said(self, *words: str) -> str:
        """What a command prints."""
        done = subprocess.run(["buildah", *words], env=self.env, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip()

    def base(self, suite: str, python: str) -> None:
        """A fresh Debian with its own Python, which must be of this version, as the image ``BASE``."""
        root = self.folder / "root"
        install = ["debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv", suite, str(root)]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
        _must((root / f"usr/bin/python{python}").exists(), f"Debian {suite} has no Python {python}")
        container = self.said("from", "scratch")
        self.said("add", container, str(root), "/")
        shutil.rmtree(root)
        self("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
        self.said("commit", "--quiet", "--rm", "--signature-policy", str(self.folder / "policy.json"), container, BASE)

    def build(self, volumes: Sequence[str], torch_index: str | None) -> dict[str, Any]:
        """Run the Dockerfile; the configuration of the image it makes."""
        self(
            "build", "--format", "docker", "--signature-policy", str(self.folder / "policy.json"), "--tag", IMAGE,
            *(f"--volume={volume}" for volume in volumes),
            *(f"--build-arg={name}={value}" for name, value in (("BASE", BASE), ("TORCH_INDEX", torch_index)) if value),
            str(ROOT),
        )  # fmt: skip
        made: dict[str, Any] = json.loads(self.said("inspect", "--type", "image", IMAGE))
        return made


class Service:
    """The image's command, running as its user with a bundle at /bundle."""

    def __init__(self, builder: Builder, config: dict[str, Any], bundle: Path) -> None:
        self.builder, self.config = builder, config
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.container = builder.said("from", "--signature-policy", str(builder.folder / "policy.json"), IMAGE)
        words = self._words(config["Cmd"], f"--volume={bundle}:/bundle:ro")
        self._engine = subprocess.Popen(words, env=builder.env)
        self._started = time.monotonic()

    def wait(self) -> float:
        """Seconds until the image's own health check is content."""
        check = self.config["Healthcheck"]["Test"]
        _must(check[0] == "CMD", f"the health check is not in exec form: {check}")
        while subprocess.run(self._words(check[1:]), env=self.builder.env, capture_output=True).returncode:
            _must(self._engine.poll() is None, f"the service ended with {self._engine.returncode} before it was healthy")
            _must(time.monotonic() - self._started < START_S, f"the service was not healthy within {START_S} s")
        return time.monotonic() - self._started

    def ask(self, target: str) -> Any:
        """The answer to a GET, which must be a 200."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        client.request("GET", target)
        answer = client.getresponse()
        body = answer.read().decode()
        _must(answer.status == 200, f"{target}: {answer.status} {body}")
        return json.loads(body)

    @property
    def user(self) -> int:
        """Whom the service runs as."""
        return int(self._process().uids().real)

    def stop(self) -> int:
        """Send the image's stop signal; the status that the service ends with."""
        self._process().send_signal(signal.Signals[self.config.get("StopSignal", "SIGTERM")])
        return self._engine.wait(STOP_S)

    def kill(self) -> None:
        """End it in any state."""
        if self._engine.poll() is None:
            engine = psutil.Process(self._engine.pid)
            for process in (*engine.children(recursive=True), engine):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._engine.wait()

    def _words(self, command: Sequence[str], *options: str) -> list[str]:
        port = f"--env=PENNYWEIGHT_SERVE_PORT={self.port}"  # others may use 8000 on this machine
        return ["buildah", "run", port, *options, self.container, "--", *command]

    def _process(self) -> psutil.Process:
        """The service itself, below those of buildah."""
        return next(p for p in psutil.Process(self._engine.pid).children(recursive=True) if not p.children())


def main() -> None:
    """Make a place of its own for the check, and clear it away."""
    asked = argparse.ArgumentParser(description="Build the Dockerfile in a fresh Debian root and ask its service.")
    asked.add_argument("--bundle", type=Path, help="what to serve; runs/demo/best, or one trained by the image, by default")
    asked.add_argument(
        "--torch-index",
        help="where PyTorch's wheels are; the Dockerfile's own by default",
    )
    asked.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.inside:
        return check(given.inside, given.bundle, given.torch_index)
    _needed()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, *sys.argv, "--inside"]
    try:
        with _folder() as folder:
            sys.exit(subprocess.run([*apart, str(folder)]).returncode)
    except KeyboardInterrupt:
        sys.exit("image-check: stopped, and cleared away")


def check(folder: Path, bundle: Path | None, torch_index: str | None) -> None:
    """Lint the Dockerfile, build it in ``folder`` and hold the image to what it promises."""
    subprocess.run([str(Path(sys.executable).with_name("hadolint")), str(ROOT / "Dockerfile")], check=True)
    _say("hadolint has nothing to say")
    suite, python = base((ROOT / "Dockerfile").read_text())
    builder = Builder(folder)
    _, volumes = lent(folder)
    builder.base(suite, python)
    _say(f"a fresh Debian {suite} stands in for python:{python}")
    made = builder.build(volumes, torch_index)
    config = made["Docker"]["config"]
    _say(f"built; user {config['User']}, command {' '.join(config['Cmd'])}")
    service = Service(builder, config, bundle or trained(builder, folder))
    try:
        _say(f"healthy after {service.wait():.1f} s")
        named = int(config["User"].partition(":")[0])
        _must(service.user == named != 0, f"the image names user {named}, and the service runs as user {service.user}")
        answer = service.ask(ASKED)
        _must(len(answer["items"]) == 3, f"GET {ASKED} is answered with {answer}")
        _say(f"GET {ASKED}\n{json.dumps(answer, ensure_ascii=False, indent=2)}")
        status = service.stop()
        _must(status == 0, f"stopped by its signal, the service ended with {status}")
        _say("stopped by its signal with status 0")
    finally:
        service.kill()


def base(dockerfile: str) -> tuple[str, str]:
    """Debian's suite and Python's minor version, from the tag of a Dockerfile's base."""
    found = re.search(r"^ARG BASE=python:(\d+\.\d+)[\d.]*-slim-(\w+)@sha256:[0-9a-f]{64}$", dockerfile, re.MULTILINE)
    if found is None:
        sys.exit("the Dockerfile's base is not ARG BASE=python:VERSION-slim-SUITE@sha256:DIGEST")
    return found[2], found[1]


def lent(folder: Path) -> tuple[dict[str, str], list[str]]:
    """This machine's settings of pip, and the volumes that show them and the local folders they name to the build."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    pairs = re.findall(r"^(?:global|install|:env:)\.([\w-]+)=(.+)$", told.stdout, re.MULTILINE)
    settings = {name: " ".join(ast.literal_eval(value).split()) for name, value in pairs if name != "constraint"}
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    named = [_local(word) for value in settings.values() for word in value.split()]
    local = sorted({str(path) for path in named if path is not None and path.exists()})
    return settings, [f"{folder / 'pip.conf'}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in local)]


def trained(builder: Builder, folder: Path) -> Path:
    """A bundle: the demo's if there is one, else a small one that the image itself trains on the shipped sample."""
    if (ROOT / "runs/demo/best").is_dir():
        return ROOT / "runs/demo/best"
    out = folder / "trained"
    out.mkdir()
    out.chmod(0o777)
    container = builder.said("from", "--signature-policy", str(folder / "policy.json"), IMAGE)
    command = "pennyweight train sample --out /trained --model deepfm --dim 8 --hidden 32 --epochs 1"
    builder("run", f"--volume={out}:/trained", container, "--", *command.split())
    return out / "bundle"


def _local(word: str) -> Path | None:
    """The folder or file a setting names; an index of files links to its siblings, so its parent."""
    if word.startswith("file://"):
        return Path(urlsplit(word).path).parent
    return Path(word) if word.startswith("/") else None


def _needed() -> None:
    missing = [program for program in ("debootstrap", "buildah", "unshare") if shutil.which(program) is None]
    if missing:
        sys.exit(f"image-check needs {' and '.join(missing)}; on Debian: apt-get install debootstrap buildah util-linux")
    if os.geteuid() != 0:
        sys.exit("image-check makes a root folder of its own and must run as root; sudo make image-check")


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder that goes at the end."""
    folder = Path(tempfile.mkdtemp(prefix="pennyweight-image-"))
    try:
        yield folder
    finally:
        while folder.exists():  # a step that was cut short may be writing its last
            shutil.rmtree(folder, ignore_errors=True)


def _must(holds: bool, else_: str) -> None:
    if not holds:
        sys.exit(f"image-check: {else_}")


def _say(line: str) -> None:
    print(f"image-check {time.monotonic() - BEGAN:5.0f} s  {line}", flush=True)


BEGAN = time.monotonic()

if __name__ == "__main__":
    main()
