"""Cross entropy against float64: values and gradients over the full product of what can be asked for.

target kind x weight x ignore_index x label smoothing x reduction x shape x dtype x strides x strategy, then the options
that torch's function lacks, the statistics, dtypes that differ, and the signature.
"""

import inspect
import itertools
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from cross_entropy_checks import (
    KINDS,
    LAYOUTS,
    REDUCTIONS,
    Strategy,
    bounds_for,
    check,
    check_product,
    run,
)
from layouts import contiguous, transposed
from torch import Tensor

import softmax_ext
from softmax_ext import CrossEntropyStats, cross_entropy

# Class counts around the vectors of every ISA, and both layouts: few classes, class dimension in the middle.
SHAPES = [
    (7,),
    (1,),
    (5, 1),
    (4, 2),
    (3, 15),
    (3, 16),
    (3, 17),
    (131, 3),  # one more tile than fits, partly filled
    (2, 31),
    (2, 32),
    (2, 33),
    (3, 40),
    (2, 1000),
    (2, 5, 9),
    (2, 40, 3),
    (2, 3, 4, 5),
]
LARGE_SHAPES = [(2, 5000), (2, 50257), (1, 128256), (1, 5000, 3)]


STRATEGIES = [Strategy(*flags) for flags in itertools.product([False, True], repeat=3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_option_layout_and_strategy(shape, dtype, kind, device):
    check_product(shape, dtype, kind, device, LAYOUTS, STRATEGIES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1], ids=str)
def test_every_option_of_expanded_logits(shape, dtype, kind, device):
    def expanded(_):
        raise NotImplementedError

    strategies = [s for s in STRATEGIES if not s.inplace]
    check_product(shape, dtype, kind, device, [expanded], strategies, expanded=True)


@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_many_classes(shape, dtype, kind, device):
    strategies = [Strategy(False, False, False), Strategy(True, False, True), Strategy(True, True, False)]
    check_product(shape, dtype, kind, device, [contiguous], strategies)


def worst(actual: Tensor, exact: Tensor) -> float:
    return (actual.detach().cpu().double() - exact).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_never_worse_than_torch_plus_rounding(reduction, dtype, kind, device):
    """What the bounds above imply, said directly: the largest error of a batch beside that of torch."""
    shape = (256, 200)
    values = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device)
    target = oracle.make_target(kind, shape, dtype).to(device)
    weight = oracle.make_weight(200, dtype).to(device)
    exact = oracle.cross_entropy(values, target, weight, reduction=reduction, label_smoothing=0.1)
    results = []
    for function in (cross_entropy, F.cross_entropy):
        x = values.clone().requires_grad_()
        indices = target if kind == "probabilities" else target.long()  # torch takes uint8 only without smoothing
        loss = function(x, indices, weight, reduction=reduction, label_smoothing=0.1)
        loss.backward(torch.ones_like(loss))
        results.append((loss, x.grad))
    for name, ours, theirs, right in zip(("loss", "grad"), *results, exact[:2], strict=True):
        rounding = oracle.tolerance(name, right.abs().max(), dtype).item()
        assert worst(ours, right) <= max(worst(theirs, right), rounding), name


# ---- the options that torch's function lacks -------------------------------------------------------------------------

EXTRA_OPTIONS = [
    {"z_loss": 0.01},
    {"softcap": 5.0},
    {"logit_scale": 0.5},
    {"logit_scale": -1.5},
    {"z_loss": 0.01, "softcap": 5.0, "logit_scale": 2.0},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("extra", EXTRA_OPTIONS, ids=str)
def test_z_loss_softcap_and_logit_scale(extra, dtype, kind, device):
    for shape in [(3, 17), (131, 3), (2, 5000), (2, 7, 5)]:
        values = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device)
        target = oracle.make_target(kind, shape, dtype).to(device)
        ignore = -100 if kind == "probabilities" else int(target.reshape(-1)[0])
        weight = oracle.make_weight(shape[1], dtype).to(device)
        for w, smoothing, reduction in itertools.product([None, weight], [0.0, 0.1], ["none", "mean"]):
            options = {"ignore_index": ignore, "label_smoothing": smoothing, "reduction": reduction, **extra}
            for upstream in (
                torch.ones((), dtype=dtype, device=device),
                torch.tensor(-0.375, dtype=dtype, device=device),
            ):
                bounds = bounds_for(values, target, w, upstream, **options)
                for strategy in STRATEGIES:
                    if strategy.scaled == bool(upstream != 1):
                        results = run(contiguous(values), target, w, upstream, strategy, **options)
                        check(bounds, strategy, results, (shape, strategy, w is not None, options))


# ---- statistics ------------------------------------------------------------------------------------------------------


def check_stats(values, target, device, **options):
    """Values, and the gradient of a random combination of the loss and all three."""
    ignore = options.get("ignore_index", -100)
    shape_options = {k: v for k, v in options.items() if k in ("softcap", "logit_scale")}
    dim, dtype = oracle.class_dim(values), values.dtype
    work = oracle.arithmetic(dtype)

    exact_x = oracle.double(values).requires_grad_()
    exact_target = oracle.double(target)
    exact_loss = oracle.cross_entropy_loss(exact_x, exact_target, **options)
    *exact, prediction = oracle.stats(exact_x, exact_target, ignore_index=ignore, **shape_options)
    mix = [(torch.rand_like(t) - 0.5).to(work).double() for t in exact]
    (exact_loss.sum() + sum((m * t).sum() for m, t in zip(mix, exact, strict=True))).backward()

    x = values.clone().requires_grad_()
    loss, stats = cross_entropy(x, target, return_stats=True, **options)
    assert isinstance(stats, CrossEntropyStats)
    assert stats._fields == ("lse", "nll", "entropy", "prediction")
    exact_loss = exact_loss.detach()
    rounded_z = oracle.conditioning(values, **shape_options)
    allowed = oracle.tolerance("loss", exact_loss, dtype, scale=exact_loss * rounded_z)
    oracle.assert_within(loss, exact_loss, allowed, ("loss", options))
    # lse is the sum of the largest logit and a logarithm, which may cancel.
    magnitude = 1 + oracle.transformed(oracle.double(values), **shape_options).abs().amax(-1)
    for name, got, right in zip(stats._fields, stats, exact, strict=False):
        right = right.detach()
        assert got.dtype == work, name
        scale = magnitude if name == "lse" else right * rounded_z
        oracle.assert_within(got, right, oracle.tolerance(name, right, work, scale=scale), (name, options))
    assert stats.prediction.dtype == torch.int64
    assert torch.equal(stats.prediction.cpu(), prediction)
    assert not stats.prediction.requires_grad

    mix = [m.to(work).to(device) for m in mix]
    (loss.sum() + sum((m * t).sum() for m, t in zip(mix, stats, strict=False)).to(loss.dtype)).backward()
    # Four gradients of magnitude 1, which may cancel.
    scale = (oracle.largest(exact_x.grad, dim) + 1) * magnitude.unsqueeze(dim)
    oracle.assert_within(x.grad, exact_x.grad, oracle.tolerance("grad", exact_x.grad, dtype, scale=scale), options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(9,), (5, 1), (131, 3), (3, 17), (4, 40), (2, 5000), (2, 40, 3), (2, 3, 4, 5)], ids=str
)
def test_statistics(shape, dtype, kind, device):
    values = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device)
    target = oracle.make_target(kind, shape, dtype).to(device)
    ignore = -100 if kind == "probabilities" else int(target.reshape(-1)[0])
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.01, "logit_scale": 0.5}, {"softcap": 30.0}):
        for layout in (contiguous, transposed):
            check_stats(layout(values), target, device, ignore_index=ignore, reduction="none", **options)


def test_statistics_of_ignored_rows(device):
    logits = torch.randn(4, 6, device=device)
    target = torch.tensor([1, -100, 3, -100], device=device)
    loss, stats = cross_entropy(logits, target, return_stats=True, reduction="none")
    ignored = target == -100
    assert torch.all(loss[ignored] == 0)
    assert torch.all(stats.nll[ignored] == 0)
    everywhere = cross_entropy(logits, torch.zeros_like(target), return_stats=True)[1]
    for name in ("lse", "entropy", "prediction"):
        assert torch.equal(getattr(stats, name), getattr(everywhere, name)), name


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("kind", ["int64", "probabilities"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 40), (131, 3), (500, 3), (2, 40, 3)] * 5,
        pytest.param([(4, 3000), (2, 500, 3)], marks=pytest.mark.devices("cpu")),  # on CUDA other kernels run then
    ],
    ids=["short", "long"],
)
def test_statistics_do_not_change_the_loss_and_the_gradient(shapes, dtype, kind, options, device):
    """Not a bit of them; several draws, as sums in another order mostly round alike."""
    for shape, weighted in itertools.product(shapes, [False, True]):
        values = torch.randn(shape, device=device, dtype=torch.float64).to(dtype)
        target = oracle.make_target(kind, shape, dtype).to(device)
        weight = oracle.make_weight(shape[1], dtype).to(device) if weighted else None
        x, y = values.clone().requires_grad_(), values.clone().requires_grad_()
        plain = cross_entropy(x, target, weight, **options)
        with_stats, _ = cross_entropy(y, target, weight, return_stats=True, **options)
        plain.backward()
        with_stats.backward()
        assert torch.equal(plain, with_stats)
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("shape", [(1, 5), (1, 40), (130, 5)], ids=str)
def test_prediction_is_the_first_of_the_largest(shape, device):
    logits = torch.zeros(shape, device=device)
    logits[:, 2] = logits[:, 4] = 1
    target = torch.zeros(shape[0], dtype=torch.int64, device=device)
    _, stats = cross_entropy(logits, target, return_stats=True)
    assert torch.all(stats.prediction == 2)


@pytest.mark.parametrize("precompute_grad", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_statistics_are_the_same_for_every_strategy(precompute_grad, inplace, device):
    values = torch.randn(5, 40, device=device)
    target = oracle.make_target("int64", (5, 40), torch.float32).to(device)
    loss, stats = cross_entropy(values, target, return_stats=True)
    x = values.clone().requires_grad_().clone()
    other_loss, other = cross_entropy(x, target, return_stats=True, precompute_grad=precompute_grad, inplace=inplace)
    assert torch.equal(loss, other_loss)
    for name, a, b in zip(stats._fields, stats, other, strict=True):
        assert torch.equal(a, b), name


# ---- strategies among each other -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_precompute_grad_with_a_gradient_for_the_target(dtype, device):
    values = torch.randn(5, 40, device=device).to(dtype)
    target = oracle.make_target("probabilities", (5, 40), dtype).to(device)
    grads = []
    for precompute in (False, True):
        x, q = values.clone().requires_grad_(), target.clone().requires_grad_()
        cross_entropy(x, q, precompute_grad=precompute).backward()
        grads.append((x.grad, q.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_inplace_changes_no_bit(kind, dtype, device):
    """The same kernel writes the gradient elsewhere; only precompute_grad may differ, in the last place."""
    for shape in [(5, 40), (131, 3), (2, 40, 3), (2, 5000)]:
        values = torch.randn(shape, device=device).to(dtype)
        target = oracle.make_target(kind, shape, dtype).to(device)
        for scaled, precompute in itertools.product([False, True], repeat=2):
            upstream = torch.tensor(0.75 if scaled else 1.0, dtype=dtype, device=device)
            here = run(contiguous(values), target, None, upstream, Strategy(precompute, True, scaled))
            there = run(contiguous(values), target, None, upstream, Strategy(precompute, False, scaled))
            assert torch.equal(here[0], there[0]), "loss"
            assert torch.equal(here[1], there[1]), (shape, scaled, precompute)


def test_upstream_gradient_of_each_row(device):
    values = torch.randn(6, 40, device=device)
    target = oracle.make_target("int64", (6, 40), torch.float32).to(device)
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.5, 1e-3, 1e3], device=device)
    bounds = bounds_for(values, target, None, upstream, reduction="none")
    for strategy in STRATEGIES:
        if strategy.scaled:
            results = run(contiguous(values), target, None, upstream, strategy, reduction="none")
            check(bounds, strategy, results, strategy)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_dtype_of_computation_and_result(dtype, result, device):
    """dtype= computes in the wider of the two and rounds once; the gradient has the input's dtype."""
    work = oracle.arithmetic(dtype, result)
    for shape, kind, reduction in itertools.product([(5, 40), (131, 3)], KINDS, REDUCTIONS):
        values = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device)
        target = oracle.make_target(kind, shape, dtype).to(device)
        exact = oracle.cross_entropy(values, target, reduction=reduction)
        scale = oracle.gradient_scale(exact.grad, target, None, reduction=reduction)
        for precompute in (False, True):
            x = values.clone().requires_grad_()
            loss = cross_entropy(x, target, reduction=reduction, dtype=result, precompute_grad=precompute)
            assert loss.dtype == result
            loss.backward(torch.ones_like(loss))
            assert x.grad.dtype == dtype
            allowed = oracle.tolerance("loss", exact.loss, result, arithmetic_dtype=work)
            oracle.assert_within(loss, exact.loss, allowed, (shape, kind, reduction))
            roundings = oracle.gradient_roundings(dtype, precompute)
            options = {"arithmetic_dtype": work, "scale": scale, "roundings": roundings}
            allowed = oracle.tolerance("grad", exact.grad, dtype, **options)
            oracle.assert_within(x.grad, exact.grad, allowed, (shape, kind, reduction, precompute))


@pytest.mark.parametrize("target_dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_probabilities_of_another_dtype(dtype, target_dtype, device):
    result = torch.promote_types(dtype, target_dtype)
    work = oracle.arithmetic(dtype, target_dtype)
    for shape in [(5, 40), (131, 3), (2, 40, 3)]:
        values = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
        target = oracle.make_target("probabilities", shape, target_dtype).to(device)
        exact = oracle.cross_entropy(values, target)
        x, q = values.clone().requires_grad_(), target.clone().requires_grad_()
        loss = cross_entropy(x, q)
        loss.backward()
        assert (loss.dtype, x.grad.dtype, q.grad.dtype) == (result, dtype, target_dtype)
        allowed = oracle.tolerance("loss", exact.loss, result, arithmetic_dtype=work)
        oracle.assert_within(loss, exact.loss, allowed, shape)
        scale = oracle.gradient_scale(exact.grad, target, None)
        allowed = oracle.tolerance("grad", exact.grad, dtype, arithmetic_dtype=work, scale=scale)
        oracle.assert_within(x.grad, exact.grad, allowed, shape)
        scale = oracle.largest(exact.grad_target, 1)
        allowed = oracle.tolerance("grad_target", exact.grad_target, target_dtype, arithmetic_dtype=work, scale=scale)
        oracle.assert_within(q.grad, exact.grad_target, allowed, shape)


@pytest.mark.parametrize("weight_dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weight_of_another_dtype(kind, dtype, weight_dtype, device):
    for shape in [(5, 40), (131, 3)]:
        values = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
        target = oracle.make_target(kind, shape, dtype).to(device)
        weight = oracle.make_weight(shape[1], weight_dtype).to(device)
        for w in (weight, weight.repeat_interleave(2)[::2], weight[:1].expand(shape[1])):
            for smoothing in (0.0, 0.1):
                one = torch.ones((), dtype=dtype, device=device)
                bounds = bounds_for(values, target, w, one, label_smoothing=smoothing)
                strategy = Strategy(False, False, False)
                check(bounds, strategy, run(values, target, w, one, strategy, label_smoothing=smoothing), shape)


# ---- the signature ---------------------------------------------------------------------------------------------------


def test_positional_arguments_are_torchs():
    theirs = inspect.signature(F.cross_entropy).parameters
    ours = inspect.signature(cross_entropy).parameters
    for a, b in zip(theirs.values(), ours.values(), strict=False):
        assert (a.name, a.default, a.kind) == (b.name, b.default, b.kind)
    beyond = list(ours.values())[len(theirs) :]
    assert [p.name for p in beyond] == [
        "dtype",
        "z_loss",
        "softcap",
        "logit_scale",
        "denominator",
        "row_weight",
        "precompute_grad",
        "inplace",
        "return_stats",
    ]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in beyond)


def test_called_by_position(device):
    logits, target = torch.randn(5, 7, device=device), torch.tensor([0, 1, 2, 3, 6], device=device)
    weight = oracle.make_weight(7, torch.float32).to(device)
    arguments = (logits, target, weight, None, 1, None, "sum", 0.25)
    exact = oracle.cross_entropy(logits, target, weight, ignore_index=1, reduction="sum", label_smoothing=0.25)
    allowed = oracle.tolerance("loss", exact.loss, torch.float32)
    oracle.assert_within(cross_entropy(*arguments), exact.loss, allowed, "by position")


@pytest.mark.parametrize("size_average", [None, False, True])
@pytest.mark.parametrize("reduce", [None, False, True])
def test_legacy_reduction(size_average, reduce, device):
    logits, target = torch.randn(5, 7, device=device), torch.tensor([0, 1, 2, 3, 6], device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = F.cross_entropy(logits.cpu().double(), target.cpu(), None, size_average, -100, reduce)
        ours = cross_entropy(logits, target, None, size_average, -100, reduce)
        module = softmax_ext.CrossEntropyLoss(size_average=size_average, reduce=reduce)(logits, target)
    oracle.assert_within(ours, theirs, oracle.tolerance("loss", theirs, torch.float32), (size_average, reduce))
    assert torch.equal(ours, module)


def test_legacy_reduction_warns_as_torch_does(device):
    logits, target = torch.randn(2, 3, device=device), torch.tensor([0, 1], device=device)
    with pytest.warns(UserWarning, match="deprecated"):
        cross_entropy(logits, target, size_average=False)


def test_elementwise_mean(device):
    """Is the mean, with torch's warning, at the line of the call."""
    logits, target = torch.randn(2, 3, device=device), torch.tensor([0, 1], device=device)
    calls = {
        "cross_entropy": lambda reduction: cross_entropy(logits, target, reduction=reduction),
        "module": lambda reduction: softmax_ext.CrossEntropyLoss(reduction=reduction)(logits, target),
        "linear": lambda reduction: softmax_ext.linear_cross_entropy(
            logits, torch.eye(3, device=device), target, reduction=reduction
        ),
    }
    for name, call in calls.items():
        with pytest.warns(UserWarning, match="^reduction='elementwise_mean' is deprecated. Please use") as caught:
            loss = call("elementwise_mean")
        assert torch.equal(loss, call("mean")), name
        assert name == "module" or [w.filename for w in caught] == [__file__]
