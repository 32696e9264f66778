"""What all tests share: the device, fixed seeds, and the number of threads, which a test may change."""

import os
from collections.abc import Iterator

import pytest
import torch

from softmax_ext import cuda

DEVICES = ["cpu", "cuda"] if cuda.library is not None and torch.cuda.is_available() else ["cpu"]


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
