"""ONNX Runtime: dynamic int8 by channel, tables included; and 4-bit weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.peers.exchange import Job, Made, main


def scorer(job: Job, note: str = "") -> Made:
    """The file as a session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(job.out / "model.onnx"), options, providers=["CPUExecutionProvider"])
    whole = {i.name: np.int64 for i in session.get_inputs() if i.type == "tensor(int64)"}

    def score(batch: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.asarray(session.run(None, {n: v.astype(whole.get(n, v.dtype)) for n, v in batch.items()})[0])

    return Made(("model.onnx",), score, note)


def fp32(job: Job) -> Made:
    (job.out / "model.onnx").write_bytes((job.given / "model.onnx").read_bytes())
    return scorer(job)


def int8(job: Job) -> Made:
    """Weights by channel and tables to int8, activations as they come."""
    ready = job.out / "ready.onnx"
    quant_pre_process(str(job.given / "model.onnx"), str(ready), skip_symbolic_shape=True)
    for channel in (True, False):  # of some graphs it makes one by channel that it cannot read again
        quantize_dynamic(ready, job.out / "model.onnx", per_channel=channel, weight_type=QuantType.QInt8)
        with contextlib.suppress(onnxruntime.capi.onnxruntime_pybind11_state.Fail):
            return scorer(job, f"quantize_dynamic, {'per_channel, ' * channel}QInt8, after quant_pre_process")
    raise RuntimeError("quantize_dynamic made no graph that can be read")


def int4(job: Job) -> Made:
    """Matrices and tables to 4 bits; Gemm is rewritten as MatMul first, which is all the tool takes."""
    model = ONNXModel(onnx.load(job.given / "model.onnx"))
    model.replace_gemm_with_matmul()
    quantizer = MatMulNBitsQuantizer(
        model.model, bits=4, block_size=16, is_symmetric=False, op_types_to_quantize=("MatMul", "Gather")
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(job.out / "model.onnx"))
    return scorer(job, "MatMulNBits, blocks of 16, MatMul and Gather")


if __name__ == "__main__":
    main(("onnxruntime",), {"fp32": fp32, "int8": int8, "int4": int4})
