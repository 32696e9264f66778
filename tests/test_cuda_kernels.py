"""The CUDA kernels one by one: which of them takes a row, and each at the ends of its range, on rows that lie askew.

On the emulator as a device of compute capability 7.5, which has no clusters, and as one of 9.0; on a card as it is.
"""

import ctypes
import itertools
import math
from collections.abc import Callable

import oracle
import pytest
import torch
from test_cross_entropy import Strategy, bounds_for, check, run

from softmax_ext import cross_entropy, cuda, log_softmax, softmax

pytestmark = pytest.mark.devices("cuda", "emulated")

CAPABILITIES = [75, 90]

# The kernel for rows of so many classes: (dtype, classes, without clusters, with clusters). A row's last length in each
# kernel, and the first in the next.
CHOICES = [
    (torch.float32, 64, "tile", "tile"),
    (torch.float32, 65, "warp", "warp"),
    (torch.float32, 1024, "warp", "warp"),
    (torch.bfloat16, 2048, "warp", "warp"),
    (torch.float32, 1028, "block", "block"),
    (torch.bfloat16, 2056, "block", "block"),
    (torch.float32, 16384, "block", "block"),
    (torch.float32, 16388, "block", "cluster of 2"),
    (torch.float32, 32768, "block", "cluster of 2"),
    (torch.bfloat16, 32768, "block", "block"),
    (torch.float32, 32772, "stream", "cluster of 4"),
    (torch.bfloat16, 65544, "stream", "cluster of 4"),
    (torch.float32, 128256, "stream", "cluster of 8"),
    (torch.float32, 262144, "stream", "cluster of 8"),
    (torch.float32, 262148, "stream", "stream"),
    (torch.bfloat16, 524288, "stream", "cluster of 8"),
    (torch.float64, 65, "stream", "stream"),
]

# Row lengths that reach every kernel, whole chunks of 16 bytes or not.
LENGTHS = [1, 10, 63, 64, 65, 257, 1000, 1024, 1027, 2051, 16384, 16391, 33000, 140001, 262144, 262151]
OPTIONS = [{}, {"label_smoothing": 0.1, "softcap": 20.0, "z_loss": 1e-3}]


@pytest.fixture(params=CAPABILITIES, ids=lambda capability: f"{capability // 10}.{capability % 10}")
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    device = request.config.getoption("--device")
    if device == "emulated":
        monkeypatch.setenv("SOFTMAX_EXT_EMULATED_CAPABILITY", str(request.param))
    elif (torch.cuda.get_device_capability() >= (9, 0)) != (request.param >= 90):
        pytest.skip("the card is of another kind")
    return request.param


@pytest.fixture
def kernel_for(request: pytest.FixtureRequest) -> Callable[[int, torch.dtype], str]:
    if request.config.getoption("--device") == "cuda":
        return lambda classes, dtype: cuda.kernel_for(classes, dtype, torch.cuda.current_device())
    from cuda_on_cpu import build

    library = ctypes.CDLL(str(build.build("libemulated.so", request.config.getoption("--sanitized"))))
    library.softmax_ext_cuda_kernel_for.restype = ctypes.c_char_p
    library.softmax_ext_cuda_kernel_for.argtypes = [ctypes.c_int64, ctypes.c_int32]
    return lambda classes, dtype: library.softmax_ext_cuda_kernel_for(classes, oracle.DTYPES.index(dtype)).decode()


@pytest.mark.parametrize(("dtype", "classes", "without", "with_clusters"), CHOICES, ids=str)
def test_choice(capability, kernel_for, dtype, classes, without, with_clusters):
    assert kernel_for(classes, dtype) == (with_clusters if capability >= 90 else without)


@pytest.mark.devices("emulated")
def test_clusters_only_in_code_that_has_them(kernel_for, monkeypatch):
    """A card of 9.0 that runs the PTX of 8.0, in which kernels for clusters do nothing."""
    monkeypatch.setenv("SOFTMAX_EXT_EMULATED_CAPABILITY", "90")
    monkeypatch.setenv("SOFTMAX_EXT_EMULATED_CODE", "80")
    assert [kernel_for(classes, torch.float32) for classes in (16388, 128256)] == ["block", "stream"]


def askew(values: torch.Tensor, skip: int) -> torch.Tensor:
    """Rows that follow each other without a gap, `skip` elements behind a multiple of 16 bytes."""
    memory = values.new_zeros(values.numel() + skip)
    placed = memory[skip:].view(values.shape)
    placed.copy_(values)
    return placed


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "options"])
@pytest.mark.parametrize("classes", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy(capability, device, dtype, classes, options, skip):
    rows = 2 if classes > 3000 else 9
    values = 3 * torch.randn(rows, classes, dtype=torch.float64)
    target = oracle.make_target("int64", (rows, classes), dtype).to(device)
    values[1, target[1]] = math.log(classes) + 10  # a probability near 1, whose gradient shows a wrong logit
    values = values.to(dtype).to(device)
    if classes > 1:
        target[0] = -100
    upstream = torch.ones((), dtype=dtype, device=device)
    bounds = bounds_for(values, target, None, upstream, **options)
    for flags in itertools.product([False, True], repeat=2):
        strategy = Strategy(*flags, scaled=False)
        results = run(askew(values, skip), target, None, upstream, strategy, **options)
        check(bounds, strategy, results, (classes, strategy))


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("classes", [10, 65, 1000, 1027, 16391, 70001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmax(capability, device, dtype, classes, log):
    values = (3 * torch.randn(3, classes, dtype=torch.float64)).to(dtype).to(device)
    x = askew(values, 1).requires_grad_()
    upstream = torch.randn(3, classes, dtype=torch.float64).to(dtype).to(device)
    y = (log_softmax if log else softmax)(x, 1)
    (grad,) = torch.autograd.grad(y, x, askew(upstream, 2))
    exact, exact_grad = oracle.softmax(values, 1, log, upstream)
    oracle.assert_within(y, exact, oracle.softmax_tolerance(exact, 1, log, dtype), "output")
    allowed = oracle.softmax_grad_tolerance(exact, exact_grad, upstream, 1, log, dtype)
    oracle.assert_within(grad, exact_grad, allowed, "gradient")


@pytest.mark.devices("emulated")
@pytest.mark.parametrize("skip", [0, 1])
def test_a_class_beside_the_border_of_two_parts(skip, device, monkeypatch):
    """Of a row that the blocks of a backward share; each class has its gradient from one of them."""
    monkeypatch.setenv("SOFTMAX_EXT_EMULATED_MULTIPROCESSORS", "1000")
    classes = 1040  # 520 chunks of 16 bytes for blocks of 512 threads
    target = torch.arange(classes // 2 - 20, classes // 2 + 20, device=device)
    x = askew(torch.randn(len(target), classes, dtype=torch.float64, device=device), skip).requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(x, target, reduction="sum"), x)
    exact = oracle.cross_entropy(x.detach(), target, reduction="sum").grad
    scale = oracle.gradient_scale(exact, target, None, reduction="sum")
    oracle.assert_within(grad, exact, oracle.tolerance("grad", exact, torch.float64, scale=scale), "gradient")
