"""The search end to end on small planted data: real training, real compression, real proofs."""

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest

from pennyweight import job
from pennyweight.compress.prune import PruneNeurons
from pennyweight.compress.quantize import QuantizeDense
from pennyweight.core.budget import parse
from pennyweight.core.config import dumps, loads
from pennyweight.core.errors import ConfigError, DataError, Infeasible, NotWorthIt
from pennyweight.data.synthetic import Clicks
from pennyweight.model.bundle import load
from pennyweight.model.train import Recipe
from pennyweight.model.transform import Env, plan
from pennyweight.optimize.evaluate import Bench, memory, outcomes, parts
from pennyweight.optimize.search import Options, Search, Step, _alike, optimize
from pennyweight.optimize.space import stronger
from pennyweight.optimize.trial import Cost, Price, Result, Trial

RECIPE = Recipe(batch=512, epochs=3, lr=3e-3, patience=1)
QUICK = Options(seconds=40, epochs=1, tries=1, candidates=50, timing_s=0.05, engines=("eager",))
UNHURRIED = dataclasses.replace(QUICK, seconds=200)  # on a busy machine as on an idle one

HALF, INT8, INT4 = PruneNeurons(keep=0.5), QuantizeDense("int8"), QuantizeDense("int4")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained DNN over planted clicks, as `pennyweight train` leaves it."""
    folder = tmp_path_factory.mktemp("search") / "run"
    data = Clicks(sizes=(600, 800, 30), seed=1, strength=0.7).dataset(20_000)
    job.train(data, "dnn", {"dim": 8, "hidden": [64, 64]}, RECIPE, folder, split="random")
    return folder


def test_a_feasible_budget_is_met_proven_and_kept(run: Path, tmp_path: Path) -> None:
    outcome = job.improve(run, parse("bytes <= 25kB, auc drop <= 0.01"), UNHURRIED, out=tmp_path)
    result, chosen = outcome.result, outcome.result.chosen
    assert chosen is not None and chosen.measured is not None and chosen.proof is not None
    assert result.verdict == "proven" and chosen.proof.drop_upper_95 <= 0.01
    kept = load(tmp_path / "best")
    assert chosen.measured.bytes == (tmp_path / "best" / "weights.safetensors").stat().st_size <= 25_000
    _, _, _, split = job.open_run(run)
    base = outcomes(load(run / "bundle"), split.test, "auc")
    again = outcomes(kept, split.test, "auc")
    assert np.corrcoef(base, again)[0, 1] > 0.8  # which of the plans that fit is fastest depends on the machine's load
    assert loads(Result, (tmp_path / "result.json").read_bytes()) == result
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["proven"] is True and summary["chosen"]["bytes"] == chosen.measured.bytes
    assert "<svg" in (tmp_path / "report.html").read_text() or "vega" in (tmp_path / "report.html").read_text()


def test_a_model_of_any_data_type_can_be_resumed(run: Path) -> None:
    """Weights are told apart by their bytes, which NumPy has no numbers for in bf16."""
    _, bundle, _, split = job.open_run(run)
    env, made = Env(train=split.train, valid=split.valid), {}
    for kind in ("bf16", "int3"):
        smaller = QuantizeDense(kind).apply(bundle, env)
        made[kind] = Search(smaller, env, parse("bytes <= 25kB"), split.test, QUICK, None, print).fingerprint
    assert made["bf16"] != made["int3"]


def test_bytes_are_predicted_exactly(run: Path, tmp_path: Path) -> None:
    result = job.improve(run, parse("bytes <= 25kB, auc drop <= 0.01"), QUICK, out=tmp_path).result
    made = [t for t in result.trials if t.measured is not None and not any(s.stage == "runtime" for s in t.plan.transforms)]
    assert len(made) >= 3
    assert all(t.predicted.bytes == t.measured.bytes for t in made if t.measured)


def test_an_impossible_budget_shows_the_frontier(run: Path, tmp_path: Path) -> None:
    with pytest.raises(Infeasible, match=r"nothing tried meets bytes <= 1 kB") as caught:
        job.improve(run, parse("bytes <= 1kB, auc drop <= 0.01"), QUICK, out=tmp_path)
    assert caught.value.frontier and all("bytes is" in m for m in caught.value.missing)
    assert not (tmp_path / "best").exists() and (tmp_path / "result.json").exists()


def test_limits_may_be_multiples_of_the_given_model(run: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, tries=0)
    result = job.improve(run, parse("bytes <= 0.4x, p50 <= 1000x, auc drop <= 0.01"), options, out=tmp_path).result
    assert result.chosen is not None and result.chosen.measured is not None and result.baseline.measured is not None
    assert result.chosen.measured.bytes <= 0.4 * result.baseline.measured.bytes
    assert result.budget.startswith("bytes <= 0.4x, p50 <= 1000x"), "as it was asked"
    with pytest.raises(Infeasible, match=r"nothing tried meets p50 <= 0.001x") as caught:
        job.improve(run, parse("p50 <= 0.001x, auc drop <= 0.01"), options)
    assert all("p50 is" in m for m in caught.value.missing)
    with pytest.raises(NotWorthIt):
        job.improve(run, parse("bytes <= 1x"), options)


def test_a_runtime_is_chosen_for_plans_of_one_structure() -> None:
    spent = Cost(1, 1.0, 1.0, 1)
    plans = [plan(t) for t in ((INT8,), (HALF, INT8), (INT4,), (HALF, INT4))]
    first, second = _alike([Trial("free", p, spent) for p in plans])
    assert [t.plan for t in first] == [plans[0], plans[2]] and [t.plan for t in second] == [plans[1], plans[3]]


def test_a_model_within_its_budget_is_left_alone(run: Path, tmp_path: Path) -> None:
    with pytest.raises(NotWorthIt, match=r"of the time is the dense part.*--force"):
        job.improve(run, parse("bytes <= 10MB"), QUICK, out=tmp_path)


def test_finished_trials_are_taken_from_disk(run: Path, tmp_path: Path) -> None:
    def recorded() -> dict[str, object]:
        """Measured costs by plan as the search left them, before the chosen one was timed again."""
        trials = json.loads((tmp_path / "search.json").read_text())["trials"]
        return {dumps(t["plan"]): t["measured"] for t in trials if t["measured"] and '"run"' not in dumps(t["plan"])}

    budget, told = parse("bytes <= 25kB, auc drop <= 0.01"), []
    job.improve(run, budget, UNHURRIED, out=tmp_path)
    first = recorded()
    job.improve(run, budget, UNHURRIED, out=tmp_path, resume=True, watch=told.append)
    second = recorded()
    assert len(first) >= 4 and second == first
    assert [step.message for step in told if step.stage == "train" and "loss" in step.message] == []


def test_resume_refuses_a_search_of_something_else(run: Path, tmp_path: Path) -> None:
    job.improve(run, parse("bytes <= 25kB, auc drop <= 0.01"), QUICK, out=tmp_path)
    with pytest.raises(ConfigError, match="another model, data, budget or objective"):
        job.improve(run, parse("bytes <= 24kB, auc drop <= 0.01"), QUICK, out=tmp_path, resume=True)
    smaller = dataclasses.replace(QUICK, objective="bytes")
    with pytest.raises(ConfigError, match="another model, data, budget or objective"):
        job.improve(run, parse("bytes <= 25kB, auc drop <= 0.01"), smaller, out=tmp_path, resume=True)


def test_ctrl_c_goes_to_the_proof_with_what_there_is(run: Path, tmp_path: Path) -> None:
    def interrupt(step: Step) -> None:
        if step.trial is not None and len(json.loads((tmp_path / "search.json").read_text())["trials"]) == 2:
            signal.raise_signal(signal.SIGINT)

    result = job.improve(run, parse("auc drop <= 0.01"), QUICK, out=tmp_path, watch=interrupt).result
    assert "interrupted" in result.explanation and result.chosen is not None
    assert load(tmp_path / "best").plan


def test_the_compute_cap_is_kept(run: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, seconds=12, epochs=500, tries=10)
    result = job.improve(run, parse("auc drop <= 0.01"), options, out=tmp_path).result
    assert result.seconds <= 1.1 * 12


def test_the_same_seed_gives_the_same_weights(run: Path, tmp_path: Path) -> None:
    made = [job.improve(run, parse("bytes <= 25kB, auc drop <= 0.01"), QUICK, out=tmp_path / n).result for n in ("a", "b")]
    drops = [{t.plan.describe(): t.validation.drop for t in r.trials if t.validation} for r in made]
    assert all(drops[0][k] == pytest.approx(drops[1][k], abs=2e-4) for k in drops[0].keys() & drops[1].keys())


def test_money_is_saved_and_said(run: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, tries=0, price=Price(core_hour=0.04, gb_month=2.0, currency="EUR"))
    result = job.improve(run, parse("auc drop <= 0.01"), options, out=tmp_path).result
    assert "EUR per million requests" in result.savings[0]


def test_parts_add_up_to_the_model(run: Path) -> None:
    bundle, (_, _, _, split) = load(run / "bundle"), job.open_run(run)
    found = parts(bundle, Bench.of(split.test, 50))
    assert sum(p.bytes for p in found) == bundle.model.bytes
    assert {p.name for p in found} >= {"embeddings.tables.user", "mlp.0", "everything else"}


def test_missing_rows_are_named(run: Path) -> None:
    _, bundle, _, split = job.open_run(run)
    with pytest.raises(DataError, match="train, validation and test rows"):
        optimize(bundle, Env(train=split.train), parse("auc drop <= 0.01"), split.test)


def test_stronger_is_a_partial_order() -> None:
    assert stronger((2, 1), (1, 1)) and stronger((1, 1), (1, 1))
    assert not stronger((2, 0), (1, 1)) and not stronger((1, 1), (2, 0))


def test_a_retrieval_model_is_proven_by_its_ranking(tmp_path: Path) -> None:
    data = Clicks(sizes=(300, 400), seed=2, strength=1.0).dataset(12_000)
    recipe = Recipe(loss="sampled-softmax", metric="ndcg@10", batch=512, epochs=2, patience=1, negatives=64)
    job.train(data, "two-tower", {"dim": 16}, recipe, tmp_path / "run", split="random")
    result = job.improve(tmp_path / "run", parse("ndcg@10 drop <= 0.05"), QUICK).result
    assert result.chosen is not None and result.chosen.proof is not None
    assert result.chosen.proof.metric == "ndcg@10" and result.chosen.proof.rows <= 300


def test_memory_is_measured_in_a_process_of_its_own(run: Path) -> None:
    bundle, (_, _, _, split) = load(run / "bundle"), job.open_run(run)
    added = memory(bundle, Bench.of(split.test, 50))
    assert bundle.bytes < added < 500e6
