"""The option ``row_weight``: a factor of each row's loss, given or the probability of the row's target class."""

import itertools
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_checks import KINDS, LAYOUTS, REDUCTIONS, Strategy, bounds_for, check, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import softmax_ext
from softmax_ext import CrossEntropyLoss, cross_entropy, ops, reference
from softmax_ext.autograd.cross_entropy import CrossEntropy
from softmax_ext.options import Options

STRATEGIES = [Strategy(*flags) for flags in itertools.product([False, True], repeat=3)]
EARLY = [{}, {"precompute_grad": True}, {"inplace": True}, {"precompute_grad": True, "inplace": True}]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "z_loss": {"z_loss": 0.1},
    "all": {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.7},
}
PLAIN = Options(dim=1, reduction=1, ignore_index=-100, label_smoothing=0.1, z_loss=0.05, softcap=None, logit_scale=0.7)
BY_PROBABILITY = PLAIN._replace(weighs_by_probability=True)
SHAPES = [(3, 17), (131, 3), (2, 5000), (2, 40000), (2, 7, 5), (2, 70, 3, 4)]


def logits(*shape: int, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    return torch.randn(*shape, dtype=dtype, **options)


def target_of(rows: int, classes: int) -> Tensor:
    """Class indices, of which the first is ignored."""
    target = torch.randint(0, classes, (rows,))
    target[0] = -100
    return target


def weights_for(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive, negative and 0, of values that every dtype can hold."""
    values = torch.tensor([0.75, 2.0, -0.5, 1.0, 0.0], dtype=dtype, device=target.device)
    return values[torch.arange(target.numel(), device=target.device) % 5].view(target.shape)


def is_probability(row_weight: object) -> bool:
    return isinstance(row_weight, str)


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "by probability"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("extra", OPTIONS.values(), ids=OPTIONS)
def test_every_strategy(extra, shape, dtype, kind, device):
    by_probability = kind == "by probability"
    values = (3 * logits(*shape)).to(dtype).to(device)
    target = oracle.make_target("int64" if by_probability else kind, shape, dtype).to(device)
    given = "probability"
    if not by_probability:
        rows = target if kind != "probabilities" else target.select(1, 0)
        given = weights_for(rows, dtype)
    ignore = -100 if kind == "probabilities" else int(target.reshape(-1)[0])
    weight = oracle.make_weight(shape[1], dtype).to(device)
    for w, reduction, divisor in itertools.product([None, weight], REDUCTIONS, [None, 3]):
        options = {"ignore_index": ignore, "reduction": reduction, "row_weight": given, **extra}
        if divisor is not None and reduction == "none":
            continue
        if divisor is not None:
            options |= {"denominator": divisor, "reduction": "mean"}  # as "sum" is then
        for upstream in (torch.ones((), dtype=dtype, device=device), torch.tensor(-0.375, dtype=dtype, device=device)):
            bounds = bounds_for(values, target, w, upstream, **options)
            for strategy in STRATEGIES:
                if strategy.scaled == bool(upstream != 1):
                    results = run(values.clone(), target, w, upstream, strategy, **options)
                    check(bounds, strategy, results, (shape, strategy, w is not None, options))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row_weight", ["given", "probability"])
@pytest.mark.parametrize("shape", [(5, 100), (131, 3), (3, 9, 4, 5)], ids=str)
def test_layouts(shape, row_weight, layout, device):
    values = (3 * logits(*shape)).float().to(device)
    target = oracle.make_target("int64", shape, torch.float32).to(device)
    given = row_weight
    if row_weight == "given":  # a factor between others in memory
        given = torch.full((*target.shape, 2), torch.nan, device=device)
        given[..., 0] = weights_for(target, torch.float32)
        given = given[..., 0]
    upstream = torch.ones((), device=device)
    bounds = bounds_for(values, target, None, upstream, row_weight=given)
    for strategy in STRATEGIES:
        if not strategy.scaled:
            results = run(layout(values), target, None, upstream, strategy, row_weight=given)
            check(bounds, strategy, results, strategy)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("of_logits", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_factors_of_any_dtype(reduction, of_logits, dtype):
    """They change no dtype, and count at their own values."""
    x, y = logits(5, 9).to(of_logits).requires_grad_(), target_of(5, 9)
    factors = weights_for(y, dtype)
    results = []
    for given in (factors, factors.to(of_logits)):
        loss = cross_entropy(x, y, reduction=reduction, row_weight=given)
        assert loss.dtype == of_logits
        results.append((loss, *torch.autograd.grad(loss.sum(), x)))
    oracle.assert_same_bits(*results, "another dtype of the factors")


@pytest.mark.parametrize("early", EARLY, ids=str)
@pytest.mark.parametrize("row_weight", ["given", "probability"])
def test_statistics_are_not_multiplied(row_weight, early):
    x, y = logits(5, 9).requires_grad_(), target_of(5, 9)
    row_weight = weights_for(y, torch.float32) if row_weight == "given" else row_weight
    loss, stats = cross_entropy(x * 1, y, row_weight=row_weight, return_stats=True, **early)
    oracle.assert_same_bits(stats, cross_entropy(x, y, return_stats=True)[1], "statistics")
    oracle.assert_same_bits([loss], [cross_entropy(x, y, row_weight=row_weight)], "loss")
    if early.get("inplace"):
        return
    of_stats = [torch.autograd.grad(s.sum(), x, retain_graph=True)[0] for s in stats[:3]]
    plain = cross_entropy(x, y, return_stats=True)[1]
    assert_close(of_stats, [torch.autograd.grad(s.sum(), x, retain_graph=True)[0] for s in plain[:3]])
    both = torch.autograd.grad(loss + stats.nll.sum(), x, retain_graph=True)[0]
    assert_close(both, torch.autograd.grad(loss, x)[0] + of_stats[1])


@pytest.mark.parametrize("early", EARLY, ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_factors_of_one_change_nothing(reduction, dtype, early):
    x, y = logits(20, 100).to(dtype).requires_grad_(), target_of(20, 100)
    results = []
    for options in ({}, {"row_weight": torch.ones(20, dtype=dtype)}):
        loss = cross_entropy(x * 1, y, reduction=reduction, z_loss=0.1, **options, **early)
        results.append((loss, *torch.autograd.grad(loss.sum(), x)))
    oracle.assert_same_bits(*results, "factors of 1")


# ---- rows that do not count ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", EARLY, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_factor_of_an_ignored_row_does_not_matter(reduction, bad, early):
    x, y = logits(5, 9).requires_grad_(), target_of(5, 9)
    results = []
    for value in (1.0, bad):
        factors = torch.full((5,), 0.5)
        factors[0] = value
        loss = cross_entropy(x * 1, y, reduction=reduction, z_loss=0.1, row_weight=factors, **early)
        results.append((loss, *torch.autograd.grad(loss.sum(), x)))
        assert not results[-1][1][0].any()
    oracle.assert_same_bits(*results, bad)


@pytest.mark.parametrize("early", EARLY, ids=str)
@pytest.mark.parametrize("rows", [0, 3], ids=["no rows", "every row ignored"])
@pytest.mark.parametrize("row_weight", ["given", "probability"])
def test_nothing_to_learn_from(row_weight, rows, early):
    x, y = logits(rows, 9).requires_grad_(), torch.full((rows,), -100)
    given = torch.full((rows,), torch.nan) if row_weight == "given" else row_weight
    for options, expected in (({}, torch.nan), ({"reduction": "sum"}, 0.0), ({"denominator": 3}, 0.0)):
        loss = cross_entropy(x * 1, y, row_weight=given, **options, **early)
        assert_close(loss, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
        assert not torch.autograd.grad(loss, x)[0].any()


@pytest.mark.parametrize("early", EARLY, ids=str)
@pytest.mark.parametrize("row_weight", ["given", "probability"])
def test_an_impossible_target(row_weight, early):
    """A factor of 0 makes an infinite loss 0, as a class weight of 0 does; so does a probability of 0."""
    x, y = logits(3, 5), torch.tensor([0, 1, 2])
    x[1, 1] = -torch.inf
    x.requires_grad_()
    given = torch.tensor([1.0, 0.0, 2.0]) if row_weight == "given" else row_weight
    loss = cross_entropy(x * 1, y, reduction="none", row_weight=given, **early)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss[1] == 0
    assert not gradient[1].any()
    of_class = cross_entropy(x, y, torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0]), reduction="none")
    if row_weight == "given":
        assert_close(loss, of_class)
        assert_close(gradient, torch.autograd.grad(of_class.sum(), x)[0])
    assert (loss[[0, 2]] > 0).all()
    infinite = cross_entropy(x, y, reduction="none", row_weight=torch.tensor([1.0, 0.5, 2.0]))
    assert infinite[1] == torch.inf


@pytest.mark.parametrize("early", EARLY, ids=str)
def test_factors_that_add_up_to_zero(early):
    """The mean is x / 0, as with class weights."""
    x, y = logits(2, 5).requires_grad_(), torch.tensor([0, 1])
    loss = cross_entropy(x * 1, y, row_weight=torch.zeros(2), **early)
    assert loss.isnan()
    assert torch.autograd.grad(loss, x)[0].isnan().all()


# ---- by probability --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", EARLY, ids=str)
@pytest.mark.parametrize(
    "extra", [*OPTIONS.values(), {"weight": torch.arange(1, 10).double()}], ids=[*OPTIONS, "weight"]
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_probability_is_a_constant(reduction, extra, early):
    """As though it had been given; but the mean is that of all rows."""
    x, y = (3 * logits(7, 9)).requires_grad_(), target_of(7, 9)
    extra = {k: v.to(x.device) if isinstance(v, Tensor) else v for k, v in extra.items()}
    shape = {k: v for k, v in extra.items() if k in ("softcap", "logit_scale")}
    p = (-cross_entropy(x.detach(), y, reduction="none", **shape)).exp()
    divisor = None
    if reduction == "mean":
        extra_weight = extra.get("weight")
        divisor = (y >= 0).sum() if extra_weight is None else extra_weight[y.clamp(min=0)][y >= 0].sum()
    results = []
    for options in ({"row_weight": "probability"}, {"row_weight": p, "denominator": divisor}):
        loss = cross_entropy(x * 1, y, reduction=reduction, **options, **extra, **early)
        results.append((loss, *torch.autograd.grad(loss.sum(), x)))
    assert_close(*results)


def test_a_probability_near_one_and_one_far_from_it():
    x = torch.tensor([[40.0, 0.0, 0.0], [0.0, 40.0, 0.0], [0.0, 200.0, 0.0]])
    y = torch.zeros(3, dtype=torch.int64)
    for dtype in (torch.float32, torch.float64):
        loss = cross_entropy(x.to(dtype), y, reduction="none", row_weight="probability")
        exact = F.cross_entropy(x.double(), y, reduction="none")
        expected = torch.tensor(-40.0).double().exp()
        torch.testing.assert_close(loss[1].double(), expected * exact[1], rtol=1e-5, atol=0)
        torch.testing.assert_close(loss[0].double(), torch.log1p(2 * expected), rtol=1e-5, atol=0)
        assert 0 <= loss[2] < 1e-30


def test_the_gradient_is_that_of_minus_p():
    """p dL = -dp: dynamic fine-tuning maximises the probabilities themselves."""
    x, y = logits(6, 9).requires_grad_(), torch.randint(0, 9, (6,))
    ours = torch.autograd.grad(cross_entropy(x, y, row_weight="probability"), x)
    assert_close(ours, torch.autograd.grad(-x.softmax(1).gather(1, y[:, None]).mean(), x))


# ---- derivatives of every kind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("precompute_grad", [False, True])
def test_second_derivatives(precompute_grad, reduction, extra):
    y, factors = target_of(3, 4), torch.tensor([torch.nan, 0.5, -2.0])

    def loss(x: Tensor, y: Tensor = y) -> Tensor:
        given = factors if not y.is_floating_point() else factors.nan_to_num(3.0)
        return cross_entropy(x, y, reduction=reduction, row_weight=given, precompute_grad=precompute_grad, **extra)

    x = logits(3, 4, requires_grad=True)
    assert gradcheck(loss, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(loss, (x,), check_fwd_over_rev=True, check_batched_grad=True)
    q = logits(3, 4).softmax(1).requires_grad_()
    assert gradgradcheck(loss, (x, q))


def by_hand(x: Tensor, y: Tensor, row_weight: Any, **options: Any) -> Tensor:
    return oracle.cross_entropy_loss(x, y, row_weight=row_weight, **options)


def ours(x: Tensor, y: Tensor, row_weight: Any, **options: Any) -> Tensor:
    return cross_entropy(x, y, row_weight=row_weight, **options)


def given_as_a_constant(x: Tensor, y: Tensor, row_weight: Any, **options: Any) -> Tensor:
    """Torch's losses, times the factors."""
    rows = F.cross_entropy(x, y, reduction="none", **options)
    live = y != -100
    if is_probability(row_weight):
        p = x.log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1).exp()
        return (torch.where(live, p.detach(), 0) * rows).sum() / live.sum()
    factors = torch.where(live, row_weight, 0)
    weight = options.get("weight")
    shares = factors if weight is None else factors * weight[y.clamp(min=0)]
    return (factors * rows).sum() / shares.sum()


TRANSFORMS = {
    "grad": grad,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "third": lambda f: jacfwd(hessian(f)),
    "jvp": lambda f: lambda x, y, w: jvp(lambda x: f(x, y, w), (x,), (x.cos(),)),
    "forward over reverse": lambda f: lambda x, y, w: jvp(lambda x: grad(f)(x, y, w), (x,), (x.cos(),)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("row_weight", ["given", "probability"])
def test_transforms(row_weight, transform):
    x, y = logits(3, 4), target_of(3, 4)
    given = torch.tensor([7.0, 0.5, 2.0]).double() if row_weight == "given" else row_weight
    actual, expected = transform(ours)(x, y, given), transform(given_as_a_constant)(x, y, given)
    assert_close(actual, expected)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, 0, None), (None, None, 0), (0, None, 0), (None, 0, 0)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "weight": torch.rand(4).double()}], ids=["", "weight"]
)
@pytest.mark.parametrize("transform", [lambda f: f, grad, hessian], ids=["values", "gradients", "hessians"])
def test_vmap(transform, options, in_dims):
    batch = [logits(2, 3, 4), torch.stack([target_of(3, 4), target_of(3, 4)]), torch.rand(2, 3).double()]
    arguments = [t if d == 0 else t[0] for t, d in zip(batch, in_dims, strict=True)]
    options = {k: v.to(arguments[0].device) if isinstance(v, Tensor) else v for k, v in options.items()}
    actual = vmap(transform(lambda *a: ours(*a, **options)), in_dims=in_dims)(*arguments)
    each = [[t if d is None else t[i] for t, d in zip(arguments, in_dims, strict=True)] for i in range(2)]
    expected = [transform(lambda *a: given_as_a_constant(*a, **options))(*sample) for sample in each]
    assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("transform", [lambda f: f, grad, hessian], ids=["values", "gradients", "hessians"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_vmap_by_probability(reduction, transform):
    x, y = logits(2, 3, 4), torch.stack([target_of(3, 4), target_of(3, 4)])

    def function(x: Tensor, y: Tensor) -> Tensor:
        return ours(x, y, "probability", reduction=reduction)

    each = torch.stack([transform(function)(x[i], y[i]) for i in range(2)])
    assert_close(vmap(transform(function))(x, y), each)


def test_vmap_of_probability_targets():
    x, q, w = logits(2, 3, 4), logits(2, 3, 4).softmax(2), torch.rand(2, 3).double()
    each = [cross_entropy(x[i], q[i], row_weight=w[i]) for i in range(2)]
    assert_close(vmap(ours)(x, q, w), torch.stack(each))
    rows = F.cross_entropy(x[0], q[0], reduction="none")
    assert_close(each[0], (rows * w[0]).sum() / w[0].sum())


def test_weight_that_requires_grad():
    """Then torch's own operations compute the loss."""
    x, weight = logits(3, 4).requires_grad_(), torch.rand(4, dtype=torch.float64).requires_grad_()
    q, given = logits(3, 4).softmax(1).requires_grad_(), torch.rand(3).double()
    results = []
    for function in (ours, by_hand):
        loss = function(x, q, given, weight=weight)
        results.append((loss, torch.autograd.grad(loss, (x, q, weight))))
    assert_close(*results)


def test_a_factor_of_zero_beside_a_weight_that_requires_grad():
    """An infinite loss that does not count has no derivative in the class weights either."""
    x, weight = logits(2, 3), torch.rand(3, dtype=torch.float64).requires_grad_()
    x[0, 1] = -torch.inf
    q = logits(2, 3).softmax(1)
    factors = torch.tensor([0.0, 2.0])
    loss = cross_entropy(x, q, weight, row_weight=factors)
    alone = cross_entropy(x[1:], q[1:], weight)
    assert_close(loss, alone)
    assert_close(*(torch.autograd.grad(t, weight) for t in (loss, alone)))


@pytest.mark.parametrize("row_weight", ["given", "probability"])
def test_the_formulas_are_the_kernels(row_weight):
    x, y = logits(5, 9), target_of(5, 9)
    given, options = (
        (weights_for(y, torch.float32).double(), PLAIN) if row_weight == "given" else (None, BY_PROBABILITY)
    )
    weight = torch.rand(9).double()
    for reduction in (0, 1, 2):
        for stats in (False, True):
            arguments = (x, y, weight, None, options._replace(reduction=reduction), None, stats, given)
            of_kernels = CrossEntropy.apply(*arguments)
            assert_close(reference.cross_entropy(*arguments), (of_kernels[0], *of_kernels[3:]))


# ---- what is around it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [*EARLY[:1], {"inplace": True}], ids=str)
def test_factors_that_change_afterwards_are_noticed(early):
    x, y = logits(5, 9).requires_grad_(), target_of(5, 9)
    factors = torch.ones(5)
    loss = cross_entropy(x * 1, y, row_weight=factors, **early)
    factors.fill_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("row_weight", ["given", "probability"])
def test_a_second_backward_computes_it_again(row_weight):
    x, y = logits(5, 9).requires_grad_(), target_of(5, 9)
    given = weights_for(y, torch.float32) if row_weight == "given" else row_weight
    loss = cross_entropy(x, y, row_weight=given, precompute_grad=True)
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert_close(torch.autograd.grad(loss, x), first)


@pytest.mark.parametrize("early", EARLY, ids=str)
@pytest.mark.parametrize("row_weight", ["given", "probability"])
def test_nobody_waits_for_its_values(row_weight, early):
    """Tensors without values will do."""
    x = torch.randn(5, 9, device="meta", requires_grad=True)
    y, factors = torch.zeros(5, dtype=torch.int64, device="meta"), torch.ones(5, device="meta")
    loss = cross_entropy(x * 2, y, row_weight=factors if row_weight == "given" else row_weight, **early)
    loss.backward()
    assert loss.is_meta
    assert x.grad.shape == (5, 9)
    with FakeTensorMode():
        x, y = torch.randn(5, 9, requires_grad=True), torch.zeros(5, dtype=torch.int64)
        given = torch.ones(5) if row_weight == "given" else row_weight
        cross_entropy(x * 2, y, row_weight=given, **early).backward()


def test_module():
    """A keyword of the call, since it changes with each batch."""
    x, y = logits(5, 9, dtype=torch.float32), target_of(5, 9)
    module = CrossEntropyLoss(torch.rand(9), label_smoothing=0.1)
    for given in (torch.rand(5), "probability"):
        expected = cross_entropy(x, y, module.weight, label_smoothing=0.1, row_weight=given, denominator=3)
        assert_close(module(x, y, row_weight=given, denominator=3), expected)
    with pytest.raises(TypeError):
        module(x, y, torch.rand(5))


def test_checkpoint():
    x, y = logits(5, 9).requires_grad_(), target_of(5, 9)
    for given in (torch.rand(5).double(), "probability"):
        loss = checkpoint(ours, x, y, given, use_reentrant=False)
        expected = given_as_a_constant(x, y, given)
        assert_close(loss, expected)
        assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


def test_autocast(device):
    x, y = logits(5, 9, dtype=torch.float32, device=device), target_of(5, 9).to(device)
    factors = torch.rand(5, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        z = x @ torch.eye(9, device=device)
        loss = softmax_ext.cross_entropy(z, y, row_weight=factors.bfloat16())
    assert z.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert_close(loss, given_as_a_constant(z.float(), y, factors.bfloat16().float()))


@pytest.mark.parametrize("row_weight", ["given", "probability"])
def test_a_row_alone(row_weight):
    """Logits [C] have one loss, and so one factor without dimensions."""
    x, y = logits(9).requires_grad_(), torch.tensor(3)
    given = torch.tensor(0.5) if row_weight == "given" else row_weight
    plain = cross_entropy(x.detach(), y)
    loss = cross_entropy(x, y, row_weight=given, reduction="none")
    assert_close(loss, plain * (0.5 if row_weight == "given" else (-plain).exp()))
    assert_close(cross_entropy(x, y, row_weight=torch.tensor(0.5)), plain)


# ---- the operators ---------------------------------------------------------------------------------------------------


def arguments_of(x: Tensor, y: Tensor, options: Options) -> tuple[Any, ...]:
    return (x, y, None, *options, None, False)


@pytest.mark.parametrize(
    ("options", "factors", "text"),
    [
        (PLAIN, torch.ones(4), "row_weight must have one value for each row"),
        (PLAIN, torch.ones(5, dtype=torch.int64), "row_weight must be float64, float32, bfloat16 or float16"),
        (BY_PROBABILITY, torch.ones(5), "needs class indices, and no row_weight"),
    ],
    ids=["another shape", "another dtype", "both"],
)
def test_operators_refuse_other_factors(options, factors, text):
    arguments = arguments_of(logits(5, 9), target_of(5, 9), options)
    with pytest.raises(RuntimeError, match=text):
        ops.cross_entropy(*arguments, False, None, factors)
    with pytest.raises(RuntimeError, match=text):
        ops.cross_entropy_(*arguments, None, factors)


def test_operators_refuse_the_probability_of_probabilities():
    with pytest.raises(RuntimeError, match="needs class indices"):
        ops.cross_entropy(*arguments_of(logits(5, 9), logits(5, 9), BY_PROBABILITY), False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("row_weight", ["given", "probability"])
def test_rows_from_parts_of_their_classes(row_weight, reduction, stats, dtype):
    """They have the same loss, state and gradient as from all classes."""
    x, y = logits(20, 90, dtype=dtype), target_of(20, 90)
    options = (PLAIN if row_weight == "given" else BY_PROBABILITY)._replace(reduction=reduction)
    factors = weights_for(y, torch.float32) if row_weight == "given" else None
    whole = ops.cross_entropy(x, y, None, *options, None, stats, False, None, factors)
    bounds = [(0, 40), (40, 41), (41, 90)]
    parts = [ops.cross_entropy_part(x[:, a:b], y, None, *options, None, stats, a, 90) for a, b in bounds]
    wide = dtype == torch.float64
    merged = ops.cross_entropy_of_parts(
        torch.stack(parts), y, None, *options, dtype, wide, stats, None, 90, row_weight=factors
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    assert_close(merged, whole, **tolerance)
    loss, state, total, *_ = whole
    upstream = (torch.rand_like(loss), None, None, None)
    entire = (*upstream, x, y, None, state, total, None, *options, True, False)
    expected, _ = ops.cross_entropy_backward(*entire, row_weight=factors)
    for a, b in bounds:
        of_part = (*upstream, x[:, a:b], y, None, state, total, None, *options, True, False, a, 90)
        actual, _ = ops.cross_entropy_backward(*of_part, row_weight=factors)
        assert_close(actual, expected[:, a:b], **tolerance)
