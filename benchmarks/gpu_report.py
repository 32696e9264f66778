"""What is said of a GPU's figures besides the table: bandwidths, and which targets are met.

A bandwidth counts what a strategy has to move: the default reads the logits twice and writes the gradient once,
precompute reads once and writes once, forward alone reads once. A precomputed gradient that is multiplied afterwards is
read and written again. The measure is what copy_ moves on this card in the same run, read and written bytes together.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cases import COMPILE, COPY, DEFAULT, EAGER, FORWARD, INPLACE, LIGER, LOSS, PRECOMPUTE, SCALED, Case
from gpu_cases import COPY_SECTION, SECTION, TABLE
from measure import MIB
from results import Figures, Record
from rich.table import Table

# How many times the logits' bytes are moved.
PASSES = {
    LOSS: {DEFAULT: 3, PRECOMPUTE: 2, INPLACE: 2, COPY: 2},
    SCALED: {DEFAULT: 3, PRECOMPUTE: 4, INPLACE: 4, COPY: 2},
    FORWARD: {DEFAULT: 1},
}


def bytes_per_second(record: Record | None) -> float | None:
    """What a variant moves; None where it has no figure or no count of bytes."""
    if record is None or not record.median or record.variant not in PASSES.get(record.what, {}):
        return None
    return PASSES[record.what][record.variant] * record.logits_mib * MIB / (record.median / 1e3)


def copy_bandwidth(records: list[Record]) -> float | None:
    """Bytes a second of the large copy_, those read and those written; None if it was not measured."""
    return bytes_per_second(next((record for record in records if record.section == COPY_SECTION), None))


# ---- bandwidths ----


def bandwidths(records: list[Record]) -> Table:
    """For each case and what, GB/s and the share of the copy's."""
    copy = copy_bandwidth(records)
    title = "GB/s by the bytes that have to be moved"
    if copy:
        title += f"; of {copy / 1e9:.0f} GB/s, which copy_ of 2 GiB moves"
    table = Table(title=title)
    table.add_column("case")
    table.add_column("what")
    for variant in (DEFAULT, PRECOMPUTE, INPLACE):
        table.add_column(variant, justify="right")
    figures = Figures(records, SECTION)
    shown = ""
    for case, what in figures.pairs():
        if what not in PASSES:
            continue
        rates = [bytes_per_second(figures.record(case, what, variant)) for variant in (DEFAULT, PRECOMPUTE, INPLACE)]
        if any(rates):
            table.add_row(case if case != shown else "", what, *(_rate_cell(rate, copy) for rate in rates))
            shown = case
    return table


def _rate_cell(rate: float | None, copy: float | None) -> str:
    if rate is None:
        return ""
    return f"{rate / 1e9:.0f}" + (f" ({rate / copy:.0%})" if copy else "")


# ---- targets ----

LONG = tuple(case for case in TABLE if case.classes >= 32000)
SHORT = tuple(case for case in TABLE if 10 <= case.classes <= 1000)
BESIDE_EAGER = tuple(case for case in TABLE if (case.rows, case.classes) == (2048, 32000))

# A figure of a case; None where something that it needs was not measured.
Measure = Callable[[Figures, str, float | None], float | None]


@dataclass(frozen=True)
class Target:
    """The least that a figure of the loss, forward and backward, should be in each of some cases."""

    text: str
    least: float
    percent: bool
    cases: tuple[Case, ...]
    measure: Measure


@dataclass(frozen=True)
class Verdict:
    """What came of a target."""

    target: Target
    said: str  # met, NOT MET or not measured
    measured: int  # in how many of the target's cases
    worst: float | None
    worst_case: str


def _share(variant: str) -> Measure:
    def measure(figures: Figures, case: str, copy: float | None) -> float | None:
        rate = bytes_per_second(figures.record(case, LOSS, variant))
        return rate / copy if rate and copy else None

    return measure


def _times_faster(slower: str, faster: str) -> Measure:
    return lambda figures, case, copy: figures.ratio(case, LOSS, slower, faster)


TARGETS = (
    Target("in place, C >= 32000: share of the copy's bandwidth", 0.9, True, LONG, _share(INPLACE)),
    Target("in place, C >= 32000: times as fast as Liger-Kernel", 1.4, False, LONG, _times_faster(LIGER, INPLACE)),
    Target("in place, C >= 32000: times as fast as eager", 5, False, LONG, _times_faster(EAGER, INPLACE)),
    Target("in place, C >= 32000: times as fast as torch.compile", 2, False, LONG, _times_faster(COMPILE, INPLACE)),
    Target("default, C >= 32000: share of the copy's bandwidth", 0.9, True, LONG, _share(DEFAULT)),
    Target("in place, C of 10 to 1000: share of the copy's bandwidth", 0.8, True, SHORT, _share(INPLACE)),
    Target("default, C of 10 to 1000: share of the copy's bandwidth", 0.8, True, SHORT, _share(DEFAULT)),
    Target("default, 2048 x 32000: times as fast as eager", 1, False, BESIDE_EAGER, _times_faster(EAGER, DEFAULT)),
)


def judge(target: Target, records: list[Record]) -> Verdict:
    """The worst case decides."""
    figures, copy = Figures(records, SECTION), copy_bandwidth(records)
    values = {case.name: target.measure(figures, case.name, copy) for case in target.cases}
    there = {name: value for name, value in values.items() if value is not None}
    if not there:
        return Verdict(target, "not measured", 0, None, "")
    name = min(there, key=lambda case: there[case])
    said = "met" if there[name] >= target.least else "NOT MET"
    return Verdict(target, said, len(there), there[name], name)


def targets(records: list[Record]) -> Table:
    """Each target with its worst case. They are set for an H200; on another card they are to compare with."""
    table = Table(title="targets, set for an H200: loss forward and backward, the worst case of each")
    for name in ("target", "at least", "worst", "case", "measured", ""):
        table.add_column(name, justify="right" if name in ("at least", "worst") else "left")
    for verdict in (judge(target, records) for target in TARGETS):
        target = verdict.target
        form = "{:.0%}" if target.percent else "{:.2f}"
        worst = "" if verdict.worst is None else form.format(verdict.worst)
        measured = f"{verdict.measured} of {len(target.cases)} cases"
        table.add_row(target.text, form.format(target.least), worst, verdict.worst_case, measured, verdict.said)
    return table
