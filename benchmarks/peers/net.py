"""The given checkpoint as a module, for peers that take modules: needs PyTorch and safetensors, nothing else of ours.

Its ``forward`` takes the columns one by one, since tracers of peers know no mappings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks.peers.exchange import Job
from pennyweight.core.config import decode
from pennyweight.model.spec import Spec, build, call


class Net(nn.Module):
    """A model over columns in order."""

    def __init__(self, module: nn.Module, columns: list[str], inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.columns, self.inputs = module, columns, inputs

    def forward(self, *columns: Tensor) -> Tensor:
        """Logits [B]."""
        return call(self.module, dict(zip(self.columns, columns, strict=True)), self.inputs)


def opened(job: Job) -> Net:
    """The checkpoint, in evaluation mode."""
    spec = decode(Spec, json.loads((job.given / "bundle" / "manifest.json").read_text())["spec"], "spec")
    module = build(spec)
    module.load_state_dict(safetensors.torch.load_file(job.given / "bundle" / "weights.safetensors"))
    torch.set_num_threads(1)
    return Net(module, job.columns, spec.inputs).eval()


def inputs(job: Job, batch: Mapping[str, np.ndarray]) -> list[Tensor]:
    """A batch as the module takes it."""
    return [torch.from_numpy(batch[name]) for name in job.columns]


def scorer(job: Job, net: nn.Module) -> Callable[[Mapping[str, np.ndarray]], Any]:
    """Logits of a module."""

    def score(batch: Mapping[str, np.ndarray]) -> Any:
        with torch.inference_mode():
            return net(*inputs(job, batch)).float().numpy()

    return score


def saved(job: Job, net: nn.Module, note: str) -> tuple[tuple[str, ...], Callable[..., Any], str]:
    """The state as ``torch.save`` writes it, which is what such a model is loaded from."""
    torch.save(net.state_dict(), job.out / "model.pt")
    return ("model.pt",), scorer(job, net), note
