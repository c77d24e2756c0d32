"""Files in: what comes out, and one clear error for each way a file can be wrong."""

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pennyweight.core.errors import ConfigError, DataError
from pennyweight.data import ingest
from pennyweight.data.dataset import Dataset
from pennyweight.data.ingest import ColumnSpec, read_csv, read_parquet

USER = ColumnSpec("user", "user", "categorical")
ITEM = ColumnSpec("item", "item", "categorical", source="movie")
PRICE = ColumnSpec("price", "context", "numeric")
LABEL = ColumnSpec("label", "label", "numeric", source="clicked")
TIME = ColumnSpec("time", "time", "time")
ALL = [USER, ITEM, PRICE, LABEL, TIME]

TEXT = """user,movie,price,clicked,time
anna,10,1.5,1,100
bert,11,2,0,101
anna,10,-3e2,1,102
"""


def csv(folder: Path, text: str = TEXT, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_csv(tmp_path: Path) -> None:
    data = read_csv(csv(tmp_path), ALL, tmp_path / "out")
    assert data.column("user").tolist() == [2, 3, 2]
    assert data.catalog.vocabulary("user").decode([2, 3]) == ["anna", "bert"]
    assert data.catalog.vocabulary("item").decode(data.column("item")) == [10, 11, 10]
    assert data.column("price").tolist() == [1.5, 2.0, -300.0]
    assert data.column("label").tolist() == [1.0, 0.0, 1.0]
    assert data.column("time").tolist() == [100, 101, 102]
    assert data.schema["user"].size == 4 and data.schema.item.name == "item"
    assert data.catalog.popularity.tolist() == [0, 0, 2, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "out"]


def test_parquet_and_csv_agree(tmp_path: Path) -> None:
    frame = pl.read_csv(csv(tmp_path))
    frame.write_parquet(tmp_path / "a.parquet")
    one, two = read_csv(tmp_path / "a.csv", ALL, tmp_path / "one"), read_parquet(tmp_path / "a.parquet", ALL, tmp_path / "two")
    assert one.fingerprint == two.fingerprint
    assert one.catalog.files() == two.catalog.files()


def test_gzip_and_several_files(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(TEXT.encode()))
    data = Dataset.read_csv([path, csv(tmp_path)], ALL, tmp_path / "out")
    assert data.column("time").tolist() == [100, 101, 102] * 2


def test_without_a_header_and_with_another_separator(tmp_path: Path) -> None:
    specs = [
        ColumnSpec("user", "user", "categorical", source="column_1"),
        ColumnSpec("label", "label", "numeric", source="column_2"),
    ]
    data = read_csv(csv(tmp_path, "a\t1\nb\t0\n"), specs, tmp_path / "out", separator="\t", header=False)
    assert (data.column("user").tolist(), data.column("label").tolist()) == ([2, 3], [1.0, 0.0])


def test_many_chunks_are_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {"user": rng.integers(0, 99, 5000).astype(str), "movie": rng.zipf(1.5, 5000), "price": rng.normal(size=5000)}
    )
    frame = frame.with_columns(clicked=pl.lit(1), time=pl.int_range(pl.len()))
    frame.write_csv(tmp_path / "a.csv")
    whole = read_csv(tmp_path / "a.csv", ALL, tmp_path / "whole")
    monkeypatch.setattr(ingest, "CHUNK", 64)
    cut = read_csv(tmp_path / "a.csv", ALL, tmp_path / "cut")
    assert cut.fingerprint == whole.fingerprint and cut.catalog.files() == whole.catalog.files()
    assert np.array_equal(whole.column("price"), frame["price"].to_numpy().astype(np.float32))


def test_hashed_columns(tmp_path: Path) -> None:
    spec = ColumnSpec("user", "user", "categorical", hashed=True, size=50)
    data = read_csv(csv(tmp_path), [spec, LABEL], tmp_path / "out")
    assert data.schema["user"].hashed and data.schema["user"].size == 50
    vocabulary = data.catalog.vocabulary("user")
    assert data.column("user").tolist() == [vocabulary.id(u) for u in ("anna", "bert", "anna")]
    assert Dataset.open(tmp_path / "out").catalog.vocabulary("user").id("bert") == data.column("user")[1]


def test_rare_values_are_out_of_vocabulary(tmp_path: Path) -> None:
    spec = ColumnSpec("user", "user", "categorical", min_count=2)
    assert read_csv(csv(tmp_path), [spec, LABEL], tmp_path / "out").column("user").tolist() == [2, 1, 2]
    with pytest.raises(DataError, match="'user': no value is seen 5 times or more; lower min_count"):
        read_csv(csv(tmp_path), [ColumnSpec("user", "user", "categorical", min_count=5), LABEL], tmp_path / "none")


def test_vocabulary_overflow(tmp_path: Path) -> None:
    spec = ColumnSpec("user", "user", "categorical", size=3)
    with pytest.raises(DataError, match="'user': vocabulary overflow, 2 values and 2 reserved ids in a size of 3; raise size"):
        read_csv(csv(tmp_path), [spec, LABEL], tmp_path / "out")
    kept = ColumnSpec("user", "user", "categorical", size=3, overflow="oov")
    data = read_csv(csv(tmp_path), [kept, LABEL], tmp_path / "out")
    assert data.column("user").tolist() == [2, 1, 2] and data.schema["user"].size == 3


def test_missing_values(tmp_path: Path) -> None:
    path = csv(tmp_path, "user,price,clicked\nanna,1,1\n,,0\n")
    filled = ColumnSpec("price", "context", "numeric", fill=-1.0)
    data = read_csv(path, [USER, filled, LABEL], tmp_path / "out")
    assert (data.column("user").tolist(), data.column("price").tolist()) == ([2, 1], [1.0, -1.0])
    with pytest.raises(DataError, match="'price', row 1: the number is missing; drop such rows or give fill"):
        read_csv(path, [USER, PRICE, LABEL], tmp_path / "no")


def test_a_test_file_takes_the_vocabularies_of_training(tmp_path: Path) -> None:
    train = read_csv(csv(tmp_path), ALL, tmp_path / "train")
    other = csv(tmp_path, "user,movie,price,clicked,time\nzoe,11,0,0,1\nbert,12,0,0,1\n", "b.csv")
    test = read_csv(other, ALL, tmp_path / "test", vocabularies=train.catalog.vocabularies)
    assert test.schema == train.schema
    assert (test.column("user").tolist(), test.column("item").tolist()) == ([1, 3], [3, 1])


def test_sequences_of_text_and_of_lists_share_a_vocabulary(tmp_path: Path) -> None:
    history = ColumnSpec("history", "user", "sequence", length=3, shares="item", separator=" ")
    item = ColumnSpec("item", "item", "categorical")
    path = csv(tmp_path, "item,history,clicked\n1,1 2 3 4,1\n2,,0\n5,9 1,1\n")
    data = read_csv(path, [item, history, LABEL], tmp_path / "text")
    vocabulary = data.catalog.vocabulary("item")
    assert data.catalog.vocabulary("history") is vocabulary and vocabulary.size == 8
    assert [vocabulary.decode(row) for row in data.column("history")] == [[2, 3, 4], [None] * 3, [None, 9, 1]]
    pl.DataFrame({"item": [1, 2, 5], "history": [[1, 2, 3, 4], None, [9, 1]], "clicked": [1, 0, 1]}).write_parquet(
        tmp_path / "l.parquet"
    )
    lists = read_parquet(tmp_path / "l.parquet", [item, history, LABEL], tmp_path / "lists")
    assert lists.fingerprint == data.fingerprint


def test_a_vector_of_several_columns(tmp_path: Path) -> None:
    both = ColumnSpec("x", "context", "numeric", source=("price", "time"))
    data = read_csv(csv(tmp_path), [both, LABEL], tmp_path / "out")
    assert data.column("x").tolist() == [[1.5, 100], [2, 101], [-300, 102]] and data.schema["x"].length == 2


def test_classes(tmp_path: Path) -> None:
    classes = ColumnSpec("label", "label", "numeric", source="clicked", size=2)
    data = read_csv(csv(tmp_path), [USER, classes], tmp_path / "out")
    assert next(data.batches(3))["label"].tolist() == [1, 0, 1]
    few = ColumnSpec("label", "label", "numeric", source="clicked", size=1)
    with pytest.raises(DataError, match="'label', row 0: 1 is outside its 1 classes"):
        read_csv(csv(tmp_path), [USER, few], tmp_path / "no")


def test_times(tmp_path: Path) -> None:
    path = csv(tmp_path, "clicked,time\n1,2001-09-09T01:46:40\n0,1970-01-01 00:00:07\n")
    assert read_csv(path, [LABEL, TIME], tmp_path / "text").column("time").tolist() == [1_000_000_000, 7]
    pl.read_csv(path, try_parse_dates=True).write_parquet(tmp_path / "t.parquet")
    assert read_parquet(tmp_path / "t.parquet", [LABEL, TIME], tmp_path / "typed").column("time").tolist() == [1_000_000_000, 7]


def test_what_is_shown_of_items_comes_along(tmp_path: Path) -> None:
    titles = pl.DataFrame({"item": [10, 11, 12], "title": ["ten", "eleven", "twelve"]})
    data = read_csv(csv(tmp_path), ALL, tmp_path / "out", items=titles)
    items = Dataset.open(tmp_path / "out").catalog.items
    assert items is not None and items.equals(data.catalog.items)  # type: ignore[arg-type]
    assert items.select("item", "title", "popularity").rows() == [(2, "ten", 2), (3, "eleven", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("movie", "film"), "a.csv: no column movie; there are: user, film, price, clicked, time"),
        (TEXT.replace(",2,", ",two,"), "'price', row 1: 'two' is not a number; 1 such"),
        (TEXT.replace(",1,100", ",nan,100"), "'label', row 0: nan is not a finite number"),
        (TEXT.replace(",1,100", ",,100"), "'label', row 0: the label is missing"),
        (TEXT.replace("101", "yesterday"), "'time', row 1: 'yesterday' is not a time"),
        (TEXT.replace("102", ""), "'time', row 2: the time is missing"),
        (TEXT.replace("2,0", "1e99,0"), "'price', row 1: .* is not"),
        (TEXT + "zoe,1,2,3,4,5,6\n", "a.csv: cannot be read .*more fields"),
        (TEXT.splitlines()[0] + "\n", "a header and no rows"),
        ("", "a.csv: empty; give a file with rows"),
    ],
)
def test_wrong_text_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_csv(csv(tmp_path, text), ALL, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_wrong_files_are_refused_by_name(tmp_path: Path) -> None:
    whole = gzip.compress(TEXT.encode() * 2000)
    (tmp_path / "half.csv.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "latin.csv").write_bytes(TEXT.replace("anna", "h\u00e9l\u00e8ne").encode("latin-1"))
    (tmp_path / "not.parquet").write_bytes(b"PAR1 this is not")
    for name, message in {
        "none.csv": "no file .*none.csv; check the path",
        "half.csv.gz": "half.csv.gz: cannot be read .*truncated or damaged, fetch it again",
        "latin.csv": "latin.csv: cannot be read .*not UTF-8; convert it first",
    }.items():
        with pytest.raises(DataError, match=message):
            read_csv(tmp_path / name, ALL, tmp_path / "out")
    with pytest.raises(DataError, match=r"not.parquet: cannot be read"):
        read_parquet(tmp_path / "not.parquet", ALL, tmp_path / "out")
    with pytest.raises(DataError, match="no files to read"):
        read_csv([], ALL, tmp_path / "out")


def test_a_parquet_column_of_another_type_is_refused(tmp_path: Path) -> None:
    pl.DataFrame({"user": [1.5, 2.5], "clicked": [1, 0]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'user' holds Float64; a categorical column needs whole numbers or texts"):
        read_parquet(tmp_path / "a.parquet", [USER, LABEL], tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColumnSpec("u", "user", "categorical", hashed=True), "'u' is hashed into 0 ids; give a size of at least 3"),
        (lambda: ColumnSpec("u", "user", "categorical", source=("a", "b")), "only a numeric feature"),
        (lambda: ColumnSpec("u", "user", "sequence", length=2, separator=""), "a separator that is not empty"),
    ],
)
def test_a_column_that_cannot_be_is_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_sharing_with_nobody_is_refused(tmp_path: Path) -> None:
    history = ColumnSpec("history", "user", "sequence", source="movie", length=3, shares="itme")
    with pytest.raises(ConfigError, match="'history' shares the vocabulary of 'itme'"):
        read_csv(csv(tmp_path), [ITEM, history, LABEL], tmp_path / "out")


FULL = """
import resource, signal, sys
from pennyweight.core.errors import StorageError
from pennyweight.data.ingest import ColumnSpec, read_csv
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (1_000, 200_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        read_csv(sys.argv[1], [ColumnSpec("a", "context", "numeric"), ColumnSpec("b", "label", "numeric")], sys.argv[2])
    except StorageError as error:
        print(error)
"""


def test_a_full_disk_is_said_and_nothing_stays(tmp_path: Path) -> None:
    path = csv(tmp_path, "a,b\n" + "1,0\n" * 30_000)
    command = [sys.executable, "-c", FULL, str(path), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.count("could not write") == run.stdout.count("free some room") == 2, run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
