"""OpenVINO through NNCF: post-training int8, compressed weights, and the quantization that watches its own accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import nncf
import numpy as np
import openvino
from sklearn.metrics import roc_auc_score

from benchmarks.peers.exchange import Job, Made, main

CPU = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}


def scorer(job: Job, model: Any, note: str) -> Made:
    openvino.save_model(model, job.out / "model.xml", compress_to_fp16=False)
    compiled = openvino.Core().compile_model(str(job.out / "model.xml"), "CPU", CPU)
    return Made(("model.xml", "model.bin"), lambda batch: compiled(dict(batch))[0], note)


def opened(job: Job) -> Any:
    return openvino.Core().read_model(str(job.given / "model.onnx"))


def rows(job: Job, part: str) -> nncf.Dataset:
    """A part in batches of 128, labels beside the inputs."""
    whole = job.rows(part)
    size = 128 if part == "calib" else 8192
    count = len(whole["label"])
    batches = [{n: v[at : at + size] for n, v in whole.items()} for at in range(0, count, size)]
    return nncf.Dataset(batches, lambda batch: {n: batch[n] for n in job.columns})


def auc(compiled: Any, batches: Iterable[dict[str, np.ndarray]]) -> float:
    """What accuracy control asks after."""
    labels, logits = [], []
    for batch in batches:
        labels.append(batch["label"])
        logits.append(compiled({n: v for n, v in batch.items() if n != "label"})[0])
    return float(roc_auc_score(np.concatenate(labels), np.concatenate(logits)))


def fp32(job: Job) -> Made:
    return scorer(job, opened(job), "as given")


def int8(job: Job) -> Made:
    model = nncf.quantize(opened(job), rows(job, "calib"), subset_size=16, preset=nncf.QuantizationPreset.MIXED)
    return scorer(job, model, "nncf.quantize, 2,048 calibration rows, mixed preset")


def controlled(job: Job) -> Made:
    """Layers are given back to fp32 until AUC on the validation rows is within .001."""
    model = nncf.quantize_with_accuracy_control(
        opened(job), rows(job, "calib"), rows(job, "valid"), auc, subset_size=16,
        max_drop=0.001, drop_type=nncf.DropType.ABSOLUTE,
    )  # fmt: skip
    return scorer(job, model, "nncf.quantize_with_accuracy_control, max_drop .001 on validation")


def weights8(job: Job) -> Made:
    model = nncf.compress_weights(opened(job), mode=nncf.CompressWeightsMode.INT8_SYM)
    return scorer(job, model, "nncf.compress_weights, INT8_SYM")


def weights4(job: Job) -> Made:
    """4 bits for all layers in groups of 16; a layer whose inputs 16 does not divide stays in 8."""
    more = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    model = nncf.compress_weights(
        opened(job), mode=nncf.CompressWeightsMode.INT4_SYM, group_size=16, ratio=1.0, all_layers=True, advanced_parameters=more
    )
    return scorer(job, model, "nncf.compress_weights, INT4_SYM, group 16, all layers")


if __name__ == "__main__":
    main(
        ("openvino", "nncf"), {"int8": int8, "accuracy-control": controlled, "weights-int8": weights8, "weights-int4": weights4}
    )
