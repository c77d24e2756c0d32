"""What can only be cut together: found in networks of every shape, and cutting it leaves what zeroing it would.

The test of a group is arithmetic: with outputs cut that were zero all along, a network must say what it said before.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.compress import couple
from pennyweight.compress.couple import Group, Member, groups, runs, strided
from pennyweight.compress.prune import _cut
from pennyweight.model.dense import Dense

IMAGES, WORDS, ROWS, TIMES = (2, 3, 8, 8), (2, 12), (4, 10), (2, 6, 10)


class Net(nn.Module):
    """Layers by name, and a forward as it is given."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(i: int, o: int, k: int = 3, **kw: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **kw)


def lin(i: int, o: int) -> nn.Linear:
    return nn.Linear(i, o)


def given(shape: tuple[int, ...]) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 50, shape, generator=g) if shape == WORDS else torch.randn(shape, generator=g)


def made(build: Callable[[], Net]) -> Net:
    torch.manual_seed(0)
    net = build().eval()
    for name, tensor in net.named_buffers():
        if "running" in name:
            tensor.uniform_(0.5, 1.5)
    return net.requires_grad_(False)


def members(found: tuple[Member, ...]) -> str:
    return " ".join(m.path for m in found)


def text() -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.words(x).transpose(1, 2)
        return m.out(torch.cat([F.max_pool1d(m.a(h).relu(), 10).squeeze(2), m.b(h).relu().amax(2), m.c(h).mean(-1)], 1))

    kernels = {name: nn.Conv1d(8, 6, k) for name, k in (("a", 3), ("b", 4), ("c", 5))}
    return Net(forward, words=nn.Embedding(50, 8), **kernels, out=lin(18, 2))


def residual() -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        x = torch.relu(m.norm(m.stem(x)))
        x = x + m.up(torch.relu(m.inner(m.down(x))))
        x = F.avg_pool2d(m.deep(x), 2)
        return m.out(m.head(x.view(x.size(0), -1)).relu())

    norms = {"norm": nn.BatchNorm2d(8), "inner": nn.BatchNorm2d(5)}
    convs = {"stem": conv(3, 8), "down": conv(8, 5), "up": conv(5, 8, 1), "deep": conv(8, 8, groups=8)}
    return Net(forward, **norms, **convs, head=lin(8 * 16, 7), out=lin(7, 3))


def stack() -> Net:
    layers = [conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    rest = [nn.Flatten(), lin(32, 9), nn.GELU(), nn.Dropout(), lin(9, 3)]
    return Net(lambda m, x: m.net(x), net=nn.Sequential(*layers, *rest))


def times() -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = F.gelu(m.each(x))
        h = m.mix(h.permute(0, 2, 1)).transpose(1, 2)
        return m.out(torch.flatten(h, 1)) + m.side(h.mean(dim=1)) * m.gate(x.mean(1)).sigmoid()

    return Net(forward, each=lin(10, 7), mix=nn.Conv1d(7, 5, 3, padding=1), out=lin(30, 4), side=lin(5, 4), gate=lin(10, 1))


def masked() -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        real = (x != 0).unsqueeze(-1).float()
        h = m.each(m.words(x)) * real
        return m.out((h.sum(1) / real.sum(1).clamp(min=1)).masked_fill(x[:, :1] > 99, 0.0))

    return Net(forward, words=nn.Embedding(50, 8), each=lin(8, 6), out=lin(6, 1))


NETS = {
    "text": (text, WORDS, ["a (6)  -> out", "b (6)  -> out", "c (6)  -> out"]),
    "residual": (residual, IMAGES, ["stem up (8) norm deep -> down head", "down (5) inner -> up", "head (7)  -> out"]),
    "stack": (stack, IMAGES, ["net.0 (6) net.1 -> net.4", "net.4 (8)  -> net.8", "net.8 (9)  -> net.11"]),
    "times": (times, TIMES, ["each (7)  -> mix", "mix (5)  -> out side"]),
    "masked": (masked, WORDS, ["each (6)  -> out"]),
}


@pytest.mark.parametrize("name", NETS)
def test_groups_of_every_shape_are_found(name: str) -> None:
    build, shape, want = NETS[name]
    found = groups(made(build), [given(shape)])
    assert found is not None
    assert [f"{members(g.writers)} ({g.width}) {members(g.between)} -> {members(g.readers)}" for g in found] == want


def silence(net: nn.Module, group: Group, slots: list[int]) -> None:
    """Make outputs of a group zero wherever they are read, by the weights of who reads."""
    for member in group.readers:
        weight = net.get_submodule(member.path).weight
        weight[:, [k for k, slot in enumerate(member.slots) if slot in slots]] = 0


@pytest.mark.parametrize("name", NETS)
def test_cutting_what_nobody_reads_changes_nothing(name: str) -> None:
    build, shape, _ = NETS[name]
    net, x = made(build), given(shape)
    found = groups(net, [x]) or []
    for group in found:
        silence(net, group, [0, 3])
    want = net(x)
    while found:
        group, *found = found
        kept = _cut(net, group, group.width - 2, {})
        assert not {0, 3} & set(kept.tolist())
        found = [g.without(group, kept) for g in found]
        for member in group.writers:
            assert Dense.of(layer := net.get_submodule(member.path)) is None or layer.out_features == group.width - 2
    torch.testing.assert_close(net(x), want, atol=1e-5, rtol=1e-4)


def hidden(between: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> Callable[[], Net]:
    """Two dense layers with something in between."""
    return lambda: Net(lambda m, x: m.b(between(m, m.a(x))), a=lin(10, 8), b=lin(8, 3), **layers)


def lens() -> Net:
    shared = lin(8, 8)
    return Net(lambda m, x: m.b(m.d(m.c(m.a(x)).relu())), a=lin(10, 8), b=lin(8, 3), c=shared, d=shared)


PINNED = {
    "softmax": (hidden(lambda m, h: h.softmax(1)), ROWS),
    "layer norm": (hidden(lambda m, h: m.norm(h), norm=nn.LayerNorm(8)), ROWS),
    "mean over them": (hidden(lambda m, h: h - h.mean(1, keepdim=True)), ROWS),
    "a slice": (hidden(lambda m, h: torch.cat([h[:, 4:], h[:, :4]], 1)), ROWS),
    "written sizes": (hidden(lambda m, h: h.view(-1, 8)), ROWS),
    "two heads": (hidden(lambda m, h: h.reshape(h.size(0), 2, -1).transpose(1, 2).flatten(1)), ROWS),
    "a parameter": (hidden(lambda m, h: h * m.scale.weight[0], scale=nn.Embedding(1, 8)), ROWS),
    "a gate of inputs": (hidden(lambda m, h: h * torch.sigmoid(h.sum(1, keepdim=True))), ROWS),
    "one slope a neuron": (hidden(lambda m, h: m.slopes(h), slopes=nn.PReLU(8)), ROWS),
    "sorted": (hidden(lambda m, h: h.sort(1).values), ROWS),
    "chosen by": (hidden(lambda m, h: h[:, h.argmax(1)]), (8, 10)),
    "the output": (lambda: Net(lambda m, x: m.b(h := m.a(x)).sum(1, keepdim=True) + h, a=lin(10, 8), b=lin(8, 3)), ROWS),
    "called twice": (lambda: Net(lambda m, x: m.b(m.c(m.c(m.a(x)).relu())), a=lin(10, 8), b=lin(8, 3), c=lin(8, 8)), ROWS),
    "two names": (lens, ROWS),
    "grouped": (lambda: Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 8), b=conv(8, 8, groups=2), c=conv(8, 1)), IMAGES),
    "pooled over": (hidden(lambda m, h: F.max_pool1d(h, 3, 1, 1)), TIMES),
    "quantized": (hidden(lambda m, h: m.c(h), c=Dense(8, 8, data_type="int8").build()), ROWS),
}


@pytest.mark.parametrize("name", PINNED)
def test_what_is_not_understood_is_left_alone(name: str) -> None:
    build, shape = PINNED[name]
    found = groups(made(build), [given(shape)])
    assert found is not None
    assert "a" not in {m.path for g in found for m in g.writers}


def test_a_sum_with_what_cannot_go_keeps_both() -> None:
    net = made(lambda: Net(lambda m, x: m.b(m.a(x) + x), a=lin(10, 10), b=lin(10, 3)))
    assert groups(net, [given(ROWS)]) == []
    net = made(lambda: Net(lambda m, x: m.b(m.a(x) + m.c(x)[:, :1]), a=lin(10, 6), b=lin(6, 3), c=lin(10, 4)))
    found = groups(net, [given(ROWS)])
    assert found is not None and [members(g.writers) for g in found] == ["a"], "what is added to all of them alike ties nothing"


def test_what_decides_by_its_numbers_is_not_traced() -> None:
    net = made(lambda: Net(lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.b(m.a(-x)), a=lin(10, 8), b=lin(8, 3)))
    assert groups(net, [given(ROWS)]) is None and runs(net) is None and strided(net)


def test_a_trace_that_says_something_else_is_not_believed() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(m.a(x)) * (2 if type(x) is Tensor else 1)

    assert groups(made(lambda: Net(forward, a=lin(10, 8), b=lin(8, 3))), [given(ROWS)]) is None


def test_runs_end_where_somebody_else_reads() -> None:
    found = runs(made(residual))
    assert found is not None
    assert [[path for path, _ in run] for run in found] == [
        *(["stem", "norm"], ["down", "inner"], ["up"], ["deep"], ["head"], ["out"]),
    ]
    twice = made(lambda: Net(lambda m, x: m.b(m.a(x)) + m.c(x).sum(), a=lin(10, 8), b=lin(8, 3), c=lin(10, 8)))
    assert [[path for path, _ in run] for run in runs(twice) or []] == [["a", "b"], ["c"]]


def test_what_asks_how_tensors_lie_is_found() -> None:
    assert strided(made(residual))
    assert not strided(made(stack)) and not strided(made(text))
    first = made(lambda: Net(lambda m, x: m.b(m.a(x.view(-1, 3, 8, 8)).flatten(1)), a=conv(3, 2), b=lin(128, 3)))
    assert not strided(first), "a view of what comes in is no matter"
    behind = made(lambda: Net(lambda m, x: m.b(m.a(x).flatten(1)).view(-1), a=conv(3, 2), b=lin(128, 3)))
    assert not strided(behind), "nor is one behind a dense layer"


def test_a_layer_that_reads_two_groups_shrinks_for_each() -> None:
    slots = Member("out", (0, 1, -1, -1))
    one = Group((Member("a", (0, 1)),), (), (slots,), 2)
    two = Group((Member("b", (0, 1)),), (), (Member("out", (-1, -1, 0, 1)),), 2)
    assert two.without(one, torch.tensor([1])).readers == (Member("out", (-1, 0, 1)),)
    assert couple.Member("x", (1, -1, 0)).left(torch.tensor([0])).tolist() == [1, 2]
