"""What a placement costs follows from what travels and what is held; the four plain formulas are held against it."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from pennyweight.core.config import decode, encode
from pennyweight.core.errors import ConfigError
from pennyweight.core.hardware import Device, Link, Price, Rates, Topology
from pennyweight.data.schema import Column
from pennyweight.distribute import workload
from pennyweight.distribute.cost import ID, NUMBER, Setting
from pennyweight.distribute.workload import Asked, Timed, Workload
from pennyweight.model.placement import Placement, Shard
from pennyweight.model.ranking import DLRM, DNN
from pennyweight.model.sequential import SASRec
from pennyweight.model.spec import spec_of

COLUMNS = (
    Column("user", "user", "categorical", 1000),
    Column("item", "item", "categorical", 2000),
    Column("history", "user", "sequence", 2000, 50, shares="item"),
    Column("age", "context", "numeric"),
)


def hosts(workers: int = 4, hosts: int = 1, memory: int = 2**34, **parts: object) -> Topology:
    return Topology(
        (Device("cpu", "cpu", workers, memory),),
        hosts,
        workers,
        Link(50, 1e9),
        Link(200, 1e8),
        Rates(1e10, 5e7, 1e10, 5),
        **parts,
    )  # type: ignore[arg-type]


def work(*tables: Asked, batch: int = 400, **parts: object) -> Workload:
    given = {
        "name": "m",
        "batch": batch,
        "tables": tables,
        "layers": (),
        "dense_bytes": 4000,
        "flops": 1e4,
        "activations": 100,
        "calls": 3,
    }
    return Workload(**{**given, **parts})  # type: ignore[arg-type]


TABLE = Asked("t", 10_000, 16, 640_000)


# -- counted from the model ------------------------------------------------------------------------------------------------


def test_a_model_is_counted_without_being_held() -> None:
    """A table of 40 GB in a second; ids of a sequence and the item go to one table."""
    columns = (Column("user", "user", "categorical", 10_000_000_000 // 16), *COLUMNS[1:])
    found = workload.count(spec_of(DNN, columns=columns, dim=16, hidden=(8,)), 100)
    assert {t.path.rpartition(".")[2]: (t.rows, t.dim, t.lookups) for t in found.tables} == {
        "user": (625_000_000, 16, 1),
        "item": (2000, 16, 51),
    }
    assert found.tables[0].bytes == 40_000_000_000
    width = 3 * 16 + 1
    assert found.flops == 2 * (width * 8 + 8)
    assert [(la.inputs, la.outputs, la.flops) for la in found.layers] == [(width, 8, 2 * width * 8), (8, 1, 16)]
    assert found.norms == 2  # of the numbers and of the hidden layer


def test_a_table_looked_up_once_a_batch_is_a_weight_like_others() -> None:
    """SASRec's positions: the same rows for every example; nothing is won by cutting them."""
    found = workload.count(spec_of(SASRec, columns=COLUMNS, dim=8), 64)
    assert [t.path for t in found.tables] == ["items"]
    assert found.dense_bytes > 50 * 8 * 4


def test_distinct_rows_are_those_of_uniform_ids_or_as_measured() -> None:
    rng = np.random.default_rng(0)
    drawn = np.mean([len(set(rng.integers(0, 1000, 500).tolist())) for _ in range(200)])
    assert Asked("t", 1000, 4, 16_000).distinct(500) == pytest.approx(drawn, rel=0.01)
    assert Asked("t", 1000, 4, 16_000, seen=0.1).distinct(500) == 50
    assert Asked("t", 1, 4, 16).distinct(500) == 1


def test_a_model_that_names_no_columns_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not say which columns it reads"):
        workload.count(spec_of(DLRM, dim=8), 64)


# -- bytes -----------------------------------------------------------------------------------------------------------------


def shards(group: int) -> list[Shard]:
    everyone = tuple(range(group))
    return [Shard("table", (1,)), Shard("row", everyone), Shard("column", everyone), Shard("grid", everyone, 2)]


@pytest.mark.parametrize("shard", shards(4), ids=lambda s: s.kind)
def test_what_is_sent_is_received_and_what_is_held_is_the_table(shard: Shard) -> None:
    setting = Setting(work(TABLE, update="sgd"), hosts(), 1)
    share = setting.table(TABLE, shard)
    assert share.sent.sum(1) == pytest.approx(share.received.sum(1))
    assert share.held.sum() == pytest.approx(TABLE.bytes)
    assert (share.sent >= -1e-6).all() and (share.received >= -1e-6).all()


def test_bytes_of_an_owner_are_those_of_the_protocol() -> None:
    """Distinct ids once, their rows once each way; nothing to oneself."""
    setting = Setting(work(TABLE), hosts(), 1)
    distinct = TABLE.distinct(100)
    share = setting.table(TABLE, Shard("table", (1,)))
    ids, rows, gradients, sums = share.sent
    assert ids == pytest.approx([distinct * ID, 0, distinct * ID, distinct * ID])
    assert rows == pytest.approx([0, 3 * distinct * 16 * NUMBER, 0, 0])
    assert gradients == pytest.approx([distinct * 16 * NUMBER, 0, *[distinct * 16 * NUMBER] * 2])
    assert not sums.any()


def test_a_whole_table_sends_touched_rows_to_everybody() -> None:
    setting = Setting(work(TABLE), hosts(), 4)
    assert setting.table(TABLE, None).sent[3] == pytest.approx(3 * TABLE.distinct(100) * (ID + 64))


def test_groups_that_hold_the_same_sum_what_was_touched() -> None:
    setting = Setting(work(TABLE), hosts(2, hosts=2), 2)
    share = setting.table(TABLE, Shard("row", (0, 1)))
    rows = min(2 * TABLE.distinct(100) / 2, 5000)
    assert share.sent[3] == pytest.approx(rows * (ID + 64))


def test_columns_cost_ids_again_and_rows_as_often() -> None:
    setting = Setting(work(TABLE), hosts(), 1)
    row, column = (setting.table(TABLE, Shard(kind, (0, 1, 2, 3))) for kind in ("row", "column"))  # type: ignore[arg-type]
    assert column.sent[0].sum() == pytest.approx(4 * row.sent[0].sum())
    assert column.sent[1].sum() == pytest.approx(row.sent[1].sum())
    assert column.found.sum() == pytest.approx(4 * row.found.sum())


def test_memory_counts_the_optimizer_and_the_examples() -> None:
    for update, factor in (("sgd", 1), ("lazy-adam", 3), ("dense", 4)):
        assert work(TABLE, update=update).kept(TABLE) == factor * TABLE.bytes
    assert work(TABLE).kept(TABLE) == TABLE.bytes + 4 * TABLE.rows
    few, many = (Setting(work(TABLE, batch=n), hosts(), 4).predict(Placement(4, replicas=4)) for n in (400, 4000))
    assert many.memory > few.memory and many.ranks[0].tables == few.ranks[0].tables


# -- time and money --------------------------------------------------------------------------------------------------------


def test_one_worker_sends_nothing() -> None:
    alone = Setting(work(TABLE), hosts(1), 1).predict(Placement(1))
    assert alone.step.exchange == 0 and alone.sent == 0


def test_a_step_is_as_long_as_its_slowest_worker_in_each_part() -> None:
    """Two tables on one owner look up twice as long as on two, though no bytes more are moved in all."""
    tables = (TABLE, dataclasses.replace(TABLE, path="u"))
    setting = Setting(work(*tables), hosts(), 1)
    one, two = (
        setting.predict(Placement(4, shards={"t": Shard("table", (0,)), "u": Shard("table", (rank,))})) for rank in (0, 1)
    )
    mine = setting.busy(setting.table(TABLE, Shard("table", (0,))))
    assert one.step.lookup - two.step.lookup == pytest.approx(mine[0] - mine[1])
    assert mine[0] > mine[1] == pytest.approx(mine[2])
    assert one.sent == pytest.approx(two.sent, rel=0.01)
    assert one.step.rows > two.step.rows


def test_more_workers_than_cores_wait_for_one_another() -> None:
    crowded = dataclasses.replace(hosts(4), devices=(Device("cpu", "cpu", 2, 2**34),))
    free, busy = (Setting(work(TABLE), top, 1).predict(Placement(4)).step for top in (hosts(4), crowded))
    assert busy.dense == pytest.approx(2 * free.dense) and busy.sums == pytest.approx(2 * free.sums)


def test_another_host_is_further_away() -> None:
    shard = {"t": Shard("row", (0, 1, 2, 3))}
    near, far = (Setting(work(TABLE), top, 1).predict(Placement(4, shards=shard)).step for top in (hosts(4), hosts(2, hosts=2)))
    assert far.rows > near.rows and far.dense == near.dense


def test_a_timed_step_is_taken_as_it_was_timed() -> None:
    timed = work(TABLE, timed=Timed(1e-3, 2e-6))
    assert Setting(timed, hosts(), 1).predict(Placement(4)).step.dense == pytest.approx(1e-3 + 2e-6 * 100)


def test_money_is_hosts_for_as_long_as_it_takes_and_memory_meanwhile() -> None:
    top = hosts(2, hosts=2, price=Price(host_hour=3.6, gb_hour=7.2))
    found = Setting(work(TABLE), top, 1).predict(Placement(4, shards={"t": Shard("row", (0, 1, 2, 3))}))
    hours = found.step.seconds * 1e6 / 400 / 3600
    held = sum(r.memory for r in found.ranks) / 1e9
    assert found.money == pytest.approx(hours * (2 * 3.6 + held * 7.2))


def test_dense_layers_that_are_cut_hold_less_and_send_examples_for_gradients() -> None:
    layer = workload.Layer("wide", 2000, 2000, 8e6, 16_000_000)
    given = work(TABLE, layers=(layer,), dense_bytes=16_000_000, batch=16)
    setting = Setting(given, hosts(), 1)
    whole, cut = (setting.predict(Placement(4, dense=dense)) for dense in ({}, {"wide": "column"}))  # type: ignore[dict-item]
    assert cut.ranks[0].dense == pytest.approx(whole.ranks[0].dense / 4)
    assert cut.step.seconds < whole.step.seconds
    assert cut.sent < whole.sent


def test_sums_take_the_better_algorithm_and_exchanges_a_message_more_for_each() -> None:
    bare = work(batch=4096, dense_bytes=4, flops=0.0, activations=0, calls=0)
    times = {n: Setting(bare, hosts(n), n).predict(Placement(n, replicas=n)).step.sums for n in (2, 4, 64, 1024)}
    assert times[1024] / times[2] == pytest.approx(math.log2(1024), rel=0.05)
    assert all(a < b for a, b in itertools.pairwise(times.values()))
    one = dataclasses.replace(TABLE, lookups=1e-9)
    asked = {
        n: Setting(bare.replace(tables=(one,)), hosts(n), 1).predict(Placement(n, shards={"t": Shard("table", (0,))})).step.rows
        for n in (2, 12, 102)
    }
    assert asked[12] / asked[2] == pytest.approx(2, rel=0.01)
    assert asked[102] / asked[2] == pytest.approx(11, rel=0.01)


def test_what_cannot_be_costed_is_refused() -> None:
    bare = Topology((Device("cpu", "cpu", 2, 2**30),), workers=2)
    for wrong, says in (
        (lambda: Setting(work(TABLE), bare, 1), "was not measured"),
        (lambda: Setting(work(TABLE), dataclasses.replace(hosts(2, hosts=2), between=None), 1), "no link between them"),
        (lambda: Setting(work(TABLE), hosts(4), 3), "3 replicas do not divide 4"),
        (lambda: Setting(work(TABLE), hosts(4), 1).predict(Placement(2)), "plan it again for this one"),
        (
            lambda: Setting(work(TABLE), hosts(4), 1).predict(Placement(4, shards={"x": Shard("table", (0,))})),
            "x, which m does not",
        ),
        (lambda: work(TABLE, batch=0), "give 1 or more"),
        (lambda: Asked("t", 0, 4, 4), "from 1"),
        (lambda: Link(1, 0), "rate above 0"),
        (lambda: Rates(1, 0, 1), "above 0"),
        (lambda: Rates(1, 1, 1, ids=0), "above 0"),
        (lambda: Price(host_hour=-1), "not negative"),
        (lambda: Topology((Device("cpu", "cpu", 1, 1),), hosts=0), "1 or more"),
    ):
        with pytest.raises(ConfigError, match=says):
            wrong()  # type: ignore[no-untyped-call]


def test_a_topology_goes_through_json() -> None:
    given = hosts(2, hosts=2, price=Price(1.0))
    assert decode(Topology, encode(given)) == given
