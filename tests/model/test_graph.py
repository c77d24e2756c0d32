"""Live modules as models: the same outputs without their code, compressible by path, and clear refusals."""

import copy
import dataclasses
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.compress.prune import FoldNorms, PruneNeurons
from pennyweight.compress.quantize import QuantizeDense, QuantizeTables
from pennyweight.core.errors import ConfigError, PennyweightError
from pennyweight.data.dataset import Dataset
from pennyweight.data.schema import Column, Schema
from pennyweight.model import codec, graph
from pennyweight.model.bundle import Bundle, load, save
from pennyweight.model.dense import Dense
from pennyweight.model.spec import Model, Spec, build, call, leaves, seeded
from pennyweight.model.tables import Table
from pennyweight.model.train import Recipe, fit
from pennyweight.model.transform import Env

ROWS = 6


class Block(nn.Module):
    """Convolutions with batch norms and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding="same", bias=False) for _ in range(2))
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + x)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), Block(8))
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        b, channels, height, width = image.shape
        x = self.stem(image.reshape(b, channels, height, width))
        return self.head(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class Text(nn.Module):
    """Three convolutions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(200, 16, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(16, 8, k) for k in (2, 3, 4))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids).transpose(1, 2)
        return self.head(torch.cat([F.relu(conv(x)).amax(dim=2) for conv in self.convs], dim=1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 2)

    def forward(self, ids: Tensor) -> Tensor:
        start = torch.zeros(4, ids.shape[0], 12)
        out, (hidden, _) = self.lstm(self.words(ids), (start, start))
        return self.head(out[:, -1] + torch.cat([hidden[-2], hidden[-1]], 1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.places = nn.Parameter(torch.randn(20, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
        self.pool = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder(self.words(ids) + self.places[: ids.size(1)])
        pooled, _ = self.pool(x[:, :1], x, x)
        return self.head(pooled.squeeze(1))


class Mixed(nn.Module):
    """Ids and numbers, a table called twice, a constant that is not saved, a norm, control flow on shapes."""

    mean: Tensor
    scale: Tensor

    def __init__(self, shift: float = 0.5) -> None:
        super().__init__()
        self.shift = shift
        self.table = nn.Embedding(100, 8)
        self.register_buffer("mean", torch.rand(3))
        self.register_buffer("scale", torch.rand(3) + 0.5, persistent=False)
        self.offset = torch.tensor([0.25])
        self.deep = nn.Sequential(nn.Linear(19, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
        self.unused = nn.Linear(3, 3)

    def forward(self, ids: Tensor, numbers: Tensor, extra: Tensor | None = None) -> Tensor:
        if numbers.dim() != 2 or extra is not None:
            raise ValueError("numbers are [B, 3]")
        parts = [self.table(ids[:, 0]), (numbers - self.mean) / self.scale + self.offset + self.shift]
        for at in range(1, ids.shape[1]):
            parts.append(self.table(ids[:, at]))
        best = self.deep(torch.cat(parts, dim=-1)).max(dim=1)
        return best.values.masked_fill(best.values < -10, float("-inf"))


def dense() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU())),
        nn.Linear(128, 10),
    )


def ids(*shape: int, rows: int = 50) -> Tensor:
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "dense": (dense, (torch.rand(ROWS, 8, 8),)),
    "images": (Images, (torch.rand(ROWS, 1, 8, 8),)),
    "text": (Text, (ids(ROWS, 9),)),
    "recurrent": (Recurrent, (ids(ROWS, 5),)),
    "attention": (Attention, (ids(ROWS, 7),)),
    "mixed": (Mixed, (ids(ROWS, 2), torch.rand(ROWS, 3))),
}
every = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A module whose weights and statistics are not those of a new one."""
    torch.manual_seed(0)
    module, example = MODELS[name][0](), MODELS[name][1]
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.rand_like(tensor)
    return module.eval(), example


def flat(example: tuple[Tensor, ...], names: tuple[str, ...]) -> dict[str, Tensor]:
    return {n: t.flatten(1) if t.dim() > 1 else t for n, t in zip(names, example, strict=True)}


def score(model: Model, example: tuple[Tensor, ...]) -> Tensor:
    with torch.inference_mode():
        return call(model.build(), flat(example, model.spec.inputs), model.spec.inputs)


@every
def test_gives_the_outputs_of_the_module_for_any_number_of_rows(name: str) -> None:
    module, example = made(name)
    model = graph.of(module, example)
    for rows in (example, tuple(t[:1] for t in example), tuple(torch.cat([t] * 3) for t in example)):
        with torch.no_grad():
            want = module(*rows)
        torch.testing.assert_close(score(model, rows), want.squeeze(-1) if want.shape[1:] == (1,) else want)


@every
def test_keeps_layers_at_their_paths_and_what_forward_reads(name: str) -> None:
    module, example = made(name)
    rebuilt, own = graph.of(module, example).build(), dict(module.named_modules())
    used = dict(leaves(rebuilt))
    assert used and all(type(child) is type(own[path]) for path, child in used.items())
    state, kept = module.state_dict(), rebuilt.state_dict()
    new = {"mixed": {"scale", "offset"}}.get(name, set())
    left_out = {"mixed": {"unused.weight", "unused.bias"}}.get(name, set())
    assert set(kept) == set(state) - left_out | new
    assert all(torch.equal(kept[k], state[k]) for k in kept if k in state)
    assert {k for k, _ in rebuilt.named_parameters()} == {k for k, _ in module.named_parameters()} - left_out


@every
def test_needs_no_code_of_the_user_and_no_pickle(name: str, tmp_path: Path) -> None:
    module, example = made(name)
    model = graph.of(module, example)
    bundle = load(save(Bundle(model), tmp_path / "bundle"))
    assert bundle.model.spec == model.spec and torch.equal(score(bundle.model, example), score(model, example))
    torch.save([flat(example, model.spec.inputs), score(model, example)], tmp_path / "case.pt")
    script = f"""
import torch
from pennyweight.model.bundle import load
from pennyweight.model.spec import call
batch, want = torch.load({str(tmp_path / "case.pt")!r}, weights_only=True)
model = load({str(tmp_path / "bundle")!r}).model
torch.set_num_threads(1)
torch.testing.assert_close(call(model.build(), batch, model.spec.inputs), want)"""
    if name == "mixed":  # one is enough for what takes a process of its own
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_quantized_pruned_and_folded_by_path(tmp_path: Path) -> None:
    for name, tables, dense in (("dense", 0, 3), ("images", 0, 1), ("text", 1, 2), ("attention", 1, 5), ("mixed", 1, 2)):
        module, example = made(name)
        given = Bundle(graph.of(module, example))
        bundle = QuantizeDense("int8").apply(given, Env())
        if tables:
            bundle = QuantizeTables("int8").apply(bundle, Env())
        layers = bundle.model.spec.layers.values()
        assert (sum(isinstance(la, Table) for la in layers), sum(isinstance(la, Dense) for la in layers)) == (tables, dense)
        back = load(save(bundle, tmp_path / name)).model
        got, want = score(back, example), score(given.model, example)
        assert (got - want).abs().mean() < 0.05 * want.std() and back.bytes < given.model.bytes


def test_sequences_stay_chains() -> None:
    for name, hidden in (("dense", 2), ("text", 1), ("mixed", 1)):
        module, example = made(name)
        given = Bundle(graph.of(module, example))
        pruned = PruneNeurons(widths=(32,) * hidden, score="weight").apply(given, Env())
        assert score(pruned.model, example).shape == score(given.model, example).shape and pruned.bytes < given.bytes
        if name != "text":
            folded = FoldNorms().apply(pruned, Env())
            torch.testing.assert_close(score(folded.model, example), score(pruned.model, example), rtol=1e-4, atol=1e-4)


class Noisy(nn.Module):
    """Dropout as a function, a rate that depends on the mode, and a statistic of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.p = nn.Linear(8, 32), nn.Linear(32, 1), 0.5
        self.gain = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x).relu() * self.gain, 0.5, training=self.training)
        x = x.unsqueeze(1)
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=self.p if self.training else 0.0)
        return self.last(x.squeeze(1)).sigmoid()


def test_a_copy_trains_and_follows_the_mode() -> None:
    torch.manual_seed(0)
    for module, example in ((Noisy(), (torch.rand(ROWS, 8),)), made("text"), made("mixed")):
        model = graph.of(module, example)
        before = {k: v.clone() for k, v in model.state.items()}
        copied = model.build(copy=True)
        columns = list(flat(example, model.spec.inputs).values())
        assert torch.equal(copied(*columns), copied(*columns))
        copied.train()
        assert isinstance(module, Mixed) or not torch.equal(copied(*columns), copied(*columns))
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
        copied(*columns).clamp(-9, 9).square().sum().backward()
        assert all(p.grad is not None for p in copied.parameters())
        optimizer.step()
        changed = copied.state_dict()
        assert all(not torch.equal(changed[n], before[n]) for n, p in copied.named_parameters() if p.grad.any())
        assert all(torch.equal(model.state[k], before[k]) for k in before)


def test_trained_anew_it_starts_from_other_weights_and_the_same_constants() -> None:
    module, example = made("mixed")
    model = graph.of(module, example)
    first, second = (seeded(model.spec, seed, (), model.state) for seed in (1, 2))
    assert torch.equal(first.scale, second.scale) and torch.equal(first.scale, module.scale)
    assert not torch.equal(first.table.weight, second.table.weight)
    positions = graph.of(*made("attention"))
    fresh = seeded(positions.spec, 1).places
    assert abs(fresh.detach().std() / positions.state["places"].std() - 1) < 0.2


def test_the_training_loop_takes_it() -> None:
    module, example = made("attention")
    words = ids(300, 7).numpy()
    schema = Schema((Column("words", "context", "sequence", 50, 7), Column("label", "label", "numeric")))
    columns = {"words": words, "label": (words == 3).any(1).astype(np.float32)}
    rows = Dataset.from_arrays(columns, schema)
    trained = graph.of(module, example, ["words"]).build(copy=True)
    fitted = fit(trained, rows, rows, Recipe(lr=0.01, batch=64, epochs=4), inputs=["words"])
    assert fitted.history[-1].loss < 0.7 * fitted.history[0].loss


def test_the_module_is_left_as_it_was() -> None:
    module, example = made("images")
    module.train()
    module.stem.eval()
    before, modes = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    model = graph.of(module, example, ("picture",))
    assert [m.training for m in module.modules()] == modes and model.spec.inputs == ("picture",)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
    torch.testing.assert_close(score(model, example), module.eval()(*example))


LAYERS: list[tuple[nn.Module, Tensor]] = [
    (nn.GRU(4, 6, batch_first=True), torch.rand(3, 5, 4)),
    (nn.RNN(4, 6, nonlinearity="relu", bias=False, batch_first=True), torch.rand(3, 5, 4)),
    (nn.LSTM(4, 6, num_layers=2, dropout=0.1, batch_first=True), torch.rand(3, 5, 4)),
    (nn.LayerNorm([5, 4], bias=False), torch.rand(3, 5, 4)),
    (nn.RMSNorm(4), torch.rand(3, 5, 4)),
    (nn.GroupNorm(1, 5, affine=False), torch.rand(3, 5, 4)),
    (nn.BatchNorm1d(5, affine=False), torch.rand(3, 5, 4)),
    (nn.InstanceNorm1d(5), torch.rand(3, 5, 4)),
    (nn.Conv1d(5, 5, 3, padding="same", padding_mode="circular", groups=5), torch.rand(3, 5, 4)),
    (nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1), torch.rand(3, 2, 4, 4)),
    (nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), torch.rand(3, 2, 4, 4)),
    (nn.AdaptiveAvgPool2d((None, 2)), torch.rand(3, 2, 4, 4)),
    (nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True), torch.rand(3, 2, 4, 4)),
    (nn.PixelShuffle(2), torch.rand(3, 4, 4, 4)),
    (nn.ConstantPad1d(1, float("inf")), torch.rand(3, 5, 4)),
    (nn.Unflatten(1, (2, 2)), torch.rand(3, 4)),
    (nn.PReLU(5), torch.rand(3, 5, 4)),
    (nn.GELU("tanh"), torch.rand(3, 5)),
    (nn.Hardtanh(-0.1, 0.1), torch.randn(3, 5)),
    (nn.Softmax2d(), torch.rand(3, 2, 4, 4)),
    (nn.EmbeddingBag(50, 4, mode="sum", padding_idx=0), ids(3, 5)),
    (nn.Embedding(50, 4, max_norm=0.5), ids(3, 5)),
    (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation=nn.SiLU(), bias=False),
        torch.rand(3, 5, 8),
    ),
    (nn.Bilinear(4, 4, 2, bias=False), torch.rand(3, 4)),
    (nn.Fold((4, 4), (2, 2)), torch.rand(3, 8, 9)),
]


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x, x) if isinstance(self.layer, nn.Bilinear) else self.layer(x)
        y = y[0] if isinstance(y, tuple) else y
        return y.flatten(1)


@pytest.mark.parametrize(("layer", "example"), LAYERS, ids=[type(la).__name__ for la, _ in LAYERS])
def test_a_layer_is_made_again_from_its_attributes(layer: nn.Module, example: Tensor) -> None:
    wrapped = Wrapped(layer.eval())
    with torch.no_grad():
        torch.testing.assert_close(graph.of(wrapped, [example]).build()(example), wrapped(example))


def lost(body: str) -> nn.Module:
    """A module whose class cannot be imported, so that recording is the only way."""

    class Lost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(3, 3), Hidden(3, 3)
            self.plain = [nn.Linear(3, 1)]
            self.state = torch.zeros(1)
            torch.nn.init.ones_(self.other.bias)

        def forward(self, x: Tensor, *more: Tensor) -> Any:
            return WAYS[body](self, x, *more)

    torch.manual_seed(0)
    return Lost().eval()


class Hidden(nn.Linear):
    """A layer of torch.nn with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs(), self.bias) * 2


class Named(nn.Linear):
    """A layer of torch.nn made in another way."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)


class Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + 1


def decides(self: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x
    return -x


def by_rows(self: Any, x: Tensor) -> Tensor:
    return x.new_zeros(len(x), 1) + x


def written(self: Any, x: Tensor) -> Tensor:
    y = x * 1
    y[:, 0] = self.layer(x)[:, 1]
    y[x > 0.5] += 1.0
    y.mul_(2)
    return y.clip(max=3.0)


def looped(self: Any, x: Tensor) -> Tensor:
    b, n = x.shape
    state = torch.zeros(b, n, device=x.device, dtype=x.dtype)
    for at in range(x.size(1)):
        state = nn.Tanh()(state + self.plain[0](x) * x[:, at : at + 1])
    return state if len(x.shape) == 2 and x.shape[1:] == (3,) else x


def kept(self: Any, x: Tensor) -> Tensor:
    self.state = self.state + 1
    return x * self.state


def outside(self: Any, x: Tensor) -> Tensor:
    return torch.ops.aten.relu(x)


WAYS: dict[str, Any] = {
    "subclass": lambda self, x: self.other(x),
    "written": written,
    "looped": looped,
    "made": lambda self, x: torch.einsum("bi,ij->bj", x, self.layer.weight.T) + torch.arange(3),
    "stacked": lambda self, x, y: torch.stack([self.layer(x), self.layer(y)], dim=1).logsumexp(1, keepdim=True),
    "split": lambda self, x: torch.cat([p.sort(dim=1, descending=True)[0] for p in self.layer(x).split(2, dim=1)], dim=1),
    "where": lambda self, x: torch.where(x > torch.tensor(0.5), x, float("-inf")).nan_to_num(neginf=-9.0).to(torch.float64),
    "decides": decides,
    "rows": by_rows,
    "many": lambda self, x: torch.ones_like(x) if x.shape[0] > 1 else torch.zeros_like(x) + x,
    "frozen": lambda self, x: self.layer(x).view(4, 3),
    "pair": lambda self, x: (x, x),
    "mapping": lambda self, x: {"score": x},
    "scalar": lambda self, x: x.sum(),
    "random": lambda self, x: x + torch.rand(1),
    "kept": kept,
    "function": lambda self, x: Counted.apply(x),
    "outside": outside,
    "item": lambda self, x: x * x[0, 0].item() if x.mean().item() > 9 else x,
    "listed": lambda self, x: x + len(x.tolist()),
}
GOOD = ("subclass", "written", "looped", "made", "stacked", "split", "where", "function")


@pytest.mark.parametrize("way", GOOD)
def test_ordinary_python_is_recorded(way: str) -> None:
    module = lost(way)
    example = (torch.rand(4, 3), torch.rand(4, 3))[: 2 if way == "stacked" else 1]
    model = graph.of(module, example)
    with torch.no_grad():
        torch.testing.assert_close(model.build()(*example), module(*example), rtol=1e-5, atol=1e-6)
    assert model.spec.inputs == ("x", "input_1")[: len(example)]


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("decides", r"test_graph\.py:\d+ \(if x\.sum\(\) > 0:\): Python decides by the numbers in a tensor.*torch\.where"),
        ("rows", r"len\(\) would fix the number of rows; write x\.shape\[0\]"),
        ("many", "Python decides by a number that depends on the batch"),
        ("item", "Python decides by a number that depends on the batch"),
        ("frozen", r"itself fails on 1 rows of the example at .*test_graph\.py:\d+"),
        ("pair", "gives a tuple of 2; a model here gives one tensor"),
        ("mapping", "gives a dict of 1"),
        ("scalar", r"gives \[\] for 4 rows"),
        ("random", "differs on 1 rows"),
        ("kept", "differs on 4 rows"),
        ("listed", r"cannot be traced at .*test_graph\.py:\d+"),
        ("outside", r"aten.*is not an operation of torch"),
    ],
)
def test_what_cannot_be_recorded_is_said_with_its_line(way: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        graph.of(lost(way), [torch.rand(4, 3)])


@pytest.mark.parametrize(
    ("example", "inputs", "reason"),
    [
        ((), (), "needs an example"),
        ((torch.tensor(1.0),), (), r"have the shapes \[\]; each needs the same rows"),
        ((torch.rand(4, 3), torch.rand(5)), (), r"shapes \[4, 3\], \[5\]"),
        ((torch.rand(0, 3),), (), "one or more"),
        ((torch.rand(4, 3),), ("a", "b"), r"2 columns \(a, b\) for the 1 inputs"),
        ((torch.rand(4),), (), "itself fails on 4 rows"),
    ],
)
def test_examples_that_do_not_fit_are_refused(example: tuple[Tensor, ...], inputs: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        graph.of(lost("subclass"), example, inputs)
    with pytest.raises(ConfigError, match="takes the inputs image; the example has 2"):
        graph.of(Images(), (torch.rand(4, 1, 8, 8), torch.rand(4)))


def test_layers_that_cannot_be_made_again_are_named() -> None:
    hooked = nn.Sequential(nn.Linear(3, 3))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r"in '0' \(Linear\).*: its hooks cannot be held"):
        graph.of(hooked, [torch.rand(4, 3)])
    changed = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    changed[0].register_buffer("extra", torch.zeros(2))
    with pytest.raises(ConfigError, match=r"layer '0', a Linear, cannot be stored: made again it holds .*, not .*extra \[2\]"):
        graph.of(changed, [torch.rand(4, 3)])
    weird = nn.Sequential(nn.Softmax(1))
    weird[0].dim = object()  # type: ignore[assignment]
    with pytest.raises(ConfigError):
        graph.of(weird, [torch.rand(4, 3)])
    with pytest.raises(ConfigError, match="a layer named 'graph'"):
        graph.of(nn.Sequential(OrderedDict(graph=nn.Linear(3, 3))), [torch.rand(4, 3)])
    normed = Wrapped(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(
        ConfigError, match=r"in 'layer\.parametrizations.* \(_WeightNorm\).*torch\._weight_norm is not an operation"
    ):
        graph.of(normed, [torch.rand(4, 3)])
    with pytest.raises(ConfigError, match=r"no torch\.nn\.Module"):
        graph.of(3, [torch.rand(4, 3)])  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_module_is_named() -> None:
    with pytest.raises(ConfigError, match=r"in 'layer' \(RecursiveScriptModule\).*a scripted module has no Python"):
        graph.of(Wrapped(torch.jit.script(nn.Linear(3, 3))), [torch.rand(4, 3)])


def test_a_subclass_with_a_constructor_alone_is_its_layer() -> None:
    model = graph.of(nn.Sequential(Named(3)), [torch.rand(4, 3)])
    assert type(model.build().get_submodule("0")) is nn.Linear


def test_a_shared_layer_stays_one_and_a_used_sequence_is_no_chain() -> None:
    class Used(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4))
            self.twice = nn.Sequential(shared := nn.Linear(4, 4), nn.ReLU(), shared)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.chain(x)) + self.chain[0](x).sum(1, keepdim=True)

    module, example = Used().eval(), (torch.rand(4, 4),)
    model = graph.of(module, example)
    torch.testing.assert_close(score(model, example), module(*example))
    assert {p for p, _ in leaves(model.build())} == {"chain.0", "chain.2", "twice.0"}
    assert not isinstance(model.build().get_submodule("chain"), nn.Sequential)
    with pytest.raises(PennyweightError, match="no hidden layer"):
        PruneNeurons(keep=0.5, score="weight").apply(Bundle(model), Env())


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("shop")
    for cls in (Deciding, Forgetful):
        monkeypatch.setattr(cls, "__module__", "shop")
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "shop", module)


class Deciding(nn.Module):
    def __init__(self, width: int, hidden: tuple[int, ...] = (8,), slope: float = 0.1) -> None:
        super().__init__()
        self.width, self.hidden, self.slope = width, hidden, slope
        self.first, self.last = nn.Linear(width, hidden[0]), nn.Linear(hidden[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y if y.sum() > 0 else self.slope * y)


class Forgetful(Deciding):
    def __init__(self, size: int) -> None:
        super().__init__(size)


@pytest.mark.usefixtures("shop")
def test_what_cannot_be_recorded_is_rebuilt_from_its_class() -> None:
    module, example = Deciding(3, (5,), slope=0.3), (torch.rand(4, 3),)
    model = graph.of(module, example)
    assert model.spec == Spec("shop:Deciding", {"width": 3, "hidden": [5], "slope": 0.3}, {}, ("x",))
    with torch.no_grad():
        torch.testing.assert_close(model.build(("shop",))(*example), module(*example))
    with pytest.raises(ConfigError, match="not allowed"):
        model.build()
    with pytest.raises(ConfigError, match=r"cannot be traced.*Nor can it be rebuilt.*no attribute 'size'"):
        graph.of(Forgetful(3), example)
    module.first, module.last = nn.Linear(3, 7), nn.Linear(7, 1)
    with pytest.raises(ConfigError, match="do not fit shop:Deciding"):
        graph.factory(module, example)


def forged(**changes: Any) -> Spec:
    """A stored graph somebody has changed: ``x`` through a layer, then its relu."""
    torch.manual_seed(0)
    spec = graph.of(lost("subclass"), [torch.rand(4, 3)]).spec
    return dataclasses.replace(spec, args={"graph": {**spec.args["graph"], **changes}})


def calls(op: str, target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"nodes": [{"op": op, "target": target, "args": list(args), "kwargs": kwargs}], "output": 1}


X = {"node": 0}


@pytest.mark.parametrize(
    "changes",
    [
        *(calls("function", f, "echo") for f in ("os.system", "builtins.exec", "torch.load", "torch.save", "torch.hub.load")),
        *(
            calls("function", f, "f")
            for f in ("torch.from_file", "operator.methodcaller", "operator.call", "torch.ops.load_library")
        ),
        *(calls("function", f, X) for f in ("torch.set_num_threads", "torch.nn.functional.__builtins__", "builtins.getattr")),
        *(calls("method", m, X) for m in ("__reduce__", "__class__", "numpy", "share_memory_", "relu(), exit", "nothing")),
        *(calls("attribute", a, X) for a in ("__class__", "grad_fn", "_backward_hooks", "shape.__class__")),
        calls("layer", "missing", X),
        calls("layer", "other'", X),
        calls("tensor", "other.nothing"),
        calls("tensor", "training"),
        calls("function", "torch.relu", {"node": 7}),
        calls("function", "torch.relu", {"node": -1}),
        calls("function", "torch.relu", {"node": True}),
        calls("function", "torch.relu", {"weird": 1}),
        calls("function", "torch.relu", {"dtype": "load"}),
        calls("function", "torch.relu", {"dtype": "nn"}),
        calls("function", "torch.relu", {"function": "os.system"}),
        calls("function", "torch.relu", {"layer": ["ReLU", {}]}),
        calls("function", "torch.relu", {"function": "torch.relu"}),
        calls("function", "torch.relu", {"mode": 3}),
        calls("function", "torch.relu", X, **{"a=exit()": 1}),
        calls("evil", "torch.relu", X),
        {"parts": [{"path": "other", "kind": "Sequential", "args": {}}]},
        {"parts": [{"path": "other", "kind": "Linear", "args": {"in_features": "x"}}]},
        {"parts": [{"path": "other", "kind": "init", "args": {}}]},
        {"parts": [{"path": 'a").b("', "kind": "ReLU", "args": {}}]},
        {"parts": [{"path": "training", "kind": "ReLU", "args": {}}]},
        {"held": [{"path": "forward", "shape": [1], "dtype": "float32", "spread": [0.0, 1.0]}]},
        {"held": [{"path": "other.weight", "shape": [-1], "dtype": "float32", "spread": [0.0, 1.0]}]},
        {"inputs": [{"name": "x=exit()", "path": "enter_x", "shape": [3], "dtype": "float32"}]},
        {"inputs": [{"name": "x", "path": "enter_x", "shape": [3], "dtype": "device"}]},
        {"runs": [{"path": "", "names": ["a.b"]}]},
        {"output": 99},
        {"colour": "red"},
    ],
    ids=str,
)
def test_a_forged_graph_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build(forged(**changes))


def test_constants_go_through_json() -> None:
    values = [
        *(1, 1.5, True, None, "a", [1, (2.0, None)], {"a": (1,)}, float("inf"), slice(1, None, 2), range(3), ...),
        *(torch.float16, torch.device("cpu"), torch.channels_last, torch.strided, F.gelu),
    ]
    back = codec.decode(codec.encode(values, lambda _: None), codec.constant)
    assert back == values and [type(v) for v in back] == [type(v) for v in values]
    with pytest.raises(ConfigError, match="a constant of type object"):
        codec.encode([object()], lambda _: None)
