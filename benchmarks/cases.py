"""What is measured: the cases (shapes, dtypes, targets), the variants, and the jobs that combine them.

A job is one process: one case, the variants that it times in turn, and what it measures of them. Needs the standard
library alone, so that every peer's environment can read it.
"""

import math
from dataclasses import dataclass, replace

# What is measured of a case.
LOSS = "loss"  # cross entropy, forward and backward
SCALED = "loss * 0.5"  # the same with an upstream gradient that is not 1
FORWARD = "loss, forward alone"
SOFTMAX = "softmax"  # forward and backward
LOG_SOFTMAX = "log_softmax"
MEMORY = "memory"  # of a step of LOSS, beyond what is there with the logits made

# Who does it. The last three are no losses: they read, or read and write, as many bytes as the logits have.
EAGER, COMPILE = "eager", "compile"
DEFAULT, PRECOMPUTE, INPLACE = "default", "precompute", "in place"
JAX, TENSORFLOW = "jax", "tensorflow"
LIGER, QUACK = "liger", "quack"
SUM, MUL, COPY = "sum", "mul_", "copy_"

OURS = (DEFAULT, PRECOMPUTE, INPLACE)
PEERS = (JAX, TENSORFLOW)  # in processes of their own
GPU_PEERS = (LIGER, QUACK)
LIMIT_VARIANTS = (SUM, MUL, COPY)
# The limit of each what: mul_ on the CPU, copy_ on a GPU.
LIMITS = {LOSS: (MUL, COPY), SCALED: (COPY,), FORWARD: (SUM,)}
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_SHORT = {"float32": "f32", "bfloat16": "bf16"}
IGNORED_SHARE = 0.1
SMOOTHING = 0.1


@dataclass(frozen=True)
class Case:
    """One input of the loss; the classes are dimension 1 always, as torch has it."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    transposed: bool = False  # in memory the classes come last: the input is a view, .transpose(1, 2)
    probabilities: bool = False
    options: bool = False  # label smoothing, class weights and ignored rows

    @property
    def classes(self) -> int:
        """C."""
        return self.shape[1]

    @property
    def elements(self) -> int:
        """How many logits there are."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """How many positions have a loss."""
        return self.elements // self.classes

    @property
    def logits_bytes(self) -> int:
        """What the logits occupy."""
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """The shape in which the logits lie contiguous in memory."""
        rows, classes, *inner = self.shape
        return (rows, *inner, classes) if self.transposed else self.shape

    @property
    def class_axis(self) -> int:
        """The axis of memory_shape that holds the classes."""
        return len(self.shape) - 1 if self.transposed else 1

    @property
    def plain(self) -> bool:
        """Whether it differs from others by its logits alone, so that softmax is worth timing on it."""
        return not (self.probabilities or self.options)


@dataclass(frozen=True)
class Job:
    """One process: what it measures of which variants of a case."""

    section: str  # of the report
    case: Case
    variants: tuple[str, ...]
    whats: tuple[str, ...]
    threads: int
    thp: bool = False  # torch's own switch for huge pages, THP_MEM_ALLOC_ENABLE

    @property
    def script(self) -> str:
        """What runs in the process."""
        return next((f"{peer}_worker.py" for peer in PEERS if peer in self.variants), "torch_worker.py")

    @property
    def limits(self) -> tuple[str, ...]:
        """What is measured beside the variants."""
        return () if MEMORY in self.whats else (MUL, SUM)

    def needed_bytes(self, variant: str) -> int:
        """About what its process needs at most, with this variant in it."""
        case = self.case
        arrays = 4 * case.elements * (3 if case.probabilities else 1)
        # The buffer of "in place", the logits again where they are not float32, and the gradient that softmax gets.
        copies = 1 + (case.dtype != "float32") + (SOFTMAX in self.whats)
        step = {EAGER: 4, COMPILE: 2, DEFAULT: 1, PRECOMPUTE: 1, JAX: 4, TENSORFLOW: 4}.get(variant, 0)
        return 2**29 + arrays + (copies + step) * case.logits_bytes


def flat(rows: int, classes: int, dtype: str = "float32") -> Case:
    """Rows of adjacent classes."""
    return Case(f"{rows}x{classes}-{_SHORT[dtype]}", (rows, classes), dtype)


_GPT = flat(4096, 32000)

TABLE = (
    flat(1024, 128256),
    flat(1024, 128256, "bfloat16"),
    _GPT,
    flat(65536, 1000),
    flat(1000000, 10),
    Case("8x21x512x512-f32", (8, 21, 512, 512)),
    Case("2x32000x512-f32-transposed", (2, 32000, 512), transposed=True),
    replace(_GPT, name="4096x32000-f32-probabilities", probabilities=True),
    replace(_GPT, name="4096x32000-f32-options", options=True),
    flat(256, 1000),
    flat(8, 10),
)
VOCABULARY = tuple(flat(1024, classes) for classes in (1000, 32000, 64000, 128256, 200064, 262144))
SCALING = tuple(flat(elements // 32000, 32000) for elements in (10**6, 10**7, 10**8, 10**9))
HUGE_PAGES = (TABLE[0], TABLE[2])
THREADS = TABLE[:4]
QUICK = (TABLE[2], TABLE[3], TABLE[4], TABLE[9], TABLE[10])

CASES = {case.name: case for case in (*TABLE, *VOCABULARY, *SCALING)}


def _table_jobs(case: Case, peers: tuple[str, ...], threads: int) -> list[Job]:
    """Everything about a case of the table."""
    variants = (EAGER, COMPILE, *OURS)
    whats = (LOSS, FORWARD, SOFTMAX, LOG_SOFTMAX) if case.plain else (LOSS, FORWARD)
    timing = [(variants, whats)] + [((peer,), (LOSS, FORWARD)) for peer in peers]
    memory = [((variant,), (MEMORY,)) for variant in (*variants, *peers)]
    return [Job("table", case, *pair, threads) for pair in timing + memory]


def _vocabulary_jobs(case: Case, peers: tuple[str, ...], threads: int) -> list[Job]:
    """What the picture shows of a case."""
    variants = (EAGER, COMPILE, DEFAULT, INPLACE)
    timing = [(variants, (LOSS,))] + [((peer,), (LOSS,)) for peer in peers]
    memory = [((variant,), (MEMORY,)) for variant in (*variants, *peers)]
    return [Job("vocabulary", case, *pair, threads) for pair in timing + memory]


def plan(peers: tuple[str, ...], threads: int) -> list[Job]:
    """All jobs of the benchmark."""
    jobs = [job for case in TABLE for job in _table_jobs(case, peers, threads)]
    four = (EAGER, COMPILE, DEFAULT, INPLACE)
    jobs += [Job("THP_MEM_ALLOC_ENABLE=1", case, four, (LOSS,), threads, thp=True) for case in HUGE_PAGES]
    if threads > 1:
        jobs += [Job("one thread", case, (EAGER, DEFAULT, INPLACE), (LOSS,), 1) for case in THREADS]
    jobs += [Job("scaling", case, (DEFAULT, INPLACE), (LOSS,), threads) for case in SCALING]
    vocabulary = [case for case in VOCABULARY if case not in TABLE]
    return jobs + [job for case in vocabulary for job in _vocabulary_jobs(case, peers, threads)]


def plan_quick(threads: int) -> list[Job]:
    """A few ratios; torch.compile of one case only, which takes up to a quarter of the time already."""
    three, four = (EAGER, DEFAULT, INPLACE), (EAGER, COMPILE, DEFAULT, INPLACE)
    return [Job("quick", case, four if case == QUICK[1] else three, (LOSS,), threads) for case in QUICK]
