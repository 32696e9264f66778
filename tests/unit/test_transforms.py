"""torch.func: grad, vmap, jvp, jacrev, jacfwd, hessian and their nestings, against torch's own functions in float64,
and against the oracle where torch has none.

Each transform is a different way into the autograd Functions. The order of the nesting matters: forward mode over
forward mode loses the inner tangent in silence unless a Function's jvp is itself differentiable, so that every nesting
of three is here.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from seeded import randint, randn
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.testing import assert_close

import softmax_ext

X = randn(3, 4)
Y = torch.tensor([0, 3, 2])
Q = randn(3, 4, seed=1).softmax(1)
W = randn(4, seed=2).abs() + 0.5

TORCH_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"weight": W, "label_smoothing": 0.2, "ignore_index": -7},
    "ignored": {"ignore_index": 3},
    "sum": {"reduction": "sum", "weight": W},
    "none": {"reduction": "none", "label_smoothing": 0.2},
}
OUR_OPTIONS: dict[str, Any] = {"z_loss": 0.1, "softcap": 1.5, "logit_scale": 0.7}

with_options = pytest.mark.parametrize("options", TORCH_OPTIONS.values(), ids=TORCH_OPTIONS)
of_classes_or_probabilities = pytest.mark.parametrize("target", [Y, Q], ids=["classes", "probabilities"])
SOFTMAXES = [(softmax_ext.softmax, F.softmax), (softmax_ext.log_softmax, F.log_softmax)]
each_softmax = pytest.mark.parametrize("pair", SOFTMAXES, ids=["softmax", "log_softmax"])


def same(transform: Callable[[Callable[..., Any]], Any], ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    """``transform`` of both functions gives the same."""
    actual, expected = transform(ours), transform(theirs)
    assert_close(actual, expected)
    leaves = torch.utils._pytree.tree_leaves(expected)
    assert any(leaf.abs().max() > 0 for leaf in leaves), "a comparison of zeros"


# ---- one transform -------------------------------------------------------------------------------------------------


def usable(target: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Torch refuses an ignored class with probabilities."""
    return {k: v for k, v in options.items() if k != "ignore_index" or not target.is_floating_point()}


@with_options
@of_classes_or_probabilities
@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobian(transform, target, options):
    options = usable(target, options)
    same(
        lambda f: transform(lambda x: f(x, target, **options))(X),
        softmax_ext.cross_entropy,
        F.cross_entropy,
    )


@with_options
@of_classes_or_probabilities
def test_grad_of_logits_and_probabilities(target, options):
    options = usable(target, options)
    argnums = (0, 1) if target.is_floating_point() else 0
    same(
        lambda f: grad(lambda x, q: f(x, q, **options).sum(), argnums)(X, target),
        softmax_ext.cross_entropy,
        F.cross_entropy,
    )


@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd], ids=["grad", "jacrev", "jacfwd"])
@pytest.mark.parametrize("argnums", [1, 2, (0, 1, 2)], ids=str)
def test_derivative_to_probabilities_and_weight(argnums, transform):
    """The weight's derivative is right in reverse and in forward mode, alone and with the others."""
    same(lambda f: transform(f, argnums)(X, Q, W), softmax_ext.cross_entropy, F.cross_entropy)


def test_forward_mode_to_the_weight_with_options():
    """No tangent may be lost on the way of the options."""
    same(
        lambda f: jvp(lambda w: f(X, Q, weight=w, label_smoothing=0.2, **OUR_OPTIONS), (W,), (randn(4),)),
        softmax_ext.cross_entropy,
        oracle.cross_entropy_loss,
    )


def test_forward_mode_to_the_weight_of_classes_is_refused():
    """Torch gives zero, which is wrong; ours has no derivative there in reverse mode either."""
    with pytest.raises(RuntimeError, match=r"weight has no forward-mode derivative here.*weight\.detach\(\)"):
        jvp(lambda w: softmax_ext.cross_entropy(X, Y, w), (W,), (randn(4),))


@with_options
@of_classes_or_probabilities
def test_hessian(target, options):
    options = usable(target, options)
    same(
        lambda f: hessian(lambda x: f(x, target, **options).sum())(X),
        softmax_ext.cross_entropy,
        F.cross_entropy,
    )


@of_classes_or_probabilities
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 40)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option_to_second_order(shape, reduction, target):
    x = randn(*shape)
    classes = shape[-1]
    if target.is_floating_point():
        target = randn(*shape, seed=1).softmax(-1)
    else:
        target = torch.tensor(classes - 1) if len(shape) == 1 else torch.arange(shape[0])
    options = {"weight": randn(classes, seed=2).abs(), "label_smoothing": 0.2, "reduction": reduction, **OUR_OPTIONS}
    v = randn(*shape, seed=3)
    for transform in (
        lambda f: jvp(lambda x: f(x, target, **options), (x,), (v,)),
        lambda f: grad(lambda x: f(x, target, **options).sum())(x),
        lambda f: jvp(grad(lambda x: f(x, target, **options).sum()), (x,), (v,)),
        lambda f: grad(lambda x: jvp(lambda x: f(x, target, **options).sum(), (x,), (v,))[1])(x),
    ):
        same(transform, softmax_ext.cross_entropy, oracle.cross_entropy_loss)


@of_classes_or_probabilities
def test_vjp_and_linearize(target):
    def pulled(f: Callable[..., Tensor]) -> Any:
        value, pull = vjp(lambda x: f(x, target, reduction="none"), X)
        return value, pull(randn(3, seed=4))

    def pushed(f: Callable[..., Tensor]) -> Any:
        value, push = linearize(lambda x: f(x, target, reduction="none"), X)
        return value, push(randn(3, 4, seed=5)), push(randn(3, 4, seed=6))

    same(pulled, softmax_ext.cross_entropy, F.cross_entropy)
    same(pushed, softmax_ext.cross_entropy, F.cross_entropy)


@of_classes_or_probabilities
@pytest.mark.parametrize(
    "transform",
    [jacrev, jacfwd, lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacrev(f)), lambda f: jacfwd(jacfwd(f))],
    ids=["jacrev", "jacfwd", "rev-fwd", "fwd-rev", "fwd-fwd"],
)
def test_statistics(transform, target):
    def ours(x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        _, stats = softmax_ext.cross_entropy(x, target, return_stats=True)
        return stats[:3]

    def exact(x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return oracle.stats(x, target)[:3]

    same(lambda f: transform(lambda x: f(x, target))(X), ours, exact)


# ---- nestings ------------------------------------------------------------------------------------------------------

NESTINGS = list(itertools.product([jacrev, jacfwd], repeat=3))
NESTED_NAMES = ["-".join(t.__name__.removeprefix("jac") for t in nesting) for nesting in NESTINGS]
every_nesting = pytest.mark.parametrize("nesting", NESTINGS, ids=NESTED_NAMES)


def nest(nesting: tuple[Callable[..., Any], ...], f: Callable[..., Any]) -> Callable[..., Any]:
    for transform in reversed(nesting):
        f = transform(f)
    return f


@every_nesting
@of_classes_or_probabilities
@pytest.mark.parametrize("options", [{}, TORCH_OPTIONS["all"]], ids=["plain", "all"])
def test_third_derivative(options, target, nesting):
    options = usable(target, options)
    same(
        lambda f: nest(nesting, lambda x: f(x, target[:2], **options))(X[:2, :4]),
        softmax_ext.cross_entropy,
        F.cross_entropy,
    )


@every_nesting
def test_third_derivative_with_our_options(nesting):
    same(
        lambda f: nest(nesting, lambda x: f(x, Y[:2], label_smoothing=0.2, **OUR_OPTIONS))(X[:2]),
        softmax_ext.cross_entropy,
        oracle.cross_entropy_loss,
    )


@every_nesting
def test_third_derivative_to_the_probabilities(nesting):
    """A mixed one: the loss is linear in the probabilities, so that only x, x, q is not zero."""
    outer, middle, inner = nesting
    same(
        lambda f: outer(middle(inner(f, 1), 0), 0)(X[:2, :3], Q[:2, :3]),
        softmax_ext.cross_entropy,
        F.cross_entropy,
    )


@every_nesting
@each_softmax
def test_third_derivative_of_softmax(pair, nesting):
    same(lambda f: nest(nesting, lambda x: f(x, 1))(X[:2, :3]), *pair)


@each_softmax
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_hessian_of_softmax(dim, pair):
    weights = randn(2, 3, 2, seed=3)
    same(lambda f: hessian(lambda x: (f(x, dim) * weights).sum())(randn(2, 3, 2)), *pair)


# ---- vmap ----------------------------------------------------------------------------------------------------------

BATCH = 3


def stacked(function: Callable[..., Any], in_dims: tuple[int | None, ...], *args: Tensor) -> Any:
    """Vmap as a loop over torch's function."""
    calls = [
        function(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(BATCH)
    ]
    return torch.stack(calls)


IN_DIMS = [(0, 0), (1, 0), (2, 0), (-1, 0), (0, 1), (2, 1), (0, None), (1, None), (None, 0), (None, 1)]


@with_options
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap_of_classes(in_dims, options):
    x = (
        randn(2, 4)
        if in_dims[0] is None
        else randn(2, 4).unsqueeze(in_dims[0]) + randn(BATCH, 1, 1).movedim(0, in_dims[0])
    )
    x = x * randn(*x.shape, seed=8)
    y = torch.tensor([[0, 3], [2, 1], [3, 3]])
    y = y[0] if in_dims[1] is None else y.movedim(0, in_dims[1])
    ours = vmap(lambda x, y: softmax_ext.cross_entropy(x, y, **options), in_dims)(x, y)
    assert_close(ours, stacked(lambda x, y: F.cross_entropy(x, y, **options), in_dims, x, y), equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"weight": W, "label_smoothing": 0.2}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("in_dims", [(0, 0), (2, 0), (0, 2), (1, 1), (0, None), (None, 1)], ids=str)
def test_vmap_of_probabilities(in_dims, options):
    x, q = randn(BATCH, 2, 4), randn(BATCH, 2, 4, seed=1).softmax(-1)
    x, q = (t[0] if d is None else t.movedim(0, d) for t, d in zip((x, q), in_dims, strict=True))
    ours = vmap(lambda x, q: softmax_ext.cross_entropy(x, q, **options), in_dims)(x, q)
    assert_close(ours, stacked(lambda x, q: F.cross_entropy(x, q, **options), in_dims, x, q))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@of_classes_or_probabilities
@pytest.mark.parametrize("in_dims", [(0, None, 0), (None, None, 1), (0, 0, 0)], ids=str)
def test_vmap_of_the_weight(in_dims, target, reduction):
    x = randn(2, 4) if in_dims[0] is None else randn(BATCH, 2, 4)
    target = target[:2] if in_dims[1] is None else torch.stack([target[:2], target[1:], target[:2]])
    weight = (randn(BATCH, 4, seed=2).abs() + 0.5).movedim(0, in_dims[2])
    ours = vmap(lambda x, y, w: softmax_ext.cross_entropy(x, y, w, reduction=reduction), in_dims)(x, target, weight)
    theirs = stacked(lambda x, y, w: F.cross_entropy(x, y, w, reduction=reduction), in_dims, x, target, weight)
    assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 4, 3), (2, 40)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_vmap_of_shapes(shape, reduction):
    """Unbatched rows, images, long rows."""
    x = randn(BATCH, *shape)
    batch = shape[:0] if len(shape) == 1 else (shape[0], *shape[2:])
    y = randint(4, (BATCH, *batch))
    ours = vmap(lambda x, y: softmax_ext.cross_entropy(x, y, reduction=reduction))(x, y)
    assert_close(ours, stacked(lambda x, y: F.cross_entropy(x, y, reduction=reduction), (0, 0), x, y))


def test_vmap_of_vmap():
    x, y = randn(2, 3, 2, 4), randint(4, (3, 2, 2))
    ours = vmap(vmap(lambda x, y: softmax_ext.cross_entropy(x, y, label_smoothing=0.1)), in_dims=(0, 1))(x, y)
    rows = [[F.cross_entropy(x[i, j], y[j, i], label_smoothing=0.1) for j in range(3)] for i in range(2)]
    assert_close(ours, torch.stack([torch.stack(row) for row in rows]))


def test_vmap_of_statistics():
    x, y = randn(BATCH, 2, 4), torch.tensor([[0, 3], [2, 1], [3, 3]])
    loss, stats = vmap(lambda x, y: softmax_ext.cross_entropy(x, y, return_stats=True))(x, y)
    for i in range(BATCH):
        expected_loss, expected = softmax_ext.cross_entropy(x[i], y[i], return_stats=True)
        assert_close(loss[i], expected_loss)
        for ours, theirs in zip(stats, expected, strict=True):
            assert_close(ours[i], theirs)


EMPTY_BATCHES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "classes": (softmax_ext.cross_entropy, F.cross_entropy, (randn(0, 3, 4), torch.zeros(0, 3, dtype=torch.int64))),
    "probabilities": (softmax_ext.cross_entropy, F.cross_entropy, (randn(0, 3, 4), randn(0, 3, 4))),
    "weight": (
        lambda x, w: softmax_ext.cross_entropy(x, Y, w, reduction="none"),
        lambda x, w: F.cross_entropy(x, Y, w, reduction="none"),
        (randn(0, 3, 4), randn(0, 4)),
    ),
    "linear": (
        lambda x, y: softmax_ext.linear_cross_entropy(x, Q, y),
        lambda x, y: F.cross_entropy(x @ Q.mT, y),
        (randn(0, 3, 4), torch.zeros(0, 3, dtype=torch.uint8)),
    ),
    "softmax": (lambda x: softmax_ext.softmax(x, 1), lambda x: F.softmax(x, 1), (randn(0, 3, 4),)),
}


@pytest.mark.parametrize(("ours", "theirs", "args"), EMPTY_BATCHES.values(), ids=EMPTY_BATCHES)
def test_vmap_of_an_empty_batch(ours, theirs, args):
    results = vmap(ours)(*args)
    assert_close(results, vmap(theirs)(*args))
    x, *others = args
    assert vmap(jacrev(ours))(*args).shape == (*results.shape, *x.shape[1:])
    x.requires_grad_()
    assert torch.autograd.grad(vmap(ours)(x, *others).sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "logits"])
def test_jacobian_of_no_results(linear):
    x, y = randn(0, 4), torch.zeros(0, dtype=torch.int64)

    def loss(x: Tensor) -> Tensor:
        if linear:
            return softmax_ext.linear_cross_entropy(x, Q, y, reduction="none")
        return softmax_ext.cross_entropy(x, y, reduction="none")

    assert jacrev(loss)(x).shape == jacfwd(loss)(x).shape == (0, 0, 4)


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "logits"])
@pytest.mark.parametrize(
    "target", [Y[:0], randn(0, 4), torch.full((3,), -100)], ids=["no classes", "no probabilities", "ignored"]
)
def test_derivatives_of_a_mean_over_no_rows(target, linear):
    """Zero in every mode, though the mean itself is NaN."""
    x = X[: len(target)]

    def loss(w: Tensor) -> Tensor:
        return softmax_ext.linear_cross_entropy(x, w, target) if linear else softmax_ext.cross_entropy(x @ w.mT, target)

    assert loss(randn(4, 4)).isnan()
    for outer, inner in itertools.product([jacrev, jacfwd], repeat=2):
        assert inner(loss)(randn(4, 4)).abs().max() == 0
        assert outer(inner(loss))(randn(4, 4)).abs().max() == 0


def test_no_class_and_every_row_ignored():
    """There is no logit to differentiate in, and none to look up."""
    x, y = randn(3, 0), torch.full((3,), -100)
    assert jacrev(jacrev(lambda x: softmax_ext.cross_entropy(x, y)))(x).shape == (3, 0, 3, 0)
    assert jvp(lambda x: softmax_ext.cross_entropy(x, y, reduction="sum"), (x,), (x,)) == (0, 0)
    assert vmap(lambda x: softmax_ext.cross_entropy(x, y, torch.ones(0), reduction="sum"))(randn(2, 3, 0)).tolist() == [
        0,
        0,
    ]
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(softmax_ext.cross_entropy(x, y), x, create_graph=True)
    assert torch.autograd.grad(gradient.sum(), x)[0].shape == x.shape


def test_infinite_weight_of_no_row_under_vmap():
    """Ignored rows count nothing, whatever the weights."""
    weight = torch.tensor([math.inf, 1.0, 2.0, 3.0]).double()
    y = torch.tensor([[-100, 1, 2], [-100, 3, 3]])
    ours = vmap(lambda y: softmax_ext.cross_entropy(X, y, weight))(y)
    assert_close(ours, torch.stack([softmax_ext.cross_entropy(X, row, weight) for row in y]))
    assert ours.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_vmap_in_other_dtypes(dtype):
    """A mean under vmap is rounded once, like the mean itself."""
    x, y = randn(BATCH, 50, 4).to(dtype), randint(4, (BATCH, 50))
    ours = vmap(softmax_ext.cross_entropy)(x, y)
    assert ours.dtype == dtype
    assert_close(ours, stacked(softmax_ext.cross_entropy, (0, 0), x, y))


@each_softmax
@pytest.mark.parametrize("in_dim", [0, 1, 2, -1])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap_of_softmax(dim, in_dim, pair):
    x = randn(BATCH, 2, 4).movedim(0, in_dim)
    ours, theirs = pair
    assert_close(vmap(lambda x: ours(x, dim), in_dim)(x), vmap(lambda x: theirs(x, dim), in_dim)(x))


@each_softmax
def test_vmap_of_softmax_of_numbers(pair):
    ours, theirs = pair
    assert_close(vmap(lambda x: ours(x, 0))(randn(3)), vmap(lambda x: theirs(x, 0))(randn(3)))


@with_options
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (0, None)], ids=str)
def test_gradient_of_each_sample(in_dims, options):
    x, y = randn(BATCH, 2, 4).movedim(0, in_dims[0]), torch.tensor([[0, 3], [2, 1], [1, 3]])
    y = y[0] if in_dims[1] is None else y

    def per_sample(f: Callable[..., Tensor]) -> Tensor:
        return vmap(grad(lambda x, y: f(x, y, **options).sum()), in_dims)(x, y)

    same(per_sample, softmax_ext.cross_entropy, F.cross_entropy)


def test_gradient_of_each_sample_of_a_mean_in_float16():
    """More rows than float16's largest number."""
    rows, scale = 70_000, 4096.0
    x, y = randn(2, rows, 2).half(), torch.arange(2 * rows).view(2, rows) % 2
    ours = vmap(grad(lambda x, y: scale * softmax_ext.cross_entropy(x, y)))(x, y)
    theirs = vmap(grad(lambda x, y: scale * F.cross_entropy(x, y)))(x.float(), y)
    u = torch.finfo(torch.float16).eps
    assert_close(ours.float(), theirs, rtol=u, atol=u * theirs.abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_of_each_sample_to_everything(reduction):
    """Logits, probabilities and weight, all batched."""
    args = randn(BATCH, 2, 4), randn(BATCH, 2, 4, seed=1).softmax(-1), randn(BATCH, 4, seed=2).abs()
    same(
        lambda f: vmap(grad(lambda x, q, w: f(x, q, w, reduction=reduction), (0, 1, 2)))(*args),
        softmax_ext.cross_entropy,
        F.cross_entropy,
    )


@of_classes_or_probabilities
@pytest.mark.parametrize("strategy", [{}, {"precompute_grad": True}, {"inplace": True}], ids=str)
def test_gradient_of_each_sample_with_statistics_and_options(strategy, target):
    x, options = randn(BATCH, 3, 4), {"weight": W, "label_smoothing": 0.2, **OUR_OPTIONS}

    def with_stats(x: Tensor) -> Tensor:
        loss, stats = softmax_ext.cross_entropy(x * 1, target, return_stats=True, **options, **strategy)
        return loss + (stats.lse * 2 + stats.nll * 3 + stats.entropy * 5).sum()

    ours = vmap(grad(with_stats))(x)
    expected = torch.stack([grad(with_stats)(row) for row in x])
    assert_close(ours, expected)


@pytest.mark.parametrize("outer", [jacfwd, jacrev], ids=["fwd", "rev"])
@of_classes_or_probabilities
def test_hessian_of_each_sample(target, outer):
    x = randn(BATCH, 3, 4)
    same(
        lambda f: vmap(outer(grad(lambda x: f(x, target, weight=W))))(x),
        softmax_ext.cross_entropy,
        F.cross_entropy,
    )


def test_forward_mode_of_each_sample():
    x, v, y = randn(BATCH, 2, 4), randn(BATCH, 2, 4, seed=1), torch.tensor([[0, 3], [2, 1], [1, 3]])
    same(
        lambda f: vmap(lambda x, v, y: jvp(lambda x: f(x, y, weight=W), (x,), (v,)))(x, v, y),
        softmax_ext.cross_entropy,
        F.cross_entropy,
    )


def test_forward_mode_over_vmap():
    """The other way round: the tangent is batched inside."""
    x, v, y = randn(BATCH, 2, 4), randn(BATCH, 2, 4, seed=1), torch.tensor([[0, 3], [2, 1], [1, 3]])
    same(
        lambda f: jvp(lambda x: vmap(lambda x, y: f(x, y, weight=W))(x, y), (x,), (v,)),
        softmax_ext.cross_entropy,
        F.cross_entropy,
    )
    same(
        lambda f: grad(lambda x: vmap(lambda x, y: f(x, y, weight=W))(x, y).square().sum())(x),
        softmax_ext.cross_entropy,
        F.cross_entropy,
    )


def test_bad_class_under_vmap():
    with pytest.raises(IndexError, match="got 4"):
        vmap(softmax_ext.cross_entropy)(randn(BATCH, 2, 4), torch.full((BATCH, 2), 4))


# ---- modules -------------------------------------------------------------------------------------------------------


def test_functional_call_with_modules():
    """Per-sample gradients of a model's parameters, the loss a module with a buffer of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    x, y = randn(BATCH, 5), torch.tensor([0, 3, 1])

    def gradients(loss: nn.Module) -> Any:
        def one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return functional_call(loss, {"weight": W}, (functional_call(model, parameters, (x,)), y))

        return vmap(grad(one), (None, 0, 0))(parameters, x, y)

    same(gradients, softmax_ext.CrossEntropyLoss(torch.ones(4).double()), nn.CrossEntropyLoss(torch.ones(4).double()))


def test_jacobian_of_a_model_ending_in_softmax():
    torch.manual_seed(0)
    layer = nn.Linear(3, 4).double()
    same(lambda m: jacfwd(jacrev(lambda x: m(layer(x))))(randn(3)), softmax_ext.Softmax(-1), nn.Softmax(-1))
    same(lambda m: jacfwd(jacrev(lambda x: m(layer(x))))(randn(3)), softmax_ext.LogSoftmax(-1), nn.LogSoftmax(-1))


@pytest.mark.parametrize("linear", [False, True])
def test_weight_that_requires_grad_is_refused_within_vmap(linear):
    """With classes it has no gradient, and vmap's tensors hide that it requires one."""
    matrix, weight = randn(4, 4), torch.stack([W, W]).requires_grad_()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        if linear:
            return softmax_ext.linear_cross_entropy(x, matrix, Y, weight=w)
        return softmax_ext.cross_entropy(x, Y, w)

    with pytest.raises(RuntimeError, match=r"weight must not require grad with class indices.*weight\.detach\(\)"):
        vmap(loss)(torch.stack([X, -X]), weight)
    with torch.no_grad():
        same = vmap(loss)(torch.stack([X, -X]), weight)
    assert_close(vmap(loss)(torch.stack([X, -X]), weight.detach()), same)


def test_class_156_in_a_byte_is_not_ignored():
    """The default ignore_index, -100, is 156 as uint8; values, transforms and second derivatives tell them apart."""
    x, y = randn(3, 200), torch.tensor([156, 3, 7])

    def ours(x: Tensor) -> Tensor:
        return softmax_ext.cross_entropy(x, y.byte())

    def torchs(x: Tensor) -> Tensor:
        return F.cross_entropy(x, y)

    assert_close(ours(x), torchs(x))
    assert_close(jvp(ours, (x,), (x,)), jvp(torchs, (x,), (x,)))
    assert_close(vmap(ours)(torch.stack([x, -x])), torch.stack([torchs(x), torchs(-x)]))
    for second in (lambda f: jvp(grad(f), (x,), (x,))[1], lambda f: grad(lambda x: grad(f)(x).square().sum())(x)):
        assert_close(second(ours), second(torchs))
