"""Tables go where their traffic pays, and a model that does not fit is told the truth about its ways out."""

import re

import polars as pl
import pytest
import torch

from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.core.hardware import Device, Topology
from pennyweight.data.catalog import Catalog, Vocabulary
from pennyweight.data.schema import Column, Schema
from pennyweight.distribute.place import Place, tables
from pennyweight.model.bundle import Bundle
from pennyweight.model.ranking import DNN
from pennyweight.model.spec import Model, build, spec_of
from pennyweight.model.transform import Env

USER, ITEM, GENRE = (f"embeddings.tables.{n}" for n in ("user", "item", "genre"))


def columns(users: int = 1000) -> tuple[Column, ...]:
    return (
        Column("user", "user", "categorical", users),
        Column("item", "item", "categorical", 2000),
        Column("history", "user", "sequence", 2000, 50, shares="item"),
        Column("genre", "item", "categorical", 20),
    )


def bundle(dim: int = 16, users: int = 1000) -> Bundle:
    spec = spec_of(DNN, columns=columns(users), dim=dim, hidden=(8,))
    return Bundle(Model.of(build(spec), spec))


def env(cpu: int, *gpus: int) -> Env:
    devices = [Device(f"cuda:{k}", "cuda", 100, memory) for k, memory in enumerate(gpus)]
    return Env(topology=Topology((Device("cpu", "cpu", 2, cpu), *devices)))


def placed(place: Place, given: Bundle, where: Env) -> dict[str, str]:
    return dict(place.apply(given, where).placement.tables)


def sizes(given: Bundle) -> tuple[dict[str, int], int]:
    found = {t.path: t.bytes for t in tables(given)}
    return found, given.model.bytes - sum(found.values())


def test_tables_are_found_with_their_bytes() -> None:
    assert sizes(bundle())[0] == {USER: 1000 * 64, ITEM: 2000 * 64, GENRE: 20 * 64}


def test_traffic_counts_every_lookup_of_an_example() -> None:
    """Without a catalog a table is looked up once; with one, the items' table 51 times: the item and its history."""
    given = bundle()
    assert [t.path for t in tables(given)] == [GENRE, USER, ITEM]
    schema = Schema((*columns(), Column("label", "label", "numeric")))
    vocabularies = {c.name: Vocabulary.of(range(c.size - 2)) for c in schema.features if not c.shares}
    catalog = Catalog(schema, vocabularies, pl.DataFrame({"item": range(2, 2000)}))
    found = tables(given.replace(catalog=catalog))
    assert [(t.path, t.lookups) for t in found] == [(GENRE, 1), (ITEM, 51), (USER, 1)]


def test_every_table_is_named_once_and_again_changes_nothing() -> None:
    given, where = bundle(), env(10**9)
    after = Place().apply(given, where)
    assert after.placement.tables == {GENRE: "cpu", ITEM: "cpu", USER: "cpu"}
    assert after.placement.world_size == 1
    with pytest.raises(PlanError, match="change nothing"):
        Place().apply(after, where)


def test_most_traffic_goes_to_the_fastest_device_and_the_rest_overflows() -> None:
    given = bundle()
    bytes, dense = sizes(given)
    exact = dense + bytes[GENRE] + bytes[USER]
    place = Place(reserve=0)
    assert placed(place, given, env(10**9, exact)) == {GENRE: "cuda:0", USER: "cuda:0", ITEM: "cpu"}
    assert placed(place, given, env(10**9, exact - 1)) == {GENRE: "cuda:0", USER: "cpu", ITEM: "cpu"}
    assert placed(place, given, env(10**9, exact, bytes[ITEM])) == {GENRE: "cuda:0", USER: "cuda:0", ITEM: "cuda:1"}
    assert placed(Place(reserve=0.5), given, env(10**9, 2 * exact)) == {GENRE: "cuda:0", USER: "cuda:0", ITEM: "cpu"}


def test_a_gpu_too_small_for_the_dense_layers_holds_nothing() -> None:
    given = bundle()
    assert set(placed(Place(reserve=0), given, env(10**9, sizes(given)[1] - 1)).values()) == {"cpu"}


def test_what_fits_nowhere_is_mapped_from_disk_where_allowed() -> None:
    given = bundle()
    bytes, dense = sizes(given)
    limit = dense + bytes[GENRE] + bytes[ITEM]
    wanted = {GENRE: "cpu", USER: "cpu", ITEM: "disk"}
    assert placed(Place(limit_bytes=limit, disk=True), given, env(10**9)) == wanted
    assert placed(Place(reserve=0, disk=True), given, env(limit)) == wanted


def refusal(place: Place, given: Bundle, where: Env) -> str:
    with pytest.raises(PlanError) as error:
        place.apply(given, where)
    return str(error.value)


def test_a_model_that_does_not_fit_says_by_how_much_and_what_helps() -> None:
    given = bundle()  # 193.28 kB of tables
    text = refusal(Place(limit_bytes=120_000), given, env(10**9))
    short = given.model.bytes - 120_000
    assert f"{short / 1000:.3g} kB more than there is" in text
    assert f"have {given.model.bytes / 1000:.3g} kB in place of 120 kB" in text
    assert f"Place(disk=True) (128 kB mapped from disk: {ITEM})" in text
    assert all(f"{n}) " in text for n in (1, 2, 3, 4))


def test_the_remedies_are_true() -> None:
    """Each is followed: the memory it names is the least, the dim it names fits, int8 fits exactly when it says so."""
    given = bundle()
    total = given.model.bytes
    assert set(placed(Place(limit_bytes=total), given, env(10**9)).values()) == {"cpu"}
    text = refusal(Place(limit_bytes=total - 1), given, env(10**9))
    assert "1 B more than there is" in text
    text = refusal(Place(limit_bytes=120_000), given, env(10**9))
    wide, narrow = map(int, re.search(r"smaller dims \((\d+) to (\d+)\)", text).groups())  # type: ignore[union-attr]
    assert wide == 16
    assert placed(Place(limit_bytes=120_000), bundle(dim=narrow), env(10**9))
    dense = sizes(given)[1]
    int8, int4 = 3020 * 24 + dense, 3020 * 12 + dense
    for limit, says in (
        (int8, "int8 fits, int4 fits"),
        (int8 - 1, "int8 still 1 B too much, int4 fits"),
        (int4 - 500, f"int8 still {(int8 - int4 + 500) / 1000:.3g} kB too much, int4 still 500 B too much"),
    ):
        assert f"quantize the tables ({says})" in refusal(Place(limit_bytes=limit), given, env(10**9))


def test_tables_on_a_gpu_are_no_part_of_what_the_cpu_lacks() -> None:
    given = bundle()
    bytes, dense = sizes(given)
    text = refusal(Place(reserve=0), given, env(dense + 100_000, dense + bytes[GENRE] + bytes[USER]))
    assert f"{(bytes[ITEM] - 100_000) / 1000:.3g} kB more than there is" in text


def test_dense_layers_that_do_not_fit_are_not_blamed_on_tables() -> None:
    given = bundle()
    text = refusal(Place(limit_bytes=10, disk=True), given, env(10**9))
    assert "the tables are not what is too large" in text
    assert f"not enough: the dense layers alone take {sizes(given)[1] / 1000:.3g} kB" in text


def test_it_needs_a_topology_and_sane_numbers() -> None:
    with pytest.raises(PlanError, match=r"Place needs env\.topology"):
        Place().apply(bundle(), Env())
    for wrong in ({"limit_bytes": -1}, {"reserve": 1.0}, {"reserve": -0.1}):
        with pytest.raises(ConfigError, match=r"limit_bytes -?\d+ must not"):
            Place(**wrong)  # type: ignore[arg-type]


def test_it_says_what_it_does() -> None:
    assert Place().describe() == "place tables on the fastest device with room"
    assert Place(limit_bytes=64_000_000, disk=True).describe() == (
        "place tables on the fastest device with room within 64 MB of memory, the rest mapped from disk"
    )


def test_the_same_bundle_is_placed_the_same_way() -> None:
    torch.manual_seed(1)
    assert placed(Place(), bundle(), env(10**9, 60_000)) == placed(Place(), bundle(), env(10**9, 60_000))
