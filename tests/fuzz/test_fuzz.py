"""Calls that nobody thought of: fuzz_cases draws them, fuzz_check compares each with torch in float64.

2000 of a fixed seed; by run.py as many as wanted, of any seed. They are spread over the functions, over the ways to
hold a gradient and over the instruction sets of this machine, in tests of a few hundred.
"""

import os
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import fuzz_cases
import fuzz_check
import pytest
from fuzz_cases import LossCase, SoftmaxCase
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from softmax_ext import ops

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "2000"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
MOST_IN_A_TEST = 250

SECOND = st.one_of(
    fuzz_cases.loss_cases("default", True),
    fuzz_cases.loss_cases("overwriting", True),
    fuzz_cases.loss_cases("linear", True),
    fuzz_cases.softmax_cases(False, True),
    fuzz_cases.softmax_cases(True, True),
)
# What is drawn and how many of them in seventeen examples.
SHARES: dict[str, tuple[st.SearchStrategy[Any], int]] = {
    "softmax": (fuzz_cases.softmax_cases(False), 1),
    "log_softmax": (fuzz_cases.softmax_cases(True), 1),
    "cross_entropy": (fuzz_cases.loss_cases("default"), 5),
    "cross_entropy-overwriting": (fuzz_cases.loss_cases("overwriting"), 3),
    "linear_cross_entropy": (fuzz_cases.loss_cases("linear"), 4),
    "second_derivatives": (SECOND, 2),
    "mistakes": (fuzz_cases.mistaken_cases(), 1),
}


class Part(NamedTuple):
    """Some of the examples of one kind on one instruction set."""

    kind: str
    isa: str | None  # None: on a device that is not the CPU
    number: int
    examples: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.isa or 'device'}-{self.number}"


def parts(isas: list[str] | list[None]) -> list[Part]:
    found = []
    units = sum(share for _, share in SHARES.values()) * len(isas)
    for isa in isas:
        for kind, (_, share) in SHARES.items():
            left, number = -(-EXAMPLES * share // units), 0
            while left > 0:
                found.append(Part(kind, isa, number, min(left, MOST_IN_A_TEST)))
                left, number = left - MOST_IN_A_TEST, number + 1
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "part" in metafunc.fixturenames:
        on_the_cpu = metafunc.config.getoption("--device") == "cpu"
        metafunc.parametrize("part", parts(ops.library.available_isas() if on_the_cpu else [None]), ids=str)


def check(case: SoftmaxCase | LossCase, kind: str, device: Any) -> None:
    if kind == "second_derivatives":
        fuzz_check.check_second_derivatives(case, device)
    elif isinstance(case, SoftmaxCase):
        fuzz_check.check_softmax(case, device)
    else:
        fuzz_check.check_loss(case, device)


def drawn(examples: int, name: str) -> Callable[[Any], Any]:
    """Decorates a test with what Hypothesis has to know; the name decides what is drawn."""
    draws = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: draws(seed(zlib.crc32(name.encode()))(test))


def test_against_torch(part, device, record_property):
    count = 0

    @drawn(part.examples, f"{SEED} {part}")
    @given(SHARES[part.kind][0])
    def examples(case):
        nonlocal count
        count += 1
        check(case, part.kind, device)

    before = ops.library.selected_isa()
    ops.library.select_isa(part.isa or before)
    try:
        examples()
        assert count >= part.examples
    finally:
        ops.library.select_isa(before)
        record_property("examples", count)


def test_every_mistake_is_drawn_and_refused(device):
    refused = set()

    @drawn(1000, "mistakes")
    @given(fuzz_cases.mistaken_cases())
    def examples(case):
        _, error = fuzz_check.outcome(fuzz_check.Call(case, device).ours)
        refused.update({case.mistake} - {""} if error else ())

    examples()
    assert refused == {*fuzz_cases.MISTAKES, *fuzz_cases.MISTAKES_OF_LINEAR}
