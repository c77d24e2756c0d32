"""A user's own module, in a package of theirs, and rows to compress it with."""

import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema
from pennyweight.model.bundle import Bundle
from pennyweight.model.spec import Model, Spec
from pennyweight.model.train import Recipe, fit
from pennyweight.model.transform import Env

USERS, ITEMS, TAGS = 300, 900, 40


class Shop(nn.Module):
    """Tables of three kinds, a bag, a chain of dense layers with norms, and layers of a kind we do not know."""

    def __init__(self, hidden: int = 96, dropout: float = 0.1) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, 16)
        self.item = nn.Embedding(ITEMS, 16, padding_idx=0)
        self.bias = nn.Embedding(ITEMS, 1)
        self.tags = nn.EmbeddingBag(TAGS, 8, mode="mean", padding_idx=0)
        self.mix = nn.Bilinear(16, 16, 8)
        self.net = nn.Sequential(
            *(nn.Linear(48, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(hidden, hidden, bias=False), nn.ReLU(), nn.BatchNorm1d(hidden), nn.Linear(hidden, 32), nn.ReLU()),
        )
        self.out = nn.Linear(32, 1)

    def forward(self, user: Tensor, item: Tensor, tags: Tensor) -> Tensor:
        u, i = self.user(user), self.item(item)
        x = torch.cat([u, i, self.tags(tags), self.mix(u, i)], 1)
        return self.out(self.net(x)) + self.bias(input=item)


@pytest.fixture(scope="session", autouse=True)
def shop() -> Iterator[None]:
    module = types.ModuleType("shop")
    module.Shop = Shop
    sys.modules["shop"] = module
    yield
    sys.modules.pop("shop")


def dataset(rows: int, seed: int) -> Dataset:
    """Ratings of a planted taste; ids follow a power law, so that some rows matter more."""
    rng, world = np.random.default_rng(seed), np.random.default_rng(99)
    users, items = world.normal(size=(USERS, 3)), world.normal(size=(ITEMS, 3))
    u = np.minimum(2 + (rng.pareto(1.0, rows) * 10).astype(int), USERS - 1)
    i = np.minimum(2 + (rng.pareto(1.0, rows) * 30).astype(int), ITEMS - 1)
    label = (users[u] * items[i]).sum(1) + rng.normal(size=rows) > 0
    tags = (i[:, None] * np.array([3, 5, 7])) % TAGS
    schema = Schema(
        (
            Column("user", "user", "categorical", USERS),
            Column("item", "item", "categorical", ITEMS),
            Column("tags", "item", "sequence", TAGS, 3),
            Column("label", "label", "numeric"),
        )
    )
    return Dataset.from_arrays({"user": u, "item": i, "tags": tags, "label": label.astype(np.float32)}, schema)


RECIPE = Recipe(batch=512, epochs=4, lr=0.01, embedding_l2=1e-5)


@pytest.fixture(scope="session")
def given() -> Bundle:
    """The module trained for a few epochs."""
    spec = Spec("shop:Shop", {}, {}, ("user", "item", "tags"))
    torch.manual_seed(0)
    module = Shop()
    for name in ("user", "item", "bias"):
        nn.init.normal_(getattr(module, name).weight, std=0.1)
    with torch.no_grad():
        module.item.weight[0] = 0
    fit(module, dataset(8000, 0), dataset(2000, 1), RECIPE, inputs=spec.inputs, seed=0)
    return Bundle(Model.of(module, spec))


@pytest.fixture(scope="session")
def env(given: Bundle) -> Env:
    train = dataset(8000, 0)
    return Env(
        train=train,
        valid=dataset(2000, 1),
        calib=train.head(1000),
        teachers=(given.model,),
        recipe=RECIPE,
        seed=3,
        allow=("shop",),
    )
