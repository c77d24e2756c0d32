"""`pennyweight plan`, its page, the rehearsal, and what a machine is measured to do."""

import dataclasses
import json
import math
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from pennyweight.cli import app, main
from pennyweight.core.config import decode, dumps, loads
from pennyweight.core.errors import ConfigError, DeviceError
from pennyweight.core.hardware import Device, Link, Price, Rates, Topology
from pennyweight.data.schema import Column
from pennyweight.distribute import calibrate, formulas, planner, rehearse, scale, workload
from pennyweight.distribute.cost import Setting
from pennyweight.distribute.planner import plain, plan
from pennyweight.model.bundle import Bundle, save
from pennyweight.model.placement import Placement
from pennyweight.model.ranking import DLRM, DNN
from pennyweight.model.spec import Model, Spec, build, spec_of
from pennyweight.model.train import Recipe

COLUMNS = (
    Column("user", "user", "categorical", 3000),
    Column("item", "item", "categorical", 500),
    Column("history", "user", "sequence", 500, 5, shares="item"),
    Column("age", "context", "numeric"),
)
SPEC = spec_of(DNN, columns=COLUMNS, dim=8, hidden=(16,))


def topology(workers: int = 2, hosts: int = 1, memory: int = 2**33) -> Topology:
    devices = (Device("cpu", "cpu", workers, memory, model="a machine on paper"),)
    return Topology(devices, hosts, workers, Link(60, 2e9), Link(200, 2e8), Rates(4e9, 4e7, 8e9, 8), Price(1.0, 0.01))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "model.json").write_text(dumps(SPEC))
    (tmp_path / "hosts.json").write_text(dumps(topology()))
    return tmp_path


def run(files: Path, *words: str) -> str:
    done = CliRunner().invoke(app, ["plan", str(files / "model.json"), "--topology", str(files / "hosts.json"), *words])
    assert done.exit_code == 0, done.output
    return done.output


# -- the command -----------------------------------------------------------------------------------------------------------


def test_it_prints_the_placement_its_cost_and_why(files: Path) -> None:
    said = " ".join(run(files, "--workers", "4", "--hosts", "2").split())
    for words in ("4 workers on 2 hosts", "chosen", "row-wise", "takes most of a step", "USD"):
        assert words in said
    for formula in ("r = M / m", "C = (N / 2) * c", "V = a * b", "T = max(t_i)"):
        assert formula in said


def test_json_has_all_of_it_and_the_placement_can_be_trained_with(files: Path) -> None:
    out = files / "placement.json"
    found = json.loads(run(files, "--json", "--scale", "--out", str(out), "--tables", "lazy-adam", "--batch", "256"))
    placement = loads(Placement, out.read_text())
    assert decode(Placement, found["placement"]) == placement and placement.world_size == 2
    assert found["predicted"]["step_ms"] == pytest.approx(sum(found["predicted"]["parts_ms"].values()))
    assert {t["path"] for t in found["tables"]} == {"embeddings.tables.user", "embeddings.tables.item"}
    assert len(found["formulas"]) == 4 and found["exhaustive"] and found["batch"] == 256
    assert [p["workers"] for p in found["scale"]] == list(scale.WORKERS)
    assert found["measured"] is None


def test_a_bundle_is_planned_as_a_spec_is(files: Path) -> None:
    save(Bundle(Model.of(build(SPEC), SPEC)), files / "bundle")
    words = ["--topology", str(files / "hosts.json"), "--json"]
    done = CliRunner().invoke(app, ["plan", str(files / "bundle"), *words])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["predicted"] == json.loads(run(files, "--json"))["predicted"]


def test_the_page_draws_what_was_decided(files: Path) -> None:
    pytest.importorskip("altair")
    page = files / "plan.html"
    run(files, "--report", str(page), "--scale")
    text = page.read_text()
    for words in ("Which table where", "Bytes each worker holds", "Time of a step, ms", "on paper", "Four plain formulas"):
        assert words in text
    assert text.count("<svg") == 6
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "not rehearsed" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--workers", "7", "--hosts", "2"), "7 workers do not divide among 2 hosts"),
        (("--workers", "-1"), "must not be negative"),
        (("--tables", "best"), "--tables: 'best' is not one of"),
        (("--batch", "1"), "a batch of 1 rows over 2 workers"),
        (("--memory", "10kB"), "4) offload tables to disk"),
        (("--memory", "plenty"), "memory <= plenty"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_status_2(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    given = ["pennyweight", "plan", str(files / "model.json"), "--topology", str(files / "hosts.json"), *words]
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_what_is_no_model_is_refused(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "wrong.json").write_text('{"factory": "pennyweight.model.ranking:DNN", "arg": {}}')
    for name, says in (("wrong.json", "arg"), ("nothing", "no bundle")):
        monkeypatch.setattr("sys.argv", ["pennyweight", "plan", str(files / name), "--topology", str(files / "hosts.json")])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2
        assert says in capsys.readouterr().err


def test_tables_are_planned_as_a_run_trains_them() -> None:
    assert workload.update_of(Recipe(), 10) == "dense"
    assert workload.update_of(Recipe(tables="sgd"), 10) == "sgd"
    assert [workload.update_of(Recipe(tables="auto", optimizer=o), 2**24) for o in ("adamw", "adagrad")] == [
        "lazy-adam",
        "adagrad",
    ]
    assert workload.update_of(Recipe(tables="auto"), 2**24 - 1) == "dense"


# -- measuring -------------------------------------------------------------------------------------------------------------


def test_rates_are_what_a_processor_can_do() -> None:
    found = calibrate.rates(0.2)
    assert 1e8 < found.flops < 1e13 and 1e5 < found.rows < 1e10 and 1e8 < found.bytes < 1e12
    assert 0 < found.call_us < 1e4 and 1e4 < found.ids < 1e10


def test_a_line_is_fitted_to_messages_of_all_sizes() -> None:
    sizes = (64, 16_384, 262_144, 2_097_152)
    found = calibrate.fitted(sizes, [100e-6 + n / 1e9 for n in sizes])
    assert found.latency_us == pytest.approx(100, rel=1e-3) and found.bytes_per_s == pytest.approx(1e9, rel=1e-3)
    odd = calibrate.fitted(sizes, [100e-6, 90e-6, 80e-6, 70e-6])
    assert odd.latency_us > 0 and math.isfinite(odd.bytes_per_s)


def test_two_processes_that_do_not_meet_are_not_waited_for_for_ever() -> None:
    with pytest.raises(DeviceError, match=r"did not finish within 0.01 s.*--topology"):
        calibrate.link(timeout_s=0.01)


def test_a_step_is_timed_with_tables_folded() -> None:
    """A table of 80 GB is timed on this machine; more rows take longer."""
    columns = (Column("user", "user", "categorical", 2_500_000_000), *COLUMNS[1:])
    found = calibrate.timed(spec_of(DLRM, columns=columns, dim=8, hidden=(64,)), (16, 2048), seconds=0.3)
    assert found.row > 0 and found.fixed >= 0


def test_a_topology_is_resized() -> None:
    there = calibrate.resized(topology(2), 3, 4, 10**9)
    assert (there.world, there.worker_bytes) == (12, 10**9)
    assert calibrate.resized(topology(2), 1, 4).worker_bytes == 2**33 // 4


# -- rehearsing ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage() -> object:
    with rehearse.Stage(2) as opened:
        yield opened


@pytest.mark.parametrize(
    ("kind", "update"), [("whole", "adagrad"), ("table-wise", "sgd"), ("row-wise", "adagrad"), ("column-wise", "lazy-adam")]
)
def test_bytes_are_predicted_as_the_engine_counts_them(stage: rehearse.Stage, kind: str, update: workload.Update) -> None:
    """Sent and held, of each rank, within 3 %: what random ids vary by, and counts that are not predicted."""
    work = workload.count(SPEC, 2048, update)
    setting = Setting(work, topology(), 1)
    placement = Placement(2, shards=plain(kind, setting))
    predicted = setting.predict(placement)
    measured = stage.measure(rehearse.Trial.of(SPEC, placement, 2048, update=update, steps=3, warmup=1))
    for rank in range(2):
        assert predicted.ranks[rank].sent == pytest.approx(measured.sent[rank], rel=0.03)
        # a gradient is a dense weight more; of tables that are trained by touched rows there is none
        held = predicted.ranks[rank].tables + predicted.ranks[rank].dense
        assert held == pytest.approx(measured.held[rank], rel=0.05)
    assert 0 < measured.best <= measured.step
    assert sum(measured.sent) == pytest.approx(sum(measured.by.values()), rel=0.01)


def test_a_plan_is_told_beside_what_was_measured(stage: rehearse.Stage) -> None:
    from pennyweight.report import placement as shown

    made = plan(workload.count(SPEC, 256), topology())
    measured = stage.measure(rehearse.Trial.of(SPEC, made.chosen.placement, 256, steps=2, warmup=1))
    said = shown.lines(made, formulas.printed(made), measured)
    assert any(line.startswith("measured: a step of") and "predicted" in line for line in said)
    assert shown.summary(made, (), measured)["measured"]["step"] == measured.step
    assert "measured in a rehearsal" in shown.page(made, (), measured)


def test_a_stage_holds_no_more_after_many_placements() -> None:
    """Groups of workers have threads, which hundreds of placements would leave behind."""
    with rehearse.Stage(2) as opened:
        threads = []
        for _ in range(3):
            opened.measure(rehearse.Trial.of(SPEC, Placement(2), 64, steps=1, warmup=0))
            threads.append([psutil.Process(p.pid).num_threads() for p in opened.processes])
    assert threads[0] == threads[1] == threads[2]


def test_what_fails_in_a_worker_is_said_here() -> None:
    wrong = Placement(2, dense={"mlp.9": "column"})
    with rehearse.Stage(2) as opened, pytest.raises(DeviceError, match=r"rank \d: ConfigError: .*mlp\.9"):
        opened.measure(rehearse.Trial.of(SPEC, wrong, 64, steps=1))


def test_a_spec_without_columns_cannot_be_rehearsed() -> None:
    bare = Spec("pennyweight.model.ranking:DNN", {"dim": 8})
    with pytest.raises(ConfigError, match="does not say which columns"):
        rehearse.Trial.of(bare, Placement(2), 64)
    assert dataclasses.is_dataclass(planner.Made)
