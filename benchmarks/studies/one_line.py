"""What one line changes in a training script: the examples with the loss that they had, and with this package's.

    python benchmarks/studies/one_line.py

Prints README's table. Each run is a process of its own. It takes three minutes, and the groups demo, transformers and
lightning of pyproject.toml.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import gpt  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402

STEPS = 20
PATCHED = f"""
import runpy, sys, softmax_ext
sys.path.insert(0, {str(EXAMPLES)!r})
del sys.argv[0]
softmax_ext.patch()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _run(*arguments: object) -> str:
    result = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=True)
    return " ".join(result.stdout.split())


def _of_trainer(loss: str, tokens: Path) -> tuple[float, float]:
    """(milliseconds of a step, MiB that training adds)."""
    text = _run(EXAMPLES / "transformers_finetune.py", "--loss", loss, "--steps", STEPS, "--tokens", tokens)
    found = re.search(r"(\d+) ms a step \(median\); training adds (\d+) MiB", text)
    return float(found[1]), float(found[2])


def _of_gpt(patched: bool, tokens: Path, folder: Path) -> tuple[float, float]:
    script, lines = EXAMPLES / "gpt.py", folder / "gpt.csv"
    first = ("-c", PATCHED, script) if patched else (script,)
    _run(*first, "--loss", "torch", "--steps", STEPS, "--tokens", tokens, "--csv", lines)
    totals = gpt.Totals.of(gpt.read_csv(lines))
    return totals.step_ms, totals.added_memory_mib


def _of_digits(loss: str) -> float:
    return float(re.search(r"(\S+) s of training", _run(EXAMPLES / "lightning_digits.py", "--loss", loss))[1])


def main() -> None:
    """Runs all of them and prints the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = folder / "tokens.npy"
        np.save(tokens, gpt.read_tokens(Console(stderr=True)).numpy())
        rows = []
        before = _of_trainer("own", tokens)
        for line, loss in (("`apply(model)`", "logits"), ("`apply(model, linear=True)`", "linear")):
            rows.append(("transformers' Trainer, a small Llama", line, *before, *_of_trainer(loss, tokens)))
        plain, patched = _of_gpt(False, tokens, folder), _of_gpt(True, tokens, folder)
        rows.append(("a GPT in plain torch", "`softmax_ext.patch()`", *plain, *patched))
        print("| script | the line | ms a step: before, after | MiB that training adds: before, after |")
        print("|---|---|---|---|")
        for script, line, ms, mib, ms_after, mib_after in rows:
            print(f"| {script} | {line} | {ms:.0f}, {ms_after:.0f} | {mib:.0f}, {mib_after:.0f} |")
        digits = _of_digits("torch"), _of_digits("softmax_ext")
        line = "`self.criterion = softmax_ext.CrossEntropyLoss()`"
        print(f"| Lightning, the digits | {line} | {digits[0]:.1f} s, {digits[1]:.1f} s in all | |")


if __name__ == "__main__":
    main()
