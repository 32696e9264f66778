"""What the build decides about CUDA: which nvcc, whether it fits torch, which GPUs. The nvcc here only answers.

And what it says where the build can't be: in pip's isolation, where there is no torch.
"""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.devices("cpu")

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from build_support import cuda_toolkit, tools  # noqa: E402

KNOWN = {"12.4": (60, 75, 80, 86, 89, 90), "13.0": (75, 80, 86, 89, 90, 100, 120)}


def nvcc_of(home: Path, version: str) -> Path:
    """A toolkit whose nvcc tells its version and what it compiles for."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    names = "\\n".join(f"compute_{number}" for number in KNOWN[version])
    nvcc.write_text(
        f"#!/bin/sh\n"
        f"case $1 in --version) echo 'Cuda compilation tools, release {version}, V{version}.99';;\n"
        f"--list-gpu-arch) printf '{names}\\n';; *) exit 1;; esac\n"
    )
    nvcc.chmod(0o755)
    return home


@pytest.fixture
def decide(monkeypatch, tmp_path) -> Callable[..., Any]:
    """The decision with a toolkit of ``nvcc``, a torch for ``cuda`` and environment variables."""
    for name in ("FORCE_CUDA", "FORCE_CPU", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)

    def decision(cuda: str | None, nvcc: str | None = None, **environment: str) -> Any:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        if nvcc is not None:
            monkeypatch.setenv("CUDA_HOME", str(nvcc_of(tmp_path / "toolkit", nvcc)))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if nvcc is None:
            monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: None)
        return cuda_toolkit.find_toolkit()

    return decision


def test_toolkit_of_torchs_cuda(decide, tmp_path):
    toolkit = decide("13.0", nvcc="13.0")
    assert toolkit.nvcc == str(tmp_path / "toolkit" / "bin" / "nvcc")
    assert toolkit.architectures == "75;80;86;89;90;100;120+PTX"
    assert "-gencode=arch=compute_75,code=sm_75" in toolkit.gencode
    assert toolkit.gencode[-1] == "-gencode=arch=compute_120,code=compute_120"


def test_default_is_what_nvcc_knows(decide):
    toolkit = decide("12.9", nvcc="12.4")  # the minor versions need not agree
    assert toolkit.architectures == "75;80;86;89;90+PTX"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("8.0", "80"),
        ("8.0;9.0+PTX", "80;90+PTX"),
        ("9.0a 12.0", "90a;120"),
        (" 8.0, 8.6 ", "80;86"),
        ("8.0;9.0;", "80;90"),
        ("9.0;9.0", "90"),
    ],
)
def test_chosen_architectures(decide, given, expected):
    assert decide("13.0", nvcc="13.0", TORCH_CUDA_ARCH_LIST=given).architectures == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("native", ["'native'", "asks no GPU"]),
        ("8.0;Hopper", ["'Hopper'", "8.0;9.0+PTX"]),
        ("80", ["'80'", "8.0;9.0+PTX"]),
        ("6.0", ["6.0", "nvcc 13.0 compiles for 7.5 8.0"]),
    ],
)
def test_wrong_architectures(decide, given, said):
    with pytest.raises(SystemExit) as stopped:
        decide("13.0", nvcc="13.0", TORCH_CUDA_ARCH_LIST=given)
    for part in ["TORCH_CUDA_ARCH_LIST", *said]:
        assert part in str(stopped.value)


@pytest.mark.parametrize("force", ["0", "1"])
def test_versions_that_disagree(decide, force):
    """Both are named, and the ways out."""
    with pytest.raises(SystemExit) as stopped:
        decide("12.8", nvcc="13.0", FORCE_CUDA=force)
    for part in ["CUDA 13.0", "CUDA 12.8", "CUDA_HOME", "12.x", "FORCE_CPU=1"]:
        assert part in str(stopped.value)


def test_reasons_for_the_cpu_alone(decide):
    assert "has no CUDA" in decide(None)
    assert "FORCE_CPU" in decide("13.0", FORCE_CPU="1")
    reason = decide("13.0", FORCE_CPU="0")
    assert "no nvcc" in reason
    assert "CUDA toolkit 13.0" in reason


def test_forced(decide):
    assert decide(None, nvcc="13.0", FORCE_CUDA="1").version == "13.0"


def test_forced_without_a_toolkit(decide):
    with pytest.raises(SystemExit, match="no nvcc"):
        decide("13.0", FORCE_CUDA="1")


def test_forced_both_ways(decide):
    with pytest.raises(SystemExit, match="Unset one"):
        decide("13.0", FORCE_CUDA="1", FORCE_CPU="1")


def test_home_without_nvcc(decide, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"CUDA_PATH is .*no bin/nvcc"):
        cuda_toolkit.find_toolkit()


# ---- what a build needs ----------------------------------------------------------------------------------------------


def test_without_torch_it_stops_at_once(tmp_path):
    """As in pip's build isolation: one sentence, with what to type, before anything is compiled or asked for."""
    for name, packages in {"setuptools": ["setuptools", "_distutils_hack"], "ninja": ["ninja"]}.items():  # not torch
        found = importlib.metadata.distribution(name)
        for path in (*map(found.locate_file, packages), found.locate_file(f"{name}-{found.version}.dist-info")):
            (tmp_path / path.name).symlink_to(path)
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {HOOK}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1, result
    said = result.stderr.strip()
    assert said.startswith("softmax_ext: cannot build, since torch is not installed in the environment"), said
    assert "type pip install 'torch>=2.10'" in said
    assert "then pip install --no-build-isolation ." in said
    assert "\n" not in said


# What pip, uv and build call first.
HOOK = "from setuptools import build_meta; build_meta.get_requires_for_build_wheel()"


def test_pybind11_is_not_needed():
    """It is for tests of the kernels alone."""
    assert "pybind11" not in tools.BUILD_TOOLS
    build_system = (ROOT / "pyproject.toml").read_text().partition("[project]")[0]
    assert "pybind11" not in build_system
