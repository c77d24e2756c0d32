"""Shared rows: the clustering itself, what weights do, and the tables that come of it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pennyweight.compress.distill import Distill
from pennyweight.compress.quantize import QuantizeTables
from pennyweight.compress.share import CodeTables, ShareRows, kmeans, lookups, nearest, quantize
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.spec import Model, call
from pennyweight.model.tables import Table, rows_of
from pennyweight.model.transform import Env, plan


def points(parts: int = 2, n: int = 500, width: int = 3) -> Tensor:
    """Points around 8 planted centres, well apart."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(parts, 8, width, generator=g) * 10
    which = torch.randint(0, 8, (n,), generator=g)
    return centres[:, which] + 0.01 * torch.randn(parts, n, width, generator=g)


def clustered(x: Tensor, codes: int, weights: Tensor | None = None, *, zero: bool = False, iterations: int = 25) -> Tensor:
    weights = torch.ones(x.shape[1]) if weights is None else weights
    return kmeans(x, weights, codes, iterations, torch.Generator().manual_seed(1), zero=zero)


def loss(x: Tensor, centres: Tensor, weights: Tensor | float = 1.0) -> float:
    picked = centres.gather(1, nearest(x, centres).unsqueeze(2).expand_as(x))
    return float(((x - picked).square().sum((0, 2)) * weights).sum())


def test_planted_clusters_are_found() -> None:
    x = points()
    assert loss(x, clustered(x, 8)) < 2 * 500 * 3 * 0.01**2 * 1.5


def test_nearest_is_nearest() -> None:
    x, centres = torch.randn(2, 9000, 3), torch.randn(2, 16, 3)
    assert torch.equal(nearest(x, centres), torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(2))


def test_it_is_about_as_good_as_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x = torch.randn(1, 3000, 4, generator=torch.Generator().manual_seed(0))
    w = torch.rand(3000, generator=torch.Generator().manual_seed(1)) + 0.1
    theirs = cluster.KMeans(32, n_init=1, random_state=0, max_iter=25).fit(x[0].numpy(), sample_weight=w.numpy())
    assert loss(x, clustered(x, 32, w), w) < 1.05 * theirs.inertia_


def test_rows_that_weigh_more_lose_less() -> None:
    x = torch.randn(1, 2000, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(2000)
    weights[:100] = 50
    even, uneven = clustered(x, 32), clustered(x, 32, weights)
    assert loss(x[:, :100], uneven) < 0.5 * loss(x[:, :100], even)
    assert loss(x, uneven) > loss(x, even)


def test_zero_is_held_and_fewer_points_than_centres_are_kept_exactly() -> None:
    x = points(n=5)
    centres = clustered(x, 16, zero=True)
    assert not centres[:, 0].any() and centres.isfinite().all()
    assert loss(x, centres) < 1e-9


def test_a_table_keeps_its_padding_row_at_zero_and_odd_widths_work() -> None:
    rows = torch.randn(600, 10, generator=torch.Generator().manual_seed(0))
    rows[4] = 0
    table = Table(600, 10, "codebook", parts=4, codes=64, padding=4)
    codes, books = quantize(rows, table, torch.ones(600), 10, 0)
    module = table.build()
    module.load_state_dict(table.encode_codebook(codes, books), assign=True)
    got = rows_of(module.requires_grad_(False))
    assert got.shape == rows.shape and not got[4].any()
    assert (got - rows).square().mean() < 0.3 * rows.square().mean()


def test_large_tables_are_fitted_on_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    table = Table(3000, 8, "codebook", parts=2, codes=32)
    weights = torch.ones(3000)
    weights[:300] = 100

    def error(rows: Tensor) -> tuple[float, float]:
        codes, books = quantize(rows, table, weights, 10, 0)
        got = torch.cat([books[p][codes[:, p].long()] for p in range(2)], 1)
        return float((got - rows)[:300].square().mean()), float((got - rows).square().mean())

    whole = error(rows)
    monkeypatch.setattr("pennyweight.compress.share.SAMPLE", 800)
    sampled = error(rows)
    assert sampled[0] < 1.5 * whole[0] and sampled[0] < sampled[1]


def scores(bundle: Bundle, env: Env) -> Tensor:
    with torch.inference_mode():
        return call(bundle.model.build(env.allow), next(env.calib.batches(1000)), bundle.model.spec.inputs)


def test_a_model_shares_its_tables_and_keeps_its_scores(given: Bundle, env: Env, tmp_path) -> None:
    bundle = ShareRows(parts=4, codes=128).apply(given, env)
    layers = bundle.model.spec.layers
    # 300 users are over twice the codes, 40 tags are not; one number a row has one part.
    assert {p: (la.layout, la.parts, la.data_type) for p, la in layers.items()} == {
        "user": ("codebook", 4, "fp32"),
        "item": ("codebook", 4, "fp32"),
        "bias": ("codebook", 1, "fp32"),
    }
    want, got = scores(given, env), scores(bundle, env)
    assert 0 < (got - want).abs().mean() < 0.2 * want.std()
    assert bundle.model.bytes < given.model.bytes
    back = load(save(bundle, tmp_path / "b"))
    assert back.model.spec == bundle.model.spec
    torch.testing.assert_close(scores(back, env), got, atol=1e-6, rtol=1e-5)


def test_lookups_are_counted_where_the_data_looks(given: Bundle, env: Env) -> None:
    counts = lookups(given.model, env, ["item", "tags", "bias"])
    for path in ("item", "bias"):
        want = torch.bincount(torch.from_numpy(env.train.column("item")).long(), minlength=900)
        assert torch.equal(counts[path], want.float())
    assert counts["tags"].sum() == 3 * len(env.train)
    assert not lookups(given.model, Env(allow=env.allow), ["item"])["item"].any()


def test_counts_help_the_rows_that_are_looked_up(given: Bundle, env: Env) -> None:
    share = ShareRows(parts=4, codes=64, only=("item",))
    before = rows_of(given.model.build(env.allow).item)
    counts = lookups(given.model, env, ["item"])["item"]

    def error(used: Env) -> float:
        after = rows_of(share.apply(given, used).model.build(env.allow).item)
        return float(((after - before).square().sum(1) * counts).sum())

    assert error(env) < 0.9 * error(Env(allow=env.allow, seed=env.seed))


def test_the_same_seed_gives_the_same_codes(given: Bundle, env: Env) -> None:
    share = ShareRows(parts=2, codes=32)
    one, two, other = (share.apply(given, dataclasses.replace(env, seed=s)).model.state for s in (3, 3, 4))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["item.codes"], other["item.codes"])
    alone = ShareRows(parts=2, codes=32, only=("item",)).apply(given, env).model.state
    assert torch.equal(one["item.codes"], alone["item.codes"])


@pytest.mark.parametrize(("before", "after"), [("fp16", "fp16"), ("int8", "int8"), ("int4", "int4"), ("int2", "int4")])
def test_a_quantized_table_keeps_its_data_type(before: str, after: str, given: Bundle, env: Env) -> None:
    quantized = QuantizeTables(before, only=("item",)).apply(given, env)
    shared = ShareRows(parts=2, codes=64, only=("item",)).apply(quantized, env)
    assert shared.model.spec.layers["item"] == Table(900, 16, "codebook", after, 2, 64, padding=0)
    assert scores(shared, env).isfinite().all()


def test_what_would_not_get_smaller_is_refused(given: Bundle, env: Env) -> None:
    shared = ShareRows(parts=2, codes=16).apply(given, env)
    with pytest.raises(PlanError, match=r"no table would get smaller.*item \(codebook, 900 x 16\)"):
        ShareRows(parts=2, codes=16).apply(shared, env)
    with pytest.raises(PlanError, match="256 codes in 4 parts"):
        ShareRows(only=("tags",)).apply(given, env)


def test_broken_rows_are_named(given: Bundle, env: Env) -> None:
    state = {n: t.clone() for n, t in given.model.state.items()}
    state["user.weight"][5, 5] = float("inf")
    with pytest.raises(PlanError, match="layer user holds 1 NaN or infinite weights of 4800"):
        ShareRows(codes=64).apply(given.replace(model=Model(given.model.spec, state)), env)


@pytest.mark.parametrize("fields", [{"parts": 0}, {"codes": 1}, {"codes": 257}, {"iterations": 0}])
def test_impossible_settings_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1 part"):
        ShareRows(**fields)


@pytest.mark.parametrize(("parts", "beside", "worse"), [(16, "int4", 2.5), (8, "int2", 1.1)])
def test_codes_of_four_bits_are_smaller_than_rows_with_a_scale(
    parts: int, beside: str, worse: float, given: Bundle, env: Env, tmp_path: Path
) -> None:
    """A level a number is not much worse than int4, a code for two numbers about as near as int2, in fewer bytes each."""
    shared = ShareRows(parts, codes=16, only=("item",)).apply(given, env)
    rowwise = QuantizeTables(beside, only=("item",)).apply(given, env)  # type: ignore[arg-type]
    layers = [b.model.spec.layers["item"] for b in (shared, rowwise)]
    assert shared.model.state["item.codes"].shape == (900, parts // 2)
    assert layers[0].bytes() == 900 * parts // 2 + 16 * 16 * 4 < 0.8 * layers[1].bytes()
    before = rows_of(given.model.build(env.allow).item)
    counts = lookups(given.model, env, ["item"])["item"]
    lost = [((rows_of(b.model.build(env.allow).item) - before).square().sum(1) * counts).sum() for b in (shared, rowwise)]
    assert lost[0] < worse * lost[1]
    back = load(save(shared, tmp_path / "b"))
    torch.testing.assert_close(scores(back, env), scores(shared, env), atol=1e-6, rtol=1e-5)
    smaller = QuantizeTables("int8", only=("item",)).apply(shared, env)
    assert torch.equal(smaller.model.state["item.codes"], shared.model.state["item.codes"])


def test_code_tables_share_as_a_data_type_does(given: Bundle, env: Env, tmp_path: Path) -> None:
    """After training, like ``QuantizeTables``, and with the codes that ``ShareRows`` finds."""
    coded = plan(CodeTables(bits=4, only=("item",)), Distill(epochs=1)).apply(given, env)
    assert [s["transform"] for s in coded.plan] == ["distill", "code-tables"]
    layer = coded.model.spec.layers["item"]
    assert layer == Table(900, 16, "codebook", "fp16", 16, 16, padding=0)
    assert layer.bytes() == 900 * 8 + 16 * 16 * 2 == sum(coded.model.state[f"item.{n}"].nbytes for n in ("codes", "packed"))
    back = load(save(coded, tmp_path / "b"))
    torch.testing.assert_close(scores(back, env), scores(coded, env), atol=1e-6, rtol=1e-5)
    shared = ShareRows(parts=8, codes=16, only=("item",)).apply(given, env)
    wide = CodeTables(bits=4, width=2, only=("item",)).apply(given, env)
    assert torch.equal(wide.model.state["item.codes"], shared.model.state["item.codes"])


def test_code_tables_weigh_rows_by_their_lookups_or_evenly(given: Bundle, env: Env) -> None:
    before = rows_of(given.model.build(env.allow).item)
    counts = lookups(given.model, env, ["item"])["item"]
    lost = []
    for weigh in ("lookups", "evenly"):
        coded = CodeTables(bits=2, width=2, weigh=weigh, only=("item",)).apply(given, env)  # type: ignore[arg-type]
        far = (rows_of(coded.model.build(env.allow).item) - before).square().sum(1)
        lost.append((float((far * counts).sum()), float(far.sum())))
    assert lost[0][0] < lost[1][0] and lost[0][1] > lost[1][1]


@pytest.mark.parametrize("sketched", [CodeTables(bits=2), CodeTables(bits=8, width=4, data_type="int8"), ShareRows(2, 16)])
def test_a_sketch_has_the_same_bytes(sketched: CodeTables | ShareRows, given: Bundle, env: Env) -> None:
    made, quick = sketched.apply(given, env).model, sketched.sketch().apply(given, env).model
    assert made.spec == quick.spec and made.bytes == quick.bytes


def test_code_tables_leave_what_is_coded_or_small(given: Bundle, env: Env) -> None:
    coded = CodeTables(bits=4).apply(given, env)
    assert set(coded.model.spec.layers) == {"user", "item", "tags", "bias"}
    with pytest.raises(
        PlanError, match=r"no full fp32 table would get smaller by 4-bit codes of 1; tables: user \(codebook fp16"
    ):
        CodeTables(bits=4).apply(coded, env)
    with pytest.raises(PlanError, match=r"by 8-bit codes of 2; tables: tags \(full fp32, 40 x 8\)"):
        CodeTables(bits=8, width=2, only=("tags",)).apply(given, env)
    with pytest.raises(ConfigError, match="bits = 3"):
        CodeTables(bits=3)  # type: ignore[arg-type]
