"""The plans of linear cross entropy: which one is chosen, what memory each takes, and that each computes the same."""

import gc
import math
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from linear_checks import LARGE, NAMES, both, limits_for, operands
from processes import started
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softmax_ext import (
    LinearCrossEntropyLoss,
    LinearPlan,
    cross_entropy,
    linear_cross_entropy,
    linear_ops,
    linear_plan,
    plans,
)

MIB = 1 << 20
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


# ---- which plan ----


def test_the_plan_of_each_dtype():
    """Up to twice as many rows as features the float32 sum of rows is larger than all logits in bfloat16."""
    for rows, name in ((1024, "whole"), (2048, "whole"), (2064, "rows")):
        assert linear_plan(rows, 1024, 32000, torch.bfloat16).name == name
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert linear_plan(128, 1024, 32000, dtype).name == "whole", "one chunk"
        assert linear_plan(2048, 1024, 32000, dtype).name == "rows"
    assert linear_plan(8192, 4096, 128256, torch.bfloat16, device="cuda").name == "whole"
    assert linear_plan(32768, 2048, 50257, torch.bfloat16, device="cuda").name == "rows"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_takes_no_more_than_rows(dtype, device):
    for rows in (1, 100, 1000, 3000, 20000):
        for features, classes in ((64, 50000), (1024, 32000), (4096, 128256), (2048, 1000)):
            default = linear_plan(rows, features, classes, dtype, device=device)
            chunk = plans.default_chunk_rows(rows, classes * dtype.itemsize, device)
            small = linear_plan(rows, features, classes, dtype, chunk_rows=chunk, device=device)
            assert default.bytes <= small.bytes
            assert default.chunk >= small.chunk
            if dtype.itemsize >= 4:
                assert default[1:] == small[1:], "no sum, so that larger chunks would take more"


def test_chunks_are_larger_where_the_sum_leaves_room():
    """To convert the sum takes as much as the logits of as many rows as there are features."""
    plan = linear_plan(4096, 1024, 128256, torch.bfloat16)
    assert plan.name == "rows"
    assert 1008 <= plan.chunk <= 1024
    assert plan.bytes == 4 * 1024 * 128256


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_budget(dtype):
    size = (4096, 256, 10000, dtype)
    whole = linear_plan(*size, memory=LARGE)
    assert (whole.name, whole.chunk, whole.chunks) == ("whole", 4096, 1)
    assert linear_plan(*size, memory=whole.bytes) == whole
    last = whole
    names = {"whole"}
    for budget in (int(whole.bytes * 0.8**i) for i in range(1, 40)):
        try:
            plan = linear_plan(*size, memory=budget)
        except ValueError:
            break
        names.add(plan.name)
        assert plan.bytes <= budget
        if plan.chunk >= 128:
            assert plan.products >= last.products - 0.02, "less memory is no faster"
        if plan.name == "rows":
            assert plan.chunks == math.ceil(4096 / plan.chunk)
            more = linear_plan(*size, chunk_rows=plan.chunk + 16)
            assert more.bytes > budget or plan.chunk == 512, "the largest that fits, or the most that is of use"
        else:
            assert plan.products == pytest.approx(4 - plan.kept * plan.chunk / 10000, abs=0.1)
            assert plan.kept == 1 or plan.chunk >= 1024, "more chunks only where each is large enough"
        last = plan
    sums_weight = dtype == torch.float16  # in every plan but whole's, and then rows fits as well
    assert names == ({"whole", "rows"} if sums_weight else {"whole", "rows", "classes"})


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_least_budget_is_named(dtype):
    size = (300, 64, 5000, dtype)
    with pytest.raises(
        ValueError, match=r"linear_cross_entropy: memory must be at least \d+ bytes here; got 5\."
    ) as at:
        linear_plan(*size, memory=5)
    least = int(str(at.value).split()[6])
    assert linear_plan(*size, memory=least).bytes <= least
    assert least <= linear_plan(*size, chunk_rows=1).bytes
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        linear_plan(*size, memory=least - 1)
    x, w, y = operands(*size)
    assert linear_cross_entropy(x, w, y, memory=least).isfinite()
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        linear_cross_entropy(x, w, y, memory=least - 1)


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"return_stats": True}], ids=["none", "stats"])
def test_a_budget_that_only_the_backward_exceeds_is_refused_at_once(options):
    x, w, y = operands(300, 64, 5000, torch.bfloat16)
    with pytest.raises(ValueError, match="memory must be at least"):
        linear_cross_entropy(x, w, y, memory=50_000, **options)
    with torch.no_grad():
        linear_cross_entropy(x, w, y, memory=50_000, **options)


def test_sizes_of_nothing():
    assert linear_plan(0, 4, 5, torch.float32) == LinearPlan("whole", 1, 0, 1, 3, 0)
    assert linear_plan(3, 0, 5, torch.bfloat16, memory=30).bytes == 30
    assert linear_plan(3, 4, 0, torch.float16, chunk_rows=2)[:3] == ("rows", 2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((2.0, 4, 5, torch.float32), TypeError, "rows must be an int; got 2.0"),
        ((2, True, 5, torch.float32), TypeError, "in_features must be an int; got True"),
        ((2, 4, -5, torch.float32), ValueError, "num_classes must not be negative; got -5"),
        ((2, 4, 5, "bfloat16"), TypeError, "dtype must be a torch.dtype; got 'bfloat16'"),
        ((2, 4, 5, torch.int64), NotImplementedError, "dtype must be float64"),
        ((2, 4, 5, None), TypeError, "dtype must be a torch.dtype; got None"),
    ],
)
def test_errors_of_linear_plan(arguments, error, text):
    with pytest.raises(error, match=f"linear_plan: {text}"):
        linear_plan(*arguments)


@pytest.mark.parametrize(
    ("limits", "error", "text"),
    [
        ({"memory": 1e9}, TypeError, "memory must be an int"),
        ({"memory": True}, TypeError, "memory must be an int"),
        ({"memory": -1}, ValueError, "memory must not be negative"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1"),
        ({"memory": LARGE, "chunk_rows": 3}, ValueError, "memory must be None with chunk_rows"),
    ],
)
def test_errors_of_limits(limits, error, text):
    with pytest.raises(error, match=f"linear_plan: {text}"):
        linear_plan(2, 4, 5, torch.float32, **limits)
    with pytest.raises(error, match=f"linear_cross_entropy: {text}"):
        LinearCrossEntropyLoss(4, 5, **limits)(torch.ones(2, 4), torch.tensor([0, 1]))


# ---- what it takes ----


class Footprint(TorchDispatchMode):
    """The most bytes in tensors that were made meanwhile; the matrix products, and the multiplications in them."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in given}
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.products = self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.given:
                storage = tensor.untyped_storage()
                self.living[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.living = {key: value for key, value in self.living.items() if not value[0].expired()}
        name = func.overloadpacket.__name__
        copy = 0
        if name == "add_" and args[1].dtype != args[0].dtype:  # torch copies the second in the dtype of the first
            copy = args[1].numel() * args[0].element_size()
        self.peak = max(self.peak, sum(size for _, size in self.living.values()) + copy)
        self.products += name in ("mm", "addmm", "addmm_", "_linear_pointwise")
        if name in ("mm", "addmm", "addmm_"):
            a, b = [t for t in args if isinstance(t, Tensor)][-2:]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        elif name == "_linear_pointwise":
            self.multiplications += args[0].numel() * args[1].shape[0]
        return result


def footprint(x: Tensor, w: Tensor, y: Tensor, **options: Any) -> Footprint:
    """That of a training step, as a mode sees it that looks into the operators."""
    x.grad = w.grad = None
    gc.collect()
    with pytest.MonkeyPatch.context() as patch, Footprint(x, w, y) as seen:
        patch.setattr(linear_ops, "forward", linear_ops._forward)
        patch.setattr(linear_ops, "backward", linear_ops._backward)
        linear_cross_entropy(x, w, y, **options).sum().backward()
    return seen


SIZES = [(512, 64, 8192), (2048, 256, 8000), (1024, 512, 4096), (2500, 128, 4000), (300, 768, 2000), (64, 1024, 3000)]


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("limits", [{}, {"chunk_rows": 112}, {"memory": LARGE}, {"memory": 2}, {"memory": 8}], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_of_a_plan(dtype, size, limits):
    """Within 5 %, also where the sum of dW is larger than the logits; and the products of a step."""
    if limits.get("memory", LARGE) < LARGE:  # a part of what "whole" takes
        whole = linear_plan(*size, dtype, memory=LARGE).bytes
        least = linear_plan(*size, dtype, chunk_rows=1).bytes
        limits = {"memory": max(least, whole // limits["memory"])}
    plan = linear_plan(*size, dtype, **limits)
    x, w, y = operands(*size, dtype)
    seen = footprint(x, w, y, **limits)
    gradients = (x.numel() + w.numel()) * dtype.itemsize
    assert seen.peak - gradients == pytest.approx(plan.bytes, rel=0.05)
    assert seen.multiplications == pytest.approx(plan.products * math.prod(size), rel=0.002)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=["mean", "none"])
@pytest.mark.parametrize("share", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_classes_with_a_large_input(dtype, share, options):
    """The sum of dX is converted after the logits are gone."""
    size = (3000, 1024, 9000)
    memory = linear_plan(*size, dtype, memory=LARGE).bytes // share
    plan = plans._classes_plan(plans.Problem(*size, dtype, "cpu"), memory)
    tensors = operands(*size, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "choose", lambda problem, limits: plan)
        seen = footprint(*tensors, **options)
    gradients = sum(t.numel() for t in tensors[:2]) * dtype.itemsize
    assert seen.peak - gradients == pytest.approx(plan.bytes, rel=0.05)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("ignored", [0.01, 0.3, 0.95])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}], ids=["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_of_rows_that_count_are_within_the_budget(dtype, options, ignored):
    for size in ((2048, 256, 4000), (1000, 512, 1000)):
        x, w, y = operands(*size, dtype)
        y[: int(ignored * len(y))] = -100
        small = linear_plan(*size, dtype, chunk_rows=1).bytes + 2 * size[0] * size[1] * 4
        for limits in ({}, {"memory": LARGE}, {"chunk_rows": 112}, {"memory": small}):
            budget = linear_plan(*size, dtype, **limits).bytes
            seen = footprint(x, w, y, **limits, **options)
            gradients = (x.numel() + w.numel()) * dtype.itemsize
            rows = int((y != -100).sum())
            plan = linear_plan(*size, dtype, **limits)
            if plan.name == "rows":  # a chunk at a time, within a budget
                rows = 0 if "memory" in limits else min(rows, plan.chunk)
            assert seen.peak - gradients <= 1.05 * budget + rows * size[1] * (dtype.itemsize + 4)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("limits", [{}, {"chunk_rows": 64}, {"memory": 30000}], ids=str)
def test_a_few_classes_and_one_ignored_row(limits):
    """A copy of a row of the input is larger than its logits; chunks of single rows would be slow."""
    x, w, y = operands(1000, 512, 10, torch.float32)
    plan = linear_plan(1000, 512, 10, torch.float32, **limits)
    assert plan.name == "rows"
    seen = footprint(x, w, y, **limits)
    y[3] = -100
    with_copies = footprint(x, w, y, **limits)
    assert with_copies.products <= seen.products * (plan.chunk / 16 if "memory" in limits else 1)


# ---- the same results ----

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.01},
    "none": {"reduction": "none", "softcap": 5.0, "logit_scale": 1.3},
    "weights": {"weight": torch.rand(97, dtype=torch.float64), "label_smoothing": 0.2},
    "denominator": {"denominator": 7.0},
}


@pytest.mark.parametrize("target", ["classes", "ignored", "few ignored", "all ignored", "probabilities"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_plan(name, options, bias, target):
    size = (24, 16, 97)
    x, w, y = operands(*size, torch.float64)
    selected = limits_for(name, size, torch.float64)
    if target == "probabilities":
        y = torch.rand(24, 97, dtype=torch.float64).softmax(1)
    elif target != "classes":
        y[: {"few ignored": 2, "ignored": 15, "all ignored": 24}[target]] = -100
    leaves = (x, w) + ((torch.randn(97, dtype=torch.float64, requires_grad=True),) if bias else ())
    ours = both(lambda x, w, b=None: linear_cross_entropy(x, w, y, linear_bias=b, **selected, **options), *leaves)
    theirs = both(lambda x, w, b=None: cross_entropy(F.linear(x, w, b), y, **options), *leaves)
    assert_close(ours, theirs, equal_nan=True)  # a mean over nothing
    if options.keys() <= {"reduction", "label_smoothing", "weight"}:
        torchs = both(lambda x, w, b=None: F.cross_entropy(F.linear(x, w, b), y, **options), *leaves)
        assert_close(ours[0], torchs[0], equal_nan=True)
        if target != "all ignored":  # torch has NaN where the mean is over nothing
            assert_close(ours, torchs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_statistics(name, dtype):
    x, w, y = operands(24, 16, 97, dtype)
    selected = limits_for(name, (24, 16, 97), dtype)
    y[::4] = -100

    def total(results: Any) -> Tensor:
        loss, stats = results
        return loss + (stats.lse.sin() + stats.nll.square() + 3 * stats.entropy).sum()

    ours = both(lambda x, w: total(linear_cross_entropy(x, w, y, return_stats=True, **selected)), x, w)

    def by_logits(x: Tensor, w: Tensor) -> Tensor:
        loss, stats = cross_entropy(F.linear(x, w), y, return_stats=True)
        return total((loss, oracle.of_live_rows(stats, y)))

    theirs = both(by_logits, x, w)
    assert_close(ours, theirs, **({} if dtype == torch.float64 else {"rtol": 0.03, "atol": 0.2}))


@pytest.mark.parametrize("name", NAMES)
def test_further_dimensions_and_long_logits_with_ignored_rows(name):
    """Forward leaves out the ignored rows, whose state is then 0, where the backward may not: a half type's plans."""
    x = (30 * torch.randn(24, 8)).bfloat16().requires_grad_()
    w = torch.randn(80, 3, 8).bfloat16().requires_grad_()
    y = torch.randint(0, 80, (24, 3))
    y[5] = y[17] = -100
    y[20:23, 1] = -100
    selected = limits_for(name, (24, 8, 80), torch.bfloat16, positions=3)
    for reduction in ("none", "mean"):
        loss = linear_cross_entropy(x, w, y, reduction=reduction, **selected)
        of_x, of_w = torch.autograd.grad(loss.sum(), (x, w))
        assert not of_x[5].any()
        assert not of_x[17].any()
        xd, wd = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
        logits = torch.einsum("nd,ckd->nck", xd, wd)
        right = torch.autograd.grad(F.cross_entropy(logits, y, reduction=reduction).sum(), (xd, wd))
        for ours, expected in zip((of_x, of_w), right, strict=True):
            assert (ours.double() - expected).norm() <= 0.05 * expected.norm()


def errors(size: tuple[int, int, int], dtype: torch.dtype, scale: float, upstream: float, **limits: Any) -> list[float]:
    """Of dX and dW: the root mean square error by that of torch's whole logits."""
    torch.manual_seed(0)
    x, w, y = operands(*size, dtype, scale)
    up = upstream * (4096 if dtype == torch.float16 else 1)  # float16's usual loss scale

    def gradients(function: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
        loss = function(*leaves)
        return torch.autograd.grad(loss, leaves, torch.tensor(up, dtype=loss.dtype))

    def whole(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    right = gradients(whole, torch.float64)
    ours, theirs = gradients(lambda x, w: linear_cross_entropy(x, w, y, **limits), dtype), gradients(whole, dtype)
    return [
        float((mine.double() - exact).norm() / (other.double() - exact).norm())
        for mine, other, exact in zip(ours, theirs, right, strict=True)
    ]


@pytest.mark.parametrize("upstream", [1.0, 2.0**-7, 3.0])
@pytest.mark.parametrize(
    ("size", "scale"),
    [((300, 64, 1000), 0.1), ((8192, 32, 200), 0.2), ((512, 64, 500), 20.0)],
    ids=["plain", "many rows", "logits up to 640"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["default", *NAMES])
def test_no_less_exact_than_whole_logits(name, dtype, size, scale, upstream):
    """An upstream gradient that is no power of two rounds once more what is bfloat16 already: dX, in whole dW too."""
    if name == "classes" and size[0] > size[2]:
        pytest.skip("not chosen where there are more rows than classes")
    selected = {} if name == "default" else limits_for(name, size, dtype)
    of_input, of_weight = errors(size, dtype, scale, upstream, **selected)
    twice = dtype == torch.bfloat16 and upstream == 3
    assert of_input <= (1.3 if twice else 1.05)
    name = linear_plan(*size, dtype, **selected).name
    assert of_weight <= (1.3 if twice and name != "rows" else 1.05)


def test_classes_of_many_positions():
    """A chunk has whole classes, with all positions of each."""
    x, w = torch.randn(64, 8), torch.randn(20, 1500, 8)
    y = torch.randint(0, 20, (64, 1500))
    right = F.cross_entropy(torch.einsum("nd,ckd->nck", x, w), y)
    names = set()
    for memory in range(600_000, 8_000_000, 400_000):
        problem = plans.Problem(64, 8, 30000, torch.float32, "cpu", positions=1500)
        plan = plans.choose(problem, plans.Limits(memory=memory))
        names.add((plan.name, plan.kept))
        assert plan.name != "classes" or plan.chunk % 1500 == 0
        assert plan.bytes <= memory
        assert_close(linear_cross_entropy(x, w, y, memory=memory), right)
    assert {name for name, _ in names} >= {"rows", "classes"}
    assert any(kept > 1 for _, kept in names)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_sees_the_logits_of_forward(name, dtype):
    """Bit by bit, as the state is of these: the gradients of a nearly certain row keep their relative precision."""
    size = (60, 40, 3000)
    x = torch.randn(60, 40).to(dtype).requires_grad_()
    w = (torch.randn(3000, 40) / 40).to(dtype)
    y = torch.arange(60) * 47
    w[y] = 30 * F.normalize(x.detach().float()).to(dtype)
    w.requires_grad_()
    q = F.one_hot(y, 3000).to(dtype).requires_grad_()
    y = torch.where(torch.arange(60) % 7 == 0, -100, y)
    selected = limits_for(name, size, dtype)
    for target, stats in ((y, False), (y, True), (q, False)):
        found = linear_cross_entropy(x, w, target, reduction="none", return_stats=stats, **selected)
        loss = found[0] if stats else found
        leaves = (x, w, q) if target is q else (x, w)
        of_x, of_w, *of_q = torch.autograd.grad(loss.sum(), leaves)
        assert of_x.double().norm() < 1e-12, "p - 1 of about -exp(-100)"
        assert of_w.double().norm() < 1e-12
        for gradient in of_q:  # lse - z
            assert gradient[q == 1].abs().max() < 1e-30


# ---- logits in float32 ----


def wide_limits(name: str, size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    limits: dict[str, Any] = limits_for(name, size, dtype) | {"logits_dtype": torch.float32}
    if name == "classes":
        problem = plans.Problem(*size, dtype, "cpu", logits_dtype=torch.float32)
        limits["memory"] = plans._bytes(problem, "classes", size[2] // 7)
    assert linear_plan(*size, dtype, **limits).name == name
    return limits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_logits_lose_nothing(name, dtype):
    """Log-sum-exp and losses as exact as float32's, of operands in half types."""
    size = (40, 64, 3000)
    x, w, y = operands(*size, dtype)
    bias = torch.randn(3000).to(dtype)
    limits = wide_limits(name, size, dtype)
    _, stats = linear_cross_entropy(x, w, y, linear_bias=bias, return_stats=True, reduction="none", **limits)
    loss = linear_cross_entropy(x, w, y, linear_bias=bias, reduction="none", dtype=torch.float32, **limits)
    logits = F.linear(x.double(), w.double(), bias.double())
    lse = logits.logsumexp(1)
    assert (stats.lse.double() - lse).square().mean().sqrt() < 5e-7 * lse.mean()
    assert_close(loss.double(), F.cross_entropy(logits, y, reduction="none"), rtol=2e-6, atol=2e-6)
    rounded = linear_cross_entropy(x, w, y, linear_bias=bias, reduction="none", dtype=torch.float32)
    assert (rounded.double() - F.cross_entropy(logits, y, reduction="none")).abs().max() > 1e-4, "by default it does"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_float32_logits(name, dtype, reduction):
    size = (60, 32, 1000)
    x, w, y = operands(*size, dtype, scale=1.0)
    y[::5] = -100
    b = torch.randn(1000).to(dtype).requires_grad_()
    limits = wide_limits(name, size, dtype)
    ours = both(lambda *p: linear_cross_entropy(*p[:2], y, linear_bias=p[2], reduction=reduction, **limits), x, w, b)
    leaves = [t.detach().double().requires_grad_() for t in (x, w, b)]
    torch.manual_seed(1)
    up = torch.rand_like(ours[0]).double()
    right = F.cross_entropy(F.linear(*leaves), y, reduction=reduction)
    for mine, exact in zip(ours[1:], torch.autograd.grad(right, leaves, up), strict=True):
        assert (mine.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


def test_float32_logits_elsewhere():
    """Second derivatives, forward mode, torch.compile, the module; and float32 operands, for which it says nothing."""
    torch._dynamo.reset()
    x, w, y = operands(20, 16, 97, torch.bfloat16)
    wide = {"logits_dtype": torch.float32, "dtype": torch.float32}

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, y, **wide)

    right = F.cross_entropy(F.linear(x.double(), w.double()), y)
    compiled = torch.compile(lambda x, w: loss(x * 1, w), backend="aot_eager", fullgraph=True)
    for f in (loss, compiled):
        assert_close(f(x, w).double(), right, rtol=1e-6, atol=1e-6)
    assert_close(both(compiled, x, w), both(loss, x, w))
    along = torch.randn_like(x)
    _, slope = torch.func.jvp(lambda x: loss(x, w), (x,), (along,))
    assert_close(slope.double(), (torch.autograd.grad(right, x)[0] * along).double().sum(), rtol=0.02, atol=1e-4)
    (first,) = torch.autograd.grad(loss(x, w), x, create_graph=True)
    (second,) = torch.autograd.grad((first * along).sum(), x)
    xd = x.detach().double().requires_grad_()
    (of_x,) = torch.autograd.grad(F.cross_entropy(F.linear(xd, w.double()), y), xd, create_graph=True)
    (exact,) = torch.autograd.grad((of_x * along).sum(), xd)
    assert (second.double() - exact).norm() <= 0.02 * exact.norm()
    module = LinearCrossEntropyLoss(16, 97, bias=False, dtype=torch.bfloat16, logits_dtype=torch.float32)
    ours = module(x, y)
    expected = F.cross_entropy(F.linear(x.double(), module.linear.weight.double()), y)
    assert_close(ours, expected.to(torch.bfloat16), rtol=0, atol=0)
    xs, ws = x.detach().float(), w.detach().float()
    assert torch.equal(linear_cross_entropy(xs, ws, y, logits_dtype=torch.float32), linear_cross_entropy(xs, ws, y))


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_float32_logits(name):
    size = (512, 512, 8192)
    limits = wide_limits(name, size, torch.bfloat16)
    tensors = operands(*size, torch.bfloat16)
    seen = footprint(*tensors, **limits)
    gradients = 2 * sum(t.numel() for t in tensors[:2])
    assert seen.peak - gradients == pytest.approx(linear_plan(*size, torch.bfloat16, **limits).bytes, rel=0.05)


@pytest.mark.parametrize(
    ("dtype", "given", "error", "text"),
    [
        (torch.bfloat16, torch.float64, ValueError, "logits_dtype must be torch.float32 or None; got torch.float64"),
        (torch.bfloat16, torch.bfloat16, ValueError, "logits_dtype must be torch.float32 or None"),
        (torch.bfloat16, "float32", TypeError, "logits_dtype must be torch.float32 or None; got 'float32'"),
        (torch.float64, torch.float32, ValueError, "logits_dtype must be None with float64 operands"),
    ],
)
def test_errors_of_logits_dtype(dtype, given, error, text):
    x, w, y = operands(4, 3, 5, dtype)
    with pytest.raises(error, match=text):
        linear_cross_entropy(x, w, y, logits_dtype=given)
    with pytest.raises(error, match=text):
        linear_plan(4, 3, 5, dtype, logits_dtype=given)


# ---- what autograd and torch.compile can do ----


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name):
    x, w, y = operands(3, 3, 30, torch.float64)
    selected = limits_for(name, (3, 3, 30), torch.float64)
    assert gradcheck(lambda x, w: linear_cross_entropy(x, w, y, **selected), (x, w))
    assert gradgradcheck(lambda x, w: linear_cross_entropy(x, w, y, **selected), (x, w))
    first = torch.func.grad(lambda x: linear_cross_entropy(x, w.detach(), y, **selected))(x.detach())
    assert_close(first, torch.autograd.grad(F.cross_entropy(x @ w.T, y), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [None, 2 * MIB])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_with_dynamic_rows(reduction, memory, dtype):
    """One program serves row numbers whose plans differ."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return linear_cross_entropy(x * 1, w, y, memory=memory, reduction=reduction).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    names = set()
    for rows in (40, 2000):
        names.add(linear_plan(rows, 128, 2000, dtype, memory=memory).name)
        x, w, y = operands(rows, 128, 2000, dtype)
        ours, eager = (both(lambda x, w: f(x, w, y), x, w) for f in (compiled, step))  # noqa: B023
        assert_close(ours, eager, **({} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}))
    assert len(names) == 2
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_of_every_plan(dtype):
    torch._dynamo.reset()
    x, w, y = operands(40, 16, 300, dtype)
    for name in NAMES:
        selected = limits_for(name, (40, 16, 300), dtype)

        def step(x: Tensor, w: Tensor, selected: Any = selected) -> Tensor:
            return linear_cross_entropy(x * 1, w, y, **selected)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert_close(both(compiled, x, w), both(step, x, w), rtol=0 if dtype == torch.float32 else 2**-7, atol=0)


def test_compiled_code_refuses_a_small_budget_when_it_runs():
    torch._dynamo.reset()
    x, w, y = operands(20, 4, 5, torch.float32)
    compiled = torch.compile(lambda x: linear_cross_entropy(x, w, y, memory=3), backend="eager")
    with pytest.raises(ValueError, match="memory must be at least 20 bytes"):
        compiled(x)


def test_export():
    class Head(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
            return linear_cross_entropy(x, w, y, memory=LARGE)

    x, w, y = operands(20, 4, 5, torch.float32)
    program = torch.export.export(Head(), (x, w, y))
    assert_close(program.module()(x, w, y), linear_cross_entropy(x, w, y))


def test_the_module_hands_it_on(monkeypatch):
    given = []
    choose = plans.choose
    monkeypatch.setattr(plans, "choose", lambda *a: given.append(a) or choose(*a))
    module = LinearCrossEntropyLoss(8, 11, memory=12345)
    assert module(torch.randn(6, 8), torch.arange(6)).isfinite()
    assert {limits.memory for _, limits in given} == {12345}


@pytest.mark.parametrize("name", NAMES)
def test_a_bfloat16_gradient_is_scaled_once_and_handed_over(name):
    """A second backward computes the same again, from operands."""
    x, w, y = operands(24, 16, 97, torch.bfloat16)
    selected = limits_for(name, (24, 16, 97), torch.bfloat16)
    loss = linear_cross_entropy(x, w, y, **selected)
    first = torch.autograd.grad(loss, (x, w), torch.tensor(3.0, dtype=torch.bfloat16), retain_graph=True)
    assert [g.dtype for g in first] == [torch.bfloat16] * 2
    second = torch.autograd.grad(loss, (x, w), torch.tensor(3.0, dtype=torch.bfloat16))
    for one, other in zip(first, second, strict=True):
        assert (one - other).norm() <= 0.01 * one.norm()


# ---- the command ----


@pytest.mark.devices("cpu")
def test_the_command():
    result = started("-m", "softmax_ext", "plan", "2048", "768", "50257", "bfloat16")
    assert result.returncode == 0, result.stderr
    head, *lines = result.stdout.splitlines()
    assert head.split()[:4] == ["plan", "chunk", "chunks", "products"]
    found = {line[2:].split()[0]: (line[0], line[2:].split()[1:]) for line in lines}
    assert found["whole"] == (" ", ["2048", "1", "3", "196.3"])
    chosen = linear_plan(2048, 768, 50257, torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
    assert found["rows"] == (
        "*",
        [str(n) for n in (chosen.chunk, chosen.chunks, chosen.products)] + [f"{chosen.bytes / MIB:.1f}"],
    )
    result = started("-m", "softmax_ext", "plan", "2048", "768", "50257", "torch.bfloat16", "200MiB")
    assert "* whole" in result.stdout


@pytest.mark.devices("cpu")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("20 30 40 float", "argument dtype: must be float64, float32, bfloat16, float16; got 'float'"),
        ("20 thirty 40 float32", "argument in_features: must be a number of at least 0; got 'thirty'"),
        ("20 30 -40 float32", "argument num_classes: must be a number of at least 0; got '-40'"),
        ("20 30 40 float32 1e6", "argument memory: must be a number of bytes, like 314572800 or 300MiB; got '1e6'"),
        ("20 30 40 float32 159", "memory must be at least 160 bytes here; got 159."),
        ("20 30 40", "the following arguments are required: dtype"),
    ],
)
def test_mistakes_in_the_command(arguments, text):
    result = started("-m", "softmax_ext", "plan", *arguments.split())
    assert result.returncode == 2
    assert text in result.stderr
    assert "Traceback" not in result.stderr
