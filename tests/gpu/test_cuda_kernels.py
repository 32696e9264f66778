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
from cross_entropy_checks import Strategy, bounds_for, check, run
from torch import Tensor

from softmax_ext import cross_entropy, cuda, log_softmax, softmax

pytestmark = pytest.mark.devices("cuda", "emulated")

CAPABILITIES = [75, 90]

# The kernel for rows of so many classes: (dtype, classes, without clusters, with clusters). A row's last length in each
# kernel, and the first in the next.
CHOICES = [
    (torch.float32, 64, "thread", "thread"),
    (torch.float32, 65, "warp", "warp"),
    (torch.float32, 1024, "warp", "warp"),
    (torch.bfloat16, 65, "warp", "warp"),
    (torch.bfloat16, 2048, "warp", "warp"),
    (torch.float32, 1028, "block", "block"),
    (torch.bfloat16, 2056, "block", "block"),
    (torch.float32, 32768, "block", "block"),
    (torch.bfloat16, 65536, "block", "block"),
    (torch.float32, 32772, "stream", "cluster of 8"),
    (torch.bfloat16, 65544, "stream", "cluster of 8"),
    (torch.float32, 131072, "stream", "cluster of 8"),
    (torch.bfloat16, 262144, "stream", "cluster of 8"),
    (torch.float32, 131076, "stream", "stream"),
    (torch.float64, 64, "lanes", "lanes"),
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
def emulated(request: pytest.FixtureRequest) -> ctypes.CDLL | None:
    """The library of the emulator, if that is what runs."""
    if request.config.getoption("--device") == "cuda":
        return None
    import emulator

    return ctypes.CDLL(str(emulator.build("libemulated.so", request.config.getoption("--sanitized"))))


@pytest.fixture
def kernel_for(emulated: ctypes.CDLL | None) -> Callable[[int, torch.dtype], str]:
    library = emulated
    if library is None:
        return lambda classes, dtype: cuda.kernel_for(classes, dtype, torch.cuda.current_device())
    library.softmax_ext_cuda_kernel_for.restype = ctypes.c_char_p
    library.softmax_ext_cuda_kernel_for.argtypes = [ctypes.c_int64, ctypes.c_int32]
    return lambda classes, dtype: library.softmax_ext_cuda_kernel_for(classes, oracle.DTYPES.index(dtype)).decode()


@pytest.mark.parametrize(("dtype", "classes", "without", "with_clusters"), CHOICES, ids=str)
def test_choice(capability, kernel_for, dtype, classes, without, with_clusters):
    """Where the gradient is written in forward."""
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


def check_strategies(logits: Callable[[], Tensor], target: Tensor, upstream: Tensor, options: dict[str, float]) -> None:
    """Each on logits of its own, since some overwrite them."""
    bounds = bounds_for(logits(), target, None, upstream, **options)
    for flags in itertools.product([False, True], repeat=2):
        strategy = Strategy(*flags, scaled=False)
        check(bounds, strategy, run(logits(), target, None, upstream, strategy, **options), strategy)


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
    check_strategies(lambda: askew(values, skip), target, upstream, options)


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


# ---- launches --------------------------------------------------------------------------------------------------------

# Kernels of (forward, backward) by rows, reduction and whether the gradient is written in forward. Losses are summed
# by the kernel that computes them. The mean's denominator, for a gradient that is to be divided by it, takes one kernel
# more, and two for more than 16384 rows.
LAUNCHES = {
    (20, "none", False): (1, 1),
    (20, "sum", False): (1, 1),
    (20, "mean", False): (1, 1),
    (20, "none", True): (1, 1),
    (20, "sum", True): (1, 1),
    (20, "mean", True): (2, 1),
    (17000, "mean", False): (1, 1),
    (17000, "mean", True): (3, 1),
}


@pytest.fixture
def launches(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The kernels launched so far."""
    emulated.emulator_launches.restype = ctypes.c_uint64
    monkeypatch.delenv("SOFTMAX_EXT_CHECK_TARGETS", raising=False)  # the check is a kernel too
    return lambda: int(emulated.emulator_launches())


@pytest.mark.devices("emulated")
@pytest.mark.parametrize("kind", ["int64", "uint8", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "reduction", "precompute"), LAUNCHES, ids=str)
def test_a_call_launches_no_more_kernels_than_it_needs(rows, reduction, precompute, dtype, kind, launches):
    forward, backward = LAUNCHES[rows, reduction, precompute]
    if precompute and reduction == "mean" and kind == "probabilities":
        forward -= 1 if rows == 20 else 2  # the denominator is known, and filled in
    x = torch.randn(rows, 5).to(dtype).requires_grad_()
    target = oracle.make_target(kind, (rows, 5), dtype)
    options = {"weight": oracle.make_weight(5, torch.float32), "reduction": reduction, "precompute_grad": precompute}
    for smoothing in (0.0, 0.1):
        weight_sum = int(smoothing != 0)  # another kernel
        before = launches()
        loss = cross_entropy(x, target, label_smoothing=smoothing, **options)
        between = launches()
        assert between - before == forward + weight_sum
        loss.sum().backward()
        assert launches() - between == backward + (weight_sum if not precompute else 0)


@pytest.mark.parametrize("classes", [60, 1000, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_prediction_among_the_lowest_logits(scale, dtype, classes, device):
    """The lowest finite number is what a maximum begins with."""
    x = torch.full((2, classes), -math.inf, dtype=dtype, device=device)
    x[:, classes // 2 + 3] = torch.finfo(dtype).min
    target = torch.zeros(2, dtype=torch.int64, device=device)
    stats = cross_entropy(x, target, logit_scale=scale, return_stats=True)[1]
    assert stats.prediction.tolist() == x.argmax(1).tolist()


@pytest.mark.parametrize("precompute", [False, True])
def test_a_mean_without_classes_is_nan(precompute, device):
    x = torch.randn(2, 0, device=device, requires_grad=True)
    assert cross_entropy(x, torch.rand(2, 0, device=device), precompute_grad=precompute).isnan()


@pytest.mark.parametrize("skip", range(4))
def test_weights_at_any_address(skip, device):
    x, q = torch.randn(7, 200, device=device), torch.rand(7, 200, device=device)
    weight = torch.rand(204, device=device)[skip : skip + 200]
    loss = cross_entropy(x, q, weight, label_smoothing=0.1)
    exact = oracle.cross_entropy(x, q, weight, label_smoothing=0.1).loss
    oracle.assert_within(loss, exact, oracle.tolerance("loss", exact, torch.float32), skip)


@pytest.mark.parametrize("shape", [(1024, 1028), (4096, 70), (1, 65, 1024), (1022, 129)], ids=str)
def test_a_total_of_as_many_rows_as_groups_can_have(shape, device):
    """A power of 4, where a row more would have groups twice as large: the memory for it is asked for beforehand."""
    x = torch.randn(shape, device=device)
    target = oracle.make_target("int64", shape, torch.float32).to(device)
    losses = cross_entropy(x, target, reduction="none").double()
    for reduction in ("sum", "mean"):
        exact = getattr(losses, reduction)()
        torch.testing.assert_close(cross_entropy(x, target, reduction=reduction).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 31, 1025, 8192, 8193, 20000])
def test_sums_over_rows(rows, dtype, device):
    """The mean's two sums, in one group of units or many; backward reads the denominator."""
    x = torch.randn(rows, 3, dtype=torch.float64).to(dtype).to(device).requires_grad_()
    target = oracle.make_target("int64", (rows, 3), dtype).to(device)
    if rows > 1:
        target[::7] = -100
    for weight in (None, oracle.make_weight(3, dtype).to(device)):
        for reduction, precompute in itertools.product(["mean", "sum"], [False, True]):
            options = {"reduction": reduction, "weight": weight}
            loss = cross_entropy(x, target, precompute_grad=precompute, **options)
            (grad,) = torch.autograd.grad(loss, x)
            exact = oracle.cross_entropy(x.detach(), target, **options)
            scale = oracle.gradient_scale(exact.grad, target, weight, reduction=reduction)
            roundings = oracle.gradient_roundings(dtype, precompute)
            allowed = oracle.tolerance("grad", exact.grad, dtype, scale=scale, roundings=roundings)
            oracle.assert_within(loss, exact.loss, oracle.tolerance("loss", exact.loss, dtype), options)
            oracle.assert_within(grad, exact.grad, allowed, options)


# ---- classes apart, and few of them ----------------------------------------------------------------------------------

# (batch, classes, positions) around what tiles and columns are cut into; 16 bytes begin with each class or not. Of few
# classes a thread takes several rows where the device has few multiprocessors.
APART = [(1, 10, 7168), (3, 21, 132), (2, 21, 133), (1, 4, 30000), (1, 3, 30000), (2, 64, 40), (1, 65, 33)]
APART += [(2, 97, 64), (1, 256, 32), (1, 257, 31), (1, 1000, 40), (1, 3000, 5)]


@pytest.mark.devices("emulated")
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "options"])
@pytest.mark.parametrize("adjacent", [False, True], ids=["apart", "adjacent"])
@pytest.mark.parametrize("shape", APART, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_and_columns(dtype, shape, adjacent, options, device, monkeypatch):
    monkeypatch.setenv("SOFTMAX_EXT_EMULATED_MULTIPROCESSORS", "1")
    classes = shape[1]
    if adjacent and classes > 64:
        pytest.skip("are rows then, tested above")
    values = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device)
    target = oracle.make_target("int64", shape, dtype).to(device)
    target[:, ::5] = -100
    if adjacent:
        values, target = values.movedim(1, 2).reshape(-1, classes).contiguous(), target.reshape(-1)
    upstream = torch.ones((), dtype=dtype, device=device)
    check_strategies(values.clone, target, upstream, options)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", [(1, 10, 300), (3, 21, 132), (1, 65, 33), (1, 300, 40), (1, 2000, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmax_of_classes_apart(dtype, shape, log, device):
    """The gradient comes with its own strides."""
    values = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device)
    for upstream in (torch.randn(shape), torch.randn(shape[0], *shape[:0:-1]).movedim(1, 2)):
        g = upstream.to(dtype).to(device)
        x = values.clone().requires_grad_()
        y = (log_softmax if log else softmax)(x, 1)
        (grad,) = torch.autograd.grad(y, x, g)
        exact, exact_grad = oracle.softmax(values, 1, log, g)
        oracle.assert_within(y, exact, oracle.softmax_tolerance(exact, 1, log, dtype), "output")
        allowed = oracle.softmax_grad_tolerance(exact, exact_grad, g, 1, log, dtype)
        oracle.assert_within(grad, exact_grad, allowed, "gradient")
