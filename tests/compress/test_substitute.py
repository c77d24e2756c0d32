"""Substitutes: the budget is met, small tables stay, hot ids are those of the data, clusters are found."""

import dataclasses
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from pennyweight.compress.quantize import QuantizeTables
from pennyweight.compress.share import lookups
from pennyweight.compress.substitute import Method, SubstituteTables, recluster
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.core.measure import peak_memory
from pennyweight.data.schema import Column
from pennyweight.data.synthetic import Clicks
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.hashed import Clustered, HotRows, Narrow, SharedTable, shared
from pennyweight.model.ranking import DNN
from pennyweight.model.spec import Model, call, spec_of, untrained
from pennyweight.model.train import Recipe, fit
from pennyweight.model.transform import Env

SIZES = (20_000, 4_000, 900, 50)
REACHED = {"quotient": 40, "quotient-add": 40, "clustered": 15, "narrow": 4, "mixed": 4}
"""A ratio each method can reach on these tables; the rest reach 100."""


@pytest.fixture(scope="module")
def clicks() -> Bundle:
    """An untrained model of four tables of dim 16."""
    spec = spec_of(DNN, columns=Clicks(SIZES).catalog.schema.columns, dim=16, hidden=[8])
    return Bundle(untrained(spec, 0))


@pytest.fixture(scope="module")
def rows() -> Env:
    train, valid, _ = Clicks(SIZES).dataset(6000).split("order")
    return Env(train=train, valid=valid, seed=3)


def table_bytes(model: Model) -> int:
    return sum(t.numel() * t.element_size() for name, t in model.state.items() if ".tables." in name)


def tables(bundle: Bundle) -> dict[str, SharedTable]:
    return {path.rpartition(".")[2]: t for path, t in shared(bundle.model.build()).items()}


@pytest.mark.parametrize("method", get_args(Method))
def test_a_budget_is_met_from_just_below(method: Method, clicks: Bundle, rows: Env) -> None:
    ratio = REACHED.get(method, 100)
    after = SubstituteTables(method, ratio).apply(clicks, rows)
    budget = table_bytes(clicks.model) // ratio
    got = table_bytes(after.model)
    coarse = {"narrow": 0.75, "tensor-train": 0.8, "mixed": 0.8}  # whole widths and ranks
    assert coarse.get(method, 0.99) * budget <= got <= budget
    for table in tables(after).values():
        assert table.layer.bytes() == sum(t.numel() * t.element_size() for t in table.state_dict().values())


@pytest.mark.parametrize("ratio", [2, 10])
def test_small_tables_stay_and_the_largest_give_most(ratio: int, clicks: Bundle, rows: Env) -> None:
    found = tables(SubstituteTables("hash", ratio).apply(clicks, rows))
    assert "c3" not in found and "user" in found
    assert ("item" in found) == (ratio == 10)
    sizes = [t.layer.bytes() for name, t in found.items() if name != "user"]
    assert all(size <= found["user"].layer.bytes() for size in sizes)


def test_the_budget_is_over_the_tables_chosen(clicks: Bundle, rows: Env) -> None:
    after = SubstituteTables("hash", 20, only=("*.user",)).apply(clicks, rows)
    assert set(tables(after)) == {"user"}
    assert table_bytes(clicks.model) - table_bytes(after.model) == 4 * 16 * 20_002 - 4 * 16 * 20_002 // 20 // 64 * 64
    assert set(tables(SubstituteTables("hash", 20, skip=("*.user", "*.c2")).apply(clicks, rows))) == {"item"}


def test_widths_are_alike_or_by_rows(clicks: Bundle, rows: Env) -> None:
    def widths(method: Method) -> list[int]:
        found = tables(SubstituteTables(method, 4).apply(clicks, rows))
        return [t.layer.width for t in found.values() if isinstance(t.layer, Narrow)]

    assert widths("narrow") == [3, 3, 3]
    user, item, *_ = widths("mixed")
    assert user < item


def test_hot_ids_are_those_that_the_data_looks_up(clicks: Bundle, rows: Env) -> None:
    after = SubstituteTables("hot", 10).apply(clicks, rows)
    table = tables(after)["user"]
    assert isinstance(table.layer, HotRows)
    assert rows.train
    counts = torch.bincount(torch.from_numpy(rows.train.column("user")).long(), minlength=20_002)
    owners: Tensor = table.owners  # type: ignore[assignment]
    owned = counts[owners[owners >= 0].long()]
    assert owned.min() > 0 and owned.sum() > 0.6 * len(rows.train), "most lookups are of few ids"
    with pytest.raises(PlanError, match=r"needs env\.train"):
        SubstituteTables("hot", 10).apply(clicks, Env())


def test_it_starts_from_the_deviation_in_place_and_of_the_seed(given: Bundle, env: Env) -> None:
    change = SubstituteTables("hash", 3, only=("user", "item"))
    one, two, other = (change.apply(given, dataclasses.replace(env, seed=s)).model.state for s in (3, 3, 4))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["item.shared.weight"], other["item.shared.weight"])
    assert 0.8 < float(one["item.shared.weight"].std()) / float(given.model.state["item.weight"].std()) < 1.2
    assert one["net.0.weight"] is given.model.state["net.0.weight"]


def test_any_module_is_trained_saved_and_quantized(given: Bundle, env: Env, tmp_path) -> None:
    """A bag, padding, a table called by keyword: drop-in for whatever is there."""
    after = SubstituteTables("hot", 2, min_rows=10, only=("tags",)).apply(given, env)
    after = SubstituteTables("hot", 3, only=("user", "item")).apply(after, env)
    assert {"user", "item", "tags"} == set(shared(after.model.build(env.allow)))
    assert env.train and env.valid
    module = after.model.build(env.allow, copy=True)
    fitted = fit(module, env.train, env.valid, Recipe(batch=512, epochs=4, lr=0.01), inputs=after.model.spec.inputs)
    assert fitted.metric > 0.6
    trained = after.replace(model=Model.of(module, after.model.spec))
    small = QuantizeTables("fp16", only=("*.hot", "*.cold")).apply(trained, env)
    assert small.model.bytes < trained.model.bytes
    back = load(save(small, tmp_path / "b"))
    batch = next(env.train.batches(500))
    with torch.inference_mode():
        want, close, same = (call(b.model.build(env.allow), batch, small.model.spec.inputs) for b in (trained, small, back))
    torch.testing.assert_close(close, want, atol=1e-2, rtol=0)
    assert torch.equal(close, same)


def test_shared_tables_are_not_shared_again(clicks: Bundle, rows: Env) -> None:
    after = SubstituteTables("hash", 10).apply(clicks, rows)
    with pytest.raises(PlanError, match=r"no full table has 1000 rows or more; tables: .*c3 \(52 x 16\)"):
        SubstituteTables("hash", 10, min_rows=1000).apply(after, rows)


@pytest.mark.parametrize(("method", "ratio"), [("narrow", 30), ("quotient", 400), ("hash", 5000), ("clustered", 80)])
def test_a_budget_that_no_setting_reaches_is_refused(method: Method, ratio: int, clicks: Bundle, rows: Env) -> None:
    with pytest.raises(PlanError, match=rf"{method} cannot make the tables {ratio}x smaller: .* ask for at most") as told:
        SubstituteTables(method, ratio).apply(clicks, rows)
    most = float(str(told.value).partition("at most ")[2].partition("x")[0])
    assert SubstituteTables(method, most).apply(clicks, rows), "what the message says can be had, can be had"


def test_broken_and_impossible_input_is_refused(given: Bundle, env: Env) -> None:
    state = {n: t.clone() for n, t in given.model.state.items()}
    state["user.weight"][5, 5] = float("nan")
    broken = given.replace(model=Model(given.model.spec, state))
    with pytest.raises(PlanError, match="layer user holds 1 NaN or infinite weights"):
        SubstituteTables("hash", 3).apply(broken, env)
    with pytest.raises(PlanError, match="no layer matches 'users'"):
        SubstituteTables("hash", 3, only=("users",)).apply(given, env)
    with pytest.raises(ConfigError, match="method is 'magic'; it must be one of hash, hot"):
        SubstituteTables("magic", 3)  # type: ignore[arg-type]
    for ratio in (1.0, 0.5, float("nan")):
        with pytest.raises(ConfigError, match="a ratio above 1"):
            SubstituteTables("hash", ratio)


def clustered(rows: int = 3000) -> tuple[nn.Module, SharedTable]:
    """A clustered table whose rows are twelve planted kinds, each with a little of its own."""
    layer = Clustered(rows=rows, dim=8, size=200, codes=16, chunks=4, padding=0)
    table = layer.build()
    table.load_state_dict(layer.start(0.1, 0))
    return nn.ModuleDict({"item": table}), table


def test_clusters_are_those_of_the_rows() -> None:
    """Rows that were trained to a few kinds keep them: each kind has its clusters, and what is left is small."""
    module, table = clustered()
    kinds = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    of = torch.arange(3000) % 12
    with torch.no_grad():  # rows of planted kinds: a centre for each, and nothing hashed
        table.near.weight.view(4, 16, 8 // 4)[:, :12] = kinds.view(12, 4, 2).transpose(0, 1)
        table.rest.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(2))
        table.codes.copy_(of.unsqueeze(1).expand(-1, 4))
    before, salts = table.weight.detach(), table.salts.clone()
    recluster(module, 1)
    after = table.weight.detach()
    assert not after[0].any() and not torch.equal(table.salts, salts)
    assert (after - before)[1:].square().mean() < 1e-3 * before.square().mean()
    for k in range(4):
        pairs = torch.stack([of[1:], table.codes[1:, k].long()], 1)
        assert len(torch.unique(pairs, dim=0)) < 12 * 2, "a kind is in one cluster, or split once"
    again = nn.ModuleDict({"item": clustered()[1]})
    again.load_state_dict(module.state_dict())
    recluster(module, 2)
    recluster(again, 2)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True))


def test_clustering_keeps_the_rows_better_than_chance_and_frequent_ones_best() -> None:
    _, table = clustered()
    before = table.weight.detach()
    counts = torch.ones(3000)
    counts[1:200] = 10_000.0

    def lost(counts: Tensor | None) -> Tensor:
        copy, other = clustered()
        other.load_state_dict(table.state_dict())
        recluster(copy, 1, None if counts is None else {"item": counts})
        return (other.weight.detach() - before).square().mean(1)

    even, uneven = lost(None), lost(counts)
    assert even[1:].mean() < before.square().mean()
    assert uneven[1:200].mean() < even[1:200].mean()


def test_a_module_without_clusters_is_left_alone(given: Bundle, env: Env) -> None:
    module = given.model.build(env.allow, copy=True)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    recluster(module, 1)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_training_with_clusters_found_between_epochs(clicks: Bundle, rows: Env) -> None:
    after = SubstituteTables("clustered", 8).apply(clicks, rows)
    module = after.model.build(copy=True)
    paths = [p for p, t in shared(module).items() if isinstance(t.layer, Clustered)]
    counts = lookups(after.model, rows, paths)
    assert rows.train and rows.valid
    recipe = Recipe(batch=256, epochs=1, lr=0.01)
    first = fit(module, rows.train, rows.valid, recipe)
    recluster(module, 1, counts, iterations=3)
    second = fit(module, rows.train, rows.valid, recipe, seed=1)
    assert first.metric > 0.6 and second.metric > first.metric - 0.02


def substituted(sizes: tuple[int, ...]) -> None:
    """What a child process does to a model that it could not hold."""
    columns = [Column(f"c{k}", "context", "categorical", n) for k, n in enumerate(sizes)]
    bundle = Bundle(untrained(spec_of(DNN, columns=columns, dim=64, hidden=[8]), 0))
    SubstituteTables("hash", 1000).apply(bundle, Env()).model.build(copy=True)


def test_the_full_tables_are_never_in_memory() -> None:
    sizes = (3_000_000, 1_000_000)
    used = peak_memory(substituted, sizes)
    whole = 4 * 64 * sum(sizes)
    assert used.peak - used.before < 0.4 * whole
