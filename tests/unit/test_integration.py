"""With the rest of torch: autocast, checkpointing, hooks, training loops, threads, copying and saving."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from seeded import randn
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import softmax_ext
from softmax_ext import CrossEntropyLoss, cross_entropy

STRATEGIES = [{}, {"precompute_grad": True}, {"inplace": True}, {"inplace": True, "precompute_grad": True}]
strategies = pytest.mark.parametrize("strategy", STRATEGIES, ids=str)


X = randn(3, 4)
Y = torch.tensor([0, 3, 2])
Q = randn(3, 4, seed=1).softmax(1)
WEIGHT = randn(4, seed=2).abs() + 0.5
DEVICE = X.device.type


# ---- autocast ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", [Y, Q, Q.float(), Q.bfloat16()], ids=["classes", "float64", "float32", "bfloat16"])
def test_dtypes_under_autocast(target, dtype, autocast_dtype):
    """The loss and the probabilities have the dtypes that torch's have, inside autocast and outside."""
    x = X.to(dtype)
    for enabled in (True, False):
        with torch.autocast(DEVICE, autocast_dtype, enabled=enabled):
            assert cross_entropy(x, target).dtype == F.cross_entropy(x, target).dtype
            assert softmax_ext.softmax(x, 1).dtype == F.softmax(x, 1).dtype
            assert softmax_ext.log_softmax(x, 1).dtype == F.log_softmax(x, 1).dtype


@strategies
def test_training_step_under_autocast(strategy):
    """A linear layer in bfloat16, the loss in float32, the gradients in float32."""

    def step(function: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(5, 40)
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = layer(randn(6, 5, dtype=torch.float32))
            assert logits.dtype == torch.bfloat16
            loss = function(logits, torch.arange(6), **options)
        assert loss.dtype == torch.float32
        loss.backward()
        return [loss.detach(), *(p.grad for p in layer.parameters())]

    for ours, theirs in zip(step(cross_entropy, **strategy), step(F.cross_entropy), strict=True):
        assert ours.dtype == theirs.dtype
        finest = torch.finfo(torch.bfloat16)
        assert_close(ours, theirs, rtol=finest.eps, atol=finest.eps * theirs.abs().max().item())


def test_own_dtype_wins_over_autocast():
    with torch.autocast(DEVICE, torch.bfloat16):
        assert cross_entropy(X.bfloat16(), Y, dtype=torch.bfloat16).dtype == torch.bfloat16


# ---- checkpointing -------------------------------------------------------------------------------------------------


@strategies
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, strategy):
    """The forward runs again in the backward, under its own grad mode."""

    def gradient(function: Callable[..., Tensor], again: bool, **options: Any) -> tuple[Tensor, Tensor]:
        layer = nn.Linear(5, 4, dtype=torch.float64)
        nn.init.constant_(layer.weight, 0.3)
        nn.init.constant_(layer.bias, 0.1)
        x = randn(3, 5).requires_grad_()

        def body(x: Tensor) -> Tensor:
            return function(layer(x), Y, **options)

        loss = checkpoint(body, x, use_reentrant=use_reentrant) if again else body(x)
        (2 * loss).backward()
        return x.grad, layer.weight.grad

    for ours, theirs in zip(gradient(cross_entropy, True, **strategy), gradient(F.cross_entropy, False), strict=True):
        assert_close(ours, theirs)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda x: cross_entropy(x, Y),
    "precomputed": lambda x: cross_entropy(x, Y, precompute_grad=True),
    "probabilities": lambda x: cross_entropy(x, x.softmax(1)),
    "linear": lambda x: softmax_ext.linear_cross_entropy(x, Q.repeat(2, 1), Y),
    "softmax": lambda x: softmax_ext.softmax(x, 1).square().sum(),
    "log_softmax": lambda x: softmax_ext.log_softmax(x, 1).square().sum(),
}


@pytest.mark.parametrize("function", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("batched", [False, True], ids=["penalty inside", "batched outside"])
def test_second_derivative_of_a_checkpoint(batched, function):
    """A checkpoint hands each saved tensor to one reader alone, whichever the way of the gradient."""

    def penalised(x: Tensor) -> Tensor:
        loss = function(x)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + gradient.square().sum()

    def second(checkpointed: bool) -> Tensor:
        x = X.clone().requires_grad_()
        body = function if batched else penalised
        result = checkpoint(body, x, use_reentrant=False) if checkpointed else body(x)
        if batched:
            upstream = torch.ones(2, dtype=result.dtype)
            (gradient,) = torch.autograd.grad(result, x, upstream, is_grads_batched=True, create_graph=True)
            result = gradient.pow(3).sum()
        return torch.autograd.grad(result, x)[0]

    assert_close(second(True), second(False))


@strategies
@pytest.mark.parametrize("kept", ["checkpoint", "save_on_cpu"])
def test_logits_that_their_own_backward_needs(kept, strategy):
    """Hooks hold saved tensors by no version: overwritten logits would be handed to exp's backward in silence."""

    def body(x: Tensor) -> Tensor:
        return cross_entropy(x.exp(), Y, **strategy)

    x = X.clone().requires_grad_()
    if kept == "checkpoint":
        loss = checkpoint(body, x, use_reentrant=False)
    else:
        with torch.autograd.graph.save_on_cpu():
            loss = body(x)
    (2 * loss).backward()
    other = X.clone().requires_grad_()
    (2 * F.cross_entropy(other.exp(), Y)).backward()
    assert_close(x.grad, other.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_with_statistics_and_softmax(use_reentrant):
    def body(x: Tensor) -> Tensor:
        loss, stats = cross_entropy(x, Y, return_stats=True)
        return loss + stats.entropy.sum() + softmax_ext.softmax(x, 1)[:, 0].square().sum()

    gradients = []
    for run in (body, lambda x: checkpoint(body, x, use_reentrant=use_reentrant)):
        x = X.clone().requires_grad_()
        run(x).backward()
        gradients.append(x.grad)
    assert_close(*gradients)


def test_saved_tensor_hooks():
    """What is kept for the backward can be moved away and back, as offloading does."""
    packed = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cross_entropy(x, Y, WEIGHT)
    assert packed
    assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(F.cross_entropy(x, Y, WEIGHT), x)[0])


def test_little_is_kept_for_the_backward():
    """The logits, the target, and a few numbers for each row: no second tensor of the logits' size."""
    packed = []
    x = randn(8, 100).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        cross_entropy(x, torch.arange(8))
    large = [t for t in packed if t.numel() >= x.numel()]
    assert len(large) == 1
    assert large[0].data_ptr() == x.data_ptr()


# ---- hooks ---------------------------------------------------------------------------------------------------------


@strategies
def test_tensor_hooks(strategy):
    """Hooks on the logits and on the loss see torch's gradients, and may change them."""

    def gradients(function: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        seen = []
        leaf = X.clone().requires_grad_()
        logits = leaf * 1
        logits.register_hook(lambda g: (seen.append(g.clone()), g * 2)[1])
        loss = function(logits, Y, **options)
        loss.register_hook(lambda g: (seen.append(g.clone()), g * 3)[1])
        leaf.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone()))
        loss.backward()
        return seen

    ours, theirs = gradients(cross_entropy, **strategy), gradients(F.cross_entropy)
    assert len(ours) == 3
    assert_close(ours, theirs)


@strategies
def test_module_hooks(strategy):
    def calls(module: nn.Module) -> list[Any]:
        seen: list[Any] = []
        module.register_forward_pre_hook(lambda m, args: seen.append(("before", args[0].detach().clone())))
        module.register_forward_hook(lambda m, args, result: seen.append(("after", result.detach().clone())))
        module.register_full_backward_pre_hook(lambda m, g: seen.append(("upstream", g[0].clone())))
        # With a full backward hook torch hands the module a view, which in-place operations may not write.
        module(X.clone().requires_grad_() * 1, Y).backward()
        return seen

    ours, theirs = calls(CrossEntropyLoss(**strategy)), calls(nn.CrossEntropyLoss())
    assert [name for name, _ in ours] == ["before", "after", "upstream"]
    assert_close([t for _, t in ours], [t for _, t in theirs])


@pytest.mark.parametrize("precompute_grad", [False, True])
def test_full_backward_hook(precompute_grad):
    def gradient(module: nn.Module) -> Tensor:
        seen = []
        module.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_in[0].clone()))
        module(X.clone().requires_grad_(), Y).backward()
        return seen[0]

    assert_close(gradient(CrossEntropyLoss(precompute_grad=precompute_grad)), gradient(nn.CrossEntropyLoss()))


# ---- training ------------------------------------------------------------------------------------------------------


def train(loss_function: Callable[..., Tensor], accumulate: int = 1, probabilities: bool = False) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for step in range(20):
        for part in range(accumulate):
            x = randn(7, 6, seed=100 * step + part)
            y = x[:, :5].softmax(1) if probabilities else x[:, :5].argmax(1)
            loss = loss_function(model(x), y) / accumulate
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), [p.detach() for p in model.parameters()]


@strategies
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("probabilities", [False, True])
def test_training_equals_torchs(probabilities, accumulate, strategy):
    """Twenty steps of Adam, with gradients accumulated over micro-batches or not: the same curve, the same model."""
    options = {"label_smoothing": 0.1}
    ours = train(CrossEntropyLoss(**options, **strategy), accumulate, probabilities)
    theirs = train(nn.CrossEntropyLoss(**options), accumulate, probabilities)
    assert_close(ours, theirs)
    assert ours[0][-1] < ours[0][0]


@strategies
def test_accumulation_with_a_sum(strategy):
    """The sum divided by the number of all tokens is the mean of the whole batch, whatever its parts."""
    x, y = randn(12, 4), torch.arange(12) % 4
    y[[1, 2, 3, 7]] = -100
    leaf = x.clone().requires_grad_()
    tokens = (y != -100).sum()
    for rows in (slice(0, 4), slice(4, 5), slice(5, 12)):
        (cross_entropy(leaf[rows] * 1, y[rows], reduction="sum", **strategy) / tokens).backward()
    whole = x.clone().requires_grad_()
    F.cross_entropy(whole, y).backward()
    assert_close(leaf.grad, whole.grad)


# ---- threads -------------------------------------------------------------------------------------------------------


def test_threads_at_once():
    """Four Python threads, forward and backward: each gets the bits that it gets alone."""
    problems = [(randn(300, 100, seed=i), torch.arange(300) % 100) for i in range(4)]

    def solve(i: int) -> list[Tensor]:
        x, y = problems[i]
        x = x.clone().requires_grad_()
        loss, stats = cross_entropy(x, y, label_smoothing=0.1, return_stats=True)
        (loss + stats.entropy.mean() + softmax_ext.softmax(x, 1).square().sum()).backward()
        return [loss.detach(), stats.lse.detach(), x.grad]

    serial = [solve(i) for i in range(4)]
    results: list[Any] = [None] * 4
    start = threading.Barrier(4)

    def run(i: int) -> None:
        start.wait()
        for _ in range(20):
            results[i] = solve(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, expected in zip(results, serial, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_exception_in_a_thread():
    """A bad class in one thread raises there, and only there."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            cross_entropy(X, Y + 9)
        except IndexError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "got 9 at position [0]" in str(caught[0])
    assert_close(cross_entropy(X, Y), F.cross_entropy(X, Y))


# ---- copies and saving ---------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "weight": WEIGHT,
    "ignore_index": 3,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "softcap": 5.0,
    "logit_scale": 0.5,
    "dtype": torch.float64,
    "return_stats": True,
}


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved],
    ids=["copy", "deepcopy", "pickle", "save"],
)
@pytest.mark.parametrize(
    "module",
    [CrossEntropyLoss(**OPTIONS), softmax_ext.Softmax(1), softmax_ext.LogSoftmax(0)],
    ids=lambda m: type(m).__name__,
)
def test_copies_compute_the_same(module, copied):
    other = copied(module)
    arguments = (X, Y) if isinstance(module, CrossEntropyLoss) else (X,)
    expected, actual = (torch.utils._pytree.tree_leaves(m(*arguments)) for m in (module, other))
    assert len(expected) == len(actual)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_deepcopy_has_a_weight_of_its_own():
    module = CrossEntropyLoss(WEIGHT.clone())
    other = copy.deepcopy(module)
    other.weight.zero_()
    assert module.weight.abs().sum() > 0


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["no weight", "weight"])
def test_state_dict_to_torch_and_back(weight):
    """A checkpoint of torch's module loads into ours and the other way round, strictly."""
    fresh = None if weight is None else torch.ones(4, dtype=torch.float64)
    ours, theirs = CrossEntropyLoss(fresh), nn.CrossEntropyLoss(weight)
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours(X, Y), theirs(X, Y))
    back = nn.CrossEntropyLoss(fresh)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    back.load_state_dict(torch.load(file))
    assert_close(back(X, Y), theirs(X, Y))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_statistics_can_be_sent():
    """Through pickle (a worker's queue), deepcopy and pytree."""
    _, stats = cross_entropy(X, Y, return_stats=True)
    for other in (pickle.loads(pickle.dumps(stats)), copy.deepcopy(stats)):
        assert type(other) is softmax_ext.CrossEntropyStats
        assert_close(tuple(other), tuple(stats))
    halved = torch.utils._pytree.tree_map(lambda t: t / 2, stats)
    assert type(halved) is softmax_ext.CrossEntropyStats
