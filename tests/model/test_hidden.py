"""Hidden layers trained as one step: the numbers, gradients and running figures of the layers one by one."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from pennyweight.model.hidden import Hidden, Joined
from pennyweight.model.layers import MLP, Dropout
from pennyweight.model.mixed import Halved
from pennyweight.model.train import fit
from tests.model.test_train import RECIPE, dnn, rows, same


def made(norm: bool = True, dropout: float = 0.25, outputs: int = 1, kind: torch.dtype = torch.float64) -> MLP:
    torch.manual_seed(0)
    module = MLP(20, (64, 48), outputs, dropout, norm).to(kind).train()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def stepped(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output of a step, and every gradient."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    out = module(x)
    out.square().sum().backward()
    return out.detach(), {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("outputs", [0, 1])
def test_the_step_is_that_of_the_layers_one_by_one(norm: bool, dropout: float, outputs: int) -> None:
    one = made(norm, dropout, outputs)
    two = copy.deepcopy(one)
    lent = Joined(two)
    assert lent.lent == [two]
    x = torch.randn(40, 20, dtype=torch.float64)
    for _ in range(3):
        (out, wanted), (joined, found) = stepped(one, x), stepped(two, x)
        assert torch.allclose(out, joined, rtol=1e-10, atol=1e-12)
        for name, gradient in wanted.items():
            if found[name] is None:  # a bias that a norm takes away: its gradient is rounding alone
                assert norm and name.endswith("bias") and gradient is not None and gradient.abs().max() < 1e-9
            else:
                assert torch.allclose(gradient, found[name], rtol=1e-9, atol=1e-10), name
    for a, b in zip(one.buffers(), two.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    lent.release()
    assert torch.equal(two.eval()(x), two(x)) and "forward" not in two.__dict__


def test_bf16_is_as_close_to_fp32_as_the_products_alone_in_it() -> None:
    one = made(kind=torch.float32)
    two, three = copy.deepcopy(one), copy.deepcopy(one)
    lent, halved = Joined(two, torch.bfloat16), Halved(three)
    x = torch.randn(512, 20)
    (out, wanted), (joined, found), (rounded, known) = (stepped(m, x) for m in (one, two, three))
    lent.release()
    halved.release()
    assert joined.dtype == torch.float32 and not torch.equal(out, joined)
    assert (out - joined).norm() < 0.02 * out.norm() and (out - joined).norm() < 2 * (out - rounded).norm()
    for name, gradient in found.items():
        if gradient is not None:
            assert gradient.dtype == torch.float32
            assert (gradient - wanted[name]).norm() < 1.5 * (known[name] - wanted[name]).norm() + 1e-3 * wanted[name].norm(), (
                name
            )


def test_only_in_training_on_rows_and_only_layers_that_are_what_they_seem() -> None:
    module = made()
    lent = Joined(module)
    x = torch.randn(8, 20, dtype=torch.float64)
    assert _names(module(x)) and not _names(module.eval()(x))
    lent.release()
    assert not _names(module.train()(x))

    hooked = made()
    hooked[0].register_forward_hook(lambda *_: None)
    hooked[2].inplace = False
    assert [type(p) for p in Joined(hooked).lent] == [MLP], "the second layer still is one"
    other = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU())
    assert Joined(other).lent == []


def _names(out: Tensor) -> bool:
    """Whether a joined step is among what made a tensor."""
    seen, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [n for n, _ in node.next_functions]
    return any(type(n).__name__ == f"{Hidden.__name__}Backward" for n in seen)


def test_frozen_weights_get_no_gradient() -> None:
    one = made()
    one[0].requires_grad_(False)
    one[1].weight.requires_grad_(False)
    two = copy.deepcopy(one)
    lent = Joined(two)
    x = torch.randn(16, 20, dtype=torch.float64)
    (_, wanted), (_, found) = stepped(one, x), stepped(two, x)
    lent.release()
    assert [n for n, g in found.items() if g is None and wanted[n] is not None] == ["4.bias"]
    assert torch.allclose(wanted["x"], found["x"]) and torch.allclose(wanted["1.bias"], found["1.bias"])


def test_rows_of_a_table_and_their_gradient_are_those_of_an_embedding() -> None:
    torch.manual_seed(0)
    one = nn.Embedding(50, 6, padding_idx=0).double()
    two = copy.deepcopy(one)
    lent = Joined(two)
    for shape in ((40,), (8, 5), (0,)):
        ids = torch.randint(0, 50, shape)
        by = torch.randn(*shape, 6, dtype=torch.float64)
        for table in (one, two):
            table.weight.grad = None
            (table(ids) * by).sum().backward()
        assert torch.equal(one(ids), two(ids)) and torch.allclose(one.weight.grad, two.weight.grad, rtol=1e-12)
        assert not two.weight.grad[0].any()
    lent.release()
    assert lent.lent == [two] and "forward" not in two.__dict__
    assert Joined(nn.Embedding(5, 2, sparse=True)).lent == [] and Joined(nn.Embedding(5, 2, max_norm=1.0)).lent == []


def test_all_may_be_dropped() -> None:
    assert not Dropout(1.0).train()(torch.ones(4, 4)).any()


def test_a_training_repeats_itself_and_follows_the_layers_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1)
    one, two, three = dnn(), dnn(), dnn()
    first = fit(one, rows(), rows(1), recipe)
    fit(two, rows(), rows(1), recipe)
    monkeypatch.setattr("pennyweight.model.train.Joined", lambda *_: None)
    last = fit(three, rows(), rows(1), recipe)
    assert same(one, two) and not same(one, three)
    assert abs(first.metric - last.metric) < 1e-3
