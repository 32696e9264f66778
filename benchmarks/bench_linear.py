"""The benchmark of linear cross entropy: against F.linear + F.cross_entropy, torch.compile of it, and torch's chunks.

    make bench-linear
    python benchmarks/bench_linear.py --only 2048x768x50257-f32
    python benchmarks/bench_linear.py --gpu      with Liger-Kernel and Cut Cross-Entropy where they are installed

Prints a table; a full run, or one with --output, writes linear.csv and linear.png (gpu_linear.csv and .png). Every job
is a process of its own, whose variants take turns and are held against float64 first.
"""

import argparse
import sys
from pathlib import Path

import plots
from bench import WIDTH, available_bytes, case_of, count, directory, run_jobs
from bench_gpu import describe_gpu, free_bytes, reason_not_to
from cases import DEFAULT, LOSS, MEMORY
from linear_cases import CASES, GPU_VARIANTS, plan
from results import DEFAULT_DIRECTORY, Figures, Record, describe_environment, measured_on, write_csv
from rich.console import Console
from rich.table import Table
from table import exceptions, figure

CSV_NAMES = {False: "linear.csv", True: "gpu_linear.csv"}  # by whether on a GPU
_REPEATS = 5


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; a wrong one ends the program with a sentence and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", type=case_of(CASES), metavar="CASE", help="these cases; writes only to --output"
    )
    parser.add_argument("--output", type=directory, metavar="DIR", help=f"default of a full run: {DEFAULT_DIRECTORY}")
    parser.add_argument("--gpu", action="store_true", help="on a GPU")
    parser.add_argument("--seconds", type=count, metavar="N", help="begin no case later than that; skip the rest")
    parser.add_argument("--repeats", type=count, default=_REPEATS, help="samples, at most (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not (options.only or options.output):
        options.output = DEFAULT_DIRECTORY
    return options


def comparison(records: list[Record]) -> Table:
    """A line for each case: times, how many times faster, memory."""
    table = Table(title="medians; time in ms; memory in MiB beyond operands and gradients")
    there = {record.variant for record in records}
    variants = [name for name in GPU_VARIANTS if name in there]
    others = [name for name in variants if name != DEFAULT]
    for head in ("case", *variants, *(f"{name}/ours" for name in others), *(f"{name}, MiB" for name in variants)):
        table.add_column(head, justify="left" if head == "case" else "right")
    for section in dict.fromkeys(record.section for record in records):
        figures = Figures(records, section)
        for case in dict.fromkeys(record.case for record in figures.records):
            cells = [figures.median(case, LOSS, name) for name in variants]
            cells += [figures.ratio(case, LOSS, name, DEFAULT) for name in others]
            cells += [figures.median(case, MEMORY, name) for name in variants]
            table.add_row(case, *("" if value is None else figure(value) for value in cells))
    return table


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        reason = reason_not_to() if options.gpu else None
        if reason is not None:
            raise RuntimeError(reason)
        environment = describe_gpu() if options.gpu else describe_environment({})
    except RuntimeError as error:
        print(f"bench_linear.py: {error}", file=sys.stderr)
        return 2
    import torch

    threads = torch.get_num_threads()
    jobs = [job for job in plan(threads, options.gpu) if not options.only or job.case.name in options.only]
    available = free_bytes if options.gpu else available_bytes
    records = run_jobs(jobs, options.repeats, None, console, available, options.seconds or float("inf"))
    console.print(comparison(records))
    for line in exceptions(records):
        console.print(line, highlight=False, markup=False)
    console.print(f"Measured on {measured_on(environment, threads)}.", highlight=False)
    if options.output is not None:
        path: Path = options.output / CSV_NAMES[options.gpu]
        write_csv(path, records, environment)
        written = [path, *plots.draw(path)]
        console.print(f"wrote {', '.join(file.name for file in written)} to {options.output}")
    return 1 if any(record.status in ("WRONG", "failed") and record.variant == DEFAULT for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
