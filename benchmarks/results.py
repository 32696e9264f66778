"""What was measured, on what machine, and the CSV that holds both: one line for each figure.

The table, the plots and the README are made from this file alone.
"""

import csv
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

from cases import MEMORY, Job
from measure import MIB

OK = "ok"
DEFAULT_DIRECTORY = Path(__file__).resolve().parent / "results"
CSV_NAME = "results.csv"


@dataclass(frozen=True)
class Record:
    """One figure: the median of samples, its quartiles; or why there is none."""

    section: str
    case: str
    rows: int
    classes: int
    dtype: str
    logits_mib: float
    variant: str
    what: str
    threads: int
    thp: bool
    status: str  # ok, WRONG, failed, skipped or unavailable
    note: str
    unit: str  # ms, or MiB for memory
    median: float | None = None
    q1: float | None = None
    q3: float | None = None
    n: int = 0

    @classmethod
    def of(cls, job: Job, variant: str, what: str, status: str, note: str = "", **figures: float) -> "Record":
        """A record of a job."""
        case = job.case
        return cls(
            section=job.section,
            case=case.name,
            rows=case.rows,
            classes=case.classes,
            dtype=case.dtype,
            logits_mib=case.logits_bytes / MIB,
            variant=variant,
            what=what,
            threads=job.threads,
            thp=job.thp,
            status=status,
            note=note,
            unit="MiB" if what == MEMORY else "ms",
            **figures,
        )


@dataclass(frozen=True)
class Environment:
    """What the figures depend on besides the code."""

    cpu: str
    processors: int
    isa: str  # of the kernels that softmax_ext chose
    huge_pages: str  # the kernel's own setting
    python: str
    torch: str
    softmax_ext: str
    jax: str
    optax: str
    tensorflow: str
    commit: str
    date: str  # UTC


@dataclass(frozen=True)
class GpuEnvironment:
    """The same where the figures are a GPU's."""

    gpu: str
    memory_gib: float
    driver: str
    cuda: str  # of torch
    architectures: str  # of the kernels of softmax_ext
    python: str
    torch: str
    softmax_ext: str
    triton: str
    liger: str
    quack: str
    commit: str
    date: str  # UTC


def read_text(path: str) -> str:
    """A file of the kernel's; "" where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def commit() -> str:
    """Of the source, from git; where that does not know it, from the variable SOFTMAX_EXT_COMMIT."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SOFTMAX_EXT_COMMIT", "unknown")


def today() -> str:
    """The date, UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")


def describe_environment(peer_versions: dict[str, str]) -> Environment:
    """This machine and what is installed; raises RuntimeError if softmax_ext does not work here."""
    import torch  # here, since what reads a CSV needs no torch

    import softmax_ext
    from softmax_ext import ops

    if ops.load_error is not None or ops.library is None:
        raise RuntimeError(str(ops.load_error))
    name = re.search(r"^model name\s*: (.+)$", read_text("/proc/cpuinfo"), re.MULTILINE)
    huge_pages = re.search(r"\[(\w+)\]", read_text("/sys/kernel/mm/transparent_hugepage/enabled"))
    return Environment(
        cpu=name[1].strip() if name else platform.processor() or platform.machine(),
        processors=os.cpu_count() or 1,
        isa=ops.library.selected_isa(),
        huge_pages=huge_pages[1] if huge_pages else "unknown",
        python=platform.python_version(),
        torch=torch.__version__,
        softmax_ext=softmax_ext.__version__,
        jax=peer_versions.get("jax", ""),
        optax=peer_versions.get("optax", ""),
        tensorflow=peer_versions.get("tensorflow", ""),
        commit=commit(),
        date=today(),
    )


def write_csv(path: Path, records: list[Record], environment: Environment | GpuEnvironment) -> None:
    """One line for each record, with the environment on each."""
    names = [field.name for cls in (Record, type(environment)) for field in fields(cls)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(record), **asdict(environment)} for record in records)


def _parse(kind: object, text: str) -> object:
    if kind is bool:
        return text == "True"
    if kind in (int, float):
        return kind(text)
    if kind == (float | None):
        return float(text) if text else None
    return text


def _from_row(cls: type, row: dict[str, str]) -> object:
    return cls(**{field.name: _parse(field.type, row[field.name]) for field in fields(cls)})


def read_csv(path: Path) -> tuple[list[Record], Environment | GpuEnvironment]:
    """The inverse of write_csv; raises ValueError with a sentence where the file is not one."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        records = [_from_row(Record, row) for row in rows]
        return records, _from_row(GpuEnvironment if "gpu" in rows[0] else Environment, rows[0])
    except (OSError, KeyError, IndexError, ValueError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no table of results ({reason}); make bench writes one.") from None


def measured_on(environment: Environment | GpuEnvironment, threads: int) -> str:
    """The machine in a sentence's words."""
    if isinstance(environment, GpuEnvironment):
        return (
            f"one {environment.gpu}, driver {environment.driver}, CUDA {environment.cuda}, torch {environment.torch},"
            f" Python {environment.python}, commit {environment.commit}, {environment.date}"
        )
    return (
        f"{threads} of {environment.processors} processors of {environment.cpu} with {environment.isa} kernels,"
        f" torch {environment.torch}, Python {environment.python}, huge pages: {environment.huge_pages},"
        f" commit {environment.commit}, {environment.date}"
    )


class Figures:
    """The medians by case, what and variant, with the ratios that reports show."""

    def __init__(self, records: list[Record], section: str):
        self.records = [record for record in records if record.section == section]
        self._by_key = {(record.case, record.what, record.variant): record for record in self.records}

    def pairs(self) -> list[tuple[str, str]]:
        """(case, what), in the order in which cases were measured, the whats of a case together."""
        cases = list(dict.fromkeys(record.case for record in self.records))
        pairs = dict.fromkeys((record.case, record.what) for record in self.records)
        return sorted(pairs, key=lambda pair: cases.index(pair[0]))

    def record(self, case: str, what: str, variant: str) -> Record | None:
        """The record, if this was measured or tried."""
        return self._by_key.get((case, what, variant))

    def median(self, case: str, what: str, variant: str) -> float | None:
        """The median, if there is one."""
        record = self.record(case, what, variant)
        return record.median if record else None

    def ratio(self, case: str, what: str, slower: str, faster: str) -> float | None:
        """How many times as much the one takes as the other."""
        above, below = self.median(case, what, slower), self.median(case, what, faster)
        return above / below if above is not None and below else None
