"""What the machine has is read from the operating system, limits of a container included."""

from pathlib import Path

import psutil
import pytest
import torch

from pennyweight.core import hardware
from pennyweight.core.hardware import Device, Topology, detect, extras, findings, limits, machine, processor, versions


def group(root: Path, path: str, **files: str) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content + "\n")


def test_this_machine() -> None:
    topology = detect()
    assert topology.cpu.cores >= 1
    assert 0 < topology.cpu.memory_bytes <= psutil.virtual_memory().total
    assert len(topology.gpus) == torch.cuda.device_count()
    assert set(machine()) == {"cpu", "cores", "memory", "gpu"}
    assert versions()["torch"] == torch.__version__
    assert findings(topology)


def test_no_control_group_is_no_limit(tmp_path: Path) -> None:
    cores, memory = limits(tmp_path, tmp_path / "none")
    assert (cores, memory) == (hardware._affinity(), psutil.virtual_memory().total)


@pytest.mark.parametrize("quota", ["100000 100000", "150000 100000", "20000 100000"])
def test_a_core_and_a_half_is_one_core(tmp_path: Path, quota: str) -> None:
    """A second thread would be stopped for half of every period."""
    (tmp_path / "own").write_text("0::/job\n")
    group(tmp_path / "fs", "job", cpu__max=quota, memory__max="1048576")
    assert limits(tmp_path / "fs", tmp_path / "own") == (1, 1048576)


def test_the_limit_of_a_parent_binds(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/pod/job\n")
    group(tmp_path / "fs", "pod/job", cpu__max="max 100000", memory__max="max")
    group(tmp_path / "fs", "pod", cpu__max="100000 100000", memory__max="2097152")
    assert limits(tmp_path / "fs", tmp_path / "own") == (1, 2097152)


def test_version_1_groups(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("5:cpu,cpuacct:/job\n4:memory:/job\n3:freezer:/\n")
    group(tmp_path / "fs", "cpu,cpuacct/job", cpu__cfs_quota_us="100000", cpu__cfs_period_us="100000")
    group(tmp_path / "fs", "memory/job", memory__limit_in_bytes="4194304")
    assert limits(tmp_path / "fs", tmp_path / "own") == (1, 4194304)


def test_an_unlimited_version_1_group_is_no_limit(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("5:cpu:/\n4:memory:/\n")
    group(tmp_path / "fs", "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    group(tmp_path / "fs", "memory", memory__limit_in_bytes=str(2**63 - 4096))
    assert limits(tmp_path / "fs", tmp_path / "own") == (hardware._affinity(), psutil.virtual_memory().total)


def test_processor_knows_the_instruction_sets_that_matter(tmp_path: Path) -> None:
    intel, arm = tmp_path / "intel", tmp_path / "arm"
    intel.write_text(
        "processor : 0\nmodel name : Xeon\nflags : fpu sse avx2 avx512f avx512_vnni amx_bf16\nmodel name : other\n"
    )
    arm.write_text("processor : 0\nFeatures : fp asimd asimddp sve\n")
    assert processor(intel) == ("Xeon", ("avx2", "avx512", "avx512_vnni", "amx_bf16"))
    assert processor(arm)[1] == ("neon", "dotprod", "sve")
    assert processor(tmp_path / "none")[1] == ()


def test_findings_rule_out_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    bare = Topology((Device("cpu", "cpu", 1, 2**30),))
    refused = " ".join(f.text for f in findings(bare) if not f.allowed)
    for words in ("no GPU", "no int8 dot-product", "no bf16", "apt install g++", "one core"):
        assert words in refused
    full = Topology(
        (Device("cpu", "cpu", 8, 2**34, ("avx512_vnni", "avx512_bf16")), Device("cuda:0", "cuda", 132, 2**36, (), "H100"))
    )
    monkeypatch.setattr(hardware.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert all(f.allowed for f in findings(full))
    assert "GPU: H100" in findings(full)[0].text


def test_extras_tell_missing_from_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"onnxruntime": "1.32.0", "onnx": "1.23", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.9.0", "keras": "3.15"}
    monkeypatch.setattr(hardware, "_version", lambda package: found.get(package, ""))
    monkeypatch.setattr(hardware.torch, "__version__", "2.13.0")
    by_name = {e.name: e for e in extras()}
    assert by_name["keras"].installed == "3.15" and not by_name["keras"].remedy
    assert not by_name["ray"].installed and by_name["ray"].remedy == "pip install 'ray[train]'"
    assert by_name["onnxruntime"].remedy.startswith("onnxscript missing: pip install")
    assert "fbgemm-gpu-cpu 1.9.0 does not load beside torch 2.13.0" in by_name["torchrec"].remedy
    found["fbgemm-gpu-cpu"] = "1.8.0"
    assert not {e.name: e for e in extras()}["torchrec"].remedy
