"""The safety of ``inplace`` and ``precompute_grad``: every misuse is refused, and nothing is corrupted in silence.

``inplace`` writes the gradient over the logits: in the backward, or with ``precompute_grad`` in the forward. Whatever
still needs the logits afterwards must fail, by a check or by autograd's version counter; whatever does not must get
the same numbers as torch's F.cross_entropy, in float64.
"""

import contextlib
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seeded import randint, randn
from torch import Tensor
from torch.testing import assert_close

from softmax_ext import CrossEntropyLoss, cross_entropy, ops
from softmax_ext.autograd import cross_entropy as functions

IN_BACKWARD = {"inplace": True}
IN_FORWARD = {"inplace": True, "precompute_grad": True}
INPLACE = [pytest.param(IN_BACKWARD, id="in backward"), pytest.param(IN_FORWARD, id="in forward")]
STRATEGIES = [*INPLACE, pytest.param({"precompute_grad": True}, id="precomputed")]

both = pytest.mark.parametrize("inplace", INPLACE)
strategies = pytest.mark.parametrize("strategy", STRATEGIES)


def leaf_and_logits(*shape: int) -> tuple[Tensor, Tensor]:
    """A leaf, and logits of it that no backward needs."""
    leaf = randn(*shape).requires_grad_()
    return leaf, leaf * 2


TARGET = torch.tensor([0, 3, 2])


# ---- refused before anything happens -------------------------------------------------------------------------------


def refused(error: type[Exception], text: str, input: Tensor, target: Tensor, **options: Any) -> None:
    before, version = input.detach().clone(), input._version
    with pytest.raises(error, match=text):
        cross_entropy(input, target, **options)
    assert torch.equal(input, before)
    assert input._version == version


@both
def test_leaf_that_requires_grad(inplace):
    leaf = randn(3, 4).requires_grad_()
    refused(
        ValueError, "cross_entropy: input must not be a leaf that requires grad.*inplace=False", leaf, TARGET, **inplace
    )
    with pytest.raises(ValueError, match="leaf"):
        CrossEntropyLoss(**inplace)(leaf, TARGET)


@both
@pytest.mark.parametrize(
    "view",
    [
        lambda leaf: leaf.view(3, 4),
        lambda leaf: leaf.view(4, 3).T,
        lambda leaf: leaf.view(2, 6)[:, :4].view(2, 4),
        lambda leaf: leaf.view(3, 4).view(12).unflatten(0, (3, 4)),
        lambda leaf: leaf.unsqueeze(0),
        lambda leaf: leaf.view(6, 2).chunk(2)[1],
    ],
    ids=["view", "transposed", "slice", "view of a view", "unsqueeze", "chunk"],
)
def test_view_of_a_leaf_that_requires_grad(view, inplace):
    """Its storage is the leaf's: the parameter itself would be overwritten."""
    leaf = randn(12).requires_grad_()
    before, logits = leaf.detach().clone(), view(leaf)
    target = TARGET[: len(logits)]
    with pytest.raises(RuntimeError):  # torch's word on every in-place operation
        view(leaf).mul_(2)
    target = target.clamp(max=logits.shape[1] - 1)
    refused(ValueError, "input must not be a leaf that requires grad.*a view of one", logits, target, **inplace)
    assert torch.equal(leaf, before)


@both
@pytest.mark.parametrize(
    "overlapping",
    [
        lambda x: x[:1].expand(3, 4),
        lambda x: x[:, :1].expand(3, 4),
        lambda x: x.view(-1).as_strided((3, 4), (2, 1)),
        lambda x: x.view(-1).unfold(0, 4, 3)[:3],
    ],
    ids=["expanded rows", "expanded classes", "as_strided", "unfold"],
)
def test_overlapping_elements(overlapping, inplace):
    _, logits = leaf_and_logits(3, 4)
    refused(
        ValueError, r"input must not have overlapping elements.*contiguous\(\)", overlapping(logits), TARGET, **inplace
    )


@both
def test_size_one_dimensions_do_not_overlap(inplace):
    """Expanding to size 1 gives a stride of 0 and no overlap."""
    leaf = randn(4).requires_grad_()
    cross_entropy((leaf * 2).expand(1, 4), torch.tensor([1]), **inplace).backward()
    other = leaf.detach().requires_grad_()
    F.cross_entropy(other.unsqueeze(0) * 2, torch.tensor([1])).backward()
    assert_close(leaf.grad, other.grad)


@both
def test_nothing_does_not_overlap(inplace):
    leaf = randn(1, 33).requires_grad_()
    for logits in ((leaf * 2).expand(3, 33)[:0], (leaf * 2)[:, :1].expand(1, 33)[:0], (leaf * 2)[:0]):
        assert cross_entropy(logits, TARGET[:0], reduction="sum", **inplace) == 0


@both
def test_target_that_requires_grad(inplace):
    _, logits = leaf_and_logits(3, 4)
    target = randn(3, 4, seed=1).softmax(1).requires_grad_()
    refused(ValueError, r"target must not require grad if inplace=True.*target\.detach\(\)", logits, target, **inplace)


@both
def test_bad_class_touches_nothing(inplace):
    """Classes are checked before the first write, even where the bad one is in the last row."""
    _, logits = leaf_and_logits(3, 4)
    refused(IndexError, r"got 4 at position \[2\]", logits, torch.tensor([0, 3, 4]), **inplace)


# ---- refused by autograd, since the logits are gone ----------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "function", [torch.exp, torch.sigmoid, torch.tanh, torch.relu, lambda x: x.softmax(1), torch.sqrt]
)
def test_graph_that_still_needs_the_logits(function, inplace):
    """These save their result for their own backward; with the gradient written over it, theirs would be wrong."""
    leaf = randn(3, 4).abs().requires_grad_()
    loss = cross_entropy(function(leaf), TARGET, **inplace)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert leaf.grad is None


@both
@pytest.mark.parametrize("order", [1, -1])
def test_another_consumer_that_saved_the_logits(order, inplace):
    """The logits go to the loss and to something that needs them in its backward; whichever runs first."""
    _, logits = leaf_and_logits(3, 4)
    losses = [logits.square().sum(), cross_entropy(logits, TARGET, **inplace)][::order]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (losses[0] + losses[1]).backward()


@both
def test_another_consumer_through_a_view(inplace):
    """Views share the version counter."""
    _, logits = leaf_and_logits(3, 4)
    penalty = logits.view(-1)[:6].square().sum()
    loss = cross_entropy(logits, TARGET, **inplace)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (penalty + loss).backward()


@both
def test_two_losses_overwrite_the_same_logits(inplace):
    """Each would read what the other wrote."""
    _, logits = leaf_and_logits(3, 4)
    loss = cross_entropy(logits, TARGET, **IN_BACKWARD) + cross_entropy(logits, TARGET.flip(0), **inplace)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@both
@pytest.mark.parametrize(
    "write",
    [
        lambda logits: logits.zero_(),
        lambda logits: logits.mul_(2),
        lambda logits: logits[0].add_(1),
        lambda logits: logits.detach().zero_(),
    ],
    ids=["zero", "mul", "view", "detached"],
)
def test_logits_written_before_the_backward(write, inplace):
    """Whether they are still the logits or already hold the gradient."""
    leaf, logits = leaf_and_logits(3, 4)
    loss = cross_entropy(logits, TARGET, **inplace)
    with torch.no_grad():
        write(logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert leaf.grad is None


@both
@pytest.mark.parametrize("other", INPLACE)
def test_logits_overwritten_by_another_loss_before_the_backward(other, inplace):
    """The first has no gradient, and the second only if it read the logits themselves."""
    leaf, logits = leaf_and_logits(3, 4)
    loss = cross_entropy(logits, TARGET, **inplace)
    second = cross_entropy(logits, TARGET.flip(0), **other)
    if inplace is IN_FORWARD:
        with pytest.raises(RuntimeError, match="used again afterwards"):
            second.backward()
    else:
        second.backward()
    leaf.grad = None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert leaf.grad is None


@pytest.mark.parametrize("order", [1, -1])
def test_another_loss_of_the_same_logits(order):
    """Right if its backward runs before the logits are overwritten, refused otherwise."""

    def gradient(function: Callable[..., Tensor], **options: Any) -> Tensor:
        leaf, logits = leaf_and_logits(3, 4)
        makers = [lambda: function(logits, TARGET, **options), lambda: cross_entropy(logits, TARGET.flip(0))][::order]
        (makers[0]() + makers[1]()).backward()
        return leaf.grad

    if order == 1:  # the engine runs the last first
        assert_close(gradient(cross_entropy, **IN_BACKWARD), gradient(F.cross_entropy))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(cross_entropy, **IN_BACKWARD)


# ---- refused by the Function ---------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward(reduction, inplace):
    _, logits = leaf_and_logits(3, 4)
    loss = cross_entropy(logits, TARGET, reduction=reduction, **inplace).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match=r"written the gradient over the logits, so a second backward.*inplace=False"
    ):
        loss.backward()


@both
def test_create_graph(inplace):
    leaf, logits = leaf_and_logits(3, 4)
    loss = cross_entropy(logits, TARGET, **inplace)
    with pytest.raises(RuntimeError, match=r"inplace=True.*create_graph=True.*inplace=False"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@both
def test_batched_gradients(inplace):
    leaf, logits = leaf_and_logits(3, 4)
    loss = cross_entropy(logits, TARGET, reduction="none", **inplace)
    with pytest.raises(RuntimeError, match=r"inplace=True.*batched.*inplace=False"):
        torch.autograd.grad(loss, leaf, torch.eye(3, dtype=torch.float64), is_grads_batched=True)


@pytest.mark.parametrize("name", ["lse", "nll", "entropy"])
def test_statistics_after_the_logits_are_gone(name):
    """The precomputed gradient is the loss's alone."""
    _, logits = leaf_and_logits(3, 4)
    loss, stats = cross_entropy(logits, TARGET, return_stats=True, **IN_FORWARD)
    with pytest.raises(RuntimeError, match=r"written the gradient over the logits, so its statistics.*inplace=False"):
        (loss + getattr(stats, name).sum()).backward()


def test_statistics_while_the_logits_are_there():
    """Written in the backward, the gradient is that of the loss and the statistics together."""

    def gradient(**options: Any) -> Tensor:
        leaf, logits = leaf_and_logits(3, 4)
        loss, stats = cross_entropy(logits, TARGET, return_stats=True, **options)
        (loss + (stats.lse + 2 * stats.nll + 3 * stats.entropy).sum()).backward()
        return leaf.grad

    assert_close(gradient(**IN_BACKWARD), gradient())
    assert_close(gradient(precompute_grad=True), gradient())


# ---- right where it is allowed -------------------------------------------------------------------------------------


def gradient_of(
    function: Callable[..., Tensor],
    make: Callable[[Tensor], Tensor],
    leaf: Tensor,
    target: Tensor,
    upstream: float = 1.0,
    **options: Any,
) -> Tensor:
    leaf = leaf.detach().clone().requires_grad_()
    loss = function(make(leaf), target, **options)
    scale = torch.arange(1.0, 1 + loss.numel(), dtype=loss.dtype).view_as(loss) if loss.dim() else 1.0
    (loss * scale * upstream).sum().backward()
    return leaf.grad


LAYOUTS = {
    "rows": ((3, 40), lambda x: x * 2),
    "short rows": ((3, 4), lambda x: x * 2),
    "one row": ((4,), lambda x: x * 2),
    "columns": ((3, 4, 5), lambda x: x * 2),
    "transposed": ((3, 5, 4), lambda x: (x * 2).transpose(1, 2)),
    "transposed rows": ((2, 5, 40), lambda x: (x * 2).transpose(1, 2)),
    "slice": ((3, 9), lambda x: (x * 2)[:, 2:7]),
    "every other": ((3, 8), lambda x: (x * 2)[:, ::2]),
    "flipped order": ((4, 3), lambda x: (x * 2).T),
}


@strategies
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("shape", "make"), LAYOUTS.values(), ids=LAYOUTS)
def test_gradient_equals_torchs(shape, make, reduction, strategy):
    leaf = randn(*shape)
    logits = make(leaf)
    classes = logits.shape[0 if logits.dim() == 1 else 1]
    batch = logits.shape[:0] if logits.dim() == 1 else (logits.shape[0], *logits.shape[2:])
    target = randint(classes, batch, 1)
    if target.dim():
        target.view(-1)[1] = -100
    options = {"weight": randn(classes, seed=2).abs(), "label_smoothing": 0.1, "reduction": reduction}
    for upstream in (1.0, -0.3):
        ours = gradient_of(cross_entropy, make, leaf, target, upstream, **options, **strategy)
        theirs = gradient_of(F.cross_entropy, make, leaf, target, upstream, **options)
        assert_close(ours, theirs)


@strategies
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient_with_probabilities_equals_torchs(reduction, strategy):
    leaf, target = randn(3, 4), randn(3, 4, seed=1).softmax(1)
    for make in (lambda x: x * 2, lambda x: (x.view(4, 3) * 2).T):
        ours = gradient_of(cross_entropy, make, leaf, target, 0.7, reduction=reduction, **strategy)
        theirs = gradient_of(F.cross_entropy, make, leaf, target, 0.7, reduction=reduction)
        assert_close(ours, theirs)


@strategies
@pytest.mark.parametrize("target", [[-100, -100, -100], []], ids=["every row ignored", "no rows"])
def test_nothing_to_learn_from(target, strategy):
    target = torch.tensor(target, dtype=torch.int64)
    for classes in (4, 33):
        leaf = randn(len(target), classes)
        for reduction in ("mean", "sum", "none"):
            ours = gradient_of(cross_entropy, lambda x: x * 2, leaf, target, reduction=reduction, **strategy)
            theirs = gradient_of(F.cross_entropy, lambda x: x * 2, leaf, target, reduction=reduction)
            assert_close(ours, theirs, equal_nan=True)


@strategies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype, strategy):
    """The gradient is written in the logits' dtype, whatever the loss's."""
    leaf = randn(3, 40).to(dtype)
    target = torch.tensor([1, 39, 7])
    wide = gradient_of(F.cross_entropy, lambda x: x * 2, leaf.double(), target)
    ours = gradient_of(cross_entropy, lambda x: x * 2, leaf, target, dtype=torch.float32, **strategy)
    assert ours.dtype == dtype
    assert_close(ours, wide.to(dtype))


@both
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
@pytest.mark.parametrize("make", [lambda x: x * 2, lambda x: (x * 2).T], ids=["dense", "transposed"])
def test_gradient_lies_in_the_logits_storage(make, options, inplace):
    """No copy: the gradient that autograd hands on is the logits' own memory, and holds their gradient."""
    leaf = randn(4, 4).requires_grad_()
    logits = make(leaf)
    seen = []
    logits.register_hook(lambda g: seen.append((g.data_ptr(), g.stride(), g.detach().clone())))
    cross_entropy(logits, torch.tensor([0, 3, 2, 1]), **options, **inplace).sum().backward()
    ((pointer, stride, gradient),) = seen
    assert pointer == logits.data_ptr()
    assert stride == logits.stride()
    assert torch.equal(logits, gradient)
    other = make(leaf.detach()).requires_grad_()
    F.cross_entropy(other, torch.tensor([0, 3, 2, 1]), **options).sum().backward()
    assert_close(gradient, other.grad)


@both
def test_version_counter(inplace):
    """It goes up when the logits are overwritten, not before."""
    _, logits = leaf_and_logits(3, 4)
    before, version = logits.detach().clone(), logits._version
    loss = cross_entropy(logits, TARGET, **inplace)
    overwritten = "precompute_grad" in inplace
    assert (logits._version > version) == overwritten
    assert torch.equal(logits, before) == (not overwritten)
    loss.backward()
    assert logits._version > version
    assert not torch.equal(logits, before)


@both
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_the_logits_stay(mode, inplace):
    _, logits = leaf_and_logits(3, 4)
    before, version = logits.detach().clone(), logits._version
    with mode():
        loss = cross_entropy(logits, TARGET, **inplace)
    assert torch.equal(logits, before)
    assert logits._version == version
    assert_close(loss.clone(), F.cross_entropy(before, TARGET))


@both
def test_logits_without_grad_stay(inplace):
    """A leaf that requires none is allowed, and has no gradient to be written over it."""
    logits = randn(3, 4)
    before = logits.clone()
    cross_entropy(logits, TARGET, **inplace)
    assert torch.equal(logits, before)
    assert logits._version == 0


@both
def test_transforms_leave_the_logits(inplace):
    """Under torch.func both strategies are plain."""
    x = randn(3, 4)
    before = x.clone()
    ours = torch.func.grad(lambda x: cross_entropy(x * 1, TARGET, **inplace))(x)
    assert_close(ours, torch.func.grad(lambda x: F.cross_entropy(x, TARGET))(x))
    assert torch.equal(x, before)
    assert x._version == 0


@strategies
def test_two_consumers_that_do_not_need_the_logits(strategy):
    """The gradients of both arrive, in either order, and the sum is not taken in the logits' storage by mistake."""
    for order in (1, -1):

        def gradient(function: Callable[..., Tensor], order: int = order, **options: Any) -> tuple[Tensor, Tensor]:
            leaf, logits = leaf_and_logits(3, 4)
            logits.retain_grad()
            weights = randn(3, 4, seed=3)
            losses = [lambda: (logits * weights).sum(), lambda: function(logits, TARGET, **options)][::order]
            (losses[0]() + losses[1]()).backward()
            return leaf.grad, logits.grad

        if strategy is IN_FORWARD and order == -1:
            continue  # the other consumer would read the overwritten values: as after any in-place operation
        for ours, theirs in zip(gradient(cross_entropy, **strategy), gradient(F.cross_entropy), strict=True):
            assert_close(ours, theirs)


@strategies
@pytest.mark.parametrize("cut", [lambda x: x.split(3), lambda x: (x[:3], x[3:])], ids=["split", "slices"])
def test_losses_of_disjoint_slices(cut, strategy):
    """As in chunked training. Slices share a version counter: right, or refused by autograd."""

    def gradient(function: Callable[..., Tensor], **options: Any) -> Tensor:
        leaf, logits = leaf_and_logits(6, 4)
        sum(function(chunk, TARGET, **options) for chunk in cut(logits)).backward()
        return leaf.grad

    try:
        ours = gradient(cross_entropy, **strategy)
    except RuntimeError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert_close(ours, gradient(F.cross_entropy))
    if refusal:
        assert "inplace" in strategy
        assert "modified in" in refusal or "modified by an inplace operation" in refusal


@strategies
def test_logits_as_their_own_target(strategy):
    """Target and logits in the same memory: right, or refused."""
    leaf, logits = leaf_and_logits(3, 4)
    try:
        cross_entropy(logits, logits.detach(), **strategy).backward()
    except (RuntimeError, ValueError):
        return
    other, theirs = leaf_and_logits(3, 4)
    F.cross_entropy(theirs, theirs.detach()).backward()
    assert_close(leaf.grad, other.grad)


@both
def test_linear_layer_trains_through_it(inplace):
    """The usual graph: a linear layer does not need its own result."""

    def gradients(function: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 4, dtype=torch.float64)
        function(layer(randn(3, 5)), TARGET, **options).backward()
        return [p.grad for p in layer.parameters()]

    for ours, theirs in zip(gradients(cross_entropy, **inplace), gradients(F.cross_entropy), strict=True):
        assert_close(ours, theirs)


# ---- precompute_grad alone: the caller sees nothing of it ----------------------------------------------------------


def test_precomputed_gradient_accumulates_as_torchs():
    """Autograd keeps the first gradient as the leaf's .grad and adds to it: the buffer must not be handed out twice."""

    def gradients(function: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        x = randn(3, 4).requires_grad_()
        loss = function(x, TARGET, **options)
        seen = []
        for upstream in (1.0, 1.0, -0.3):
            loss.backward(torch.tensor(upstream).double(), retain_graph=True)
            seen.append(x.grad.clone())
        return seen

    for ours, theirs in zip(gradients(cross_entropy, precompute_grad=True), gradients(F.cross_entropy), strict=True):
        assert_close(ours, theirs)


def test_precomputed_gradient_leaves_the_logits():
    x = randn(3, 4).requires_grad_()
    before = x.detach().clone()
    cross_entropy(x, TARGET, precompute_grad=True).backward()
    assert torch.equal(x, before)
    assert x._version == 0
    assert x.grad.data_ptr() != x.data_ptr()


def test_precomputed_gradient_is_of_the_forwards_logits():
    """Logits that change between forward and backward: the old ones count, or autograd refuses."""
    leaf, logits = leaf_and_logits(3, 4)
    loss = cross_entropy(logits, TARGET, precompute_grad=True)
    expected = torch.autograd.grad(F.cross_entropy(leaf * 2, TARGET), leaf)[0]
    logits.detach().zero_()
    loss.backward(retain_graph=True)
    assert_close(leaf.grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # now it would have to be computed again


def test_precomputed_gradient_is_let_go():
    """Once used, and also where a statistic makes it useless: it is as large as the logits."""
    for statistics in (False, True):
        x = randn(3, 4).requires_grad_()
        loss, stats = cross_entropy(x, TARGET, precompute_grad=True, return_stats=True)
        assert loss.grad_fn.early.gradient
        (loss + stats.lse.sum() if statistics else loss).backward()
        assert not loss.grad_fn.early.gradient


# On a card an operator may have queued the kernel that writes, and failed to queue another. It checks classes before.
MAY_HAVE_WRITTEN = {RuntimeError: True, MemoryError: True, IndexError: False}


@pytest.mark.parametrize("on_a_card", [False, True])
@pytest.mark.parametrize("precompute_grad", [True, False])
@pytest.mark.parametrize("error", [*MAY_HAVE_WRITTEN, KeyboardInterrupt])
def test_failure_or_interruption(monkeypatch, error, precompute_grad, on_a_card):
    """On the CPU an operator raises before it writes (stress/test_no_memory.py); Ctrl-C has waited for it to end."""
    leaf = randn(3, 4).requires_grad_()
    x = leaf * 1
    if on_a_card and not x.is_cuda:
        rule = functions._may_have_written
        monkeypatch.setattr(functions, "_may_have_written", lambda error, x: rule(error, SimpleNamespace(is_cuda=True)))
    elif x.is_cuda and not on_a_card:
        pytest.skip("the CPU's")
    written = MAY_HAVE_WRITTEN.get(error, True) if on_a_card else error is KeyboardInterrupt

    def fails(*arguments: Any, **further: Any) -> None:
        raise error

    needs_x = x.square().sum()
    monkeypatch.setattr(ops, "cross_entropy_", fails)
    monkeypatch.setattr(ops, "cross_entropy_backward_", fails)
    with pytest.raises(error):
        cross_entropy(x, TARGET, inplace=True, precompute_grad=precompute_grad).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation") if written else contextlib.nullcontext():
        needs_x.backward()
    assert (x._version > 0) == written


def test_precomputed_gradients_batched():
    x = randn(3, 4).requires_grad_()
    eye = torch.eye(3, dtype=torch.float64)
    loss = cross_entropy(x, TARGET, reduction="none", precompute_grad=True)
    (ours,) = torch.autograd.grad(loss, x, eye, is_grads_batched=True)
    (theirs,) = torch.autograd.grad(F.cross_entropy(x, TARGET, reduction="none"), x, eye, is_grads_batched=True)
    assert_close(ours, theirs)


def test_precomputed_upstream_gradient_is_untouched():
    x = randn(3, 4).requires_grad_()
    upstream = randn(3, seed=4)
    before = upstream.clone()
    cross_entropy(x, TARGET, reduction="none", precompute_grad=True).backward(upstream)
    assert torch.equal(upstream, before)


# ---- a use of the logits after they were overwritten ---------------------------------------------------------------

AFTERWARDS = {
    "F.cross_entropy": lambda z: F.cross_entropy(z, TARGET),
    "cross_entropy": lambda z: cross_entropy(z, TARGET),
    "sum": lambda z: z.sum(),
    "mul": lambda z: (z * 2).sum(),
    "softmax": lambda z: z.softmax(1)[:, 0].sum(),
    "in place": lambda z: z.mul_(3.0).sum(),
    "view": lambda z: z.reshape(-1)[1:5].square().sum(),
}
VIEWS = {
    "itself": (lambda base: base, lambda base, logits: logits),
    "a view": (lambda base: base[:], lambda base, logits: logits),
    "another view": (lambda base: base.view(12).view(3, 4), lambda base, logits: base.view(4, 3).T.reshape(3, 4)),
    "its base": (lambda base: base.view(3, 4), lambda base, logits: base),
    "one of several views": (lambda base: base.chunk(1)[0], lambda base, logits: base),
}


def overwritten(inplace: dict[str, bool], view: str) -> tuple[Tensor, Tensor]:
    """The leaf, and what is used again of logits that hold their gradient."""
    make, again = VIEWS[view]
    leaf, base = leaf_and_logits(3, 4)
    logits = make(base)
    loss = cross_entropy(logits, TARGET, **inplace)
    if inplace is IN_BACKWARD:
        loss.backward(retain_graph=True)
    return leaf, again(base, logits)


@both
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("use", AFTERWARDS)
def test_a_differentiable_use_afterwards_is_refused(use, view, inplace):
    _, again = overwritten(inplace, view)
    with pytest.raises(RuntimeError, match=r"cross_entropy: inplace=True has written.*used again.*return_stats=True"):
        AFTERWARDS[use](again).backward()


@both
def test_one_of_several_views_is_refused_afterwards(inplace):
    _, base = leaf_and_logits(3, 4)
    logits = base.chunk(1)[0]
    loss = cross_entropy(logits, TARGET, **inplace)
    if inplace is IN_BACKWARD:
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="view"):  # torch's own sentence
        logits.sum().backward()


@both
def test_both_losses_in_one_backward_are_refused(inplace):
    """The example in which the second loss and its gradient were wrong in silence."""
    _, logits = leaf_and_logits(3, 4)
    first = cross_entropy(logits, TARGET, **inplace)
    if inplace is IN_BACKWARD:
        first.backward(retain_graph=True)
        first = torch.zeros(())
    with pytest.raises(RuntimeError, match="used again afterwards"):
        (first + F.cross_entropy(logits, TARGET)).backward()


@both
def test_other_parts_of_the_base_may_be_used_afterwards(inplace):
    """The heads of a model that come from one product."""
    leaf = randn(3, 7).requires_grad_()

    def gradient(function: Callable[..., Tensor], **options: bool) -> Tensor:
        both = leaf * 2
        loss = function(both[:, :4], TARGET, **options)
        return torch.autograd.grad(loss + both[:, 4:].square().sum(), leaf)[0]

    assert_close(gradient(cross_entropy, **inplace), gradient(F.cross_entropy))


@both
def test_a_use_without_gradient_cannot_be_noticed(inplace):
    _, again = overwritten(inplace, "itself")
    with torch.no_grad():
        assert again.sum().abs() < 1e-12  # a gradient
    assert again.detach().argmax(1).shape == (3,)


@both
@pytest.mark.parametrize("retained", [False, True])
def test_logits_are_freed_after_the_backward(retained, inplace):
    """What refuses later uses must not keep the logits."""
    _, logits = leaf_and_logits(3, 4)
    if retained:
        logits.retain_grad()
    alive = weakref.ref(logits)
    loss = cross_entropy(logits, TARGET, **inplace)
    loss.backward()
    del logits
    assert alive() is None


@both
def test_the_gradient_of_the_logits_by_the_edge_taken_before(inplace):
    _, logits = leaf_and_logits(3, 4)
    expected = torch.autograd.grad(F.cross_entropy(logits, TARGET), logits)[0]
    edge = torch.autograd.graph.get_gradient_edge(logits)
    assert_close(torch.autograd.grad(cross_entropy(logits, TARGET, **inplace), edge)[0], expected)


@both
def test_a_later_use_is_refused_even_where_its_gradient_is_zero(inplace):
    """Its value would be that of the gradient."""
    _, again = overwritten(inplace, "itself")
    with pytest.raises(RuntimeError, match="used again afterwards"):
        torch.relu(again - 100).sum().backward()


@both
@pytest.mark.parametrize("view", ["itself", "a view"])
def test_a_batched_gradient_afterwards_is_refused(view, inplace):
    leaf, again = overwritten(inplace, view)
    sums = again.sum(1)
    with pytest.raises(RuntimeError, match="used again afterwards"):
        torch.autograd.grad(sums, leaf, torch.eye(3, dtype=torch.float64), is_grads_batched=True)


@both
def test_the_argument_of_a_transform_may_be_the_logits(inplace):
    """inplace is ignored there, so a leaf is no obstacle."""
    x = randn(3, 4)
    ours = torch.func.grad(lambda x: cross_entropy(x, TARGET, **inplace))(x)
    assert_close(ours, torch.func.grad(lambda x: F.cross_entropy(x, TARGET))(x))
