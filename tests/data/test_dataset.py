"""Datasets: batches, shuffling, resuming, views, splits, files, and every way to be refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.ipc
import pytest
import torch

from pennyweight.core.errors import ConfigError, DataError, StorageError
from pennyweight.data import dataset as module
from pennyweight.data.catalog import Vocabulary
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema

SCHEMA = Schema(
    (
        Column("user", "user", "categorical", 7),
        Column("item", "item", "categorical", 12),
        Column("genre", "item", "sequence", 5, 2),
        Column("price", "context", "numeric"),
        Column("place", "context", "numeric", 0, 3),
        Column("label", "label", "numeric"),
        Column("time", "time", "time"),
    )
)


def arrays(n: int = 100, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    item = rng.integers(2, 12, n)
    return {
        "user": rng.integers(2, 7, n),
        "item": item,
        "genre": np.stack([2 + item % 3, np.zeros(n, int)], 1),
        "price": rng.normal(size=n),
        "place": rng.normal(size=(n, 3)),
        "label": rng.integers(0, 2, n),
        "time": rng.permutation(n),
    }


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_arrays(arrays(), SCHEMA)


def epoch(data: Dataset, size: int = 8, **options: object) -> dict[str, torch.Tensor]:
    batches = list(data.batches(size, **options))  # type: ignore[arg-type]
    return {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


def test_batches_hold_the_rows_in_the_types_of_the_contract(rows: Dataset) -> None:
    whole, given = epoch(rows), arrays()
    assert {n: v.dtype for n, v in whole.items()} == {
        **dict.fromkeys(["user", "item", "genre", "time"], torch.int64),
        **dict.fromkeys(["price", "place", "label"], torch.float32),
    }
    for name, values in given.items():
        assert np.allclose(whole[name].numpy(), values), name
    assert [len(b["user"]) for b in rows.batches(40)] == [40, 40, 20]
    assert [len(b["user"]) for b in rows.batches(40, drop_last=True)] == [40, 40]


def test_a_label_with_classes_is_whole_numbers() -> None:
    schema = Schema((Column("x", "context", "numeric", 0, 2), Column("label", "label", "numeric", 3)))
    data = Dataset.from_arrays({"x": np.zeros((4, 2)), "label": np.array([0, 2, 1, 2])}, schema)
    label = next(data.batches(4))["label"]
    assert label.dtype == torch.int64 and label.tolist() == [0, 2, 1, 2]


def test_a_batch_may_be_written_into(tmp_path: Path, rows: Dataset) -> None:
    saved = rows.save(tmp_path / "d")
    before = saved.column("price").copy()
    for batch in saved.batches(100):
        batch["price"].zero_()
        batch["item"].zero_()
    assert np.array_equal(saved.column("price"), before)


@pytest.mark.parametrize("window", [1, 40 * 44, 1 << 30], ids=["a block a window", "a few blocks", "one window"])
def test_shuffling_keeps_every_row_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, window: int) -> None:
    monkeypatch.setattr(module, "BLOCK", 8)
    data = Dataset.from_arrays(arrays(203), SCHEMA).save(tmp_path / "d")
    data = module.dataclasses.replace(data, window=window)
    one, two, other = (epoch(data, 10, shuffle=True, seed=s)["time"] for s in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert not torch.equal(one, epoch(data, 10)["time"])
    assert sorted(one.tolist()) == list(range(203))


def test_a_large_set_is_mixed_across_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """With windows of 4 blocks, a batch still comes from all over: its rows lie in blocks far apart."""
    monkeypatch.setattr(module, "BLOCK", 8)
    schema = Schema((Column("x", "context", "numeric"), Column("label", "label", "numeric")))
    data = Dataset.from_arrays({"x": np.arange(800), "label": np.zeros(800)}, schema)
    first = next(module.dataclasses.replace(data, window=4 * 8 * 8).batches(32, shuffle=True, seed=1))["x"]
    assert len({int(x) // 8 for x in first}) == 4
    assert first.max() - first.min() > 200
    assert first.tolist() != sorted(first.tolist())


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("window", [1, 1 << 30])
@pytest.mark.parametrize("start", [0, 1, 7, 20, 21])
def test_an_epoch_resumes_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, rows: Dataset, shuffle: bool, window: int, start: int
) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)
    data = module.dataclasses.replace(rows, window=window)
    whole = list(data.batches(5, shuffle=shuffle, seed=2))
    rest = list(data.batches(5, shuffle=shuffle, seed=2, start=start))
    assert len(rest) == max(0, 20 - start)
    for a, b in zip(whole[start:], rest, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_views(rows: Dataset) -> None:
    time = rows.column("time")
    assert np.array_equal(rows.take(slice(10, 50)).column("time"), time[10:50])
    assert np.array_equal(rows.take(slice(10, 50)).take(slice(5, None, 2)).column("time"), time[15:50:2])
    chosen = np.array([9, 3, 3, -1])
    assert np.array_equal(rows.take(chosen).column("time"), time[chosen])
    assert np.array_equal(rows.take(slice(10, 50)).take(chosen).column("time"), time[10:50][chosen])
    assert np.array_equal(rows.take(np.arange(20)[::-1]).take(slice(0, 3)).column("time"), time[[19, 18, 17]])
    assert np.array_equal(rows.head(3).column("place"), rows.column("place")[:3])
    assert epoch(rows.take(chosen))["time"].tolist() == time[chosen].tolist()
    assert len(rows.take(rows.column("label") > 0)) == rows.column("label").sum()


def test_views_of_one_dataset_join(rows: Dataset) -> None:
    train, valid, _ = rows.split("random")
    both = train.join(valid)
    assert both.column("time").tolist() == [*train.column("time"), *valid.column("time")]
    assert both.catalog.popularity.sum() == len(both)
    with pytest.raises(DataError, match="only views of one dataset"):
        train.join(Dataset.from_arrays(arrays(), SCHEMA))


def test_fingerprints_tell_data_apart_and_nothing_else(tmp_path: Path, rows: Dataset) -> None:
    saved = rows.save(tmp_path / "d")
    assert rows.fingerprint == saved.fingerprint == Dataset.open(tmp_path / "d").fingerprint
    assert rows.head(50).fingerprint == saved.take(np.arange(50)).fingerprint != rows.fingerprint
    assert Dataset.from_arrays(arrays(seed=1), SCHEMA).fingerprint != rows.fingerprint
    renamed = Schema(tuple(module.dataclasses.replace(c, name=c.name + "2") for c in SCHEMA.columns))
    assert Dataset.from_arrays({n + "2": a for n, a in arrays().items()}, renamed).fingerprint != rows.fingerprint


def test_split_by_time_never_looks_ahead(rows: Dataset) -> None:
    train, valid, test = rows.split("time", (0.7, 0.1, 0.2))
    assert (len(train), len(valid), len(test)) == (70, 10, 20)
    assert train.column("time").max() < valid.column("time").min() <= valid.column("time").max() < test.column("time").min()


def test_split_by_time_keeps_a_moment_together() -> None:
    values = arrays()
    values["time"] = values["time"] // 7
    train, valid, test = Dataset.from_arrays(values, SCHEMA).split("time")
    moments = [set(p.column("time").tolist()) for p in (train, valid, test)]
    assert not (moments[0] & moments[1] or moments[1] & moments[2])


def test_split_by_last_holds_out_two_rows_a_user(rows: Dataset) -> None:
    train, valid, test = rows.split("last")
    assert len(valid) == len(test) == 5
    for user in range(2, 7):
        t, v, e = (p.column("time")[p.column("user") == user] for p in (train, valid, test))
        assert t.max() < v[0] < e[0]
    assert [len(rows.last()), sorted(rows.last().column("time"))] == [5, sorted(test.column("time"))]


def test_split_by_user_keeps_each_users_order(rows: Dataset) -> None:
    parts = rows.split("user", (0.6, 0.2, 0.2))
    for user in range(2, 7):
        t, v, e = (p.column("time")[p.column("user") == user] for p in parts)
        assert t.max() < v.min() and v.max() < e.min()
        assert abs(len(t) - 0.6 * (len(t) + len(v) + len(e))) <= 1


def test_split_by_chance_is_seeded(rows: Dataset) -> None:
    parts = rows.split("random", seed=1)
    assert [len(p) for p in parts] == [80, 10, 10]
    assert sorted(np.concatenate([p.column("time") for p in parts])) == list(range(100))
    assert np.array_equal(parts.test.column("time"), rows.split("random", seed=1).test.column("time"))
    assert not np.array_equal(parts.test.column("time"), rows.split("random", seed=2).test.column("time"))


def test_popularity_is_counted_in_train_alone(rows: Dataset) -> None:
    train, valid, test = rows.split("time")
    assert train.catalog is valid.catalog is test.catalog
    counts = np.bincount(train.column("item"), minlength=12)
    assert train.catalog.popularity.tolist() == counts.tolist()
    assert rows.catalog.popularity.sum() == 100


def test_items_are_found_in_the_rows(rows: Dataset) -> None:
    items = rows.catalog.items
    assert items is not None
    assert items["item"].to_list() == sorted(set(arrays()["item"].tolist()))
    assert items["genre"].to_list() == [[2 + i % 3, 0] for i in items["item"]]


def test_an_empty_part_is_refused(rows: Dataset) -> None:
    with pytest.raises(DataError, match="the time split leaves train empty"):
        Dataset.from_arrays({**arrays(), "time": np.zeros(100, int)}, SCHEMA).split("time")
    with pytest.raises(DataError, match=r"the random split leaves valid empty \(2 rows\)"):
        rows.head(2).split("random")
    with pytest.raises(DataError, match="the last split leaves valid empty"):
        rows.head(2).split("last")


def test_a_split_that_cannot_be_is_refused(rows: Dataset) -> None:
    with pytest.raises(ConfigError, match="unknown split 'tims'; known: time, last, user, random"):
        rows.split("tims")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be positive and sum to 1"):
        rows.split("random", (0.8, 0.1, 0.2))
    with pytest.raises(ConfigError, match="must be positive and sum to 1"):
        rows.split("random", (1.0, 0.0, 0.0))
    timeless = Schema(tuple(c for c in SCHEMA.columns if c.role != "time"))
    with pytest.raises(DataError, match="needs a column of role 'time'"):
        Dataset.from_arrays(arrays(), timeless).split("time")


def test_a_history_is_added_to_any_dataset(tmp_path: Path, rows: Dataset) -> None:
    data = rows.with_history(4)
    assert data.schema.history is not None and data.schema.history.length == 4
    order = np.argsort(data.column("time"))
    for user in range(2, 7):
        liked: list[int] = []
        for row in order[data.column("user")[order] == user]:
            assert [i for i in data.column("history")[row] if i] == liked[-4:]
            liked += [int(data.column("item")[row])] * int(data.column("label")[row])
    assert data.save(tmp_path / "d").fingerprint == data.fingerprint


def test_an_epoch_of_no_rows_is_refused(rows: Dataset) -> None:
    with pytest.raises(ConfigError, match="size must be at least 1"):
        next(rows.batches(0))
    with pytest.raises(ConfigError, match="start at least 0"):
        next(rows.batches(4, start=-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": None}, "no column 'user'; given: item"),
        ({"user": np.zeros(99, int)}, "'item' has 100 rows, 'user' has 99"),
        ({"user": np.full(100, 7)}, "'user', row 0: 7 is outside its 7 ids; 100 such"),
        ({"item": np.array([2] * 40 + [-1] * 60)}, "'item', row 40: -1 is outside"),
        ({"user": np.zeros(100)}, "'user' holds float64, it needs int32; encode it first"),
        ({"user": np.array(["a"] * 100)}, "'user' holds <U1, it needs int32"),
        ({"genre": np.zeros((100, 3), int)}, r"'genre' has rows of shape \(3,\), its schema says \(2,\)"),
        ({"place": np.zeros(100)}, r"'place' has rows of shape \(\)"),
        ({"label": np.array([0.0] * 10 + [np.nan] * 90)}, "'label', row 10: nan is not a finite number; 90 such"),
        ({"place": np.where(np.eye(100, 3) == 1, np.inf, 0)}, "'place', row 0: inf is not a finite number; 3 such"),
    ],
)
def test_wrong_columns_are_refused(change: dict[str, np.ndarray | None], message: str) -> None:
    given = {n: a for n, a in {**arrays(), **change}.items() if a is not None}
    with pytest.raises(DataError, match=message):
        Dataset.from_arrays(given, SCHEMA)


def test_no_rows_are_refused(rows: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one row"):
        Dataset.from_arrays({n: a[:0] for n, a in arrays().items()}, SCHEMA)
    with pytest.raises(DataError, match="at least one row"):
        rows.head(0).save(tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_what_is_shown_of_items(rows: Dataset) -> None:
    shown = pl.DataFrame({"item": [1, 0, 77], "title": ["one", "zero", "never seen"]})
    items = rows.described(shown).catalog.items
    assert items is not None
    assert items.filter(pl.col("item").is_in([2, 3]))["title"].to_list() == ["zero", "one"]
    assert items["title"].null_count() == len(items) - 2
    again = rows.described(shown).described(shown.rename({"title": "name"})).catalog.items
    assert again is not None and "title" not in again.columns and "popularity" in again.columns
    with pytest.raises(DataError, match="needs 'item' and none of genre, popularity"):
        rows.described(shown.rename({"title": "genre"}))
    with pytest.raises(DataError, match="'item' twice"):
        rows.described(pl.DataFrame({"item": [1, 1]}))


def test_hashed_items_are_shown_once_each() -> None:
    schema = Schema((Column("item", "item", "categorical", 4, hashed=True), Column("label", "label", "numeric")))
    data = Dataset.from_arrays({"item": np.array([2, 3, 3]), "label": np.zeros(3)}, schema)
    values = list("abcdef")
    items = data.described(pl.DataFrame({"item": values, "title": values})).catalog.items
    ids = data.catalog.vocabulary("item").encode(values).tolist()
    assert items is not None and items["item"].to_list() == [2, 3]
    assert items["title"].to_list() == [values[ids.index(2)], values[ids.index(3)]]


def test_rows_are_one_arrow_batch_anybody_can_read(tmp_path: Path, rows: Dataset) -> None:
    rows.save(tmp_path / "d")
    frame = pl.read_ipc(tmp_path / "d" / "rows.arrow")
    assert frame["item"].to_list() == arrays()["item"].tolist()
    assert frame["genre"].to_list() == arrays()["genre"].tolist()
    with pyarrow.ipc.open_file(str(tmp_path / "d" / "rows.arrow")) as file:
        assert file.num_record_batches == 1


def test_the_same_data_gives_the_same_files(tmp_path: Path, rows: Dataset) -> None:
    for name in ("a", "b"):
        rows.save(tmp_path / name)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_vocabularies_travel_with_the_rows(tmp_path: Path) -> None:
    schema = Schema((Column("item", "item", "categorical", 4), Column("label", "label", "numeric")))
    words = {"item": Vocabulary.of(["b", "a"])}
    data = Dataset.from_arrays({"item": np.array([3, 2, 1]), "label": np.zeros(3)}, schema, words).save(tmp_path / "d")
    assert data.catalog.vocabulary("item").decode(data.column("item")) == ["a", "b", None]


@pytest.mark.parametrize("name", ["rows.arrow", "dataset.json", "catalog.json", "vocabularies.arrow"])
@pytest.mark.parametrize("damage", ["half", "empty", "noise", "missing"])
def test_a_damaged_folder_is_one_clear_error(tmp_path: Path, rows: Dataset, name: str, damage: str) -> None:
    rows.save(tmp_path / "d")
    file = tmp_path / "d" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"half": content[: len(content) // 2], "empty": b"", "noise": b"\x01" * 300}[damage])
    with pytest.raises(DataError, match="ingest"):
        Dataset.open(tmp_path / "d")


def test_a_head_that_names_other_rows_is_refused(tmp_path: Path, rows: Dataset) -> None:
    rows.save(tmp_path / "d")
    head = tmp_path / "d" / "dataset.json"
    head.write_text(json.dumps({**json.loads(head.read_text()), "rows": 99}))
    with pytest.raises(DataError, match="does not hold 99 rows"):
        Dataset.open(tmp_path / "d")


def test_a_folder_that_is_no_dataset_is_left_alone(tmp_path: Path, rows: Dataset) -> None:
    with pytest.raises(DataError, match="holds no dataset"):
        Dataset.open(tmp_path / "nothing")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="exists and is not a dataset"):
        rows.save(tmp_path / "mine")
    (tmp_path / "file").write_text("also mine")
    with pytest.raises(StorageError, match="exists and is not a dataset"):
        rows.save(tmp_path / "file")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]


def test_an_older_dataset_is_replaced_whole(tmp_path: Path, rows: Dataset) -> None:
    old = rows.head(10).save(tmp_path / "d")
    new = rows.save(tmp_path / "d")
    assert (len(old.column("time")), len(new.column("time"))) == (10, 100)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


FULL = """
import resource, signal, sys
from pennyweight.core.errors import StorageError
from pennyweight.data.synthetic import Clicks
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (1_000, 270_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        Clicks().write(10_000, sys.argv[1])
    except StorageError as error:
        print(error)
"""


def test_a_full_disk_loses_nothing(tmp_path: Path, rows: Dataset) -> None:
    """Writing stops at a limit of the system's, as on a full disk: a typed error, the older dataset as it was, no remains."""
    rows.save(tmp_path / "d")
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "d")], capture_output=True, text=True, check=True)
    assert run.stdout.count("could not write the dataset") == run.stdout.count("free some room") == 2, run.stderr
    assert Dataset.open(tmp_path / "d").fingerprint == rows.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """An epoch over a set of 35 windows keeps a few of them in memory (the kernel maps what lies around a row, too)."""
    from pennyweight.data.synthetic import Clicks

    data = Clicks(numbers=16).write(800_000, tmp_path / "d")
    data = module.dataclasses.replace(data, window=2 << 20)
    file = tmp_path / "d" / "rows.arrow"
    resident = [mapped(file) for k, _ in enumerate(data.batches(1024, shuffle=True)) if k % 10 == 0]
    assert os.path.getsize(file) > 72e6
    assert 1e6 < max(resident) < 20e6


def mapped(file: Path) -> int:
    """Bytes of a file's map that are in this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = [k for k, line in enumerate(lines) if line.endswith(str(file))]
    sizes = [next(x for x in lines[k:] if x.startswith("Rss:")).split()[1] for k in at]
    return sum(map(int, sizes)) * 1024
