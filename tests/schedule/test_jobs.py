"""Long jobs on unequal workers: each done once, near the bound, whatever happens to the workers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.core.errors import ConfigError
from pennyweight.schedule.jobs import Job, Jobs, lower_bound, makespan

SPEEDS = (4.0, 2.0, 1.0, 1.0)


def test_the_longest_goes_first_where_it_ends_first() -> None:
    jobs = Jobs()
    for name, work in (("short", 1.0), ("long", 10.0), ("middle", 4.0)):
        jobs.add(Job(name, work))
    jobs.join("slow", 1.0)
    jobs.join("quick", 4.0)
    started = {s.worker: s.job.name for s in jobs.start(0.0)}
    assert started == {"quick": "long", "slow": "short"}, "the middle one ends sooner on the quick one, after the long one"
    assert jobs.done("slow", 1.0) == [] and jobs.start(1.0) == []
    jobs.done("quick", 2.5)
    assert [(s.worker, s.job.name) for s in jobs.start(2.5)] == [("quick", "middle")]
    jobs.done("quick", 3.5)
    assert jobs.over


def test_priority_goes_before_length() -> None:
    jobs = Jobs()
    jobs.add(Job("long", 100.0))
    jobs.add(Job("urgent", 1.0, priority=1))
    jobs.join("w")
    assert [s.job.name for s in jobs.start(0.0)] == ["urgent"]


def test_what_a_lost_worker_ran_is_done_by_another() -> None:
    jobs = Jobs()
    jobs.add(Job("a", 5.0))
    jobs.join("lost")
    jobs.start(0.0)
    jobs.died("lost")
    assert not jobs.over and jobs.start(1.0) == []
    jobs.join("other")
    assert [(s.worker, s.job.name) for s in jobs.start(2.0)] == [("other", "a")]


def test_a_second_copy_is_started_of_what_hangs_and_the_first_to_finish_counts() -> None:
    jobs = Jobs()
    jobs.add(Job("a", 10.0))
    jobs.add(Job("b", 9.0))
    jobs.join("v")
    jobs.join("w")
    assert len(jobs.start(0.0)) == 2
    jobs.done("w", 9.0)
    assert jobs.start(9.0) == [], "the other ends in a second, as predicted"
    (backup,) = jobs.start(25.0)
    assert backup.backup and backup.job.name == "a" and backup.worker == "w"
    assert jobs.start(26.0) == []
    assert jobs.done("w", 35.0) == ["v"] and jobs.over


def test_a_worker_that_slows_down_gets_less() -> None:
    jobs = Jobs()
    for k in range(60):
        jobs.add(Job(str(k), 1.0))
    jobs.join("steady")
    jobs.join("slows")
    ends, now = {s.worker: (1.0 if s.worker == "steady" else 5.0) for s in jobs.start(0.0)}, 0.0
    ran = {"steady": 0, "slows": 0}
    while ends:
        worker = min(ends, key=ends.__getitem__)
        now = ends.pop(worker)
        ran[worker] += 1
        for loser in jobs.done(worker, now):
            ends.pop(loser)
        for start in jobs.start(now):
            ends[start.worker] = now + (1.0 if start.worker == "steady" else 5.0)
    assert jobs.over and ran["steady"] > 4 * ran["slows"] and now <= 1.1 * lower_bound([1.0] * 60, (1.0, 0.2))


@pytest.mark.parametrize(("wrong", "worst"), [(0.0, 1.03), (0.3, 1.05)])
def test_the_makespan_is_near_its_lower_bound(wrong: float, worst: float) -> None:
    ratios = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        works = rng.lognormal(0, 0.7, 50).tolist()
        predicted = (works * rng.uniform(1 - wrong, 1 + wrong, 50)).tolist()
        ratios.append(makespan(works, predicted, SPEEDS) / lower_bound(works, SPEEDS))
    assert min(ratios) >= 1 and np.mean(ratios) <= worst


def test_bounds() -> None:
    assert lower_bound([8.0, 1.0], [4.0, 2.0, 1.0]) == 2.0, "the longest on the fastest"
    assert lower_bound([1.0] * 14, SPEEDS) == 14 / 8
    assert makespan([1.0], [1.0], [1.0], deaths=[(0.5, 0)]) == math.inf


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 20.0), st.floats(0.5, 2.0), st.integers(0, 2)), min_size=1, max_size=25),
    st.lists(st.floats(0.2, 4.0), min_size=1, max_size=5),
    st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(0, 4)), max_size=3),
)
def test_whatever_happens_all_jobs_are_done(
    jobs: list[tuple[float, float, int]], speeds: list[float], deaths: list[tuple[float, int]]
) -> None:
    speeds = [*speeds, 1.0]  # one that stays
    last = len(speeds) - 1
    gone = {worker: at for at, worker in deaths if worker < last}
    works, guesses = [w for w, _, _ in jobs], [w * g for w, g, _ in jobs]
    took = makespan(
        works, guesses, speeds, deaths=[(at, worker) for worker, at in gone.items()], priorities=[p for _, _, p in jobs]
    )
    assert lower_bound(works, speeds) - 1e-9 <= took < math.inf


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda jobs: jobs.add(Job("a", 1.0)), "job 'a' of 1 s"),
        (lambda jobs: jobs.add(Job("b", 0.0)), "job 'b' of 0 s"),
        (lambda jobs: jobs.join("w"), "worker 'w' of speed 1"),
        (lambda jobs: jobs.join("v", 0.0), "worker 'v' of speed 0"),
    ],
)
def test_bad_input(wrong, said: str) -> None:  # type: ignore[no-untyped-def]
    jobs = Jobs()
    jobs.add(Job("a", 1.0))
    jobs.join("w")
    with pytest.raises(ConfigError, match=said):
        wrong(jobs)
