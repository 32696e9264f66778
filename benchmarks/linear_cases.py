"""What is measured of linear cross entropy: the cases and the jobs that combine them (see cases.py)."""

from dataclasses import dataclass

from cases import COMPILE, DEFAULT, EAGER, ITEM_BYTES, LIGER, LOSS, MEMORY

CHUNKED = "chunked"  # F.linear_cross_entropy with torch's default chunks
CUT = "cut"  # Cut Cross-Entropy, arXiv:2411.09009
SECTION, VOCABULARY_SECTION = "linear", "linear, vocabulary"
_SHORT = {"float32": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class LinearCase:
    """Hidden states [rows, features] and the weight [classes, features] of a layer without bias."""

    rows: int
    features: int
    classes: int
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Rows x features x classes, and the dtype."""
        return f"{self.rows}x{self.features}x{self.classes}-{_SHORT[self.dtype]}"

    @property
    def logits_bytes(self) -> int:
        """What the logits would occupy."""
        return self.rows * self.classes * ITEM_BYTES[self.dtype]

    @property
    def gradient_bytes(self) -> int:
        """What the gradients of both operands occupy."""
        return (self.rows + self.classes) * self.features * ITEM_BYTES[self.dtype]

    @property
    def flops(self) -> int:
        """Of the three matrix products."""
        return 3 * 2 * self.rows * self.features * self.classes


@dataclass(frozen=True)
class LinearJob:
    """One process: what it measures of which variants of a case."""

    section: str
    case: LinearCase
    variants: tuple[str, ...]
    whats: tuple[str, ...]
    threads: int
    thp: bool = False
    script: str = "linear_worker.py"
    limits: tuple[str, ...] = ()

    def needed_bytes(self, variant: str) -> int:
        """About what its process needs at most, with this variant in it."""
        logits = {EAGER: 4, COMPILE: 3}.get(variant, 1) * self.case.logits_bytes
        in_double = 8 * (self.case.rows + self.case.classes) * self.case.features
        return 2**29 + 4 * self.case.gradient_bytes + in_double + logits


TABLE = tuple(
    LinearCase(*shape, dtype)
    for shape in ((2048, 768, 50257), (4096, 1024, 128256))
    for dtype in ("float32", "bfloat16")
)
VOCABULARY = tuple(LinearCase(1024, 768, classes) for classes in (8192, 32000, 64000, 128256))
GPU_TABLE = (LinearCase(8192, 4096, 128256, "bfloat16", "cuda"),)
GPU_VOCABULARY = tuple(LinearCase(8192, 4096, classes, "bfloat16", "cuda") for classes in (32000, 64000, 200064))
CASES = {case.name: case for case in (*TABLE, *VOCABULARY, *GPU_TABLE, *GPU_VOCABULARY)}
VARIANTS = (EAGER, COMPILE, CHUNKED, DEFAULT)
GPU_VARIANTS = (EAGER, COMPILE, CHUNKED, LIGER, CUT, DEFAULT)


def plan(threads: int, gpu: bool = False) -> list[LinearJob]:
    """All jobs: the variants of a case in turn, and the memory of each in a process of its own."""
    variants = GPU_VARIANTS if gpu else VARIANTS
    sections = ((SECTION, GPU_TABLE if gpu else TABLE), (VOCABULARY_SECTION, GPU_VOCABULARY if gpu else VOCABULARY))
    jobs = []
    for section, cases in sections:
        for case in cases:
            jobs.append(LinearJob(section, case, variants, (LOSS,), threads))
            jobs += [LinearJob(section, case, (variant,), (MEMORY,), threads) for variant in variants]
    return jobs
