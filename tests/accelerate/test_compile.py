"""An engine gives eager's numbers or says why it cannot."""

import copy
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pennyweight.accelerate import compile as engines
from pennyweight.accelerate.compile import Exported, compiled, export, make, plain, reads
from pennyweight.core import hardware
from pennyweight.core.errors import DeviceError
from pennyweight.model.bundle import Runtime
from pennyweight.model.spec import Batch, call
from pennyweight.model.tables import Table

USERS, ITEMS, DIM = 50, 30_000, 16


class Net(nn.Module):
    """A lookup of a user and a padded sequence, a number, and one dense layer; the label is in the batch and not read."""

    def __init__(self, items: nn.Module) -> None:
        super().__init__()
        self.users, self.items, self.head = nn.Embedding(USERS, DIM), items, nn.Linear(2 * DIM + 1, 1)

    def forward(self, batch: Batch) -> Tensor:
        pooled = self.items(batch["history"]).mean(1)
        parts = [self.users(batch["user"]), pooled, batch["age"].unsqueeze(1)]
        logits: Tensor = self.head(torch.cat(parts, 1)).squeeze(1)
        return logits


def batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    """One user with ``rows`` candidates: user columns are one row, repeated without a copy."""
    g = torch.Generator().manual_seed(seed)
    return {
        "user": torch.randint(USERS, (1,), generator=g).expand(rows),
        "history": torch.randint(ITEMS, (rows, 7), generator=g),
        "age": torch.randn(1, generator=g).expand(rows),
        "label": torch.zeros(rows),
    }


def net(data_type: str = "fp32") -> Net:
    torch.manual_seed(0)
    rows = torch.randn(ITEMS, DIM)
    layer = Table(ITEMS, DIM, data_type=data_type)  # type: ignore[arg-type]
    items = layer.build()
    items.load_state_dict(layer.encode(rows), assign=True)
    return Net(items).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def quantized() -> Net:
    return net("int4")


@pytest.fixture(scope="module")
def exported(quantized: Net) -> Exported:
    return export(quantized, batch(6))


def test_eager_is_the_module(quantized: Net) -> None:
    score = make(quantized, Runtime("eager"), {})
    assert torch.equal(score(batch(5)), call(quantized, batch(5)))


@pytest.mark.parametrize("rows", [1, 2, 6, 501])
def test_an_export_takes_any_number_of_candidates(quantized: Net, exported: Exported, rows: int) -> None:
    """Of a model with int4 rows too large to be run as fp32 ones: the graph holds their plain form."""
    torch.testing.assert_close(exported.scorer(1)(batch(rows, 1)), call(quantized, batch(rows, 1)), rtol=1e-4, atol=1e-5)


def test_an_export_reads_only_what_the_model_reads(exported: Exported) -> None:
    """The history's ids go to a packed table, whose rows are looked up before."""
    assert [n for columns in exported.inputs.values() for n in columns] == ["user", "age"]
    assert exported.found is not None


def test_an_export_leaves_no_file_and_no_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    level = logging.getLogger("torch.onnx._internal.exporter._registration").level
    made = export(nn.Sequential(nn.Linear(3, 1)).eval(), {"x": torch.randn(1, 3)}, ("x",))  # also: a probe of one row
    assert made.scorer()({"x": torch.randn(4, 3)}).shape == (4,)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "") and not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert logging.getLogger("torch.onnx._internal.exporter._registration").level == level


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) if x.sum() > 0 else x.prod(1)


@pytest.mark.parametrize("engine", ["onnxruntime", "compile"])
def test_a_model_that_cannot_be_captured_says_why(engine: str) -> None:
    if engine == "compile" and not hardware.compiler():
        pytest.skip("no C++ compiler")
    with pytest.raises(DeviceError, match=rf"engine '{engine}' cannot run this model: \w+: .{{20}}"):
        make(Branches(), Runtime(engine), {"x": torch.randn(4, 3)}, ("x",))  # type: ignore[arg-type]


@pytest.mark.skipif(not hardware.compiler(), reason="no C++ compiler")
def test_compiled_gives_the_same_numbers_in_a_long_process() -> None:
    """Six models of different shapes: PyTorch's limit on recompilations must not be one for all of them."""
    modules = [nn.Sequential(nn.Linear(n, n + 1), nn.ReLU(), nn.Linear(n + 1, 1)).eval() for n in range(3, 9)]
    scores = [compiled(m, {"x": torch.randn(6, m[0].in_features)}, ("x",)) for m in modules]
    for module, score in zip(modules, scores, strict=True):
        for rows in (1, 6, 9):
            x = torch.randn(rows, module[0].in_features)
            with torch.inference_mode():
                torch.testing.assert_close(score({"x": x}), call(module, {"x": x}, ("x",)))


def test_other_numbers_than_eager_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_graph", lambda *_: b"")
    module = nn.Linear(3, 2)
    wrong = {"values": lambda b: module(b["x"]) + 0.01, "shape": lambda b: module(b["x"])[:, :1]}
    for score in wrong.values():
        monkeypatch.setattr(Exported, "scorer", lambda self, threads, score=score: score)
        with pytest.raises(DeviceError, match=r"gives other outputs than eager: .* for 4 rows, largest difference"):
            export(module, {"x": torch.randn(4, 3)}, ("x",))


def test_a_graph_that_froze_the_number_of_candidates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_graph", lambda *_: b"")
    module, probe = nn.Linear(3, 2), {"x": torch.randn(4, 3)}
    frozen = module(probe["x"])
    monkeypatch.setattr(Exported, "scorer", lambda self, threads: lambda b: frozen)
    with pytest.raises(DeviceError, match=r"\(4, 2\) against \(1, 2\) for 1 rows"):
        export(module, probe, ("x",))


class Lying(nn.Linear):
    def plain(self) -> nn.Module:
        return nn.Linear(3, 2).requires_grad_(False)


def test_a_plain_form_that_is_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Lying(3, 2))
    monkeypatch.setattr(engines, "_graph", lambda *_: b"")
    monkeypatch.setattr(engines, "_check", lambda *_, **__: None)
    monkeypatch.setattr(Exported, "scorer", lambda self, threads: None)
    with pytest.raises(DeviceError, match=r"the plain form of the model differs by 0\.\d+ on average.*10% of that"):
        export(module, {"x": torch.randn(4, 3)}, ("x",))


def test_missing_packages_and_compilers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module, probe = nn.Linear(3, 1), {"x": torch.randn(4, 3)}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="needs onnx, onnxscript, onnxruntime: pip install onnxruntime onnx onnxscript"):
        make(module, Runtime("onnxruntime"), probe, ("x",))
    monkeypatch.setattr(hardware, "compiler", lambda: "")
    with pytest.raises(DeviceError, match=r"needs a C\+\+ compiler .* apt install g\+\+"):
        make(module, Runtime("compile"), probe, ("x",))


def test_onnxruntime_refuses_a_gpu() -> None:
    with pytest.raises(DeviceError, match="runs on the CPU"):
        export(nn.Linear(3, 1), {"x": torch.randn(4, 3, device="meta")}, ("x",))


def test_plain_shares_what_it_keeps_and_leaves_the_module_alone(quantized: Net) -> None:
    before = copy.copy(dict(quantized.named_modules()))
    out = plain(quantized)
    assert dict(quantized.named_modules()) == before
    assert isinstance(out.get_submodule("items"), nn.Embedding)
    assert out.get_parameter("users.weight").data_ptr() == quantized.users.weight.data_ptr()
    alone = plain(quantized.items)
    assert isinstance(alone, nn.Embedding), "also where the module itself is such a layer"


def test_reads_sees_iteration_as_reading_all() -> None:
    class Sum(nn.Module):
        def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
            return torch.stack([v for _, v in batch.items()]).sum(0)

    assert reads(Sum(), {"a": torch.ones(2), "b": torch.ones(2)}) == ("a", "b")
