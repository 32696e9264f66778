"""The z terms of a mean: with class weights they are divided by the rows that count, and not by the rows' weights."""

import itertools
from typing import Any

import oracle
import pytest
import torch
from cross_entropy_checks import LAYOUTS, Strategy, bounds_for, check, run
from linear_checks import NAMES, limits_for
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.testing import assert_close

from softmax_ext import CrossEntropyLoss, LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy, ops
from softmax_ext.autograd.cross_entropy import CrossEntropy
from softmax_ext.options import MEAN, NONE, SUM, Options

EARLY = [{}, {"precompute_grad": True}, {"inplace": True}, {"precompute_grad": True, "inplace": True}]
STRATEGIES = [Strategy(*flags) for flags in itertools.product([False, True], repeat=3)]
OPTIONS: dict[str, dict[str, Any]] = {
    "z_loss": {"z_loss": 0.1},
    "all": {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.7},
}
PLAIN = Options(1, MEAN, -100, 0.1, 0.05, None, 0.7)


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def target_of(rows: int, classes: int) -> Tensor:
    """Class indices, of which the first is ignored."""
    target = torch.randint(0, classes, (rows,))
    target[0] = -100
    return target


def weights_of(classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """About 10, so that a wrong denominator shows."""
    return (10 + 5 * torch.rand(classes, dtype=torch.float64)).to(dtype)


def row_weights(kind: str, target: Tensor, dtype: torch.dtype) -> Tensor | str | None:
    """None, "probability", or factors of the rows."""
    if kind != "factors":
        return kind or None
    return torch.tensor([0.75, 2.0, -0.5, 1.0, 0.0], dtype=dtype)[torch.arange(target.numel()) % 5].view(target.shape)


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [*EARLY, None], ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_equal_weights_of_any_size_change_nothing(dtype, early, device):
    """A power of two times each weight leaves the bits; None stands for the linear layer."""
    x, w, target = logits(13, 6, dtype=dtype).to(device), logits(9, 6, dtype=dtype).to(device), target_of(13, 9)

    def results(weight: Tensor | None) -> list[Tensor]:
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        options = {"z_loss": 0.1, "label_smoothing": 0.1}
        if early is None:
            loss = linear_cross_entropy(a, b, target.to(device), weight=weight, **options)
        else:
            loss = cross_entropy(a @ b.T, target.to(device), weight, **options, **early)
        return [loss.detach(), *torch.autograd.grad(loss, (a, b))]

    tenfold = torch.full((9,), 8.0, dtype=dtype, device=device)
    rounding = {} if dtype.itemsize > 2 else {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-3}
    assert_close(results(tenfold), results(None), **rounding)


@pytest.mark.parametrize("factors", ["", "factors", "probability"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 17), (131, 3), (2, 5000), (2, 7, 5), (2, 70, 3, 4)], ids=str)
@pytest.mark.parametrize("extra", OPTIONS.values(), ids=OPTIONS)
def test_every_strategy(extra, shape, dtype, factors, device):
    values = (3 * logits(*shape)).to(dtype).to(device)
    target = oracle.make_target("uint8" if shape[1] < 5 else "int64", shape, dtype)
    ignore, given = int(target.reshape(-1)[0]), row_weights(factors, target, dtype)
    given = given.to(device) if isinstance(given, Tensor) else given
    target, weight = target.to(device), weights_of(shape[1], dtype).to(device)
    for layout, denominator in itertools.product(LAYOUTS, [None, 3]):
        options = {"ignore_index": ignore, "row_weight": given, "denominator": denominator, **extra}
        for upstream in (torch.ones((), dtype=dtype, device=device), torch.tensor(-0.375, dtype=dtype, device=device)):
            bounds = bounds_for(values, target, weight, upstream, **options)
            for strategy in STRATEGIES:
                if strategy.scaled == bool(upstream != 1):
                    results = run(layout(values), target, weight, upstream, strategy, **options)
                    check(bounds, strategy, results, (shape, layout.__name__, strategy, options))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_only_a_mean_divides(reduction, device):
    x, target, weight = logits(5, 9).to(device), target_of(5, 9).to(device), weights_of(9).to(device)
    options = {"reduction": reduction, "z_loss": 0.1}
    exact = oracle.cross_entropy(x, target, weight, **options)
    assert_close(cross_entropy(x, target, weight, **options).cpu(), exact.loss)


def test_probabilities_are_divided_by_the_rows(device):
    """As they were: their mean has no class weights in its denominator."""
    x, target, weight = logits(5, 9).to(device), logits(5, 9).softmax(1).to(device), weights_of(9).to(device)
    exact = oracle.cross_entropy(x, target, weight, z_loss=0.1)
    assert_close(cross_entropy(x, target, weight, z_loss=0.1).cpu(), exact.loss)


# ---- rows that do not count, weights that add up to nothing ----------------------------------------------------------


@pytest.mark.parametrize("early", EARLY, ids=str)
@pytest.mark.parametrize("rows", [0, 3], ids=["no rows", "every row ignored"])
def test_nothing_to_learn_from(rows, early, device):
    x = logits(rows, 9).to(device).requires_grad_()
    loss = cross_entropy(x * 1, torch.full((rows,), -100, device=device), weights_of(9).to(device), z_loss=0.1, **early)
    assert loss.isnan()
    loss.backward()
    assert not x.grad.any()


@pytest.mark.parametrize("create_graph", [False, True])
def test_statistics_of_ignored_rows_have_gradients_though_no_row_counts(create_graph, device):
    x, y = logits(3, 9).to(device).requires_grad_(), torch.full((3,), -100, device=device)
    loss, stats = cross_entropy(x, y, weights_of(9).to(device), z_loss=0.1, return_stats=True)
    outputs, upstream = (loss, stats.lse), (torch.ones_like(loss), torch.ones_like(stats.lse))
    (gradient,) = torch.autograd.grad(outputs, x, upstream, create_graph=create_graph)
    assert_close(gradient, x.detach().softmax(1))


@pytest.mark.parametrize("early", [*EARLY, None], ids=str)
def test_class_weights_that_add_up_to_nothing(early, device):
    """torch's mean is 0 / 0 with weights of 0, and infinite with weights of both signs; the z terms change neither."""
    x, w, y = logits(4, 6).to(device), logits(3, 6).to(device), torch.tensor([0, 1, 0, 1], device=device)
    for weights, expected in (([0.0, 0.0, 1.0], torch.isnan), ([1.0, -1.0, 0.0], torch.isinf)):
        weight = torch.tensor(weights, dtype=torch.float64, device=device)
        a = x.clone().requires_grad_()
        if early is None:
            loss = linear_cross_entropy(a, w, y, weight=weight, z_loss=0.1)
        else:
            loss = cross_entropy(a @ w.T, y, weight, z_loss=0.1, **early)
        assert expected(loss)
        assert not torch.autograd.grad(loss, a)[0].isfinite().any()


def test_weights_of_both_signs(device):
    x, y = logits(5, 3).to(device), torch.tensor([0, 1, 0, 2, 1], device=device)
    weight = torch.tensor([2.0, -0.5, 0.0], dtype=torch.float64, device=device)
    for early in EARLY:
        exact = oracle.cross_entropy(x, y, weight, z_loss=0.1)
        a = x.clone().requires_grad_()
        loss = cross_entropy(a * 1, y, weight, z_loss=0.1, **early)
        assert_close(loss.detach().cpu(), exact.loss)
        assert_close(torch.autograd.grad(loss, a)[0].cpu(), exact.grad)


# ---- derivatives -----------------------------------------------------------------------------------------------------


def loss_of(x: Tensor, y: Tensor, weight: Tensor, row_weight: Tensor | None = None) -> Tensor:
    return cross_entropy(x, y, weight, label_smoothing=0.2, z_loss=0.1, softcap=3.0, row_weight=row_weight)


def plain_of(x: Tensor, y: Tensor, weight: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """The same by torch's operations, for transforms."""
    z = 3.0 * torch.tanh(x / 3.0)
    shares = torch.ones(y.shape, dtype=x.dtype) if row_weight is None else row_weight
    shares = torch.where(y == -100, 0.0, shares)
    rows = torch.nn.functional.cross_entropy(z, y, weight, reduction="none", label_smoothing=0.2)
    of_weights = (shares * weight[y.clamp(min=0)]).sum()
    return (shares * rows).sum() / of_weights + (shares * 0.1 * z.logsumexp(-1).square()).sum() / shares.sum()


@pytest.mark.parametrize("factors", ["", "factors"])
def test_second_derivatives(factors):
    x, y, weight = logits(5, 4).requires_grad_(), target_of(5, 4), weights_of(4)
    given = row_weights(factors, y, torch.float64)
    gradcheck(lambda x: loss_of(x, y, weight, given), x, check_forward_ad=True, check_batched_grad=True)
    gradgradcheck(lambda x: loss_of(x, y, weight, given), x, check_fwd_over_rev=True, check_batched_grad=True)
    plain = hessian(plain_of)(x.detach(), y, weight, given)
    assert_close(hessian(loss_of)(x.detach(), y, weight, given), plain)
    assert_close(jacfwd(grad(loss_of))(x.detach(), y, weight, given), plain)


BATCHED = {
    "logits": (0, None, None, None),
    "targets": (None, 0, None, None),
    "logits and targets": (0, 0, None, None),
    "class weights": (0, 0, 0, None),
    "row weights": (None, None, None, 0),
    "all": (0, 0, 0, 0),
}


@pytest.mark.parametrize("dims", BATCHED.values(), ids=BATCHED)
def test_vmap(dims):
    y = torch.stack([target_of(5, 4) for _ in range(3)])
    given = torch.rand(3, 5, dtype=torch.float64) + 0.5
    arguments = [logits(3, 5, 4), y, weights_of(12).view(3, 4), given]
    arguments = [a if d == 0 else a[0] for a, d in zip(arguments, dims, strict=True)]
    for ours, theirs in (
        (loss_of, plain_of),
        (grad(loss_of), grad(plain_of)),
        (hessian(loss_of), hessian(plain_of)),
        (lambda *a: jvp(grad(lambda x: loss_of(x, *a[1:])), a[:1], a[:1])[1],) * 2,
    ):
        if ours is theirs:
            theirs = lambda *a: jvp(grad(lambda x: plain_of(x, *a[1:])), a[:1], a[:1])[1]  # noqa: E731
        samples = [[a[i] if d == 0 else a for a, d in zip(arguments, dims, strict=True)] for i in range(3)]
        assert_close(vmap(ours, dims)(*arguments), torch.stack([theirs(*sample) for sample in samples]))


def test_vmap_of_a_gradient_whose_call_was_not_vmapped():
    """Of several upstream gradients at once: the total weight has no samples."""
    x, y, weight = logits(5, 4).requires_grad_(), target_of(5, 4), weights_of(4)
    pulls = torch.rand(3, dtype=torch.float64)
    pull_back = torch.func.vjp(lambda x: loss_of(x, y, weight), x.detach())[1]
    expected = torch.autograd.grad(plain_of(x, y, weight), x)[0]
    assert_close(vmap(pull_back)(pulls)[0], pulls.view(3, 1, 1) * expected)
    (batched,) = torch.autograd.grad(loss_of(x, y, weight), x, pulls, is_grads_batched=True)
    assert_close(batched, pulls.view(3, 1, 1) * expected)


# ---- the linear layer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", ["", "factors", "probability"])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["", "float32 logits"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_plans(name, dtype, logits_dtype, factors, device):
    rows, features, classes = size = (50, 6, 600)
    if logits_dtype is not None and dtype.itemsize != 2:
        pytest.skip("half types only")
    x, w = (torch.randn(n, features, dtype=torch.float64).to(dtype) for n in (rows, classes))
    y, weight = target_of(rows, classes), weights_of(classes)
    given = row_weights(factors, y, torch.float64)
    limits = {**limits_for(name, size, dtype), "logits_dtype": logits_dtype}
    options = {"z_loss": 0.05, "label_smoothing": 0.1}

    a, b = oracle.double(x).requires_grad_(), oracle.double(w).requires_grad_()
    exact = oracle.cross_entropy_loss(a @ b.T, y, weight, row_weight=given, **options)
    right = torch.autograd.grad(exact, (a, b))
    x, w = x.to(device).requires_grad_(), w.to(device).requires_grad_()
    given = given.to(device) if isinstance(given, Tensor) else given

    def loss_of(**more: Any) -> Any:
        arguments = {"weight": weight.to(device, dtype), "row_weight": given, **limits, **options, **more}
        return linear_cross_entropy(x, w, y.to(device), **arguments)

    relative = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]

    def check(loss: Tensor, gradients: tuple[Tensor, ...]) -> None:
        assert_close(loss.detach().cpu().double(), exact.detach(), rtol=relative, atol=0)
        for mine, exactly in zip(gradients, right, strict=True):
            largest = exactly.abs().max()
            assert (mine.cpu().double() - exactly).abs().max() <= relative * largest, (mine.dtype, largest)

    loss = loss_of()
    check(loss, torch.autograd.grad(loss, (x, w), retain_graph=True))
    check(loss, torch.autograd.grad(loss, (x, w)))  # computed again
    loss, stats = loss_of(return_stats=True)
    check(loss, torch.autograd.grad(loss + 0 * stats.entropy.sum(), (x, w)))
    with torch.no_grad():
        assert_close(loss_of().cpu().double(), exact.detach(), rtol=relative, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_of_the_linear_layer(name):
    rows, features, classes = size = (4, 2, 60)
    x, w = logits(rows, features).requires_grad_(), logits(classes, features).requires_grad_()
    y, weight = target_of(rows, classes), weights_of(classes)
    limits = limits_for(name, size, torch.float64)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, y, weight=weight, z_loss=0.1, **limits)

    gradcheck(loss, (x, w), check_forward_ad=True)
    gradgradcheck(loss, (x, w))
    expected = hessian(lambda x: cross_entropy(x @ w.detach().T, y, weight, z_loss=0.1))(x.detach())
    assert_close(hessian(lambda x: loss(x, w.detach()))(x.detach()), expected)
    samples = torch.stack([x.detach(), 2 * x.detach()])
    vmapped = vmap(lambda x: grad(lambda x: loss(x, w.detach()))(x))(samples)
    expected = torch.stack([grad(lambda x: loss(x, w.detach()))(sample) for sample in samples])
    assert_close(vmapped, expected)


# ---- operators, modules, compiled code -------------------------------------------------------------------------------


def test_the_total_weight_of_the_operators(device):
    """Two numbers where the z terms have a denominator of their own: csrc/ops/schema.cpp."""
    x, y, weight = logits(5, 9).to(device), target_of(5, 9).to(device), weights_of(9).to(device)

    def total(weight: Tensor | None, options: Options, target: Tensor = y, denominator: Tensor | None = None) -> Tensor:
        results = ops.cross_entropy(x, target, weight, *options, None, False, False, denominator)
        fake = ops.fake_cross_entropy(x, target, weight, *options, None, False, False, denominator)
        assert [t.shape for t in results] == [t.shape for t in fake]
        return results[2].cpu()

    of_weights = weight[y[1:]].sum().cpu()
    assert_close(total(weight, PLAIN), torch.stack([of_weights, of_weights / 4]))
    assert_close(total(None, PLAIN), torch.tensor(4.0, dtype=torch.float64))
    assert_close(total(weight, PLAIN._replace(z_loss=0.0)), of_weights)
    assert_close(total(weight, PLAIN, logits(5, 9).softmax(1).to(device)), torch.tensor(5.0, dtype=torch.float64))
    assert_close(total(weight, PLAIN, y, torch.tensor(7.0, device=device, dtype=torch.float64)).item(), 7.0)
    assert total(weight, PLAIN._replace(reduction=SUM)).shape == (0,)


def test_a_factor_counts_with_every_reduction(device):
    x, y, weight = logits(5, 9).to(device), target_of(5, 9).to(device), weights_of(9).to(device)
    pair = torch.tensor([1.0, 3.0], dtype=torch.float64, device=device)
    rows = PLAIN._replace(reduction=NONE)
    results = ops.cross_entropy(x, y, weight, *rows, None, False, True, pair)
    enlarged = rows._replace(z_loss=3 * PLAIN.z_loss)
    assert_close(results[0], ops.cross_entropy(x, y, weight, *enlarged, None, False, False)[0])
    arguments = (torch.ones_like(results[0]), None, None, None, x, y, weight, results[1], results[2], None)
    gradient, _ = ops.cross_entropy_backward(*arguments, *rows, True, False)
    assert_close(gradient, results[3])
    assert_close(gradient, ops.cross_entropy(x, y, weight, *enlarged, None, False, True)[3])


@pytest.mark.parametrize("denominator", [torch.ones(3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
def test_other_denominators_are_refused(denominator, device):
    with pytest.raises(RuntimeError, match="denominator must be"):
        ops.cross_entropy(
            logits(5, 9).to(device),
            target_of(5, 9).to(device),
            None,
            *PLAIN,
            None,
            False,
            False,
            denominator.to(device),
        )


def test_modules():
    x, y, weight = logits(5, 9), target_of(5, 9), weights_of(9)
    expected = oracle.cross_entropy(x, y, weight, z_loss=0.1).loss
    assert_close(CrossEntropyLoss(weight, z_loss=0.1)(x, y), expected)
    layer = LinearCrossEntropyLoss(6, 9, weight=weight, z_loss=0.1, dtype=torch.float64)
    hidden = logits(5, 6)
    expected = oracle.cross_entropy(hidden @ layer.linear.weight.detach().T, y, weight, z_loss=0.1).loss
    assert_close(layer(hidden, y).detach(), expected)


def test_a_denominator_with_a_factor_within_the_function():
    """As the linear layer hands its total weight to the cross entropy of all logits."""
    x, y, weight = logits(3, 5, 9), target_of(5, 9), weights_of(9)
    pair = torch.tensor([2.0, 3.0], dtype=torch.float64)

    def loss(x: Tensor, pair: Tensor) -> Tensor:
        return CrossEntropy.apply(x, y, weight, pair, PLAIN, None, False, None)[0]

    expected = torch.stack([loss(sample, pair) for sample in x])
    assert_close(vmap(loss, (0, None))(x, pair), expected)
    assert_close(vmap(loss, (0, 0))(x, pair.expand(3, 2)), expected)
