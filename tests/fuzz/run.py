"""Runs tests/fuzz/test_fuzz.py with many examples and says how many ran, and of which seed.

    python tests/fuzz/run.py [--examples 20000] [--seed N] [arguments of pytest]

A failure prints the call that it shrank to, and the seed; the same seed and number of examples fail in the same way.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

import pytest

TEST = Path(__file__).resolve().parent / "test_fuzz.py"


class Count:
    """How many examples the tests ran, over all workers."""

    def __init__(self) -> None:
        self.examples = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.examples += dict(report.user_properties).get("examples", 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, help="default: another one each time")
    arguments, pytest_arguments = parser.parse_known_args()
    seed = random.randrange(2**31) if arguments.seed is None else arguments.seed
    os.environ |= {"FUZZ_EXAMPLES": str(arguments.examples), "FUZZ_SEED": str(seed)}
    count = Count()
    status = pytest.main(["-q", str(TEST), *pytest_arguments], plugins=[count])
    print(f"{count.examples} examples, --seed {seed}")
    if count.examples < arguments.examples and "-k" not in pytest_arguments:
        print(f"fewer than {arguments.examples}")
        return int(status) or 1
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
