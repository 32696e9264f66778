"""Many calls: at once from threads, in worker processes, one after another by the hundred thousand, and interrupted.

What a call gives does not depend on any of that, bit for bit.
"""

import os
import resource
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fresh
import oracle
import pytest
import torch
from processes import python
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from softmax_ext import cross_entropy, linear_cross_entropy, log_softmax, softmax

pytestmark = pytest.mark.devices("cpu")

STRATEGIES = {
    "default": {},
    "precompute_grad": {"precompute_grad": True},
    "inplace": {"inplace": True},
    "both": {"precompute_grad": True, "inplace": True},
}


# ---- threads ----


def everything(x: Tensor, target: Tensor, weight: Tensor) -> list[Tensor]:
    """Results and gradients of every function; x [N, C] is a leaf that requires grad and is used as it is."""
    results = []
    for function in (softmax, log_softmax):
        y = function(x, 1)
        results += [y.detach(), *torch.autograd.grad(y, x, x.detach())]
    for options in STRATEGIES.values():
        logits = x * 2
        loss = cross_entropy(logits, target, weight, label_smoothing=0.1, **options)
        results += [loss.detach(), *torch.autograd.grad(loss, x)]
    loss, stats = cross_entropy(x, target, return_stats=True)
    results += [stats.prediction, *torch.autograd.grad(loss + stats.entropy.mean(), x)]
    loss = linear_cross_entropy(x, weight.outer(x.detach()[0]), target)
    results += [loss.detach(), *torch.autograd.grad(loss, x)]
    return results


@pytest.mark.parametrize("shape", [(40, 30), (200, 3000)], ids=str)
def test_eight_threads_on_shared_inputs(shape):
    """All on the same tensors: the leaf, the classes, the weights. Ten rounds each."""
    torch.set_num_threads(4)  # within each call, where there is work for them
    rows, classes = shape
    x = torch.randn(shape).requires_grad_()
    inputs = (x, torch.randint(0, classes, (rows,)), torch.rand(classes) + 0.5)
    expected = everything(*inputs)
    before, version = x.detach().clone(), x._version
    start = threading.Barrier(8)

    def work(_: int) -> list[list[Tensor]]:
        start.wait()
        return [everything(*inputs) for _ in range(10 if rows < 100 else 2)]

    with ThreadPoolExecutor(8) as pool:
        for rounds in pool.map(work, range(8)):
            for results in rounds:
                oracle.assert_same_bits(results, expected, shape)
    assert torch.equal(x.detach(), before)
    assert x._version == version


def expanded(rows: int) -> Tensor:
    """Logits [rows, 1000] in the memory of one row."""
    return torch.randn(1, 1000).expand(rows, 1000)


def of_forward(rows: int) -> Callable[[], object]:
    x, target = expanded(rows), torch.zeros(rows, dtype=torch.int64)
    return lambda: cross_entropy(x, target, reduction="none")


def of_backward(rows: int) -> Callable[[], object]:
    x, target = expanded(rows).bfloat16().requires_grad_(), torch.zeros(rows, dtype=torch.int64)
    loss = cross_entropy(x, target)
    return lambda: torch.autograd.grad(loss, x, retain_graph=True)


def of_softmax(rows: int) -> Callable[[], object]:
    x = expanded(rows).bfloat16()
    return lambda: softmax(x, 1)


@pytest.mark.parametrize("prepare", [of_forward, of_backward, of_softmax])
def test_other_threads_run_while_a_kernel_runs(prepare):
    """The GIL is released: a thread that wakes every millisecond goes on within one call."""
    torch.set_num_threads(1)  # and a core for the other thread
    rows, seconds = 20_000, 0.0
    while seconds < 0.15 and rows < 10**6:
        call = prepare(rows)
        begin = time.perf_counter()
        call()
        seconds = time.perf_counter() - begin
        rows *= 2
    awake: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            awake.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    call()
    end = time.perf_counter()
    done.set()
    thread.join()
    middle = [t for t in awake if begin + 0.1 * (end - begin) < t < end - 0.1 * (end - begin)]
    assert len(middle) >= 10, f"{len(middle)} ticks in {end - begin:.3f} s"


# ---- processes ----


def training_step(index: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(400, 600, generator=generator).requires_grad_()
    loss = cross_entropy(x, torch.randint(0, 600, (400,), generator=generator))
    (gradient,) = torch.autograd.grad(loss, x)
    return [loss.detach(), gradient, softmax(x.detach(), 0)]


class Steps(Dataset):
    """An item is what a training step computes, in the worker."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> list[Tensor]:
        return [torch.tensor(os.getpid()), *training_step(index)]


def workers_of_a_data_loader(context: str) -> None:
    torch.set_num_threads(4)
    expected = [training_step(i) for i in range(8)]
    loader = DataLoader(Steps(), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=100)
    pids = set()
    for (pid, *results), right in zip(loader, expected, strict=True):
        pids.add(int(pid))
        oracle.assert_same_bits(results, right, context)
    assert len(pids - {os.getpid()}) == 2
    for i, right in enumerate(expected):  # and here it still works
        oracle.assert_same_bits(training_step(i), right, i)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader(context):
    """Started after their process has used the package on all its threads."""
    fresh.run(workers_of_a_data_loader, context)


# ---- one after another ----

GROWTH = 1 << 20  # bytes that may stay after all the calls: 10 for each of 10^5; one tensor kept each time is 400


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def no_grad_calls() -> Callable[[], None]:
    x, target = torch.randn(8, 10), torch.arange(8)

    def call() -> None:
        cross_entropy(x, target)
        softmax(x, 1)

    return call


def training_steps(**options: bool) -> Callable[[], None]:
    x, target = torch.randn(8, 10).requires_grad_(), torch.arange(8)

    def call() -> None:
        torch.autograd.grad(cross_entropy(x * 1, target, **options), x)

    return call


def softmax_steps() -> Callable[[], None]:
    x = torch.randn(8, 10).requires_grad_()
    return lambda: softmax(x, 1).backward(x.detach())


def statistics_steps() -> Callable[[], None]:
    x, q = torch.randn(8, 10).requires_grad_(), torch.rand(8, 10).requires_grad_()

    def call() -> None:
        loss, stats = cross_entropy(x, q, return_stats=True)
        torch.autograd.grad(loss + stats.lse.sum() + stats.entropy.sum(), (x, q))

    return call


def linear_steps() -> Callable[[], None]:
    x, matrix, target = torch.randn(8, 6).requires_grad_(), torch.randn(10, 6).requires_grad_(), torch.arange(8)
    return lambda: linear_cross_entropy(x, matrix, target).backward()


def refused_calls() -> Callable[[], None]:
    x, target = torch.randn(8, 10).requires_grad_(), torch.arange(8) + 3

    def call() -> None:
        with pytest.raises(IndexError):
            cross_entropy(x, target)

    return call


def large_steps() -> Callable[[], None]:
    """Whose gradients, 40 MiB, are kept memory."""
    x, target = torch.zeros(1050, 10_000).requires_grad_(), torch.zeros(1050, dtype=torch.int64)
    return lambda: torch.autograd.grad(cross_entropy(x, target), x)[0].resize_(0)


FLAT = {
    "no grad": (no_grad_calls, 100_000),
    "training": (training_steps, 100_000),
    "precompute_grad": (lambda: training_steps(precompute_grad=True), 10_000),
    "inplace": (lambda: training_steps(inplace=True), 10_000),
    "both": (lambda: training_steps(precompute_grad=True, inplace=True), 10_000),
    "softmax": (softmax_steps, 10_000),
    "statistics of probabilities": (statistics_steps, 10_000),
    "linear": (linear_steps, 3_000),
    "refused": (refused_calls, 10_000),
    "large": (large_steps, 50),
}


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps what is freed for a while"
)
@pytest.mark.parametrize(("prepare", "calls"), FLAT.values(), ids=FLAT)
def test_the_resident_set_stays_flat(prepare, calls):
    torch.set_num_threads(1)
    call = prepare()
    for _ in range(max(calls // 20, 5)):
        call()
    before = resident()
    for _ in range(calls):
        call()
    assert resident() - before <= GROWTH, f"{(resident() - before) / calls:.0f} bytes a call"


# ---- Ctrl-C ----

# SIGINT in the middle of each call. What Python does with it, it does after the call.
INTERRUPTED = """
import os, signal, sys, threading, time
import torch
from softmax_ext import cross_entropy, softmax

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may have been started without

def prepare(what, options):
    torch.manual_seed(0)
    x = torch.randn(5000, 1000, dtype=torch.float64).requires_grad_() * 1
    target = torch.arange(5000) % 1000
    if what == "softmax":
        return x, lambda: softmax(x.detach(), 1)
    if what.startswith("forward"):
        return x, lambda: cross_entropy(x, target, softcap=9.0, **options)
    edge = torch.autograd.graph.get_gradient_edge(x)
    loss = cross_entropy(x, target, softcap=9.0, **options)
    upstream = torch.tensor(2.0, dtype=torch.float64)  # so that a precomputed gradient is scaled
    return x, lambda: torch.autograd.grad(loss, edge, upstream)[0]

def interrupt(call, delay):
    # Whether KeyboardInterrupt came out of the call itself.
    inside = False
    def send():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=send)
    try:
        thread.start()
        inside = True
        call()
        inside = False
        while True:  # the signal may go to another thread, which wakes no sleeping one
            time.sleep(0.01)
    except KeyboardInterrupt:
        pass
    thread.join()
    return inside

def check(what):
    options = {"precompute_grad": "precompute" in what, "inplace": "inplace" in what}
    _, call = prepare(what, options)
    begin = time.perf_counter()
    right = call().detach().clone()
    delay = (time.perf_counter() - begin) / 2
    for attempt in range(10):
        x, call = prepare(what, options)
        before, version = x.detach().clone(), x._version
        if interrupt(call, delay):
            break
        delay /= 2
    else:
        raise SystemExit("no call was interrupted")
    written = not torch.equal(x.detach(), before)
    if written:
        assert options["inplace"], "the logits were written"
        assert x._version > version, "the logits were written behind autograd's back"
    if what.startswith("backward"):
        try:
            assert torch.equal(call(), right), "another gradient after the interruption"
        except RuntimeError as error:  # torch frees the graph
            assert "inplace" in str(error) or "a second time" in str(error), error
    assert torch.equal(prepare(what, options)[1]().detach(), right)
    print(what, "written" if written else "intact")

for what in sys.argv[1:]:
    print(what, file=sys.stderr)
    check(what)
"""


def test_interrupted():
    """KeyboardInterrupt comes when the call is over; nothing is half done, and the next calls are right."""
    forward = ["softmax", "forward", "forward precompute", "forward precompute inplace"]
    backward = ["backward", "backward precompute", "backward inplace", "backward precompute inplace"]
    result = python("-c", INTERRUPTED, *forward, *backward)
    assert result.returncode == 0, result.stderr
    in_place = [what for what in (*forward, *backward) if "inplace" in what]
    assert [f"{what} written" for what in in_place] == [s for s in result.stdout.splitlines() if s.endswith("written")]
