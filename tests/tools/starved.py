"""Calls under a limit on memory that is raised until they succeed, at last in small steps: any large allocation fails.

    python tests/tools/starved.py CASE...

After every failure the operands must be as they were, byte for byte, and the same call must work without the limit.
What the failures said is printed as JSON: for each case a list of [type, text]. stress/test_no_memory.py starts
this, in a process of its own.
"""

import ctypes
import gc
import json
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from softmax_ext import cross_entropy, linear_cross_entropy, log_softmax, softmax

STEP, LAST_STEP = 128 << 10, 8 << 10
THRESHOLD = 64 << 10  # bytes from which on an allocation is to fail

LIBC = ctypes.CDLL(None)
LIBC.malloc.restype, LIBC.malloc.argtypes, LIBC.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

Action = Callable[[], list[Tensor]]
Case = tuple[list[Tensor], Action]  # operands, and what is done with them under the limit


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def take_free_memory() -> int | None:
    """What malloc has left, as a chain: each block holds the address of the one before. A list would need memory.

    Pieces that are smaller than those which are to fail are left.
    """
    last = None
    while (block := LIBC.malloc(THRESHOLD)) is not None:
        ctypes.c_void_p.from_address(block).value = last
        last = block
    return last


def give_back(last: int | None) -> None:
    while last is not None:
        before = ctypes.c_void_p.from_address(last).value
        LIBC.free(last)
        last = before


@contextmanager
def at_most(more: int) -> Iterator[None]:
    """The address space that is in use now and so many bytes; what malloc has free in it is taken before.

    Nothing is freed meanwhile but by the call itself: no garbage is collected.
    """
    gc.collect()
    gc.disable()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = address_space()
    resource.setrlimit(resource.RLIMIT_AS, (used, hard))
    taken = take_free_memory()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        give_back(taken)
        gc.enable()


# ---- cases ----


def operands(rows: int = 20_000, classes: int = 40) -> tuple[Tensor, Tensor]:
    """Logits that are no leaf, as a model's are, and classes with a stride, which are copied on the way."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator).requires_grad_() * 1
    return logits, torch.randint(0, classes, (rows, 2), generator=generator)[:, 0]


def forward(function: Callable[[Tensor, int], Tensor]) -> Case:
    x, _ = operands()
    return [x], lambda: [function(x.detach(), 1)]


def backward_of_softmax(function: Callable[[Tensor, int], Tensor]) -> Case:
    x, _ = operands()
    y, upstream = function(x, 1), torch.randn(40, 20_000).T
    return [x, y, upstream], lambda: list(torch.autograd.grad(y, x, upstream, retain_graph=True))


def forward_of_cross_entropy(
    rows: int = 20_000, classes: int = 40, dtype: torch.dtype = torch.float32, **options: bool
) -> Case:
    x, target = operands(rows, classes)
    x = x.to(dtype)
    weight = torch.linspace(0.5, 2, classes)

    def act() -> list[Tensor]:
        loss, stats = cross_entropy(x, target, weight, reduction="none", return_stats=True, **options)
        return [loss.detach(), *(s.detach() for s in stats), *([x.detach()] if options.get("inplace") else [])]

    return [x, target, weight], act


def backward_of_cross_entropy(rows: int = 60_000, classes: int = 40, **options: bool) -> Case:
    x, target = operands(rows, classes)
    edge = torch.autograd.graph.get_gradient_edge(x)
    loss = cross_entropy(x, target, reduction="none", **options)
    upstream = torch.linspace(1, 2, 2 * rows)[::2]
    return [x, target, upstream], lambda: list(torch.autograd.grad(loss, edge, upstream))


def linear() -> Case:
    x, matrix, target = torch.randn(500, 200), torch.randn(1000, 200), torch.arange(500)
    operands = [x.requires_grad_(), matrix.requires_grad_(), target]
    return operands, lambda: list(torch.autograd.grad(linear_cross_entropy(*operands), operands[:2]))


SCRATCH = "precompute_grad inplace of long rows"
CASES: dict[str, Callable[[], Case]] = {
    "softmax": lambda: forward(softmax),
    "log_softmax": lambda: forward(log_softmax),
    "softmax backward": lambda: backward_of_softmax(softmax),
    "cross_entropy": forward_of_cross_entropy,
    "precompute_grad": lambda: forward_of_cross_entropy(precompute_grad=True),
    "precompute_grad inplace": lambda: forward_of_cross_entropy(precompute_grad=True, inplace=True),
    # The kernel's own memory is half of what this takes: the exponentials of a row for each thread.
    SCRATCH: lambda: forward_of_cross_entropy(64, 60_000, torch.bfloat16, precompute_grad=True, inplace=True),
    "backward": backward_of_cross_entropy,
    "backward of more than 32 MiB": lambda: backward_of_cross_entropy(1000, 10_000),
    "backward precompute_grad": lambda: backward_of_cross_entropy(precompute_grad=True),
    "backward inplace": lambda: backward_of_cross_entropy(inplace=True),
    "backward precompute_grad inplace": lambda: backward_of_cross_entropy(precompute_grad=True, inplace=True),
    "linear_cross_entropy": linear,
}


# ---- the sweep ----


def attempt(make: Callable[[], Case], more: int, expected: list[Tensor]) -> Exception | None:
    """The error with so much memory; checks everything else."""
    torch.manual_seed(0)
    tensors, act = make()
    before = [(t.detach().clone(), t._version) for t in tensors]
    error = None
    try:
        with at_most(more):
            results = act()
    except (RuntimeError, MemoryError) as caught:
        error = caught.with_traceback(None)  # which holds this frame, and so every tensor in it, in a cycle
    if error is not None:
        for tensor, (values, version) in zip(tensors, before, strict=True):
            assert torch.equal(tensor.detach(), values), f"an operand was written before {error!r}"
            assert tensor._version == version, f"an operand's version was raised before {error!r}"
        results = act()
    for ours, right in zip(results, expected, strict=True):
        # Not the same bits: where a precomputed gradient was given up, it is computed otherwise.
        torch.testing.assert_close(ours, right)
    return error


def failures(make: Callable[[], Case]) -> list[list[str]]:
    torch.manual_seed(0)
    tensors, act = make()
    expected = act()  # every thread is there from here on
    # Where results are large the first steps are too: they all end in the same allocation.
    first = max(STEP, sum(t.nbytes for t in tensors) // 64)
    del tensors, act
    said, more = [], 0
    for step in (first, STEP, LAST_STEP):
        while (error := attempt(make, more, expected)) is not None:
            said.append([type(error).__name__, str(error)])
            more += step
        more = max(0, more - step)
    return said


def main(names: list[str]) -> None:
    torch.set_num_threads(2)
    gc.freeze()  # what is imported: a collection then takes no time
    said = {}
    for name in names:
        print(name, file=sys.stderr)
        said[name] = failures(CASES[name])
    print(json.dumps(said))


if __name__ == "__main__":
    # In a thread, whose stack is there as a whole: the first one's would have to grow under the limit, and could not.
    threading.stack_size(64 << 20)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(main, sys.argv[1:]).result()
