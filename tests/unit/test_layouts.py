"""The input is read where it lies: any strides give the values of the contiguous copy, and no memory beside it changes.

The bits may differ between layouts (rows in SIMD lanes or classes in them), so results are judged against float64 as
everywhere; strides within one layout change no bit at all.
"""

import itertools

import layouts
import oracle
import pytest
import torch
from torch import Tensor

from softmax_ext import cross_entropy, log_softmax, softmax


def transpose_1_2(shape):
    """[N, C, T] of a model's [N, T, C]."""
    n, c, *rest = shape
    return torch.randn(n, *rest, c).movedim(-1, 1)


def channels_last(shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def channels_last_3d(shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)


def every_second_class(shape):
    n, c, *rest = shape
    return torch.randn(n, 2 * c, *rest)[:, ::2]


def every_third_row(shape):
    return torch.randn(3 * shape[0], *shape[1:])[1::3]


def odd_row_stride(shape):
    """Rows of which no two are aligned alike."""
    n, c, *rest = shape
    return torch.randn(n, c + 1, *rest)[:, :c]


def unaligned(shape):
    """Contiguous, but starting one element after an aligned address."""
    count = torch.Size(shape).numel()
    return torch.randn(count + 1)[1:].view(shape)


def classes_outermost(shape):
    n, c, *rest = shape
    return torch.randn(c, n, *rest).movedim(0, 1)


def reversed_dims(shape):
    return torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))


def rotated(shape):
    """The last dimension outermost."""
    return torch.randn(shape[-1], *shape[:-1]).movedim(0, -1)


def diagonal(shape):
    """Row and position advance together in memory: strides that no reshape gives."""
    n, c, *rest = shape
    return torch.randn(n, n, c, *rest).diagonal(dim1=0, dim2=1).movedim(-1, 0)


MATRIX = [every_second_class, every_third_row, odd_row_stride, unaligned, classes_outermost, reversed_dims, diagonal]
IMAGE = [*MATRIX, transpose_1_2, rotated]
CASES = [
    *itertools.product(MATRIX, [(6, 3), (131, 3), (3, 17), (5, 40), (2, 5000)]),
    *itertools.product(IMAGE, [(2, 5, 7), (2, 40, 3), (3, 4, 130), (2, 3, 4, 5), (2, 33, 2, 3), (2, 3, 2, 3, 2)]),
    *itertools.product([channels_last], [(2, 3, 4, 5), (2, 40, 3, 5)]),
    *itertools.product([channels_last_3d], [(2, 3, 2, 3, 2), (2, 40, 2, 1, 3)]),
]


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Converted without a change of strides or alignment: into a copy of the whole memory behind the view."""
    storage = torch.empty(0).set_(x.untyped_storage())
    return storage.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())


def result_and_grads(x: Tensor, target: Tensor, **options) -> tuple[Tensor, Tensor, Tensor | None]:
    x = x.detach().requires_grad_()
    target = target.detach().requires_grad_(target.is_floating_point() and not options.get("precompute_grad", False))
    loss = cross_entropy(x, target, **options)
    loss.backward(torch.ones_like(loss))
    return loss.detach(), x.grad, target.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layout", "shape"), CASES, ids=lambda v: v.__name__ if callable(v) else str(v))
def test_cross_entropy_of_any_strides(layout, shape, dtype, device):
    x = in_dtype(layout(shape), dtype).to(device)
    assert x.shape == shape
    for kind in ("int64", "probabilities"):
        target = oracle.make_target(kind, shape, dtype)
        # A target of probabilities has strides of its own.
        targets = [target, layouts.reversed_dims(target)] if kind == "probabilities" else [target, spread(target)]
        for reduction in ("none", "mean"):
            exact = oracle.cross_entropy(x, target, reduction=reduction)
            scale = oracle.gradient_scale(exact.grad, target, None, reduction=reduction)
            for y, precompute in itertools.product(targets, [False, True]):
                what = (kind, reduction, precompute)
                loss, grad, grad_target = result_and_grads(
                    x, y.to(device), reduction=reduction, precompute_grad=precompute
                )
                oracle.assert_within(loss, exact.loss, oracle.tolerance("loss", exact.loss, dtype), what)
                oracle.assert_within(grad, exact.grad, oracle.tolerance("grad", exact.grad, dtype, scale=scale), what)
                if grad_target is not None:
                    right = exact.grad_target
                    allowed = oracle.tolerance("grad_target", right, dtype, scale=oracle.largest(right, 1))
                    oracle.assert_within(grad_target, right, allowed, what)


def spread(target: Tensor) -> Tensor:
    """With a stride of 2 between neighbours."""
    wide = target.new_full((*target.shape, 2), -7)
    wide[..., 0] = target
    return wide[..., 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layout", "shape"), CASES, ids=lambda v: v.__name__ if callable(v) else str(v))
def test_inplace_writes_its_own_elements_and_no_others(layout, shape, dtype, device):
    x = in_dtype(layout(shape), dtype).to(device)
    target = oracle.make_target("int64", shape, dtype).to(device)
    exact = oracle.cross_entropy(x, target)
    scale = oracle.gradient_scale(exact.grad, target, None)
    for precompute in (False, True):
        # The whole memory behind the view, of which `logits` is a part.
        memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).clone()
        before = memory.clone()
        logits = oracle.as_computed(memory.as_strided(x.shape, x.stride(), x.storage_offset()))
        edge = torch.autograd.graph.get_gradient_edge(logits)
        loss = cross_entropy(logits, target, precompute_grad=precompute, inplace=True)
        (grad,) = torch.autograd.grad(loss, edge)
        assert (grad.data_ptr(), grad.stride()) == (logits.data_ptr(), logits.stride())
        oracle.assert_within(grad, exact.grad, oracle.tolerance("grad", exact.grad, dtype, scale=scale), precompute)
        outside = torch.ones_like(memory, dtype=torch.bool)
        outside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
        assert torch.equal(memory[outside], before[outside])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layout", "shape"), CASES, ids=lambda v: v.__name__ if callable(v) else str(v))
def test_softmax_of_any_strides(layout, shape, dtype, log, device):
    x = in_dtype(layout(shape), dtype).to(device)
    for dim in range(len(shape)):
        upstream = torch.randn(shape).to(dtype)
        # A gradient comes with the strides of what follows, not with those of the output.
        for g in (upstream, layouts.reversed_dims(upstream), upstream[:1].expand(shape)):
            exact, exact_grad = oracle.softmax(x, dim, log, g)
            leaf = x.detach().requires_grad_()
            y = (log_softmax if log else softmax)(leaf, dim)
            y.backward(g.to(device))
            oracle.assert_within(y, exact, oracle.softmax_tolerance(exact, dim, log, dtype), dim)
            allowed = oracle.softmax_grad_tolerance(exact, exact_grad, g, dim, log, dtype)
            oracle.assert_within(leaf.grad, exact_grad, allowed, dim)


@pytest.mark.devices("cpu")  # a GPU cuts a row where 16 bytes begin, and its sums with it
@pytest.mark.parametrize("layout", [every_third_row, odd_row_stride, unaligned])
@pytest.mark.parametrize("shape", [(131, 3), (6, 17), (5, 40), (2, 5000)], ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_where_a_row_lies_changes_no_bit(layout, shape, dtype, device):
    x = in_dtype(layout(shape), dtype).to(device)
    for kind in ("int64", "probabilities"):
        target = oracle.make_target(kind, shape, dtype).to(device)
        for a, b in zip(result_and_grads(x, target), result_and_grads(x.contiguous(), target), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert torch.equal(softmax(x, 1), softmax(x.contiguous(), 1))


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("shape", [(131, 3), (5, 40), (3, 40, 4), (3, 5, 4, 6)], ids=str)
def test_upstream_gradients_of_any_strides(shape, precompute, device):
    """Of the loss and of the statistics: what follows the loss decides how they lie."""
    x, target = torch.randn(shape, device=device), oracle.make_target("int64", shape, torch.float32).to(device)
    rows = torch.randn(target.shape, device=device)
    for lay in (layouts.reversed_dims, spread, lambda t: t[:1].expand(t.shape)):
        upstream = lay(rows)
        for name in ("loss", "lse", "nll", "entropy"):
            grads = []
            for g in (upstream, upstream.contiguous()):
                leaf = x.clone().requires_grad_()
                options = {"reduction": "none", "precompute_grad": precompute, "return_stats": True}
                loss, stats = cross_entropy(leaf, target, **options)
                result = loss if name == "loss" else getattr(stats, name)
                grads.append(torch.autograd.grad(result, leaf, g)[0])
            assert torch.equal(*grads), name


def test_gradient_has_the_strides_of_the_logits(device):
    """So that the operation before it finds its own layout again."""
    for layout, shape in [(transpose_1_2, (2, 40, 3)), (channels_last, (2, 3, 4, 5)), (classes_outermost, (6, 40))]:
        x = layout(shape).to(device).requires_grad_()
        target = oracle.make_target("int64", shape, torch.float32).to(device)
        (grad,) = torch.autograd.grad(cross_entropy(x, target), x)
        assert grad.stride() == x.stride()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("precompute", [False, True])
def test_many_dimensions_that_do_not_merge(precompute, inplace, device):
    """Of each the first two of three, so that none follows on another; in the tensor that surrounds them all is 7."""
    shape = (2, 5, *[2] * 9)
    target = oracle.make_target("int64", shape, torch.float32).to(device)
    memory = torch.full((3, 5, *[3] * 9), 7.0, device=device)
    view = memory[(slice(2), slice(None), *[slice(2)] * 9)]
    view.copy_(torch.randn(shape))
    exact = oracle.cross_entropy(view, target)
    scale = oracle.gradient_scale(exact.grad, target, None)
    oracle.assert_within(softmax(view, 1), view.cpu().double().softmax(1), torch.tensor(1e-6), "softmax")
    logits = oracle.as_computed(view) if inplace else view.detach().requires_grad_()
    version, edge = logits._version, torch.autograd.graph.get_gradient_edge(logits)
    loss = cross_entropy(logits, target, precompute_grad=precompute, inplace=inplace)
    (grad,) = torch.autograd.grad(loss, edge)
    oracle.assert_within(loss, exact.loss, oracle.tolerance("loss", exact.loss, torch.float32), "loss")
    oracle.assert_within(grad, exact.grad, oracle.tolerance("grad", exact.grad, torch.float32, scale=scale), "gradient")
    assert (memory == 7).sum() == memory.numel() - view.numel()
    if inplace:
        assert grad.data_ptr() == memory.data_ptr()
        assert logits._version > version


# ---- expanded --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("base_shape", "shape"),
    [
        ((1, 40), (5, 40)),
        ((40,), (5, 40)),
        ((1, 3), (131, 3)),
        ((5, 1), (5, 7)),
        ((1, 5, 1), (2, 5, 7)),
        ((2, 40, 1), (2, 40, 3)),
        ((1, 1), (4, 50)),
    ],
    ids=str,
)
def test_gradient_of_the_base_of_expanded_logits(base_shape, shape, dtype, device):
    """Several logits are one number in memory; its gradient is the sum of theirs."""
    base = torch.randn(base_shape).to(dtype).to(device).requires_grad_()
    for kind, precompute in itertools.product(["int64", "probabilities"], [False, True]):
        target = oracle.make_target(kind, shape, dtype).to(device)
        x = base.expand(shape)
        loss = cross_entropy(x, target, reduction="sum", precompute_grad=precompute)
        grad, base_grad = torch.autograd.grad(loss, [x, base])
        exact = oracle.cross_entropy(base.detach().expand(shape), target, reduction="sum")
        scale = oracle.gradient_scale(exact.grad, target, None, reduction="sum")
        allowed = oracle.tolerance("grad", exact.grad, dtype, scale=scale)
        oracle.assert_within(loss, exact.loss, oracle.tolerance("loss", exact.loss, dtype), (kind, precompute))
        oracle.assert_within(grad, exact.grad, allowed, (kind, precompute))
        # torch adds up the gradients of the logits, in their dtype.
        count = torch.Size(shape).numel()
        rounding = count * oracle.roundoff(dtype) * exact.grad.abs().sum_to_size(base_shape)
        exact_base = exact.grad.sum_to_size(base_shape)
        oracle.assert_within(base_grad, exact_base, allowed.sum_to_size(base_shape) + rounding, (kind, precompute))


def test_softmax_of_expanded_input(device):
    for base_shape, shape, dim in [
        ((1, 40), (5, 40), 1),
        ((5, 1), (5, 40), 1),
        ((1, 3), (131, 3), 1),
        ((4, 1), (4, 6), 0),
    ]:
        x = torch.randn(base_shape, device=device).expand(shape)
        exact = x.cpu().double().softmax(dim)
        allowed = oracle.softmax_tolerance(exact, dim, False, torch.float32)
        oracle.assert_within(softmax(x, dim), exact, allowed, shape)


# ---- unbatched -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 7, 40, 5000])
def test_unbatched(classes, dtype, device):
    """(C) with a target of shape () or (1), as in torch; the loss has no dimension."""
    x = torch.randn(classes).to(dtype).to(device)
    step = torch.randn(2 * classes).to(dtype).to(device)[::2]
    index = torch.tensor(classes - 1, device=device)
    # With one class, logits (1) and a target (1) have the same shape: that would be probabilities.
    targets = [index, index.reshape(1)] if classes > 1 else [index]
    for values, target, reduction in itertools.product([x, step], targets, ["none", "mean", "sum"]):
        exact = oracle.cross_entropy(values, index, reduction=reduction)
        scale = oracle.gradient_scale(exact.grad, index, None, reduction=reduction)
        loss, grad, _ = result_and_grads(values, target, reduction=reduction)
        assert loss.shape == ()
        oracle.assert_within(loss, exact.loss, oracle.tolerance("loss", exact.loss, dtype), reduction)
        oracle.assert_within(grad, exact.grad, oracle.tolerance("grad", exact.grad, dtype, scale=scale), reduction)
    _, stats = cross_entropy(x, index, return_stats=True)
    assert all(s.shape == () for s in stats)


def test_unbatched_and_ignored(device):
    x = torch.randn(7, device=device)
    target = torch.tensor(-100, device=device)
    loss, grad, _ = result_and_grads(x, target, reduction="sum")
    assert loss == 0
    assert torch.all(grad == 0)
    assert cross_entropy(x, target).isnan()
