"""Arrays and loaders as datasets: shapes, ids against numbers, labels, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pennyweight.core.errors import DataError
from pennyweight.data.arrays import Pairs

RNG = np.random.default_rng(0)
IMAGES, DIGITS = RNG.random((20, 4, 3)), RNG.integers(0, 10, 20)
WORDS = RNG.integers(0, 50, (20, 7))


def test_images_are_flat_numbers_and_labels_classes() -> None:
    data = Pairs.of((IMAGES, DIGITS)).dataset(10)
    assert (data.schema["x"].kind, data.schema["x"].length, data.schema.label.size) == ("numeric", 12, 10)
    batch = next(data.batches(20))
    assert torch.equal(batch["x"], torch.from_numpy(IMAGES.reshape(20, 12)).float())
    assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == DIGITS.tolist()


def test_whole_numbers_are_ids_and_can_be_numbers() -> None:
    pairs = Pairs.of(((WORDS, WORDS[:, 0], IMAGES[:, 0, 0]), DIGITS % 2))
    kinds = {c.name: c.kind for c in pairs.dataset().schema.columns}
    assert kinds == {"x1": "sequence", "x2": "categorical", "x3": "numeric", "label": "numeric"}
    assert [t.dtype for t in pairs.example()] == [torch.int64, torch.int64, torch.float32]
    assert {c.kind for c in pairs.numbers().dataset().schema.columns} == {"numeric"}


def test_inputs_keep_their_names_and_pixels_are_numbers() -> None:
    pairs = Pairs.of(({"picture": (IMAGES * 255).astype(np.uint8), "age": DIGITS.astype(np.float64)}, DIGITS))
    assert [c.name for c in pairs.dataset(10).schema.features] == ["picture", "age"]
    assert pairs.example()[0].dtype == torch.float32


@pytest.mark.parametrize("labels", [DIGITS, DIGITS[:, None], np.eye(10)[DIGITS], torch.from_numpy(DIGITS), DIGITS.tolist()])
def test_labels_in_every_usual_form(labels: Any) -> None:
    assert Pairs.of((IMAGES, labels)).labels.tolist() == DIGITS.tolist()


def test_a_loader_is_read_whole() -> None:
    loader = DataLoader(TensorDataset(torch.from_numpy(IMAGES), torch.from_numpy(DIGITS)), batch_size=6)
    pairs = Pairs.of(loader)
    assert len(pairs) == 20 and np.array_equal(pairs.features["x"], IMAGES) and pairs.labels.tolist() == DIGITS.tolist()
    two = Pairs.of([(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64), torch.ones(3))] * 3)
    assert list(two.features) == ["x1", "x2"] and len(two) == 9


def test_rows_are_joined() -> None:
    both = Pairs.of((IMAGES, DIGITS)).join(Pairs.of((IMAGES[:5], DIGITS[:5])))
    assert len(both) == 25 and np.array_equal(both.features["x"][20:], IMAGES[:5])
    with pytest.raises(DataError, match=r"cannot be joined"):
        both.join(Pairs.of((WORDS, DIGITS)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (([[1.0, 2.0], [3.0]], [0, 1]), "differ in shape"),
        ((np.array(["a", "b"]), [0, 1]), "not numbers"),
        ((IMAGES, DIGITS[:5]), "5 labels"),
        ((IMAGES, np.zeros((20, 2))), "one a row"),
        (7, "is a int"),
        ([], "no batch"),
        ([np.zeros(3)], "must be a pair"),
        ([(np.zeros((2, 3)), [0, 1]), (np.zeros((2, 4)), [0, 1]), (np.zeros((2, 4)), [0, 1])], r"shapes \[\(3,\), \(4,\)\]"),
    ],
)
def test_what_cannot_be_read_is_refused(data: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Pairs.of(data)
