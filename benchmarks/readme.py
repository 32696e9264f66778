"""Writes the table of a results.csv into README.md, between two comments; ``--check`` only says whether it is there.

python benchmarks/readme.py            after make bench
python benchmarks/readme.py --check    status 1 if README.md says something else than results.csv
"""

import argparse
import os
import sys
from pathlib import Path

from cases import COMPILE, DEFAULT, EAGER, INPLACE, LOSS, MEMORY, MUL, PEERS
from results import CSV_NAME, DEFAULT_DIRECTORY, Environment, Figures, Record, measured_on, read_csv
from table import figure, ratio_cell

_README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- benchmarks: written by benchmarks/readme.py from benchmarks/results/results.csv -->"
END = "<!-- end of benchmarks -->"
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


def block(records: list[Record], environment: Environment, picture: str) -> str:
    """What stands between the comments; ``picture`` is its path from README.md."""
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
    return "\n".join([*lines, "", f"![Time and memory against the vocabulary size]({picture})"])


def with_block(text: str, new: str) -> str:
    """The text with what is between the comments replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no lines {BEGIN!r} and {END!r}.")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if README.md is not up to date")
    parser.add_argument("--csv", type=Path, default=DEFAULT_DIRECTORY / CSV_NAME, help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=_README, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        records, environment = read_csv(options.csv)
        old = options.readme.read_text()
        picture = os.path.relpath(options.csv.with_name("vocabulary.png"), options.readme.parent)
        new = with_block(old, block(records, environment, picture))
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
