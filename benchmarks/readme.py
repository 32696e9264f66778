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

from cases import COMPILE, DEFAULT, EAGER, INPLACE, LOSS, MEMORY, MUL, PEERS
from linear_cases import CHUNKED, SECTION, VOCABULARY_SECTION
from results import CSV_NAME, DEFAULT_DIRECTORY, Environment, Figures, Record, measured_on, read_csv
from table import figure, ratio_cell

_README = Path(__file__).resolve().parents[1] / "README.md"
_NAMES = {EAGER: "eager", COMPILE: "compile", DEFAULT: "default", INPLACE: "in place", MUL: "limit"}


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(figures: Figures, case: str, what: str, variant: str) -> str:
    value = figures.median(case, what, variant)
    return "" if value is None else figure(value)


def _ratios(figures: Figures, case: str, variant: str) -> str:
    """Against eager and against torch.compile."""
    parts = [ratio_cell(figures, case, LOSS, slower, variant) or "-" for slower in (EAGER, COMPILE)]
    return " / ".join(parts)


def _memory(figures: Figures, case: str) -> str:
    """MiB, eager -> default -> in place."""
    cells = []
    for variant in (EAGER, DEFAULT, INPLACE):
        value = figures.median(case, MEMORY, variant)
        cells.append("-" if value is None else f"{value:.0f}")
    return " / ".join(cells)


def table_block(records: list[Record], environment: Environment, directory: str) -> str:
    """Of results.csv; ``directory`` is where the pictures are, from README.md."""
    figures = Figures(records, "table")
    if not figures.records:
        raise ValueError("the results hold none of the table's cases; run make bench.")
    peers = [peer for peer in PEERS if any(record.variant == peer for record in figures.records)]
    variants = [EAGER, COMPILE, *peers, DEFAULT, INPLACE, MUL]
    head = ["logits", *(_NAMES.get(name, name) for name in variants)]
    head += ["default: x less", "in place: x less", "MiB: eager / default / in place"]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for case in dict.fromkeys(record.case for record in figures.records):
        cells = [_cell(figures, case, LOSS, variant) for variant in variants]
        ratios = [_ratios(figures, case, variant) for variant in (DEFAULT, INPLACE)]
        lines.append(_line([case, *cells, *ratios, _memory(figures, case)]))
    threads = figures.records[0].threads
    lines += ["", f"Measured on {measured_on(environment, threads)}."]
    return "\n".join([*lines, "", f"![Time and memory against the vocabulary size]({directory}/vocabulary.png)"])


def linear_block(records: list[Record], environment: Environment, directory: str) -> str:
    """Of linear.csv."""
    figures = Figures(records, SECTION)
    if not figures.records:
        raise ValueError("the results hold none of the cases; run make bench-linear.")
    others = (EAGER, COMPILE, CHUNKED)
    head = ["rows x width x classes", *(_NAMES.get(name, name) for name in others), "softmax_ext", "x less"]
    lines = [_line([*head, "MiB beyond the gradients"]), _line(["---", *["---:"] * len(head)])]
    for case in dict.fromkeys(record.case for record in figures.records):
        cells = [_cell(figures, case, LOSS, variant) or "-" for variant in (*others, DEFAULT)]
        ratios = [figures.ratio(case, LOSS, name, DEFAULT) for name in others]
        memory = [figures.median(case, MEMORY, name) for name in (*others, DEFAULT)]
        cells.append(" / ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
        lines.append(_line([case, *cells, " / ".join("-" if m is None else f"{m:.0f}" for m in memory)]))
    lines += ["", f"Measured on {measured_on(environment, figures.records[0].threads)}."]
    if any(record.section == VOCABULARY_SECTION for record in records):
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


def with_block(text: str, part: Part, new: str) -> str:
    """The text with what is between the part's comments replaced."""
    before, begin, rest = text.partition(part.begin)
    _, end, after = rest.partition(part.end)
    if not (begin and end):
        raise ValueError(f"the page has no lines {part.begin!r} and {part.end!r}.")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if README.md is not up to date")
    parser.add_argument("--part", choices=PARTS, help="one of the tables (default: all)")
    parser.add_argument("--results", type=Path, default=DEFAULT_DIRECTORY, help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=_README, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        old = new = options.readme.read_text()
        directory = os.path.relpath(options.results, options.readme.parent)
        for name in [options.part] if options.part else PARTS:
            records, environment = read_csv(options.results / PARTS[name].csv)
            new = with_block(new, PARTS[name], PARTS[name].write(records, environment, directory))
    except (OSError, ValueError) as error:
        print(f"readme.py: {error}", file=sys.stderr)
        return 2
    if options.check:
        print("README.md is up to date" if old == new else "README.md is not; run python benchmarks/readme.py")
        return 0 if old == new else 1
    options.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
