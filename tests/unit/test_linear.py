"""Linear cross entropy: equal to the cross entropy of a linear layer's output, whose size nothing in it has."""

import copy
import io
import math
from contextlib import nullcontext
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import softmax_ext
from softmax_ext import (
    LinearCrossEntropyLoss,
    cross_entropy,
    linear_cross_entropy,
    linear_ops,
    matmul,
    operands,
    ops,
    plans,
)
from softmax_ext.options import Options
from softmax_ext.plans import Limits

FEATURES, CLASSES = 12, 37
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.02},
    "cap and scale": {"softcap": 3.0, "logit_scale": 0.7},
    "all": {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 4.0, "logit_scale": 1.3},
}


class Inputs:
    """Operands in float64: hidden states of a given batch shape, and all that goes with them."""

    def __init__(self, *batch: int, extra: tuple[int, ...] = (), target: str = "classes", bias: bool = True) -> None:
        shape = (CLASSES, *extra)
        self.input = torch.randn(*batch, FEATURES, dtype=torch.float64)
        self.linear_weight = torch.randn(*shape, FEATURES, dtype=torch.float64)
        self.linear_bias = torch.randn(shape, dtype=torch.float64) if bias else None
        self.rows = (*batch, *extra)
        if target == "probabilities":
            # Classes behind the batch's first dimension, or last where there are several.
            sizes = (*batch, *shape) if len(batch) < 2 else (*batch, CLASSES)
            self.target = torch.rand(sizes, dtype=torch.float64).softmax(1 if extra else -1)
        else:
            self.target = torch.randint(0, CLASSES, self.rows)
            if self.target.dim():
                self.target[self.target % 5 == 0] = -100
            if target == "bytes":
                self.target = self.target.clamp(0).to(torch.uint8)

    def parameters(self) -> list[Tensor]:
        return [t for t in (self.input, self.linear_weight, self.linear_bias) if t is not None]

    def to(self, dtype: torch.dtype) -> "Inputs":
        """A copy whose floating operands are leaves of the dtype."""
        other = copy.copy(self)
        for name in ("input", "linear_weight", "linear_bias"):
            value = getattr(self, name)
            if value is not None:
                setattr(other, name, value.to(dtype, copy=True).requires_grad_())
        return other

    def loss(self, **options: Any) -> Any:
        return linear_cross_entropy(
            self.input, self.linear_weight, self.target, linear_bias=self.linear_bias, **options
        )

    def loss_of_logits(self, **options: Any) -> Any:
        """The same by the logits: rows [M, C] or [N, C, *K]."""
        flat_bias = None if self.linear_bias is None else self.linear_bias.flatten()
        logits = F.linear(self.input, self.linear_weight.flatten(0, -2), flat_bias)
        logits = logits.unflatten(-1, self.linear_weight.shape[:-1])
        target, many = self.target, self.input.dim() > 2
        if many:
            target = target.flatten(0, -2) if target.is_floating_point() else target.flatten()
            logits = logits.flatten(0, -2)
        results = cross_entropy(logits, target, **options)
        if isinstance(results, tuple):
            results = results[0], oracle.of_live_rows(results[1], target)
        if not many:
            return results
        if isinstance(results, tuple):
            loss, stats = results
            return self._batched(loss), type(stats)(*map(self._batched, stats))
        return self._batched(results)

    def _batched(self, values: Tensor) -> Tensor:
        return values.reshape(self.rows) if values.dim() else values


def _gradients(inputs: Inputs, loss: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(loss, inputs.parameters(), torch.rand_like(loss), retain_graph=True))


def _equal_to_logits(inputs: Inputs, chunk_rows: int | None = 7, **options: Any) -> None:
    ours, theirs = inputs.to(torch.float64), inputs.to(torch.float64)
    loss, expected = ours.loss(chunk_rows=chunk_rows, **options), theirs.loss_of_logits(**options)
    assert loss.dtype == expected.dtype
    assert_close(loss, expected)
    first = _gradients(ours, loss)
    assert_close(first, _gradients(theirs, expected))
    assert_close(_gradients(ours, loss), first)  # a second backward


# ---- values and gradients ----


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("target", ["classes", "bytes", "probabilities"])
def test_every_option(target, options, reduction):
    _equal_to_logits(Inputs(20, target=target), reduction=reduction, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", ["classes", "probabilities"])
def test_class_weights(target, reduction):
    weight = torch.rand(CLASSES, dtype=torch.float64)
    _equal_to_logits(Inputs(20, target=target), reduction=reduction, weight=weight, label_smoothing=0.1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", ["classes", "probabilities"])
@pytest.mark.parametrize(
    ("batch", "extra"), [((), ()), ((9,), ()), ((3, 5), ()), ((2, 3, 4), ()), ((9,), (4,)), ((5,), (2, 3))]
)
def test_shapes(batch, extra, target, bias, reduction):
    _equal_to_logits(Inputs(*batch, extra=extra, target=target, bias=bias), reduction=reduction)


@pytest.mark.parametrize("chunk_rows", [1, 19, 20, 21, None])
def test_chunks(chunk_rows):
    _equal_to_logits(Inputs(20), chunk_rows)


def test_more_rows_than_a_default_chunk():
    _equal_to_logits(Inputs(600), None, label_smoothing=0.1)


@pytest.mark.parametrize("batch", [(9,), (3, 5), (6,)])
@pytest.mark.parametrize("extra", [(), (4,)])
@pytest.mark.parametrize("target", ["classes", "probabilities"])
def test_statistics(target, extra, batch):
    if extra and len(batch) > 1:
        pytest.skip("further dimensions need an input (N, in_features)")
    inputs = Inputs(*batch, extra=extra, target=target)
    ours, theirs = inputs.to(torch.float64), inputs.to(torch.float64)
    loss, stats = ours.loss(return_stats=True, chunk_rows=4)
    expected_loss, expected = theirs.loss_of_logits(return_stats=True)
    assert_close((loss, *stats), (expected_loss, *expected))
    assert stats.lse.shape == stats.prediction.shape == inputs.rows

    def total(loss: Tensor, stats: Any) -> Tensor:
        return 2 * loss + (stats.lse.sin() + stats.nll.square() + 3 * stats.entropy).sum()

    assert_close(_gradients(ours, total(loss, stats)), _gradients(theirs, total(expected_loss, expected)))


def test_a_wide_loss_of_narrow_operands():
    """Products that are exact in float32, so that all of float64 can be asked of the rest."""
    x, w = torch.randint(-4, 5, (30, 3)).float(), torch.randint(-4, 5, (50, 3)).float()
    x.requires_grad_()
    y = torch.randint(0, 50, (30,))
    exact = F.cross_entropy(F.linear(x, w).double(), y, reduction="none", label_smoothing=0.1)
    for reduction in ("none", "sum"):
        loss = linear_cross_entropy(x, w, y, dtype=torch.float64, reduction=reduction, label_smoothing=0.1)
        assert_close(loss, exact if reduction == "none" else exact.sum(), rtol=1e-14, atol=0)


def test_the_sum_is_rounded_once():
    x, w, y = torch.randn(1000, 8), torch.randn(20, 8), torch.randint(0, 20, (1000,))
    losses = linear_cross_entropy(x, w, y, reduction="none").double()
    assert linear_cross_entropy(x, w, y, reduction="sum") == losses.sum().float()
    assert linear_cross_entropy(x, w, y) == losses.mean().float()


@pytest.mark.parametrize("name", ["lse", "nll", "entropy"])
def test_one_statistic_of_long_rows(name):
    """Ignored rows have none, and no gradient, whatever their input holds."""
    x = torch.randn(9, FEATURES, dtype=torch.float64, requires_grad=True)
    w, y = torch.randn(300, FEATURES, dtype=torch.float64), torch.randint(0, 300, (9,))
    y[::2] = -100
    ruined = torch.where((y == -100)[:, None], torch.nan, x)
    _, ours = linear_cross_entropy(ruined, w, y, return_stats=True, chunk_rows=4)
    theirs = oracle.of_live_rows(cross_entropy(F.linear(x, w), y, return_stats=True)[1], y)
    assert_close(ours, theirs)
    assert_close(*(torch.autograd.grad(getattr(stats, name).sin().sum(), x) for stats in (ours, theirs)))


def test_a_target_that_requires_grad():
    inputs = Inputs(9, target="probabilities")
    ours, theirs = inputs.to(torch.float64), inputs.to(torch.float64)
    ours.target, theirs.target = inputs.target.clone().requires_grad_(), inputs.target.clone().requires_grad_()
    weight = torch.rand(CLASSES, dtype=torch.float64)
    for options in ({"weight": weight, "label_smoothing": 0.1}, {"reduction": "none"}):
        loss, expected = ours.loss(chunk_rows=4, **options), theirs.loss_of_logits(**options)
        assert_close(loss, expected)
        grads = [
            torch.autograd.grad(t.sum(), (i.target, *i.parameters())) for t, i in ((loss, ours), (expected, theirs))
        ]
        assert_close(*grads)


def test_class_weights_that_require_grad():
    inputs = Inputs(9, target="probabilities").to(torch.float64)
    weight = torch.rand(CLASSES, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad(f(weight=weight), weight)[0] for f in (inputs.loss, inputs.loss_of_logits)]
    assert_close(*grads)


@pytest.mark.parametrize("target", ["classes", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(target, reduction):
    inputs = Inputs(0, target=target).to(torch.float64)
    loss = inputs.loss(reduction=reduction)
    assert_close(loss, inputs.loss_of_logits(reduction=reduction), equal_nan=True)
    for gradient in torch.autograd.grad(loss.sum(), inputs.parameters()):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_no_features(bias, dtype):
    x, w = torch.zeros(3, 0, dtype=dtype), torch.zeros(4, 0, dtype=dtype)
    b = torch.randn(4, dtype=dtype) if bias else None
    expected = F.cross_entropy(F.linear(x, w, b), Y[:3])
    assert_close(linear_cross_entropy(x, w, Y[:3], linear_bias=b), expected)


@pytest.mark.parametrize("linear", [True, False])
def test_slope_in_the_upstream_gradient_where_no_row_counts(linear):
    """The gradients are 0 whatever it is."""
    x, w, y = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), torch.full((3,), -100)
    up = torch.ones((), requires_grad=True)
    loss = linear_cross_entropy(x, w, y) if linear else cross_entropy(F.linear(x, w), y)
    (first,) = torch.autograd.grad(loss, x, up, create_graph=True)
    (slope,) = torch.autograd.grad(first.sum(), up)
    assert slope == 0


def test_class_weights_that_require_grad_of_no_classes():
    x, w = torch.zeros(2, 3, requires_grad=True), torch.zeros(0, 3)
    weight = torch.zeros(0, requires_grad=True)
    loss = linear_cross_entropy(x, w, torch.zeros(2, 0), weight=weight, reduction="none")
    assert loss.shape == (2,)
    assert torch.autograd.grad(loss.sum(), weight)[0].shape == (0,)


def test_no_classes():
    x, w, y = torch.zeros(2, 3), torch.zeros(0, 3), torch.full((2,), -100)
    assert linear_cross_entropy(x, w, y, weight=torch.zeros(0)).isnan()


def test_all_rows_ignored():
    inputs = Inputs(8).to(torch.float64)
    inputs.target.fill_(-100)
    loss = inputs.loss()
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss, inputs.parameters()):
        assert not gradient.any()


@pytest.mark.parametrize("classes", [256, 300, 512])
def test_bytes_of_many_classes(classes):
    x, w, y = torch.randn(3, 4), torch.randn(classes, 4), torch.tensor([0, 50, 255], dtype=torch.uint8)
    assert_close(linear_cross_entropy(x, w, y), F.cross_entropy(F.linear(x, w), y.long()))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize(("batch", "extra"), [((), ()), ((9,), ()), ((9,), (2, 3))])
@pytest.mark.parametrize("target", ["classes", "probabilities"])
def test_torchs_own(target, batch, extra):
    inputs = Inputs(*batch, extra=extra, target=target).to(torch.float64)
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    expected = F.linear_cross_entropy(
        inputs.input, inputs.linear_weight, inputs.target, linear_bias=inputs.linear_bias, **options
    )
    assert_close(inputs.loss(**options), expected)


# ---- dtypes ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_exact_than_whole_logits(dtype):
    """Errors against float64, root mean square, of the loss and of each gradient; torch's whole logits beside ours."""
    scale = 4096 if dtype == torch.float16 else 1  # the usual one of a loss in float16
    torch.manual_seed(0)
    rows, features, classes = 300, 64, 1000
    exact = [torch.randn(rows, features), 0.1 * torch.randn(classes, features), torch.randn(classes)]
    target = torch.randint(0, classes, (rows,))
    given = [t.to(dtype) for t in exact]

    def results(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in given]
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(scale * loss, leaves)]

    def whole(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w, b), target)

    def chunked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, target, linear_bias=b, chunk_rows=32)

    right = results(whole, torch.float64)
    ours, theirs = results(chunked, dtype), results(whole, dtype)
    for name, mine, torchs, expected in zip(("loss", "input", "weight", "bias"), ours, theirs, right, strict=True):
        assert mine.dtype == dtype
        error, torch_error = ((t.double() - expected).square().mean().sqrt() for t in (mine, torchs))
        rounding = torch.finfo(dtype).eps * expected.abs().max() / 8 if name == "loss" else 0
        assert error <= 1.05 * torch_error + rounding, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs = Inputs(40).to(torch.float32)
    with torch.autocast("cpu", dtype):
        loss = inputs.loss(chunk_rows=16)
        expected = inputs.loss_of_logits()
    assert loss.dtype == expected.dtype == torch.float32
    assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    ours, theirs = _gradients(inputs, loss), _gradients(inputs, expected)
    assert all(g.dtype == torch.float32 for g in ours)
    assert_close(ours, theirs, rtol=0.05, atol=2e-3)


def test_float64_stays_under_autocast():
    inputs = Inputs(40).to(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = inputs.loss()
    assert loss.dtype == torch.float64
    assert_close(loss, inputs.loss())


def test_dtype_of_the_loss():
    inputs = Inputs(20).to(torch.bfloat16)
    assert inputs.loss().dtype == torch.bfloat16
    assert inputs.loss(dtype=torch.float32).dtype == torch.float32


# ---- what autograd can do ----


@pytest.fixture
def small() -> Inputs:
    inputs = Inputs(5)
    inputs.input, inputs.linear_weight, inputs.linear_bias = (
        t[..., :3].clone() for t in (inputs.input, inputs.linear_weight[:4], inputs.linear_bias[:4, None].expand(4, 3))
    )
    inputs.linear_bias = inputs.linear_bias[:, 0]
    inputs.target = torch.tensor([1, 3, -100, 0, 2])
    return inputs.to(torch.float64)


def _function(small: Inputs, **options: Any) -> Any:
    def loss(x: Tensor, w: Tensor, b: Tensor) -> Any:
        result = linear_cross_entropy(x, w, small.target, linear_bias=b, chunk_rows=2, **options)
        return result if isinstance(result, Tensor) else (result[0], *result[1][:3])

    return loss


CHECKED = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.1},
    {"reduction": "none", "softcap": 2.0},
    {"return_stats": True, "logit_scale": 0.8},
]


@pytest.mark.parametrize("options", CHECKED, ids=["mean", "sum", "none", "stats"])
def test_gradcheck(small, options):
    assert gradcheck(_function(small, **options), small.parameters())
    assert gradcheck(_function(small, **options), small.parameters(), check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("options", CHECKED, ids=["mean", "sum", "none", "stats"])
def test_gradgradcheck(small, options):
    assert gradgradcheck(_function(small, **options), small.parameters())
    assert gradgradcheck(
        _function(small, **options),
        small.parameters(),
        check_fwd_over_rev=True,
        check_rev_over_rev=False,
        check_undefined_grad=False,
    )


def test_gradgradcheck_of_probabilities(small):
    target = torch.rand(5, 4, dtype=torch.float64).softmax(1).requires_grad_()

    def loss(x: Tensor, w: Tensor, b: Tensor, q: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, q, linear_bias=b, label_smoothing=0.1, chunk_rows=2)

    inputs = (*small.parameters(), target)
    assert gradcheck(loss, inputs, check_forward_ad=True)
    assert gradgradcheck(loss, inputs)


def _both(small: Inputs, **options: Any) -> tuple[Any, Any]:
    def whole(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return cross_entropy(F.linear(x, w, b), small.target, **options)

    return _function(small, **options), whole


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 2.0}], ids=["plain", "options"])
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian", "jvp"])
def test_torch_func(small, transform, options):
    operands = [t.detach() for t in small.parameters()]
    results = []
    for function in _both(small, **options):
        if transform == "jvp":
            results.append(torch.func.jvp(function, tuple(operands), tuple(t.sin() for t in operands)))
        else:
            results.append(getattr(torch.func, transform)(function, argnums=(0, 1, 2))(*operands))
    assert_close(*results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_of_grad(small, reduction):
    _, w, b = (t.detach() for t in small.parameters())
    many, targets = torch.randn(3, 5, 3, dtype=torch.float64), torch.randint(0, 4, (3, 5))
    results = []
    for chunked in (True, False):

        def loss(x: Tensor, w: Tensor, y: Tensor, chunked: bool = chunked) -> Tensor:
            if chunked:
                return linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction, chunk_rows=2).sum()
            return cross_entropy(F.linear(x, w, b), y, reduction=reduction).sum()

        per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None, 0))
        results.append((per_sample(many, w, targets), torch.func.vmap(loss, (0, None, 0))(many, w, targets)))
    assert_close(*results)


def test_batched_gradients(small):
    loss = small.loss(reduction="none", chunk_rows=2)
    upstream = torch.eye(5, dtype=torch.float64)
    ours = torch.autograd.grad(loss, small.parameters(), upstream, is_grads_batched=True)
    theirs = torch.autograd.grad(
        small.loss_of_logits(reduction="none"), small.parameters(), upstream, is_grads_batched=True
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "logits"])
@pytest.mark.parametrize("target", ["classes", "probabilities"])
@pytest.mark.parametrize("outer", ["reverse-mode", "forward-mode"])
def test_vectorized_hessian(target, outer, linear):
    """Autograd's own batching, of a gradient that is differentiated again."""
    x, w = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    y = torch.tensor([0, 3, 1]) if target == "classes" else torch.rand(3, 4, dtype=torch.float64).softmax(1)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        if linear:
            return linear_cross_entropy(x, w, y, label_smoothing=0.1)
        return cross_entropy(x @ w.mT, y, label_smoothing=0.1)

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.mT, y, label_smoothing=0.1)

    def hessian(function: Any, **options: Any) -> Any:
        return torch.autograd.functional.hessian(function, (x, w), **options)

    assert_close(hessian(ours, vectorize=True, outer_jacobian_strategy=outer), hessian(theirs))


def test_forward_mode_of_part(small):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(small.linear_weight.detach(), small.linear_weight.detach().cos())
        results = [
            forward_ad.unpack_dual(f(small.input.detach(), dual, small.linear_bias.detach())).tangent
            for f in _both(small)
        ]
    assert_close(*results)


def test_forward_mode_of_halves():
    x, w, y = torch.randn(20, FEATURES).bfloat16(), torch.randn(CLASSES, FEATURES).bfloat16(), torch.arange(20)
    for options in ({}, {"dtype": torch.float32}):
        loss, tangent = torch.func.jvp(lambda t: linear_cross_entropy(t, w, y, **options), (x,), (x.sin(),))  # noqa: B023
        assert tangent.dtype == loss.dtype == options.get("dtype", torch.bfloat16)
        _, expected = torch.func.jvp(
            lambda t: F.cross_entropy(F.linear(t, w.double()), y), (x.double(),), (x.sin().double(),)
        )
        assert_close(tangent.double(), expected, rtol=0.02, atol=0.01)


def test_saved_tensor_hooks(small):
    """They see the operands, and nothing that was computed ahead is kept from them."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = small.loss()
    assert sum(t.numel() for t in packed) >= sum(t.numel() for t in small.parameters())
    assert type(loss.grad_fn).__name__ == "LinearCrossEntropyBackward"
    expected = torch.autograd.grad(small.loss_of_logits(), small.parameters())
    assert_close(torch.autograd.grad(loss, small.parameters()), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(small, reentrant):
    checkpoint(_function(small), *small.parameters(), use_reentrant=reentrant).backward()
    expected = torch.autograd.grad(small.loss_of_logits(), small.parameters())
    assert_close([t.grad for t in small.parameters()], list(expected))


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad], ids=["value", "gradient"])
def test_vmap_of_compiled_code(small, transform):
    _, w, b = (t.detach() for t in small.parameters())
    function, many = _function(small), torch.randn(2, 5, 3, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: function(x, w, b), backend="aot_eager")
    assert_close(
        torch.func.vmap(transform(compiled))(many), torch.func.vmap(transform(lambda x: function(x, w, b)))(many)
    )


def test_checkpoint_inside_compiled_code(small):
    function = _function(small)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *operands: checkpoint(function, *operands, use_reentrant=False), backend="eager")
    compiled(*small.parameters()).backward()
    expected = torch.autograd.grad(small.loss_of_logits(), small.parameters())
    assert_close([t.grad for t in small.parameters()], list(expected))


def test_upstream_gradient_that_is_not_one(small):
    (3 * small.loss() + 1).backward()
    expected = torch.autograd.grad(3 * small.loss_of_logits(), small.parameters())
    assert_close([t.grad for t in small.parameters()], list(expected))


# ---- torch.compile, export, fake tensors ----


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none", "label_smoothing": 0.1}, {"return_stats": True}],
    ids=["mean", "none", "stats"],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(options, dynamic):
    torch._dynamo.reset()  # the cases share one function, and it is recompiled so often and no more
    inputs = Inputs(20).to(torch.float32)

    def step(x: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Tensor:
        result = linear_cross_entropy(2 * x, w, y, linear_bias=b, chunk_rows=6, **options)
        if isinstance(result, Tensor):
            return result.square().sum()
        return result[0] + result[1].entropy.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (20, 13):
        x = inputs.input[:rows].detach().requires_grad_()
        operands = (x, inputs.linear_weight, inputs.linear_bias)
        results = []
        for function in (compiled, step):
            loss = function(*operands, inputs.target[:rows])
            results.append((loss.detach(), torch.autograd.grad(loss, operands)))
        assert_close(*results)


@pytest.mark.parametrize("upstream", [1.7, math.inf])
def test_compile_of_halves(upstream):
    """Gradients computed ahead and scaled in the graph: rounded once, and 0 for ignored rows."""
    inputs = Inputs(20).to(torch.bfloat16)
    operands = (inputs.input, inputs.linear_weight)
    compiled = torch.compile(
        lambda x, w: linear_cross_entropy(x, w, inputs.target), fullgraph=True, backend="aot_eager"
    )
    up = torch.tensor(upstream, dtype=torch.bfloat16)
    ours, eager = (
        torch.autograd.grad(f(*operands), operands, up)
        for f in (compiled, lambda x, w: linear_cross_entropy(x, w, inputs.target))
    )
    assert not ours[0][inputs.target == -100].any()
    if upstream < math.inf:
        assert_close(ours, eager, rtol=0, atol=0)


def test_compile_by_inductor():
    inputs = Inputs(20).to(torch.float32)
    compiled = torch.compile(lambda x, w, y: linear_cross_entropy(x, w, y) * 2, fullgraph=True)
    operands = (inputs.input, inputs.linear_weight)
    loss, expected = compiled(*operands, inputs.target), 2 * linear_cross_entropy(*operands, inputs.target)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, operands), torch.autograd.grad(expected, operands))


@pytest.mark.parametrize("options", [{}, {"ignore_index": 3}], ids=["plain", "ignore_index"])
def test_compile_under_transforms(small, options):
    small.target[small.target == -100] = 3
    operands = [t.detach() for t in small.parameters()]
    chunked, whole = _both(small, **options)
    compiled = torch.compile(
        lambda *t: torch.func.grad(chunked, argnums=(0, 1))(*t), fullgraph=True, backend="aot_eager"
    )
    assert_close(compiled(*operands), torch.func.grad(whole, argnums=(0, 1))(*operands))


@pytest.mark.parametrize("target", ["classes", "probabilities"])
@pytest.mark.parametrize("needs", [[False] * 3, [True] * 3, [False, True, False]])
@pytest.mark.parametrize("denominator", [None, torch.tensor(3.0, dtype=torch.float64)], ids=["", "denominator"])
def test_operator(denominator, needs, target):
    inputs = Inputs(9, extra=(2,), target=target).to(torch.bfloat16)
    operands = (inputs.input, inputs.linear_weight, inputs.linear_bias, inputs.target, None, None)
    numbers = Options(
        dim=1, reduction=1, ignore_index=-100, label_smoothing=0.1, z_loss=0.0, softcap=None, logit_scale=1.0
    )._replace(skips_ignored=True)
    options = (*numbers, torch.float32, not any(needs), *Limits(4), needs, [*needs, False], True, denominator, 1)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.softmax_ext.linear_cross_entropy, (*operands, *options), test_utils=checks)
    rows = torch.ones(9, 2)
    upstream = (torch.ones(()), rows, rows, rows)
    options = (*numbers, *Limits(4), [*needs, inputs.target.is_floating_point()], [True] * 4)
    _, _, state, *statistics = linear_ops.forward(
        *operands, *numbers, torch.float32, True, *Limits(4), [False] * 3, [True] * 4, True, None, 1
    )
    kept = (None, None) if any(needs) else (state, statistics[2])
    torch.library.opcheck(
        torch.ops.softmax_ext.linear_cross_entropy_backward,
        (*upstream, torch.ones((), dtype=torch.float64), *kept, *operands, *options),
        test_utils=checks,
    )


def test_export():
    class Head(nn.Module):
        def forward(self, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
            return linear_cross_entropy(x, w, y)

    inputs = Inputs(9)
    operands = (inputs.input, inputs.linear_weight, inputs.target)
    program = torch.export.export(Head(), operands)
    assert_close(program.module()(*operands), linear_cross_entropy(*operands))


def test_fake_tensors():
    with FakeTensorMode():
        x = torch.randn(8, FEATURES, requires_grad=True)
        loss = linear_cross_entropy(x, torch.randn(CLASSES, FEATURES), torch.randint(0, CLASSES, (8,)))
        loss.backward()
        assert x.grad.shape == x.shape
    x = torch.randn(8, FEATURES, device="meta", requires_grad=True)
    y = torch.zeros(8, dtype=torch.long, device="meta")
    loss, stats = linear_cross_entropy(x, x, y, return_stats=True)
    loss.backward()
    assert loss.is_meta
    assert stats.prediction.shape == (8,)


# ---- what is computed ----


class Work(TorchDispatchMode):
    """Counts the matrix products and records the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "_linear_pointwise"):
            a, b = [t for t in args if isinstance(t, Tensor)][-2:] if name != "_linear_pointwise" else args[:2]
            classes = b.shape[0] if name == "_linear_pointwise" else b.shape[1]
            self.flops += a.shape[0] * a.shape[1] * classes
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes() // result.element_size())
        return result


def _work(rows: int, function: Any) -> tuple[float, int]:
    """Matrix products of the whole problem's size, and the largest tensor."""
    with pytest.MonkeyPatch.context() as patch, Work() as work:
        # A mode does not see what is inside an operator.
        patch.setattr(linear_ops, "forward", linear_ops._forward)
        patch.setattr(linear_ops, "backward", linear_ops._backward)
        function()
    return work.flops / (rows * FEATURES * CLASSES), work.largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("frozen", "products"), [((), 3), (("linear_weight",), 2), (("input",), 2), (("input", "linear_weight"), 1)]
)
def test_three_products_and_no_logits(frozen, products, dtype):
    inputs = Inputs(400).to(dtype)
    inputs.target.fill_(3)
    for name in frozen:
        getattr(inputs, name).requires_grad_(False)
    count, largest = _work(400, lambda: inputs.loss(chunk_rows=20).backward())
    assert count == products
    assert largest <= max(400 * FEATURES, CLASSES * FEATURES)
    for name in frozen:
        assert getattr(inputs, name).grad is None


def test_without_gradients_one_product():
    inputs = Inputs(400).to(torch.float32)
    inputs.target.fill_(3)
    with torch.no_grad():
        count, _ = _work(400, lambda: inputs.loss(chunk_rows=20))
    assert count == 1


def test_gradients_for_each_row_take_the_logits_twice():
    inputs = Inputs(400).to(torch.float32)
    inputs.target.fill_(3)
    count, largest = _work(400, lambda: inputs.loss(chunk_rows=20, reduction="none").sum().backward())
    assert count == 4
    assert largest <= 400 * FEATURES


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"return_stats": True}], ids=["none", "stats"])
def test_the_backward_takes_the_state_of_the_forward(options, monkeypatch):
    """It does not read the logits a second time. Ignored rows without a state change nothing, nor do long logits."""
    calls = []
    forward = ops.cross_entropy
    monkeypatch.setattr(ops, "cross_entropy", lambda *a: calls.append(a) or forward(*a))
    inputs = Inputs(60, extra=(2,))
    inputs.input *= 100
    inputs.target[::3] = -100
    inputs = inputs.to(torch.float64)

    def total(results: Any) -> Tensor:
        return results.sum() if isinstance(results, Tensor) else results[0] + results[1].entropy.sin().sum()

    loss = total(inputs.loss(chunk_rows=20, **options))
    count = len(calls)
    assert count > 1
    first = torch.autograd.grad(loss, inputs.parameters(), retain_graph=True)
    assert len(calls) == count
    assert_close(torch.autograd.grad(loss, inputs.parameters()), first, rtol=0, atol=0)
    assert_close(first, torch.autograd.grad(total(inputs.loss_of_logits(**options)), inputs.parameters()))


def test_transforms_hold_no_logits():
    inputs = Inputs(400).to(torch.float32)
    inputs.target.fill_(3)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, inputs.target, chunk_rows=20)

    operands = (inputs.input, inputs.linear_weight)
    for products, function in (
        (4, lambda: torch.func.grad(loss, argnums=(0, 1))(*operands)),
        (6, lambda: torch.autograd.grad(loss(*operands), operands, create_graph=True)),  # three of them ahead, in vain
    ):
        count, largest = _work(400, function)
        assert count == products
        assert largest <= 400 * FEATURES


@pytest.mark.devices("cpu")
def test_ignored_rows_are_not_multiplied():
    inputs = Inputs(400).to(torch.float32)
    inputs.target.fill_(-100)[::10] = 3
    count, _ = _work(400, lambda: inputs.loss(chunk_rows=16).backward())
    assert count == pytest.approx(0.3)


def test_default_chunks():
    cpu, gpu = "cpu", "cuda"
    row = 4 * 128256
    assert [plans.default_chunk_rows(n, row, cpu) for n in (1, 2048, 4096, 100_000)] == [128, 224, 448, 512]
    assert [plans.default_chunk_rows(n, row, gpu) for n in (1, 32768, 1_000_000)] == [1024, 3632, 4096]
    assert [plans.default_chunk_rows(1024, 4 * n, cpu) for n in (1, 8192, 32000, 64000)] == [512, 512, 256, 128]


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_either_library(monkeypatch, amd, bias):
    monkeypatch.setattr(matmul, "_amd", lambda: amd)
    monkeypatch.setattr(matmul, "_SLICE_BYTES", 4 * 7 * 10)  # ten classes of seven rows
    inputs = Inputs(30, bias=bias)
    ours = inputs.to(torch.float32)
    loss = ours.loss(chunk_rows=7)
    exact = inputs.to(torch.float64)
    expected = exact.loss_of_logits()
    assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(
        [g.double() for g in _gradients(ours, loss)],
        [
            1.0 * g
            for g in torch.autograd.grad(expected, exact.parameters(), torch.rand_like(loss).double() * 0 + _up())
        ],
        rtol=1e-4,
        atol=1e-5,
    )


def _up() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(()).double()


@pytest.mark.parametrize("bias", ["expanded", "every second"])
def test_strides_of_the_bias(bias):
    inputs = Inputs(9).to(torch.float32)
    values = torch.randn(1).expand(CLASSES) if bias == "expanded" else torch.randn(2 * CLASSES)[::2]
    inputs.linear_bias = values.requires_grad_()
    loss, expected = inputs.loss(reduction="none"), inputs.loss_of_logits(reduction="none")
    assert_close(loss, expected)
    assert_close(_gradients(inputs, loss), _gradients(inputs, expected))


def test_half_products_of_further_dimensions():
    """Class by class and dimension by dimension, each gradient is where it belongs."""
    inputs = Inputs(30, extra=(3,))
    ours, exact = inputs.to(torch.bfloat16), inputs.to(torch.float64)
    gradients = torch.autograd.grad(ours.loss(reduction="sum", chunk_rows=7), ours.parameters())
    expected = torch.autograd.grad(exact.loss_of_logits(reduction="sum"), exact.parameters())
    for mine, right in zip(gradients, expected, strict=True):
        assert (mine.double() - right).abs().max() <= 0.03 * right.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_float16_products_do_not_overflow(autocast):
    """A gradient of the sum beyond 65504, whose mean is small, of classes that are no target: a matrix product."""
    x, y = torch.full((1024, 4), 300.0), torch.zeros(1024, dtype=torch.long)
    w = torch.zeros(3, 4, requires_grad=True)
    if autocast:
        with torch.autocast("cpu", torch.float16):
            loss = linear_cross_entropy(x, w, y, chunk_rows=1024)
    else:
        loss = linear_cross_entropy(x.half(), w.half(), y, chunk_rows=1024)
    (gradient,) = torch.autograd.grad(loss, w)
    assert_close(gradient[1:].float(), torch.full((2, 4), 100.0), rtol=1e-2, atol=0)


def test_float16_does_not_underflow():
    """A gradient of the mean that float16 can't hold before the loss scale lifts it."""
    x, y = torch.zeros(4000, 1, dtype=torch.float16), torch.zeros(4000, dtype=torch.long)
    x[0] = 1
    w = torch.zeros(5000, 1, dtype=torch.float16, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(x, w, y), w, torch.tensor(2.0**15, dtype=torch.float16))
    assert_close(gradient[1:].float(), torch.full((4999, 1), 2.0**15 / 5000 / 4000), rtol=1e-2, atol=0)


def test_a_second_backward_leaves_the_first_gradients():
    inputs = Inputs(9).to(torch.float64)
    loss = inputs.loss()
    first = torch.autograd.grad(3 * loss, inputs.parameters(), retain_graph=True)
    copies = [t.clone() for t in first]
    second = torch.autograd.grad(3 * loss, inputs.parameters())
    assert_close(list(first), copies)
    assert_close(list(second), copies)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("linear", [True, False])
def test_second_derivative_of_batched_gradients(linear, reduction):
    inputs = Inputs(3).to(torch.float64)
    operands, y = (inputs.input, inputs.linear_weight), torch.tensor([1, 0, 2])
    results = []
    for function in (
        linear_cross_entropy if linear else lambda x, w, y, **o: cross_entropy(F.linear(x, w), y, **o),
        lambda x, w, y, **o: F.cross_entropy(F.linear(x, w), y, **o),
    ):
        loss = function(*operands, y, reduction=reduction).reshape(-1)
        upstream = torch.eye(loss.numel(), dtype=torch.float64)
        first = torch.autograd.grad(loss, operands, upstream, is_grads_batched=True, create_graph=True)
        results.append(torch.autograd.grad(sum((g**3).sum() for g in first), operands))
    assert_close(*results)


def test_second_derivative_of_the_operator():
    """As an exported program or a graph of the "eager" backend calls it."""
    inputs = Inputs(9).to(torch.float64)
    compiled = torch.compile(lambda x, w, y: linear_cross_entropy(x, w, y), backend="eager", fullgraph=True)
    operands = (inputs.input, inputs.linear_weight)
    results = []
    for function in (compiled, lambda x, w, y: cross_entropy(F.linear(x, w), y)):
        first = torch.autograd.grad(function(*operands, inputs.target), operands, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), operands))
    assert_close(*results)


def test_an_input_that_requires_grad_after_the_export():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(CLASSES, FEATURES))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return linear_cross_entropy(x, self.weight, y)

    x, y, head = torch.randn(8, FEATURES), torch.randint(0, CLASSES, (8,)), Head()
    program = torch.export.export(head, (x, y))
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(program.module()(x, y), x)
    assert_close(gradient, torch.autograd.grad(head(x, y), x)[0])


def test_backward_within_forward_mode(small):
    x, direction = small.input.detach(), small.input.detach().sin()
    tangents = []
    for function in _both(small):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), direction)
            loss = function(dual, small.linear_weight, small.linear_bias)
            (gradient,) = torch.autograd.grad(loss, dual)
            tangents.append(forward_ad.unpack_dual(gradient).tangent)
    assert tangents[0] is not None
    assert_close(*tangents)


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_no_rows_with_a_graph(batch):
    inputs = Inputs(*batch).to(torch.float64)
    gradients = torch.autograd.grad(inputs.loss(reduction="sum"), inputs.parameters(), create_graph=True)
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("upstream", [math.inf, math.nan])
def test_ignored_rows_of_an_infinite_gradient(upstream, dtype):
    """A loss scale that overflowed: ignored rows have the gradient 0, and no other is finite.

    As with whole logits; but torch's product in half types, on a processor with AMX, makes NaN of rows of zeros too.
    """
    inputs = Inputs(20).to(dtype)
    inputs.linear_weight.requires_grad_(False)
    up = torch.tensor(upstream, dtype=dtype)
    for ignored in (inputs.target == -100, torch.ones(20, dtype=torch.bool)):
        inputs.target[ignored] = -100
        (gradient,) = torch.autograd.grad(inputs.loss(), inputs.input, up)
        assert not gradient[ignored].any()
        assert not gradient[~ignored].isfinite().any()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothing"])
def test_weights_that_are_all_zero(options):
    """0 / 0 for rows that count, 0 for those that do not, in every backward."""
    inputs, weight = Inputs(20).to(torch.float64), torch.zeros(CLASSES, dtype=torch.float64)
    loss, expected = (f(weight=weight, **options) for f in (inputs.loss, inputs.loss_of_logits))
    for _ in range(2):
        first, right = (torch.autograd.grad(t, inputs.parameters(), retain_graph=True) for t in (loss, expected))
        assert_close(first, right, equal_nan=True)


def test_same_bits_every_time():
    inputs = Inputs(300).to(torch.bfloat16)
    first = _gradients(inputs, inputs.loss())
    for _ in range(3):
        assert_close(_gradients(inputs, inputs.loss()), first, rtol=0, atol=0)


# ---- module ----


def test_module():
    module = LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True, label_smoothing=0.1, weight=torch.rand(CLASSES))
    x, y = torch.randn(8, FEATURES), torch.randint(0, CLASSES, (8,))
    linear = module.linear
    expected = cross_entropy(linear(x), y, module.weight, label_smoothing=0.1)
    assert_close(module(x, y), expected)
    assert_close(copy.deepcopy(module)(x, y), expected)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    assert_close(torch.load(stored, weights_only=False)(x, y), expected)
    assert "num_classes=37" in repr(module)


def test_options_of_the_module():
    options = {"ignore_index": 3, "loss_dtype": torch.float64, "reduction": "sum", "options": None}
    module = LinearCrossEntropyLoss(FEATURES, CLASSES, **options)
    x, y = torch.randn(8, FEATURES), torch.arange(8)
    loss = module(x, y)
    assert loss.dtype == torch.float64
    assert_close(
        loss, F.cross_entropy(module.linear(x), y, ignore_index=3, reduction="sum").double(), rtol=1e-5, atol=0
    )


def test_module_with_further_dimensions():
    module = LinearCrossEntropyLoss(FEATURES, CLASSES, bias=True, out_features=(2, 3), reduction="none")
    x, y = torch.randn(8, FEATURES), torch.randint(0, CLASSES, (8, 2, 3))
    logits = module.linear(x).unflatten(1, (CLASSES, 2, 3))
    assert_close(module(x, y), F.cross_entropy(logits, y, reduction="none"))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has no LinearCrossEntropyLoss")
@pytest.mark.parametrize("options", [{}, {"bias": True, "out_features": (2,), "weight": torch.ones(CLASSES)}])
def test_state_dict_is_torchs(options):
    ours, theirs = (
        LinearCrossEntropyLoss(FEATURES, CLASSES, **options),
        nn.LinearCrossEntropyLoss(FEATURES, CLASSES, **options),
    )
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    y = torch.randint(0, CLASSES, (8, *options.get("out_features", ())))
    x = torch.randn(8, FEATURES)
    assert_close(ours(x, y), theirs(x, y))


# ---- errors (test_errors.py has the table) ----

X, W, Y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 4])


def test_position_of_a_bad_class_in_a_batch():
    y = torch.ones(2, 4, dtype=torch.long)
    y[1, 2] = 9
    with pytest.raises(IndexError, match=r"got 9 at position \[1, 2\]"):
        linear_cross_entropy(X.expand(2, 4, 3), W, y)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="this torch has no LinearCrossEntropyOptions")
def test_calls_with_torchs_options():
    assert_close(linear_cross_entropy(X, W, Y, options=nn.LinearCrossEntropyOptions()), linear_cross_entropy(X, W, Y))


def test_a_bad_class_in_a_later_chunk_is_found_first():
    inputs = Inputs(50).to(torch.float32)
    inputs.target.fill_(1)[47] = CLASSES
    with Work() as work, pytest.raises(IndexError, match=r"got 37 at position \[47\]"):
        inputs.loss(chunk_rows=4)
    assert work.flops == 0


@pytest.mark.parametrize(("value", "checked"), [(None, False), ("", False), ("0", False), ("1", True), ("true", True)])
def test_targets_off_the_cpu_are_checked_on_demand(value, checked, monkeypatch):
    """As the CUDA kernels do. A meta tensor has no values, so that asking for them raises."""
    monkeypatch.delenv("SOFTMAX_EXT_CHECK_TARGETS", raising=False)
    if value is not None:
        monkeypatch.setenv("SOFTMAX_EXT_CHECK_TARGETS", value)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta") if checked else nullcontext():
        operands.check_classes(Y.to("meta"), 5, -100)


def test_public():
    assert softmax_ext.linear_cross_entropy is linear_cross_entropy
    assert {"linear_cross_entropy", "LinearCrossEntropyLoss"} <= set(softmax_ext.__all__)


@pytest.mark.parametrize(("rows", "positions"), [(0, ()), (0, (2,)), (3, (0,))], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float16_of_nothing(reduction, rows, positions):
    """The bound of the gradients is one of no numbers."""
    x, w = (
        torch.ones(rows, 4, dtype=torch.float16),
        torch.ones(5, *positions, 4, dtype=torch.float16, requires_grad=True),
    )
    target, factors = torch.zeros(rows, *positions, dtype=torch.int64), torch.ones(rows, *positions)
    loss = linear_cross_entropy(x, w, target, weight=torch.ones(5), row_weight=factors, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else not loss.any()
    loss.sum().backward()
    assert not w.grad.any()
