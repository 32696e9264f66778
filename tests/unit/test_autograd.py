"""What autograd can do with the results: first and second derivatives of every kind, and who gets a gradient at all.

Derivatives are held against finite differences (gradcheck), in float64: reverse and forward mode, batched by vmap,
reverse over reverse and forward over reverse. Each case runs in both layouts of the kernels: a single row lies along
the vectors, several short rows share them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seeded import randint, randn
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close

import softmax_ext
from softmax_ext import cross_entropy

FIRST = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
SECOND = {"check_fwd_over_rev": True, "check_batched_grad": True}

# Classes in dimension 1, or 0 where there is one. The last goes along the vectors with a tail, and is checked along a
# random direction only (fast mode).
SMALL = [(5,), (3, 4), (1, 3, 2), (4, 2)]
LONG = (2, 40)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": True},
    "label_smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "softcap": {"softcap": 1.5},
    "logit_scale": {"logit_scale": 0.7},
    "all": {"weight": True, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 1.5, "logit_scale": 0.7},
}
REDUCTIONS = ("mean", "sum", "none")

# Every option with the mean; the other reductions with none and with all.
OPTION_CASES = [
    pytest.param(options, REDUCTIONS if name in ("plain", "all") else ("mean",), id=name)
    for name, options in OPTIONS.items()
]


def shape_name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def logits_for(shape: tuple[int, ...], **kwargs: Any) -> Tensor:
    return randn(*shape, **kwargs).requires_grad_()


def class_dim(shape: tuple[int, ...]) -> int:
    return 0 if len(shape) == 1 else 1


def classes_for(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    """At least one row is of class 0, and one of another class where there are two rows."""
    batch = [n for d, n in enumerate(shape) if d != class_dim(shape)]
    target = randint(shape[class_dim(shape)], batch, seed)
    target.view(-1)[0] = 0
    if target.numel() > 1:
        target.view(-1)[1] = 1
    return target


def probabilities_for(shape: tuple[int, ...], seed: int = 1, **kwargs: Any) -> Tensor:
    return randn(*shape, seed=seed, **kwargs).softmax(class_dim(shape)).requires_grad_()


def with_weight(options: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """``weight: True`` replaced by one value for each class."""
    if not options.get("weight"):
        return options
    return {**options, "weight": randn(shape[class_dim(shape)], seed=2).abs() + 0.5}


def check(function: Callable[..., Any], inputs: tuple[Tensor, ...], fast: bool = False, second: bool = True) -> None:
    assert gradcheck(function, inputs, fast_mode=fast, **FIRST)
    if second:
        assert gradgradcheck(function, inputs, fast_mode=fast, **SECOND)


# ---- derivatives against finite differences ------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "reductions"), OPTION_CASES)
@pytest.mark.parametrize("shape", SMALL, ids=shape_name)
def test_class_indices(shape, options, reductions):
    options, target = with_weight(options, shape), classes_for(shape)
    for reduction in reductions:
        check(lambda x: cross_entropy(x, target, reduction=reduction, **options), (logits_for(shape),))  # noqa: B023


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("ignore_index", [-100, 0, 1, 999])
def test_ignored_rows(options, ignore_index):
    shape = (3, 4)
    target = classes_for(shape)
    if not 0 <= ignore_index < 4:
        target[2] = ignore_index
    options = with_weight(options, shape)
    check(lambda x: cross_entropy(x, target, ignore_index=ignore_index, **options), (logits_for(shape),))
    x = logits_for(shape)
    cross_entropy(x, target, ignore_index=ignore_index, **options).backward()
    assert torch.equal((x.grad == 0).all(1), target == ignore_index)


@pytest.mark.parametrize(("options", "reductions"), OPTION_CASES)
@pytest.mark.parametrize("shape", [(4,), (2, 3), (1, 2, 2)], ids=shape_name)
def test_probabilities(shape, options, reductions):
    """The gradient to the logits, to the target, and every mixed second derivative."""
    options = with_weight(options, shape)
    for reduction in reductions:
        check(
            lambda x, q: cross_entropy(x, q, reduction=reduction, **options),  # noqa: B023
            (logits_for(shape), probabilities_for(shape)),
        )


def test_logit_scale_of_zero():
    """All classes are equal: the gradient to the logits is 0, that to the probabilities log C."""
    inputs = logits_for((2, 3)), probabilities_for((2, 3))
    check(lambda x, q: cross_entropy(x, q, logit_scale=0.0), inputs)
    cross_entropy(*inputs, logit_scale=0.0, reduction="sum").backward()
    assert torch.equal(inputs[0].grad, torch.zeros(2, 3).double())
    assert_close(inputs[1].grad, torch.full((2, 3), 3.0).double().log())


@pytest.mark.parametrize("options", [{}, {"weight": True, "label_smoothing": 0.2}], ids=["plain", "weight"])
def test_second_derivative_at_one_hot_probabilities(options):
    """A q of 0 ends the class's loss, not its derivative."""
    x, q, v = randn(3, 4), F.one_hot(classes_for((3, 4)), 4).double(), randn(3, 4, seed=3)
    options = with_weight(options, (3, 4))
    ours, theirs = (
        torch.autograd.functional.hvp(lambda q: f(x, q, **options) ** 2, q, v)[1]  # noqa: B023
        for f in (cross_entropy, F.cross_entropy)
    )
    assert theirs.abs().max() > 0
    assert_close(ours, theirs)


@pytest.mark.parametrize("kind", [classes_for, probabilities_for])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_long_rows(kind, options):
    options, target = with_weight(options, LONG), kind(LONG)
    inputs = (logits_for(LONG), target) if target.is_floating_point() else (logits_for(LONG),)
    check(lambda x, q=target: cross_entropy(x, q, **options), inputs, fast=True)


@pytest.mark.parametrize("kind", [classes_for, probabilities_for])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("shape", [(4,), (2, 3), LONG], ids=shape_name)
def test_statistics(shape, kind, options):
    """The loss, lse, nll and entropy are all differentiable, and twice."""
    options, target = with_weight(options, shape), kind(shape)

    def results(x: Tensor, q: Tensor = target) -> tuple[Tensor, ...]:
        loss, stats = cross_entropy(x, q, return_stats=True, **options)
        return loss, stats.lse, stats.nll, stats.entropy

    inputs = (logits_for(shape), target) if target.is_floating_point() else (logits_for(shape),)
    check(results, inputs, fast=shape == LONG)


@pytest.mark.parametrize("name", ["lse", "nll", "entropy"])
@pytest.mark.parametrize("kind", [classes_for, probabilities_for])
def test_one_statistic_alone(kind, name):
    """Gradients that are missing count as zero, whichever they are."""
    shape = (2, 3)
    target = kind(shape)
    inputs = (logits_for(shape), target) if target.is_floating_point() else (logits_for(shape),)
    options = with_weight(OPTIONS["all"], shape)
    check(lambda x, q=target: getattr(cross_entropy(x, q, return_stats=True, **options)[1], name), inputs)


def test_statistics_of_an_ignored_row():
    """Ignoring a row ends its loss and nll, not its lse and entropy."""
    x, target = logits_for((2, 3)), torch.tensor([-100, 1])
    for name in ("lse", "nll", "entropy"):
        check(lambda x: getattr(cross_entropy(x, target, return_stats=True)[1], name), (x,))  # noqa: B023


def test_prediction_and_unused_results_have_no_gradient():
    x = logits_for((3, 4))
    loss, stats = cross_entropy(x, classes_for((3, 4)), return_stats=True)
    assert not stats.prediction.requires_grad
    assert stats.lse.requires_grad
    assert stats.nll.requires_grad
    assert stats.entropy.requires_grad
    loss.backward()  # with no gradient for the rest
    expected = torch.autograd.grad(F.cross_entropy(x, classes_for((3, 4))), x)[0]
    assert_close(x.grad, expected)


def test_statistics_together_are_the_sum_of_each():
    shape, weights = (3, 4), (2.0, 3.0, 5.0, 7.0)
    x, target = logits_for(shape), classes_for(shape)

    def results() -> tuple[Tensor, ...]:
        loss, stats = cross_entropy(x, target, return_stats=True)
        return loss, stats.lse.sum(), stats.nll.sum(), stats.entropy.sum()

    together = torch.autograd.grad(sum(w * r for w, r in zip(weights, results(), strict=True)), x)[0]
    one_by_one = sum(w * torch.autograd.grad(results()[i], x)[0] for i, w in enumerate(weights))
    assert_close(together, one_by_one)


@pytest.mark.parametrize("weight_needs_grad", [False, True])
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_statistics_are_no_part_of_the_loss(linear, weight_needs_grad):
    """What the caller does to them is not seen there."""
    x, q = logits_for((3, 4)), probabilities_for((3, 4)).detach()
    weight = torch.ones(4, dtype=torch.float64, requires_grad=weight_needs_grad)

    def gradient(hooked: bool) -> Tensor:
        options = {"weight": weight, "z_loss": 0.1, "return_stats": True}
        if linear:
            loss, stats = softmax_ext.linear_cross_entropy(x, torch.eye(4).double(), q, **options)
        else:
            loss, stats = cross_entropy(x, q, **options)
        if hooked:
            for statistic in (stats.lse, stats.nll, stats.entropy):
                statistic.register_hook(lambda g: g if g is None else 100 * g)
            stats.lse.detach().zero_()
            stats.nll.detach().zero_()
        return torch.autograd.grad(loss, x)[0]

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("function", [softmax_ext.softmax, softmax_ext.log_softmax])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((), 0), ((5,), 0), ((3, 4), 0), ((3, 4), 1), ((2, 3, 2), 0), ((2, 3, 2), 1), ((2, 3, 2), -1)],
    ids=str,
)
def test_softmax(function, shape, dim):
    check(lambda x: function(x, dim), (logits_for(shape),))


@pytest.mark.parametrize("function", [softmax_ext.softmax, softmax_ext.log_softmax])
@pytest.mark.parametrize("dim", [0, 1])
def test_softmax_long(function, dim):
    check(lambda x: function(x, dim), (logits_for((2, 40) if dim else (40, 2)),), fast=True)


# ---- strategies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [classes_for, probabilities_for])
@pytest.mark.parametrize("shape", [(4,), (2, 3)], ids=shape_name)
def test_precomputed_gradient_is_differentiable(shape, kind):
    target = kind(shape).detach()
    options = with_weight(OPTIONS["all"], shape)

    def loss(x: Tensor) -> Tensor:
        return cross_entropy(x, target, precompute_grad=True, **options)

    assert gradcheck(loss, (logits_for(shape),), check_batched_grad=True)
    assert gradgradcheck(loss, (logits_for(shape),), check_batched_grad=True)


@pytest.mark.parametrize("precompute_grad", [False, True])
def test_gradient_penalty(precompute_grad):
    """create_graph, then a second backward through both graphs."""
    target = classes_for((3, 4))

    def penalised(function: Callable[..., Tensor], **options: Any) -> Tensor:
        x = logits_for((3, 4))
        loss = function(x.exp(), target, **options)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + gradient.square().sum()).backward()
        return x.grad

    assert_close(penalised(cross_entropy, precompute_grad=precompute_grad), penalised(F.cross_entropy))


@pytest.mark.parametrize("precompute_grad", [False, True])
def test_double_backward_of_a_mean_in_float16(precompute_grad):
    """The number of rows is no float16, and what is divided by it is lost unless the upstream gradient comes first."""
    rows, scale = 70_000, 4096.0
    x, target = randn(rows, 2).half(), classes_for((rows, 2))

    def second(function: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scale * function(x, target, **options), x, create_graph=True)
        return torch.autograd.grad(gradient[:, 0].sum(), x)[0]

    ours = second(cross_entropy, x, precompute_grad=precompute_grad)
    theirs = second(F.cross_entropy, x.float())
    u = torch.finfo(torch.float16).eps
    assert_close(ours.float(), theirs, rtol=u, atol=u * theirs.abs().max().item())


@pytest.mark.parametrize("precompute_grad", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_retained_graph_gives_the_same_gradient_again(reduction, precompute_grad):
    """With another upstream gradient each time; the first precomputed one must survive the second."""
    x, target = logits_for((3, 4)), classes_for((3, 4))
    loss = cross_entropy(x, target, reduction=reduction, precompute_grad=precompute_grad)
    expected = torch.autograd.grad(F.cross_entropy(x, target, reduction=reduction).sum(), x)[0]
    gradients = [torch.autograd.grad(loss, x, torch.full_like(loss, s), retain_graph=True)[0] for s in (1.0, 2.0, 0.5)]
    for scale, gradient in zip((1.0, 2.0, 0.5), gradients, strict=True):
        assert_close(gradient, scale * expected)


# ---- gradients that autograd batches -------------------------------------------------------------------------------

TARGET, PROJECTION = classes_for((3, 4)), randn(4, 4, seed=3)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "none": (
        lambda x: cross_entropy(x, TARGET, reduction="none"),
        lambda x: F.cross_entropy(x, TARGET, reduction="none"),
    ),
    "mean": (lambda x: cross_entropy(x, TARGET), lambda x: F.cross_entropy(x, TARGET)),
    "precomputed": (lambda x: cross_entropy(x, TARGET, precompute_grad=True), lambda x: F.cross_entropy(x, TARGET)),
    "probabilities": (lambda x: cross_entropy(x, x), lambda x: F.cross_entropy(x, x)),
    "linear none": (
        lambda x: softmax_ext.linear_cross_entropy(x, PROJECTION, TARGET, reduction="none"),
        lambda x: F.cross_entropy(F.linear(x, PROJECTION), TARGET, reduction="none"),
    ),
    "linear mean": (
        lambda x: softmax_ext.linear_cross_entropy(x, PROJECTION, TARGET),
        lambda x: F.cross_entropy(F.linear(x, PROJECTION), TARGET),
    ),
    "softmax": (lambda x: softmax_ext.softmax(x, 1), lambda x: F.softmax(x, 1)),
    "log_softmax": (lambda x: softmax_ext.log_softmax(x, 1), lambda x: F.log_softmax(x, 1)),
}
each_function = pytest.mark.parametrize("pair", FUNCTIONS.values(), ids=FUNCTIONS)


def one_hot_like(result: Tensor) -> Tensor:
    """Upstream gradients whose batch makes a Jacobian."""
    return torch.eye(result.numel(), dtype=result.dtype).view(-1, *result.shape)


@each_function
def test_batched_gradients_keep_their_graph(pair):
    """What is differentiated again may be reached through the logits alone."""
    seconds = []
    for function in pair:
        inputs = logits_for((3, 4)), randn(4, 4, seed=2).requires_grad_()
        result = function(inputs[0] @ inputs[1])
        options = {"is_grads_batched": True, "create_graph": True}
        (first,) = torch.autograd.grad(result, inputs[0], one_hot_like(result), **options)
        directions = randn(2, *first.shape, seed=4)
        (second,) = torch.autograd.grad(first, inputs[1], directions, **options)
        seconds.append((second, *torch.autograd.grad(second.pow(3).sum(), inputs)))
    assert_close(*seconds)


@each_function
@pytest.mark.parametrize("of_input", [True, False], ids=["input", "upstream"])
def test_batched_gradients_keep_their_tangent(pair, of_input):
    tangents = []
    for function in pair:
        x = logits_for((3, 4))
        with forward_ad.dual_level():
            result = function(forward_ad.make_dual(x, randn(3, 4, seed=2)) if of_input else x)
            upstream = one_hot_like(result)
            if not of_input:
                upstream = forward_ad.make_dual(upstream, randn(*upstream.shape, seed=4))
            (gradient,) = torch.autograd.grad(result, x, upstream, is_grads_batched=True)
            tangents.append(forward_ad.unpack_dual(gradient).tangent)
    assert tangents[1].abs().max() > 0
    assert_close(*tangents)


@pytest.mark.parametrize("function", [softmax_ext.softmax, softmax_ext.log_softmax])
def test_batched_gradients_of_halves(function):
    """Computed in float32 where they are differentiated again, too."""
    x = logits_for((3, 40), dtype=torch.bfloat16)
    upstream = randn(2, 3, 40, seed=3, dtype=torch.bfloat16)
    (ours,) = torch.autograd.grad(function(x, 1), x, upstream, is_grads_batched=True, create_graph=True)
    expected = torch.stack([torch.autograd.grad(function(x, 1), x, g)[0] for g in upstream])
    assert ours.dtype == torch.bfloat16
    assert_close(ours, expected)


# ---- who gets a gradient -------------------------------------------------------------------------------------------


def test_only_what_is_needed_is_computed(monkeypatch):
    """needs_input_grad reaches the operator, so that no gradient is computed for nothing."""
    from softmax_ext import ops

    seen = []
    real = ops.cross_entropy_backward

    def recording(*args: Any, **further: Any) -> Any:
        seen.append(args[-2:])
        return real(*args, **further)

    monkeypatch.setattr(ops, "cross_entropy_backward", recording)
    x, q = randn(3, 4), randn(3, 4, seed=1).softmax(1)
    for needs in ((True, False), (False, True), (True, True)):
        inputs = [t.clone().requires_grad_(n) for t, n in zip((x, q), needs, strict=True)]
        cross_entropy(*inputs).backward()
        assert seen.pop() == needs
        assert [t.grad is not None for t in inputs] == list(needs)
    a = x.clone().requires_grad_()
    cross_entropy(a, classes_for((3, 4))).backward()
    assert seen.pop() == (True, False)
    assert not seen


@pytest.mark.parametrize("precompute_grad", [False, True])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_gradient_to_logits_target_or_both(needs, precompute_grad):
    options = {"weight": randn(4, seed=2).abs(), "label_smoothing": 0.2}
    ours, theirs = (
        [t.clone().requires_grad_(n) for t, n in zip((randn(3, 4), randn(3, 4, seed=1).softmax(1)), needs, strict=True)]
        for _ in range(2)
    )
    cross_entropy(*ours, precompute_grad=precompute_grad, **options).backward()
    F.cross_entropy(*theirs, **options).backward()
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our.grad, their.grad)  # both None where not needed


def test_one_tensor_as_logits_and_target():
    ours, theirs = logits_for((3, 4)), logits_for((3, 4))
    cross_entropy(ours, ours).backward()
    F.cross_entropy(theirs, theirs).backward()
    assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}])
def test_weight_gets_a_gradient_with_probabilities(reduction, options):
    ours, theirs = (
        (logits_for((3, 4)), probabilities_for((3, 4)), (randn(4, seed=2).abs() + 0.5).requires_grad_())
        for _ in range(2)
    )
    a = cross_entropy(*ours, reduction=reduction, **options)
    b = F.cross_entropy(*theirs, reduction=reduction, **options)
    assert_close(a, b)
    a.sum().backward()
    b.sum().backward()
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our.grad, their.grad)


@pytest.mark.parametrize("zero", ["weight", "probabilities", "both"])
def test_weight_and_probabilities_of_zero_get_a_gradient(zero):
    """Their product is 0 and so is the loss, but neither derivative."""
    q, w = probabilities_for((3, 4)).detach(), randn(4, seed=2).abs() + 0.5
    if zero != "weight":
        q = F.one_hot(classes_for((3, 4)), 4).double()
    if zero != "probabilities":
        w[1] = 0
    gradients = []
    for function in (cross_entropy, F.cross_entropy):
        inputs = logits_for((3, 4)), q.clone().requires_grad_(), w.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(*inputs, label_smoothing=0.2), inputs))
    assert_close(*gradients)


@pytest.mark.parametrize("classes", [4, 40])
def test_prediction_where_the_weight_gets_a_gradient(classes):
    """Of the scaled logits, as elsewhere: a negative scale turns their order round."""
    x, q = randn(3, classes), probabilities_for((3, classes)).detach()
    for needs in (False, True):
        weight = torch.ones(classes, dtype=torch.float64, requires_grad=needs)
        stats = cross_entropy(x, q, weight, logit_scale=-0.7, return_stats=True)[1]
        assert torch.equal(stats.prediction, x.argmin(1))


def test_weight_gradient_with_every_option():
    shape = (2, 3)
    inputs = (logits_for(shape), probabilities_for(shape), (randn(3, seed=2).abs() + 0.5).requires_grad_())

    def loss(x: Tensor, q: Tensor, w: Tensor) -> Tensor:
        return cross_entropy(x, q, **{**OPTIONS["all"], "weight": w})

    assert gradcheck(loss, inputs, check_batched_grad=True)
    assert gradgradcheck(loss, inputs, check_batched_grad=True)


def test_weight_gradient_in_forward_mode():
    """A weight that carries a tangent does not require grad: its derivative must not be dropped."""
    shape = (2, 3)
    weight = (randn(3, seed=2).abs() + 0.5).requires_grad_()
    x, q = randn(*shape), probabilities_for(shape).detach()
    assert gradcheck(lambda w: cross_entropy(x, q, w), (weight,), check_forward_ad=True)


def test_weight_that_requires_grad_with_class_indices_is_refused():
    """Torch raises as well, in its backward or forward: there is no derivative to the weights of an NLL."""
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"cross_entropy: weight must not require grad.*weight\.detach\(\)"):
        cross_entropy(logits_for((3, 4)), classes_for((3, 4)), weight)
    with pytest.raises(RuntimeError):
        F.cross_entropy(logits_for((3, 4)), classes_for((3, 4)), weight)
    with torch.no_grad():
        assert_close(
            cross_entropy(randn(3, 4), classes_for((3, 4)), weight),
            F.cross_entropy(randn(3, 4), classes_for((3, 4)), weight),
        )


@pytest.mark.parametrize(
    "options", [{}, {"precompute_grad": True}, {"inplace": True, "precompute_grad": True}], ids=str
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_there_is_no_graph(mode, options):
    x, target = logits_for((3, 4)), classes_for((3, 4))
    with mode():
        loss, stats = cross_entropy(x, target, return_stats=True, **options)
        probabilities = softmax_ext.softmax(x, 1)
    for result in (loss, *stats, probabilities):
        assert not result.requires_grad
        assert result.grad_fn is None
    assert loss.is_inference() == (mode is torch.inference_mode)
    assert_close(loss.clone(), F.cross_entropy(x, target).detach())


def test_inference_tensor_as_an_input():
    with torch.inference_mode():
        x = randn(3, 4)
    assert_close(cross_entropy(x, classes_for((3, 4))), F.cross_entropy(x, classes_for((3, 4))))
    assert_close(softmax_ext.softmax(x, 1), F.softmax(x, 1))


@pytest.mark.parametrize("options", [{}, {"precompute_grad": True}, {"inplace": True}], ids=str)
def test_plain_logits_give_a_plain_loss(options):
    loss = cross_entropy(randn(3, 4), classes_for((3, 4)), **options)
    assert not loss.requires_grad
    assert not softmax_ext.log_softmax(randn(3, 4), 1).requires_grad


# ---- what the gradient looks like ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"precompute_grad": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("loss_dtype", [None, torch.float32, torch.float64], ids=str)
def test_gradient_has_the_inputs_dtype(loss_dtype, dtype, options):
    x, target = logits_for((3, 40), dtype=dtype), classes_for((3, 40))
    loss = cross_entropy(x, target, dtype=loss_dtype, **options)
    assert loss.dtype == (loss_dtype or dtype)
    loss.backward()
    assert x.grad.dtype == dtype
    exact = torch.autograd.grad(F.cross_entropy(wide := x.detach().double().requires_grad_(), target), wide)[0]
    assert_close(x.grad, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradient_to_the_target_has_the_targets_dtype(dtype):
    """Each operand may have its own dtype; the loss has the wider."""
    x, q = logits_for((3, 4), dtype=torch.float32), probabilities_for((3, 4), dtype=dtype)
    q = q.detach().requires_grad_()
    loss = cross_entropy(x, q)
    assert loss.dtype == torch.float32
    loss.backward()
    assert (x.grad.dtype, q.grad.dtype) == (torch.float32, dtype)


@pytest.mark.parametrize("function", [softmax_ext.softmax, softmax_ext.log_softmax])
def test_softmax_of_another_dtype(function):
    x = logits_for((3, 40), dtype=torch.bfloat16)
    y = function(x, 1, dtype=torch.float32)
    assert y.dtype == torch.float32
    g = randn(3, 40, seed=3, dtype=torch.float32)
    y.backward(g)
    wide = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(getattr(F, function.__name__)(wide, 1), wide, g.double())[0]
    assert x.grad.dtype == torch.bfloat16
    assert_close(x.grad, exact.to(torch.bfloat16))


@pytest.mark.parametrize("precompute_grad", [False, True])
@pytest.mark.parametrize(
    "upstream",
    [
        lambda: torch.ones((), dtype=torch.float64).expand(3, 2),
        lambda: randn(2, 3).T,
        lambda: randn(3, 4)[:, ::2],
        lambda: randn(3).unsqueeze(1).expand(3, 2),
    ],
    ids=["one value expanded", "transposed", "strided", "column expanded"],
)
def test_upstream_gradient_of_any_strides(upstream, precompute_grad):
    shape = (3, 4, 2)
    x, target, g = logits_for(shape), classes_for(shape), upstream()
    loss = cross_entropy(x, target, reduction="none", precompute_grad=precompute_grad)
    (ours,) = torch.autograd.grad(loss, x, g)
    (theirs,) = torch.autograd.grad(F.cross_entropy(x, target, reduction="none"), x, g)
    assert_close(ours, theirs)


@pytest.mark.parametrize("function", [softmax_ext.softmax, softmax_ext.log_softmax])
@pytest.mark.parametrize("dim", [0, 1])
def test_softmax_upstream_gradient_of_any_strides(function, dim):
    theirs = getattr(F, function.__name__)
    for g in (torch.ones((), dtype=torch.float64).expand(3, 4), randn(4, 3).T, randn(3, 8)[:, ::2]):
        x = logits_for((3, 4))
        assert_close(
            torch.autograd.grad(function(x, dim), x, g)[0],
            torch.autograd.grad(theirs(x, dim), x, g)[0],
        )


@pytest.mark.parametrize("options", [{}, {"precompute_grad": True}], ids=str)
def test_sum_of_unreduced_losses(options):
    """The usual .sum() hands down one number expanded to every row."""
    x, target = logits_for((3, 40)), classes_for((3, 40))
    (ours,) = torch.autograd.grad(cross_entropy(x, target, reduction="none", **options).sum(), x)
    (theirs,) = torch.autograd.grad(F.cross_entropy(x, target, reduction="sum"), x)
    assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"precompute_grad": True}], ids=str)
@pytest.mark.parametrize("scale", [0.0, 2.0**16, float("inf")])
def test_upstream_gradient_of_zero_and_of_infinity(scale, options):
    """As masking and loss scaling send them: an overflow must be visible in every element."""
    x, target = logits_for((3, 4)), classes_for((3, 4))
    (ours,) = torch.autograd.grad(cross_entropy(x, target, **options), x, torch.tensor(scale).double())
    (theirs,) = torch.autograd.grad(F.cross_entropy(x, target), x, torch.tensor(scale).double())
    if scale < float("inf"):
        assert_close(ours, theirs)
    else:
        assert not theirs.isfinite().any()
        assert not ours.isfinite().any()


@pytest.mark.parametrize("options", [{}, {"precompute_grad": True}], ids=str)
def test_gradient_through_a_view_of_the_logits(options):
    """A transposed slice: the gradient arrives at the base's places."""
    target = torch.tensor([[0, 3], [2, 1]])

    def gradient(function: Callable[..., Tensor], **options: Any) -> Tensor:
        base = logits_for((2, 3, 4))
        function(base[:, 1:].transpose(1, 2), target, **options).backward()
        return base.grad

    assert_close(gradient(cross_entropy, **options), gradient(F.cross_entropy))


@pytest.mark.parametrize("options", [{}, {"precompute_grad": True}], ids=str)
def test_gradient_through_expanded_logits(options):
    target = torch.tensor([0, 3, 2])

    def gradient(function: Callable[..., Tensor], **options: Any) -> Tensor:
        row = logits_for((4,))
        function(row.expand(3, 4), target, **options).backward()
        return row.grad

    assert_close(gradient(cross_entropy, **options), gradient(F.cross_entropy))


def test_logits_changed_after_the_forward_are_noticed():
    """Recompute reads the logits again, so autograd must see that they changed."""
    x, target = logits_for((3, 4)), classes_for((3, 4))
    y = x * 1
    loss = cross_entropy(y, target)
    y.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
