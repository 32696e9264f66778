"""How time and memory are measured, whatever is measured: on the CPU, and on a GPU.

Time: the variants take turns, so that whatever disturbs the machine disturbs all.

On the CPU a turn is a call that is not timed, then a sample, of as many calls as fill a few milliseconds. So large
inputs are cold, for they are larger than the cache, and small ones warm; and memory that a call needs anew is what the
call before it freed. Without that first call, it can be memory that the host of a virtual machine has taken back
meanwhile, and the sample is all page faults. For the same reason some rounds come first that are not timed at all. What
takes seconds is spared both, and is called less often.

On a GPU it is the GPU's time, between two CUDA events around each call. The host queues the calls of a turn behind a
kernel that only waits, so that the GPU never waits for the host, and small inputs do not measure Python; a call that
makes the host wait for the GPU is measured with that wait. A turn has one call for each of the inputs used in turn.

Memory: the highest resident set during a step less what was in use before it, by the kernel's count. Pages that the
kernel may take at any time (MADV_FREE) are resident, but not in use. On a GPU: what torch's allocator has handed out.
"""

import ctypes
import gc
import math
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import MIB

# Given a number of calls, makes ready for so many, outside the clock, and returns what is called.
Prepare = Callable[[int], Callable[[], Any]]

_SAMPLE_SECONDS = 0.005
UNTIMED_ROUNDS = 3
_SLOW_SECONDS = 1.0  # of a call
_ENOUGH_SECONDS = 20.0  # of a slow variant's samples
_LONGEST_HEAD_START_MS = 20.0  # of the host, while the GPU waits


@dataclass
class Summary:
    """The samples in brief."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, samples: list[float]) -> "Summary":
        """Median and quartiles; of one sample, that."""
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if samples[1:] else samples * 3
        return cls(median, q1, q3, len(samples))


# ---- on the CPU ----


def _seconds(prepare: Prepare, calls: int) -> float:
    call = prepare(calls)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _used_bytes() -> int:
    """Resident, less what is resident only because the kernel had no need of it yet."""
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        rollup = ""
    free = re.search(r"^LazyFree:\s+(\d+) kB", rollup, re.MULTILINE)
    return _status_bytes("VmRSS") - (int(free[1]) * 1024 if free else 0)


def _peak_bytes() -> int:
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_peak() -> None:
    """Where the kernel refuses, the peak stays that of the whole process: an upper bound."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _give_back_free_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class Cpu:
    """Measures on the CPU."""

    def times_ms(self, variants: dict[str, Prepare], repeats: int, copies: int = 1) -> dict[str, Summary]:
        """Milliseconds of a call, by variant; all have been called before."""
        seconds = {name: _seconds(prepare, 1) for name, prepare in variants.items()}
        calls = {name: min(1000, max(1, math.ceil(_SAMPLE_SECONDS / each))) for name, each in seconds.items()}
        slow = {name for name, each in seconds.items() if each > _SLOW_SECONDS}
        samples: dict[str, list[float]] = {name: [seconds[name] * 1e3] if name in slow else [] for name in variants}
        for _ in range(UNTIMED_ROUNDS):
            for name, prepare in variants.items():
                if name not in slow:
                    _seconds(prepare, 1)
        for _ in range(repeats):
            for name, prepare in variants.items():
                if name in slow and (sum(samples[name]) > _ENOUGH_SECONDS * 1e3 or len(samples[name]) == repeats):
                    continue
                if name not in slow:
                    _seconds(prepare, 1)
                samples[name].append(_seconds(prepare, calls[name]) * 1e3)
        return {name: Summary.of(values) for name, values in samples.items()}

    def peak_mib(self, prepare: Prepare, keeps_memory: bool = False) -> float:
        """MiB that a step needs at most beyond what is there before it.

        A first step, not counted, loads and compiles; but not for what keeps freed memory to itself, which has done all
        that on another input before.
        """
        if not keeps_memory:
            prepare(1)()
        call = prepare(1)
        _give_back_free_memory()
        _forget_peak()
        before = _used_bytes()
        call()
        return max(0, _peak_bytes() - before) / MIB

    def clear(self) -> None:
        """Nothing: the process ends after one request."""


# ---- on a GPU ----


class Cuda:
    """Measures on the first GPU."""

    def __init__(self) -> None:
        import torch  # which the peers on the CPU do not have

        self.torch, cycles = torch, 10**7
        for _ in range(2):  # the first loads the kernel
            start, end = self._event(), self._event()
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            torch.cuda.synchronize()
        self._cycles_of_ms = cycles / start.elapsed_time(end)

    def _event(self) -> Any:
        return self.torch.cuda.Event(enable_timing=True)

    def turn(self, prepare: Prepare, calls: int, head_start_ms: float) -> tuple[list[float], float]:
        """Milliseconds of each call, and how long the host took to queue them all."""
        call = prepare(calls)
        events = [(self._event(), self._event()) for _ in range(calls)]
        self.torch.cuda.synchronize()
        begin = time.perf_counter()
        self.torch.cuda._sleep(int(head_start_ms * self._cycles_of_ms))
        for start, end in events:
            start.record()
            call()
            end.record()
        queued = 1e3 * (time.perf_counter() - begin)
        self.torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events], queued

    def times_ms(self, variants: dict[str, Prepare], repeats: int, copies: int = 1) -> dict[str, Summary]:
        """Milliseconds of a call, by variant, of so many samples or a few more; all have been called before."""
        head_start = dict.fromkeys(variants, 0.0)
        for _ in range(UNTIMED_ROUNDS):
            for name, prepare in variants.items():
                # Of the last of them alone: the first may allocate.
                head_start[name] = min(_LONGEST_HEAD_START_MS, 1 + 1.5 * self.turn(prepare, copies, 0)[1])
        measured: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(math.ceil(repeats / copies)):
            for name, prepare in variants.items():
                measured[name] += self.turn(prepare, copies, head_start[name])[0]
        return {name: Summary.of(values) for name, values in measured.items()}

    def peak_mib(self, prepare: Prepare, keeps_memory: bool = False) -> float:
        """MiB that a step allocates at most beyond what is there before it."""
        prepare(1)()
        call, cuda = prepare(1), self.torch.cuda
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        call()
        cuda.synchronize()
        return (cuda.max_memory_allocated() - before) / MIB

    def clear(self) -> None:
        """Gives memory back, and forgets what was compiled: torch compiles a function for a few shapes only."""
        if "torch._dynamo" in sys.modules:
            self.torch.compiler.reset()
        gc.collect()
        self.torch.cuda.synchronize()
        self.torch.cuda.empty_cache()
