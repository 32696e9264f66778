"""The benchmark on a GPU: softmax_ext against eager torch, torch.compile and, where installed, Liger-Kernel and quack.

    make bench-gpu                        all of it
    make bench-gpu BENCH_ARGS=--quick     a few ratios in a minute; writes nothing
    python benchmarks/bench_gpu.py --only 8192x128256-bf16

Every job is a process of its own: one case, whose variants take turns. Each variant's loss and some rows of its
gradient are held against float64 before it is timed; one that is wrong is said to be WRONG and is not timed. The exit
status is 1 where one of softmax_ext's is wrong or fails, 2 where there is no GPU or the CUDA kernels are missing.

Prints a table, bandwidths and which targets are met. A full run, or one with --output, also writes gpu.csv and,
from it, gpu.png.
"""

import argparse
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import gpu_report
import plots
from bench import WIDTH, case_of, count, directory, run_jobs
from cases import LIGER, OURS, QUACK
from gpu_cases import CASES, GpuJob, plan, plan_quick
from results import DEFAULT_DIRECTORY, GpuEnvironment, Record, commit, measured_on, today, write_csv
from rich.console import Console
from table import comparison, exceptions

CSV_NAME = "gpu.csv"
_SAMPLES, _QUICK_SAMPLES = 30, 12
# Of the peers: what is imported, and what was installed.
_PEER_PACKAGES = {LIGER: ("liger_kernel", "liger-kernel"), QUACK: ("quack", "quack-kernels")}


# ---- the GPU ----


def reason_not_to() -> str | None:
    """Why nothing can be measured here, in a sentence."""
    import torch

    from softmax_ext import cuda, ops

    if ops.load_error is not None:
        return ops.load_error
    if not torch.cuda.is_available():
        return f"there is no GPU that torch {torch.__version__} can use; the CPU's benchmark is benchmarks/bench.py."
    return None if cuda.library is not None else f"{cuda.missing}."


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.split("\n")[0].strip()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def peers_here() -> tuple[str, ...]:
    """Which of the peers can be imported."""
    return tuple(peer for peer, (module, _) in _PEER_PACKAGES.items() if importlib.util.find_spec(module))


def describe_gpu() -> GpuEnvironment:
    """The first GPU and what is installed."""
    import torch

    import softmax_ext
    from softmax_ext import cuda

    properties = torch.cuda.get_device_properties(0)
    return GpuEnvironment(
        gpu=properties.name,
        memory_gib=round(properties.total_memory / 2**30, 1),
        driver=_driver(),
        cuda=torch.version.cuda or "",
        architectures=cuda.architectures(),
        python=platform.python_version(),
        torch=torch.__version__,
        softmax_ext=softmax_ext.__version__,
        triton=_version("triton"),
        **{peer: _version(distribution) for peer, (_, distribution) in _PEER_PACKAGES.items()},
        commit=commit(),
        date=today(),
    )


def free_bytes() -> int:
    """Of the first GPU's memory."""
    import torch

    return torch.cuda.mem_get_info(0)[0]


def _l2_bytes() -> int:
    import torch

    return torch.cuda.get_device_properties(0).L2_cache_size


# ---- the command ----


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; a wrong one ends the program with a sentence and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases, forward and backward only; writes nothing")
    parser.add_argument(
        "--only", nargs="+", type=case_of(CASES), metavar="CASE", help="these cases; writes only to --output"
    )
    parser.add_argument("--output", type=directory, metavar="DIR", help=f"default of a full run: {DEFAULT_DIRECTORY}")
    parser.add_argument("--samples", type=count, help=f"at least (default: {_SAMPLES}; quick: {_QUICK_SAMPLES})")
    parser.add_argument("--seconds", type=count, metavar="N", help="begin no case later than that; skip the rest")
    options = parser.parse_args(arguments)
    if options.quick and (options.only or options.output):
        parser.error("--quick is a fixed choice that writes nothing: it goes with neither --only nor --output")
    if options.samples is None:
        options.samples = _QUICK_SAMPLES if options.quick else _SAMPLES
    if not (options.quick or options.only or options.output):
        options.output = DEFAULT_DIRECTORY
    return options


def _jobs(options: argparse.Namespace, l2_bytes: int) -> list[GpuJob]:
    if options.quick:
        return plan_quick(peers_here(), l2_bytes)
    return plan(peers_here(), l2_bytes, options.only)


def report(records: list[Record], environment: GpuEnvironment, output: Path | None, console: Console) -> int:
    """Prints the tables, writes the files; returns the exit status."""
    console.print(comparison(records))
    console.print(gpu_report.bandwidths(records))
    for line in exceptions(records):
        console.print(line, highlight=False, markup=False)
    for peer, (_, distribution) in _PEER_PACKAGES.items():
        if not getattr(environment, peer):
            console.print(f"{peer}: {distribution} is not installed", highlight=False)
    console.print(gpu_report.targets(records))
    console.print(f"Measured on {measured_on(environment, 1)}.", highlight=False)
    if output is not None:
        write_csv(output / CSV_NAME, records, environment)
        written = [output / CSV_NAME, *plots.draw(output / CSV_NAME)]
        console.print(f"wrote {', '.join(path.name for path in written)} to {output}")
    return 1 if any(record.status in ("WRONG", "failed") and record.variant in OURS for record in records) else 0


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    reason = reason_not_to()
    if reason is not None:
        print(f"bench_gpu.py: {reason}", file=sys.stderr)
        return 2
    jobs = _jobs(options, _l2_bytes())
    records = run_jobs(jobs, options.samples, None, console, free_bytes, options.seconds or float("inf"))
    if not any(record.median for record in records):
        console.print(*exceptions(records), "bench_gpu.py: nothing was measured", sep="\n", highlight=False)
        return 1
    return report(records, describe_gpu(), options.output, console)


if __name__ == "__main__":
    sys.exit(main())
