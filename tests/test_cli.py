"""The command line as a person meets it: every command, and what each wrong input says."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pennyweight import job
from pennyweight.core.config import dumps, encode, loads
from pennyweight.core.curve import Curve
from pennyweight.core.errors import DataError
from pennyweight.data.synthetic import Clicks
from pennyweight.model.bundle import Policy, Variant, load, save
from pennyweight.model.pace import Pace
from pennyweight.model.spec import Model
from pennyweight.model.train import Recipe


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    return subprocess.run([sys.executable, "-m", "pennyweight", *args], capture_output=True, text=True, cwd=cwd, timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a small model."""
    out = tmp_path_factory.mktemp("cli") / "run"
    data = Clicks(sizes=(300, 400, 20), seed=3).dataset(6_000)
    job.train(data, "dnn", {"dim": 8, "hidden": [32]}, Recipe(batch=512, epochs=1), out, split="random")
    return out


def test_help_names_every_command() -> None:
    told = run("--help").stdout
    assert all(c in told for c in ("train", "optimize", "apply", "inspect", "bench", "report", "serve", "doctor", "demo"))


def test_a_csv_is_trained_optimized_and_inspected(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 50, 3000), rng.integers(0, 80, 3000)
    liked = (rng.random(3000) < 1 / (1 + np.exp(-np.sin(user) - np.cos(item)))).astype(int)
    lines = [f"u{u},i{i},{y},{t}" for t, (u, i, y) in enumerate(zip(user, item, liked, strict=True))]
    (tmp_path / "log.csv").write_text("who,what,clicked,at\n" + "\n".join(lines) + "\n")
    columns = ("who:user:categorical", "what:item:categorical", "clicked:label:numeric", "at:time:time")
    flags = [f for c in columns for f in ("--column", c)]
    made = run(
        "train",
        "log.csv",
        *flags,
        "--out",
        "r",
        "--hidden",
        "16",
        "--dim",
        "8",
        "--epochs",
        "2",
        "--batch",
        "256",
        cwd=tmp_path,
    )
    assert made.returncode == 0, made.stderr
    assert "Next: pennyweight optimize r" in made.stdout
    done = run("optimize", "r", "--budget", "bytes <= 6kB, auc drop <= 0.05", "--seconds", "30", "--tries", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "report     r/report.html" in done.stdout and load(tmp_path / "r" / "best").bytes <= 6000
    told = run("inspect", "r/best", cwd=tmp_path)
    assert "int8" in told.stdout or "int4" in told.stdout


def test_a_bundle_is_tuned_and_the_answer_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))
    short = ("--seconds", "1", "--candidates", "50", "--out", str(tmp_path / "tuned"))
    done = run("tune", str(folder / "bundle"), *short)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "points" in told and "chosen" in told and "not tried" in told and "run with" in told
    tuned = load(tmp_path / "tuned")
    assert tuned.runtime.machine and tuned.plan[-1]["transform"] == "run"
    assert "remembered from" in run("tune", str(folder / "bundle"), *short).stderr
    assert run("tune", str(tmp_path / "nothing")).returncode == 2


def test_a_run_is_compressed_with_every_step_and_layer_in_a_table(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    least = ("--max-bytes", "11kB", "--auc-drop", ".05", "--tries", "0", "--seconds", "30", "--skip", "mlp")
    done = run("compress", "run", *least, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "every step tried" in told and "every table and layer" in told and "left alone mlp: as asked" in told
    assert "report run/report.html bundle: run/best" in told and (tmp_path / "run" / "report.html").exists()
    given, small = (load(tmp_path / "run" / name) for name in ("bundle", "best"))
    assert small.bytes <= 11_000 and not any(path.startswith("mlp.") for path in small.model.spec.layers)
    assert (small.model.state["mlp.0.weight"] == given.model.state["mlp.0.weight"]).all()


def test_a_bundle_is_compressed_with_rows_named_for_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bundle", tmp_path / "mine")
    least = ("--max-bytes", "8kB", "--drop", "5%", "--tries", "0", "--seconds", "30", "--json")
    done = run("compress", "mine", "--data", str(folder / "data"), *least, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["proven"] is True and told["chosen"]["bytes"] <= 8000 and len(told["trials"]) >= 4
    assert load(tmp_path / "mine-compressed" / "best").bytes == told["chosen"]["bytes"]


def test_a_bundle_inside_a_run_knows_its_rows(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    run_, bundle = job.located(tmp_path / "run" / "bundle")
    assert run_ == tmp_path / "run" and bundle == tmp_path / "run" / "bundle"
    assert job.located(tmp_path / "run") == (run_, bundle)
    assert job.located(shutil.copytree(bundle, tmp_path / "alone"))[0] is None


def test_apply_follows_a_plan(folder: Path, tmp_path: Path) -> None:
    plan = {"transforms": [{"transform": "quantize-tables", "data_type": "int4"}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = run("apply", str(folder / "bundle"), str(tmp_path / "plan.json"), "--out", str(tmp_path / "small"))
    assert done.returncode == 0 and "x smaller" in done.stdout
    assert [s["transform"] for s in load(tmp_path / "small").plan] == ["quantize-tables"]
    state = load_file(tmp_path / "small" / "weights.safetensors")
    assert state["embeddings.tables.user.packed"].shape == (302, 8)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"transforms": [{"transform": "quantise"}]}, "unknown transform 'quantise'; known: "),
        ({"transforms": [{"transform": "quantize-tables", "bits": 4}]}, "transforms[0].bits: unknown field of QuantizeTables"),
        ({"transforms": [{"transform": "quantize-tables", "data_type": "int3"}]}, "'int3' is not one of"),
        ({"steps": []}, "unknown field of Plan"),
        ({"transforms": [{"transform": "quantize-tables"}, {"transform": "prune-neurons"}]}, "comes after data type"),
    ],
)
def test_apply_refuses_a_wrong_plan(folder: Path, tmp_path: Path, plan: object, says: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    done = run("apply", str(folder / "bundle"), str(tmp_path / "plan.json"), "--out", str(tmp_path / "small"))
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "small").exists()


def test_apply_says_what_a_transform_lacks(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"transforms": [{"transform": "distill"}]}')
    done = run("apply", str(folder / "bundle"), str(tmp_path / "plan.json"), "--out", str(tmp_path / "small"))
    assert done.returncode == 2 and "Distill needs env.teachers" in done.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("train", "nowhere.csv"), "no data at 'nowhere.csv'"),
        (("train", "sample", "--model", "deepfn"), "unknown model 'deepfn'; known: dnn, deepfm"),
        (("train", "sample", "--hidden", "wide"), "--hidden 'wide' is not a list of whole numbers"),
        (("train", "sample", "--split", "sideways"), "'sideways' is not one of"),
        (("train", "sample", "--lr", "0"), "lr is 0.0"),
        (("train", "sample", "--batch", "many"), "--batch is 'many'; give a number of rows, or auto"),
        (("train", "sample", "--tables", "sparse"), "'sparse' is not one of"),
        (("train", "sample", "--model", "os.path:join"), "is not allowed, and importing it runs its code"),
        (("train", "frappe-x1:nowhere"), "nowhere"),
        (("optimize", "nowhere"), "no run (no run.json)"),
        (("optimize", "{run}", "--budget", "p98 <= 3ms"), "limits 'p98'; known: p50, p99"),
        (("optimize", "{run}", "--budget", "bytes <= 0kB"), "which nothing can keep"),
        (("optimize", "{run}", "--budget", "bytes <= 100MB"), "within bytes <= 100 MB"),
        (
            ("optimize", "{run}", "--budget", "bytes <= 100B", "--seconds", "20", "--tries", "0"),
            "nothing tried meets bytes <= 100 B",
        ),
        (
            ("compress", "{run}", "--max-bytes", "100B", "--seconds", "20", "--tries", "0"),
            "nothing tried meets bytes <= 100 B",
        ),
        (("compress", "nowhere", "--max-bytes", "9kB"), "is no run (no run.json)"),
        (("compress", "{run}", "--max-bytes", "200"), "'bytes <= 200' has no unit; known: B, kB"),
        (("compress", "{run}", "--max-bytes", "100MB"), "within bytes <= 100 MB"),
        (("compress", "{run}", "--auc-drop", ".001", "--drop", "1%"), "--auc-drop and --drop are two margins; keep one"),
        (("compress", "{run}", "--auc-drop", "2"), "would allow any loss"),
        (("compress", "{run}", "--skip", "mlq.0"), "no layer matches 'mlq.0', which was to be left alone; there are: "),
        (("compress", "{alone}", "--max-bytes", "9kB"), "is a bundle without a run; name rows"),
        (("compress", "{alone}", "--data", "{other}"), "the rows are of another schema than the model: it reads "),
        (("compress", "{broken}", "--max-bytes", "9kB"), "layer mlp.0 holds 1 NaN weights of 768; train the model again"),
        (("inspect", "nowhere"), "holds no bundle"),
        (("bench", "nowhere"), "holds no bundle"),
        (("report", "nowhere"), "cannot be read"),
        (("serve", "nowhere"), "holds no bundle"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(folder: Path, tmp_path: Path, args: tuple[str, ...], says: str) -> None:
    given = [a.replace("{run}", str(folder)) for a in args]
    if "{alone}" in args:
        given[given.index("{alone}")] = str(shutil.copytree(folder / "bundle", tmp_path / "alone"))
    if "{other}" in args:
        Clicks(sizes=(300, 500, 20)).dataset(500).save(tmp_path / "other")
        given[given.index("{other}")] = str(tmp_path / "other")
    if "{broken}" in args:
        whole = load(folder / "bundle")
        state = {n: t.clone() for n, t in whole.model.state.items()}
        state["mlp.0.weight"][0, 0] = float("nan")
        save(whole.replace(model=Model(whole.model.spec, state)), shutil.copytree(folder, tmp_path / "run") / "bundle")
        given[given.index("{broken}")] = str(tmp_path / "run")
    if args[0] in ("optimize", "compress"):
        given += ["--out", str(tmp_path / "out")]
    done = run(*given, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("who,clicked\na,1\nb,0\n")
    done = run("train", "log.csv", "--column", "whom:user:categorical", "--column", "clicked:label:numeric", cwd=tmp_path)
    assert done.returncode == 2 and "whom" in done.stderr and "who" in done.stderr


def test_a_missing_label_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("who,clicked\na,1\nb,\n")
    done = run("train", "log.csv", "--column", "who:user:categorical", "--column", "clicked:label:numeric", cwd=tmp_path)
    assert done.returncode == 2 and "clicked" in done.stderr


def test_the_users_own_module_is_trained_and_compressed(tmp_path: Path) -> None:
    (tmp_path / "shopnet.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, rows: int, width: int) -> None:\n"
        "        super().__init__()\n"
        "        self.table = torch.nn.Embedding(rows, 8)\n"
        "        self.layers = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))\n"
        "    def forward(self, item):\n"
        "        return self.layers(self.table(item))\n"
    )
    item = np.random.default_rng(0).integers(0, 300, 2000)
    rows = [f"{i},{i % 2}" for i in item]
    (tmp_path / "log.csv").write_text("item,bought\n" + "\n".join(rows) + "\n")
    flags = ("--column", "item:item:categorical", "--column", "bought:label:numeric", "--split", "random", "--epochs", "3")
    own = ("--model", "shopnet:Net", "--allow", "shopnet", "--args", '{"rows": 302, "width": 32}', "--inputs", "item")
    env = [
        sys.executable,
        "-m",
        "pennyweight",
        "train",
        "log.csv",
        *flags,
        *own,
        "--batch",
        "128",
        "--embedding-l2",
        "0",
        "--out",
        "r",
    ]
    done = subprocess.run(env, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    optimize = (
        "optimize",
        "r",
        "--budget",
        "bytes <= 9kB, auc drop <= 0.02",
        "--allow",
        "shopnet",
        "--seconds",
        "30",
        "--tries",
        "0",
    )
    assert run(*optimize, cwd=tmp_path).returncode == 0
    refused = run("inspect", "r/best", cwd=tmp_path)
    assert refused.returncode == 2 and "allow it with --allow shopnet" in refused.stderr


def test_doctor_tells_cores_extras_and_consequences() -> None:
    told = run("doctor").stdout
    assert "cores" in told and "onnxruntime" in told and ("yes  " in told or "no   " in told)


def test_a_run_is_what_it_was(folder: Path) -> None:
    record, bundle, data, parts = job.open_run(folder)
    assert record.name == "dnn" and len(data) == 6000 and sum(map(len, parts)) == 6000
    assert encode(bundle.model.spec)["factory"] == "pennyweight.model.ranking:DNN"


def test_a_damaged_run_is_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(dumps({**record, "recipe": {"lr": "fast"}}))
    done = run("optimize", str(tmp_path / "run"))
    assert done.returncode == 2 and "recipe.lr" in done.stderr
    with pytest.raises(DataError, match="no run"):
        job.open_run(tmp_path)


def test_a_searched_batch_is_kept_with_the_run(tmp_path: Path) -> None:
    data, threads = Clicks(sizes=(300, 400), seed=3).dataset(20_000), torch.get_num_threads()
    run = job.train(data, "dnn", {"dim": 8, "hidden": [16]}, Recipe(batch=7, epochs=1), tmp_path, split="random", paced=True)
    torch.set_num_threads(threads)
    found = loads(Pace, (tmp_path / "pace.json").read_bytes(), "pace")
    assert run.recipe.batch == found.best.batch == 256 and found.best in found.points


def test_training_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    """The second call finds the checkpoint of the first; both together give what one undisturbed call gives."""
    data = Clicks(sizes=(300, 400), seed=3).dataset(6_000)
    whole = job.train(data, "dnn", {"dim": 8, "hidden": [16]}, Recipe(batch=512, epochs=3), tmp_path / "whole", split="random")

    def stop(event: object) -> None:
        if getattr(event, "epoch", 0) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.train(
            data, "dnn", {"dim": 8, "hidden": [16]}, Recipe(batch=512, epochs=3), tmp_path / "cut", split="random", watch=stop
        )
    again = job.train(data, "dnn", {"dim": 8, "hidden": [16]}, Recipe(batch=512, epochs=3), tmp_path / "cut", split="random")
    assert [e.metric for e in again.epochs] == [e.metric for e in whole.epochs]
    assert not (tmp_path / "cut" / "checkpoint").exists()


def test_how_many_workers_a_load_needs(folder: Path, tmp_path: Path) -> None:
    best = tmp_path / "best"
    variant = Variant("model", costs={"cpu": Curve(0.1, 0.0, 0.02)})
    save(dataclasses.replace(load(folder / "bundle"), policy=Policy(deadline_ms=100.0, variants=(variant,))), best)
    kept, page = tmp_path / "trace.jsonl", tmp_path / "page.html"
    asked = ["simulate", str(best), "--workers", "3", "--p99", "60"]
    done = run(*asked, "--rate", "400", "--seconds", "3", "--keep", str(kept), "--out", str(page))
    assert done.returncode == 0, done.stderr
    assert "2 workers for p99 <= 60 ms and 99.0% on time" in " ".join(done.stdout.split())
    text = page.read_text()
    assert "<svg" in text and "2 workers for p99" in text and text.count("<tr") == 4
    again = run(*asked, "--trace", str(kept))
    assert again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:], "the same requests, the same answer"
    few = run(*asked[:2], "--rate", "900", "--seconds", "1", "--workers", "1")
    assert "1 worker is too few" in few.stdout and few.returncode == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--trace", "weekly"], "weekly cannot be read"),
        (["--rate", "0"], "load.rate is 0"),
    ],
)
def test_loads_that_cannot_be_simulated(folder: Path, args: list[str], said: str) -> None:
    done = run("simulate", str(folder / "bundle"), *args)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
