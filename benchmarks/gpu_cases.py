"""What is measured on a GPU, and how much of its memory that takes. Needs the standard library alone, as cases.py does.

A job is one process, so that a kernel that spoils the GPU's context spoils one case. The inputs of a variant rotate
among so many buffers that they are together several times the L2 cache.
"""

import math
from dataclasses import dataclass

from cases import (
    COMPILE,
    COPY,
    DEFAULT,
    EAGER,
    FORWARD,
    INPLACE,
    LOSS,
    MEMORY,
    OURS,
    PRECOMPUTE,
    QUACK,
    SCALED,
    SUM,
    Case,
    Job,
    flat,
)

SECTION, VOCABULARY_SECTION, COPY_SECTION = "gpu", "gpu vocabulary", "gpu copy"
UPSTREAM = 0.5  # the gradient of SCALED from behind
L2_SIZES = 8  # of the rotated buffers together, at least

_SHAPES = (
    (8192, 128256),
    (4096, 32000),
    (2048, 32000),
    (2048, 50257),  # rows that do not begin at multiples of 16 bytes
    (65536, 1000),
    (1000000, 10),
    (16384, 262144),
)
_DTYPES = ("bfloat16", "float32")
_SHORT = {"bfloat16": "bf16", "float32": "f32"}

TABLE = (
    *(flat(*shape, dtype) for shape in _SHAPES for dtype in _DTYPES),
    *(Case(f"8x21x512x512-{_SHORT[dtype]}", (8, 21, 512, 512), dtype) for dtype in _DTYPES),
)
VOCABULARY = tuple(flat(8192, classes, "bfloat16") for classes in (16000, 32000, 64000, 128256, 200064, 262144))
# Its copy is what the card can do: 2 GiB read and written.
LARGE_COPY = Case("2 GiB", (2**14, 2**15), "float32")
QUICK = tuple(case for case in TABLE if case.name in ("4096x32000-bf16", "2048x50257-f32", "1000000x10-f32"))

CASES = {case.name: case for case in (*TABLE, *VOCABULARY)}


def buffers(case: Case, l2_bytes: int) -> int:
    """How many inputs of a case are used in turn."""
    return max(1, math.ceil(L2_SIZES * l2_bytes / case.logits_bytes))


@dataclass(frozen=True)
class GpuJob(Job):
    """One process on the GPU."""

    l2_bytes: int = 0

    @property
    def script(self) -> str:
        """What runs in the process."""
        return "gpu_worker.py"

    @property
    def limits(self) -> tuple[str, ...]:
        """What is measured beside the variants: SUM of FORWARD alone, COPY of the others."""
        return (COPY, SUM)

    def needed_bytes(self, variant: str) -> int:
        """About what of the GPU's memory its process needs at most: inputs, what is overwritten, and a step."""
        step = {EAGER: 3, COMPILE: 2, DEFAULT: 1, PRECOMPUTE: 1, QUACK: 1}.get(variant, 0)
        return 2**30 + (2 * buffers(self.case, self.l2_bytes) + step) * self.case.logits_bytes


def _job(section: str, case: Case, variants: tuple[str, ...], whats: tuple[str, ...], l2_bytes: int) -> GpuJob:
    return GpuJob(section, case, variants, whats, threads=1, l2_bytes=l2_bytes)


def plan(peers: tuple[str, ...], l2_bytes: int, only: list[str] | None = None) -> list[GpuJob]:
    """All jobs, those that matter most first; ``peers`` are of GPU_PEERS. ``only`` names cases."""
    jobs = [_job(COPY_SECTION, LARGE_COPY, (COPY,), (LOSS,), l2_bytes)]
    variants = (EAGER, COMPILE, *peers, *OURS)
    for case in TABLE:
        jobs.append(_job(SECTION, case, variants, (LOSS, SCALED, FORWARD, MEMORY), l2_bytes))
    four = (EAGER, COMPILE, *peers, DEFAULT, INPLACE)
    for case in VOCABULARY:
        if case not in TABLE:
            jobs.append(_job(VOCABULARY_SECTION, case, four, (LOSS, MEMORY), l2_bytes))
    return [job for job in jobs if not only or job.section == COPY_SECTION or job.case.name in only]


def plan_quick(peers: tuple[str, ...], l2_bytes: int) -> list[GpuJob]:
    """A few ratios, without the compiler."""
    copy = _job(COPY_SECTION, LARGE_COPY, (COPY,), (LOSS,), l2_bytes)
    return [copy, *(_job(SECTION, case, (EAGER, *peers, *OURS), (LOSS,), l2_bytes) for case in QUICK)]
