"""What linear_cross_entropy has for each row: ``row_weight``, ``live_rows``, and ignored rows, which nothing reads."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from linear_checks import NAMES, both, limits_for, operands
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import softmax_ext
from softmax_ext import LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy, linear_ops, ops
from softmax_ext.options import REDUCTIONS as CODES
from softmax_ext.options import Options
from softmax_ext.plans import Limits
from softmax_ext.reference import cross_entropy as formulas

SIZE = (24, 16, 97)
REDUCTIONS = ["mean", "sum", "none"]
KINDS = ["given", "probability"]


def weights_for(kind: str, *rows: int) -> Tensor | str:
    """Positive, negative and 0, of values that every dtype can hold."""
    if kind == "probability":
        return kind
    values = torch.tensor([0.75, 2.0, -0.5, 1.0, 0.0])
    return values[torch.arange(math.prod(rows)) % 5].view(rows)


def some_ignored(target: Tensor) -> Tensor:
    target[::4] = -100
    return target


def assert_near(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Within 3 % of each tensor's largest value in half types."""
    for a, b in zip(actual, expected, strict=True):
        near = {} if dtype == torch.float64 else {"rtol": 0, "atol": 0.03 * b.detach().abs().max().item()}
        assert_close(a, b, check_dtype=False, **near)


# ---- row weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 5.0}], ids=["", "options"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_as_of_the_logits(name, kind, options, dtype):
    """In the gradients of the half types, too: of the sum over rows of any sign."""
    x, w, y = operands(*SIZE, dtype)
    y, given = some_ignored(y), weights_for(kind, SIZE[0])
    selected = limits_for(name, SIZE, dtype)
    weight = torch.rand(SIZE[2]).to(dtype)
    for reduction, class_weight, divisor in itertools.product(REDUCTIONS, [None, weight], [None, 3.0]):
        if reduction == "none" and divisor is not None:
            continue
        call = {"reduction": reduction, "weight": class_weight, "denominator": divisor, "row_weight": given, **options}
        ours = both(lambda x, w, call=call: linear_cross_entropy(x, w, y, **selected, **call), x, w)
        theirs = both(lambda x, w, call=call: cross_entropy(F.linear(x.double(), w.double()), y, **call), x, w)
        assert_near(ours, theirs, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_further_dimensions(name, kind):
    x = torch.randn(24, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(80, 3, 8, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 80, (24, 3))
    y[5], y[20:23, 1] = -100, -100
    selected = limits_for(name, (24, 8, 80), torch.float64, positions=3)
    given = weights_for(kind, 24, 3)

    def by_logits(x: Tensor, w: Tensor, reduction: str) -> Tensor:
        logits = F.linear(x, w.flatten(0, 1)).unflatten(1, (80, 3))
        return cross_entropy(logits, y, reduction=reduction, row_weight=given)

    for reduction in REDUCTIONS:
        ours = both(
            lambda x, w, r=reduction: linear_cross_entropy(x, w, y, reduction=r, row_weight=given, **selected), x, w
        )
        assert_close(ours, both(lambda x, w, r=reduction: by_logits(x, w, r), x, w))


@pytest.mark.parametrize("batch", [(), (5,), (3, 4)], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
def test_any_batch(probabilities, batch):
    x, w = torch.randn(*batch, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    y = torch.rand(*batch, 9).double().softmax(-1) if probabilities else torch.randint(0, 9, batch)
    given = weights_for("given", *batch)
    loss = linear_cross_entropy(x, w, y, reduction="none", row_weight=given)
    assert loss.shape == batch
    assert_close(loss, linear_cross_entropy(x, w, y, reduction="none") * given)
    assert_close(linear_cross_entropy(x, w, y, row_weight=given), loss.sum() / given.double().sum())


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_not_multiplied(name):
    x, w, y = operands(*SIZE, torch.float64)
    y, selected = some_ignored(y), limits_for(name, SIZE, torch.float64)
    plain = linear_cross_entropy(x, w, y, return_stats=True, **selected)[1]
    for kind in KINDS:
        loss, stats = linear_cross_entropy(
            x, w, y, return_stats=True, row_weight=weights_for(kind, SIZE[0]), **selected
        )
        oracle.assert_same_bits(stats, plain, "statistics")
        assert_close(loss, linear_cross_entropy(x, w, y, row_weight=weights_for(kind, SIZE[0])))
        of_stats = [torch.autograd.grad(t[2].sum() + t[0].sin().sum(), x, retain_graph=True) for t in (stats, plain)]
        assert_close(*of_stats)


def weighed(x: Tensor, w: Tensor, y: Tensor, given: Tensor | str, reduction: str) -> Tensor:
    """By its definition, with factors that are constants."""
    losses = linear_cross_entropy(x, w, y, reduction="none")
    live = y != -100
    factors, total = (-losses).exp().detach() * live, live.sum()
    if isinstance(given, Tensor):
        factors, total = given * live, (given * live).sum()
    losses = factors * losses
    return losses if reduction == "none" else losses.sum() / (total if reduction == "mean" else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_derivatives(reduction, kind):
    x, w, y = operands(4, 3, 7, torch.float64)
    y[1] = -100
    given = weights_for(kind, 4)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, y, reduction=reduction, row_weight=given, chunk_rows=3)

    def definition(x: Tensor, w: Tensor) -> Tensor:
        return weighed(x, w, y, given, reduction)

    assert_close(both(loss, x, w), both(definition, x, w))
    if kind == "given":  # the probability is a constant, which finite differences do not know
        assert gradcheck(loss, (x, w), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(loss, (x, w), check_fwd_over_rev=True)
    values = (x.detach(), w.detach())
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert_close(*(transform(f, argnums=(0, 1))(*values) for f in (loss, definition)))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(both(compiled, x, w), both(loss, x, w))
    assert_close(both(lambda *t: checkpoint(loss, *t, use_reentrant=False), x, w), both(loss, x, w))
    of_two = torch.func.vmap(lambda x: loss(x, values[1]))(torch.stack([x, x]).detach())
    assert_close(of_two[1], loss(*values))


@pytest.mark.parametrize("kind", KINDS)
def test_a_module(kind):
    module = LinearCrossEntropyLoss(4, 7)
    x, y = torch.randn(5, 4), torch.randint(0, 7, (5,))
    given = weights_for(kind, 5)
    assert_close(module(x, y, row_weight=given), cross_entropy(module.linear(x), y, row_weight=given))
    assert "memory=4096, logits_dtype=torch.float32" in repr(
        LinearCrossEntropyLoss(4, 7, memory=4096, logits_dtype=torch.float32)
    )


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (torch.ones(4), RuntimeError, r"row_weight must have shape \[5\], one value for each row; got float32 \[4\]"),
        (torch.ones(5).long(), RuntimeError, "row_weight must be floating"),
        (torch.ones(5, requires_grad=True), TypeError, "row_weight must have no derivative"),
        ("odds", ValueError, 'row_weight must be a Tensor, "probability" or None'),
        (2.0, TypeError, 'row_weight must be a Tensor, "probability" or None'),
    ],
    ids=["shape", "dtype", "grad", "text", "number"],
)
def test_refused_weights(given, error, text):
    with pytest.raises(error, match=f"linear_cross_entropy: {text}"):
        linear_cross_entropy(torch.randn(5, 3), torch.randn(7, 3), torch.zeros(5, dtype=torch.long), row_weight=given)


def test_no_probability_of_probabilities():
    with pytest.raises(ValueError, match="row_weight must be a Tensor or None with a target of probabilities"):
        linear_cross_entropy(torch.randn(5, 3), torch.randn(7, 3), torch.rand(5, 7), row_weight="probability")


def test_weights_are_constants_where_nothing_is_differentiated():
    x, w, y = torch.randn(5, 3), torch.randn(7, 3), torch.arange(5)
    given = torch.rand(5, requires_grad=True)
    with torch.no_grad():
        assert linear_cross_entropy(x, w, y, row_weight=given) == linear_cross_entropy(
            x, w, y, row_weight=given.detach()
        )


FAR_APART: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "ignored rows": lambda y: {"row_weight": torch.where(y == -100, 1e9, 1.0)},
    "unused classes": lambda y: {"weight": torch.where(torch.arange(SIZE[2]) < 60, 1.0, 1e6)},
    "pairs": lambda y: {
        "weight": torch.where(torch.arange(SIZE[2]) % 2 == 0, 1e3, 1e-3),
        "row_weight": torch.where(y % 2 == 0, 1e-3, 1e3),
    },
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", FAR_APART.values(), ids=FAR_APART)
@pytest.mark.parametrize("name", NAMES)
def test_only_weights_that_meet_count_in_float16(name, weights, reduction):
    x, w, y = operands(*SIZE, torch.float16)
    y, selected = some_ignored(y % 60), limits_for(name, SIZE, torch.float16)
    options = {"reduction": reduction, **weights(y)}
    up = 0.5 + torch.rand(SIZE[0]) if reduction == "none" else torch.ones(())
    theirs = cross_entropy(F.linear(x.double(), w.double()), y, **options)
    expected = torch.autograd.grad(theirs, (x, w), up.double())
    ours = linear_cross_entropy(x, w, y, dtype=torch.float32, **options, **selected)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(ours, (x, w), up, retain_graph=True), expected, strict=True):
            assert_close(a.double(), b.double(), rtol=0, atol=2e-3 * b.abs().max().item())


@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
@pytest.mark.parametrize("kind", ["rows", "classes", "both"])
@pytest.mark.parametrize("scale", [1e-5, 3e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_any_size_in_float16(name, scale, kind, logits_dtype):
    """The logits' gradients are kept in float16 until they are divided by the sum of the weights."""
    x, w, y = operands(*SIZE, torch.float16)
    y, selected = some_ignored(y), limits_for(name, SIZE, torch.float16)
    if logits_dtype is not None and "memory" in selected:
        selected["memory"] *= 2
    rows, classes = 0.5 + torch.rand(SIZE[0]), 0.5 + torch.rand(SIZE[2])
    for reduction in ("mean", "sum"):
        options = {"reduction": reduction}
        if kind != "classes":
            options["row_weight"] = scale * rows
        if kind != "rows":
            options["weight"] = scale * classes if kind == "classes" else classes
        upstream = 1.0 if reduction == "mean" else 1 / scale

        def total(x: Tensor, w: Tensor, options: dict = options, upstream: float = upstream, **more: Any) -> Tensor:
            if not more:
                return upstream * cross_entropy(F.linear(x.double(), w.double()), y, **options)
            return upstream * linear_cross_entropy(x, w, y, dtype=torch.float32, **options, **more)

        ours, theirs = total(x, w, **selected, logits_dtype=logits_dtype), torch.autograd.grad(total(x, w), (x, w))
        for _ in range(2):
            for a, b in zip(torch.autograd.grad(ours, (x, w), retain_graph=True), theirs, strict=True):
                assert_close(a.double(), b.double(), rtol=0, atol=2e-3 * b.abs().max().item())


# ---- ignored rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_ignored_rows_may_hold_anything(name, dtype):
    x, w, y = operands(*SIZE, dtype)
    y, selected = some_ignored(y), limits_for(name, SIZE, dtype)
    ruined = torch.where((y == -100)[:, None], torch.nan, x.detach()).requires_grad_()

    def results(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        loss, stats = linear_cross_entropy(x, w, y, return_stats=True, **selected)
        up = loss + stats.lse.sin().sum() + stats.nll.sum() + stats.entropy.square().sum()
        return (loss, *stats, *torch.autograd.grad(up, (x, w)))

    actual = results(ruined, w)
    oracle.assert_same_bits(actual, results(x, w), "NaN in ignored rows")
    _, lse, nll, entropy, prediction, of_input, _ = actual
    for values in (lse, nll, entropy, of_input):
        assert (values[y == -100] == 0).all()
    assert (prediction[y == -100] == -1).all()
    assert (prediction[y != -100] >= 0).all()


def test_ignored_rows_of_all_logits_at_once():
    """Second derivatives, forward mode and transforms, which compute all rows."""
    x, w, y = operands(6, 3, 7, torch.float64)
    y[::2] = -100
    ruined = torch.where((y == -100)[:, None], torch.nan, x.detach()).requires_grad_()

    def total(x: Tensor, w: Tensor) -> Tensor:
        loss, stats = linear_cross_entropy(x, w, y, return_stats=True)
        return loss + (stats.lse.sin() + stats.entropy.square() + stats.nll.square()).sum()

    def second(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(total(x, w), (x, w), create_graph=True)
        return (*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w)))

    def compiled(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return torch.compile(lambda *t: torch.func.grad(total, argnums=(0, 1))(*t), backend="aot_eager")(x, w)

    along = (torch.randn_like(x).detach(), torch.randn_like(w).detach())
    assert_close(second(ruined, w), second(x, w))
    for way in (lambda *t: torch.func.jvp(total, t, along), torch.func.hessian(total), compiled):
        assert_close(way(ruined.detach(), w.detach()), way(x.detach(), w.detach()))
    assert gradcheck(total, (x, w), check_forward_ad=True)


SHAPES = {
    "rows": (13, 200),
    "long rows": (5, 9000),
    "few classes": (130, 3),
    "positions": (3, 40, 9),
    "few classes, positions": (3, 5, 70),
    "one class": (7, 1),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}], ids=["", "options"])
def test_operators_skip_ignored_rows(extra, shape, dtype, device):
    """Whatever their logits are; the other rows have the bits that they have without skips_ignored."""
    x = torch.randn(shape).to(dtype).to(device)
    y = torch.randint(0, shape[1], (shape[0], *shape[2:])).to(device)
    dead = torch.rand(y.shape, device=device) < 0.4
    dead.view(-1)[0], dead.view(-1)[-1] = True, False
    y[dead] = -7
    ruined = torch.where(dead.unsqueeze(1), torch.nan, x)
    keywords = {"label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, **extra}
    plain = Options(dim=1, reduction=CODES["none"], ignore_index=-7, logit_scale=1.0, **keywords)
    skipping = plain._replace(skips_ignored=True)
    rows = ~dead

    def check(actual: Tensor, expected: Tensor, of_dead: float, what: str) -> None:
        oracle.assert_same_bits([actual[rows]], [expected[rows]], what)
        assert (actual[dead] == of_dead).all(), what

    expected = ops.cross_entropy(x, y, None, *plain, None, True, True)
    actual = ops.cross_entropy(ruined, y, None, *skipping, None, True, True)
    overwritten = ruined.clone()
    over = ops.cross_entropy_(overwritten, y, None, *skipping, None, True)
    for found in (actual, [over[0], None, None, *over[3:], overwritten]):
        for i, name in ((0, "loss"), (3, "lse"), (4, "nll"), (5, "entropy"), (6, "prediction")):
            check(found[i], expected[i], -1 if i == 6 else 0, name)
        check(found[7].movedim(1, -1), expected[7].movedim(1, -1), 0, "gradient")

    upstream = [torch.randn_like(t) for t in (expected[0], *expected[3:6])]
    one = torch.ones((), dtype=torch.float64, device=device)
    kept = (expected[1], one, expected[5], *plain)
    full = ops.cross_entropy_backward(*upstream, x, y, None, *kept, True, False)[0]
    kept = (actual[1], one, actual[5], *skipping)
    gradient = ops.cross_entropy_backward(*upstream, ruined, y, None, *kept, True, False)[0]
    check(gradient.movedim(1, -1), full.movedim(1, -1), 0, "gradient of everything")

    part = None
    for begin, end in ((0, shape[1] // 2), (shape[1] // 2, shape[1])):
        piece = ruined[:, begin:end].contiguous()
        part = ops.cross_entropy_part(piece, y, None, *skipping, None, True, begin, shape[1], part)
    assert part is not None
    wide = dtype == torch.float64
    merged = ops.cross_entropy_of_parts(
        part.unsqueeze(0), y, None, *skipping, expected[3].dtype, wide, True, None, shape[1]
    )
    for i, name in ((0, "loss"), (3, "lse"), (4, "nll"), (5, "entropy"), (6, "prediction")):
        assert (merged[i][dead] == (-1 if i == 6 else 0)).all(), name
        assert_close(merged[i][rows], expected[i][rows], check_dtype=False)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_formulas_skip_ignored_rows(reduction):
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 5, (6,))
    y[::2] = -100
    options = Options(1, CODES[reduction], -100, 0.1, 0.01, 4.0, 0.5, skips_ignored=True)
    ruined = torch.where((y == -100)[:, None], torch.inf, x)
    kernels = ops.cross_entropy(ruined, y, None, *options, None, True, False)
    assert_close(formulas(ruined, y, None, None, options, None, True), (kernels[0], *kernels[3:]))


# ---- live rows -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["read", "unread"])
def targets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a GPU the host does not read the targets; that way is taken on the CPU here."""
    if request.param == "unread":
        monkeypatch.setattr(softmax_ext.operands, "_host_knows", lambda target: False)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_number_of_live_rows(reduction, name, dtype, targets):
    x, w, y = operands(*SIZE, dtype)
    y = some_ignored(y)
    selected = limits_for(name, SIZE, dtype)
    ruined = torch.where((y == -100)[:, None], torch.nan, x.detach()).requires_grad_()
    for options in ({}, {"row_weight": weights_for("given", SIZE[0])}, {"return_stats": True}):
        found = []
        for input, told in ((ruined, {"live_rows": 18}), (x, {})):
            results = linear_cross_entropy(input, w, y, reduction=reduction, **options, **told, **selected)
            loss, stats = results if isinstance(results, tuple) else (results, ())
            up = loss.sum() + sum(t.sum() for t in stats[:3])
            found.append((loss, *stats, *torch.autograd.grad(up, (input, w))))
        assert_near(*found, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("told", [0, 17, 19, 24])
def test_a_wrong_number_is_noticed(told, name, reduction, targets):
    x, w, y = operands(*SIZE, torch.float32)
    y, selected = some_ignored(y), limits_for(name, SIZE, torch.float32)
    call = {"reduction": reduction, "live_rows": told, **selected}
    if targets == "read":
        with pytest.raises(
            ValueError,
            match=f"live_rows must be 18, the number of rows with a class that is not ignored, or None; got {told}",
        ):
            linear_cross_entropy(x, w, y, **call)
        return
    loss = linear_cross_entropy(x, w, y, **call)
    assert loss.isnan().all()
    _, of_weight = torch.autograd.grad(loss.sum(), (x, w))
    if told < 24:  # rows are left out
        assert of_weight.isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_no_row_is_live(name, targets):
    x, w, y = operands(*SIZE, torch.float32)
    y.fill_(-100)
    loss = linear_cross_entropy(x, w, y, reduction="sum", live_rows=0, **limits_for(name, SIZE, torch.float32))
    for t in (loss, *torch.autograd.grad(loss, (x, w))):
        assert (t == 0).all()


def test_rows_of_several_positions_are_live_if_one_is(targets):
    x, w = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 2, 4, dtype=torch.float64)
    y = torch.tensor([[1, -100], [-100, -100], [2, 3], [-100, 4], [-100, -100], [0, 0]])
    assert_close(linear_cross_entropy(x, w, y, live_rows=4), linear_cross_entropy(x, w, y))


@pytest.mark.parametrize(
    ("told", "error", "text"),
    [(-1, ValueError, "be 5, the number of"), (6, ValueError, "be 5, the number of"), (2.0, TypeError, "be an int")],
)
def test_refused_numbers(told, error, text):
    with pytest.raises(error, match=f"linear_cross_entropy: live_rows must {text}"):
        linear_cross_entropy(torch.randn(5, 3), torch.randn(7, 3), torch.zeros(5, dtype=torch.long), live_rows=told)


def test_all_rows_of_probabilities_are_live():
    x, w, y = torch.randn(5, 3), torch.randn(7, 3), torch.rand(5, 7)
    assert linear_cross_entropy(x, w, y, live_rows=5) == linear_cross_entropy(x, w, y)
    text = "live_rows must be 5, the number of rows, with a target of probabilities, or None; got 4"
    with pytest.raises(ValueError, match=text):
        linear_cross_entropy(x, w, y, live_rows=4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"return_stats": True}, {"reduction": "none"}], ids=str)
def test_nobody_waits_for_the_targets(options, name, monkeypatch):
    """Values that are not there cannot be waited for."""
    monkeypatch.setattr(softmax_ext.operands, "_host_knows", lambda target: False)
    monkeypatch.setattr(softmax_ext.operands, "_checks_targets", lambda target: False)
    monkeypatch.setattr(linear_ops, "forward", linear_ops._forward)
    monkeypatch.setattr(linear_ops, "backward", linear_ops._backward)
    selected = limits_for(name, (24, 8, 500), torch.float32)
    with FakeTensorMode():
        x, w = torch.randn(24, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
        y = torch.zeros(24, dtype=torch.long)
        for told in ({}, {"live_rows": 7}):
            results = linear_cross_entropy(x, w, y, **told, **selected, **options)
            loss = results[0] + results[1].lse.sum() if isinstance(results, tuple) else results.sum()
            grads = torch.autograd.grad(loss, (x, w))
            assert [g.shape for g in grads] == [x.shape, w.shape]
    monkeypatch.undo()
    with (
        FakeTensorMode(),
        pytest.raises((DataDependentOutputException, DynamicOutputShapeException)),
    ):  # so that this test can fail
        linear_ops._forward(*forward_arguments(torch.randn(24, 8), torch.randn(500, 8), torch.zeros(24).long()))


def forward_arguments(x: Tensor, w: Tensor, y: Tensor) -> tuple[object, ...]:
    options = Options(1, CODES["mean"], -100, 0.0, 0.0, None, 1.0, skips_ignored=True)
    return (x, w, None, y, None, None, *options, None, False, *Limits(), [False] * 3, [True] * 4, True, None, 1)


def test_compiled_with_the_number_of_live_rows():
    x, w, y = operands(*SIZE, torch.float32)
    y = some_ignored(y)
    compiled = torch.compile(
        lambda x, w, n: linear_cross_entropy(x, w, y, live_rows=n), fullgraph=True, backend="aot_eager", dynamic=True
    )
    ours, theirs = (
        both(lambda x, w, f=f: f(x, w), x, w)
        for f in (lambda x, w: compiled(x, w, 18), lambda x, w: linear_cross_entropy(x, w, y))
    )
    assert_close(ours, theirs)
    with pytest.raises(ValueError, match="live_rows must be 18"):
        compiled(x, w, 17)


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_compiled_with_the_number_counted_in_the_graph():
    x, w, y = operands(*SIZE, torch.float32)
    y = some_ignored(y)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, y, live_rows=(y != -100).sum().item())

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(both(compiled, x, w), both(loss, x, w))
