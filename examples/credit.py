"""Financial risk: who defaults on a credit card, by a tabular network with embeddings, made smaller and faster.

python examples/credit.py --data FOLDER/credit-default --out runs/credit
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.preprocessing import QuantileTransformer

import pennyweight
from pennyweight.data.dataset import Dataset, Split
from pennyweight.data.loaders import credit_default
from pennyweight.model.ranking import DCNv2
from pennyweight.model.spec import Model, seeded, spec_of
from pennyweight.model.train import Fit, Recipe

RECIPE = Recipe(lr=1e-3, batch=512, epochs=20, patience=20, schedule="cosine", metric="auc")
BUDGET = "bytes <= 0.125x, p50 <= 0.45x, auc drop <= 0.003"


def normal(parts: Split) -> Split:
    """The rows with their amounts spread to a normal distribution, as learned from the training rows."""
    names = [c.name for c in parts.train.schema.features if c.kind == "numeric"]
    amounts = [np.stack([p.column(n) for n in names], 1) for p in parts]
    spread = QuantileTransformer(output_distribution="normal", random_state=0).fit(amounts[0])
    return Split(*(_with(p, names, spread.transform(a)) for p, a in zip(parts, amounts, strict=True)))


def _with(data: Dataset, names: list[str], values: np.ndarray) -> Dataset:
    columns = {c.name: data.column(c.name) for c in data.schema.columns} | dict(zip(names, values.T, strict=True))
    return Dataset.from_arrays(columns, data.schema, data.catalog.vocabularies)


def trained(data: Split, seed: int = 0) -> tuple[Model, Fit]:
    """A cross network beside an MLP over embeddings and amounts, trained."""
    spec = spec_of(DCNv2, columns=data.train.schema.columns, dim=8, cross=2, hidden=[256, 128], dropout=0.3)
    net = seeded(spec, seed)
    fit = pennyweight.fit(net, data.train, data.valid, RECIPE, seed=seed)
    return Model.of(net, spec), fit


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of UCI_Credit_Card.csv")
    parser.add_argument("--out", type=Path, default=Path("runs/credit"), help="folder to write (default: %(default)s)")
    given = parser.parse_args()
    parts = normal(credit_default(given.data, given.out / "raw"))
    model, fit = trained(parts)
    outcome = pennyweight.optimize(model, parts, BUDGET, recipe=RECIPE, trained=fit, out=given.out)
    print(outcome.result.explanation, f"see {given.out}/report.html", sep="\n")
