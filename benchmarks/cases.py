"""What is measured: the cases (shapes, dtypes, targets), the variants, and the jobs that combine them.

A job is one case, the variants that it times in turn, and what it measures of them. Needs the standard library alone,
so that every peer's environment can read it.
"""

import math
from dataclasses import dataclass, replace

CPU, CUDA = "cpu", "cuda"

# The operators. Of the linear one the logits are never given: they are those of a layer without bias.
CROSS_ENTROPY, SOFTMAX, LINEAR = "cross_entropy", "softmax", "linear"
OPS = (CROSS_ENTROPY, SOFTMAX, LINEAR)

# What is measured of a case; SOFTMAX too. Forward and backward, where nothing else is said.
LOSS = "loss"
SCALED = "loss * 0.5"  # the same with an upstream gradient that is not 1
FORWARD = "loss, forward alone"
LOG_SOFTMAX = "log_softmax"
MEMORY = "memory"  # of a step of LOSS, beyond what is there with the logits made; for LINEAR beyond the gradients too

# Who does it.
EAGER, COMPILE = "eager", "compile"
DEFAULT, PRECOMPUTE, INPLACE = "default", "precompute", "in place"
JAX, TENSORFLOW = "jax", "tensorflow"
LIGER, QUACK = "liger", "quack"
CHUNKED = "chunked"  # F.linear_cross_entropy with torch's default chunks
CUT = "cut"  # Cut Cross-Entropy, arXiv:2411.09009
OURS = (DEFAULT, PRECOMPUTE, INPLACE)
# Of LINEAR, with memory= as many bytes as these multiples of the logits' size.
WHOLE, LEAN = "whole", "lean"
MEMORY_OF_PLAN = {WHOLE: 4, LEAN: 1 / 32}
WIDE = "wide"  # of LINEAR in half types, with logits_dtype=torch.float32
OURS_OF_LINEAR = (DEFAULT, WHOLE, LEAN, WIDE)
PEERS = (JAX, TENSORFLOW)  # in interpreters of their own
GPU_PEERS = (LIGER, QUACK, CUT)
# No losses: they read, or read and write, as many bytes as the logits have.
SUM, MUL, COPY = "sum", "mul_", "copy_"
LIMIT_VARIANTS = (SUM, MUL, COPY)
# The limit of each what: mul_ on the CPU, copy_ on a GPU.
LIMITS = {LOSS: (MUL, COPY), SCALED: (COPY,), FORWARD: (SUM,)}

MIB = 2**20
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_SHORT = {"float32": "f32", "bfloat16": "bf16"}
UPSTREAM = 0.5  # the gradient of SCALED from behind
L2_SIZES = 8  # of a GPU, that the inputs used in turn fill together, at least


@dataclass(frozen=True)
class Case:
    """One input of the loss; the classes are dimension 1 always, as torch has it."""

    name: str
    shape: tuple[int, ...]  # of the logits
    dtype: str = "float32"
    transposed: bool = False  # in memory the classes come last: the input is a view, .transpose(1, 2)
    probabilities: bool = False
    options: bool = False  # label smoothing, class weights and ignored rows
    features: int = 0  # of the hidden states [rows, features] and the weight [classes, features] of LINEAR

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
        """What the logits occupy; of LINEAR, what they would."""
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def gradient_bytes(self) -> int:
        """What the gradients of LINEAR's operands occupy."""
        return (self.rows + self.classes) * self.features * ITEM_BYTES[self.dtype]

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
    """What is measured of which variants of a case."""

    section: str  # of the report
    op: str
    case: Case
    variants: tuple[str, ...]
    whats: tuple[str, ...]
    device: str = CPU
    threads: int = 1
    thp: bool = False  # torch's own switch for huge pages, THP_MEM_ALLOC_ENABLE
    copies: int = 1  # how many inputs are used in turn

    @property
    def limits(self) -> tuple[str, ...]:
        """What is measured beside the variants; a worker leaves out what the device or a what does not have."""
        return () if self.op == LINEAR else LIMIT_VARIANTS

    @property
    def worker(self) -> str:
        """The module that does it."""
        peers = [peer for peer in PEERS if peer in self.variants]
        return f"workers.{peers[0] if peers else 'linear' if self.op == LINEAR else 'torch'}_worker"

    def needed_bytes(self, variant: str) -> int:
        """About what its process needs at most, on a GPU of the GPU's memory, with this variant in it."""
        case, size = self.case, self.case.logits_bytes
        if self.op == LINEAR:
            in_double = 8 * (case.rows + case.classes) * case.features
            return 2**29 + 4 * case.gradient_bytes + in_double + {EAGER: 4, COMPILE: 3, WIDE: 2}.get(variant, 1) * size
        step = {EAGER: 4, COMPILE: 2, JAX: 4, TENSORFLOW: 4, INPLACE: 0, LIGER: 0}.get(variant, 1)
        step += 2 * (self.op == SOFTMAX)  # the gradient that it gets, and the output that stays
        if self.device == CUDA:
            return 2**30 + (2 * self.copies + step) * size
        arrays = 4 * case.elements * (3 if case.probabilities else 1)
        # The buffer of "in place", and the logits again where they are not float32.
        return 2**29 + arrays + (1 + (case.dtype != "float32") + step) * size


def flat(rows: int, classes: int, dtype: str = "float32") -> Case:
    """Rows of adjacent classes."""
    return Case(f"{rows}x{classes}-{_SHORT[dtype]}", (rows, classes), dtype)


def linear(rows: int, features: int, classes: int, dtype: str = "float32") -> Case:
    """The logits of a layer."""
    return Case(f"{rows}x{features}x{classes}-{_SHORT[dtype]}", (rows, classes), dtype, features=features)


# ---- on the CPU ----

TABLE_SECTION, VOCABULARY_SECTION, SCALING_SECTION = "table", "vocabulary", "scaling"
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


def _with_memory(first: Job, peers: tuple[str, ...] = ()) -> list[Job]:
    """The job, the same of each peer apart, and the memory of each variant in a process of its own."""
    timing = [first, *(replace(first, variants=(peer,)) for peer in peers)]
    alone = [replace(first, variants=(variant,), whats=(MEMORY,)) for variant in (*first.variants, *peers)]
    return timing + alone


def _cpu_plan(peers: tuple[str, ...], threads: int) -> list[Job]:
    four = (EAGER, COMPILE, DEFAULT, INPLACE)

    def loss(section: str, case: Case, variants: tuple[str, ...], *more: str) -> Job:
        return Job(section, CROSS_ENTROPY, case, variants, (LOSS, *more), threads=threads)

    jobs = []
    for case in TABLE:
        jobs += _with_memory(loss(TABLE_SECTION, case, (EAGER, COMPILE, *OURS), FORWARD), peers)
        if case.plain:
            whats = (SOFTMAX, LOG_SOFTMAX)
            jobs.append(Job(TABLE_SECTION, SOFTMAX, case, (EAGER, DEFAULT), whats, threads=threads))
    jobs += [replace(loss("THP_MEM_ALLOC_ENABLE=1", case, four), thp=True) for case in HUGE_PAGES]
    if threads > 1:
        jobs += [replace(loss("one thread", case, (EAGER, DEFAULT, INPLACE)), threads=1) for case in THREADS]
    jobs += [loss(SCALING_SECTION, case, (DEFAULT, INPLACE)) for case in SCALING]
    for case in VOCABULARY:
        if case not in TABLE:
            jobs += _with_memory(loss(VOCABULARY_SECTION, case, four), peers)
    return jobs


# ---- on a GPU ----

GPU_SECTION, GPU_VOCABULARY_SECTION, COPY_SECTION = "gpu", "gpu vocabulary", "gpu copy"
_DTYPES = ("bfloat16", "float32")
_GPU_SHAPES = (
    (8192, 128256),
    (4096, 32000),
    (2048, 32000),
    (2048, 50257),  # rows that do not begin at multiples of 16 bytes
    (65536, 1000),
    (1000000, 10),
    (16384, 262144),
)
GPU_TABLE = (
    *(flat(*shape, dtype) for shape in _GPU_SHAPES for dtype in _DTYPES),
    *(Case(f"8x21x512x512-{_SHORT[dtype]}", (8, 21, 512, 512), dtype) for dtype in _DTYPES),
)
GPU_VOCABULARY = tuple(flat(8192, classes, "bfloat16") for classes in (16000, 32000, 64000, 128256, 200064, 262144))
# Its copy is what the card can do: 2 GiB read and written.
LARGE_COPY = Case("2 GiB", (2**14, 2**15), "float32")
GPU_QUICK = tuple(case for case in GPU_TABLE if case.name in ("4096x32000-bf16", "2048x50257-f32", "1000000x10-f32"))


def copies_of(case: Case, l2_bytes: int) -> int:
    """How many inputs of a case are used in turn, so that they are together several times the L2 cache."""
    return max(1, math.ceil(L2_SIZES * l2_bytes / case.logits_bytes))


def _gpu_plan(peers: tuple[str, ...], l2_bytes: int, quick: bool) -> list[Job]:
    """Those that matter most first."""

    def job(section: str, case: Case, variants: tuple[str, ...], *whats: str, op: str = CROSS_ENTROPY) -> Job:
        return Job(section, op, case, variants, whats, CUDA, copies=copies_of(case, l2_bytes))

    jobs = [job(COPY_SECTION, LARGE_COPY, (COPY,), LOSS)]
    if quick:
        return jobs + [job(GPU_SECTION, case, (EAGER, *peers, *OURS), LOSS) for case in GPU_QUICK]
    for case in GPU_TABLE:
        jobs.append(job(GPU_SECTION, case, (EAGER, COMPILE, *peers, *OURS), LOSS, SCALED, FORWARD, MEMORY))
    for case in GPU_VOCABULARY:
        if case not in GPU_TABLE:
            four = (EAGER, COMPILE, *peers, DEFAULT, INPLACE)
            jobs.append(job(GPU_VOCABULARY_SECTION, case, four, LOSS, MEMORY))
    softmax = [job(GPU_SECTION, case, (EAGER, DEFAULT), SOFTMAX, LOG_SOFTMAX, op=SOFTMAX) for case in GPU_TABLE]
    return jobs + softmax


# ---- linear cross entropy, on either ----

LINEAR_SECTION, LINEAR_VOCABULARY_SECTION = "linear", "linear, vocabulary"
LINEAR_VARIANTS = {
    CPU: (EAGER, COMPILE, CHUNKED, *OURS_OF_LINEAR),
    CUDA: (EAGER, COMPILE, CHUNKED, LIGER, CUT, *OURS_OF_LINEAR),
}
LINEAR_TABLE = {
    CPU: tuple(
        linear(*shape, dtype)
        for shape in ((2048, 768, 50257), (4096, 1024, 128256))
        for dtype in ("float32", "bfloat16")
    ),
    CUDA: tuple(
        linear(*shape, "bfloat16")
        for shape in ((8192, 4096, 128256), (2048, 4096, 128256), (32768, 2048, 50257), (1024, 1024, 32000))
    ),
}
LINEAR_VOCABULARY = {
    CPU: tuple(linear(1024, 768, classes) for classes in (8192, 32000, 64000, 128256)),
    CUDA: tuple(linear(8192, 4096, classes, "bfloat16") for classes in (32000, 64000, 200064)),
}


def _linear_plan(device: str, threads: int) -> list[Job]:
    jobs = []
    for section, cases in ((LINEAR_SECTION, LINEAR_TABLE), (LINEAR_VOCABULARY_SECTION, LINEAR_VOCABULARY)):
        for case in cases[device]:
            is_half = ITEM_BYTES[case.dtype] == 2
            variants = tuple(name for name in LINEAR_VARIANTS[device] if is_half or name != WIDE)
            job = Job(section, LINEAR, case, variants, (LOSS,), device, threads)
            jobs += _with_memory(job) if device == CPU else [replace(job, whats=(LOSS, MEMORY))]
    return jobs


def plan(device: str, peers: tuple[str, ...] = (), threads: int = 1, l2_bytes: int = 0) -> list[Job]:
    """All jobs of a device; ``peers`` are those that are installed, ``l2_bytes`` is the GPU's."""
    jobs = _gpu_plan(peers, l2_bytes, quick=False) if device == CUDA else _cpu_plan(peers, threads)
    return jobs + _linear_plan(device, threads)


def plan_quick(device: str, peers: tuple[str, ...] = (), threads: int = 1, l2_bytes: int = 0) -> list[Job]:
    """A few ratios; torch.compile of one case only and none on a GPU, since compiling takes most of the time."""
    if device == CUDA:
        return _gpu_plan(peers, l2_bytes, quick=True)
    three, four = (EAGER, DEFAULT, INPLACE), (EAGER, COMPILE, DEFAULT, INPLACE)
    return [
        Job("quick", CROSS_ENTROPY, case, four if case == QUICK[1] else three, (LOSS,), threads=threads)
        for case in QUICK
    ]
