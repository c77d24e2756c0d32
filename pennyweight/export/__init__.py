"""Bundles leave for other runtimes: ONNX, OpenVINO, torch.export and plain PyTorch, each checked against the bundle."""

from pennyweight.export.check import Export, Failed, Written, export
from pennyweight.export.targets import TARGETS

__all__ = ["TARGETS", "Export", "Failed", "Written", "export"]
