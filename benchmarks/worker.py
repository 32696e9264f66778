"""What the processes that measure share: they read a job, check every variant, measure, and print a line for each.

``python torch_worker.py '{"case": {...}, "variants": [...], "whats": [...], "repeats": 9, "threads": 2}'`` prints one
JSON object a line: {"what", "variant", "status", "note"} and, where the status is "ok", {"median", "q1", "q3", "n"}.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import answers
import inputs
import measure
import numpy as np
from cases import COMPILE, GPU_PEERS, LIMIT_VARIANTS, LOG_SOFTMAX, MEMORY, SOFTMAX, Case
from measure import Prepare, Summary

Report = Callable[[dict[str, Any]], None]


class Workload(Protocol):
    """A case in the terms of one framework."""

    keeps_memory: bool  # whether memory once freed stays the framework's

    def variants(self, what: str) -> dict[str, Prepare]:
        """The variants that it has of ``what``; those asked for and not in it are reported as not available."""

    def fetch(self, result: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Value and gradient of a call's result as answers.py has them: the loss [1, 1], or those rows."""


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
        """A request from the JSON that bench.py gives a worker."""
        fields = json.loads(text)
        case = fields.pop("case")
        return cls(Case(**{**case, "shape": tuple(case["shape"])}), **fields)


def _reason(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]


def attempt(what: str, name: str, action: Callable[[], Any], say: Report) -> Any:
    """What the action returns; None, and a report, if it raises: that must not end the other variants.

    Without a compiler torch.compile raises, as what does not know the GPU does; that is no fault of anything here.
    """
    try:
        return action()
    except Exception as error:  # of any framework
        status = "unavailable" if name in (COMPILE, *GPU_PEERS) else "failed"
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            status = "skipped"
        say({"what": what, "variant": name, "status": status, "note": _reason(error)})
        return None


def measure_memory(
    variants: dict[str, Prepare], memory: Callable[[Prepare], Summary], say: Report
) -> dict[str, Summary]:
    """Of the variants that run; the others are reported."""
    measured = {name: attempt(MEMORY, name, partial(memory, prepare), say) for name, prepare in variants.items()}
    return {name: summary for name, summary in measured.items() if summary is not None}


def right_ones(
    what: str,
    variants: dict[str, Prepare],
    expected: answers.Expected | None,
    fetch: Callable[[Any], tuple[np.ndarray, np.ndarray | None]],
    say: Report,
) -> dict[str, Prepare]:
    """The variants that run and give the right answer; the others are reported."""

    def complaint(name: str, prepare: Prepare) -> str:
        result = prepare(1)()
        return "" if expected is None or name in LIMIT_VARIANTS else expected.complaint(*fetch(result))

    right = {}
    for name, prepare in variants.items():
        said = attempt(what, name, partial(complaint, name, prepare), say)
        if said:
            say({"what": what, "variant": name, "status": "WRONG", "note": said})
        elif said is not None:
            right[name] = prepare
    return right


def say_all(what: str, results: dict[str, Summary], say: Report) -> None:
    """A line for each figure."""
    for name, summary in results.items():
        say({"what": what, "variant": name, "status": "ok", "note": "", **asdict(summary)})


def work(request: Request, build: Build, say: Report) -> None:
    """Does what is asked, one ``what`` after the other."""
    case = request.case
    arrays = inputs.make(case)
    upstream = inputs.normals(case, seed=4) if {SOFTMAX, LOG_SOFTMAX} & set(request.whats) else None
    workload = build(case, arrays, upstream)
    rows = answers.checked_rows(case)
    for what in request.whats:
        known = workload.variants(what)
        chosen = {name: known[name] for name in request.variants if name in known}
        if not chosen:
            continue
        if what == MEMORY:
            memory = partial(measure.extra_memory_mib, keeps_memory=workload.keeps_memory)
            results = measure_memory(chosen, memory, say)
        else:
            expected = answers.expect(what, case, arrays, upstream)
            right = right_ones(what, chosen, expected, partial(workload.fetch, rows=rows), say)
            results = measure.times_ms(right, request.repeats)
        say_all(what, results, say)


def print_line(line: dict[str, Any]) -> None:
    """What a worker's command does with a report."""
    print(json.dumps(line), flush=True)


def main(build: Build, set_threads: Callable[[int], None]) -> None:
    """The command of a worker."""
    request = Request.parse(sys.argv[1])
    set_threads(request.threads)
    work(request, build, print_line)
