"""Rows by their use: who is hot, what becomes of the cold, and that nothing is dropped that answers need."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pennyweight.accelerate.compile import export, plain
from pennyweight.compress import usage
from pennyweight.compress.bands import DropFields, DropRows, SplitRows
from pennyweight.compress.distill import Distill
from pennyweight.compress.observe import divergence
from pennyweight.compress.quantize import QuantizeTables
from pennyweight.compress.share import ShareRows, lookups
from pennyweight.core.errors import ConfigError, PlanError
from pennyweight.model.bands import Bands
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.hashed import Hashed
from pennyweight.model.metrics import auc
from pennyweight.model.ranking import DeepFM
from pennyweight.model.spec import Model, call, seeded, spec_of
from pennyweight.model.tables import rows_of
from pennyweight.model.transform import Env, plan

SPLIT = SplitRows((0.1, 0.3), min_rows=100)
DROP = DropRows(0.25, min_rows=100)


def outputs(bundle: Bundle, env: Env) -> Tensor:
    with torch.inference_mode():
        return call(bundle.model.build(env.allow), next(env.valid.batches(2000)), bundle.model.spec.inputs)


def changed(given: Bundle, name: str, weight: Tensor) -> Bundle:
    return given.replace(model=Model(given.model.spec, {**given.model.state, name: weight}))


@pytest.fixture(autouse=True)
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's module again, with operators that no gradient passes, and a table that its forward does not reach."""
    shop = sys.modules["shop"]

    class Deaf(shop.Shop):
        def forward(self, user: Tensor, item: Tensor, tags: Tensor) -> Tensor:
            u, i = self.user(user).detach(), self.item(item).detach()
            x = torch.cat([u, i, self.tags(tags), self.mix(u, i)], 1)
            return self.out(self.net(x))

    monkeypatch.setattr(shop, "Deaf", Deaf, raising=False)


# -- use ---------------------------------------------------------------------------------------------------------------


def test_lookups_are_those_of_all_rows_where_a_table_reads_a_column(
    given: Bundle, env: Env, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample would have seen an eighth of them."""
    for module in ("share", "usage"):
        monkeypatch.setattr(f"pennyweight.compress.{module}.BATCH", 500)
        monkeypatch.setattr(f"pennyweight.compress.{module}.BATCHES", 2)
    fresh = changed(given, "user.weight", given.model.state["user.weight"]).model
    assert lookups(fresh, env, ["item"])["item"].sum() == 1000
    counts = usage.counted(fresh, env, ["item", "tags", "bias"], env.train)
    for path, column in (("item", "item"), ("bias", "item"), ("tags", "tags")):
        want = np.bincount(env.train.column(column).ravel(), minlength=len(counts[path]))
        assert torch.equal(counts[path], torch.from_numpy(want).float())


def test_use_is_lookups_times_how_hard_the_answers_pull(given: Bundle, env: Env) -> None:
    """Rows of a table that the model multiplies by little are used little; lookups decide where gradients are alike."""
    state = {**given.model.state, "out.weight": given.model.state["out.weight"] * 1e-3}
    model = Model(given.model.spec, state)
    counts = lookups(model, env, ["user", "item", "bias"])
    used = usage.importance(model, env, counts)
    assert used["user"].sum() + used["item"].sum() < 0.1 * used["bias"].sum()
    flat = used["bias"] / counts["bias"].clamp(min=1)
    assert (used["bias"] > 0).equal(counts["bias"] > 0) and flat[counts["bias"] > 50].std() < 0.2 * flat.max()
    few = (counts["bias"] > 0) & (counts["bias"] < 5)
    assert used["bias"][few].max() < used["bias"][counts["bias"] > 100].min()


def test_gradients_need_no_labels_and_where_there_are_none_lookups_decide(given: Bundle, env: Env) -> None:
    counts = lookups(given.model, env, ["user", "tags"])
    used = usage.importance(given.model, env, counts)
    assert not torch.allclose(used["user"], counts["user"])
    blind = Model(given.model.spec, {**given.model.state, "out.weight": torch.zeros_like(given.model.state["out.weight"])})
    assert torch.equal(usage.importance(blind, env, {"user": counts["user"]})["user"], counts["user"])
    deaf = Model(dataclasses.replace(given.model.spec, factory="shop:Deaf"), given.model.state)
    assert all(torch.equal(use, counts[path]) for path, use in usage.importance(deaf, env, counts).items()), "tags do have one"
    again = usage.importance(given.model, env, counts)
    assert all(torch.equal(again[p], used[p]) for p in used)


@pytest.mark.parametrize("loss", ["bce", "cross-entropy", "mse", "bpr"])
def test_divergence_is_zero_for_what_did_not_move_and_is_the_known_one(loss: str) -> None:
    g = torch.Generator().manual_seed(0)
    before = torch.randn((500, 4) if loss == "cross-entropy" else (500,), generator=g)
    after = before + 0.1 * torch.randn(before.shape, generator=g)
    assert divergence(before, before, loss) == pytest.approx(0, abs=1e-7)
    if loss == "cross-entropy":
        want = F.kl_div(after.log_softmax(1), before.softmax(1), reduction="batchmean")
    elif loss == "bce":
        b, a = (torch.stack([x.sigmoid(), (-x).sigmoid()], 1) for x in (before, after))
        want = F.kl_div(a.log(), b, reduction="batchmean")
    else:
        want = F.mse_loss(after, before)
    assert divergence(before, after, loss) == pytest.approx(float(want), rel=1e-3)


# -- bands -------------------------------------------------------------------------------------------------------------


def test_splitting_changes_no_answer_and_orders_rows_by_use(given: Bundle, env: Env, tmp_path: Path) -> None:
    split = SPLIT.apply(given, env)
    assert torch.equal(outputs(split, env), outputs(given, env))
    layers = split.model.spec.layers
    assert set(layers) == {"user", "item", "bias"} and all(isinstance(la, Bands) for la in layers.values())
    numbers = {"user": 16, "item": 16, "bias": 1}
    tops = [sum(numbers[p] * la.sizes[k] for p, la in layers.items()) for k in range(3)]
    whole = 16 * 1200 + 900
    assert tops[0] == pytest.approx(0.1 * whole, abs=16) and tops[1] == pytest.approx(0.3 * whole, abs=32)
    model = split.model.build(env.allow)
    counts = lookups(given.model, env, layers)
    used = usage.importance(given.model, env, counts)
    places = {p: model.get_submodule(p).ready() for p in layers}
    least, most = [], []
    for k in range(3):
        inside = {p: (places[p] >= sum(la.sizes[:k])) & (places[p] < sum(la.sizes[: k + 1])) for p, la in layers.items()}
        use = torch.cat([used[p][m] / numbers[p] for p, m in inside.items() if p != "item"])
        least.append(use.min())
        most.append(use.max())
    assert least[0] >= most[1] and least[1] >= most[2], "one order for all tables"
    assert model.item.padding_idx == 0 and not model.item(torch.tensor([0])).any()
    assert split.model.bytes == given.model.bytes + sum(-(-la.rows // 4) for la in layers.values())
    back = load(save(split, tmp_path / "b"))
    assert torch.equal(outputs(back, env), outputs(split, env)) and back.model.spec == split.model.spec


def test_each_band_becomes_something_of_its_own(given: Bundle, env: Env) -> None:
    """The hottest third of rows in 4 bits, the others in 2, is much nearer than all in 2 and smaller than all in 4."""
    tables = ("item", "user")
    bands = plan(
        SplitRows((0.33,), min_rows=100, only=tables),
        QuantizeTables("int4", only=("*.band0",)),
        QuantizeTables("int2", only=("*.band1",)),
    ).apply(given, env)
    kinds = {(type(la).__name__, getattr(la, "data_type", "")) for la in bands.model.spec.layers.values()}
    assert kinds == {("Bands", ""), ("Table", "int4"), ("Table", "int2")}
    two, four = (QuantizeTables(t, only=tables).apply(given, env) for t in ("int2", "int4"))  # type: ignore[arg-type]
    assert two.model.bytes < bands.model.bytes < four.model.bytes
    far = [(outputs(b, env) - outputs(given, env)).square().mean() for b in (bands, two)]
    assert far[0] < 0.4 * far[1]
    shared = plan(SPLIT, ShareRows(parts=4, codes=16, only=("item.*",))).apply(given, env)
    assert shared.model.spec.layers["item.band2"].layout == "codebook"
    assert shared.bytes < given.bytes


def test_cold_rows_become_the_mean_of_their_lookups(given: Bundle, env: Env, tmp_path: Path) -> None:
    dropped = DROP.apply(given, env)
    layers = dropped.model.spec.layers
    assert layers["item"].sizes[0] + layers["item"].sizes[1] == 900 and layers["item.band1"] == Hashed(
        rows=layers["item"].sizes[1], dim=16, size=1
    )
    counts = lookups(given.model, env, ["item"])["item"]
    model, before = dropped.model.build(env.allow), rows_of(given.model.build(env.allow).item)
    after = model.item.weight
    gone = model.item.ready() >= layers["item"].sizes[0]
    assert gone[0] and not after[0].any(), "the padding row is no cold row, and stays zero"
    assert torch.equal(after[~gone], before[~gone])
    cold = gone.clone()
    cold[0] = False
    mean = (before[cold] * counts[cold].unsqueeze(1)).sum(0) / counts[cold].sum()
    torch.testing.assert_close(after[cold], mean.expand(int(cold.sum()), -1))
    assert counts[cold].max() < counts[~gone].max()
    held = {n: t.nbytes for n, t in dropped.model.state.items() if n.startswith(("item.", "user.", "bias."))}
    assert sum(held.values()) < 0.3 * 4 * (16 * 1200 + 900)
    back = load(save(dropped, tmp_path / "b"))
    assert torch.equal(outputs(back, env), outputs(dropped, env))


def test_use_drops_rows_that_cost_less_than_chance_does(given: Bundle, env: Env) -> None:
    def moved(bundle: Bundle, by: Env) -> Tensor:
        return (outputs(DROP.apply(bundle, by), env) - outputs(given, env)).square().mean()

    rows = np.random.default_rng(0).integers(2, 300, len(env.train))
    columns = {**{c.name: env.train.column(c.name) for c in env.train.schema.columns}, "user": rows, "item": rows * 3 % 900}
    shuffled = dataclasses.replace(env, train=type(env.train).from_arrays(columns, env.train.schema))
    fresh = given.replace(model=Model(given.model.spec, given.model.state))
    assert moved(given, env) < 0.5 * moved(fresh, shuffled)


def test_rows_are_dropped_by_their_use(given: Bundle, env: Env) -> None:
    kept = DropRows(1.0, least=4.0, min_rows=100, only=("user",)).apply(given, env)
    used = usage.importance(given.model, env, lookups(given.model, env, ["user"]))["user"]
    assert kept.model.spec.layers["user"].sizes == (int((used >= 4).sum()), int((used < 4).sum()))
    both = DropRows(0.1, least=4.0, min_rows=100, only=("user",)).apply(given, env)
    assert both.model.spec.layers["user"].sizes == (30, 270)
    nothing = DropRows(1.0, least=1e9, min_rows=100, only=("user",)).apply(given, env)
    assert nothing.model.spec.layers == {"user": Hashed(rows=300, dim=16, size=1)}


def test_dropped_rows_recover_by_training(given: Bundle, env: Env) -> None:
    dropped = DROP.apply(given, env)
    taught = Distill(epochs=2, lr=0.003).apply(dropped, env)
    for name in ("item.band0.weight", "item.band1.shared.weight"):
        assert not torch.equal(taught.model.state[name], dropped.model.state[name])
    assert torch.equal(taught.model.state["item.codes"], dropped.model.state["item.codes"])
    labels = env.valid.column("label")
    right = [auc(labels, outputs(b, env).numpy()) for b in (taught, dropped)]
    assert right[0] > right[1] and not taught.model.build(env.allow).item(torch.tensor([0])).any()


def test_bands_leave_for_other_runtimes(given: Bundle, env: Env) -> None:
    small = plan(SPLIT, QuantizeTables("int4", only=("item.*", "user.*")), DropFields(None, only=("bias.band2",))).apply(
        given, env
    )
    batch, inputs = next(env.valid.batches(50)), small.model.spec.inputs
    module = small.model.build(env.allow)
    with torch.inference_mode():
        want = call(module, batch, inputs)
        assert torch.allclose(call(plain(module), batch, inputs), want, atol=1e-5)
        assert torch.allclose(export(module, batch, inputs).scorer(1)(batch).squeeze(-1), want, atol=1e-4)


@pytest.mark.parametrize("transform", [SPLIT, DROP], ids=["split", "drop"])
def test_the_same_seed_and_data_give_the_same_rows(transform: SplitRows | DropRows, given: Bundle, env: Env) -> None:
    one = transform.apply(given, env)
    two = transform.apply(given.replace(model=Model(given.model.spec, given.model.state)), env)
    assert one.model.spec == two.model.spec
    assert all(torch.equal(one.model.state[n], t) for n, t in two.model.state.items())
    assert transform.sketch() is transform, "so a sketch has the same bytes"


# -- fields ------------------------------------------------------------------------------------------------------------


def test_a_field_nobody_needs_becomes_its_mean(given: Bundle, env: Env) -> None:
    """Tags whose rows are all alike tell nothing; the others do."""
    useless = changed(given, "tags.weight", (torch.arange(40) > 0).float().unsqueeze(1).expand(40, 8) * 0.3)
    dropped = DropFields().apply(useless, env)
    assert dropped.model.spec.layers == {"tags": Hashed(rows=40, dim=8, padding=0, bag="mean", size=1)}
    torch.testing.assert_close(outputs(dropped, env), outputs(useless, env), atol=1e-5, rtol=1e-4)
    assert dropped.model.bytes == useless.model.bytes - 39 * 8 * 4
    with pytest.raises(PlanError, match=r"every table is needed: without bias, .* diverge by 0\.\d+, and 1e-05 is allowed"):
        DropFields().apply(given, env)


def test_more_may_be_dropped_as_more_is_allowed_and_the_bound_is_kept(given: Bundle, env: Env) -> None:
    rows = env.calib
    batch = next(rows.batches(len(rows)))

    def lost(bundle: Bundle) -> float:
        with torch.inference_mode():
            before, after = (call(b.model.build(env.allow), batch, b.model.spec.inputs) for b in (given, bundle))
        return divergence(before, after, "bce")

    gone = []
    for most in (0.003, 0.03, 1.0):
        dropped = DropFields(most).apply(given, env)
        assert 0 < lost(dropped) <= most
        gone.append(len(dropped.model.spec.layers))
    assert gone == sorted(gone) and gone[-1] == 4 > gone[0]


def test_a_named_band_or_field_is_dropped_whatever_it_costs(given: Bundle, env: Env) -> None:
    split = SPLIT.apply(given, env)
    dropped = DropFields(None, only=("item.band2", "tags")).apply(split, env)
    layers = dropped.model.spec.layers
    assert isinstance(layers["item.band2"], Hashed) and isinstance(layers["tags"], Hashed) and dropped.bytes < split.bytes
    quantized = QuantizeTables("int4").apply(given, env)
    assert DropFields(None, only=("item",)).apply(quantized, env).bytes < quantized.bytes
    with pytest.raises(
        PlanError, match=r"no table has rows of its own to drop; tables: item\.band2\.shared \(full fp32, 1 x 16\)"
    ):
        DropFields(None, only=("item.band2.*",)).apply(dropped, env)


def test_a_band_that_nothing_looks_up_costs_nothing(given: Bundle, env: Env) -> None:
    """Of a table that is looked up: ids that rows of data never hold."""
    split = SplitRows((0.8,), min_rows=100, only=("item",)).apply(given, env)
    assert not lookups(split.model, env, ["item.band1"])["item.band1"][1:].any()
    for drop in (DropFields(1e-9, only=("item.*",)), DropFields(None, only=("item.band1",))):
        assert list(drop.apply(split, env).model.spec.layers) == ["item", "item.band1"]


def test_classes_are_judged_as_classes() -> None:
    """A softmax that only shifts says the same."""
    before = torch.randn(10, 3)
    assert divergence(before, before + 5, "cross-entropy") == pytest.approx(0, abs=1e-6)
    assert divergence(before, before + 5, "mse") == pytest.approx(25, rel=1e-3)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [SPLIT, DROP], ids=["split", "drop"])
def test_what_cannot_be_ranked_is_said(transform: SplitRows | DropRows, given: Bundle, env: Env) -> None:
    with pytest.raises(
        PlanError, match=r"no full fp32 table of its own has 1000 rows or more; tables: user \(full fp32, 300 x 16\)"
    ):
        dataclasses.replace(transform, min_rows=1000).apply(given, env)
    for before in (QuantizeTables("int4"), ShareRows(parts=1, codes=16)):
        with pytest.raises(PlanError, match="no full fp32 table of its own has 100 rows"):
            dataclasses.replace(transform, only=("item",)).apply(before.apply(given, env), env)
    with pytest.raises(PlanError, match=r"no full fp32 table of its own.*user\.band0 \(full fp32"):
        transform.apply(transform.apply(given, env), env)
    with pytest.raises(PlanError, match=f"{type(transform).__name__} looks at lookups and needs env.train"):
        transform.apply(given, Env(allow=env.allow))
    with pytest.raises(PlanError, match="no layer matches 'nobody'"):
        dataclasses.replace(transform, only=("nobody",)).apply(given, env)
    broken = given.model.state["user.weight"].clone()
    broken[5, 5] = float("nan")
    with pytest.raises(PlanError, match="layer user holds 1 NaN or infinite weights of 4800"):
        dataclasses.replace(transform, only=("user",)).apply(changed(given, "user.weight", broken), env)


def test_a_table_of_one_row_and_a_model_without_tables(given: Bundle, env: Env) -> None:
    constant = DropFields(None, only=("user", "item", "bias", "tags")).apply(given, env)
    for transform in (SPLIT, DROP, dataclasses.replace(DROP, min_rows=0), DropFields(None, only=("tags.*",))):
        with pytest.raises(PlanError, match=r"tables: .*\(full fp32, 1 x 8\)"):
            transform.apply(constant, env)
    schema = env.train.schema
    numbers = type(schema)(
        (
            *(dataclasses.replace(c, role="context", kind="numeric", size=0, length=0) for c in schema.columns[:1]),
            schema.columns[-1],
        )
    )
    spec = spec_of(DeepFM, columns=numbers.columns, dim=4, hidden=(8,))
    bare = Bundle(Model.of(seeded(spec, 0), spec))
    for transform in (SPLIT, DROP, DropFields()):
        with pytest.raises(PlanError, match="tables: none"):
            transform.apply(bare, env)


def test_tables_that_the_forward_does_not_reach_are_left_alone(given: Bundle, env: Env) -> None:
    """Nothing tells which of their rows are cold, and answers that do not read them do not change without them."""
    deaf = Bundle(Model(dataclasses.replace(given.model.spec, factory="shop:Deaf"), given.model.state))
    for transform in (SPLIT, DROP, DropFields(1.0)):
        assert "bias" not in transform.apply(deaf, env).model.spec.layers
        with pytest.raises(PlanError, match="the model's forward looks nothing up in bias, so nothing tells how"):
            dataclasses.replace(transform, only=("bias",)).apply(deaf, env)


def test_nothing_to_gain_is_said(given: Bundle, env: Env) -> None:
    with pytest.raises(
        PlanError, match=r"no table would get smaller by dropping rows \(the most used 1 of table rows kept, none"
    ):
        DropRows(1.0, least=1e-9, only=("tags",), min_rows=2).apply(given, env)
    with pytest.raises(PlanError, match=r"every table of 2 rows or more is in one band as a whole: tags"):
        SplitRows((0.001,), only=("tags",), min_rows=2).apply(given, env)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplitRows(()), "shares are"),
        (lambda: SplitRows((0.1, 0.0)), "above 0 and together below 1"),
        (lambda: SplitRows((0.5, 0.5)), "together below 1"),
        (lambda: SplitRows((0.1,) * 4), "those of 1 to 3 bands"),
        (lambda: DropRows(0.0), "keep is above 0"),
        (lambda: DropRows(1.0), "keep 1 with least 0 drops nothing"),
        (lambda: DropRows(0.5, least=-1.0), "least not negative"),
        (lambda: DropFields(0.0), "most is above 0"),
        (lambda: DropFields(None), "or else only says which"),
    ],
)
def test_impossible_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
