"""benchmarks/studies/training.py: a tiny GPT follows torch's losses step by step, and what the script finds fault with.

The optimiser is SGD, since AdamW hides a gradient of a wrong scale.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from studies import training
from torch.testing import assert_close

pytestmark = pytest.mark.devices("cpu")

STEPS, VOCABULARY, CONTEXT, WIDTH, SEQUENCES = 20, 1000, 32, 32, 10  # four chunks of linear_cross_entropy
# Ten times what was measured; a gradient a thousandth too large moves the losses more than twenty times as far.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-6}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@cache
def train(loss: training.gpt.Loss, dtype: torch.dtype) -> torch.Tensor:
    """[2, STEPS], losses and norms of the gradients."""
    torch.set_num_threads(1)  # more only wait for each other over so little
    torch.manual_seed(0)
    model = training.gpt.GPT(VOCABULARY, CONTEXT, WIDTH).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    tokens = torch.arange(5000).square() % VOCABULARY
    batches = training.gpt.batches(tokens, STEPS, SEQUENCES, CONTEXT)
    return torch.tensor(list(training.train(model, loss, optimizer, batches)), dtype=torch.float64).T


@dtypes
@pytest.mark.parametrize("name", [name for name in training.LOSSES if name not in (training.TORCH, training.CONTROL)])
def test_follows_torch(name, dtype):
    ours, theirs = (train(training.LOSSES[loss], dtype) for loss in (name, training.TORCH))
    assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=0)
    assert ours[0, -1] < ours[0, 0] - 1


def scaled(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """torch's loss with a gradient that is a thousandth too large."""
    loss = F.cross_entropy(F.linear(hidden, weight), target)
    return 1.001 * loss - 0.001 * loss.detach()


@dtypes
@pytest.mark.parametrize("wrong", [training.wrong_gradient, scaled])
def test_a_wrong_gradient_is_seen(wrong, dtype):
    losses, norms = (train(wrong, dtype) / train(training.LOSSES[training.TORCH], dtype) - 1).abs()
    assert losses[0] <= TOLERANCE[dtype]  # the loss itself is right
    assert losses[1:].max() > 20 * TOLERANCE[dtype]
    assert norms[0] > 20 * TOLERANCE[dtype]


# ---- what the script makes of its runs -------------------------------------------------------------------------------


def run(loss: str, held_out: float, norm: float = 3.0, order: int = 0) -> training.Run:
    return training.Run(loss, order, [10.0] * 30, [norm] * 30, held_out, 1)


TORCHS = [run(training.TORCH, held_out, order=order) for order, held_out in enumerate([5.0, 5.1, 5.2])]
GOOD, CONTROL = run("default", 5.19), run(training.CONTROL, 5.5)


@pytest.mark.parametrize(
    ("runs", "complaints"),
    [
        ([GOOD, CONTROL], []),
        ([run("default", 5.21), CONTROL], ["default: ends +2.10"]),
        ([run("default", 4.79), CONTROL], ["default: ends -2.10"]),
        ([run("default", float("nan")), CONTROL], ["default: ends +nan"]),
        ([run("default", 5.0, norm=3.00001), CONTROL], ["default: the first gradient's norm is off by 3.3e-06"]),
        ([GOOD, run(training.CONTROL, 5.19)], ["a wrong gradient has to be seen"]),
    ],
)
def test_complaints(runs, complaints):
    found = list(training.Findings(training.PARTS["float32"], [*TORCHS, *runs]).complaints())
    assert len(found) == len(complaints)
    for complaint, text in zip(complaints, found, strict=True):
        assert complaint in text


def test_the_page_has_a_table_for_each_part():
    page = training._PAGE.read_text()
    for part in training.PARTS.values():
        findings = training.Findings(part, [*TORCHS, *(run(name, 5.0) for name in part.losses)])
        table = training.markdown(findings, "this machine")
        assert table in training.between(page, part.begin, part.end, table)
        written = page.partition(part.begin)[2].partition(part.end)[0]
        assert all(f"| {name} | 0 |" in written for name in (training.TORCH, *part.losses))
