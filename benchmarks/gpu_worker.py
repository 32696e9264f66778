"""Measures torch, its compiler, Liger-Kernel, quack and softmax_ext on a GPU: one job, in a process of its own.

Time is the GPU's, between two CUDA events around each call. The host queues the calls of a round behind a kernel that
only waits, so that the GPU never waits for the host, and small inputs do not measure Python; a call that makes the host
wait for the GPU is measured with that wait. A round has one call for each of the rotated inputs (gpu_cases.py), and the
variants take turns.

"in place" and Liger-Kernel overwrite their logits: these are copied anew before each round, outside the events. The
limit is a copy_ of the logits, which reads and writes them once; of forward alone a sum.
"""

import math
import sys
import time
from functools import cached_property, partial
from itertools import cycle
from typing import Any

import answers
import cases
import gpu_cases
import inputs
import numpy as np
import torch
import torch.nn.functional as F
from cases import Case
from inputs import Arrays
from measure import MIB, UNTIMED_ROUNDS, Prepare, Summary
from torch import Tensor
from torch_worker import Loss, TorchWorkload
from worker import Report, Request, measure_memory, print_line, right_ones, say_all

_CHUNK_ELEMENTS = 2**24
_LONGEST_HEAD_START_MS = 20.0


# ---- inputs ----


def logits_of(case: Case, seed: int, device: str) -> Tensor:
    """What inputs.normals gives, made on the device."""
    block = torch.from_numpy(inputs.block(case, seed)).to(device, getattr(torch, case.dtype))
    flat = torch.empty(case.elements, dtype=block.dtype, device=device)
    whole = case.elements // len(block)
    flat[: whole * len(block)].view(whole, len(block)).copy_(block)
    flat[whole * len(block) :].copy_(block[: case.elements % len(block)])
    return flat.view(case.shape)


def liger(logits: Tensor, target: Tensor) -> Tensor:
    """Liger-Kernel's loss."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return liger_cross_entropy(logits, target)


def quack(logits: Tensor, target: Tensor) -> Tensor:
    """The loss of quack."""
    from quack.cross_entropy import cross_entropy

    return cross_entropy(logits, target)


def scaled(loss_fn: Loss) -> Loss:
    """The loss, whose gradient from behind is then not 1."""
    return lambda *args, **options: gpu_cases.UPSTREAM * loss_fn(*args, **options)


class GpuWorkload(TorchWorkload):
    """A case as tensors on a device, in so many copies as are used in turn."""

    def __init__(self, case: Case, copies: int, device: str = "cuda"):
        self.case = case
        self.options = {}
        self.logits = [logits_of(case, seed, device) for seed in range(10, 10 + copies)]
        generator = np.random.default_rng(2)
        target = generator.integers(case.classes, size=case.shape[:1] + case.shape[2:])
        self.target = torch.from_numpy(target).to(device)
        self.one = torch.zeros((), device=device, requires_grad=True)

    @cached_property
    def buffers(self) -> list[Tensor]:
        """What is overwritten."""
        return [torch.empty_like(logits) for logits in self.logits]

    def variants(self, what: str) -> dict[str, Prepare]:
        """All that there are of it, the limits included. The peers take [rows, classes] alone."""
        flat = len(self.case.shape) == 2
        if what == cases.FORWARD:
            made = {
                cases.EAGER: self._value(F.cross_entropy),
                cases.COMPILE: lambda calls: self._value(self.compiled)(calls),
                cases.DEFAULT: self._value(_softmax_ext()),
                cases.LIGER: self._value(liger),
                cases.QUACK: self._value(quack),
                cases.SUM: self._sum,
            }
        else:
            with_upstream = scaled if what == cases.SCALED else _same
            ours = {
                cases.DEFAULT: self._step(with_upstream(_softmax_ext())),
                cases.PRECOMPUTE: self._step(with_upstream(_softmax_ext(precompute_grad=True))),
                cases.INPLACE: self._overwriting_step(with_upstream(_softmax_ext(precompute_grad=True, inplace=True))),
            }
            made = {
                cases.EAGER: self._step(with_upstream(F.cross_entropy)),
                cases.COMPILE: lambda calls: self._step(with_upstream(self.compiled))(calls),
                **ours,
                cases.LIGER: self._overwriting_step(with_upstream(liger)),
                cases.QUACK: self._step(with_upstream(quack)),
            }
            if what != cases.MEMORY:
                made[cases.COPY] = self._copy
        return {name: made[name] for name in made if flat or name not in cases.GPU_PEERS}

    def _copy(self, calls: int) -> Any:
        pairs = cycle(zip(self.buffers, self.logits, strict=True))

        def call() -> None:
            buffer, logits = next(pairs)
            buffer.copy_(logits)

        return call

    def _sum(self, calls: int) -> Any:
        logits = cycle(self.logits)
        return lambda: next(logits).sum()

    # ---- for the check

    def expect(self, what: str, rows: np.ndarray) -> answers.Expected:
        """The right answers for the first of the inputs: the mean over all rows, gradients of some."""
        logits, case = self.logits[0], self.case
        of_rows = Arrays(
            logits=self._rows(logits, rows),
            target=self.target.reshape(-1)[torch.from_numpy(rows).to(logits.device)].cpu().numpy(),
            weight=None,
            label_smoothing=0.0,
        )
        few = answers.expect(cases.LOSS, Case("rows", (len(rows), case.classes), case.dtype), of_rows, None)
        factor = gpu_cases.UPSTREAM if what == cases.SCALED else 1
        gradient = None if what == cases.FORWARD else few.gradient * (factor * len(rows) / case.rows)
        return answers.Expected(case.dtype, np.array([[factor * self._mean]]), gradient)

    @cached_property
    def _mean(self) -> float:
        """The mean loss in float64, by torch, some rows at a time."""
        logits, target = self.logits[0], self.target
        step = max(1, _CHUNK_ELEMENTS * len(logits) // self.case.elements)
        total = 0.0
        for some, classes in zip(logits.split(step), target.split(step), strict=True):
            total += F.cross_entropy(some.double(), classes, reduction="sum").item()
        return total / self.case.rows


def _same(loss_fn: Loss) -> Loss:
    return loss_fn


def _softmax_ext(**strategy: bool) -> Loss:
    # Looked up when it is called, so that a test can put a wrong one there.
    import softmax_ext

    return lambda *args: softmax_ext.cross_entropy(*args, **strategy)


# ---- measuring ----


class Clock:
    """Times calls by CUDA events, behind a kernel that keeps the GPU waiting while the host queues them."""

    def __init__(self) -> None:
        cycles = 10**7
        for _ in range(2):  # the first loads the kernel
            start, end = self._event(), self._event()
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            torch.cuda.synchronize()
        self._cycles_of_ms = cycles / start.elapsed_time(end)

    @staticmethod
    def _event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def round(self, prepare: Prepare, calls: int, head_start_ms: float) -> tuple[list[float], float]:
        """Milliseconds of each call, and how long the host took to queue them all."""
        call = prepare(calls)
        events = [(self._event(), self._event()) for _ in range(calls)]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.cuda._sleep(int(head_start_ms * self._cycles_of_ms))
        for start, end in events:
            start.record()
            call()
            end.record()
        queued = 1e3 * (time.perf_counter() - begin)
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events], queued


def times_ms(clock: Clock, variants: dict[str, Prepare], calls: int, samples: int) -> dict[str, Summary]:
    """Milliseconds of a call, by variant; all have been called before."""
    head_start = dict.fromkeys(variants, 0.0)
    for _ in range(UNTIMED_ROUNDS):
        for name, prepare in variants.items():
            # Of the last of them alone: the first may allocate.
            head_start[name] = min(_LONGEST_HEAD_START_MS, 1 + 1.5 * clock.round(prepare, calls, 0)[1])
    measured: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(math.ceil(samples / calls)):
        for name, prepare in variants.items():
            measured[name] += clock.round(prepare, calls, head_start[name])[0]
    return {name: Summary.of(values) for name, values in measured.items()}


def peak_mib(prepare: Prepare) -> Summary:
    """MiB that a step allocates at most beyond what is there before it."""
    prepare(1)()
    call = prepare(1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return Summary.of([(torch.cuda.max_memory_allocated() - before) / MIB])


def work(request: Request, say: Report) -> None:
    """Does what is asked, one ``what`` after the other."""
    case = request.case
    copies = gpu_cases.buffers(case, torch.cuda.get_device_properties(0).L2_cache_size)
    workload = GpuWorkload(case, copies)
    clock = Clock()
    rows = answers.checked_rows(case)
    for what in request.whats:
        known = workload.variants(what)
        chosen = {name: known[name] for name in request.variants if name in known}
        if what == cases.MEMORY:
            say_all(what, measure_memory(chosen, peak_mib, say), say)
            continue
        only_limits = set(chosen) <= set(cases.LIMIT_VARIANTS)
        expected = None if only_limits else workload.expect(what, rows)
        right = right_ones(what, chosen, expected, partial(workload.fetch, rows=rows), say)
        say_all(what, times_ms(clock, right, copies, request.repeats), say)


if __name__ == "__main__":
    work(Request.parse(sys.argv[1]), print_line)
