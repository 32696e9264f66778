"""The benchmark: softmax_ext against eager torch, torch.compile and, where installed, other libraries.

    make bench                       all of it; PEERS=1: with JAX and TensorFlow, in an environment of their own
    make bench-linear                linear cross entropy alone
    make bench-quick                 a few ratios in a minute; writes nothing
    make bench-gpu                   on a GPU; with Liger-Kernel, quack and Cut Cross-Entropy where they are installed
    python benchmarks/bench.py --only 4096x32000-f32

A job is one case, whose variants take turns: on the CPU in a process of its own, on a GPU in one that does many. Each
variant's loss and gradient are held against float64 before it is timed; one that is wrong is said to be WRONG and is
not timed. Exit status: 1 where one is wrong or failed, 2 where nothing can be measured here.

Prints tables. A full run, or one with --output, also writes results.csv and linear.csv (gpu.csv and gpu_linear.csv),
and from them the pictures.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cases
import plots
import report
import results
from cases import Job
from results import DEFAULT_DIRECTORY, Environment, Record
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_REPEATS = {cases.CPU: 7, cases.CUDA: 30}
_LINEAR_REPEATS = 5
_QUICK_REPEATS = {cases.CPU: 3, cases.CUDA: 12}
_JOB_SECONDS = 900
_PEERS = {cases.JAX: ("jax", "optax"), cases.TENSORFLOW: ("tensorflow",)}
_CSV_NAMES = {cases.CPU: (results.CSV_NAME, "linear.csv"), cases.CUDA: ("gpu.csv", "gpu_linear.csv")}
WIDTH = 200  # of the tables where the output is no terminal


# ---- one job ----


def cpu_bytes() -> int:
    """What the kernel says that new processes can have."""
    for line in results.read_text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gpu_bytes() -> int:
    """What is free of the first GPU's memory."""
    import torch

    return torch.cuda.mem_get_info(0)[0]


def gpu_l2_bytes() -> int:
    """Of the first GPU's cache."""
    import torch

    return torch.cuda.get_device_properties(0).L2_cache_size


def cpu_threads() -> int:
    """As many as torch takes."""
    import torch

    return torch.get_num_threads()


def split_by_memory(job: Job, available: int) -> tuple[list[str], list[Record]]:
    """The variants that fit in memory, and a record that says so for each that does not."""
    fitting, skipped = [], []
    for variant in job.variants:
        size = job.needed_bytes(variant)
        if size <= available:
            fitting.append(variant)
        else:
            note = f"needs about {size / 1e9:.1f} GB of memory, {available / 1e9:.1f} are free"
            skipped += [Record.of(job, variant, what, "skipped", note) for what in job.whats]
    return fitting, skipped


class Worker:
    """A process that answers one request after the other, until it is closed or dies."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.command, self._expired = command, False
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process is
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def ask(self, request: dict[str, Any], seconds: float = _JOB_SECONDS) -> tuple[list[dict[str, Any]], str]:
        """What it says of a request, and why it says no more; "" if that is all."""
        timer = threading.Timer(seconds, self._expire)
        timer.start()
        said = []
        try:
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith("{}"):
                    return said, ""
                if line.startswith("{"):
                    said.append(json.loads(line))
        finally:
            timer.cancel()
        return said, f"took more than {seconds} s" if self._expired else self._failure()

    def _expire(self) -> None:
        self._expired = True
        self._process.kill()

    def _failure(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        self._errors.seek(0)
        return f"ended with status {code}: {(self._errors.read().strip().splitlines() or [''])[-1][:300]}"

    @property
    def lives(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends it."""
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def command_of(job: Job, peer_python: str | None) -> list[str]:
    """What starts the process that does a job."""
    return [peer_python if peer_python and set(cases.PEERS) & set(job.variants) else sys.executable, "-m", job.worker]


def _environment_of(job: Job) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    paths = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(paths)} | ({"THP_MEM_ALLOC_ENABLE": "1"} if job.thp else {})


class Bench:
    """Does jobs, and makes a record for each of their figures, missing ones included."""

    def __init__(self, repeats: int | None = None, peer_python: str | None = None):
        self.repeats, self.peer_python = repeats, peer_python
        self._worker: Worker | None = None

    def do(self, job: Job) -> list[Record]:
        """A job."""
        fitting, records = split_by_memory(job, gpu_bytes() if job.device == cases.CUDA else cpu_bytes())
        if not fitting:
            return records
        repeats = self.repeats or (_LINEAR_REPEATS if job.op == cases.LINEAR else _REPEATS[job.device])
        request = {name: getattr(job, name) for name in ("whats", "threads", "device", "copies")}
        request |= {"case": asdict(job.case), "variants": [*fitting, *job.limits], "repeats": repeats}
        said, reason = self._worker_for(job).ask(request)
        if job.device == cases.CPU:
            self.close()
        records += [Record.of(job, **line) for line in said]
        return records + (_missing(job, fitting, records, reason) if reason else [])

    def _worker_for(self, job: Job) -> Worker:
        """On a GPU the one that there is, if it is of the same kind."""
        command = command_of(job, self.peer_python)
        if not (self._worker and self._worker.command == command and self._worker.lives):
            self.close()
            self._worker = Worker(command, _environment_of(job))
        return self._worker

    def close(self) -> None:
        """Ends its process."""
        if self._worker:
            self._worker.close()
        self._worker = None


def _missing(job: Job, variants: list[str], records: list[Record], reason: str) -> list[Record]:
    """A failure for each figure that the end of the process prevented; not every variant has all."""
    there = {(record.variant, record.what) for record in records}
    begun = {what for _, what in there} - {cases.LOSS, cases.MEMORY}  # which every variant has
    expected = [(variant, what) for variant in variants for what in job.whats if what not in begun]
    return [Record.of(job, *pair, "failed", reason) for pair in expected if pair not in there]


def do_all(jobs: list[Job], bench: Bench, console: Console, seconds: float = math.inf) -> list[Record]:
    """Does them one after the other; an interrupt ends it with what has been measured until then.

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
                records += bench.do(job)
            except KeyboardInterrupt:
                console.print("interrupted; what follows is incomplete", highlight=False)
                break
            progress.advance(task)
    bench.close()
    return records


# ---- the command ----


def peer_versions(python: str) -> dict[str, str]:
    """The versions of the peers' packages that an interpreter has."""
    names = [name for packages in _PEERS.values() for name in packages]
    code = (
        "import importlib.metadata as m, json\n"
        "have = {d.metadata['Name'].lower().replace('-', '_'): d.version for d in m.distributions()}\n"
        "have.setdefault('tensorflow', have.get('tensorflow_cpu', ''))\n"
        f"print(json.dumps({{name: have.get(name, '') for name in {names}}}))"
    )
    process = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return json.loads(process.stdout) if process.returncode == 0 else {}


def _count(text: str) -> int:
    """An option of one or more."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number, 1 or more; got {text!r}")
    return number


def _threads(text: str) -> int:
    number = _count(text)
    processors = len(os.sched_getaffinity(0))
    if number > processors:
        raise argparse.ArgumentTypeError(f"needs at most {processors}, the processors that there are; got {text!r}")
    return number


def _directory(text: str) -> Path:
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"needs a directory to write to; {text}: {error.strerror}") from None
    return Path(text)


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
    add = parser.add_argument
    add("--device", choices=[cases.CPU, cases.CUDA], default=cases.CPU, help="default: %(default)s")
    add("--op", nargs="+", choices=cases.OPS, default=cases.OPS, help="these operators (default: all)")
    add("--quick", action="store_true", help="a few cases, forward and backward only; writes nothing")
    add("--only", nargs="+", metavar="CASE", help="these cases; writes only to --output")
    add("--peers", type=_peers, metavar="PYTHON", help="an interpreter that has JAX or TensorFlow; on the CPU")
    add("--output", type=_directory, metavar="DIR", help=f"default of a full run: {DEFAULT_DIRECTORY}")
    add("--repeats", type=_count, help="samples of each variant (default: as the device and the operator need)")
    add("--threads", type=_threads, help="default: as many as torch takes; on the CPU")
    add("--seconds", type=_count, metavar="N", default=math.inf, help="begin no case later than that; skip the rest")
    options = parser.parse_args(arguments)
    if options.quick and (options.op != cases.OPS or options.only or options.peers or options.output):
        parser.error(
            "--quick is a fixed choice that writes nothing: it goes with none of --op, --only, --peers, --output"
        )
    if options.device == cases.CUDA and (options.peers or options.threads):
        parser.error("--peers and --threads are for --device cpu: on a GPU the peers are those of this interpreter")
    known = dict.fromkeys(job.case.name for job in cases.plan(options.device) if job.op in options.op)
    for name in options.only or []:
        if name not in known:
            parser.error(f"--only knows no case {name!r}; there are: {', '.join(known)}")
    if options.quick and options.repeats is None:
        options.repeats = _QUICK_REPEATS[options.device]
    if options.output is None and not (options.quick or options.only):
        options.output = DEFAULT_DIRECTORY
    return options


def jobs_of(options: argparse.Namespace, versions: dict[str, str]) -> list[Job]:
    """What the options ask for; on a GPU the large copy too, which others are measured by."""
    if options.device == cases.CUDA:
        peers, l2_bytes = results.gpu_peers(), gpu_l2_bytes()
    else:
        peers, l2_bytes = tuple(peer for peer in _PEERS if all(versions.get(name) for name in _PEERS[peer])), 0
    jobs = (cases.plan_quick if options.quick else cases.plan)(options.device, peers, options.threads, l2_bytes)
    names = options.only and {*options.only, cases.LARGE_COPY.name}
    return [job for job in jobs if job.op in options.op and (not names or job.case.name in names)]


def write(records: list[Record], environment: Environment, options: argparse.Namespace, console: Console) -> None:
    """The files of which all was measured; where a directory was named, all."""
    others = set(cases.OPS) - {cases.LINEAR}
    for name, ops in zip(_CSV_NAMES[options.device], (others, {cases.LINEAR}), strict=True):
        path = options.output / name
        found = [record for record in records if report.of_linear(record) == (cases.LINEAR in ops)]
        if found and (ops <= set(options.op) or options.output != DEFAULT_DIRECTORY):
            results.write_csv(path, found, environment)
            written = [path, *plots.draw(path)]
            console.print(f"wrote {', '.join(file.name for file in written)} to {options.output}")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    python, versions = options.peers or (None, {})
    try:
        environment = results.describe_gpu() if options.device == cases.CUDA else results.describe_cpu(versions)
    except RuntimeError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    options.threads = options.threads or cpu_threads()
    records = do_all(jobs_of(options, versions), Bench(options.repeats, python), console, options.seconds)
    if not any(record.median for record in records):
        console.print(*report.exceptions(records), "bench.py: nothing was measured", sep="\n", highlight=False)
        return 1
    report.print_all(records, environment, console)
    if options.output is not None:
        write(records, environment, options, console)
    return 1 if any(record.status in ("WRONG", "failed") for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
