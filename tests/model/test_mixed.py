"""Dense layers multiplied in bfloat16 while they train: close to fp32, as good, and given back as they were."""

import dataclasses

import torch
from torch import nn

from pennyweight.model.mixed import Halved, Product
from pennyweight.model.ranking import DCNv2
from pennyweight.model.train import Recipe, fit
from tests.model.test_train import COLUMNS, RECIPE, dnn, rows, same


def test_products_and_their_gradients_are_close_to_fp32() -> None:
    torch.manual_seed(0)
    for shape in ((64, 48), (4, 16, 48)):
        given = [torch.randn(shape), torch.randn(32, 48) / 7, torch.randn(32)]
        one, two = ([t.clone().requires_grad_() for t in given] for _ in range(2))
        exact, rounded = nn.functional.linear(*one), Product.apply(*two)
        by = torch.randn(exact.shape)
        exact.backward(by)
        rounded.backward(by)
        assert rounded.dtype == torch.float32 and rounded.shape == exact.shape
        assert (rounded - exact).norm() / exact.norm() < 0.01 and not torch.equal(rounded, exact)
        for a, b in zip(one, two, strict=True):
            assert (a.grad - b.grad).norm() / a.grad.norm() < 0.01
        assert torch.allclose(one[2].grad, two[2].grad, atol=1e-4), "sums stay fp32"


def test_only_wide_layers_only_in_training_and_only_until_released() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).train()
    x = torch.randn(8, 64)
    expected = net(x)
    lent = Halved(net)
    assert lent.layers == [net[0]] and not torch.equal(net(x), expected)
    assert torch.equal(net.eval()(x), expected)
    lent.release()
    assert torch.equal(net.train()(x), expected) and "forward" not in net[0].__dict__


def test_a_training_in_bf16_is_as_good_and_repeats_itself() -> None:
    made = []
    for precision in ("fp32", "bf16", "bf16"):
        torch.manual_seed(0)
        module = DCNv2(COLUMNS, dim=16, hidden=(64, 64), dropout=0.2)
        done = fit(module, rows(), rows(1), dataclasses.replace(RECIPE, precision=precision, epochs=3))
        made.append((module, done.metric))
    assert same(made[1][0], made[2][0]) and not same(made[0][0], made[1][0])
    assert abs(made[0][1] - made[1][1]) < 0.02
    assert all(p.dtype == torch.float32 for p in made[1][0].parameters())


def test_small_nets_are_left_in_fp32() -> None:
    one, two = dnn(), dnn()
    fit(one, rows(), rows(1), Recipe(epochs=1, batch=256))
    fit(two, rows(), rows(1), Recipe(epochs=1, batch=256, precision="bf16"))
    assert same(one, two)
