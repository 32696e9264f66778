"""The short way of an eager call: the same results as the long one, and taken only where no transform is at work."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch._dynamo.compiled_autograd as compiled_autograd
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing import assert_close

import softmax_ext
from softmax_ext import cross_entropy, functional
from softmax_ext.autograd.cross_entropy import CrossEntropy, EagerCrossEntropy, eager_cross_entropy
from softmax_ext.autograd.softmax import Softmax, eager_softmax
from softmax_ext.options import MEAN, Options

SMOOTH = Options(dim=1, reduction=1, ignore_index=-100, label_smoothing=0.1, z_loss=0.01, softcap=5.0, logit_scale=0.7)
PLAIN = [
    SMOOTH._replace(reduction=reduction, label_smoothing=0.0, z_loss=0.0, softcap=None, logit_scale=1.0)
    for reduction in range(3)
]


def _exact(ours: Any, theirs: Any) -> None:
    assert_close(ours, theirs, rtol=0, atol=0)


def _logits(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def _target(kind: str) -> Tensor:
    return torch.randint(0, 10, (8,)) if kind == "classes" else torch.randn(8, 10).softmax(1)


@pytest.mark.parametrize("options", [*PLAIN, SMOOTH])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("divisor", [None, 3.0])
@pytest.mark.parametrize("row_weight", [None, "given", "probability"])
def test_the_short_function_is_the_long_one(row_weight, options, kind, stats, divisor):
    """Values, first and second derivatives to the last bit."""
    if divisor is not None:
        options = options._replace(reduction=MEAN)
    if row_weight == "probability":
        if kind == "probabilities":
            return
        options = options._replace(weighs_by_probability=True)
    denominator = None if divisor is None else torch.tensor(divisor, dtype=torch.float64)
    factors = torch.rand(8) if row_weight == "given" else None
    x, target, weight = _logits(8, 10), _target(kind), torch.rand(10)
    target.requires_grad_(kind == "probabilities")
    inputs = (x, target) if target.requires_grad else (x,)
    state_and_total = slice(1, 3)
    long = list(CrossEntropy.apply(x, target, weight, denominator, options, None, stats, factors))
    del long[state_and_total]
    call = (options, None, stats, False, False, denominator, factors)
    short = list(eager_cross_entropy(x, target, weight, *call))
    by_torch = EagerCrossEntropy.apply(x, target, weight, call)
    by_torch = list(by_torch) if stats else [by_torch]
    first, second = [], []
    for results in (long, short, by_torch):
        assert [r.requires_grad for r in results] == [r.requires_grad for r in long]
        _exact(results, long)
        total = sum(r.sin().sum() for r in results if r.requires_grad)
        gradients = torch.autograd.grad(total, inputs, create_graph=True)
        first.append(gradients)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs))
    for derivatives in (first, second):
        _exact(derivatives[1], derivatives[0])
        _exact(derivatives[2], derivatives[0])


@pytest.mark.parametrize("log", [False, True])
def test_the_short_softmax_is_the_long_one(log):
    x, g = _logits(8, 10), torch.randn(8, 10)
    short, long = (f(x, 1, log, torch.float64) for f in (eager_softmax, Softmax.apply))
    _exact(short, long)
    _exact(*(torch.autograd.grad(y, x, g.double())[0] for y in (short, long)))


def test_which_function_an_eager_call_takes():
    x, target = _logits(8, 10), _target("classes")
    assert cross_entropy(x, target).grad_fn.name() == "EagerCrossEntropyBackward"
    assert cross_entropy(x, target, precompute_grad=True).grad_fn.name() == "EagerCrossEntropyBackward"
    assert softmax_ext.softmax(x, 1).grad_fn.name() == "SoftmaxBackward"
    assert cross_entropy(x.detach(), target).grad_fn is None


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "forward_ad": lambda f, x: _dual(f, x),
}


def _dual(f: Any, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("precompute_grad", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_transform_takes_the_long_way(transform, precompute_grad, requires_grad, monkeypatch):
    def unexpected(*args: Any) -> Any:
        raise AssertionError("a transform reached the Function for plain eager calls")

    for name in ("eager_cross_entropy", "eager_softmax"):
        monkeypatch.setattr(functional, name, unexpected)
    x, target = _logits(8, 10).detach().requires_grad_(requires_grad), _target("classes")
    run = TRANSFORMS[transform]
    ours = run(lambda x: cross_entropy(x, target, precompute_grad=precompute_grad), x)
    assert_close(ours, run(lambda x: F.cross_entropy(x, target), x))
    assert_close(run(lambda x: softmax_ext.softmax(x, 1), x), run(lambda x: F.softmax(x, 1), x))


@pytest.mark.parametrize(
    "ours",
    [
        cross_entropy,
        lambda x, target: cross_entropy(x, target, precompute_grad=True),
        lambda x, target: (softmax_ext.log_softmax(x, 1) * target.sum()).square().sum(),
    ],
)
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_tensors_that_have_outlived_their_transform(ours, kind):
    """Torch's apply takes the wrapper off, and so must we: the gradient belongs to the tensor within."""
    leaked: list[Tensor] = []

    def keep(*args: Tensor) -> Tensor:
        leaked.extend(args)
        return args[0].sum()

    x, target = _logits(8, 10), _target(kind)
    torch.func.vjp(keep, *((x, target) if kind == "probabilities" else (x,)))
    ours(leaked[0], leaked[-1] if kind == "probabilities" else target).backward()
    assert x.grad is not None
    assert_close(x.grad, torch.autograd.grad(ours(x, target), x)[0])


@pytest.mark.parametrize("options", [{}, {"precompute_grad": True}, {"return_stats": True}])
def test_nothing_is_kept_alive(options):
    """A result is freed with its last name, and what backward used after it: no cycle through ctx."""
    gc.collect()
    gc.disable()
    try:
        x, target = _logits(8, 10), _target("classes")
        logits = x * 1
        seen = weakref.ref(logits)
        results = cross_entropy(logits, target, **options)
        del logits
        assert seen() is not None
        del results
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{}, {"precompute_grad": True}])
def test_backward_frees_what_was_saved(options):
    loss = cross_entropy(_logits(8, 10), _target("classes"), **options)
    loss.backward()
    with pytest.raises(RuntimeError, match="after they have already been freed"):
        loss.grad_fn.saved_tensors  # noqa: B018


def test_no_gradient_from_above_is_none():
    """A later Function that hands back None: no gradient, not zeros."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    for options in ({}, {"precompute_grad": True}):
        x = _logits(8, 10)
        Stop.apply(cross_entropy(x, _target("classes"), **options)).backward()
        assert x.grad is None


@pytest.mark.parametrize("stats", [False, True])
def test_saved_tensor_hooks_see_what_is_kept(stats):
    packed: list[Tensor] = []
    x, target = _logits(8, 10), _target("classes")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        results = cross_entropy(x, target, return_stats=stats, precompute_grad=True)
    assert len(packed) == 4 + stats  # logits, target, state, total_weight, entropy
    loss = results[0] if stats else results
    assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(F.cross_entropy(x, target), x)[0])


def test_compiled_autograd():
    """An eager forward, its backward compiled without a graph break."""
    x, target = _logits(8, 10), _target("classes")
    torch._dynamo.reset()
    for f in (lambda: cross_entropy(x, target), lambda: softmax_ext.log_softmax(x, 1)[:, 0].sum()):
        expected = torch.autograd.grad(f(), x)[0]
        x.grad = None
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager", fullgraph=True)):
            f().backward()
        assert_close(x.grad, expected)


@pytest.mark.parametrize("linear", [False, True])
def test_second_backward_of_compiled_autograd(linear):
    """A gradient that was computed ahead is scaled and handed over once, and computed again after that."""
    torch._dynamo.reset()
    x, target = _logits(8, 10), _target("classes")

    def loss() -> Tensor:
        if linear:
            return softmax_ext.linear_cross_entropy(x, torch.eye(10), target)
        return cross_entropy(x, target, precompute_grad=True)

    expected = torch.autograd.grad(loss(), x)[0]
    retained = 3 * loss()
    for _ in range(2):
        x.grad = None
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
            retained.backward(retain_graph=True)
        assert_close(x.grad, 3 * expected)
