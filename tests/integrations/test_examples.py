"""The examples that use other libraries run, and train as those libraries alone do."""

import re
from pathlib import Path

import numpy as np
import processes
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: object) -> str:
    result = processes.started(str(EXAMPLES / name), *map(str, arguments))
    assert result.returncode == 0, result.stderr
    return " ".join(result.stdout.split())


def test_transformers_finetune(tmp_path):
    pytest.importorskip("transformers", minversion="5")
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).zipf(1.5, 40_000).clip(max=32767))
    losses = {}
    for loss in ("own", "logits", "linear"):
        text = run("transformers_finetune.py", "--loss", loss, "--steps", 2, "--tokens", tokens)
        found = re.fullmatch(rf"{loss}: loss (\S+) at first, (\S+) at step 2; \d+ ms a step .* \d+ MiB", text)
        assert found, text
        losses[loss] = [float(number) for number in found.groups()]
    for loss in ("logits", "linear"):
        assert losses[loss] == pytest.approx(losses["own"], rel=1e-4)


def test_lightning_digits():
    pytest.importorskip("lightning")
    pytest.importorskip("sklearn")
    accuracies = []
    for loss in ("torch", "softmax_ext"):
        text = run("lightning_digits.py", "--epochs", 3, "--loss", loss)
        accuracy = re.match(rf"{loss}: (\S+)% of 360 held-out digits recognised; \S+ s of training", text)
        assert accuracy, text
        accuracies.append(float(accuracy[1]))
    assert accuracies[0] > 85
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.6)  # two digits


@pytest.mark.parametrize(
    ("example", "library"), [("transformers_finetune.py", "transformers"), ("lightning_digits.py", "lightning")]
)
def test_a_missing_library_is_named(example, library):
    path = str(EXAMPLES / example)
    code = f"import runpy, sys; sys.modules[{library!r}] = None; sys.path.insert(0, {str(EXAMPLES)!r})"
    result = processes.started("-c", f"{code}; runpy.run_path({path!r})")
    assert result.returncode == 1
    assert f"pip install --no-build-isolation '.[demo,{library}]'" in result.stderr
