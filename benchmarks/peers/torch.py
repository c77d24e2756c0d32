"""PyTorch's own quantization, torchao and torch-pruning, which share an environment."""

from __future__ import annotations

import json
import warnings

import safetensors.torch
import torch
import torch_pruning
from torch import nn
from torch.ao import quantization
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from benchmarks.peers.exchange import Job, Made, main
from benchmarks.peers.net import inputs, opened, saved, scorer


def ao(job: Job) -> Made:
    """Dense layers to int8 with activations as they come, tables to int8."""
    net = opened(job)
    quantize_(net, Int8DynamicActivationInt8WeightConfig(), lambda m, _: isinstance(m, nn.Linear))
    quantize_(net, Int8WeightOnlyConfig(), lambda m, _: isinstance(m, nn.Embedding))
    return Made(*saved(job, net, "torchao: Int8DynamicActivationInt8Weight on Linear, Int8WeightOnly on Embedding"))


def _own(job: Job, tables: quantization.QConfig, note: str) -> Made:
    net = opened(job)
    warnings.simplefilter("ignore", DeprecationWarning)
    how = {nn.Linear: quantization.per_channel_dynamic_qconfig, nn.Embedding: tables}
    return Made(*saved(job, quantization.quantize_dynamic(net, how), note))


def dynamic(job: Job) -> Made:
    tables = quantization.float_qparams_weight_only_qconfig
    return _own(job, tables, "torch.ao.quantization.quantize_dynamic by channel, tables quint8")


def dynamic4(job: Job) -> Made:
    tables = quantization.float_qparams_weight_only_qconfig_4bit
    return _own(job, tables, "torch.ao.quantization.quantize_dynamic by channel, tables quint4x2")


def pruned(job: Job) -> Made:
    """Half of the neurons by Taylor importance on the calibration rows; tables and the output stay."""
    net, rows = opened(job), job.rows("calib")
    given = inputs(job, rows)
    loss = nn.functional.binary_cross_entropy_with_logits(net(*given), torch.from_numpy(rows["label"]).float())
    dense = [m for m in net.modules() if isinstance(m, nn.Linear)]
    kept = [m for m in net.modules() if isinstance(m, nn.Embedding)] + dense[-1:]
    pruner = torch_pruning.pruner.BasePruner(
        net, tuple(t[:2] for t in given), importance=torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=0.5, round_to=16, ignored_layers=kept,
    )  # fmt: skip
    loss.backward()
    pruner.step()
    module = net.module
    safetensors.torch.save_file(module.state_dict(), job.out / "model.safetensors")
    widths = [m.out_features for m in module.modules() if isinstance(m, nn.Linear)][:-1]
    (job.out / "widths.json").write_text(json.dumps(widths))
    note = f"torch-pruning, BasePruner, Taylor importance, half of the neurons, multiples of 16: {widths}"
    return Made(("model.safetensors",), scorer(job, net.eval()), note)


SETTINGS = {"torchao": ao, "dynamic": dynamic, "dynamic-int4": dynamic4, "pruned": pruned}

if __name__ == "__main__":
    main(("torch", "torchao", "torch-pruning"), SETTINGS)
