"""What the CUDA kernels do besides what every device does: streams, graphs, 64-bit sizes, wrong classes, no waiting.

Most of it only a card can show (pytest --device cuda); what a wrong class does, the emulator shows too.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from torch import Tensor

import softmax_ext
from softmax_ext import cross_entropy

on_a_card = pytest.mark.devices("cuda")
cuda_kernels = pytest.mark.devices("cuda", "emulated")

# A shape for each kernel of csrc/cuda/choice.h, as a card with clusters takes them.
KERNELS = {
    "thread": (300, 10),
    "thread, classes apart": (4, 10, 33),
    "lanes": (4, 100, 33),
    "part of a warp": (50, 70),
    "warp": (50, 301),
    "block": (9, 5001),
    "cluster": (3, 128256),
    "stream": (2, 600001),
}
every_kernel = pytest.mark.parametrize("shape", KERNELS.values(), ids=KERNELS)

STRATEGIES: list[dict[str, bool]] = [
    {},
    {"precompute_grad": True},
    {"inplace": True},
    {"inplace": True, "precompute_grad": True},
]
strategies = pytest.mark.parametrize("strategy", STRATEGIES, ids=str)


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it: conftest.py has the targets checked, for which the host waits."""
    monkeypatch.delenv("SOFTMAX_EXT_CHECK_TARGETS", raising=False)


class Problem(NamedTuple):
    logits: Tensor
    target: Tensor


def problem(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Problem:
    logits = (3 * torch.randn(shape)).to(dtype)
    return Problem(logits.to(device), oracle.make_target("int64", shape, dtype).to(device))


def solve(of: Problem, strategy: dict[str, bool], **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient)"""
    leaf = of.logits.detach().requires_grad_()
    logits = leaf * 1  # no leaf, so that it may be overwritten
    loss = cross_entropy(logits, of.target, **options, **strategy)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    return loss.detach(), gradient


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """NaN where there is NaN; its bits do not count."""
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


# ---- wrong classes ---------------------------------------------------------------------------------------------------


@cuda_kernels
@pytest.mark.usefixtures("_unchecked")
@every_kernel
@strategies
def test_a_wrong_class_makes_its_own_row_nan(shape, strategy, device):
    """Nothing is read out of bounds, no other row changes, and the GPU goes on."""
    right = problem(shape, device)
    loss, gradient = solve(right, strategy, reduction="none")
    target = right.target.clone()
    wrong = torch.zeros_like(target, dtype=torch.bool)
    for position, value in zip((0, 1, -1), (shape[1], -1, 2**62), strict=True):
        target.view(-1)[position], wrong.view(-1)[position] = value, True
    nan = float("nan")
    expected = loss.masked_fill(wrong, nan), gradient.masked_fill(wrong.unsqueeze(1), nan)
    assert_same_bits(solve(Problem(right.logits, target), strategy, reduction="none"), expected)
    assert solve(Problem(right.logits, target), strategy)[0].isnan()  # the mean
    assert_same_bits(solve(right, strategy, reduction="none"), (loss, gradient))


@cuda_kernels
@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("classes", [10, 100])
def test_a_wrong_class_has_no_weight(classes, dtype, device):
    """The weights are not read out of bounds either, for the row's loss or for the mean's denominator."""
    logits, target = torch.randn(20, classes), torch.arange(20) % classes
    weight = oracle.make_weight(classes, torch.float32)
    target[7] = 200
    y = target.to(dtype).to(device)
    each = cross_entropy(logits.to(device), y, weight.to(device), reduction="none", label_smoothing=0.1)
    right = torch.arange(20) != 7
    exact = oracle.cross_entropy(logits[right], target[right], weight, reduction="none", label_smoothing=0.1).loss
    assert each[7].isnan()
    oracle.assert_within(each.cpu()[right], exact, oracle.tolerance("loss", exact, torch.float32), "the others")
    assert cross_entropy(logits.to(device), y, weight.to(device)).isnan()


@cuda_kernels
@strategies
@pytest.mark.parametrize("value", ["1", "true"])
def test_wrong_classes_are_named_on_demand(value, strategy, device, monkeypatch):
    """And a wrong one touches nothing: the logits are as good as before."""
    of = problem((50, 70), device)
    target = of.target.clone()
    target[[20, 30]] = torch.tensor([70, -5], device=device)
    monkeypatch.setenv("SOFTMAX_EXT_CHECK_TARGETS", value)
    logits = of.logits.clone().requires_grad_() * 1
    with pytest.raises(IndexError, match=r"got 70 at position \[20\]"):
        cross_entropy(logits, target, **strategy)
    assert torch.equal(logits, of.logits)
    for unset in ("", "0"):
        monkeypatch.setenv("SOFTMAX_EXT_CHECK_TARGETS", unset)
        assert solve(Problem(of.logits, target), strategy)[0].isnan()


# ---- every kernel, on a card -----------------------------------------------------------------------------------------


@on_a_card
@every_kernel
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_every_kernel(shape, dtype, device):
    """Against float64. Few and small: what compute-sanitizer runs (sanitize_gpu.py)."""
    of = problem(shape, device, dtype)
    exact = oracle.cross_entropy(*of)
    scale = oracle.gradient_scale(exact.grad, of.target, None)
    for strategy in STRATEGIES:
        loss, gradient = solve(of, strategy)
        roundings = oracle.gradient_roundings(dtype, strategy.get("precompute_grad", False))
        allowed = oracle.tolerance("grad", exact.grad, dtype, scale=scale, roundings=roundings)
        oracle.assert_within(loss, exact.loss, oracle.tolerance("loss", exact.loss, dtype), ("loss", strategy))
        oracle.assert_within(gradient, exact.grad, allowed, ("gradient", strategy))


@on_a_card
@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(shape, dtype, device):
    of = problem(shape, device, dtype)
    for strategy in STRATEGIES:
        for reduction in ("mean", "none"):
            first = solve(of, strategy, reduction=reduction)
            for _ in range(3):
                assert_same_bits(solve(of, strategy, reduction=reduction), first)


# ---- streams, graphs, devices ----------------------------------------------------------------------------------------


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def some_of_everything(of: Problem, strategy: dict[str, bool]) -> None:
    weight = torch.ones(of.logits.shape[1], device=of.logits.device)
    for reduction in ("mean", "sum", "none"):
        solve(of, strategy, reduction=reduction)
        solve(of, strategy, reduction=reduction, weight=weight, label_smoothing=0.1, z_loss=1e-4)
    leaf = of.logits.detach().requires_grad_()
    loss, stats = cross_entropy(leaf, of.target, return_stats=True)
    (loss + stats.entropy.mean()).backward()
    cross_entropy(leaf, torch.full_like(of.logits, 1 / of.logits.shape[1])).backward()
    for function in (softmax_ext.softmax, softmax_ext.log_softmax):
        function(leaf, 1).sum().backward()


@on_a_card
@pytest.mark.usefixtures("_unchecked")
@every_kernel
@strategies
def test_the_host_waits_for_nothing(shape, strategy, device, request):
    of = problem(shape, device)
    some_of_everything(of, strategy)  # what is made once may wait
    request.getfixturevalue("_no_waiting")
    some_of_everything(of, strategy)


@on_a_card
@pytest.mark.usefixtures("_unchecked")
@every_kernel
@strategies
def test_graph_capture_and_replay(shape, strategy, device):
    """Forward and backward, captured once and replayed for other logits."""
    leaf = problem(shape, device).logits.requires_grad_()
    target = oracle.make_target("int64", shape, torch.float32).to(device)

    def step() -> Tensor:
        leaf.grad = None
        loss = cross_entropy(leaf * 1, target, **strategy)
        loss.backward()
        return loss.detach()

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for factor in (1.0, -0.5):
        values = factor * problem(shape, device).logits
        with torch.no_grad():
            leaf.copy_(values)
        graph.replay()
        assert_same_bits((loss, leaf.grad), solve(Problem(values, target), strategy))


@on_a_card
@pytest.mark.usefixtures("_unchecked")
@every_kernel
def test_two_streams_at_once(shape, device):
    """Each waits for its own logits only, and what the other does changes no bit."""
    problems = [problem(shape, device) for _ in range(2)]
    expected = [solve(of, {}) for of in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    late = [torch.zeros_like(of.logits) for of in problems]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for stream, logits, of in zip(streams, late, problems, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # cycles; a kernel on another stream would read the zeros
            logits.copy_(of.logits)
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(solve(Problem(late[i], problems[i].target), {}))
    torch.cuda.synchronize()
    for of_stream, right in zip(results, expected, strict=True):
        for result in of_stream:
            assert_same_bits(result, right)


@on_a_card
@every_kernel
def test_the_tensors_device_counts(shape, device):
    """Not the current one, which stays."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    here = problem(shape, torch.device("cuda", 0))
    there = Problem(*(tensor.to("cuda:1") for tensor in here))
    with torch.cuda.device(0):
        for strategy in STRATEGIES:
            result = solve(there, strategy)
            assert {tensor.device for tensor in result} == {torch.device("cuda", 1)}
            assert torch.cuda.current_device() == 0
            if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
                assert_same_bits(tuple(tensor.to("cuda:0") for tensor in result), solve(here, strategy))


# ---- more than 2**31 logits ------------------------------------------------------------------------------------------

LARGE = {"rows": (32_800, 65_537), "tile": (215_000_000, 10), "columns": (1, 3, 716_000_000)}


@on_a_card
@pytest.mark.slow
@pytest.mark.parametrize("strategy", [{}, {"inplace": True, "precompute_grad": True}], ids=str)
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_more_logits_than_an_int_can_count(shape, strategy, device):
    """The first rows, the last and one between; all are written, by their own offsets."""
    rows, count = torch.Size(shape).numel() // shape[1], torch.Size(shape).numel()
    assert count > 2**31
    torch.cuda.empty_cache()
    needed = 2 * 3 * count + 32 * rows + 2**30  # three tensors of bfloat16, what a row has, and some
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of the GPU's memory")
    values = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
    kind = torch.uint8 if shape[1] < 256 else torch.int64
    target = torch.randint(shape[1], (shape[0], *shape[2:]), dtype=kind, device=device)
    positions = torch.tensor([0, 1, rows // 2 - 1, rows // 2, rows - 2, rows - 1])
    places = [tuple(place) for place in torch.stack(torch.unravel_index(positions, target.shape), 1).tolist()]

    def rows_at(tensor: Tensor) -> Tensor:
        """[places, classes] of logits or gradient; [places] of losses or classes."""
        tensor = tensor.detach().movedim(1, -1) if tensor.dim() == len(shape) else tensor.detach()
        return torch.stack([tensor[place] for place in places]).cpu()

    logits, classes = rows_at(values), rows_at(target)
    input = oracle.as_computed(values) if strategy else values.requires_grad_()
    edge = torch.autograd.graph.get_gradient_edge(input)
    loss = cross_entropy(input, target, reduction="none", **strategy)
    (gradient,) = torch.autograd.grad(loss, edge, torch.ones((), dtype=loss.dtype, device=device).expand_as(loss))
    exact = oracle.cross_entropy(logits, classes, reduction="none")
    scale = oracle.gradient_scale(exact.grad, classes, None, reduction="none")
    oracle.assert_within(rows_at(loss), exact.loss, oracle.tolerance("loss", exact.loss, torch.bfloat16), "loss")
    allowed = oracle.tolerance("grad", exact.grad, torch.bfloat16, scale=scale, roundings=2)
    oracle.assert_within(rows_at(gradient), exact.grad, allowed, "gradient")
