"""The command line: each command a few lines over the library.

Whatever a person can get wrong ends in one line on standard error that says what and what to do, and exit status 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pennyweight import __version__
from pennyweight.core import budget as budgets
from pennyweight.core import hardware
from pennyweight.core.config import decode, dumps, loads, write
from pennyweight.core.errors import ConfigError, DataError, DeviceError, PennyweightError, PlanError
from pennyweight.data.dataset import How
from pennyweight.progress import watching

if TYPE_CHECKING:
    from pennyweight.distribute import launch

app = typer.Typer(
    name="pennyweight",
    help="A model, data and a budget in; the cheapest deployment that is as good, with the proof, out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out_console, err_console = Console(), Console(stderr=True)

Folder = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Allow = Annotated[
    list[str],
    typer.Option(
        "--allow", help="Import path of a model factory that may be loaded (a module or module:name). Loading runs its code."
    ),
]
Seed = Annotated[int, typer.Option(help="Every random number follows from it.")]


def main() -> None:
    """Run the command line; an error a person can mend is one line and exit status 2."""
    sys.path.append("")  # the working folder, for modules that --allow names; last, so that it hides nothing installed
    try:
        app(auto_envvar_prefix="PENNYWEIGHT")  # as PENNYWEIGHT_SERVE_PORT: how a container is told
    except PennyweightError as error:
        err_console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        err_console.print("stopped")
        sys.exit(130)


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """A model, data and a budget in; the cheapest deployment that is as good, with the proof, out."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Folder = Path("runs/demo"),
    budget: Annotated[str, typer.Option(help="What may be spent and what must not be lost.")] = "",
    seconds: Annotated[float, typer.Option(help="Compute cap of the search, in seconds.")] = 145.0,
    seed: Seed = 0,
) -> None:
    """The main job on the shipped sample: train, optimize, prove, report, answer one request."""
    from pennyweight import demo as job
    from pennyweight.report import table

    with watching(err_console) as (tell, watch, step):
        outcome = job.demo(out, budget=budget or job.BUDGET, seconds=seconds, seed=seed, tell=tell, watch=watch, step=step)
    out_console.print(f"GET /recommend?user=1&k=5\n{job.ask(out)}\n", markup=False, highlight=False)
    out_console.print(table(outcome.result))
    out_console.print(f"report     {out}/report.html          serve it:  pennyweight serve {out}/best", highlight=False)


@app.command()
def train(
    data: Annotated[
        str,
        typer.Argument(help="`sample`, a prepared dataset folder, a CSV or Parquet file, or NAME:FOLDER of a known data set."),
    ],
    out: Folder = Path("runs/run"),
    model: Annotated[
        str, typer.Option(help="dnn, deepfm, dcnv2, dlrm, mf, two-tower or sasrec; or your own, as package.module:factory.")
    ] = "deepfm",
    column: Annotated[
        list[str],
        typer.Option(
            "--column",
            help="For a file: NAME:ROLE:KIND (user, item, context, label, time; categorical, numeric, sequence, time).",
        ),
    ] = [],  # noqa: B006  (typer reads it)
    dim: Annotated[int, typer.Option(help="Numbers in an embedding row.")] = 16,
    hidden: Annotated[str, typer.Option(help="Widths of the hidden layers.")] = "400,400,400",
    dropout: Annotated[float, typer.Option(help="Dropout after each hidden layer.")] = 0.2,
    lr: Annotated[float, typer.Option(help="Learning rate (Adam).")] = 1e-3,
    batch: Annotated[
        str, typer.Option(help="Rows a step; `auto` tries sizes and threads, and takes the fastest that leaves memory free.")
    ] = "4096",
    tables: Annotated[
        str, typer.Option(help="dense: all rows at each step; adagrad, lazy-adam or sgd: the batch's; auto: by their size.")
    ] = "dense",
    rows: Annotated[
        str,
        typer.Option(help="fp32, or int8: a byte a number of tables while they are trained by touched rows, and afterwards."),
    ] = "fp32",
    precision: Annotated[str, typer.Option(help="Of the dense layers' products while training: fp32 or bf16.")] = "fp32",
    epochs: Annotated[int, typer.Option(help="Epochs at most; training stops early.")] = 50,
    embedding_l2: Annotated[float, typer.Option(help="L2 on embedding tables.")] = 0.05,
    loss: Annotated[
        str, typer.Option(help="bce, cross-entropy, mse, bpr, sampled-softmax or gbce; the model's usual one by default.")
    ] = "",
    metric: Annotated[str, typer.Option(help="What validation looks at; auc, or ndcg@10 for retrieval, by default.")] = "",
    args: Annotated[str, typer.Option(help="Your own model's arguments, as JSON.")] = "{}",
    inputs: Annotated[str, typer.Option(help="Columns your own model's forward takes, as a,b.")] = "",
    allow: Allow = [],  # noqa: B006
    split: Annotated[str, typer.Option(help="time, last, user, random or order; by default what the data suggests.")] = "",
    workers: Annotated[
        int, typer.Option(help="Processes that train it together, on each host; 0 is this one. The result is the same.")
    ] = 0,
    placement: Annotated[
        str,
        typer.Option(help="How workers hold a model: data, table, row, column, grid, hybrid, pipeline; or a placement's JSON."),
    ] = "hybrid",
    replicas: Annotated[int, typer.Option(help="Groups of workers that each hold all tables.")] = 1,
    hosts: Annotated[
        Path | None, typer.Option(help="File with a host a line, ADDRESS[:PORT] [WORKERS]; give the same command on each.")
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="A Ray cluster to train on, --workers in all: ray://HOST:PORT, auto, or local to try it.")
    ] = "",
    least: Annotated[
        int, typer.Option(help="Hosts (of a Ray cluster: workers) that are enough to begin and to go on; all by default.")
    ] = 0,
    every: Annotated[int, typer.Option(help="Steps between workers' checkpoints; a minute by default.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds that a worker or host which does not answer is waited for.")] = 60.0,
    memory: Annotated[str, typer.Option(help="Memory that each worker may take, as 2GB; the system enforces it.")] = "",
    traffic: Annotated[str, typer.Option(help="Numbers on their way between workers: fp32, fp16, bf16 or int8.")] = "fp32",
    balance: Annotated[bool, typer.Option("--balance", help="Slow workers get fewer rows of each batch.")] = False,
    seed: Seed = 0,
) -> None:
    """Train a model and leave a run folder. Stopped and started again, it goes on where it was.

    Known data sets, each in its folder as published: frappe-x1, ml-1m, gowalla, amazon-beauty, credit-default, mnist-5k,
    movie-review, sms-spam; name one as frappe-x1:FOLDER.
    """
    from pennyweight import job
    from pennyweight.model.train import Recipe

    usual = job.USUAL.get(model, ("bce", "auc"))
    loss, metric = loss or usual[0], metric or usual[1]
    if batch != "auto" and not batch.isdecimal():
        raise ConfigError(f"--batch is {batch!r}; give a number of rows, or auto")
    settings = {
        "loss": loss, "lr": lr, "batch": 4096 if batch == "auto" else int(batch), "epochs": epochs,
        "embedding_l2": embedding_l2, "metric": metric, "tables": tables, "rows": rows, "precision": precision,
    }  # fmt: skip
    recipe = decode(Recipe, settings, "train")
    given = loads(dict, args, "--args") if ":" in model else _model_args(model, dim, hidden, dropout)
    fed = tuple(c for c in inputs.split(",") if c)
    looked_after = {
        "cluster": cluster,
        "least": least,
        "every": every,
        "timeout_s": timeout,
        "traffic": traffic,
        "balance": balance,
    }
    many = _many(workers, placement, replicas, hosts, memory, looked_after) if workers or hosts or cluster else None
    with watching(err_console) as (tell, watch, _):
        dataset, how, fractions = _dataset(data, column, out / "data")
        tell(f"{len(dataset):,} rows; training {model}")
        how = decode(How, split or how, "--split")
        run = job.train(
            dataset, model, given, recipe, out, inputs=fed, split=how, fractions=fractions, seed=seed, describe=data,
            allow=tuple(allow), watch=watch, paced=batch == "auto", many=many,
        )  # fmt: skip
    best = max(e.metric for e in run.epochs) if run.epochs else float("nan")
    out_console.print(
        f"{out}/bundle: {model}, validation {metric} {best:.4f} in {run.seconds:.0f} s. Next: pennyweight optimize {out}",
        highlight=False,
    )


def _many(
    workers: int, placement: str, replicas: int, hosts: Path | None, memory: str, looked_after: dict[str, Any]
) -> launch.Many:
    """The workers that the options of ``train`` describe."""
    from pennyweight.distribute import launch
    from pennyweight.model.placement import Placement

    file = Path(placement)
    given = looked_after | {
        "workers": workers or 1,
        "placement": loads(Placement, _text(file), placement) if file.suffix == ".json" else placement,
        "replicas": replicas,
        "hosts": () if hosts is None else launch.read_hosts(hosts),
        "memory_bytes": int(budgets.parse(f"memory <= {memory}").memory_bytes or 0) if memory else 0,
    }
    made: launch.Many = decode(launch.Many, given, "train")
    return made


@app.command()
def optimize(
    run: Annotated[Path, typer.Argument(help="A run folder, as `train` leaves it.")],
    budget: Annotated[
        str, typer.Option(help=f"As in: {budgets.EXAMPLE}; p50 <= 0.33x is three times faster.")
    ] = "quality drop <= 0.001",
    out: Annotated[Path | None, typer.Option(help="Folder for the result; the run itself by default.")] = None,
    seconds: Annotated[float, typer.Option(help="Compute cap, in seconds.")] = 600.0,
    epochs: Annotated[int, typer.Option(help="Epochs of recovery at most.")] = 10,
    tries: Annotated[int, typer.Option(help="Structures trained at most.")] = 4,
    candidates: Annotated[int, typer.Option(help="Items in the request that is timed.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Take finished trials from the folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Search even if the model is within the budget already.")] = False,
    core_hour: Annotated[float, typer.Option(help="Price of a core for an hour.")] = 0.0,
    gb_month: Annotated[float, typer.Option(help="Price of a GB of memory for a month.")] = 0.0,
    currency: Annotated[str, typer.Option(help="Of the prices.")] = "USD",
    allow: Allow = [],  # noqa: B006
) -> None:
    """Find the cheapest deployment that is proven as good. Ctrl-C keeps the best so far."""
    from pennyweight import job
    from pennyweight.optimize.search import Options
    from pennyweight.optimize.trial import Price
    from pennyweight.report import table

    price = Price(core_hour=core_hour, gb_month=gb_month, currency=currency) if core_hour or gb_month else None
    options = Options(seconds=seconds, epochs=epochs, tries=tries, candidates=candidates, force=force, price=price)
    with watching(err_console) as (_, _, step):
        outcome = job.improve(run, budgets.parse(budget), options, out=out, resume=resume, allow=tuple(allow), watch=step)
    out_console.print(table(outcome.result))
    target = out or run
    serve = (
        f"serve it:  pennyweight serve {target}/best"
        if outcome.result.chosen
        else "nothing was proven; the run's own bundle stays"
    )
    out_console.print(f"report     {target}/report.html          {serve}", highlight=False)


@app.command()
def compress(
    source: Annotated[
        Path, typer.Argument(help="A run folder, as `train` leaves it, or a bundle: one of a run, or with --data.")
    ],
    max_bytes: Annotated[str, typer.Option(help="Largest weights file, as 200kB; as small as is proven by default.")] = "",
    auc_drop: Annotated[str, typer.Option(help="Largest drop of the AUC, as .001 or 0.1%.")] = "",
    drop: Annotated[str, typer.Option(help="The same of the metric the model is judged by, whichever it is.")] = "",
    skip: Annotated[list[str], typer.Option("--skip", help="Pattern of layers that nothing may touch; may repeat.")] = [],  # noqa: B006
    data: Annotated[
        Path | None, typer.Option(help="For a bundle without a run: a dataset folder it was not trained on.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the result; the run, or BUNDLE-compressed, by default.")] = None,
    seconds: Annotated[float, typer.Option(help="Compute cap, in seconds.")] = 600.0,
    epochs: Annotated[int, typer.Option(help="Epochs of recovery at most.")] = 10,
    tries: Annotated[int, typer.Option(help="Structures trained at most; 0 keeps to what needs no training.")] = 4,
    resume: Annotated[bool, typer.Option("--resume", help="Take finished trials from the folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Search even if the model is within the budget already.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print summary.json in place of tables.")] = False,
    allow: Allow = [],  # noqa: B006
) -> None:
    """Make a model's file as small as is proven as good, whatever it does to the time. Ctrl-C keeps the best so far."""
    from pennyweight import api, job
    from pennyweight.optimize.search import Options
    from pennyweight.report import layers, table, tried

    budget = _bytes_budget(max_bytes, auc_drop, drop)
    run, bundle = job.located(source)
    target = out or (source if bundle != source else source.with_name(f"{source.resolve().name}-compressed"))
    given: dict[str, Any] = {"seconds": seconds, "epochs": epochs, "tries": tries, "force": force, "objective": "bytes"}
    given |= {"skip": tuple(skip)}
    with watching(err_console) as (_, _, step):
        shared: dict[str, Any] = {"out": target, "resume": resume, "allow": tuple(allow), "watch": step}
        if data is not None:
            from pennyweight.data.dataset import Dataset

            outcome = api.optimize(bundle, Dataset.open(data), budget, **given, **shared)
        elif run is not None:
            outcome = job.improve(run, budget, Options(**given), bundle=bundle, **shared)
        else:
            raise DataError(f"{source} is a bundle without a run; name rows that it was not trained on with --data FOLDER")
    result = outcome.result
    if json:
        typer.echo(_text(target / "summary.json").decode())
    else:
        for shown in (tried(result), *([layers(result)] if result.parts_after else []), table(result)):
            out_console.print(shown)
    end = f"bundle: {target}/best" if result.chosen else "nothing was proven; the bundle given stays"
    (err_console if json else out_console).print(f"report     {target}/report.html          {end}", highlight=False)


@app.command()
def apply(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    plan: Annotated[Path, typer.Argument(help='A plan as JSON: {"transforms": [{"transform": "quantize-tables", ...}]}.')],
    out: Folder,
    run: Annotated[Path | None, typer.Option(help="The run folder, for transforms that train or calibrate.")] = None,
    allow: Allow = [],  # noqa: B006
) -> None:
    """Apply a plan to a bundle, without a search or a proof."""
    from pennyweight import job
    from pennyweight.model.bundle import load, save
    from pennyweight.model.transform import Env, Plan

    made = loads(Plan, _text(plan), str(plan))
    before, env = load(bundle), Env(topology=hardware.detect(), allow=tuple(allow))
    if run is not None:
        record, given, _, parts = job.open_run(run)
        env = Env(
            parts.train,
            parts.valid,
            parts.train,
            None,
            hardware.detect(),
            (given.model,),
            record.recipe,
            record.seed,
            tuple(allow),
        )
    after = made.apply(before, env)
    save(after, out)
    out_console.print(
        f"{out}: {before.bytes:,} -> {after.bytes:,} bytes ({before.bytes / after.bytes:.1f}x smaller)", highlight=False
    )


@app.command()
def inspect(bundle: Annotated[Path, typer.Argument(help="A bundle folder.")], allow: Allow = []) -> None:  # noqa: B006
    """What a bundle holds: layers and their bytes, placement, runtime, policy, and the plan that made it."""
    from pennyweight.compress.rewrite import untouched
    from pennyweight.core.config import encode
    from pennyweight.model.bundle import load
    from pennyweight.optimize.cost import described

    held = load(bundle)
    shown = Table("layer", "what", "bytes", "FLOPs/row", title=f"{held.model.spec.factory}: {held.bytes:,} bytes")
    for path, layer in described(held, allow).items():
        facts = ", ".join(f"{k} {v}" for k, v in encode(layer).items() if v not in (None, 0, "", False) and k != "layer")
        shown.add_row(path, f"{type(layer).__name__.lower()}: {facts}", f"{layer.bytes():,}", f"{layer.flops():,}")
    for strange in untouched(held.model.build(allow)):
        shown.add_row(strange.path, f"{strange.kind}: no compression knows this kind", f"{strange.bytes:,}", "")
    out_console.print(shown)
    for name in ("placement", "runtime", "policy"):
        out_console.print(f"{name}: {encode(getattr(held, name))}", highlight=False)
    if held.catalog is not None and held.catalog.items is not None and len(held.catalog.item_ids) > 1:
        out_console.print(f"requests: {_parts(held, allow)}", highlight=False)
    out_console.print("plan: " + ("\n  ".join(["", *map(str, held.plan)]) if held.plan else "as given"), highlight=False)


def _parts(held: Any, allow: list[str]) -> str:
    """What candidates of one request could share."""
    from pennyweight.accelerate.runner import Runner
    from pennyweight.model.bundle import Runtime

    probe = held.catalog.request(None, (), held.catalog.item_ids[:2])
    with Runner(held.replace(runtime=Runtime("eager", 1, shared=True)), tuple(allow), probe=probe, fallback=True) as runner:
        return "nothing to share between candidates" if runner.shared is None else runner.shared.count.describe()


@app.command()
def bench(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders, the first is the one compared with.")],
    candidates: Annotated[int, typer.Option(help="Items in a request.")] = 500,
    seconds: Annotated[float, typer.Option(help="Seconds a bundle.")] = 2.0,
    seed: Seed = 0,
    allow: Allow = [],  # noqa: B006
) -> None:
    """Time bundles on the same requests, in turns."""
    from pennyweight.data.requests import Trace
    from pennyweight.model.bundle import load
    from pennyweight.optimize.evaluate import Bench, race

    held = [load(b) for b in bundles]
    catalog = held[0].catalog
    if catalog is None or catalog.items is None:
        raise DataError(f"{bundles[0]} has no catalogue of items to make requests of; bench a recommender's bundle")
    trace = Trace.sample(catalog, 64, candidates, seed)
    costs = race(held, Bench.replay(trace, catalog, seconds), tuple(allow))
    shown = Table(
        "bundle", "bytes", "p50 ms", "p99 ms", "smaller", "faster at p99", title=f"one user, {costs[0].candidates} candidates"
    )
    for path, spent in zip(bundles, costs, strict=True):
        ratios = f"{costs[0].bytes / spent.bytes:.1f}x", f"{costs[0].p99_ms / spent.p99_ms:.1f}x"
        shown.add_row(str(path), f"{spent.bytes:,}", f"{spent.p50_ms:.3f}", f"{spent.p99_ms:.3f}", *ratios)
    out_console.print(shown)


@app.command()
def plan(
    source: Annotated[
        Path, typer.Argument(help="A bundle, a run folder, or a model's spec as JSON (factory, args), which may fit nowhere.")
    ],
    workers: Annotated[
        int, typer.Option(help="Workers in all; by default those of the topology's file, else a core each.")
    ] = 0,
    hosts: Annotated[int, typer.Option(help="Hosts they are on, all alike; they divide the workers.")] = 0,
    memory: Annotated[str, typer.Option(help="Memory of each worker, as 2GB; by default its share of this machine.")] = "",
    batch: Annotated[int, typer.Option(help="Rows in a step, over all workers.")] = 4096,
    tables: Annotated[
        str, typer.Option(help="How tables are trained, as in `train`: dense, adagrad, lazy-adam or sgd.")
    ] = "adagrad",
    topology: Annotated[
        Path | None,
        typer.Option(
            help="JSON of hosts, links, rates and prices; where there is no such file, what is measured is written there."
        ),
    ] = None,
    rehearse: Annotated[int, typer.Option(help="Steps to train with the placement here, to hold against the prediction.")] = 0,
    scale: Annotated[bool, typer.Option("--scale", help="Also on paper: 2 to 4,096 workers, each with as many rows.")] = False,
    before: Annotated[str, typer.Option(help="What the model weighed before it was compressed, as 2GB.")] = "",
    out: Annotated[Path | None, typer.Option(help="Placement to write, for `train --placement`; a bundle's own stays.")] = None,
    report: Annotated[Path | None, typer.Option(help="Page to write, with the placement drawn.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON in place of tables.")] = False,
    allow: Allow = [],  # noqa: B006
) -> None:
    """Which worker should hold which table, what a step will cost, and why.

    The placement that fits memory, takes the least predicted time a step, then the least money: tables whole on every worker,
    on one, or cut by row, column or both; in one group of workers or in several that hold the same. Rates are measured here
    first, in some seconds: arithmetic, lookups, two processes that exchange messages, and a step of the model itself. A model
    that fits nowhere says by how much, and four ways out.

    Then: pennyweight train DATA --workers 8 --placement placement.json
    """
    from pennyweight.distribute import formulas, planner
    from pennyweight.distribute import rehearse as stage
    from pennyweight.distribute import scale as paper
    from pennyweight.report import placement as shown
    from pennyweight.report import scaling

    with watching(err_console) as (tell, _, _):
        there = _topology(topology, workers, hosts, memory, tell)
        work, spec, columns = _work(source, batch, tables, tuple(allow), there, tell)
        made = planner.plan(work, there)
        four = formulas.printed(made, int(_size(before)) if before else 0)
        measured = None
        if rehearse:
            tell(f"training {rehearse} steps with {there.world} workers here")
            trial = stage.Trial.of(
                spec, made.chosen.placement, batch, columns, update=work.update, steps=rehearse, allow=tuple(allow)
            )
            with stage.Stage(there.world) as workers_here:
                measured = workers_here.measure(trial)
        grown = paper.simulate(work.replace(batch=max(1, batch // there.world)), paper.linked(there)) if scale else ()
    if out is not None:
        write(out, dumps(made.chosen.placement))
    if report is not None:
        write(report, shown.page(made, four, measured, grown))
    if json:
        found = shown.summary(made, four, measured)
        typer.echo(dumps({**found, "scale": grown} if grown else found), nl=False)
        return
    for drawn in (*shown.tables(made), *([scaling.table(work.name, grown)] if grown else ())):
        out_console.print(drawn)
    for line in shown.lines(made, four, measured):
        out_console.print(line, markup=False, highlight=False, soft_wrap=True)
    for path in (p for p in (out, report) if p is not None):
        out_console.print(f"wrote {path}", markup=False, highlight=False)


def _topology(file: Path | None, workers: int, hosts: int, memory: str, tell: Any) -> hardware.Topology:
    """The hosts to plan for: those of a file, or this machine measured; options change their number."""
    from pennyweight.distribute import calibrate

    if min(workers, hosts) < 0:
        raise ConfigError(f"--workers {workers} and --hosts {hosts} must not be negative")
    known = loads(hardware.Topology, _text(file), str(file)) if file is not None and file.exists() else None
    count = hosts or (known.hosts if known else 1)
    world = workers or (known.workers * count if known else hardware.limits()[0] * count)
    if world % count:
        raise ConfigError(f"{world} workers do not divide among {count} hosts; give --workers a multiple of {count}")
    if known is None:
        tell("measuring arithmetic, lookups and messages between two processes")
        known = calibrate.measured(count, world // count)
        if file is not None:
            write(file, dumps(known))
    room = int(_size(memory)) if memory else 0
    return calibrate.resized(known, count, world // count, room)


def _work(
    source: Path, batch: int, tables: str, allow: tuple[str, ...], there: hardware.Topology, tell: Any
) -> tuple[Any, Any, Any]:
    """What a step asks, its dense layers timed unless the topology is another machine's; the spec and its columns."""
    from pennyweight import job
    from pennyweight.distribute import calibrate, workload
    from pennyweight.model.bundle import load
    from pennyweight.model.spec import Spec

    run, bundle = (None, source) if source.is_file() else job.located(source)
    update: Any = decode(workload.Update, tables or "adagrad", "--tables")
    if source.is_file():
        spec, columns = loads(Spec, _text(source), str(source)), None
        work = workload.count(spec, batch, update, allow)
    else:
        held = load(bundle, mapped=True)
        spec, columns = held.model.spec, held.catalog.schema.features if held.catalog is not None else None
        work = workload.of(held, batch, update, allow)
    if not tables and run is not None and (run / "run.json").is_file():
        recipe = loads(job.Run, _text(run / "run.json"), str(run / "run.json")).recipe
        work = work.replace(update=workload.update_of(recipe, sum(t.rows * t.dim for t in work.tables)))
    if there.cpu.model != hardware.processor()[0]:
        return work, spec, columns
    tell("timing a step of the model's dense layers")
    each = max(1, batch // there.world)
    return (
        work.replace(timed=calibrate.timed(spec, (max(1, each // 4), each), work.update, allow, columns=columns)),
        spec,
        columns,
    )


def _size(text: str) -> float:
    """Bytes of a size as a person writes it."""
    return float(budgets.parse(f"memory <= {text}").memory_bytes or 0)


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="A run folder, or its result.json.")],
    out: Annotated[Path | None, typer.Option(help="Where the page goes; report.html beside the result by default.")] = None,
) -> None:
    """Draw the report of a finished search again."""
    from pennyweight.core.config import write
    from pennyweight.optimize.trial import Result
    from pennyweight.report import render

    file = result / "result.json" if result.is_dir() else result
    target = out or file.with_name("report.html")
    write(target, render(loads(Result, _text(file), str(file))))
    out_console.print(str(target))


@app.command()
def tune(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder; its runtime is written anew.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the tuned bundle here instead.")] = None,
    candidates: Annotated[int, typer.Option(help="Items in a request.")] = 500,
    seconds: Annotated[float, typer.Option(help="Seconds to tune engines for, and again for the index.")] = 60.0,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Try bf16 too, where logits hardly move; prove the result again.")
    ] = False,
    drop: Annotated[float, typer.Option(help="Recall that an approximate index may lose.")] = 0.01,
    again: Annotated[bool, typer.Option("--again", help="Measure even where this machine remembers the answer.")] = False,
    seed: Seed = 0,
    allow: Allow = [],  # noqa: B006
) -> None:
    """Find the fastest engine, threads, cut and index for a bundle on this machine, and write them into it."""
    from pennyweight.accelerate import tune as tuner
    from pennyweight.data.requests import Trace
    from pennyweight.model.bundle import load, save
    from pennyweight.model.transform import Env

    given = load(bundle)
    catalog = given.catalog
    if catalog is None or catalog.items is None:
        raise DataError(f"{bundle} has no catalogue of items to make requests of; tune a recommender's bundle")
    requests = Trace.sample(catalog, 64, candidates, seed).batches(catalog)
    precisions: Any = ("fp32", "bf16") if bf16 else ("fp32",)
    memory = None if again else tuner.folder()
    made = tuner.fastest(given, requests, seconds=seconds, precisions=precisions, allow=tuple(allow), memory=memory)
    if made.trace:
        shown = Table("engine", "threads", "cut", "precision", "p50 ms", "", title=f"{len(made.trace)} of {made.points} points")
        for t in made.trace:
            r, ms = t.runtime, f"{t.latency.p50_ms:.3f}" if t.latency else "-"
            shown.add_row(r.engine, str(r.threads), str(r.batch or "none"), r.precision, ms, t.note)
        out_console.print(shown)
    if made.note:
        err_console.print(made.note, markup=False, highlight=False, soft_wrap=True)
    chosen = tuner.sharing(given, made.chosen, requests, allow=tuple(allow))
    steps = [chosen, *_index(given, requests, drop, seconds, seed, tuple(allow))]
    tuned = given
    for step in steps:
        try:
            tuned = step.apply(tuned, Env())
        except PlanError:  # it runs so already
            continue
        out_console.print(step.describe(), markup=False, highlight=False)
    if tuned is given:
        out_console.print("the bundle runs so already")
    if tuned is not given or out is not None:
        out_console.print(f"wrote {save(tuned, out or bundle)}", highlight=False, markup=False)


def _index(given: Any, requests: list[Any], drop: float, seconds: float, seed: int, allow: tuple[str, ...]) -> list[Any]:
    """The index that pays for this catalogue; nothing for a model without vectors, or a small catalogue."""
    import numpy as np

    from pennyweight.accelerate import index
    from pennyweight.accelerate.runner import Runner

    ids = given.catalog.item_ids
    if len(ids) < index.PAYS:
        return []
    with Runner(given.replace(runtime=type(given.runtime)()), allow) as runner:
        if not hasattr(runner.module, "item_vectors"):
            return []
        chunks = np.array_split(ids, -(-len(ids) // index.SMALL))
        vectors = np.concatenate([runner.item_vectors(given.catalog.item_batch(c)) for c in chunks])
        users = np.concatenate([runner.user_vectors({n: t[:1] for n, t in r.items()}) for r in requests])
    chosen, tried = index.choose(vectors, users, drop=drop, seconds=seconds, seed=seed)
    shown = Table("index", "vectors", "lists", "recall", "ms a user", "bytes an item", "", title=f"{len(ids):,} items")
    for t in tried:
        lists = f"{t.index.probes} of {t.index.lists}" if t.index.lists else ""
        shown.add_row(
            t.index.kind, t.index.data_type, lists, f"{t.index.recall:.4f}", f"{t.ms:.3f}", f"{t.bytes_item:.0f}", t.note
        )
    out_console.print(shown)
    return [chosen]


@app.command()
def export(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    to: Annotated[
        list[str], typer.Option("--to", help="onnx, openvino, pt2 or torch; may repeat. All that are installed by default.")
    ] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Folder to write; BUNDLE-export by default.")] = None,
    data: Annotated[Path | None, typer.Option(help="A dataset folder whose first rows are checked with.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of timing.")] = 2.0,
    seed: Seed = 0,
    allow: Allow = [],  # noqa: B006
) -> None:
    """Write a bundle for other runtimes: each export is opened again and must answer as the bundle does."""
    from pennyweight.data.dataset import Dataset
    from pennyweight.export import export as leave
    from pennyweight.model.bundle import load

    rows = None if data is None else next(iter(Dataset.open(data).batches(100)))
    target = out or bundle.with_name(f"{bundle.resolve().name}-export")
    made = leave(load(bundle), target, to, allow=allow, data=rows, seed=seed, seconds=seconds)
    shown = Table("target", "files", "bytes", "p50 ms", "largest difference", "runtime", "operations", title=str(target))
    for part in made.parts:
        shown.add_row(
            "the bundle", f"{part.name}, {part.rows} rows", f"{made.bytes:,}", f"{part.p50_ms:.3f}", "", made.engine, ""
        )
        for w in (w for w in made.written if w.graph == part.name):
            files = ", ".join(f.name for f in w.files)
            shown.add_row(w.target, files, f"{w.bytes:,}", f"{w.p50_ms:.3f}", f"{w.difference:.1g}", w.runtime, w.opset)
    out_console.print(shown)
    out_console.print(made.allowed(), markup=False, highlight=False)
    for line in [*(f"{w.target}: {w.note}" for w in made.written if w.note), *map(str, made.failed)]:
        err_console.print(line, markup=False, highlight=False, soft_wrap=True)
    if to and made.failed:
        raise DeviceError(f"not exported to {', '.join(f.target for f in made.failed)}; {target} holds the others")


@app.command()
def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    store: Annotated[
        str, typer.Option(help="The event log: a file (events.db beside the bundle by default), or valkey://HOST:6379.")
    ] = "",
    get: Annotated[str, typer.Option("--get", help="Answer this one request and leave, as in: /recommend?user=1&k=5")] = "",
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that score: one a core or GPU by default; 0 scores in this one.", min=0, max=256),
    ] = None,
    spares: Annotated[int, typer.Option(help="Processes more that take the place of one that died.", min=0, max=16)] = 1,
    cluster: Annotated[
        str, typer.Option(help="A Ray cluster to serve on, by --workers replicas: ray://HOST:PORT, auto, or local to try it.")
    ] = "",
    allow: Allow = [],  # noqa: B006
) -> None:
    """Serve recommendations over HTTP, with a page at /."""
    import asyncio

    if cluster and not get:
        from pennyweight.serve import replicas

        replicas.run(bundle, cluster, host, port, store, tuple(allow), workers or 2)
        return
    from pennyweight.serve import app as server

    if not get:
        server.run(bundle, host=host, port=port, store=store, allow=tuple(allow), workers=workers, spares=spares)
        return
    status, body = asyncio.run(server.get(bundle, get, store=store, allow=tuple(allow)))
    typer.echo(body)
    raise typer.Exit(0 if status < 400 else 2)


@app.command()
def simulate(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    trace: Annotated[
        str, typer.Option(help="poisson, gamma, bursts or diurnal; or a file that --keep wrote (Arrow, or .jsonl).")
    ] = "poisson",
    rate: Annotated[float, typer.Option(help="Requests a second of a trace that is drawn.")] = 100.0,
    seconds: Annotated[float, typer.Option(help="Length of a trace that is drawn.")] = 20.0,
    items: Annotated[int, typer.Option(help="Items a request has on average; they vary as recommenders' do.")] = 144,
    pulse: Annotated[float, typer.Option(help="Factor on the rate for 5 seconds in the middle.")] = 1.0,
    workers: Annotated[int, typer.Option(help="The largest number of workers tried.", min=1, max=256)] = 8,
    p99: Annotated[float, typer.Option(help="Milliseconds wanted; the policy's deadline by default.")] = 0.0,
    on_time: Annotated[float, typer.Option(help="Share of requests to be answered in time.", min=0, max=1)] = 0.99,
    keep: Annotated[Path | None, typer.Option(help="Write the trace here, to be replayed elsewhere.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the answer as a page here.")] = None,
    seed: Seed = 0,
    allow: Allow = [],  # noqa: B006
) -> None:
    """How many workers a load needs: a trace replayed through the scheduler on modelled workers."""
    from pennyweight.accelerate.profile import profiled
    from pennyweight.core.config import write
    from pennyweight.data.requests import KINDS, Arrivals, Load
    from pennyweight.report import serving
    from pennyweight.schedule.simulate import Fleet, enough, sweep

    drawn = {"kind": trace, "rate": rate, "seconds": seconds, "items": items, "pulse": pulse, "seed": seed}
    arrivals = decode(Load, drawn, "simulate").draw() if trace in KINDS else Arrivals.load_from(trace)
    policy = profiled(bundle, int(arrivals.items.max()), seed, tuple(allow), tell=err_console.print)
    device = next(iter(policy.variants[0].costs))
    wanted = p99 or policy.deadline_ms
    points = sweep(policy, arrivals, range(1, workers + 1), Fleet(device=device), seed=seed)
    found = enough(points, wanted, on_time)
    shown = Table(*serving.heads(points))
    for point in points:
        shown.add_row(*serving.cells(point), style="bold" if point is found else "")
    out_console.print(arrivals.describe(), highlight=False)
    out_console.print(shown)
    out_console.print(serving.answer(points, found, wanted, on_time), highlight=False)
    if keep is not None:
        arrivals.save(keep)
    if out is not None:
        write(out, serving.page(points, found, wanted, on_time, arrivals.describe()))


@app.command()
def doctor() -> None:
    """What this machine has, and what that rules in and out."""
    topology = hardware.detect()
    for device in topology.devices:
        memory = f"{device.memory_bytes / 2**30:.1f} GiB"
        out_console.print(
            f"{device.name}: {device.model}, {device.cores} cores, {memory}, {' '.join(device.features)}", highlight=False
        )
    shown = Table("extra", "installed", "what it brings", "to get it")
    for extra in hardware.extras():
        shown.add_row(extra.name, extra.installed or "-", extra.brings, extra.remedy)
    out_console.print(shown)
    for finding in hardware.findings(topology):
        out_console.print(("yes  " if finding.allowed else "no   ") + finding.text, highlight=False)


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _bytes_budget(max_bytes: str, auc_drop: str, drop: str) -> budgets.Budget:
    """The budget that the options of `compress` name."""
    given = {"bytes": max_bytes, "auc drop": auc_drop, "quality drop": drop}
    if auc_drop and drop:
        raise ConfigError("--auc-drop and --drop are two margins; keep one")
    clauses = [f"{name} <= {amount}" for name, amount in given.items() if amount]
    return budgets.parse(", ".join(clauses or [f"quality drop <= {budgets.DEFAULT_MARGIN}"]))


def _model_args(model: str, dim: int, hidden: str, dropout: float) -> dict[str, Any]:
    try:
        widths = [int(w) for w in hidden.split(",") if w.strip()]
    except ValueError as error:
        raise ConfigError(f"--hidden {hidden!r} is not a list of whole numbers, as in 400,400,400") from error
    if model in ("mf", "sasrec", "two-tower"):
        return {"dim": dim}
    return {"dim": dim, "hidden": widths, "dropout": dropout}


def _dataset(data: str, columns: list[str], out: Path) -> tuple[Any, str, tuple[float, float, float]]:
    """The dataset a person named (sample, prepared folder, known set, or file) and how it is best split."""
    from pennyweight.data import ingest, loaders, sample
    from pennyweight.data.dataset import Dataset

    usual = (0.8, 0.1, 0.1)
    if data == "sample":
        return sample.prepare(out, train=0.7), "user", (0.7, 0.1, 0.2)
    path = Path(data)
    if (path / "dataset.json").is_file():
        return Dataset.open(path), "time", usual
    name, colon, folder = data.partition(":")
    if colon and name in loaders.LOADERS:
        parts = loaders.load(name, folder, out)
        rows = [len(p) for p in parts]
        return Dataset.open(out), "order", (rows[0] / sum(rows), rows[1] / sum(rows), rows[2] / sum(rows))
    if not path.is_file():
        known = ", ".join(f"{n}:FOLDER" for n in loaders.LOADERS)
        raise DataError(f"no data at {data!r}; name a CSV or Parquet file, a dataset folder, `sample`, or one of {known}")
    if not columns:
        raise ConfigError(
            f"say what the columns of {data} are, as in: --column userId:user:categorical --column clicked:label:numeric"
        )
    read = ingest.read_parquet if path.suffix == ".parquet" else ingest.read_csv
    return read(path, [_column(c) for c in columns], out), "time", usual


def _column(text: str) -> Any:
    from pennyweight.data.ingest import ColumnSpec

    pieces = text.split(":")
    if len(pieces) < 3:
        raise ConfigError(f"--column {text!r} is not NAME:ROLE:KIND, as in userId:user:categorical")
    name, role, kind, *rest = pieces
    extra = dict(piece.partition("=")[::2] for piece in rest)
    numbers = {k: int(v) if v.lstrip("-").isdigit() else v for k, v in extra.items()}
    return decode(ColumnSpec, {"name": name, "role": role, "kind": kind, **numbers}, f"--column {name}")
