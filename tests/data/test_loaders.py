"""Loaders on small files in each documented format: what comes out, and every way to be refused.

Where the public sets themselves lie beside the project (../shared/data), their published sizes are checked too.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pennyweight.core.errors import ConfigError, DataError
from pennyweight.data import loaders
from pennyweight.data.dataset import Split

PUBLIC = Path(__file__).parents[3] / "shared" / "data"


def put(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def frappe(root: Path) -> None:
    head = "label,user,item,daytime\n"
    put(root / "train.csv.gz", head + "1,3,12,20\n0,3,12,21\n1,4,10,20\n")
    put(root / "valid.csv.gz", head + "0,4,12,20\n")
    put(root / "test.csv.gz", head + "1,3,99,21\n0,5,10,20\n")


def ml_1m(root: Path) -> None:
    put(
        root / "sasrec.txt.gz",
        "".join(f"{u} {i}\n" for u, items in ((1, [1, 2, 3, 4]), (2, [4, 1, 5]), (3, [2, 2])) for i in items),
    )
    rows = [(1, 0, 10, 5), (1, 1, 20, 2), (1, 2, 30, 4), (2, 0, 10, 3), (2, 1, 30, 5), (2, 2, 20, 5)]
    put(root / "ratings.csv.gz", "user_id,position,movie_id,rating\n" + "".join(",".join(map(str, r)) + "\n" for r in rows))
    put(root / "users.dat", "1::F::1::10::48067\n2::M::56::16::70072\n")
    put(root / "movies.dat", "10::Caf\u00e9 (1995)::Comedy|Drama\n20::Two (1996)::Drama\n30::Three (1996)::War\n", "latin-1")


def gowalla(root: Path) -> None:
    put(root / "train.txt.gz", "".join(f"{u} " + " ".join(str((u * 7 + k) % 30) for k in range(20)) + "\n" for u in range(10)))
    put(root / "test.txt.gz", "".join(f"{u} {(u * 7 + 21) % 30} \n" for u in range(10)))


def beauty(root: Path) -> None:
    put(root / "Beauty.txt", "1 1 2 3 4 5\n2 6 7 1\n3 2 9\n")
    put(root / "Beauty_item2attributes.json", json.dumps({"1": [3, 1], "2": [2], "9": [1]}))


def credit(root: Path) -> None:
    names = ["ID", "LIMIT_BAL", "SEX", "EDUCATION", "MARRIAGE", "AGE", "PAY_0", *(f"PAY_{k}" for k in range(2, 7))]
    names += [f"BILL_AMT{k}" for k in range(1, 7)] + [f"PAY_AMT{k}" for k in range(1, 7)] + ["fraud"]
    lines = [
        f"{k},{1000 * k},{1 + k % 2},1,2,{20 + k},-1,0,0,0,0,2,{','.join(['5'] * 12)},{int(k % 4 == 0)}" for k in range(200)
    ]
    put(root / "UCI_Credit_Card.csv", "\n".join([",".join(names), *lines]) + "\n")


def mnist(root: Path) -> None:
    put(root / "mnist_5k.csv.gz", "".join(",".join([str(k % 256)] * 784) + f",{k % 10}\n" for k in range(200)))


def reviews(root: Path) -> None:
    lines = [f"{k % 2} a {'good' if k % 2 else 'bad'} film\x85 caf\u00e9 ." for k in range(200)]
    put(root / "rt-polarity.all", "\n".join(lines) + "\n", "latin-1")


def messages(root: Path) -> None:
    put(
        root / "SMSSpamCollection",
        "".join(f"{'spam' if k % 5 == 0 else 'ham'}\tCall  NOW, it's {k % 7} \u00a3!\n" for k in range(100)),
    )


FILES: dict[str, Callable[[Path], None]] = {
    "frappe-x1": frappe,
    "ml-1m": ml_1m,
    "gowalla": gowalla,
    "amazon-beauty": beauty,
    "credit-default": credit,
    "mnist-5k": mnist,
    "movie-review": reviews,
    "sms-spam": messages,
}


def loaded(name: str, folder: Path) -> Split:
    FILES[name](folder / "in")
    return loaders.load(name, folder / "in", folder / "out")


def test_every_loader_is_tested() -> None:
    assert set(FILES) == set(loaders.LOADERS)


@pytest.mark.parametrize("name", FILES)
def test_the_same_each_time(name: str, tmp_path: Path) -> None:
    one, two = loaded(name, tmp_path), loaders.load(name, tmp_path / "in", tmp_path / "again")
    assert [p.fingerprint for p in one] == [p.fingerprint for p in two]
    assert one.train.catalog.files() == two.train.catalog.files()
    assert one.train.columns is one.test.columns, "parts are views of one dataset"


def test_frappe_keeps_its_split_and_learns_from_train(tmp_path: Path) -> None:
    train, valid, test = loaded("frappe-x1", tmp_path)
    words = train.catalog
    assert [words.vocabulary("user").decode(p.column("user")) for p in (train, valid, test)] == [[3, 3, 4], [4], [3, None]]
    assert words.vocabulary("item").decode(test.column("item")) == [None, 10]
    assert [c.role for c in train.schema.columns] == ["user", "item", "context", "label"]
    assert train.column("label").tolist() == [1, 0, 1]
    assert words.popularity.sum() == 3


def test_ml_1m_sequences_leave_one_out(tmp_path: Path) -> None:
    train, valid, test = loaded("ml-1m", tmp_path)
    items = train.catalog.vocabulary("item")

    def shown(part: object) -> list[tuple[list[object], object]]:
        rows = zip(part.column("history"), part.column("item"), strict=True)  # type: ignore[attr-defined]
        return [(items.decode(h[h > 0]), items.decode([i])[0]) for h, i in rows]

    assert shown(train) == [([1], 2), ([], 4)]
    assert shown(valid) == [([1, 2], 3), ([4], 1)]
    assert shown(test) == [([1, 2, 3], 4), ([4, 1], 5)]
    assert train.schema["history"].length == 200 and train.column("history")[0, -1] == items.id(1)
    assert train.catalog.items is not None
    counts = dict(train.catalog.items.select("item", "popularity").rows())
    assert {items.decode([i])[0]: n for i, n in counts.items()} == {1: 1, 2: 3, 3: 0, 4: 1, 5: 0}


def test_ml_1m_pairs(tmp_path: Path) -> None:
    ml_1m(tmp_path)
    train, valid, test = loaders.ml_1m(tmp_path, tmp_path / "out", form="pairs")
    assert (len(train), len(valid), len(test)) == (5, 2, 2)
    assert "history" not in train.schema
    with pytest.raises(ConfigError, match="unknown form 'pear'; known: sequences, pairs"):
        loaders.ml_1m(tmp_path, tmp_path / "out", form="pear")  # type: ignore[arg-type]


def test_ml_1m_ratings_with_side_features(tmp_path: Path) -> None:
    ml_1m(tmp_path)
    train, valid, test = loaders.ml_1m(tmp_path, tmp_path / "out", form="ratings", length=4)
    assert (len(train), len(valid), len(test)) == (2, 2, 2)
    row, words = {n: test.column(n)[0] for n in test.columns}, test.catalog
    assert words.vocabulary("gender").decode([row["gender"]]) == ["F"] and words.vocabulary("age").decode([row["age"]]) == [1]
    assert words.vocabulary("item").decode(row["history"]) == [None, None, None, 10], "movie 20 was rated 2"
    assert (words.vocabulary("genre").decode(row["genre"]), row["label"]) == (["War", None], 1.0)
    items = words.items
    assert items is not None
    assert items.select("title", "genres", "year").rows()[0] == ("Caf\u00e9", "Comedy, Drama", 1995)


def test_gowalla_holds_out_of_train_alone(tmp_path: Path) -> None:
    train, valid, test = loaded("gowalla", tmp_path)
    assert len(train) + len(valid) == 200 and len(test) == 10
    assert len(train.join(valid)) == 200
    items = test.catalog.vocabulary("item").decode(test.column("item"))
    assert items == [(u * 7 + 21) % 30 for u in range(10)]
    with pytest.raises(ConfigError, match="holdout 0"):
        loaders.gowalla(tmp_path / "in", tmp_path / "out", holdout=0)


def test_beauty_has_attributes(tmp_path: Path) -> None:
    _, _, test = loaded("amazon-beauty", tmp_path)
    words = test.catalog.vocabulary("attribute")
    features = test.catalog.features["attribute"]
    items = test.catalog.vocabulary("item")
    assert words.decode(features[items.id(1)]) == [3, 1] and words.decode(features[items.id(3)]) == [None, None]
    assert [items.decode([i])[0] for i in test.column("item")] == [5, 1]


def test_credit_default_is_stratified(tmp_path: Path) -> None:
    parts = loaded("credit-default", tmp_path)
    assert [len(p) for p in parts] == [160, 20, 20]
    assert all(abs(p.column("label").mean() - 0.25) < 0.01 for p in parts)
    kinds = [c.kind for c in parts.train.schema.features]
    assert (kinds.count("categorical"), kinds.count("numeric")) == (9, 14) and "ID" not in parts.train.schema
    folds = [loaders.credit_default(tmp_path / "in", tmp_path / "out", fold=fold) for fold in range(10)]
    assert [[len(p) for p in split] for split in folds] == [[160, 20, 20]] * 10
    assert folds[0].test.fingerprint == parts.test.fingerprint and len({split.test.fingerprint for split in folds}) == 10
    with pytest.raises(ConfigError, match="fold 10 is not one of 0 to 9"):
        loaders.credit_default(tmp_path / "in", tmp_path / "out", fold=10)


def test_mnist_is_a_vector_and_a_class(tmp_path: Path) -> None:
    parts = loaded("mnist-5k", tmp_path)
    assert [len(p) for p in parts] == [140, 20, 40]
    batch = next(parts.test.batches(40))
    assert batch["x"].shape == (40, 784) and 0 < batch["x"].max() <= 1
    assert np.bincount(batch["label"].numpy()).tolist() == [4] * 10


def test_digits_are_five_folds(tmp_path: Path) -> None:
    mnist(tmp_path)
    parts = [loaders.mnist(tmp_path, tmp_path / "out", fold=fold) for fold in range(5)]
    assert [[len(p) for p in split] for split in parts] == [[140, 20, 40]] * 5
    assert len({split.test.fingerprint for split in parts}) == 5
    with pytest.raises(ConfigError, match="fold 5 is not one of 0 to 4"):
        loaders.mnist(tmp_path, tmp_path / "out", fold=5)


def test_reviews_are_ten_folds(tmp_path: Path) -> None:
    reviews(tmp_path)
    tests = []
    for fold in range(10):
        train, valid, test = loaders.movie_review(tmp_path, tmp_path / "out", fold=fold, length=8)
        assert (len(train) + len(valid), len(test)) == (180, 20) and test.column("label").mean() == 0.5
        tests.append(test.fingerprint)
    words = train.catalog.vocabulary("text")
    text, label = train.column("text")[0], train.column("label")[0]
    word = "good" if label else "bad"
    assert words.decode(text) == ["a", word, "film", "caf\u00e9", ".", None, None, None], "NEL is no end of a line"
    with pytest.raises(ConfigError, match="fold 10"):
        loaders.movie_review(tmp_path, tmp_path / "out", fold=10)


def test_messages_are_tokens(tmp_path: Path) -> None:
    parts = loaded("sms-spam", tmp_path)
    assert [len(p) for p in parts] == [80, 10, 10] and [p.column("label").sum() for p in parts] == [16, 2, 2]
    row = parts.train.catalog.vocabulary("text").decode(parts.train.column("text")[0])
    assert row[:6] == ["call", "now", ",", "it", "'", "s"] and row[7:10] == ["\u00a3", "!", None]
    assert loaders.tokens(pl.Series(["I\u2019m 2COOL\u2026 "])).to_list() == [["i", "\u2019", "m", "2cool", "\u2026"]]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*; name the folder that holds it"):
        loaders.load(name, tmp_path / "nothing", tmp_path / "out")
    FILES[name](tmp_path / "in")
    victim = min((tmp_path / "in").iterdir(), key=lambda p: p.name != "sasrec.txt.gz")
    victim.unlink()
    with pytest.raises(DataError, match=f"no file .*{victim.name}"):
        loaders.load(name, tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("name", ["frappe-x1", "ml-1m", "gowalla", "mnist-5k"])
def test_a_truncated_file_is_named(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path)
    victim = next(p for p in sorted(tmp_path.iterdir(), reverse=True) if p.suffix == ".gz")
    victim.write_bytes(victim.read_bytes()[:-12])
    with pytest.raises(DataError, match=f"{victim.name} is truncated or damaged .*fetch it again"):
        loaders.load(name, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("frappe-x1", "valid.csv.gz", "label,user,item,day\n1,1,1,1\n", "label,user,item,... in all three is needed"),
        (
            "frappe-x1",
            "valid.csv.gz",
            "label,user,item,daytime\n1,1,x,1\n",
            "valid.csv.gz: column 'item', row 0: 'x' is not a number",
        ),
        ("frappe-x1", "valid.csv.gz", "label,user,item,daytime\n1,1,,1\n", "'item', row 0: None is not a number"),
        ("frappe-x1", "valid.csv.gz", "", "valid.csv.gz cannot be read"),
        ("frappe-x1", "valid.csv.gz", "label,user,item,daytime\n", "valid.csv.gz has a header and no rows"),
        ("ml-1m", "sasrec.txt.gz", "1 2 3\n", "3 numbers a line; a user and an item are needed"),
        ("gowalla", "train.txt.gz", "0 1 2\n1 2 x\n", r"train.txt.gz, line 2: .*are not all whole numbers"),
        ("amazon-beauty", "Beauty.txt", "", "Beauty.txt is empty"),
        ("amazon-beauty", "Beauty_item2attributes.json", "[1]", "not an object of lists"),
        ("credit-default", "UCI_Credit_Card.csv", "ID,SEX,fraud\n1,2,0\n", "an ID, 23 features and a label are needed"),
        ("mnist-5k", "mnist_5k.csv.gz", "1,2,3\n", "784 pixels .* and a digit are needed"),
        ("mnist-5k", "mnist_5k.csv.gz", ",".join(["256"] * 784) + ",1\n", "784 pixels"),
        ("movie-review", "rt-polarity.all", "0 bad\n2 good\n", "line 2: begins with '2'; 0 or 1 and a text are needed"),
        ("sms-spam", "SMSSpamCollection", "ham no tab\n", "line 1: begins with 'ham no tab'"),
    ],
)
def test_a_file_in_another_format_is_refused(name: str, file: str, text: str, message: str, tmp_path: Path) -> None:
    FILES[name](tmp_path)
    put(tmp_path / file, text)
    with pytest.raises(DataError, match=message):
        loaders.load(name, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("ratings.csv.gz", "user,item\n1,2\n", "no column user_id, position, movie_id, rating; there are: user, item"),
        ("users.dat", "1::F::1::10::48067\n", "user_id 2 has no line in the file of side features"),
        ("movies.dat", "10::Title\n", "movies.dat, line 1: 2 fields, 3 are needed"),
    ],
)
def test_side_features_that_do_not_fit_are_refused(file: str, text: str, message: str, tmp_path: Path) -> None:
    ml_1m(tmp_path)
    put(tmp_path / file, text)
    with pytest.raises(DataError, match=message):
        loaders.ml_1m(tmp_path, tmp_path / "out", form="ratings")


def test_a_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "SMSSpamCollection", "ham\t\u00a350\n", "latin-1")
    with pytest.raises(DataError, match=r"SMSSpamCollection is not utf-8 .*convert it first"):
        loaders.sms_spam(tmp_path, tmp_path / "out")


def test_an_unknown_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no loader 'netflix'; known: frappe-x1, ml-1m"):
        loaders.load("netflix", tmp_path, tmp_path / "out")


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public sets are not beside the project")
@pytest.mark.parametrize(
    ("name", "rows", "sizes"),
    [
        ("frappe-x1", (202_027, 57_722, 28_860), {}),
        ("ml-1m", (6_040, 6_040, 6_040), {"user": 6_040, "item": 3_416}),
        ("gowalla", (None, None, 217_242), {"user": 29_858, "item": 40_981}),
        ("amazon-beauty", (22_363, 22_363, 22_363), {"item": 12_101}),
        ("credit-default", (24_000, 3_000, 3_000), {}),
        ("mnist-5k", (3_500, 500, 1_000), {}),
        ("movie-review", (None, None, 1_066), {}),
        ("sms-spam", (4_460, 556, 558), {}),
    ],
)
def test_the_public_sets_have_their_published_sizes(
    name: str, rows: tuple[int | None, ...], sizes: dict[str, int], tmp_path: Path
) -> None:
    parts = loaders.load(name, PUBLIC / name, tmp_path / "out")
    assert all(want in (None, len(part)) for want, part in zip(rows, parts, strict=True)), [len(p) for p in parts]
    assert {n: parts.train.schema[n].size - 2 for n in sizes} == sizes
