"""The chosen placement is the best there is where all can be tried, fits, and tells the truth where nothing does."""

import dataclasses
import itertools
import math
import random
import re

import pytest

from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.core.hardware import Device, Link, Price, Rates, Topology
from pennyweight.data.schema import Column
from pennyweight.distribute import formulas, planner, remedy, scale
from pennyweight.distribute.cost import ALIKE, Setting
from pennyweight.distribute.planner import Spread, plan
from pennyweight.distribute.search import Search, divisors
from pennyweight.distribute.workload import Asked, Layer, Workload
from pennyweight.model.bundle import Bundle
from pennyweight.model.placement import Placement
from pennyweight.model.ranking import DNN
from pennyweight.model.spec import Model, build, spec_of
from pennyweight.model.transform import Env
from pennyweight.report import scaling

RATES = Rates(4e9, 4e7, 8e9, 8)


def topology(workers: int = 4, hosts: int = 1, memory: float = 2**34, **parts: object) -> Topology:
    links = {"inside": Link(60, 2e9), "between": Link(200, 2e8), "rates": RATES, **parts}
    return Topology((Device("cpu", "cpu", workers, int(memory) * workers),), hosts, workers, **links)  # type: ignore[arg-type]


def small(seed: int, tables: int = 4) -> Workload:
    """A model drawn at random: tables from tens to a million rows, looked up from once to fifty times."""
    rng = random.Random(seed)
    made = []
    for k in range(tables):
        rows, dim = int(10 ** rng.uniform(1, 6)), rng.choice((8, 16, 64))
        made.append(Asked(f"t{k}", rows, dim, rows * dim * 4, rng.choice((1, 1, 1, 10, 50))))
    batch, update = rng.choice((256, 1024, 4096)), rng.choice(("adagrad", "lazy-adam", "sgd"))
    return Workload("m", batch, tuple(made), (), 400_000, 1e5, 4000, 10, update=update)  # type: ignore[arg-type]


# -- the best there is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 4])
def test_search_is_as_good_as_trying_all(workers: int) -> None:
    """On 20 models drawn at random, one table at a time ends within 2 % of the best of all placements."""
    worse = []
    for seed in range(20):
        setting = Setting(small(seed), topology(workers, memory=2**27 if seed % 2 else 2**34), 1)
        every, one = Search(setting, small=10**9), Search(setting, small=0)
        best, found = every.best(), one.best()
        assert every.every and not one.every
        assert found.fits == best.fits
        worse.append(found.step.seconds / best.step.seconds)
        assert one.tried < every.tried or workers == 2
    assert max(worse) <= 1 + ALIKE


def test_all_placements_are_all_but_renamed_ones() -> None:
    """Two workers, two tables: whole, row, and owners 00, 01 (10 and 11 are the same with names exchanged)."""
    setting = Setting(small(0, tables=2).replace(update="adagrad"), topology(2), 1)
    made = [tuple(m.values()) for m in Search(setting).placements()]
    kinds = [tuple("whole" if s is None else s.kind for s in m) for m in made]
    assert len(made) == len(set(made))
    assert set(kinds) == set(itertools.product(("whole", "table", "row"), repeat=2))
    assert kinds.count(("table", "table")) == 2


def test_a_table_too_large_for_a_copy_is_cut_and_a_small_one_is_not_moved() -> None:
    huge, tiny = Asked("huge", 10**6, 16, 64 * 10**6), Asked("tiny", 10, 16, 640)
    made = plan(Workload("m", 1024, (huge, tiny), (), 4000, 1e4, 100, 3), topology(4, memory=5e7))
    assert made.chosen.fits and made.exhaustive
    kinds = {d.path: d.kind for d in made.decisions}
    assert kinds["huge"] == "row"
    assert "more than a worker has" in made.decisions[0].why
    names = {a.name for a in made.alternatives if not a.predicted.fits}
    assert "data parallel" in names and any("do not fit" in line for line in made.why)


def test_no_alternative_is_better() -> None:
    for seed in range(8):
        made = plan(small(seed), topology(4, hosts=1 + seed % 2))
        fitting = [a.predicted for a in made.alternatives if a.predicted.fits]
        assert all(made.chosen.step.seconds <= p.step.seconds * (1 + ALIKE) for p in fitting)


def test_rows_stay_whole_under_row_wise_adagrad() -> None:
    for update in ("adagrad", "lazy-adam"):
        setting = Setting(small(3).replace(update=update), topology(4), 1)
        cuts = {s.kind for m in Search(setting).placements() for s in m.values() if s is not None}
        assert ("column" in cuts) == (update != "adagrad")


def test_of_what_is_as_fast_the_cheaper_is_taken() -> None:
    """Memory has a price: a table that may be anywhere is held once, not by every worker."""
    table = Asked("t", 100_000, 16, 6_400_000, 1e-6)
    work = Workload("m", 1024, (table,), (), 4000, 1e6, 100, 1000)
    for small_ in (0, 20_000):
        held = {}
        for price in (Price(), Price(gb_hour=1.0)):
            found = Search(Setting(work, topology(4, price=price), 1), small=small_).best()
            held[price.gb_hour] = sum(r.memory for r in found.ranks)
        assert held[1.0] <= held[0.0]
        assert held[1.0] < 2 * work.kept(table) + 4 * 4 * 4000 * 2


def test_slow_links_between_hosts_are_spared() -> None:
    """Where hosts are far apart and a host holds everything, groups are hosts or less, not the whole world."""
    work = Workload("m", 8192, (Asked("t", 10**6, 64, 256 * 10**6, 50),), (), 4000, 1e4, 100, 3)
    near = plan(work, topology(4, hosts=2, memory=2e9, between=Link(60, 2e9)))
    far = plan(work, topology(4, hosts=2, memory=2e9, between=Link(60, 2e9), rates=RATES))
    assert near.chosen.placement == far.chosen.placement
    assert divisors(topology(4, hosts=8)) == [1, 2, 4, 8, 32]


def test_wide_layers_are_cut_where_it_pays() -> None:
    """Few rows: weights would travel further than rows. Many rows: the other way round."""
    for inputs, outputs, cut in ((2048, 8192, "column"), (8192, 2048, "row")):
        wide = Layer("wide", inputs, outputs, 2.0 * inputs * outputs, inputs * outputs * 4)
        work = Workload("m", 64, (), (wide,), wide.bytes, wide.flops, 100, 3)
        few = plan(work, topology(4))
        assert few.chosen.placement.dense == {"wide": cut}
        bare = Setting(work, topology(4), 1).predict(Placement(4))
        assert few.chosen.step.seconds < bare.step.seconds
        assert few.chosen.memory < bare.memory
        assert plan(work.replace(batch=65536), topology(4)).chosen.placement.dense == {}


def test_effort_grows_with_workers_by_their_logarithm() -> None:
    """Counted, not timed: placements costed for 16 times the workers are a few times as many."""
    tried = {}
    for workers in (8, 128):
        search = Search(Setting(small(1, tables=8).replace(batch=65536), topology(workers), 1), small=0)
        search.best()
        tried[workers] = search.tried
    assert tried[128] < 6 * tried[8]


# -- what does not fit -----------------------------------------------------------------------------------------------------


def test_a_model_that_fits_nowhere_says_by_how_much_and_four_ways_out() -> None:
    work = Workload(
        "big", 1024, (Asked("t", 10**7, 32, 128 * 10**7), Asked("u", 10**5, 32, 128 * 10**5, 10)), (), 4000, 1e4, 100, 3
    )
    top = topology(4, memory=2.5e8)
    with pytest.raises(PlanError) as error:
        plan(work, top)
    text = str(error.value)
    assert re.search(r"big does not fit on 4 workers: .* one holds \d+ MB .* may hold 225 MB, \d+ MB less", text)
    for way in ("1) compress the tables", "2) use more workers", "3) take a smaller batch", "4) offload tables to disk"):
        assert way in text
    enough = int(re.search(r"(\d+) fit, 4 do not", text).group(1))  # type: ignore[union-attr]
    assert remedy.fits(work, remedy.grown(top, enough), 0.1)
    assert not remedy.fits(work, remedy.grown(top, enough // 2), 0.1)
    fold = int(re.search(r"(\d+) times fewer rows fit", text).group(1))  # type: ignore[union-attr]
    smaller = [dataclasses.replace(t, rows=t.rows // fold, bytes=t.bytes // fold) for t in work.tables]
    assert plan(work.replace(tables=tuple(smaller)), top).chosen.fits
    assert "int8, 3.2 times smaller, fits" in text
    assert "(t, " in text.split("offload")[1]


def test_examples_that_are_too_many_are_not_blamed_on_tables() -> None:
    work = Workload("deep", 4096, (Asked("t", 100, 8, 3200),), (), 4000, 1e4, 10**6, 3)
    with pytest.raises(PlanError) as error:
        plan(work, topology(4, memory=1e9))
    batch = int(re.search(r"(\d+) rows fit, 4096 do not", str(error.value)).group(1))  # type: ignore[union-attr]
    assert plan(work.replace(batch=batch), topology(4, memory=1e9)).chosen.fits
    assert "tables are not what is too large" in str(error.value)
    assert "not enough: still" in str(error.value)


def test_fewer_rows_than_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match="a batch of 3 rows over 4 workers"):
        plan(small(0).replace(batch=3), topology(4))


# -- the transform ---------------------------------------------------------------------------------------------------------


def bundle() -> Bundle:
    columns = (Column("user", "user", "categorical", 5000), Column("item", "item", "categorical", 50))
    spec = spec_of(DNN, columns=columns, dim=16, hidden=(8,))
    return Bundle(Model.of(build(spec), spec), placement=Placement(tables={"embeddings.tables.user": "disk"}))


def test_a_bundle_is_spread_and_keeps_where_its_tables_live() -> None:
    env = Env(topology=topology(4, memory=150_000))
    after = Spread(batch=64).apply(bundle(), env)
    assert after.placement.world_size == 4
    assert after.placement.tables == {"embeddings.tables.user": "disk"}
    assert "embeddings.tables.user" in after.placement.shards
    with pytest.raises(PlanError, match="change nothing"):
        Spread(batch=64).apply(after, env)
    assert "64 rows" in Spread(batch=64).describe()


def test_it_needs_a_measured_topology_and_sane_numbers() -> None:
    with pytest.raises(PlanError, match=r"Spread needs env\.topology"):
        Spread().apply(bundle(), Env())
    with pytest.raises(ConfigError, match="was not measured"):
        Spread().apply(bundle(), Env(topology=Topology((Device("cpu", "cpu", 2, 2**30),), workers=2)))
    for wrong in ({"batch": 0}, {"reserve": 1.0}):
        with pytest.raises(ConfigError, match="must be 1 or more"):
            Spread(**wrong)  # type: ignore[arg-type]


# -- formulas --------------------------------------------------------------------------------------------------------------


def test_the_worked_example() -> None:
    assert formulas.compression(100, 50) == 2
    assert formulas.communication(5, 2) == 5
    assert formulas.speed(5, 2) == 10
    assert formulas.completion([2, 4, 3, 1]) == 4


def test_formulas_are_printed_beside_what_the_model_says() -> None:
    made = plan(small(2), topology(4))
    found = {f.name: f for f in formulas.printed(made, before=2 * made.work.bytes)}
    assert list(found) == ["compression", "communication", "speed", "completion"]
    assert found["compression"].value == 2
    assert 1 < found["compression"].model < 2
    assert found["communication"].model == made.chosen.step.exchange
    assert found["speed"].value > found["speed"].model == pytest.approx(made.work.batch / made.chosen.step.seconds)
    assert found["completion"].value == max(r.lookup_ms for r in made.chosen.ranks) < found["completion"].model
    assert all(f.holds == (abs(f.value - f.model) <= 0.2 * abs(f.model)) for f in found.values())
    alone = formulas.printed(plan(small(2), topology(1)))
    assert [f.name for f in alone] == ["compression", "completion"]


def test_formulas_refuse_what_they_cannot_mean() -> None:
    for wrong in (
        lambda: formulas.compression(1, 0),
        lambda: formulas.communication(0, 1),
        lambda: formulas.speed(-1, 1),
        lambda: formulas.completion([]),
    ):
        with pytest.raises(ConfigError):
            wrong()  # type: ignore[no-untyped-call]


# -- on paper --------------------------------------------------------------------------------------------------------------


def test_scaling_is_the_planners_own_answer_at_each_size() -> None:
    work = small(5).replace(batch=64)
    points = scale.simulate(work, topology(4), (2, 4, 8, 16))
    assert [p.workers for p in points] == [2, 4, 8, 16]
    assert all(p.rate == pytest.approx(64 * p.workers / p.step.seconds) for p in points)
    assert all(0 < p.efficiency <= 1 and p.fits for p in points)
    assert points[0].efficiency > points[-1].efficiency
    four = plan(work.replace(batch=256), topology(4))
    assert points[1].step.seconds == pytest.approx(four.chosen.step.seconds, rel=ALIKE)


def test_exchange_overtakes_compute_where_the_curves_cross() -> None:
    work = small(5).replace(batch=64)
    points = scale.simulate(work, topology(4, between=Link(2000, 1e7)), (2, 4, 8, 16, 32))
    at = scale.crossing(points)
    below = [p for p in points if p.workers < at]
    assert all(p.step.exchange < p.step.compute for p in below)
    after = next(p for p in points if p.workers >= at)
    assert after.step.exchange >= after.step.compute
    assert math.isinf(scale.crossing(points[:0]))


def test_the_mark_lies_where_the_curves_cross_when_a_step_is_parted() -> None:
    alt = pytest.importorskip("altair")
    work = small(5).replace(batch=4096)
    points = scale.simulate(work, topology(4, between=Link(2000, 1e7)), (2, 4, 8, 16, 32), strong=True)
    at = scale.crossing(points)
    assert 2 < at < 32
    drawn = scaling.talk({"m": points})(alt).to_dict()
    (mark,) = (value for layer in drawn["layer"] for value in layer.get("data", {}).get("values", ()) if "part" not in value)
    compute = [p.step.compute * 1e3 for p in points]
    above = next(k for k, p in enumerate(points) if p.workers >= at)
    assert mark["workers"] == at and compute[above] <= mark["ms"] <= compute[above - 1] < compute[0]


def test_hosts_that_hold_everything_scale_further_in_groups() -> None:
    """What published runs found: one group over all workers ends earlier than groups that hold the same."""
    work = Workload("m", 64, tuple(Asked(f"t{k}", 10**6, 64, 256 * 10**6, 20) for k in range(4)), (), 4 * 10**6, 1e7, 4000, 10)
    top = topology(8, memory=1e9, between=Link(300, 5e7))
    one = scale.simulate(work, top, (256,), groups=(1,))[0]
    any_ = scale.simulate(work, top, (256,))[0]
    assert any_.step.seconds <= one.step.seconds
    assert any_.efficiency >= one.efficiency


def test_sizes_that_are_no_whole_hosts_are_refused() -> None:
    with pytest.raises(ConfigError, match="12 workers are no whole number of hosts with 8"):
        scale.simulate(small(0), topology(8), (12,))
    with pytest.raises(ConfigError, match="needs the link between"):
        scale.simulate(small(0), topology(8, between=None), (8,))
    assert planner.WORDS.keys() >= {"lookup", "dense", "ids", "rows", "gradients", "sums"}
