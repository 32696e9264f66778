"""What the processes that measure share: they read requests, check every variant, measure, and print a line for each.

``python -m workers.torch_worker`` reads a request a line, JSON, until there are no more: {"case": {...}, "variants":
[...], "whats": [...], "repeats": 9, "threads": 2, "device": "cpu", "copies": 1}. It prints a JSON object for each
figure: {"what", "variant", "status", "note"} and, where the status is "ok", {"median", "q1", "q3", "n"}; and an empty
one behind each request.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from cases import COMPILE, CPU, GPU_PEERS, LIMIT_VARIANTS, MEMORY, MIB, Case
from workers.measure import Cpu, Cuda, Prepare, Summary

Say = Callable[[dict[str, Any]], None]


class Workload(Protocol):
    """A case in the terms of one framework."""

    keeps_memory: bool  # whether memory once freed stays the framework's
    uncounted_bytes: int  # of a step's memory

    def variants(self, what: str) -> dict[str, Prepare]:
        """The variants that it has of ``what``; those asked for and not in it are left out."""

    def complaint(self, what: str, result: Any) -> str:
        """What is wrong with a call's result, judged against float64; "" if nothing is."""


@dataclass
class Request:
    """What a worker is asked for; a Job as far as it concerns the process that does it."""

    case: Case
    variants: list[str]
    whats: list[str]
    repeats: int
    threads: int = 1
    device: str = CPU
    copies: int = 1

    @classmethod
    def parse(cls, text: str) -> "Request":
        """A request from its line."""
        fields = json.loads(text)
        case = fields.pop("case")
        return cls(Case(**{**case, "shape": tuple(case["shape"])}), **fields)


def attempt(what: str, name: str, action: Callable[[], Any], say: Say) -> Any:
    """What the action returns; None, and a report, if it raises: that must not end the other variants.

    Without a compiler torch.compile raises, as what does not know the GPU does; that is no fault of anything here.
    """
    try:
        return action()
    except Exception as error:  # of any framework
        status = "unavailable" if name in (COMPILE, *GPU_PEERS) else "failed"
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            status = "skipped"
        note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        say({"what": what, "variant": name, "status": status, "note": note[:300]})
        return None


def right_ones(what: str, variants: dict[str, Prepare], workload: Workload, say: Say) -> dict[str, Prepare]:
    """The variants that run and give the right answer; the others are reported."""

    def complaint(name: str, prepare: Prepare) -> str:
        result = prepare(1)()
        return "" if name in LIMIT_VARIANTS else workload.complaint(what, result)

    right = {}
    for name, prepare in variants.items():
        said = attempt(what, name, partial(complaint, name, prepare), say)
        if said:
            say({"what": what, "variant": name, "status": "WRONG", "note": said})
        elif said is not None:
            right[name] = prepare
    return right


def memory_of(variants: dict[str, Prepare], workload: Workload, meter: Cpu | Cuda, say: Say) -> dict[str, Summary]:
    """Of the variants that run; the others are reported."""

    def memory(prepare: Prepare) -> Summary:
        return Summary.of([max(0.0, meter.peak_mib(prepare, workload.keeps_memory) - workload.uncounted_bytes / MIB)])

    measured = {name: attempt(MEMORY, name, partial(memory, prepare), say) for name, prepare in variants.items()}
    return {name: summary for name, summary in measured.items() if summary is not None}


def work(request: Request, workload: Workload, meter: Cpu | Cuda, say: Say) -> None:
    """Does what is asked, one ``what`` after the other."""
    for what in request.whats:
        known = workload.variants(what)
        chosen = {name: known[name] for name in request.variants if name in known}
        if what == MEMORY:
            results = memory_of(chosen, workload, meter, say)
        else:
            results = meter.times_ms(right_ones(what, chosen, workload, say), request.repeats, request.copies)
        for name, summary in results.items():
            say({"what": what, "variant": name, "status": "ok", "note": "", **asdict(summary)})


def main(build: Callable[[Request], Workload], set_threads: Callable[[int], None]) -> None:
    """The command of a worker."""

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    meter: Cpu | Cuda | None = None
    for line in sys.stdin:
        request = Request.parse(line)
        set_threads(request.threads)
        meter = meter or (Cpu() if request.device == CPU else Cuda())
        work(request, build(request), meter, say)
        meter.clear()  # raises if the GPU's context is spoiled, so that the next request gets a process of its own
        say({})
