"""The main job on the shipped sample: train, optimize, prove, report, answer; under three minutes on two quiet cores.

The baseline's width, dropout, embedding L2, batch and learning rate were picked by hand from small searches by validation AUC,
and so was the L2 of matrix factorization, which stands beside it with two kinds of popularity. Some of those searches printed
the test AUC too; ``benchmarks/sample.py`` is the clean grid of 24 around it: its best by validation (.7798) lies among this
recipe's own seeds (.7776 to .7826), and is no better on test (.7776, where three seeds here have a mean of .7784). What runs
here looks at the test rows only for the references and the proof.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pennyweight.core.budget import parse
from pennyweight.core.config import dumps, write
from pennyweight.data.dataset import Split
from pennyweight.data.sample import prepare
from pennyweight.job import Run, Watch, cascade, epochs, improve, keep, trained
from pennyweight.model.bundle import Bundle
from pennyweight.model.metrics import auc
from pennyweight.model.ranking import DeepFM
from pennyweight.model.retrieval import MatrixFactorization, TwoTower
from pennyweight.model.spec import spec_of
from pennyweight.model.train import Recipe, scores
from pennyweight.optimize.search import Options, Outcome, Step

SPLIT = (0.7, 0.1, 0.2)
"""Each person's rows, earliest to latest: to train, to choose, to prove."""

RANKING = Recipe(loss="bce", lr=2e-3, batch=1024, embedding_l2=0.3, schedule="cosine", epochs=7, patience=7, metric="auc")
FACTORS = Recipe(loss="bce", lr=3e-3, batch=1024, embedding_l2=1e-4, patience=2, lr_decay=0.3, epochs=20, metric="auc")
RETRIEVAL = Recipe(
    loss="sampled-softmax", lr=3e-3, batch=1024, patience=2, lr_decay=0.3, epochs=15, metric="recall@100", negatives=512
)

BUDGET = "bytes <= 260kB, auc drop <= 0.001"
"""What the demo asks for unless told otherwise."""


def demo(
    out: Path,
    *,
    budget: str = BUDGET,
    seconds: float = 145.0,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
    watch: Watch = lambda _: None,
    step: Callable[[Step], None] = lambda _: None,
) -> Outcome:
    """Run it all into a run folder; ``tell`` hears one line a stage, ``watch`` training, ``step`` the search."""
    began = time.monotonic()
    limit = parse(budget)
    tell("data: MovieLens ml-latest-small, the shipped sample; would this person rate this movie 4 or more?")
    data = prepare(out / "data", train=SPLIT[0])
    parts = data.split("user", SPLIT, seed)
    tell("references: popularity and matrix factorization")
    references = simple(parts, seed, watch)
    tell("training the ranking stage: DeepFM")
    columns = data.schema.columns
    ranker, fitted = trained(
        spec_of(DeepFM, columns=columns, dim=16, hidden=[400, 400, 400], dropout=0.3), parts, RANKING, seed, None, watch
    )
    tell("training the retrieval stage: two towers")
    retriever, _ = trained(spec_of(TwoTower, columns=columns, dim=16, user_id=False), parts, RETRIEVAL, seed, None, watch)
    run = Run(
        "DeepFM",
        "user",
        SPLIT,
        RANKING,
        seed,
        epochs("baseline", fitted),
        fitted.seconds,
        "MovieLens ml-latest-small;",
        references,
    )
    keep(out, Bundle(cascade(retriever, ranker), catalog=parts.train.catalog), data, run)
    tell(f"optimizing under: {limit.describe()}")
    outcome = improve(out, limit, Options(seconds=seconds, epochs=6, teachers=2, tries=3), watch=step)
    write(
        out / "summary.json",
        dumps({**json.loads((out / "summary.json").read_text()), "seconds": round(time.monotonic() - began, 1)}),
    )
    return outcome


def simple(parts: Split, seed: int, watch: Watch) -> tuple[tuple[str, float], ...]:
    """Test AUC of models anybody would try first: how often and how well a movie was rated, and matrix factorization."""
    train, test = parts.train, parts.test
    label, item = test.column("label"), test.column("item")
    size = train.schema.item.size
    count = np.bincount(train.column("item"), minlength=size)
    liked = np.bincount(train.column("item"), weights=train.column("label"), minlength=size)
    mean = (liked + 5 * liked.sum() / count.sum()) / (count + 5)
    factors, _ = trained(spec_of(MatrixFactorization, columns=train.schema.columns, dim=16), parts, FACTORS, seed, None, watch)
    return (
        ("popularity (ratings a movie has)", auc(label, count[item])),
        ("popularity (share of likes)", auc(label, mean[item])),
        ("matrix factorization", auc(label, scores(factors.build(), parts.test))),
    )


def ask(out: Path, user: int = 1, k: int = 5) -> str:
    """One request to the bundle just made, answered without a port."""
    from pennyweight.serve.app import get

    status, body = asyncio.run(get(out / "best", f"/recommend?user={user}&k={k}"))
    return json.dumps(json.loads(body), indent=2, ensure_ascii=False) if status == 200 else str(body)
