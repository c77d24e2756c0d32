"""Intel's Neural Compressor for PyTorch: 4-bit weights by HQQ and by rounding."""

from __future__ import annotations

from neural_compressor.torch.quantization import HQQConfig, RTNConfig, convert, prepare

from benchmarks.peers.exchange import Job, Made, main
from benchmarks.peers.net import opened, saved


def hqq(job: Job) -> Made:
    net = convert(prepare(opened(job), HQQConfig(bits=4, group_size=16)))
    return Made(*saved(job, net, "HQQConfig, 4 bits, groups of 16"))


def rtn(job: Job) -> Made:
    net = convert(prepare(opened(job), RTNConfig(bits=4, group_size=16)))
    return Made(*saved(job, net, "RTNConfig, 4 bits, groups of 16"))


if __name__ == "__main__":
    main(("neural-compressor-pt",), {"hqq": hqq, "rtn": rtn})
