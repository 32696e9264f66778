"""More than 2^31 logits, a row of 10^8 classes, 10^7 rows of two.

    pytest --large tests/stress/test_size.py

A row has the same bits wherever it stands: so all rows of the large call are compared, bit for bit, with calls on a
thousand rows, and some rows, those about the 2^31st element among them, with float64.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import oracle
import pytest
import torch
from torch import Tensor

from softmax_ext import cross_entropy, log_softmax, softmax

pytestmark = [pytest.mark.large, pytest.mark.devices("cpu"), pytest.mark.timeout(1200)]

ROWS, CLASSES, CHUNK = 17_000, 128_256, 1000
assert ROWS * CLASSES > 2**31
# The rows where 31 bits of an offset end, if rows are contiguous; their neighbours, the first and the last.
SAMPLED = [0, 2**31 // CLASSES - 1, 2**31 // CLASSES, 2**31 // CLASSES + 1, ROWS - 1]


def needs(gib: float) -> None:
    """Fails rather than let the system end some process."""
    available = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) / 2**20
    assert available > gib, f"{gib} GiB of memory are needed, and {available:.1f} available"


# ---- more than 2^31 elements -----------------------------------------------------------------------------------------

Layout = Callable[[], Tensor]

# Both [ROWS, CLASSES]; in the second the classes are 34 KB apart.
LAYOUTS: dict[str, Layout] = {
    "rows": lambda: torch.empty(ROWS, CLASSES, dtype=torch.bfloat16),
    "columns": lambda: torch.empty(CLASSES, ROWS, dtype=torch.bfloat16).t(),
}


def chunks() -> Iterator[slice]:
    return (slice(begin, begin + CHUNK) for begin in range(0, ROWS, CHUNK))


@pytest.fixture(scope="module")
def drawn() -> Tensor:
    return 3 * torch.randn(CHUNK, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def target() -> Tensor:
    y = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))
    y[::7], y[1], y[-1] = -100, 0, CLASSES - 1
    return y


def rows_of(drawn: Tensor, part: slice, like: Tensor) -> Tensor:
    """The logits of a chunk in the layout of ``like``: the drawn ones, for each chunk scaled otherwise."""
    values = drawn * (1 + part.start / ROWS)
    return values if like.stride(1) == 1 else values.t().contiguous().t()


def filled(layout: Layout, drawn: Tensor) -> Tensor:
    logits = layout()
    for part in chunks():
        logits[part] = rows_of(drawn, part, logits)
    return logits


def gradient_of(logits: Tensor, target: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
    """(loss of each row, gradient of the logits) for an upstream gradient of 1."""
    leaf = torch.zeros((), dtype=logits.dtype).requires_grad_()
    x = Written.apply(leaf, logits) if options.get("inplace") else logits.detach().requires_grad_()
    loss = cross_entropy(x, target, reduction="none", **options)
    (gradient,) = torch.autograd.grad(loss, x, torch.ones((), dtype=loss.dtype).expand_as(loss))
    return loss.detach(), gradient


class Written(torch.autograd.Function):
    """(leaf, values) -> the same memory as a tensor that has been computed from the leaf, without another copy."""

    @staticmethod
    def forward(ctx: object, leaf: Tensor, values: Tensor) -> Tensor:
        return values.new_empty(0).set_(values.untyped_storage(), 0, values.shape, values.stride())

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[None, None]:
        return None, None


def assert_rows_exact(logits: Tensor, target: Tensor, loss: Tensor, gradient: Tensor) -> None:
    exact = oracle.cross_entropy(logits, target, reduction="none")
    oracle.assert_within(loss, exact.loss, oracle.tolerance("loss", exact.loss, logits.dtype), "loss")
    scale = oracle.gradient_scale(exact.grad, target, None, reduction="none")
    oracle.assert_within(gradient, exact.grad, oracle.tolerance("grad", exact.grad, logits.dtype, scale=scale), "grad")


STRATEGIES = {
    "inplace": {"inplace": True},
    "precompute_grad inplace": {"precompute_grad": True, "inplace": True},
    "default": {},  # which takes the gradient besides
}


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy_beyond_31_bits(layout, options, drawn, target):
    needs(7 if options else 12)
    logits = filled(LAYOUTS[layout], drawn)
    loss, gradient = gradient_of(logits, target, **options)
    assert gradient.stride() == logits.stride()
    assert (gradient.data_ptr() == logits.data_ptr()) == bool(options)
    del logits
    for part in chunks():
        of_chunk = rows_of(drawn, part, gradient)
        chunk_loss, chunk_gradient = gradient_of(of_chunk.clone(), target[part], **options)
        assert torch.equal(loss[part], chunk_loss), part
        assert torch.equal(gradient[part], chunk_gradient), part
        some = [row - part.start for row in SAMPLED if row in range(part.start, part.stop)]
        if some:
            assert_rows_exact(of_chunk[some], target[part][some], chunk_loss[some], chunk_gradient[some])


@pytest.mark.parametrize("function", [softmax, log_softmax])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_softmax_beyond_31_bits(layout, function, drawn):
    """And its backward, for an upstream gradient that is the same for every row."""
    needs(15)
    logits = filled(LAYOUTS[layout], drawn).requires_grad_()
    y = function(logits, 1)
    upstream = torch.randn(CLASSES, dtype=torch.bfloat16)
    for part in chunks():
        assert torch.equal(y[part], function(rows_of(drawn, part, y), 1)), part
    (gradient,) = torch.autograd.grad(y, logits, upstream.expand_as(y))
    del y, logits
    for part in chunks():
        x = rows_of(drawn, part, gradient).requires_grad_()
        (of_chunk,) = torch.autograd.grad(function(x, 1), x, upstream.expand_as(x))
        assert torch.equal(gradient[part], of_chunk), part


# ---- one row of 10^8 classes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
def test_a_row_of_1e8_classes(options):
    """Every value of the gradient, to its own size."""
    needs(8)
    classes, y = 10**8, 99_999_999
    x = torch.randn(1, classes)
    x[0, y] = 12
    target = torch.tensor([y])
    exact = oracle.cross_entropy(x, target, reduction="none")
    probability = exact.grad.clone()
    probability[0, y] += 1
    allowed = oracle.softmax_tolerance(probability, 1, False, x.dtype)
    if not options:
        oracle.assert_within(softmax(x, 1), probability, allowed, "p")
    allowed[0, y] = oracle.tolerance("grad", exact.grad[0, y], x.dtype)
    del probability
    loss, gradient = gradient_of(x, target, **options)
    oracle.assert_within(loss, exact.loss, oracle.tolerance("loss", exact.loss, x.dtype), "loss")
    oracle.assert_within(gradient, exact.grad, allowed, "grad")


# ---- 10^7 rows of two ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("transposed", [False, True])
def test_1e7_rows_of_two_classes(transposed, options):
    """Every row, and the mean of all, against log(1 + exp(z_other - z_y)): unlike the oracle's it is exact where tiny.

    Logits are less than 16 apart: what their difference is rounded by in float32 is within the tolerance there.
    """
    needs(4)
    rows = 10**7
    x = 2 * (torch.randn(2, rows).t() if transposed else torch.randn(rows, 2))
    target = torch.randint(0, 2, (rows,))
    target[::7] = -100
    live, second = (target != -100).double(), target == 1
    distance = x[:, 1].double() - x[:, 0].double()
    distance = torch.where(second, -distance, distance)
    exact = distance.exp().log1p() * live
    slope = torch.where(second, -1.0, 1.0) * distance.sigmoid() * live
    exact_gradient = torch.stack([-slope, slope], 1)
    mean = exact.sum() / live.sum()
    oracle.assert_within(cross_entropy(x, target), mean, oracle.tolerance("loss", mean, x.dtype), "mean")
    loss, gradient = gradient_of(x, target, **options)
    oracle.assert_within(loss, exact, oracle.tolerance("loss", exact, x.dtype), "loss")
    allowed = oracle.tolerance("grad", exact_gradient, x.dtype)
    oracle.assert_within(gradient, exact_gradient, allowed, "grad")
