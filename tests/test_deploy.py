"""What the deployment's files say agrees with the service, with each other, and with the rules for images."""

import http.server
import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

import pennyweight
from pennyweight.cli import app
from pennyweight.data.events import Event
from pennyweight.data.valkey import DURABLE, ValkeyLog
from pennyweight.model.bundle import Policy
from pennyweight.serve.app import ROUTES, STOP_S
from pennyweight.serve.metrics import Metrics

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
KUBERNETES = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text()))
PROMETHEUS = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
SERVICE, VALKEY = COMPOSE["services"]["service"], COMPOSE["services"]["valkey"]
PINNED = re.compile(r"[a-z0-9./-]+:\d[\w.-]*@sha256:[0-9a-f]{64}|[a-z0-9./-]+:v\d[\w.-]*@sha256:[0-9a-f]{64}")
OURS = re.compile(rf"(pennyweight|shop):{re.escape(pennyweight.__version__)}")
PATHS = {route.path for route in ROUTES}

sys.path.insert(0, str(ROOT / "deploy"))
import imagecheck  # noqa: E402  (a script, not a package)


def steps(dockerfile: str = DOCKERFILE) -> list[tuple[str, str]]:
    """Instruction and what it is given, line continuations joined."""
    text = re.sub(r"(?m)^#.*\n", "", dockerfile).replace("\\\n", " ")
    return [(line.split()[0], " ".join(line.split()[1:])) for line in text.splitlines() if line.strip()]


STEPS = steps()
FINAL = STEPS[max(i for i, (name, _) in enumerate(STEPS) if name == "FROM") :]
ARGUMENTS = dict(value.split("=", 1) for name, value in STEPS if name == "ARG")
ENV = dict(pair.split("=", 1) for name, value in FINAL if name == "ENV" for pair in shlex.split(value))


def given(name: str) -> str:
    """What the last stage gives this instruction."""
    (value,) = (value for step, value in FINAL if step == name)
    return value


def found(kind: str, name: str) -> dict[str, Any]:
    return next(d for d in KUBERNETES if (d["kind"], d["metadata"]["name"]) == (kind, name))


def pod(kind: str, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = found(kind, name)["spec"]["template"]["spec"]
    return spec


def options(words: list[str]) -> dict[str, str]:
    """The options of a `valkey-server --name value ...` command."""
    assert words[0] == "valkey-server"
    return {name.removeprefix("--"): value for name, value in zip(words[1::2], words[2::2], strict=True)}


# The image


def test_hadolint_has_nothing_to_say() -> None:
    lint = subprocess.run([Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_the_base_is_pinned_and_the_same_in_both_stages() -> None:
    assert PINNED.fullmatch(ARGUMENTS["BASE"])
    assert [value.split()[0] for name, value in STEPS if name == "FROM"] == ["${BASE}", "${BASE}"]
    assert imagecheck.base(DOCKERFILE) == ("bookworm", "3.11")


def test_packages_are_pinned_and_leave_no_cache() -> None:
    runs = [value for name, value in STEPS if name == "RUN"]
    installs = [run for run in runs if "pip install" in run]
    assert len(installs) == 2 and all("--no-cache-dir" in run for run in installs)
    assert not any("apt-get" in run or "curl" in run or "--upgrade" in run for run in runs)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:])
    assert (
        "ENV",
        "PATH=/opt/pennyweight/bin:$PATH PIP_CONSTRAINT=/src/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1",
    ) in STEPS
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = ARGUMENTS["EXTRAS"].split(",")
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    needed += [need for extra in extras for need in project["project"]["optional-dependencies"][extra]]
    named = {re.split(r"[\[><=]", need)[0].replace("-", "_").lower() for need in needed}
    assert named <= {pin.replace("-", "_").lower() for pin in pins}


def test_the_last_stage_holds_the_environment_alone() -> None:
    assert [value for name, value in FINAL if name in ("COPY", "ADD")] == ["--from=build /opt/pennyweight /opt/pennyweight"]
    user, _, group = given("USER").partition(":")
    assert int(user) > 0 and int(group) > 0, "by number, so that it can be seen not to be root"
    assert [name for name, _ in FINAL].index("USER") > max(i for i, (name, _) in enumerate(FINAL) if name == "RUN")


def test_the_context_is_what_is_copied() -> None:
    copied = {word for name, value in STEPS if name == "COPY" and "--from" not in value for word in value.split()[:-1]}
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*" and {rule[1:] for rule in rules if rule[0] == "!"} == copied
    assert all((ROOT / path).exists() for path in copied)


def test_the_command_is_one_of_ours() -> None:
    program, command, *rest = json.loads(given("CMD"))
    assert (program, command, rest) == ("pennyweight", "serve", ["/bundle"])
    told = [*ENV, *SERVICE["environment"], *(v["name"] for v in pod("Deployment", "pennyweight")["containers"][0]["env"])]
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {f"PENNYWEIGHT_SERVE_{param.name.upper()}" for param in serve.params}
    assert {name for name in told if name.startswith("PENNYWEIGHT_")} <= known
    assert ENV["PENNYWEIGHT_SERVE_PORT"] == given("EXPOSE")


def test_an_option_is_a_variable_too(cascade_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pennyweight", "serve", str(cascade_folder), "--get", "/health"]
    told = {"PENNYWEIGHT_SERVE_STORE": str(tmp_path / "told.db"), "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    subprocess.run(command, env=told, check=True, capture_output=True)
    assert (tmp_path / "told.db").is_file()


@pytest.fixture
def served() -> Iterator[http.server.HTTPServer]:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(server.status)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, *words: object) -> None: ...

    asked: list[str] = []
    server = http.server.HTTPServer(("127.0.0.1", 0), Health)
    server.asked = asked  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (500, False), (None, False)])
def test_the_health_check_tells_health(served: Any, status: int | None, healthy: bool) -> None:
    words = json.loads(given("HEALTHCHECK").partition(" CMD ")[2])
    served.status = status or 200
    port = served.server_port if status else 1
    check = [sys.executable, *words[1:]]
    run = subprocess.run(check, env={"PENNYWEIGHT_SERVE_PORT": str(port)}, capture_output=True)
    assert (words[0], run.returncode == 0) == ("python3", healthy)
    assert served.asked == (["/health"] if status else []) and "/health" in PATHS


# Compose


def test_compose_pins_and_limits_everything() -> None:
    for name, service in COMPOSE["services"].items():
        assert (OURS if name == "service" else PINNED).fullmatch(service["image"]), name
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and service["mem_limit"] and service["cpus"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), f"{name} is open to others"
    used = {v.partition(":")[0] for s in COMPOSE["services"].values() for v in s["volumes"] if v[0] not in "./$"}
    assert used == set(COMPOSE["volumes"])


def test_compose_agrees_with_the_service() -> None:
    assert SERVICE["ports"] == [f"127.0.0.1:8000:{ENV['PENNYWEIGHT_SERVE_PORT']}"]
    assert SERVICE["build"]["args"].keys() <= ARGUMENTS.keys()
    assert ARGUMENTS["TORCH_INDEX"] in SERVICE["build"]["args"]["TORCH_INDEX"]
    assert int(SERVICE["stop_grace_period"].removesuffix("s")) > STOP_S
    assert SERVICE["volumes"][0].endswith(":/bundle:ro")
    host = re.fullmatch(r"valkey://(\w+):6379", SERVICE["environment"]["PENNYWEIGHT_SERVE_STORE"])
    assert host and host[1] in SERVICE["depends_on"] and host[1] in COMPOSE["services"]


def test_prometheus_scrapes_the_service() -> None:
    (job,) = PROMETHEUS["scrape_configs"]
    assert job["metrics_path"] in PATHS
    assert job["static_configs"] == [{"targets": [f"service:{ENV['PENNYWEIGHT_SERVE_PORT']}"]}]
    file, where, _ = COMPOSE["services"]["prometheus"]["volumes"][0].split(":")
    assert (ROOT / file).is_file() and where == "/etc/prometheus/prometheus.yml"


def test_queries_of_the_docs_name_metrics_there_are() -> None:
    metrics = Metrics(Policy())
    metrics.answered("/recommend", 200, 0.001)
    there = set(re.findall(r"^(pennyweight_\w+)", metrics.text().decode(), re.MULTILINE))
    asked = set(re.findall(r"pennyweight_\w+(?=[{\[])", (ROOT / "docs" / "deploy.md").read_text()))
    assert len(asked) >= 4 and asked <= there


@pytest.mark.parametrize(
    "command",
    [VALKEY["command"], pod("StatefulSet", "pennyweight-valkey")["containers"][0]["args"]],
    ids=["compose", "kubernetes"],
)
def test_the_server_of_events_is_one_the_service_takes(command: list[str], valkey: Any) -> None:
    asked = options(command)
    assert asked.items() >= DURABLE.items()
    valkey.kill()
    valkey.start(**asked)
    with ValkeyLog(valkey.url) as log:
        assert log.append([Event("e1", "anna", "1")]) == 1


# Kubernetes


@pytest.mark.parametrize("document", KUBERNETES, ids=lambda d: f"{d['kind']}/{d['metadata']['name']}")
def test_every_resource_is_by_kubernetes_schema(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(("kind", "name"), [("Deployment", "pennyweight"), ("StatefulSet", "pennyweight-valkey")])
def test_pods_are_confined(kind: str, name: str) -> None:
    spec = pod(kind, name)
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec["automountServiceAccountToken"] and not spec["enableServiceLinks"]
    own = container["securityContext"]
    assert own == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"]["requests"].keys()
    assert container["readinessProbe"] and container["livenessProbe"]
    assert (OURS if kind == "Deployment" else PINNED).fullmatch(container["image"])


def test_kubernetes_agrees_with_the_image() -> None:
    spec = pod("Deployment", "pennyweight")
    (container,) = spec["containers"]
    port, user = int(ENV["PENNYWEIGHT_SERVE_PORT"]), int(given("USER").partition(":")[0])
    assert container["ports"] == [{"name": "http", "containerPort": port}] and spec["securityContext"]["runAsUser"] == user
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    scrape = found("Deployment", "pennyweight")["spec"]["template"]["metadata"]["annotations"]
    assert scrape["prometheus.io/path"] in PATHS and scrape["prometheus.io/port"] == str(port)
    waits = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > STOP_S + waits
    (store,) = container["env"]
    assert store["value"] == f"valkey://{found('Service', 'pennyweight-valkey')['metadata']['name']}:6379"


def test_selectors_find_their_pods() -> None:
    for kind, name in (("Deployment", "pennyweight"), ("StatefulSet", "pennyweight-valkey")):
        whole, labels = found(kind, name)["spec"], found(kind, name)["spec"]["template"]["metadata"]["labels"]
        (container,) = pod(kind, name)["containers"]
        service = found("Service", name)["spec"]
        assert whole["selector"]["matchLabels"] == service["selector"] == labels
        assert service["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}
    policy = found("NetworkPolicy", "pennyweight-valkey")["spec"]
    assert policy["podSelector"]["matchLabels"] == found("Service", "pennyweight-valkey")["spec"]["selector"]
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": found("Service", "pennyweight")["spec"]["selector"]}}]
    assert found("HorizontalPodAutoscaler", "pennyweight")["spec"]["scaleTargetRef"]["name"] == "pennyweight"
    assert "replicas" not in found("Deployment", "pennyweight")["spec"], "the autoscaler's to decide"
    budget = found("PodDisruptionBudget", "pennyweight")["spec"]
    assert budget["selector"]["matchLabels"] == found("Service", "pennyweight")["spec"]["selector"]


# The check of the image


def test_the_machines_pip_is_lent_with_the_folders_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "index" / "simple").mkdir(parents=True)
    config = f"[global]\nproxy = file://{tmp_path}/index/simple\nconstraint = {tmp_path}/none.txt\n"
    (tmp_path / "own.conf").write_text(config)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "own.conf"))
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path}/wheels {tmp_path}/gone")
    settings, volumes = imagecheck.lent(tmp_path)
    assert settings["proxy"] == f"file://{tmp_path}/index/simple" and settings["find-links"].startswith(str(tmp_path))
    for folder in ("index", "wheels"):  # an index links to its siblings
        assert f"{tmp_path}/{folder}:{tmp_path}/{folder}:ro" in volumes
    assert not any("gone" in volume or "none.txt" in volume for volume in volumes)
    written = (tmp_path / "pip.conf").read_text()
    assert "proxy = " in written and "constraint" not in written, "the Dockerfile has constraints of its own"


@pytest.mark.parametrize("base", ["python:latest", "python:3.11-slim-bookworm", "debian:12@sha256:" + "0" * 64])
def test_a_base_that_is_not_pinned_is_refused(base: str) -> None:
    with pytest.raises(SystemExit, match="DIGEST"):
        imagecheck.base(f"ARG BASE={base}\nFROM $BASE\n")
