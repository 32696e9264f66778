"""The report on the terminal: one table of all that was measured, and under it what was not and why."""

from cases import (
    COMPILE,
    DEFAULT,
    EAGER,
    FORWARD,
    GPU_PEERS,
    INPLACE,
    LIGER,
    LIMITS,
    MEMORY,
    MUL,
    OURS,
    PEERS,
    QUACK,
    SUM,
)
from measure import MIB
from results import OK, Figures, Record
from rich.table import Table

_RATIOS = [
    *((EAGER, DEFAULT), (COMPILE, DEFAULT), (QUACK, DEFAULT)),
    *((EAGER, INPLACE), (COMPILE, INPLACE), (LIGER, INPLACE)),
]
_LEAST_MEMORY_MIB = 1.0  # below, a ratio of memory says nothing


def figure(value: float) -> str:
    """Three digits, or all before the point."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.0995 else f"{value:.3f}"


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if record.median is None:
        return f"[red]{record.status}[/]" if record.status == "WRONG" else record.status
    return figure(record.median)


def ratio_cell(figures: Figures, case: str, what: str, slower: str, faster: str) -> str:
    """A ratio to one decimal; empty where there is none or where it would be of next to nothing."""
    ratio = figures.ratio(case, what, slower, faster)
    if ratio is None or (what == MEMORY and figures.median(case, what, faster) < _LEAST_MEMORY_MIB):
        return ""
    return f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:.0f}"


def _limit_cells(figures: Figures, case: str, what: str) -> list[str]:
    """The limit and how many times as much softmax_ext takes: in place, which reads and writes; or reading alone."""
    ours = DEFAULT if what == FORWARD else INPLACE
    for limit in LIMITS.get(what, ()):
        record = figures.record(case, what, limit)
        if record:
            return [f"{_cell(record)} {limit}", ratio_cell(figures, case, what, ours, limit)]
    return ["", ""]


def comparison(records: list[Record]) -> Table:
    """A line for each case and what, the variants that there are in columns, then the ratios of their medians."""
    there = {record.variant for record in records}
    variants = [name for name in (EAGER, COMPILE, *PEERS, *GPU_PEERS, *OURS) if name in there]
    ratios = [pair for pair in _RATIOS if there.issuperset(pair)]
    table = Table(title="medians; time in ms, memory in MiB beyond the logits; ratios: how many times as much")
    table.add_column("case")
    table.add_column("what")
    for name in [*variants, "limit", "ours\n/ limit", *(f"{slower}\n/ {faster}" for slower, faster in ratios)]:
        table.add_column(name, justify="right")
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


def bandwidths(records: list[Record]) -> list[str]:
    """What the limits come to in GB/s, each where the logits are largest."""
    lines = []
    for limit, passes in ((MUL, 2), (SUM, 1)):
        timed = [record for record in records if record.variant == limit and record.median]
        if timed:
            largest = max(timed, key=lambda record: (record.logits_mib, record.threads))
            rate = passes * largest.logits_mib * MIB / largest.median / 1e6
            lines.append(f"{limit} moves {rate:.1f} GB/s ({largest.case}, {largest.threads} threads)")
    return lines


def exceptions(records: list[Record]) -> list[str]:
    """A sentence for each figure that is missing or wrong; the same ones of several whats once."""
    return list(
        dict.fromkeys(
            f"{record.section}, {record.case}, {record.variant}: {record.status}: {record.note}"
            for record in records
            if record.status != OK
        )
    )
