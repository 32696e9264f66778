"""What all tests share: the device, fixed seeds, and the number of threads, which a test may change.

pytest --device cpu         the CPU kernels (the default); with --sanitized those of kernel_suite.py's build
pytest --device cuda        the CUDA kernels: every tensor that a test makes is on the GPU, unless the test asks for
                            `device`: then it puts there what belongs there, and computes on the CPU what is right
pytest --device emulated    the CUDA kernels too, on CPU tensors: tests/emulator/ runs them without a GPU; with
                            --sanitized under AddressSanitizer and UBSan
pytest --large              the tests marked so, which take minutes and up to 15 GiB of memory, too
"""

import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import oracle
import pytest
import torch

from softmax_ext import cuda, ops


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda", "emulated"], default="cpu", help="which kernels are tested")
    parser.addoption("--sanitized", action="store_true", help="the kernels under AddressSanitizer")
    parser.addoption("--large", action="store_true", help="tests that take much memory too")
    parser.addoption("--sample", action="append", default=[], metavar="FILE=N", help="of a file, one in N tests")


def _forks() -> NoReturn:
    raise RuntimeError("a test forks in a process of its own: tests/tools/fresh.py says why")


def pytest_configure(config: pytest.Config) -> None:
    os.fork = _forks
    # Compiled graphs that an earlier run kept on disk may have other derivatives in them.
    cache = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    # Every worker of xdist has the machine's whole pool of threads otherwise.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    device, sanitized = config.getoption("--device"), config.getoption("--sanitized")
    if sanitized and device == "cuda":
        raise pytest.UsageError("--sanitized needs --device cpu or emulated")
    if sanitized and device == "cpu":
        _check_sanitized()
    oracle.fast_exponential = device != "cpu"
    if device == "cuda":
        _use_cuda()
    if device == "emulated":
        _load_emulated(sanitized)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        devices = item.get_closest_marker("devices")
        if devices and config.getoption("--device") not in devices.args:
            item.add_marker(pytest.mark.skip(reason=f"is for --device {' or '.join(devices.args)}"))
        if item.get_closest_marker("large") and not config.getoption("--large"):
            item.add_marker(pytest.mark.skip(reason="takes much memory: --large"))
    samples = dict(sample.split("=") for sample in config.getoption("--sample"))

    def chosen(item: pytest.Item) -> bool:
        # By a hash: one in four in the order of the parameters would be all of one dtype.
        return zlib.crc32(item.nodeid.encode()) % int(samples.get(item.path.name, 1)) == 0

    config.hook.pytest_deselected(items=[item for item in items if not chosen(item)])
    items[:] = [item for item in items if chosen(item)]


def _check_sanitized() -> None:
    library = Path(ops.library.path)
    if b"__asan_" not in library.read_bytes():
        raise pytest.UsageError(f"--sanitized: start it by tests/tools/kernel_suite.py; {library} is not sanitized")


def _use_cuda() -> None:
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU")
    if cuda.library is None:
        raise pytest.UsageError(f"--device cuda: {cuda.missing}")
    torch.set_default_device("cuda")
    _check_targets()


def _load_emulated(sanitized: bool) -> None:
    import emulator

    if sanitized and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise pytest.UsageError("--sanitized: start it by tests/emulator/run.py, which preloads AddressSanitizer")
    try:
        library = emulator.build("libemulated.so", sanitized)
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from None
    # Warns, once, that it replaces the CPU kernels.
    torch.ops.load_library(library)
    _check_targets()


def _check_targets() -> None:
    """Bad class indices raise IndexError, as they always do on the CPU; the CUDA kernels do it on demand."""
    os.environ.setdefault("SOFTMAX_EXT_CHECK_TARGETS", "1")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda" if request.config.getoption("--device") == "cuda" else "cpu")


@pytest.fixture(autouse=True)
def _on_the_device(request: pytest.FixtureRequest) -> None:
    # None and not "cpu": that is a mode like any other, which Dynamo traces.
    if request.config.getoption("--device") == "cuda":
        torch.set_default_device(None if "device" in request.fixturenames else "cuda")


@pytest.fixture(autouse=True)
def _seeded_and_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
