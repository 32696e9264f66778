"""Writes the tables of the results into README.md, each between two comments; ``--check`` only compares.

python benchmarks/readme.py                  after make bench and make bench-linear
python benchmarks/readme.py --part linear    one of them
python benchmarks/readme.py --check          status 1 if README.md says something else than the results
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cases
from report import figure, ratio_cell
from results import CSV_NAME, DEFAULT_DIRECTORY, Environment, Figures, Record, measured_on, read_csv

PAGE = Path(__file__).resolve().parents[1] / "README.md"
RESULTS = DEFAULT_DIRECTORY


def _markdown(head: list[str], rows: list[list[str]], figures: Figures, environment: Environment) -> list[str]:
    """The table, and what it was measured on."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    threads = figures.records[0].threads
    return [*(f"| {' | '.join(cells)} |" for cells in lines), "", f"Measured on {measured_on(environment, threads)}."]


def _slashed(values: list[float | None], form: str) -> str:
    return " / ".join("-" if value is None else form.format(value) for value in values)


def table_block(records: list[Record], environment: Environment, directory: str) -> str:
    """Of results.csv; ``directory`` is where the pictures are, from README.md."""
    figures = Figures(records, cases.TABLE_SECTION)
    if not figures.records:
        raise ValueError("the results hold none of the table's cases; run make bench.")
    peers = [peer for peer in cases.PEERS if any(record.variant == peer for record in figures.records)]
    variants = [cases.EAGER, cases.COMPILE, *peers, cases.DEFAULT, cases.INPLACE, cases.MUL]
    head = ["logits", *variants[:-1], "limit"]
    head += ["default: x less", "in place: x less", "MiB: eager / default / in place"]
    rows = []
    for case in figures.cases:
        row = [case, *(figure(figures.median(case, cases.LOSS, name)) for name in variants)]
        for name in (cases.DEFAULT, cases.INPLACE):
            ratios = [ratio_cell(figures, case, cases.LOSS, slower, name) for slower in (cases.EAGER, cases.COMPILE)]
            row.append(" / ".join(ratio or "-" for ratio in ratios))
        memory = [figures.median(case, cases.MEMORY, name) for name in (cases.EAGER, cases.DEFAULT, cases.INPLACE)]
        rows.append([*row, _slashed(memory, "{:.0f}")])
    picture = f"![Time and memory against the vocabulary size]({directory}/vocabulary.png)"
    return "\n".join([*_markdown(head, rows, figures, environment), "", picture])


def linear_block(records: list[Record], environment: Environment, directory: str) -> str:
    """Of linear.csv."""
    figures = Figures(records, cases.LINEAR_SECTION)
    if not figures.records:
        raise ValueError("the results hold none of the cases; run make bench-linear.")
    others = (cases.EAGER, cases.COMPILE, cases.CHUNKED)
    there = {record.variant for record in figures.records}
    ours = [name for name in cases.OURS_OF_LINEAR if name in there]
    head = ["rows x width x classes", *others, "softmax_ext", *ours[1:], "x less"]
    rows = []
    for case in figures.cases:
        row = [case, *(figure(figures.median(case, cases.LOSS, name)) or "-" for name in (*others, *ours))]
        row.append(_slashed([figures.ratio(case, cases.LOSS, name, cases.DEFAULT) for name in others], "{:.2f}"))
        memory = [figures.median(case, cases.MEMORY, name) for name in (*others, *ours)]
        rows.append([*row, _slashed(memory, "{:.0f}")])
    lines = _markdown([*head, "MiB beyond the gradients"], rows, figures, environment)
    if any(record.section == cases.LINEAR_VOCABULARY_SECTION for record in records):
        lines += ["", f"![Time and memory against the vocabulary size]({directory}/linear.png)"]
    return "\n".join(lines)


class Part(NamedTuple):
    """What stands between two comments, and of which file."""

    csv: str
    write: Callable[[list[Record], Environment, str], str]

    @property
    def begin(self) -> str:
        """The comment before it."""
        return f"<!-- written by benchmarks/readme.py from benchmarks/results/{self.csv} -->"

    @property
    def end(self) -> str:
        """The comment behind it."""
        return f"<!-- end of {self.csv} -->"


PARTS = {"table": Part(CSV_NAME, table_block), "linear": Part("linear.csv", linear_block)}


def between(text: str, begin: str, end: str, new: str) -> str:
    """The text with what is between the two comments replaced."""
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"there are no lines {begin!r} and {end!r} to write between.")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if README.md is not up to date")
    parser.add_argument("--part", choices=PARTS, help="one of the tables (default: all)")
    options = parser.parse_args(arguments)
    try:
        old = new = PAGE.read_text()
        directory = os.path.relpath(RESULTS, PAGE.parent)
        for part in [PARTS[options.part]] if options.part else PARTS.values():
            records, environment = read_csv(RESULTS / part.csv)
            new = between(new, part.begin, part.end, part.write(records, environment, directory))
    except (OSError, ValueError) as error:
        print(f"readme.py: {error}", file=sys.stderr)
        return 2
    if options.check:
        print("README.md is up to date" if old == new else "README.md is not; run python benchmarks/readme.py")
        return 0 if old == new else 1
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
