"""What all tests share: the device, fixed seeds, and the number of threads, which a test may change."""

import os
from collections.abc import Iterator

import pytest
import torch

import softmax_ext  # noqa: F401  registers the operators that DEVICES asks about


def _has_cuda_kernels() -> bool:
    operator = "softmax_ext::cross_entropy"
    return torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")


DEVICES = ["cpu", "cuda"] if _has_cuda_kernels() else ["cpu"]


def pytest_configure() -> None:
    # Every worker of xdist has the machine's whole pool of threads otherwise.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seeded_and_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
