"""The option ``denominator``: what the sum of the losses is divided by, in place of the mean's own denominator."""

import itertools
import re
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_checks import KINDS, Strategy, bounds_for, check, run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jvp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import softmax_ext
from softmax_ext import CrossEntropyLoss, LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy, ops

STRATEGIES = [Strategy(*flags) for flags in itertools.product([False, True], repeat=3)]
EARLY = [{}, {"precompute_grad": True}, {"inplace": True}, {"precompute_grad": True, "inplace": True}]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.7},
}
REDUCTIONS = ["mean", "sum"]


def logits(*shape: int, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    return torch.randn(*shape, dtype=dtype, **options)


def target_of(rows: int, classes: int) -> Tensor:
    """Class indices, of which the first is ignored."""
    target = torch.randint(0, classes, (rows,))
    target[0] = -100
    return target


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 17), (131, 3), (2, 5000), (2, 7, 5)], ids=str)
@pytest.mark.parametrize("extra", OPTIONS.values(), ids=OPTIONS)
def test_every_strategy(extra, shape, dtype, kind, device):
    values = (3 * logits(*shape)).to(dtype).to(device)
    target = oracle.make_target(kind, shape, dtype).to(device)
    ignore = -100 if kind == "probabilities" else int(target.reshape(-1)[0])
    weight = oracle.make_weight(shape[1], dtype).to(device)
    denominators = [(11, 11), (1.375, torch.tensor(1.375, dtype=dtype, device=device)), (-3, torch.tensor([-3]))]
    for (number, given), w, reduction in itertools.product(denominators, [None, weight], REDUCTIONS):
        given = given.to(device) if isinstance(given, Tensor) else given
        options = {"ignore_index": ignore, "reduction": reduction, **extra}
        for upstream in (torch.ones((), dtype=dtype, device=device), torch.tensor(-0.375, dtype=dtype, device=device)):
            bounds = bounds_for(values, target, w, upstream, denominator=number, **options)
            for strategy in STRATEGIES:
                if strategy.scaled == bool(upstream != 1):
                    x = values.clone()
                    results = run(x, target, w, upstream, strategy, denominator=given, **options)
                    check(bounds, strategy, results, (shape, strategy, w is not None, number, options))


NUMBERS = [7, 7.0, np.float32(7), np.int64(7), np.float64(7)]
TYPES = [torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
TENSORS = [torch.tensor(value, dtype=dtype) for dtype in TYPES for value in (7, [7], [[7]])]


@pytest.mark.parametrize("denominator", [*NUMBERS, *TENSORS], ids=repr)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_every_kind_of_number(linear, reduction, denominator):
    x, w, y = logits(5, 4, dtype=torch.float32).requires_grad_(), logits(9, 4, dtype=torch.float32), target_of(5, 9)

    def results(denominator: Any) -> tuple[Tensor, Tensor]:
        options = {"reduction": reduction, "denominator": denominator}
        loss = linear_cross_entropy(x, w, y, **options) if linear else cross_entropy(x @ w.T, y, **options)
        return loss, torch.autograd.grad(loss, x)[0]

    if isinstance(denominator, Tensor):
        denominator = denominator.to(x.device)
    oracle.assert_same_bits(results(denominator), results(7.0), denominator)


def test_a_number_on_the_host_goes_with_any_device(device):
    """As in torch's operations: without dimensions only."""
    x, y = logits(5, 9, device=device), target_of(5, 9).to(device)
    assert_close(cross_entropy(x, y, denominator=torch.tensor(7, device="cpu")), cross_entropy(x, y, denominator=7))


@pytest.mark.parametrize("denominator", [0, -0.0, float("nan"), float("inf"), torch.tensor(0), torch.tensor(0.0)])
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_what_divides_badly_does_so_as_in_torch(linear, denominator):
    """Ignored rows get no gradient even so."""
    x, w, y = logits(5, 4).requires_grad_(), logits(9, 4), target_of(5, 9)
    if isinstance(denominator, Tensor):
        denominator = denominator.to(x.device)
    for strategy in [{}] if linear else EARLY:
        z = x @ w.T
        if linear:
            loss = linear_cross_entropy(x, w, y, denominator=denominator)
        else:
            loss = cross_entropy(z, y, denominator=denominator, **strategy)
        assert_close(loss, F.cross_entropy(x @ w.T, y, reduction="sum") / denominator, equal_nan=True)
        (gradient,) = torch.autograd.grad(loss, x)
        assert not gradient[0].any()
        assert (gradient[1:] == 0).all() if denominator == float("inf") else not gradient[1:].isfinite().any()


@pytest.mark.parametrize("rows", [0, 3], ids=["no rows", "every row ignored"])
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_nothing_to_learn_from(rows, linear):
    """The mean would be 0 / 0."""
    x, w, y = logits(rows, 4).requires_grad_(), logits(9, 4), torch.full((rows,), -100)
    for denominator, expected in ((3, 0.0), (torch.tensor(0.0, device=x.device), float("nan"))):
        for strategy in [{}] if linear else EARLY:
            if linear:
                loss = linear_cross_entropy(x, w, y, denominator=denominator)
            else:
                loss = cross_entropy(x @ w.T, y, denominator=denominator, **strategy)
            assert_close(loss, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
            assert not torch.autograd.grad(loss, x)[0].any()


@pytest.mark.parametrize("early", EARLY, ids=str)
def test_statistics_are_not_divided(early):
    x, y = logits(5, 9).requires_grad_(), target_of(5, 9)
    _, stats = cross_entropy(x * 2, y, return_stats=True, denominator=3, **early)
    _, plain = cross_entropy(x * 2, y, return_stats=True)
    oracle.assert_same_bits(stats, plain, early)
    if early.get("inplace"):
        return
    loss, stats = cross_entropy(x * 2, y, return_stats=True, denominator=3, **early)
    losses, plain = cross_entropy(x * 2, y, return_stats=True, reduction="sum")
    ours, theirs = (
        torch.autograd.grad(a + b.lse.sin().sum() + b.entropy.sum(), x) for a, b in ((loss, stats), (losses / 3, plain))
    )
    assert_close(ours, theirs)


# ---- what it is for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [*EARLY, None], ids=str)
@pytest.mark.parametrize("weight", [None, torch.rand(9, dtype=torch.float64) + 0.5], ids=["", "weight"])
@pytest.mark.parametrize("extra", OPTIONS.values(), ids=OPTIONS)
def test_accumulated_over_micro_batches_as_one_batch(extra, weight, early):
    """The micro-batches have different numbers of tokens; None stands for the linear layer."""
    torch.manual_seed(0)
    hidden, y = logits(12, 4), target_of(12, 9)
    y[4:7] = -100
    weight = None if weight is None else weight.to(hidden.device)
    whole = nn.Linear(4, 9, dtype=torch.float64)
    parts = nn.Linear(4, 9, dtype=torch.float64)
    parts.load_state_dict(whole.state_dict())
    total = (y != -100).sum() if weight is None else weight[y[y != -100]].sum()
    if weight is None:
        expected = cross_entropy(whole(hidden), y, **extra)
    else:  # of a mean the z terms have a denominator without class weights
        expected = cross_entropy(whole(hidden), y, weight, reduction="sum", **extra) / total
    expected.backward()
    loss = 0
    for rows in (slice(0, 3), slice(3, 7), slice(7, 12)):
        options = {"denominator": total, **extra}
        if early is None:
            each = linear_cross_entropy(
                hidden[rows], parts.weight, y[rows], linear_bias=parts.bias, weight=weight, chunk_rows=2, **options
            )
        else:
            each = cross_entropy(parts(hidden[rows]), y[rows], weight, **options, **early)
        each.backward()
        loss = loss + each.detach()
    assert_close(loss, expected.detach())
    assert_close(parts.weight.grad, whole.weight.grad)
    assert_close(parts.bias.grad, whole.bias.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_no_further_pass(inplace, dtype, monkeypatch):
    """The precomputed gradient is divided already: backward finds an upstream gradient of 1, and touches nothing."""
    factors = []
    scale_rows = ops.scale_rows_

    def recorded(tensor: Tensor, factor: Tensor, dim: int) -> None:
        factors.append(float(factor))
        return scale_rows(tensor, factor, dim)

    def unexpected(*arguments: Any) -> None:
        raise AssertionError("another pass over the logits")

    monkeypatch.setattr(ops, "scale_rows_", recorded)
    monkeypatch.setattr(ops, "cross_entropy_backward", unexpected)
    monkeypatch.setattr(ops, "cross_entropy_backward_", unexpected)
    x, y = logits(5, 9, dtype=dtype).requires_grad_(), target_of(5, 9)
    cross_entropy(x * 1, y, denominator=3, precompute_grad=True, inplace=inplace).backward()
    assert factors == [1.0]
    assert x.grad.any()


@pytest.mark.parametrize("early", [*EARLY, None], ids=str)
def test_a_tensor_that_changes_afterwards(early):
    """Backward divides by what it was."""
    x, w, y = logits(5, 4).requires_grad_(), logits(9, 4), target_of(5, 9)
    denominator = torch.tensor(3.0, dtype=torch.float64)
    if early is None:
        loss = linear_cross_entropy(x, w, y, denominator=denominator)
    else:
        loss = cross_entropy(x @ w.T, y, denominator=denominator, **early)
    denominator.fill_(100)
    ours = torch.autograd.grad(loss, x)
    assert_close(ours, torch.autograd.grad(F.cross_entropy(x @ w.T, y, reduction="sum") / 3, x))


@pytest.mark.parametrize("early", EARLY, ids=str)
def test_nobody_waits_for_its_value(early):
    """A tensor without a value will do."""
    x = torch.randn(5, 9, device="meta", requires_grad=True)
    y, denominator = torch.zeros(5, dtype=torch.int64, device="meta"), torch.ones((), device="meta")
    loss = cross_entropy(x * 2, y, denominator=denominator, **early)
    loss.backward()
    assert loss.is_meta
    assert x.grad.shape == (5, 9)
    with FakeTensorMode():
        x, y = torch.randn(5, 9, requires_grad=True), torch.zeros(5, dtype=torch.int64)
        for denominator in (torch.ones(1), 3):
            cross_entropy(x * 2, y, denominator=denominator, **early).backward()
            linear_cross_entropy(x, torch.randn(4, 9), y, denominator=denominator).backward()


# ---- derivatives of every kind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("precompute_grad", [False, True])
def test_second_derivatives(precompute_grad, extra):
    y, denominator = target_of(3, 4), torch.tensor(2.5)

    def loss(x: Tensor, y: Tensor = y) -> Tensor:
        return cross_entropy(x, y, denominator=denominator, precompute_grad=precompute_grad, **extra)

    x = logits(3, 4, requires_grad=True)
    assert gradcheck(loss, (x,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(loss, (x,), check_fwd_over_rev=True, check_batched_grad=True)
    q = logits(3, 4).softmax(1).requires_grad_()
    assert gradgradcheck(loss, (x, q))


def by_hand(x: Tensor, y: Tensor, denominator: Any, **options: Any) -> Tensor:
    return F.cross_entropy(x, y, reduction="sum", **options) / denominator


def ours(x: Tensor, y: Tensor, denominator: Any, **options: Any) -> Tensor:
    return cross_entropy(x, y, denominator=denominator, **options)


def chunked(x: Tensor, y: Tensor, denominator: Any, **options: Any) -> Tensor:
    """The weight is the identity."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return linear_cross_entropy(x, eye, y, denominator=denominator, chunk_rows=2, **options)


TRANSFORMS = {
    "grad": grad,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "third": lambda f: jacfwd(hessian(f)),
    "jvp": lambda f: lambda x, y, d: jvp(lambda x: f(x, y, d), (x,), (x.cos(),)),
    "forward over reverse": lambda f: lambda x, y, d: jvp(lambda x: grad(f)(x, y, d), (x,), (x.cos(),)),
}


@pytest.mark.parametrize("function", [ours, chunked], ids=["logits", "linear"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("denominator", [3, torch.tensor(2.5)], ids=str)
def test_transforms(denominator, transform, function):
    x, y = logits(3, 4), target_of(3, 4)
    if isinstance(denominator, Tensor):
        denominator = denominator.to(x.device)
    theirs = transform(by_hand)(x, y, denominator)
    actual, expected = (torch.utils._pytree.tree_leaves(r) for r in (transform(function)(x, y, denominator), theirs))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other.reshape(one.shape))


@pytest.mark.parametrize("function", [ours, chunked], ids=["logits", "linear"])
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, 0, None), (None, None, 0), (0, None, 0), (None, 0, 0)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "weight": torch.rand(4).double()}], ids=["", "weight"]
)
@pytest.mark.parametrize("transform", [lambda f: f, grad, hessian], ids=["values", "gradients", "hessians"])
def test_vmap(transform, options, in_dims, function):
    """Each sample has a denominator of its own."""
    batch = [logits(2, 3, 4), torch.stack([target_of(3, 4), target_of(3, 4)]), torch.tensor([2.0, 5.0])]
    arguments = [t if d == 0 else t[0] for t, d in zip(batch, in_dims, strict=True)]
    options = {k: v.to(arguments[0].device) if isinstance(v, Tensor) else v for k, v in options.items()}
    actual = vmap(transform(lambda *a: function(*a, **options)), in_dims=in_dims)(*arguments)
    each = [[t if d is None else t[i] for t, d in zip(arguments, in_dims, strict=True)] for i in range(2)]
    assert_close(actual, torch.stack([transform(lambda *a: by_hand(*a, **options))(*sample) for sample in each]))


def test_vmap_of_a_column_of_denominators():
    x, y, denominators = logits(3, 4), target_of(3, 4), torch.tensor([[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]])
    results = [
        vmap(vmap(f, in_dims=(None, None, 0)), in_dims=(None, None, 1))(x, y, denominators) for f in (ours, by_hand)
    ]
    assert_close(*results)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_weight_that_requires_grad(linear):
    """Then torch's own operations compute the loss."""
    x, q = logits(3, 4).requires_grad_(), logits(3, 4).softmax(1).requires_grad_()
    weight = torch.rand(4, dtype=torch.float64).requires_grad_()
    results = []
    for function in (chunked if linear else ours, by_hand):
        loss = function(x, q, 3, weight=weight)
        results.append((loss, torch.autograd.grad(loss, (x, q, weight))))
    assert_close(*results)


# ---- the linear layer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_as_the_sum_divided(reduction, stats, kind, dtype):
    shape = (20, 9)
    operands = [logits(20, 4).to(dtype), logits(9, 4).to(dtype), logits(9).to(dtype)]
    x, w, b = (t.to(torch.get_default_device()).requires_grad_() for t in operands)
    y = oracle.make_target(kind, shape, dtype).to(x.device)
    if kind == "int64":
        y[::3] = -100
    results = []
    for options, divisor in (
        ({"reduction": reduction, "denominator": torch.tensor([13])}, 1),
        ({"reduction": "sum"}, 13),
    ):
        options = {"z_loss": 0.1, "chunk_rows": 6, "dtype": oracle.arithmetic(dtype), **options}
        if "denominator" in options:
            options["denominator"] = options["denominator"].to(x.device)
        loss = linear_cross_entropy(x, w, y, linear_bias=b, return_stats=stats, **options)
        loss = loss[0] if stats else loss
        first = torch.autograd.grad(loss / divisor, (x, w, b), retain_graph=True)
        results.append((loss / divisor, first))
        again = torch.autograd.grad(loss / divisor, (x, w, b))  # from logits that are computed again
        if dtype not in oracle.HALVES:
            assert_close(again, first)
    (loss, gradients), (expected, expected_gradients) = results
    assert_close(loss, expected)
    for one, other in zip(gradients, expected_gradients, strict=True):  # in half types each logit's is rounded
        assert_close(one, other, rtol=0, atol=float(4 * torch.finfo(dtype).eps * other.abs().max()))


# ---- modules and what is around them ---------------------------------------------------------------------------------


def test_modules():
    """A keyword of the call, since it changes with each batch."""
    x, y = logits(5, 4, dtype=torch.float32), target_of(5, 9)
    layer = LinearCrossEntropyLoss(4, 9, label_smoothing=0.1)
    z = layer.linear(x)
    for denominator in (3, torch.tensor(4.5)):
        expected = F.cross_entropy(z, y, reduction="sum", label_smoothing=0.1) / denominator
        assert_close(layer(x, y, denominator=denominator), expected)
        assert_close(CrossEntropyLoss(label_smoothing=0.1)(z, y, denominator=denominator), expected)
    with pytest.raises(TypeError):
        CrossEntropyLoss()(z, y, 3)


@pytest.mark.parametrize("function", [ours, chunked], ids=["logits", "linear"])
def test_checkpoint(function):
    x, y = logits(5, 9).requires_grad_(), target_of(5, 9)
    loss = checkpoint(function, x, y, torch.tensor(3), use_reentrant=False)
    expected = by_hand(x, y, 3)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


def test_autocast(device):
    x, w, y = logits(5, 4, dtype=torch.float32, device=device), logits(9, 4, dtype=torch.float32, device=device), None
    y = target_of(5, 9).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        z = F.linear(x, w)
        loss = softmax_ext.cross_entropy(z, y, denominator=torch.tensor(3, device=device))
    assert loss.dtype == torch.float32
    assert_close(loss, F.cross_entropy(z.float(), y, reduction="sum") / 3)


@pytest.mark.parametrize(
    ("denominator", "error", "words"),
    [
        (10**400, ValueError, "finite as a float"),
        ([7], TypeError, "must be a number"),
        (torch.ones(3), ValueError, "denominator.sum()"),
    ],
    ids=["too large", "a list", "several"],
)
def test_what_is_no_denominator(denominator, error, words):
    with pytest.raises(error, match=re.escape(words)):
        cross_entropy(torch.randn(3, 4), torch.arange(3), denominator=denominator)
