"""The benchmark: softmax_ext against eager torch, torch.compile and, where installed, JAX/optax and TensorFlow.

    make bench                       all of it
    make bench PEERS=1               with JAX and TensorFlow, in an environment of their own
    make bench-quick                 a few ratios in a minute; writes nothing
    python benchmarks/bench.py --only 4096x32000-f32

Every job is a process of its own: one case, whose variants take turns. Each variant's loss and gradient are held
against float64 before it is timed; one that is wrong is said to be WRONG, is not timed, and makes the exit status 1.

Prints one table. A full run, or one with --output, also writes results.csv and, from it, the pictures.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import plots
from cases import CASES, JAX, LOSS, MEMORY, PEERS, TENSORFLOW, Job, plan, plan_quick
from results import (
    CSV_NAME,
    DEFAULT_DIRECTORY,
    Environment,
    Record,
    describe_environment,
    measured_on,
    read_text,
    write_csv,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from table import bandwidths, comparison, exceptions

_HERE = Path(__file__).resolve().parent
_REPEATS = 7
_QUICK_REPEATS = 3
_JOB_SECONDS = 900
_PEER_PACKAGES = {JAX: ("jax", "optax"), TENSORFLOW: ("tensorflow",)}
WIDTH = 200  # of the table where the output is no terminal


# ---- one job ----


def available_bytes() -> int:
    """What the kernel says that new processes can have."""
    for line in read_text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def split_by_memory(job: Job, available: int) -> tuple[list[str], list[Record]]:
    """The variants that fit in memory, and a record that says so for each that does not."""
    needed = {variant: job.needed_bytes(variant) for variant in job.variants}
    skipped = [
        Record.of(
            job, variant, what, "skipped", f"needs about {size / 1e9:.1f} GB of memory, {available / 1e9:.1f} are free"
        )
        for variant, size in needed.items()
        if size > available
        for what in job.whats
    ]
    return [variant for variant, size in needed.items() if size <= available], skipped


def _environment_of(job: Job) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if job.thp:
        environment["THP_MEM_ALLOC_ENABLE"] = "1"
    return environment


def _interpreter(job: Job, peer_python: str | None) -> str:
    if not set(PEERS) & set(job.variants):
        return sys.executable
    assert peer_python is not None
    return peer_python


def _failure(process: subprocess.CompletedProcess[str]) -> str:
    """Why a process gave no figures; "" if it ended well, and so has no such case."""
    if process.returncode < 0:
        return f"killed by signal {-process.returncode}" + (" (out of memory?)" if process.returncode == -9 else "")
    if process.returncode:
        return f"ended with status {process.returncode}: {(process.stderr.strip().splitlines() or [''])[-1][:300]}"
    return ""


def run_job(job: Job, repeats: int, peer_python: str | None, available: int) -> list[Record]:
    """Runs a job in its process and returns a record for each of its figures, missing ones included."""
    fitting, records = split_by_memory(job, available)
    if not fitting:
        return records
    request = {"case": asdict(job.case), "whats": job.whats, "repeats": repeats, "threads": job.threads}
    request["variants"] = [*fitting, *job.limits]
    command = [_interpreter(job, peer_python), str(_HERE / job.script), json.dumps(request)]
    try:
        process = subprocess.run(
            command, env=_environment_of(job), capture_output=True, text=True, check=False, timeout=_JOB_SECONDS
        )
    except subprocess.TimeoutExpired:
        process = subprocess.CompletedProcess(command, 1, "", f"took more than {_JOB_SECONDS} s")
    measured = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    records += [Record.of(job, **line) for line in measured]
    reason = _failure(process)
    return records + (_missing(job, fitting, records, reason) if reason else [])


def _missing(job: Job, variants: list[str], records: list[Record], reason: str) -> list[Record]:
    """A failure for each figure that the end of the process prevented; not every variant has all."""
    there = {(record.variant, record.what) for record in records}
    begun = {what for _, what in there} - {LOSS, MEMORY}  # which every variant has
    expected = [(variant, what) for variant in variants for what in job.whats if what not in begun]
    return [Record.of(job, *pair, "failed", reason) for pair in expected if pair not in there]


# ---- all jobs ----


def run_jobs(
    jobs: list[Job],
    repeats: int,
    peer_python: str | None,
    console: Console,
    available: Callable[[], int] = available_bytes,
    seconds: float = math.inf,
) -> list[Record]:
    """Runs them one after the other; an interrupt ends it with what has been measured until then.

    Those that would begin after so many seconds are skipped; the figures of the last may come later.
    """
    deadline = time.monotonic() + seconds
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    records = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            if time.monotonic() > deadline:
                pairs = [(variant, what) for variant in job.variants for what in job.whats]
                records += [Record.of(job, *pair, "skipped", f"the {seconds:.0f} s were over") for pair in pairs]
                continue
            description = f"{job.section}, {job.case.name}: {', '.join(job.variants)}"
            progress.update(task, description=description)
            if not console.is_terminal:  # where a bar would show nothing before its end
                console.print(description, highlight=False)
            try:
                records += run_job(job, repeats, peer_python, available())
            except KeyboardInterrupt:
                console.print("interrupted; what follows is incomplete", highlight=False)
                break
            progress.advance(task)
    return records


def peer_versions(python: str) -> dict[str, str]:
    """The versions of the peers' packages that an interpreter has."""
    names = [name for packages in _PEER_PACKAGES.values() for name in packages]
    code = (
        "import importlib.metadata as m, json\n"
        "have = {d.metadata['Name'].lower().replace('-', '_'): d.version for d in m.distributions()}\n"
        "have.setdefault('tensorflow', have.get('tensorflow_cpu', ''))\n"
        f"print(json.dumps({{name: have.get(name, '') for name in {names}}}))"
    )
    process = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return json.loads(process.stdout) if process.returncode == 0 else {}


# ---- the command ----


def count(text: str) -> int:
    """An option of one or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number, 1 or more; got {text!r}")
    return number


def _threads(text: str) -> int:
    number = count(text)
    processors = len(os.sched_getaffinity(0))
    if number > processors:
        raise argparse.ArgumentTypeError(f"needs at most {processors}, the processors that there are; got {text!r}")
    return number


def case_of(known: Iterable[str]) -> Callable[[str], str]:
    """An option that names one of these cases."""

    def case(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"knows no case {text!r}; there are: {', '.join(known)}")
        return text

    return case


def directory(text: str) -> Path:
    """An option that is a directory, made if it is not there."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"needs a directory to write to; {text}: {error.strerror}") from None
    return path


def _peers(text: str) -> tuple[str, dict[str, str]]:
    python = shutil.which(text)
    if python is None:
        raise argparse.ArgumentTypeError(f"needs a Python interpreter; {text!r} cannot be run")
    versions = peer_versions(python)
    if not any(versions.values()):
        raise argparse.ArgumentTypeError(
            f"{text} has neither JAX with optax nor TensorFlow: pip install -r benchmarks/requirements-peers.txt there"
        )
    return python, versions


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; a wrong one ends the program with a sentence and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases, forward and backward only; writes nothing")
    parser.add_argument(
        "--only", nargs="+", type=case_of(CASES), metavar="CASE", help="these cases; writes only to --output"
    )
    parser.add_argument("--peers", type=_peers, metavar="PYTHON", help="an interpreter that has JAX or TensorFlow")
    parser.add_argument("--output", type=directory, metavar="DIR", help=f"default of a full run: {DEFAULT_DIRECTORY}")
    parser.add_argument("--repeats", type=count, help=f"samples (default: {_REPEATS}; quick: {_QUICK_REPEATS})")
    parser.add_argument("--threads", type=_threads, help="default: as many as torch takes")
    options = parser.parse_args(arguments)
    if options.quick and (options.only or options.peers or options.output):
        parser.error("--quick is a fixed choice that writes nothing: it goes with none of --only, --peers, --output")
    if options.repeats is None:
        options.repeats = _QUICK_REPEATS if options.quick else _REPEATS
    if not (options.quick or options.only or options.output):
        options.output = DEFAULT_DIRECTORY
    return options


def _jobs(options: argparse.Namespace, versions: dict[str, str]) -> list[Job]:
    if options.quick:
        return plan_quick(options.threads)
    peers = tuple(peer for peer, names in _PEER_PACKAGES.items() if all(versions.get(name) for name in names))
    jobs = plan(peers, options.threads)
    return [job for job in jobs if not options.only or job.case.name in options.only]


def report(records: list[Record], environment: Environment, threads: int, output: Path | None, console: Console) -> int:
    """Prints the table, writes the files; returns the exit status."""
    console.print(comparison(records))
    for line in [*exceptions(records), *bandwidths(records)]:
        console.print(line, highlight=False, markup=False)
    console.print(f"Measured on {measured_on(environment, threads)}.", highlight=False)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_csv(output / CSV_NAME, records, environment)
        written = [output / CSV_NAME, *plots.draw(output / CSV_NAME)]
        console.print(f"wrote {', '.join(path.name for path in written)} to {output}")
    return 1 if any(record.status in ("WRONG", "failed") for record in records) else 0


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    python, versions = options.peers or (None, {})
    try:
        environment = describe_environment(versions)
    except RuntimeError as error:
        console.print(f"bench.py: {error}", highlight=False, markup=False)
        return 2
    if options.threads is None:
        import torch

        options.threads = torch.get_num_threads()
    records = run_jobs(_jobs(options, versions), options.repeats, python, console)
    if not records:
        console.print("bench.py: nothing was measured")
        return 130
    return report(records, environment, options.threads, options.output, console)


if __name__ == "__main__":
    sys.exit(main())
