"""What the processes that measure share: they read a job, check every variant, measure, and print a line for each.

``python torch_worker.py '{"case": {...}, "variants": [...], "whats": [...], "repeats": 9, "threads": 2}'`` prints one
JSON object a line: {"what", "variant", "status", "note"} and, where the status is "ok", {"median", "q1", "q3", "n"}.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import inputs
import measure
import numpy as np
import oracle
from cases import LOG_SOFTMAX, MEMORY, SOFTMAX, Case
from measure import Prepare

Report = Callable[[dict[str, Any]], None]


class Workload(Protocol):
    """A case in the terms of one framework."""

    keeps_memory: bool  # whether memory once freed stays the framework's

    def variants(self, what: str) -> dict[str, Prepare]:
        """The variants that it has of ``what``; those asked for and not in it are reported as not available."""

    def fetch(self, result: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Value and gradient of a call's result as the oracle has them: the loss [1, 1], or those rows."""


# Arguments: the case, its arrays, the gradient that softmax gets from behind or None.
Build = Callable[[Case, inputs.Arrays, np.ndarray | None], Workload]


@dataclass
class Request:
    """What a worker is asked for; a Job as far as it concerns the process that does it."""

    case: Case
    variants: list[str]
    whats: list[str]
    repeats: int
    threads: int

    @classmethod
    def parse(cls, text: str) -> "Request":
        fields = json.loads(text)
        case = fields.pop("case")
        return cls(Case(**{**case, "shape": tuple(case["shape"])}), **fields)


def _reason(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]


def _right(
    what: str, variants: dict[str, Prepare], workload: Workload, expected: oracle.Expected, rows: np.ndarray, say: Report
) -> dict[str, Prepare]:
    """Those variants that run and give the right answer; the others are reported."""
    right = {}
    for name, prepare in variants.items():
        try:
            result = prepare(1)()
            complaint = "" if result is None else expected.complaint(*workload.fetch(result, rows))
            del result
        except Exception as error:  # of any framework: it must not end the other variants
            say({"what": what, "variant": name, "status": "failed", "note": _reason(error)})
            continue
        if complaint:
            say({"what": what, "variant": name, "status": "WRONG", "note": complaint})
        else:
            right[name] = prepare
    return right


def work(request: Request, build: Build, say: Report) -> None:
    """Does what is asked, one ``what`` after the other."""
    case = request.case
    arrays = inputs.make(case)
    upstream = inputs.normals(case, seed=4) if {SOFTMAX, LOG_SOFTMAX} & set(request.whats) else None
    workload = build(case, arrays, upstream)
    for what in request.whats:
        known = workload.variants(what)
        chosen = {name: known[name] for name in request.variants if name in known}
        if what == MEMORY:
            results = {
                name: measure.extra_memory_mib(prepare, workload.keeps_memory) for name, prepare in chosen.items()
            }
        else:
            expected = oracle.expect(what, case, arrays, upstream)
            right = _right(what, chosen, workload, expected, oracle.checked_rows(case), say)
            results = measure.times_ms(right, request.repeats)
        for name, summary in results.items():
            say({"what": what, "variant": name, "status": "ok", "note": "", **asdict(summary)})


def main(build: Build, set_threads: Callable[[int], None]) -> None:
    """The command of a worker."""
    request = Request.parse(sys.argv[1])
    set_threads(request.threads)
    work(request, build, lambda line: print(json.dumps(line), flush=True))
