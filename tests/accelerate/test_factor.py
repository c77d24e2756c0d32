"""What candidates share is computed once, and the scores are the plain forward's, for every model and every layer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pennyweight.accelerate.factor import Shared, factor, repeated
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.compress.share import ShareRows
from pennyweight.core.errors import DeviceError
from pennyweight.data.schema import Column
from pennyweight.model.bundle import Bundle
from pennyweight.model.cascade import Cascade
from pennyweight.model.layers import Beside
from pennyweight.model.ranking import DLRM, DNN, DCNv2, DeepFM
from pennyweight.model.retrieval import MatrixFactorization, TwoTower
from pennyweight.model.sequential import SASRec
from pennyweight.model.spec import Batch, Model, build, call, spec_of
from pennyweight.model.transform import Env, plan

COLUMNS = (
    Column("user", "user", "categorical", 50),
    Column("item", "item", "categorical", 60),
    Column("history", "user", "sequence", 60, 5, shares="item"),
    Column("age", "user", "numeric"),
    Column("genres", "item", "sequence", 20, 3),
    Column("hour", "context", "categorical", 26),
    Column("price", "item", "numeric"),
)
ROLES = {c.name: c.role for c in COLUMNS}
RANKING: dict[str, Callable[[], nn.Module]] = {
    "dnn": lambda: DNN(COLUMNS, 8, (64, 32)),
    "dnn without norms": lambda: DNN(COLUMNS, 8, (64, 32), norm=False),
    "deepfm": lambda: DeepFM(COLUMNS, 8, (64,)),
    "dcn": lambda: DCNv2(COLUMNS, 8, 2, (64,)),
    "dcn stacked of low rank": lambda: DCNv2(COLUMNS, 8, 2, (64,), "stacked", rank=4),
    "dlrm": lambda: DLRM(COLUMNS, 8, (16,), (64,)),
    "dlrm without numbers": lambda: DLRM(tuple(c for c in COLUMNS if c.kind != "numeric"), 8, (), (64,)),
    "factorization": lambda: MatrixFactorization(COLUMNS, 8),
    "two towers": lambda: TwoTower(COLUMNS, 8, (16,), scale=5.0),
    "sums": lambda: TwoTower(COLUMNS, 8),
    "sasrec": lambda: SASRec(COLUMNS, 16, 1),
}


def request(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """One user with ``rows`` candidates."""
    g = torch.Generator().manual_seed(seed)
    batch = {}
    for c in COLUMNS:
        count = rows if c.role == "item" else 1
        shape = (count, c.length) if c.length else (count,)
        drawn = torch.randn(shape, generator=g) if c.kind == "numeric" else torch.randint(0, c.size, shape, generator=g)
        batch[c.name] = drawn if c.role == "item" else drawn.expand(rows, *shape[1:])
    return batch


def lively(module: nn.Module) -> nn.Module:
    """Weights and statistics that show a mistake."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d) and part.running_mean is not None and part.running_var is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.5)
    return module.eval().requires_grad_(False)


def close(made: Shared, module: nn.Module, rows: int, seed: int = 3, **tolerance: float) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(call(made, request(rows, seed)), call(module, request(rows, seed)), **tolerance)


@pytest.mark.parametrize("items", [False, True])
@pytest.mark.parametrize("name", RANKING)
def test_every_model_gives_the_plain_forwards_scores(name: str, items: bool) -> None:
    module = lively(RANKING[name]())
    made = factor(module, request(5), ROLES, "item", items=items)
    for rows in (1, 7, 700):  # the last is more than a block
        close(made, module, rows, rtol=1e-4, atol=1e-5)
    assert made.count.candidate.flops < made.count.plain.flops and made.count.request.flops > 0


@pytest.mark.parametrize("name", RANKING)
def test_kept_items_are_known_by_their_ids(name: str) -> None:
    module = lively(RANKING[name]())
    made = factor(module, request(5), ROLES, "item", items=True)
    ids = torch.arange(2, 60)
    offered = {n: t for n, t in request(len(ids), 9).items() if ROLES[n] == "item"} | {"item": ids}
    with torch.inference_mode():
        held = made.keep(offered, ids, 60)
        chosen = torch.tensor([5, 2, 59, 5])
        asker = {n: t[:1] for n, t in request(1, 4).items() if ROLES[n] != "item"}
        whole = {n: t[chosen - 2] for n, t in offered.items()} | {n: t.expand(4, *t.shape[1:]) for n, t in asker.items()}
        torch.testing.assert_close(made.ranked(made.once(asker), chosen), call(module, whole), rtol=1e-4, atol=1e-5)
    assert held == sum(t.nbytes for t in made.kept) > 0


@pytest.mark.parametrize("name", RANKING)
def test_the_users_part_of_several_requests_is_one_forward(name: str) -> None:
    made = factor(lively(RANKING[name]()), request(5), ROLES, "item", items=True)
    askers = [{n: t[:1] for n, t in request(1, seed).items() if ROLES[n] != "item"} for seed in range(4)]
    with torch.inference_mode():
        assert made.together
        for alone, joined in zip(map(made.once, askers), made.each_once(askers), strict=True):
            torch.testing.assert_close(joined, alone, rtol=1e-5, atol=1e-6)


class Centred(nn.Module):
    """What is over rows: a user's row less the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(50, 4), nn.Embedding(60, 4)

    def forward(self, batch: Batch) -> Tensor:
        user = self.user(batch["user"])
        return ((user - user.mean(0, keepdim=True) + user[:1]) * self.item(batch["item"])).sum(1)


def test_requests_whose_users_meet_in_an_operation_are_computed_apart() -> None:
    module = lively(Centred())
    made = factor(module, request(5), ROLES, "item", items=True)
    askers = [{"user": torch.tensor([user])} for user in (7, 9)]
    ids = torch.arange(2, 60)
    with torch.inference_mode():
        assert not made.together
        made.keep({"item": ids}, ids, 60)
        for asker, once in zip(askers, made.each_once(askers), strict=True):
            whole = {"user": asker["user"].expand(3), "item": torch.tensor([4, 5, 6])}
            torch.testing.assert_close(made.ranked(once, whole["item"]), module(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("factory", "tables", "layers"),
    [(f, "int8", "int8") for f in (DNN, DeepFM, DCNv2, DLRM)]
    + [(DNN, "int4", "int4"), (DNN, "fp16", "bf16"), (DNN, "int8", "int3")],
)
def test_rounded_layers_are_split_with_their_scales(factory: type[nn.Module], tables: str, layers: str) -> None:
    """Wide enough to be multiplied in int8: each part rounds its inputs over its own range, which is no wider."""
    spec = spec_of(factory, columns=COLUMNS, dim=16, hidden=[256, 128])
    given = Bundle(Model.of(lively(build(spec)), spec))
    module = plan(QuantizeTables(tables), QuantizeDense(layers)).apply(given, Env()).model.build()  # type: ignore[arg-type]
    made = factor(module, request(5), ROLES, "item")
    with torch.inference_mode():
        got, want = call(made, request(300, 3)), call(module, request(300, 3))
    assert (got - want).abs().mean() <= 0.05 * want.abs().mean()
    if factory is DNN and layers == "int8":
        assert not torch.equal(got, want), "the tolerance is used"


def test_codebooks_are_looked_up_once_a_request() -> None:
    spec = spec_of(DeepFM, columns=COLUMNS, dim=8, hidden=[32])
    given = Bundle(Model.of(lively(build(spec)), spec))
    module = plan(ShareRows(parts=4, codes=16)).apply(given, Env()).model.build()
    close(factor(module, request(5), ROLES, "item"), module, 40, rtol=1e-4, atol=1e-5)


def test_a_cascade_ranks_so_too() -> None:
    stages = [
        {"factory": f"{f.__module__}:{f.__qualname__}", "args": {"columns": [vars(c) for c in COLUMNS], "dim": 8}}
        for f in (TwoTower, DeepFM)
    ]
    module = lively(Cascade(*stages))
    close(factor(module, request(5), ROLES, "item"), module, 40, rtol=1e-4, atol=1e-5)


def test_the_count_is_of_the_layers() -> None:
    """One user field and one item field of 8 into 4 and 1: by hand."""
    columns = (Column("user", "user", "categorical", 9), Column("item", "item", "categorical", 9))
    module = lively(DNN(columns, 8, (4,), norm=False))
    batch = {"user": torch.ones(3, dtype=torch.int64), "item": torch.arange(3)}
    count = factor(module, batch, {"user": "user", "item": "item"}, "item").count
    first, last = 2 * 16 * 4 + 4, 2 * 4 + 1
    assert count.plain.flops == first + 4 + last, "both layers and a ReLU"
    assert count.request.flops == 2 * 8 * 4 + 4 and count.candidate.flops == 2 * 8 * 4 + 4 + 4 + last
    assert count.saved(1000) == pytest.approx(1000 * count.plain.flops / (1000 * count.candidate.flops + count.request.flops))
    assert "for 500 candidates" in count.describe()


class Odd(nn.Module):
    """Rows that look at one another cannot be computed one by one."""

    def __init__(self, over: bool) -> None:
        super().__init__()
        self.users, self.items, self.over = nn.Embedding(50, 4), nn.Embedding(60, 4), over

    def forward(self, batch: Batch) -> Tensor:
        users = self.users(batch["user"])
        if self.over:
            users = users / (users.sum(0) + 1)
        return (users * self.items(batch["item"])).sum(1)


def test_a_model_whose_rows_see_one_another_is_refused() -> None:
    torch.manual_seed(0)
    plain = Odd(over=False).eval()
    close(factor(plain, request(5), ROLES, "item"), plain, 9)
    with pytest.raises(DeviceError, match=r"changes the scores by up to"):
        factor(Odd(over=True).eval(), request(5), ROLES, "item")


class Popular(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(60, 1)

    def forward(self, batch: Batch) -> Tensor:
        return self.items(batch["item"])


def test_nothing_to_share_says_so() -> None:
    with pytest.raises(DeviceError, match="nothing is to be shared: the model reads no user"):
        factor(Popular().eval(), request(5), ROLES, "item")


def test_a_request_is_told_by_its_strides() -> None:
    made = factor(lively(RANKING["dnn"]()), request(5), ROLES, "item")
    batch = request(4)
    assert repeated(batch, made)
    assert not repeated({n: t.clone() for n, t in batch.items()}, made)
    assert made.user is not None
    names = made.user.given
    whole = [torch.stack([batch[n] for n in g], 1)[:1] if len(g) > 1 else batch[g[0]][:1] for g in names]
    items = tuple(n for n in batch if ROLES[n] == "item")
    together = Beside((*names, *((n,) for n in items)), (*whole, *(batch[n] for n in items)))
    assert repeated(together, made)
