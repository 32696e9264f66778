"""Graphs that torch.compile keeps on disk hold our derivatives: those of another version must not be taken."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, threading
import torch, softmax_ext
from softmax_ext import ops
from softmax_ext.autograd import linear

ops.VERSION = int(sys.argv[1])

handed_on = linear.handed_on
linear.handed_on = lambda *a: [None if g is None else g * float(sys.argv[2]) for g in handed_on(*a)]
x, w, y = torch.ones(4, 3, requires_grad=True), torch.eye(3), torch.zeros(4, dtype=torch.long)
compiled = torch.compile(lambda x: softmax_ext.linear_cross_entropy(x, w, y))
thread = threading.Thread(target=lambda: compiled(x).backward())  # whose settings are not the main thread's
thread.start()
thread.join()
counters = torch._dynamo.utils.counters["aot_autograd"]
print(x.grad[0, 0].item(), counters["autograd_cache_hit"])
"""


def _gradient(directory: str, version: int, factor: int) -> tuple[float, int]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": directory, "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(version), str(factor)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    value, hits = done.stdout.split()
    return float(value), int(hits)


@pytest.mark.devices("cpu")
@pytest.mark.slow
@pytest.mark.timeout(900)  # three processes that compile
def test_another_version_compiles_anew(tmp_path):
    directory = str(tmp_path)
    first, hits = _gradient(directory, 10000, 1)
    assert hits == 0
    again, hits = _gradient(directory, 10000, 1)
    if not hits:
        pytest.skip("this torch keeps no graphs with our operators")
    assert again == first
    other, hits = _gradient(directory, 10001, 2)
    assert hits == 0
    assert other == pytest.approx(2 * first)
