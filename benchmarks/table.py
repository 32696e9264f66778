"""The report on the terminal: one table of all that was measured, and under it what was not and why."""

from cases import COMPILE, DEFAULT, EAGER, INPLACE, LIMITS, MEMORY, PEERS, PRECOMPUTE
from results import OK, Figures, Record
from rich.table import Table

_RATIOS = [(EAGER, DEFAULT), (COMPILE, DEFAULT), (EAGER, INPLACE), (COMPILE, INPLACE)]
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


def _limit(figures: Figures, case: str, what: str) -> str:
    record = figures.record(case, what, LIMITS.get(what, ""))
    return f"{_cell(record)} {record.variant}" if record else ""


def comparison(records: list[Record]) -> Table:
    """A line for each case and what, the variants in columns, then the ratios of their medians."""
    peers = [peer for peer in PEERS if any(record.variant == peer for record in records)]
    variants = [EAGER, COMPILE, *peers, DEFAULT, PRECOMPUTE, INPLACE]
    table = Table(title="medians; time in ms, memory in MiB beyond the logits; ratios: times less")
    table.add_column("case")
    table.add_column("what")
    for name in [*variants, "limit", *(f"{slower}\n/ {faster}" for slower, faster in _RATIOS)]:
        table.add_column(name, justify="right")
    for section in dict.fromkeys(record.section for record in records):
        table.add_section()
        table.add_row(f"[bold]{section}[/]")
        figures = Figures(records, section)
        shown = ""
        for case, what in figures.pairs():
            cells = [_cell(figures.record(case, what, variant)) for variant in variants]
            ratios = [ratio_cell(figures, case, what, *pair) for pair in _RATIOS]
            table.add_row(case if case != shown else "", what, *cells, _limit(figures, case, what), *ratios)
            shown = case
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
