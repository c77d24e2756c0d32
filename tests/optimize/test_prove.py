import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import log_loss, roc_auc_score

from pennyweight.core.errors import ConfigError, DataError
from pennyweight.optimize import prove as p
from pennyweight.optimize.trial import Quality


def pair(rng, rows, *, auc=0.79, drop=0.0, agree=0.95, users=0, between=0.0, uneven=False):
    """Labels, two correlated scores whose true AUC differs by ``drop``, and users for whom the second one errs together."""
    y = (rng.random(rows) < 0.5).astype(float)
    share = rng.lognormal(0, 1.3 * uneven, max(users, 1))
    who = rng.choice(max(users, 1), rows, p=share / share.sum())
    noise = rng.normal(size=rows)
    own = agree * noise + math.sqrt(1 - agree**2) * rng.normal(size=rows)
    # a user's shift of the signal adds its variance to the positives: the mean is set so that the AUC is exact all the same
    signal = norm.ppf(auc - drop) * math.sqrt(2 + between**2) + between * rng.normal(size=max(users, 1))[who]
    return y, norm.ppf(auc) * math.sqrt(2) * y + noise, signal * y + own, who


def share_proven(times, rows, margin, by_user=False, **how):
    rng = np.random.default_rng(7)
    proven = 0
    for _ in range(times):
        y, a, b, who = pair(rng, rows, **how)
        proven += p.prove("auc", y, a, b, margin=margin, users=who if by_user else None).verdict == "proven"
    return proven / times


def slow_delong(y, a, b):
    """DeLong, DeLong & Clarke-Pearson 1988 as printed: all pairs."""
    wins = [np.sign(s[y == 1][:, None] - s[y == 0][None, :]) / 2 + 0.5 for s in (a, b)]
    ten, one = np.array([w.mean(1) for w in wins]), np.array([w.mean(0) for w in wins])
    cov = np.cov(ten) / ten.shape[1] + np.cov(one) / one.shape[1]
    return wins[0].mean(), wins[1].mean(), math.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])


# -- the figures ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(8, 120), levels=st.sampled_from([3, 10, 10**6]))
def test_delong_is_the_printed_formula_and_sklearns_auc(seed, rows, levels):
    rng = np.random.default_rng(seed)
    y = np.concatenate([[0, 0, 1, 1], rng.integers(0, 2, rows - 4)])
    a, b = rng.integers(0, levels, (2, rows)).astype(float)
    a[:2], b[:2] = (-1, levels), (-1, levels)  # never constant
    found = p.delong(y, a, b)
    base, value, se = slow_delong(y, a, b)
    assert found.baseline == pytest.approx(roc_auc_score(y, a), abs=1e-12) == pytest.approx(base, abs=1e-12)
    assert found.value == pytest.approx(roc_auc_score(y, b), abs=1e-12) == pytest.approx(value, abs=1e-12)
    assert found.drop == pytest.approx(base - value, abs=1e-12)
    assert found.se == pytest.approx(se, abs=1e-12)


def test_delong_agrees_with_the_bootstrap():
    y, a, b, _ = pair(np.random.default_rng(1), 1500, drop=0.01)
    before, after = p.weighted_auc(y, a), p.weighted_auc(y, b)
    drops = p.bootstrap(lambda w: before(w) - after(w), range(len(y)), rounds=1500, seed=1)
    found = p.delong(y, a, b)
    assert drops.std() == pytest.approx(found.se, rel=0.08)
    assert np.quantile(drops, 0.95) == pytest.approx(found.upper, abs=0.15 * found.se)


def test_clustered_delong_agrees_with_the_bootstrap_over_users():
    y, a, b, who = pair(np.random.default_rng(2), 2000, users=150, between=0.4)
    before, after = p.weighted_auc(y, a), p.weighted_auc(y, b)
    drops = p.bootstrap(lambda w: before(w) - after(w), who, rounds=1500, seed=1)
    by_user, by_row = p.delong(y, a, b, who), p.delong(y, a, b)
    assert drops.std() == pytest.approx(by_user.se, rel=0.1)
    assert by_user.se > 1.3 * by_row.se
    assert (by_user.baseline, by_user.value, by_user.drop) == (by_row.baseline, by_row.value, by_row.drop)
    assert by_user.method == "DeLong clustered by 150 users" and by_row.method == "DeLong over 2,000 rows"


def test_a_user_a_row_is_no_clustering():
    y, a, b, _ = pair(np.random.default_rng(3), 800)
    assert p.delong(y, a, b, np.arange(800)).se == pytest.approx(p.delong(y, a, b).se, rel=0.005)


def test_weighted_auc_is_the_auc_of_repeated_rows():
    rng = np.random.default_rng(4)
    y, scores = rng.integers(0, 2, 60), rng.integers(0, 9, 60)  # many ties
    weights = rng.integers(0, 4, (5, 60))
    found = p.weighted_auc(y, scores)(weights.astype(float))
    want = [roc_auc_score(np.repeat(y, w), np.repeat(scores, w)) for w in weights]
    assert found == pytest.approx(want, abs=1e-12)


def test_a_bootstrap_draws_whole_users_and_repeats_itself():
    users = np.repeat([5, 9, 11], [1, 2, 3])
    seen = p.bootstrap(lambda w: w @ np.array([1, 10, 0, 100, 0, 0]), users, rounds=50, seed=3)
    whole = p.bootstrap(lambda w: w @ np.array([1, 0, 10, 0, 0, 100]), users, rounds=50, seed=3)
    assert (seen == whole).all() and {int(v) for v in seen} > {111}
    assert not (seen == p.bootstrap(lambda w: w @ np.array([1, 10, 0, 100, 0, 0]), users, rounds=50, seed=4)).all()


def test_draws_without_both_classes_are_left_out():
    statistic = p.weighted_auc([0, 1, 1, 1], [0.1, 0.4, 0.3, 0.2])
    assert 0 < len(p.bootstrap(statistic, range(4), rounds=200)) < 200


def test_other_metrics_are_those_of_sklearn():
    y, a, b, who = pair(np.random.default_rng(5), 900, users=60)
    chance = norm.cdf  # any map to (0, 1) will do for accuracy; log loss needs the logistic one
    found = p.prove("log_loss", y, a, b, margin=0.1, users=who)
    logistic = 1 / (1 + np.exp(-np.array([a, b])))
    assert (found.baseline, found.value) == pytest.approx((log_loss(y, logistic[0]), log_loss(y, logistic[1])))
    assert found.drop == pytest.approx(found.value - found.baseline)  # towards worse
    right = p.prove("accuracy", y, a, b, margin=0.1)
    assert right.baseline == pytest.approx(((chance(a) > 0.5) == y).mean())
    entropy = p.prove("normalized_entropy", y, a, b, margin=0.1, users=who)
    rate = -(y.mean() * np.log(y.mean()) + (1 - y.mean()) * np.log(1 - y.mean()))
    assert entropy.value == pytest.approx(found.value / rate)
    assert entropy.drop_low_95 < entropy.drop < entropy.drop_upper_95
    assert entropy == p.prove("normalized_entropy", y, a, b, margin=0.1, users=who)


def test_accuracy_over_classes_takes_the_largest():
    scores = np.array([[0, 1, 2], [3, 1, 0], [0, 5, 1.0]])
    assert p.prove("accuracy", [2, 0, 0], scores, scores, margin=0.5).value == pytest.approx(2 / 3)


def test_log_loss_over_classes_is_that_of_sklearn():
    rng = np.random.default_rng(7)
    y, a, b = rng.integers(0, 3, 400), rng.normal(size=(400, 3)), rng.normal(size=(400, 3))
    found = p.prove("log_loss", y, a, b, margin=0.1)
    said = [np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (a, b)]
    assert (found.baseline, found.value) == pytest.approx((log_loss(y, said[0]), log_loss(y, said[1])))


def test_values_per_user():
    rng = np.random.default_rng(6)
    before = rng.random(400)
    found = p.judge("ndcg@10", p.means(before, before - 0.01 + 0.02 * rng.normal(size=400)), margin=0.02)
    assert found.verdict == "proven" and found.rows == 400 and found.method == "paired t over 400 rows"
    assert found.drop_low_95 < 0.01 < found.drop_upper_95


# -- the verdict ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [300, 1000])
def test_a_drop_at_the_margin_is_rarely_proven(rows):
    assert share_proven(400, rows, 0.01, drop=0.01) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("users, uneven", [(40, False), (100, True)])
def test_users_whose_rows_err_together_do_not_prove_a_false_claim(users, uneven):
    how = {"drop": 0.01, "users": users, "between": 0.3, "uneven": uneven}
    assert share_proven(400, 1000, 0.01, by_user=True, **how) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert share_proven(400, 1000, 0.01, by_user=False, **how) > 0.12  # what counting rows as independent would claim


def test_a_mean_per_user_at_the_margin_is_rarely_proven():
    rng, proven = np.random.default_rng(8), 0
    for _ in range(500):
        before = rng.beta(1, 3, 80)
        lost = 0.02 + 0.1 * rng.standard_t(5, 80)
        proven += p.judge("ndcg@10", p.means(before, before - lost), 0.02).verdict == "proven"
    assert proven / 500 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 500)


def test_enough_rows_prove_an_equal_model_and_convict_a_worse_one():
    assert share_proven(100, 3000, 0.01, drop=0.0) > 0.9
    y, a, b, _ = pair(np.random.default_rng(9), 5000, drop=0.03)
    assert p.prove("auc", y, a, b, margin=0.01).verdict == "worse"


def test_too_few_rows_cannot_tell_and_the_rows_it_asks_for_decide():
    rng = np.random.default_rng(11)
    y, a, b, _ = pair(rng, 2000, agree=0.9)
    found = p.prove("auc", y, a, b, margin=0.005)
    assert found.verdict == "cannot tell" and found.rows_needed > 2000
    times = math.ceil(found.rows_needed / 2000)
    assert p.prove("auc", np.tile(y, times), np.tile(a, times), np.tile(b, times), margin=0.005).verdict == "proven"


def test_no_number_of_rows_is_promised_for_a_drop_beyond_the_margin():
    y, a, b, _ = pair(np.random.default_rng(12), 300, drop=0.012)
    found = p.prove("auc", y, a, b, margin=p.delong(y, a, b).drop * 0.9)
    assert (found.verdict, found.rows_needed) == ("cannot tell", 0)
    assert "would not prove it" in p.explain(found)


def test_identical_rankings_are_no_proof_from_a_handful_of_rows():
    y, a, _, who = pair(np.random.default_rng(13), 20_000, users=50)
    few = p.prove("auc", y[:40], a[:40], 2 * a[:40], margin=0.001)
    many = p.prove("auc", y, a, 2 * a, margin=0.001, users=who)
    assert few.drop == many.drop == 0
    assert few.verdict == "cannot tell" and few.drop_upper_95 == pytest.approx(
        1 - 0.05 ** (1 / min(y[:40].sum(), 40 - y[:40].sum()))
    )
    assert many.verdict == "proven"


def test_a_few_rows_that_dominate_widen_the_bound():
    lost = np.zeros(1000)
    lost[:2] = 1.0
    spread = p.means(np.ones(1000), 1 - lost)
    assert (spread.upper - spread.drop) / spread.se > 2  # t with about 4 degrees of freedom, not the normal's 1.645


def test_a_metric_where_less_is_better_drops_when_it_rises():
    y, a, _, _ = pair(np.random.default_rng(14), 4000)
    for metric in ("log_loss", "normalized_entropy"):
        assert p.prove(metric, y, a, 5 * a, margin=0.05).verdict == "worse"
        assert p.prove(metric, y, 5 * a, a, margin=0.05).drop_upper_95 < 0


# -- the sentence --------------------------------------------------------------------------------------------------------

TOLD = Quality("auc", 20_000, 0.7912, 0.7908, 0.0004, -0.0005, 0.00131, 0.001, "cannot tell", "DeLong over 20,000 rows", 40_301)


def test_the_sentence_says_what_was_not_proven_what_was_and_what_would():
    assert p.explain(TOLD) == "not proven at .0010; proven at .0014 (95 %), from 20,000 rows; about 41,000 rows would decide it"


@pytest.mark.parametrize("upper", [0.00100001, 0.00104, 0.001 + 1e-12, 0.00149])
def test_a_no_is_never_rounded_into_a_yes(upper):
    bound = p.explain(dataclasses.replace(TOLD, drop_upper_95=upper)).split("proven at ")[2].split()[0]
    assert float(bound) >= upper and bound != ".0010"


@pytest.mark.parametrize(
    "upper, margin, told", [(0.00071, 0.001, ".0008"), (0.00103, 0.00105, ".00103"), (0.001, 0.001, ".0010")]
)
def test_a_yes_keeps_its_bound_inside_the_margin(upper, margin, told):
    proven = dataclasses.replace(TOLD, drop_upper_95=upper, margin=margin, verdict="proven")
    assert f"at most {told} (95 %)" in p.explain(proven)


def test_better_and_worse_are_rounded_down():
    better = dataclasses.replace(TOLD, drop_upper_95=-0.00039, verdict="proven")
    worse = dataclasses.replace(TOLD, drop_low_95=0.00104, verdict="worse")
    assert "better by at least .0003 (95 %)" in p.explain(better)
    assert "drops by at least .00104 (95 %), beyond the margin of .0010" in p.explain(worse)


@given(value=st.floats(-1, 1), digits=st.integers(1, 8))
def test_rounding_goes_where_it_is_told(value, digits):
    assert float(p.rounded(value, digits, up=True)) >= value >= float(p.rounded(value, digits, up=False))
    assert p.rounded(0.0014, up=True) == p.rounded(0.0014, up=False) == ".0014"
    assert (p.rounded(-0.00001), p.rounded(1.5), p.rounded(-0.25, 2)) == (".0000", "1.5000", "-.25")


# -- the sequence --------------------------------------------------------------------------------------------------------


def test_the_sequence_stops_at_the_first_that_is_not_proven():
    asked = []

    def test(name):
        asked.append(name)
        return dataclasses.replace(TOLD, verdict={"a": "proven", "b": "proven", "c": "cannot tell", "d": "proven"}[name])

    last, made = p.fixed_sequence("abcd", test)
    assert last == "b" and asked == ["a", "b", "c"] and [name for name, _ in made] == asked
    assert p.fixed_sequence("cd", test)[0] is None and p.fixed_sequence("", test) == (None, [])


def test_the_sequence_keeps_the_error_of_one_test():
    """Five candidates all exactly at the margin, tested on the same rows: any false claim counts."""
    rng, wrong = np.random.default_rng(15), 0
    for _ in range(400):
        y, a, _, _ = pair(rng, 300)
        candidates = [norm.ppf(0.78) * math.sqrt(2) * y + (a - norm.ppf(0.79) * math.sqrt(2) * y) * 0.9 for _ in range(5)]
        candidates = [c + math.sqrt(1 - 0.81) * rng.normal(size=300) for c in candidates]
        wrong += p.fixed_sequence(candidates, lambda c, y=y, a=a: p.prove("auc", y, a, c, margin=0.01))[0] is not None
    assert wrong / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


# -- bad input -----------------------------------------------------------------------------------------------------------

Y, S, R = [0, 1, 0, 1], [0.1, 0.9, 0.2, 0.3], [0.2, 0.8, 0.1, 0.4]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((Y, S, R[:3]), "3 candidate scores"),
        ((Y[:2], S, R), "2 labels, 4 baseline scores"),
        (([], [], []), "at least 2 rows, got 0"),
        (([1, 1, 1, 1], S, R), "all 4 labels are 1; a ranking needs both classes"),
        (([0, 1, 2, 1], S, R), "labels must be 0 or 1; found 0, 1, 2"),
        (([0, 1, math.nan, 1], S, R), "1 of 4 labels are NaN or infinite, the first in row 2"),
        ((Y, [0.5] * 4, R), "all 4 baseline scores are 0.5; a constant"),
        ((Y, S, [0.5] * 4), "all 4 candidate scores are 0.5"),
        ((Y, S, [0.1, math.inf, math.nan, 1]), "2 of 4 candidate scores are NaN or infinite, the first in row 1"),
        ((Y, np.ones((4, 2)), np.ones((4, 2))), r"both must be \[rows\]"),
    ],
)
def test_what_cannot_be_compared_is_named(arguments, message):
    with pytest.raises(DataError, match=message):
        p.prove("auc", *arguments, margin=0.01)


def test_users_must_be_several_and_as_many_as_rows():
    with pytest.raises(DataError, match="2 users"):
        p.prove("auc", Y, S, R, margin=0.01, users=[1, 2])
    with pytest.raises(DataError, match="one user holds all rows of a class"):
        p.prove("auc", Y, S, R, margin=0.01, users=[7, 7, 7, 7])


@pytest.mark.parametrize("margin", [-0.001, math.nan, math.inf])
def test_an_impossible_margin(margin):
    with pytest.raises(ConfigError, match="margin of auc"):
        p.prove("auc", Y, S, R, margin=margin)


def test_an_unknown_metric_names_the_known_ones():
    with pytest.raises(ConfigError, match="'auk'; known: auc, accuracy"):
        p.prove("auk", Y, S, R, margin=0.01)
