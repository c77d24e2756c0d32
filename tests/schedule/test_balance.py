"""Rules that choose a machine, from probes that only the test hands in."""

from collections import Counter

import pytest

from pennyweight.schedule.balance import HotCold, Oracle, PowerOfTwo, Probe, RoundRobin, Rule

NODES = ("a", "b", "c", "d")


def told(rule: Rule, at: float = 0.0, **inside_and_answer: tuple[float, float]) -> None:
    for node, (inside, answer) in inside_and_answer.items():
        rule.heard(Probe(node, inside, answer, at))


def test_the_quickest_cold_machine_is_taken() -> None:
    rule = HotCold(NODES, hot=0.5)
    told(rule, a=(0.00, 0.30), b=(0.01, 0.02), c=(0.02, 0.021), d=(0.9, 0.91))
    assert rule.pick(0.01, 0.1) == "b", "a is empty and slow, c is quick and fuller, d is hot"


def test_between_probes_a_machine_grows_by_what_was_sent_there() -> None:
    rule = HotCold(("a", "b"), hot=1.0)
    told(rule, a=(0.0, 0.010), b=(0.0, 0.030))
    assert [rule.pick(0.01, 0.1) for _ in range(8)].count("b") == 2, "a third of the speed, a quarter of the requests"


def test_a_large_request_avoids_the_slow_machine() -> None:
    rule = HotCold(("quick", "slow"), hot=1.0)
    told(rule, quick=(0.015, 0.025), slow=(0.0, 0.030))
    assert rule.pick(0.01, 0.1) == "quick"
    told(rule, 0.2, quick=(0.022, 0.032), slow=(0.0, 0.030))
    assert rule.pick(0.01, 0.2) == "slow"
    told(rule, 0.3, quick=(0.022, 0.032), slow=(0.0, 0.030))
    assert rule.pick(0.04, 0.3) == "quick"


def test_old_probes_are_not_believed_and_the_newest_counts() -> None:
    rule = HotCold(("a", "b"))
    told(rule, 0.0, a=(0.0, 0.01))
    told(rule, 5.0, b=(0.5, 0.51))
    assert {rule.pick(0.01, 5.1) for _ in range(10)} == {"b"}
    rule.heard(Probe("b", 9.0, 9.0, 4.0))
    told(rule, 5.05, a=(1.5, 1.6))
    assert rule.pick(0.01, 5.2) == "b"


def test_without_probes_any_machine_is_taken() -> None:
    rule = HotCold(NODES, seed=3)
    assert {rule.pick(0.01, 0.0) for _ in range(60)} == set(NODES)
    assert set(rule.wanted()) < set(NODES) and len(set(rule.wanted())) == 3


def test_of_two_the_one_with_fewer() -> None:
    rule = PowerOfTwo(("a", "b"))
    assert Counter(rule.pick(0.01, 0.0) for _ in range(10)) == {"a": 5, "b": 5}
    for _ in range(3):
        rule.answered("a")
    assert [rule.pick(0.01, 0.0) for _ in range(3)] == ["a"] * 3
    assert PowerOfTwo(("alone",)).pick(0.01, 0.0) == "alone"


def test_one_after_the_other() -> None:
    rule = RoundRobin(NODES)
    assert [rule.pick(0.01, 0.0) for _ in range(6)] == ["a", "b", "c", "d", "a", "b"]


def test_the_oracle_asks_everybody() -> None:
    assert Oracle(NODES, lambda node, work: {"c": 0.1}.get(node, 0.2) + work).pick(0.01, 0.0) == "c"


@pytest.mark.parametrize("rule", [HotCold, PowerOfTwo])
def test_the_same_seed_chooses_the_same(rule: type) -> None:
    one, two = rule(NODES, 7), rule(NODES, 7)
    assert [one.pick(0.01, 0.0) for _ in range(20)] == [two.pick(0.01, 0.0) for _ in range(20)]
