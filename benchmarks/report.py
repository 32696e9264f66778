"""The report on the terminal: tables of what was measured, and under them what was not and why.

Of a GPU also bandwidths, and which targets are met. A bandwidth counts what a strategy has to move: the default reads
the logits twice and writes the gradient once, precompute reads once and writes once, forward alone reads once. A
precomputed gradient that is multiplied afterwards is read and written again. Softmax reads and writes; its backward
reads output and gradient and writes. The measure is what copy_ moves on this
card in the same run, read and written bytes together.
"""

from typing import NamedTuple

import cases
from results import GPU_PACKAGES, OK, Environment, Figures, Record, measured_on, of_gpu
from rich.console import Console
from rich.table import Table

_RATIOS = [
    *((cases.EAGER, cases.DEFAULT), (cases.COMPILE, cases.DEFAULT), (cases.QUACK, cases.DEFAULT)),
    *((cases.EAGER, cases.INPLACE), (cases.COMPILE, cases.INPLACE), (cases.LIGER, cases.INPLACE)),
]
_LEAST_MEMORY_MIB = 1.0  # below, a ratio of memory says nothing
# How many times the logits' bytes are moved.
_PASSES = {
    cases.LOSS: {cases.DEFAULT: 3, cases.PRECOMPUTE: 2, cases.INPLACE: 2, cases.COPY: 2, cases.MUL: 2},
    cases.SCALED: {cases.DEFAULT: 3, cases.PRECOMPUTE: 4, cases.INPLACE: 4, cases.COPY: 2},
    cases.FORWARD: {cases.DEFAULT: 1, cases.SUM: 1},
    cases.SOFTMAX: {cases.DEFAULT: 5},
    cases.LOG_SOFTMAX: {cases.DEFAULT: 5},
}


def figure(value: float | None) -> str:
    """Three digits, or all before the point; empty where there is none."""
    if value is None:
        return ""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.0995 else f"{value:.3f}"


def ratio_cell(figures: Figures, case: str, what: str, slower: str, faster: str) -> str:
    """A ratio to one decimal; empty where there is none or where it would be of next to nothing."""
    ratio = figures.ratio(case, what, slower, faster)
    if ratio is None or (what == cases.MEMORY and figures.median(case, what, faster) < _LEAST_MEMORY_MIB):
        return ""
    return f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:.0f}"


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if record.median is None:
        return f"[red]{record.status}[/]" if record.status == "WRONG" else record.status
    return figure(record.median)


def _table(title: str, columns: list[str], left: tuple[str, ...] = ("case", "what")) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


# ---- times and memory ----


def _limit_cells(figures: Figures, case: str, what: str) -> list[str]:
    """The limit and how many times as much softmax_ext takes: in place, which reads and writes; or reading alone."""
    ours = cases.DEFAULT if what == cases.FORWARD else cases.INPLACE
    for limit in cases.LIMITS.get(what, ()):
        record = figures.record(case, what, limit)
        if record:
            return [f"{_cell(record)} {limit}", ratio_cell(figures, case, what, ours, limit)]
    return ["", ""]


def comparison(records: list[Record]) -> Table:
    """A line for each case and what, the variants that there are in columns, then the ratios of their medians."""
    there = {record.variant for record in records}
    variants = [
        name for name in (cases.EAGER, cases.COMPILE, *cases.PEERS, *cases.GPU_PEERS, *cases.OURS) if name in there
    ]
    ratios = [pair for pair in _RATIOS if there.issuperset(pair)]
    columns = ["case", "what", *variants, "limit", "ours\n/ limit"]
    columns += [f"{slower}\n/ {faster}" for slower, faster in ratios]
    title = "medians; time in ms, memory in MiB beyond the logits; ratios: how many times as much"
    table = _table(title, columns)
    for section in dict.fromkeys(record.section for record in records):
        table.add_section()
        table.add_row(f"[bold]{section}[/]")
        figures = Figures(records, section)
        shown = ""
        for case, what in figures.pairs():
            medians = [_cell(figures.record(case, what, variant)) for variant in variants]
            quotients = [ratio_cell(figures, case, what, *pair) for pair in ratios]
            cells = [*medians, *_limit_cells(figures, case, what), *quotients]
            table.add_row(case if case != shown else "", what, *cells)
            shown = case
    return table


def of_linear(record: Record) -> bool:
    """Whether it is of linear cross entropy, which has a table and a file of its own."""
    return record.section in (cases.LINEAR_SECTION, cases.LINEAR_VOCABULARY_SECTION)


def linear_comparison(records: list[Record]) -> Table:
    """A line for each case: times, how many times faster, memory."""
    there = {record.variant for record in records}
    variants = [name for name in cases.LINEAR_VARIANTS[cases.CUDA] if name in there]
    others = [name for name in variants if name not in cases.OURS_OF_LINEAR]
    columns = ["case", *variants, *(f"{name}/ours" for name in others), *(f"{name}, MiB" for name in variants)]
    table = _table("medians; time in ms; memory in MiB beyond operands and gradients", columns)
    for section in dict.fromkeys(record.section for record in records):
        figures = Figures(records, section)
        for case in figures.cases:
            cells = [figures.median(case, cases.LOSS, name) for name in variants]
            cells += [figures.ratio(case, cases.LOSS, name, cases.DEFAULT) for name in others]
            cells += [figures.median(case, cases.MEMORY, name) for name in variants]
            table.add_row(case, *map(figure, cells))
    return table


def exceptions(records: list[Record]) -> list[str]:
    """A sentence for each figure that is missing or wrong; the same ones of several whats once."""
    return list(
        dict.fromkeys(
            f"{record.section}, {record.case}, {record.variant}: {record.status}: {record.note}"
            for record in records
            if record.status != OK
        )
    )


# ---- bandwidths ----


def bytes_per_second(record: Record | None) -> float | None:
    """What a variant moves; None where it has no figure or no count of bytes."""
    if record is None or not record.median or record.variant not in _PASSES.get(record.what, {}):
        return None
    return _PASSES[record.what][record.variant] * record.logits_mib * cases.MIB / (record.median / 1e3)


def limit_lines(records: list[Record]) -> list[str]:
    """What the CPU's limits come to, each where the logits are largest."""
    lines = []
    for limit in (cases.MUL, cases.SUM):
        timed = [record for record in records if record.variant == limit and record.median]
        if timed:
            largest = max(timed, key=lambda record: (record.logits_mib, record.threads))
            rate = bytes_per_second(largest) / 1e9
            lines.append(f"{limit} moves {rate:.1f} GB/s ({largest.case}, {largest.threads} threads)")
    return lines


def copy_bandwidth(records: list[Record]) -> float | None:
    """Bytes a second of the large copy_, those read and those written; None if it was not measured."""
    return bytes_per_second(next((record for record in records if record.section == cases.COPY_SECTION), None))


def bandwidths(records: list[Record]) -> Table:
    """On a GPU, for each case and what: GB/s and the share of the copy's."""
    copy = copy_bandwidth(records)
    title = "GB/s by the bytes that have to be moved"
    if copy:
        title += f"; of {copy / 1e9:.0f} GB/s, which copy_ of 2 GiB moves"
    table = _table(title, ["case", "what", *cases.OURS])
    figures = Figures(records, cases.GPU_SECTION)
    shown = ""
    for case, what in figures.pairs():
        rates = [bytes_per_second(figures.record(case, what, variant)) for variant in cases.OURS]
        if any(rates):
            table.add_row(case if case != shown else "", what, *(_rate_cell(rate, copy) for rate in rates))
            shown = case
    return table


def _rate_cell(rate: float | None, copy: float | None) -> str:
    if rate is None:
        return ""
    return f"{rate / 1e9:.0f}" + (f" ({rate / copy:.0%})" if copy else "")


# ---- targets ----

_LONG, _SHORT, _ONE = "C >= 32000", "C of 10 to 1000", "2048 x 32000"
TARGET_CASES = {
    _LONG: [case.name for case in cases.GPU_TABLE if case.classes >= 32000],
    _SHORT: [case.name for case in cases.GPU_TABLE if case.classes <= 1000],
    _ONE: [case.name for case in cases.GPU_TABLE if (case.rows, case.classes) == (2048, 32000)],
}


class Target(NamedTuple):
    """What the loss, forward and backward, should reach in each of some cases."""

    variant: str
    which: str  # of TARGET_CASES
    than: str  # so many times as fast as this; as COPY: the share of its bandwidth
    least: float

    def value(self, figures: Figures, case: str, copy: float | None) -> float | None:
        """What it reaches; None where something that this needs was not measured."""
        if self.than != cases.COPY:
            return figures.ratio(case, cases.LOSS, self.than, self.variant)
        rate = bytes_per_second(figures.record(case, cases.LOSS, self.variant))
        return rate / copy if rate and copy else None

    def worst(self, records: list[Record]) -> tuple[float | None, str, int]:
        """The worst case decides: its value, its name, and how many were measured."""
        figures, copy = Figures(records, cases.GPU_SECTION), copy_bandwidth(records)
        values = {case: self.value(figures, case, copy) for case in TARGET_CASES[self.which]}
        there = {case: value for case, value in values.items() if value is not None}
        name = min(there, key=lambda case: there[case], default="")
        return there.get(name), name, len(there)

    def line(self, records: list[Record]) -> list[str]:
        """Of the table."""
        value, case, measured = self.worst(records)
        said = "not measured" if value is None else "met" if value >= self.least else "NOT MET"
        form = "{:.0%}" if self.than == cases.COPY else "{:.2f}"
        text = "share of the copy's bandwidth" if self.than == cases.COPY else f"times as fast as {self.than}"
        figures = [form.format(self.least), "" if value is None else form.format(value)]
        of = f"{measured} of {len(TARGET_CASES[self.which])} cases"
        return [f"{self.variant}, {self.which}: {text}", *figures, case, of, said]


# Set for an H200; on another card they are to compare with.
TARGETS = (
    Target(cases.INPLACE, _LONG, cases.COPY, 0.9),
    Target(cases.INPLACE, _LONG, cases.LIGER, 1.4),
    Target(cases.INPLACE, _LONG, cases.EAGER, 5),
    Target(cases.INPLACE, _LONG, cases.COMPILE, 2),
    Target(cases.DEFAULT, _LONG, cases.COPY, 0.9),
    Target(cases.INPLACE, _SHORT, cases.COPY, 0.8),
    Target(cases.DEFAULT, _SHORT, cases.COPY, 0.8),
    Target(cases.DEFAULT, _ONE, cases.EAGER, 1),
)


def targets(records: list[Record]) -> Table:
    """Each target with its worst case."""
    columns = ["target", "at least", "worst", "case", "measured", ""]
    title = "targets, set for an H200: loss forward and backward, the worst case of each"
    table = _table(title, columns, left=("target", "case", "measured", ""))
    for target in TARGETS:
        table.add_row(*target.line(records))
    return table


# ---- all of it ----


def print_all(records: list[Record], environment: Environment, console: Console) -> None:
    """What a run has measured, and where."""
    linear = [record for record in records if of_linear(record)]
    others = [record for record in records if not of_linear(record)]
    if others:
        console.print(comparison(others))
    if others and of_gpu(environment):
        console.print(bandwidths(others))
    if linear:
        console.print(linear_comparison(linear))
    lines = exceptions(records)
    if of_gpu(environment):
        lines += [f"{peer}: {GPU_PACKAGES[peer][1]} is not installed" for peer in GPU_PACKAGES if not environment[peer]]
    else:
        lines += limit_lines(others)
    for line in lines:
        console.print(line, highlight=False, markup=False)
    if others and of_gpu(environment):
        console.print(targets(others))
    threads = max(record.threads for record in records)
    console.print(f"Measured on {measured_on(environment, threads)}.", highlight=False)
