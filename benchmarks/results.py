"""What was measured, on what machine, and the CSV that holds both: one line for each figure.

The tables, the pictures and the README are made from this file alone. An environment is what the figures depend on
besides the code: names and texts, in the order of the CSV's last columns.
"""

import csv
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

from cases import LIGER, MEMORY, MIB, QUACK, Job

OK = "ok"
DEFAULT_DIRECTORY = Path(__file__).resolve().parent / "results"
CSV_NAME = "results.csv"
# Of the peers on a GPU: what is imported, and what was installed.
GPU_PACKAGES = {LIGER: ("liger_kernel", "liger-kernel"), QUACK: ("quack", "quack-kernels")}

Environment = dict[str, str]


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
        case, unit = job.case, "MiB" if what == MEMORY else "ms"
        of_case = (case.name, case.rows, case.classes, case.dtype, case.logits_bytes / MIB)
        return cls(job.section, *of_case, variant, what, job.threads, job.thp, status, note, unit, **figures)


# ---- the machine ----


def read_text(path: str) -> str:
    """A file of the kernel's; "" where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _output(*command: str) -> str:
    """What it prints; "" if it cannot be run or fails."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _of_the_code() -> Environment:
    commit = _output("git", "describe", "--always", "--dirty") or os.environ.get("SOFTMAX_EXT_COMMIT", "unknown")
    return {"commit": commit, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}


def describe_cpu(peer_versions: dict[str, str]) -> Environment:
    """This machine and what is installed; raises RuntimeError if softmax_ext does not work here."""
    import torch  # here, since what reads a CSV needs no torch

    import softmax_ext
    from softmax_ext import ops

    if ops.load_error is not None or ops.library is None:
        raise RuntimeError(str(ops.load_error))
    name = re.search(r"^model name\s*: (.+)$", read_text("/proc/cpuinfo"), re.MULTILINE)
    huge_pages = re.search(r"\[(\w+)\]", read_text("/sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "cpu": name[1].strip() if name else platform.processor() or platform.machine(),
        "processors": str(os.cpu_count() or 1),
        "isa": ops.library.selected_isa(),  # of the kernels that softmax_ext chose
        "huge_pages": huge_pages[1] if huge_pages else "unknown",  # the kernel's own setting
        "python": platform.python_version(),
        "torch": torch.__version__,
        "softmax_ext": softmax_ext.__version__,
        **{package: peer_versions.get(package, "") for package in ("jax", "optax", "tensorflow")},
        **_of_the_code(),
    }


def gpu_peers() -> tuple[str, ...]:
    """Which of them can be imported."""
    return tuple(peer for peer, (module, _) in GPU_PACKAGES.items() if importlib.util.find_spec(module))


def describe_gpu() -> Environment:
    """The first GPU and what is installed; raises RuntimeError with a sentence if nothing can be measured here."""
    import torch

    import softmax_ext
    from softmax_ext import cuda, ops

    if ops.load_error is not None:
        raise RuntimeError(ops.load_error)
    if not torch.cuda.is_available():
        raise RuntimeError(f"there is no GPU that torch {torch.__version__} can use; --device cpu needs none.")
    if cuda.library is None:
        raise RuntimeError(f"{cuda.missing}.")
    properties = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "memory_gib": str(round(properties.total_memory / 2**30, 1)),
        "driver": driver.partition("\n")[0] or "unknown",
        "cuda": torch.version.cuda or "",  # of torch
        "architectures": cuda.architectures(),  # of the kernels of softmax_ext
        "python": platform.python_version(),
        "torch": torch.__version__,
        "softmax_ext": softmax_ext.__version__,
        "triton": _version("triton"),
        **{peer: _version(distribution) for peer, (_, distribution) in GPU_PACKAGES.items()},
        **_of_the_code(),
    }


def of_gpu(environment: Environment) -> bool:
    """Whether the figures are a GPU's."""
    return "gpu" in environment


def measured_on(environment: Environment, threads: int) -> str:
    """The machine in a sentence's words."""
    if of_gpu(environment):
        text = "one {gpu}, driver {driver}, CUDA {cuda}, torch {torch}, Python {python}, commit {commit}, {date}"
    else:
        text = (
            "{threads} of {processors} processors of {cpu} with {isa} kernels, torch {torch}, Python {python},"
            " huge pages: {huge_pages}, commit {commit}, {date}"
        )
    return text.format(threads=threads, **environment)


# ---- the file ----


def write_csv(path: Path, records: list[Record], environment: Environment) -> None:
    """One line for each record, with the environment on each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)] + [*environment], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(record), **environment} for record in records)


def _parse(kind: object, text: str) -> object:
    if kind is bool:
        return text == "True"
    if kind in (int, float):
        return kind(text)
    if kind == (float | None):
        return float(text) if text else None
    return text


def read_csv(path: Path) -> tuple[list[Record], Environment]:
    """The inverse of write_csv; raises ValueError with a sentence where the file is not one."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        kinds = {field.name: field.type for field in fields(Record)}
        records = [Record(**{name: _parse(kind, row[name]) for name, kind in kinds.items()}) for row in rows]
        environment = {name: value for name, value in rows[0].items() if name not in kinds}
        measured_on(environment, 1)
    except (OSError, KeyError, IndexError, ValueError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no table of results ({reason}); make bench writes one.") from None
    return records, environment


class Figures:
    """The medians of a section by case, what and variant, with the ratios that reports show."""

    def __init__(self, records: list[Record], section: str):
        self.records = [record for record in records if record.section == section]
        self._by_key = {(record.case, record.what, record.variant): record for record in self.records}
        self.cases = list(dict.fromkeys(record.case for record in self.records))

    def pairs(self) -> list[tuple[str, str]]:
        """(case, what), in the order in which cases were measured, the whats of a case together."""
        pairs = dict.fromkeys((record.case, record.what) for record in self.records)
        return sorted(pairs, key=lambda pair: self.cases.index(pair[0]))

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
