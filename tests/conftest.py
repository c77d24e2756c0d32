"""The shipped sample as data, and a small cascade over it as a bundle: made once for all tests that need one."""

from pathlib import Path

import pytest
import torch

from pennyweight.data.dataset import Dataset
from pennyweight.data.sample import prepare
from pennyweight.model.bundle import Bundle, save
from pennyweight.model.cascade import Cascade
from pennyweight.model.ranking import DNN
from pennyweight.model.retrieval import TwoTower
from pennyweight.model.spec import Model, Spec, build, spec_of


def initialized(spec: Spec, data: Dataset, seed: int = 0) -> Bundle:
    """A bundle of a model with random weights; enough for all that does not ask how good it is."""
    torch.manual_seed(seed)
    return Bundle(Model.of(build(spec).eval(), spec), data.catalog)


@pytest.fixture(scope="session")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(tmp_path_factory.mktemp("movies") / "data")


@pytest.fixture(scope="session")
def cascade(movies: Dataset) -> Bundle:
    """Two towers and a DNN; their tables are wide enough apart for a history to matter."""
    columns = movies.schema.columns
    stages = {
        "retrieval": spec_of(TwoTower, columns=columns, dim=8, std=1.0),
        "ranking": spec_of(DNN, columns=columns, dim=4, hidden=(16,), norm=False),
    }
    return initialized(spec_of(Cascade, **{n: {"factory": s.factory, "args": dict(s.args)} for n, s in stages.items()}), movies)


@pytest.fixture(scope="session")
def cascade_folder(cascade: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(cascade, tmp_path_factory.mktemp("cascade") / "bundle")
