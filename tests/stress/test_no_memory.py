"""Memory that can't be had: the call fails, and nothing else does. In a process of its own, since it has a limit."""

import json
import os
import platform
import re
import subprocess
import sys

import pytest
import starved
from processes import PACKAGE

pytestmark = pytest.mark.devices("cpu")

# From 64 KiB on every allocation is the system's own, and its failure depends on nothing that was freed before. Another
# thread's arena has address space in reserve, to which malloc turns when the system has none.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TOP_PAD_": "0", "MALLOC_ARENA_MAX": "1"}
OURS = re.compile(
    r"softmax_ext: can't allocate \d+ bytes for a tensor of shape \[[\d, ]*\]: the CPU is out of memory\."
)
TORCHS = re.compile(r"allocate memory|could not create a memory object|bad allocation|std::bad_alloc")


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="of Linux: RLIMIT_AS and /proc")
@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends a process at such a limit"
)
def test_no_memory():
    """It raises, says so in a sentence, leaves every operand as it was, and works when there is memory again."""
    environment = {**os.environ, **MALLOC, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, starved.__file__, *starved.CASES]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr
    for name, said in json.loads(result.stdout).items():
        assert said, f"{name}: the limit was never too low"
        for error, text in said:
            assert error == "MemoryError" or OURS.fullmatch(text) or TORCHS.search(text), f"{name}: {text}"
        if name == starved.SCRATCH:
            assert any("bad_alloc" in text for _, text in said), said
        elif "linear" not in name:  # whose large tensors are torch's
            assert any(OURS.fullmatch(text) for _, text in said), (name, said)
