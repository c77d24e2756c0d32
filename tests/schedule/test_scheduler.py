"""The scheduler with a clock that only the test moves: what it promises, and that it holds whatever comes in whatever order."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.core.curve import Curve
from pennyweight.core.errors import ConfigError, Overloaded, RequestError
from pennyweight.model.bundle import Policy, Priority, Tenant, Variant
from pennyweight.schedule.queue import Piece, Ticket
from pennyweight.schedule.scheduler import USUAL, Batch, Knobs, Scheduler

SURE = {"safety": 1.0}
GPU = Curve(4.0, 0.5, 0.0, **SURE)
ONE = Policy(batch=16, deadline_ms=50.0, variants=(Variant("one", costs={"cpu": GPU}),))
THREE = Policy(
    deadline_ms=100.0,
    variants=(
        Variant("full", costs={"cpu": Curve(0.0, 0.0, 0.1, **SURE)}),
        Variant("mid", gap=0.005, costs={"cpu": Curve(0.0, 0.0, 0.03, **SURE)}),
        Variant("small", gap=0.03, within=False, costs={"cpu": Curve(0.0, 0.0, 0.01, **SURE)}),
    ),
)


class World:
    """A scheduler, its clock, and what was started on its workers."""

    def __init__(self, policy: Policy, workers: int = 1, knobs: Knobs = USUAL) -> None:
        self.now = 100.0
        self.scheduler = Scheduler(policy, lambda: self.now, knobs)
        for k in range(workers):
            self.scheduler.join(f"w{k}")

    def offer(self, value: Any = None, items: int = 1, **asked: Any) -> Ticket:
        return self.scheduler.offer(value, items, **asked)

    def start(self, **how: Any) -> list[Batch]:
        return self.scheduler.dispatch(**how)

    def done(self, batch: Batch, seconds: float | None = None) -> list[Any]:
        return [ticket.value for ticket in self.scheduler.done(batch, seconds)]


def values(batch: Batch) -> list[Any]:
    return [piece.ticket.value for piece in batch.pieces]


# -- order ---------------------------------------------------------------------------------------------------------------


def test_the_earliest_deadline_goes_first() -> None:
    world = World(dataclasses.replace(ONE, batch=1, deadline_ms=1000.0))
    for name, seconds in (("late", 0.9), ("soon", 0.3), ("later", 1.0)):
        world.offer(name, deadline_s=seconds)
    order = []
    for _ in range(3):
        (batch,) = world.start()
        order += values(batch)
        world.now += 0.005
        world.done(batch)
    assert order == ["soon", "late", "later"]


def test_a_class_overtakes_the_one_below_for_as_long_as_its_age_and_no_longer() -> None:
    policy = Policy(deadline_ms=10_000.0, age_ms=200.0, classes=(Priority("page"), Priority("mail")), variants=ONE.variants)
    world = World(policy)
    world.offer("mail", priority="mail")
    world.now += 0.19
    world.offer("page within its age", priority="page")
    world.now += 0.02
    world.offer("page after it", priority="page")
    order = []
    while batch := world.start():
        order += values(batch[0])
        world.done(batch[0])
    assert order == ["page within its age", "mail", "page after it"]


# -- batches -------------------------------------------------------------------------------------------------------------


def test_a_batch_is_the_longest_prefix_in_time() -> None:
    world = World(ONE)
    for k in range(40):
        world.offer(k)
    (batch,) = world.start()
    assert values(batch) == list(range(16)), "the policy's limit"
    tight = World(dataclasses.replace(ONE, deadline_ms=17.5))
    for k in range(9):
        tight.offer(k)
    (batch,) = tight.start()
    assert len(batch.pieces) == 6, "two fifths of its time, 7 ms, is what a batch may take: 4 + 6 x .5"


def test_work_that_is_all_per_item_is_not_joined() -> None:
    world = World(dataclasses.replace(THREE, batch=16))
    for k in range(5):
        world.offer(k, 20)
    (batch,) = world.start()
    assert values(batch) == [0]


def test_idle_workers_share_what_waits() -> None:
    world = World(ONE, workers=2)
    for k in range(8):
        world.offer(k)
    assert sorted(len(batch.pieces) for batch in world.start()) == [4, 4]


def test_the_first_waits_for_others_until_its_wait_is_over_or_the_batch_is_full() -> None:
    world = World(dataclasses.replace(ONE, batch=3, wait_ms=10.0))
    world.offer("a")
    assert world.start() == [] and world.scheduler.due() == pytest.approx(100.010)
    world.now = 100.010
    (batch,) = world.start()
    assert values(batch) == ["a"]
    world.done(batch)
    for name in "bcd":
        world.offer(name)
    (batch,) = world.start()
    assert values(batch) == ["b", "c", "d"]
    world.done(batch)
    world.offer("e")
    assert world.start() == []
    assert [values(b) for b in world.start(hurry=True)] == [["e"]]


def test_a_large_request_is_split_over_idle_workers_and_joined() -> None:
    policy = Policy(deadline_ms=100.0, variants=THREE.variants[:1])
    world = World(policy, workers=4)
    world.offer("large", 600)
    batches = world.start()
    assert len(batches) == 4
    assert sorted((b.pieces[0].start, b.pieces[0].stop) for b in batches) == [(0, 150), (150, 300), (300, 450), (450, 600)]
    assert [world.done(b) for b in batches] == [[], [], [], ["large"]]


def test_no_more_pieces_than_workers_nobody_else_waits_for() -> None:
    world = World(Policy(deadline_ms=100.0, variants=THREE.variants[:1]), workers=3)
    world.offer("large", 600)
    world.offer("other", 10)
    world.offer("another", 10)
    started = Counter(values(b)[0] for b in world.start())
    assert started == {"large": 1, "other": 1, "another": 1}


def test_one_whose_little_time_is_for_a_small_batch_is_given_up_where_whole_batches_wait() -> None:
    """Else each next batch is small for the sake of its head, and all are about to expire."""
    slow = Variant("slow", costs={"cpu": Curve(40.0, 2.0, 0.0, **SURE)})
    world = World(Policy(batch=16, deadline_ms=200.0, variants=(slow,)))
    first = world.offer("runs")
    (batch,) = world.start()
    nearly = world.offer("has little time", deadline_s=0.1)
    for k in range(17):
        if k == 10:
            world.now += 0.040
        world.offer(k)
    world.now += 0.015  # 45 ms are left, which is time for two
    assert world.done(batch) == ["runs"] and first.answered
    (batch,) = world.start()
    assert world.scheduler.late() == [nearly] and values(batch) == list(range(16))
    alone = World(Policy(batch=16, deadline_ms=200.0, variants=(slow,)))
    alone.offer("runs")
    (batch,) = alone.start()
    alone.offer("has little time", deadline_s=0.1)
    alone.offer("another")
    alone.now += 0.055
    alone.done(batch)
    (batch,) = alone.start()
    assert values(batch) == ["has little time"] and alone.scheduler.late() == []


# -- admission -----------------------------------------------------------------------------------------------------------


def test_what_would_be_late_is_refused_at_arrival_with_when_to_come_back() -> None:
    world = World(dataclasses.replace(ONE, batch=1))
    accepted, running = 0, []
    with pytest.raises(Overloaded, match=r"the deadline is 49\.9 ms") as refused:
        for _ in range(100):
            world.offer(deadline_s=0.0499)
            running += world.start()
            accepted += 1
    assert accepted == 9, "of 4.5 ms each, in nine tenths of 49.9 ms"
    assert refused.value.reason == "late" and 0 < refused.value.retry_after < 0.0046
    world.now += 0.0045
    world.done(running[0])
    world.offer("comes back", deadline_s=0.0499)


def test_a_lower_class_is_shed_first_and_is_not_in_the_way() -> None:
    classes = (Priority("page", share=0.91), Priority("mail", share=0.3))
    world = World(dataclasses.replace(ONE, batch=1, classes=classes))
    taken = Counter[str]()
    for _ in range(12):
        for name in ("mail", "page"):
            try:
                world.offer(name, priority=name)
                taken[name] += 1
            except Overloaded:
                pass
    assert taken == {"page": 10, "mail": 1}


def test_a_lower_class_waits_for_what_more_important_ones_send_meanwhile() -> None:
    """Two thirds of the time go to pages: mail waits three times as long as for what is there, and is told so at once."""
    classes = (Priority("page", share=0.9), Priority("mail", share=0.9))
    policy = dataclasses.replace(ONE, batch=1, classes=classes)

    def accepted(every_s: float) -> int:
        world = World(policy)
        for _ in range(60):
            world.offer(priority="page")
            (batch,) = world.start()
            world.now += 0.0045
            world.done(batch)
            world.now += every_s - 0.0045
        world.offer(priority="page")
        world.start()
        count = 0
        with pytest.raises(Overloaded):
            for _ in range(20):
                world.offer("mail", priority="mail")
                count += 1
        return count

    assert accepted(0.1) > 5 and accepted(0.00675) < 3


def test_a_request_nobody_could_serve_is_tried_now_and_then_so_that_a_wrong_curve_is_found_out() -> None:
    world = World(dataclasses.replace(ONE, variants=(Variant("one", costs={"cpu": Curve(500.0, 0.0, 0.0)}),)))
    world.offer("the test")
    with pytest.raises(Overloaded):
        world.offer("another at the same time")
    (batch,) = world.start()
    world.now += 0.004
    assert world.done(batch) == ["the test"]
    world.scheduler.learn()
    with pytest.raises(Overloaded):
        world.offer("too soon")
    for _ in range(60):
        world.now += 1.0
        world.offer("again")
        (batch,) = world.start()
        world.now += 0.004
        world.done(batch)
        world.scheduler.learn()
    world.offer("and it is believed")


def test_the_queue_has_an_end() -> None:
    world = World(Policy(queue=4, deadline_ms=1e6, variants=ONE.variants))
    for k in range(4):
        world.offer(k)
    with pytest.raises(Overloaded, match="4 requests wait, and the queue holds 4") as refused:
        world.offer(4)
    assert refused.value.reason == "full"


def test_a_quota_is_in_device_milliseconds() -> None:
    policy = Policy(
        deadline_ms=1e6,
        tenants=(Tenant("shop", quota=100.0), Tenant("*", quota=10.0)),
        variants=(Variant("one", costs={"cpu": Curve(0.0, 0.0, 1.0, **SURE)}),),
    )
    world = World(policy)
    assert [world.offer(k, 50, tenant="shop").items for k in range(2)] == [50, 50]
    with pytest.raises(Overloaded, match=r"quota of tenant 'shop' is spent \(100 ms") as refused:
        world.offer(2, 50, tenant="shop")
    assert refused.value.reason == "quota" and refused.value.retry_after == pytest.approx(0.5)
    world.offer("small", 10, tenant="somebody"), world.offer("another's", 10, tenant="another")
    with pytest.raises(Overloaded, match="'somebody'"):
        world.offer("more", 10, tenant="somebody")
    world.now += 0.5
    world.offer(3, 50, tenant="shop")
    strict = World(dataclasses.replace(policy, tenants=policy.tenants[:1]))
    with pytest.raises(RequestError, match="no tenant 'x'; the policy names shop"):
        strict.offer(tenant="x")


def test_quotas_are_charged_what_work_took() -> None:
    policy = Policy(
        deadline_ms=1e6,
        tenants=(Tenant("shop", quota=100.0),),
        variants=(Variant("one", costs={"cpu": Curve(0.0, 0.0, 1.0, **SURE)}),),
    )
    world = World(policy)
    world.offer(0, 50, tenant="shop")
    (batch,) = world.start()
    world.done(batch, 0.090)
    with pytest.raises(Overloaded):
        world.offer(1, 50, tenant="shop")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"priority": "x"}, "no class 'x'; known: page, mail"),
        ({"deadline_s": 0.0}, "a deadline of 0 s"),
        ({"deadline_s": -1.0}, "a deadline of -1 s"),
        ({"deadline_s": float("nan")}, "a deadline of nan s"),
    ],
)
def test_nonsense_is_refused(asked: dict[str, Any], said: str) -> None:
    world = World(dataclasses.replace(ONE, classes=(Priority("page"), Priority("mail"))))
    with pytest.raises(RequestError, match=said):
        world.offer(**asked)
    assert world.scheduler.inside == 0


def test_those_late_while_they_wait_are_told() -> None:
    world = World(dataclasses.replace(ONE, batch=1, variants=(Variant("unknown"),)))
    world.offer("runs")
    (batch,) = world.start()
    waiting = world.offer("waits")
    assert world.scheduler.late() == [] and world.scheduler.due() == pytest.approx(100.05)
    world.now = 100.05
    assert world.scheduler.late() == [waiting] and "not started within 50 ms" in str(world.scheduler.refusal(waiting))
    assert world.done(batch) == ["runs"] and world.scheduler.inside == 0


# -- variants ------------------------------------------------------------------------------------------------------------


def test_the_best_model_answers_until_load_asks_for_less() -> None:
    world = World(THREE)
    world.offer("first", 100)
    (batch,) = world.start()
    assert batch.variant == 0
    for k in range(7):
        world.offer(k, 100)
    world.done(batch, 0.01)
    (batch,) = world.start()
    assert batch.variant == 1, "60 and more ms of the best, in 100"
    for k in range(20):
        world.offer(k, 100, degrade=True)
    world.done(batch, 0.003)
    (batch,) = world.start()
    assert batch.variant == 1, "the head does not allow what is outside the margin"
    while not batch.pieces[0].ticket.degrade:
        world.done(batch, 0.003)
        (batch,) = world.start()
    assert batch.variant == 2


def test_stepping_up_again_is_patient() -> None:
    world = World(THREE, knobs=Knobs(patience=0.2, room=0.7))
    for k in range(9):
        world.offer(k, 100)
    levels = []
    while batches := world.start():
        levels.append(batches[0].variant)
        world.now += 0.003
        world.done(batches[0])
    assert levels[0] == 1 and set(levels) == {1}
    world.offer("soon", 10)
    assert [b.variant for b in world.start()] == [1]
    world.done(next(iter(world.scheduler.workers.values())).batch)  # type: ignore[arg-type]
    world.now += 0.021
    world.offer("later", 10)
    assert [b.variant for b in world.start()] == [0]


def test_all_pieces_of_a_request_have_one_model() -> None:
    world = World(Policy(deadline_ms=100.0, variants=THREE.variants), workers=2)
    world.offer("large", 600)
    one, two = world.start()
    assert one.variant == two.variant
    world.done(one)
    for k in range(7):
        world.offer(k, 100, degrade=True)
    assert world.scheduler.died("w1") == []
    seen = {}
    while batches := world.start():
        seen[values(batches[0])[0]] = batches[0].variant
        world.done(batches[0])
    assert seen["large"] == one.variant and set(seen.values()) != {one.variant}


# -- workers -------------------------------------------------------------------------------------------------------------


def test_what_a_dead_worker_had_is_done_by_another_at_its_old_place() -> None:
    world = World(dataclasses.replace(ONE, deadline_ms=1000.0), workers=2)
    first = [world.offer(k) for k in range(4)]
    one, two = world.start()
    world.now += 0.001
    for k in range(4, 8):
        world.offer(k)
    assert world.scheduler.died(one.worker.name) == []
    world.done(two)
    answered = values(two)
    while batches := world.start():
        answered += world.done(batches[0])
    assert sorted(answered) == list(range(8)) and len(answered) == 8
    assert answered[2:4] == values(one), "they go first: their deadlines are the earliest"
    assert all(ticket.answered for ticket in first) and world.scheduler.inside == 0


def test_a_request_that_kills_twice_is_refused_and_takes_no_other_with_it() -> None:
    world = World(ONE)
    for name in ("a", "poison", "b"):
        world.offer(name)
    refused, answered, lives = [], [], 0
    while batches := world.start():
        (batch,) = batches
        if "poison" in values(batch):
            refused += [ticket.value for ticket in world.scheduler.died(batch.worker.name)]
            lives += 1
            world.scheduler.join(f"again{lives}")
        else:
            answered += world.done(batch, 0.0045)
    assert refused == ["poison"] and sorted(answered) == ["a", "b"] and lives == 2
    assert world.scheduler.inside == 0


def test_a_paused_worker_gets_nothing_new() -> None:
    world = World(ONE, workers=2)
    world.scheduler.pause("w0")
    world.offer("a")
    (batch,) = world.start()
    assert batch.worker.name == "w1"
    world.offer("b")
    assert world.start() == []
    world.scheduler.resume("w0")
    assert [b.worker.name for b in world.start()] == ["w0"]


def test_without_workers_requests_are_refused_with_a_time_to_come_back() -> None:
    world = World(ONE)
    world.scheduler.pause("w0")
    with pytest.raises(Overloaded) as refused:
        world.offer()
    assert 0 < refused.value.retry_after <= 1
    world.scheduler.died("w0")
    with pytest.raises(Overloaded):
        world.offer()
    world.scheduler.join("w1")
    world.offer("a")
    assert [values(b) for b in world.start()] == [["a"]]


def test_an_error_fails_its_own_batch_and_no_other() -> None:
    world = World(dataclasses.replace(ONE, batch=2))
    for k in range(3):
        world.offer(k)
    (batch,) = world.start()
    assert [ticket.value for ticket in world.scheduler.failed(batch)] == [0, 1]
    (batch,) = world.start()
    assert world.done(batch) == [2] and world.scheduler.inside == 0


def test_a_batch_that_is_much_too_late_is_hedged_within_a_budget() -> None:
    world = World(dataclasses.replace(ONE, deadline_ms=1000.0, hedge=0.05), workers=2)
    for k in range(50):
        world.offer(k)
        (batch,) = world.start()
        world.now += 0.0045
        world.done(batch)
    world.offer("slow")
    (batch,) = world.start()
    due = world.scheduler.due()
    assert due is not None and world.start() == []
    world.now = due + 1e-6
    (copy,) = world.start()
    assert copy.pieces == batch.pieces and copy.worker is not batch.worker
    world.now += 0.0045
    assert world.done(copy) == ["slow"] and batch.moot
    assert world.done(batch) == [], "answered once"
    assert 0 < world.scheduler.hedged <= 0.05 * (world.scheduler.worked + world.scheduler.hedged)


def test_without_a_budget_nothing_is_hedged() -> None:
    world = World(dataclasses.replace(ONE, deadline_ms=1000.0), workers=2)
    world.offer("slow")
    world.start()
    world.now += 0.5
    assert world.start() == []


def test_another_bundle_is_adopted_while_requests_wait_and_run() -> None:
    world = World(dataclasses.replace(ONE, batch=1))
    for k in range(3):
        world.offer(k)
    (running,) = world.start()
    quick = dataclasses.replace(ONE, batch=1, variants=(Variant("new", costs={"cpu": Curve(1.0, 0.0, 0.0, **SURE)}),))
    world.scheduler.adopt(quick)
    assert world.done(running, 0.0045) == [0]
    world.scheduler.learn()
    assert world.scheduler.usual(1) == 0.001, "what the old one took teaches nothing about the new one"
    (batch,) = world.start()
    assert values(batch) == [1] and batch.expected == 0.001
    world.done(batch)
    assert [values(b) for b in world.start()] == [[2]]
    with pytest.raises(ConfigError, match="other classes or tenants"):
        world.scheduler.adopt(dataclasses.replace(quick, classes=(Priority("x"),)))


def test_speeds_and_curves_do_not_drift_apart() -> None:
    """Times are skewed, so that a prediction of the mean is mostly too long; two workers, one a third slower."""
    policy = Policy(deadline_ms=1000.0, variants=(Variant("one", costs={"cpu": Curve(1.0, 0.0, 0.01)}),))
    world, noise = World(policy, workers=2), np.random.default_rng(0)
    for _ in range(10_000):
        for _ in range(2):
            world.offer(items=int(noise.integers(1, 200)))
        for batch in world.start():
            slow = 1.2 if batch.worker.name == "w1" else 0.9
            takes = slow * (0.002 + 0.00002 * batch.items) * noise.lognormal(-0.08, 0.4)
            world.now += takes
            world.done(batch, takes)
    (curve,) = (known["cpu"] for known in world.scheduler.curves())
    assert curve.ms(1, 100) == pytest.approx(4.0, rel=0.15)
    fast, slow = (world.scheduler.workers[name].speed for name in ("w0", "w1"))
    assert slow / fast == pytest.approx(4 / 3, rel=0.3) and slow * fast == pytest.approx(1.0)


def test_a_worker_about_to_be_free_is_handed_what_it_runs_next() -> None:
    world = World(dataclasses.replace(ONE, batch=1, deadline_ms=1000.0), knobs=dataclasses.replace(USUAL, ahead=0.001))
    for name in "abcd":
        world.offer(name)
    (first,) = world.start()
    assert world.start() == [], "4.5 ms before it is free"
    world.now += 0.004
    (second,) = world.start()
    assert (values(second), first.worker.following) == (["b"], second) and world.start() == [], "one at a time"
    world.now += 0.0005
    assert world.done(first) == ["a"] and first.worker.batch is second and second.start == world.now
    assert world.start() == [] and first.worker.until == pytest.approx(world.now + 0.0045)
    world.now += 0.004
    (third,) = world.start()
    world.now += 0.1
    assert values(third) == ["c"] and world.done(second) == ["b"]
    world.now += 0.1
    assert world.start() == [], "much too late: it may never end"


def test_what_a_worker_had_not_begun_when_it_died_is_nobodys_fault() -> None:
    world = World(dataclasses.replace(ONE, batch=1, deadline_ms=1000.0), knobs=dataclasses.replace(USUAL, ahead=1.0))
    world.offer("deadly")
    world.now += 0.001
    world.offer("next")
    for _ in range(2):
        assert [values(batch) for batch in world.start()] == [["deadly"], ["next"]]
        poison = world.scheduler.died(f"w{_}")
        world.scheduler.join(f"w{_ + 1}")
    assert [ticket.value for ticket in poison] == ["deadly"]
    (batch,) = world.start()
    assert values(batch) == ["next"] and batch.pieces[0].ticket.deaths == 0


def test_curves_are_learned() -> None:
    world = World(dataclasses.replace(ONE, deadline_ms=10_000.0))
    for _ in range(200):
        world.offer()
        (batch,) = world.start()
        world.now += 0.02
        world.done(batch)
    world.scheduler.learn()
    assert 0.018 < world.scheduler.usual(1) < 0.022


# -- whatever happens ------------------------------------------------------------------------------------------------------

CLASSES = (Priority("page", deadline_ms=40.0), Priority("mail", deadline_ms=80.0, share=0.5, degrade=True))
CURVES = (Curve(1.0, 0.2, 0.02, **SURE), Curve(0.5, 0.1, 0.005, **SURE))
MIXED = Policy(
    batch=4,
    queue=30,
    hedge=0.1,
    classes=CLASSES,
    tenants=(Tenant("big", quota=400.0), Tenant("*", quota=100.0)),
    variants=(Variant("full", costs={"cpu": CURVES[0]}), Variant("small", gap=0.02, within=False, costs={"cpu": CURVES[1]})),
)
OFFER = st.tuples(
    st.just("offer"), st.integers(1, 800), st.sampled_from(["page", "mail"]), st.sampled_from(["big", "a", "b"]), st.booleans()
)
STEP = st.one_of(
    OFFER,
    OFFER,
    OFFER,
    st.tuples(st.just("done"), st.integers(0, 9), st.floats(0.2, 5.0)),
    st.tuples(st.just("done"), st.integers(0, 9), st.floats(0.2, 5.0)),
    st.tuples(st.just("wait"), st.floats(0.0, 0.05)),
    st.tuples(st.just("kill"), st.integers(0, 9)),
    st.tuples(st.just("drop"), st.integers(0, 99)),
    st.tuples(st.just("fail"), st.integers(0, 9)),
)


class Chaos(World):
    """Steps in any order, and what came of each accepted request."""

    def __init__(self, policy: Policy, workers: int, ahead: float = 0.0) -> None:
        super().__init__(policy, workers, dataclasses.replace(USUAL, ahead=ahead))
        self.fates: dict[Ticket, list[str]] = {}
        self.parts: dict[Ticket, list[Piece]] = {}
        self.running: list[Batch] = []
        self.names = workers

    def step(self, step: tuple[Any, ...]) -> None:
        what, *how = step
        if what == "offer":
            items, priority, tenant, degrade = how
            try:
                ticket = self.offer(None, items, priority=priority, tenant=tenant, degrade=degrade)
            except Overloaded as refused:
                assert refused.retry_after > 0 or refused.reason == "full"
            else:
                self.fates[ticket], self.parts[ticket] = [], ticket.pieces
        elif what == "wait":
            self.now += how[0]
        elif what == "drop" and self.fates:
            ticket = list(self.fates)[how[0] % len(self.fates)]
            if not self.fates[ticket]:
                self.scheduler.drop(ticket)
                self.fates[ticket].append("left")
        elif self.running and what in ("done", "kill", "fail"):
            batch = self.running[how[0] % len(self.running)]
            batch = batch.worker.batch or batch  # what was handed ahead comes after it
            self.running.remove(batch)
            if what == "done":
                self.now = max(self.now, batch.start + batch.expected * how[1])
                self.ended(self.scheduler.done(batch), "answered")
            elif what == "fail":
                self.ended(self.scheduler.failed(batch), "failed")
            else:
                self.ended(self.scheduler.died(batch.worker.name), "poison")
                self.running = [other for other in self.running if other.worker is not batch.worker]
                self.names += 1
                self.scheduler.join(f"w{self.names}")
        self.pump()
        self.check()

    def pump(self) -> None:
        waiting = {id(piece) for piece in self.scheduler.queue}
        started = self.scheduler.dispatch()
        self.ended(self.scheduler.late(), "late")
        self.running += started
        self.ordered(started, waiting)

    def ordered(self, started: list[Batch], waiting: set[int]) -> None:
        """Whoever was started has no later deadline than anybody of its class who still waits."""
        for batch in started:
            for piece in batch.pieces:
                ticket = piece.ticket
                for other in self.scheduler.queue:
                    if other.ticket.rank == ticket.rank and not batch.again and id(other) in waiting:
                        assert ticket.deadline <= other.ticket.deadline

    def ended(self, tickets: list[Ticket], fate: str) -> None:
        for ticket in tickets:
            assert not self.fates[ticket], f"{fate} after {self.fates[ticket]}"
            self.fates[ticket].append(fate)
            if fate == "poison":
                assert ticket.deaths == 2

    def check(self) -> None:
        scheduler = self.scheduler
        queue, waiting = scheduler.queue, list(scheduler.queue)
        assert queue.size == len(waiting) == sum(queue.counts) and queue.items == sum(p.items for p in waiting)
        assert sum(queue.loads) == pytest.approx(sum(p.floor for p in waiting), abs=1e-9)
        assert scheduler.inside == sum(not fate for fate in self.fates.values())
        for ticket, fate in self.fates.items():
            if not fate:
                self.parts[ticket] = ticket.pieces
            assert bool(fate) is not bool(ticket.pieces), "what has ended lets go of its pieces"
            covered = sorted((p.start, p.stop) for p in self.parts[ticket])
            assert covered[0][0] == 0 and covered[-1][1] == ticket.items
            assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))
            if not fate:
                assert all(p.state in ("waiting", "running", "done") for p in ticket.pieces)
        for batch in self.running:
            assert batch in (batch.worker.batch, batch.worker.following)
            for piece in batch.pieces:
                assert piece.ticket.degrade or MIXED.variants[batch.variant].within
        self.check_bound()
        due = scheduler.due()
        assert due is None or due > self.now, "what is due has been done; a loop would spin"
        assert scheduler.hedged <= MIXED.hedge * (scheduler.worked + scheduler.hedged) + 1e-9

    def check_bound(self) -> None:
        """What lets most requests in without a prediction is never below one."""
        scheduler = self.scheduler
        for degrade in (False, True):
            piece = Ticket(None, 40, 0, "", self.now, self.now + 1.0, degrade).pieces[0]
            cost = scheduler._cheapest(scheduler._least[degrade])
            piece.floor = cost.r + cost.b * piece.items
            assert scheduler._at_most(piece, cost, self.now) >= scheduler._predict(piece, cost, self.now) - 1e-12


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=120), st.integers(1, 4), st.sampled_from([0.0, 0.01, 10.0]))
def test_every_accepted_request_ends_exactly_once(steps: list[tuple[Any, ...]], workers: int, ahead: float) -> None:
    chaos = Chaos(MIXED, workers, ahead)
    for step in steps:
        chaos.step(step)
    while chaos.running:
        chaos.step(("done", 0, 1.0))
    chaos.now += 10
    chaos.pump()
    while chaos.running:
        chaos.step(("done", 0, 1.0))
    assert all(len(fate) == 1 for fate in chaos.fates.values())
    assert chaos.scheduler.inside == 0 and len(chaos.scheduler.queue) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.0, 0.004), min_size=40, max_size=150), st.floats(20.0, 200.0))
def test_nobody_is_overtaken_for_longer_than_the_age(gaps: list[float], age_ms: float) -> None:
    """A busy upper class: one of the lower class waits for those due less than ``age`` after it, and for nobody else."""
    policy = Policy(
        deadline_ms=5000.0, age_ms=age_ms, classes=(Priority("page"), Priority("mail")), variants=ONE.variants, queue=10_000
    )
    world = World(policy)
    mail = world.offer("mail", priority="mail")
    for gap in gaps:
        world.now += gap
        world.offer("page", priority="page")
        if mail.pieces and mail.pieces[0].state == "waiting":
            for batch in world.start():
                for piece in batch.pieces:
                    assert piece.ticket is mail or piece.ticket.deadline <= mail.deadline + age_ms / 1000
                world.now += 0.0045
                world.done(batch)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 0.2), st.integers(1, 300)), min_size=1, max_size=150), st.floats(10.0, 500.0))
def test_no_tenant_gets_more_than_its_quota(asks: list[tuple[float, int]], quota: float) -> None:
    """Over any time: the burst, what refilled, and the last request that was let in against what was there."""
    policy = Policy(
        deadline_ms=1e9,
        queue=10**6,
        tenants=(Tenant("t", quota=quota),),
        variants=(Variant("one", costs={"cpu": Curve(0.0, 0.0, 1.0, **SURE)}),),
    )
    world = World(policy)
    start, used = world.now, 0.0
    for gap, items in asks:
        world.now += gap
        try:
            world.offer(None, items, tenant="t")
            used += items
        except Overloaded:
            pass
        assert used <= quota * (1 + world.now - start) + max(0.0, items - quota) + 300
