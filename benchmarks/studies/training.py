"""Trains the GPT of examples/gpt.py with each way to compute the loss: all must end where torch's loss ends.

    make training
    python benchmarks/studies/training.py --part bfloat16     one of the three parts

Every run has the same initial weights, the same optimiser, a seed for the order of its data, and a process of its own.
torch's F.cross_entropy runs with several orders of the data: the standard deviation of where they end is the noise. The
others run with the first of these orders, and end within two standard deviations of torch's run with it. Where a run
ends is its loss on text held out, computed by torch in float64 for all runs: only the training differs.

A control, whose gradient is wrong on purpose, has to end farther away. AdamW hides a gradient of a wrong scale, so the
norms of the gradients of the first step are held against each other too.

Writes the tables into docs/training.md, each between two comments. Status 1 if a run is not where it has to be.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

import softmax_ext

_ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(_ROOT / "benchmarks"), str(_ROOT / "examples")]

import gpt  # noqa: E402  from these folders, as the next ones
from agreement import Agreement  # noqa: E402
from readme import between  # noqa: E402
from results import describe_cpu, measured_on  # noqa: E402

STEPS = 300
SEQUENCES = 1  # in a batch; the demo has 8
ORDERS = 4  # of the data
HELD_OUT = 2**17  # tokens, the last ones of the text
HELD_OUT_BATCHES = 32
LAST = 20  # training losses whose mean is shown
ALLOWED = 2.0  # standard deviations of the noise
_PAGE = _ROOT / "docs" / "training.md"


def wrong_gradient(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The loss of torch, but the gradient of each row's own class is half too small."""
    logits = F.linear(hidden, weight)
    factor = torch.ones_like(logits).scatter_(1, target.unsqueeze(1), 0.5)
    logits.register_hook(lambda gradient: gradient * factor)
    return F.cross_entropy(logits, target)


_OF_LOGITS = {
    "default": {},
    "precompute_grad": {"precompute_grad": True},
    "inplace": {"inplace": True},
    "inplace, precompute_grad": {"inplace": True, "precompute_grad": True},
}


def in_float64(logits: Tensor, target: Tensor) -> Tensor:
    """The loss by torch in float64, so that its gradient is rounded once: what rounding alone does to a run."""
    return F.cross_entropy(logits.double(), target)


TORCH, FLOAT64 = "torch", "torch in float64"
LINEAR, CONTROL = "linear_cross_entropy", "control: a wrong gradient"
LOSSES: dict[str, gpt.Loss] = {
    TORCH: gpt.of_logits(F.cross_entropy),
    FLOAT64: gpt.of_logits(in_float64),
    **{name: gpt.of_logits(softmax_ext.CrossEntropyLoss(**options)) for name, options in _OF_LOGITS.items()},
    LINEAR: partial(softmax_ext.linear_cross_entropy, chunk_rows=96),  # by itself it would take so few at once
    CONTROL: wrong_gradient,
}


class Part(NamedTuple):
    """The runs that are held against each other."""

    name: str
    what: str
    dtype: torch.dtype  # of the weights
    autocast: bool  # in bfloat16
    losses: tuple[str, ...]  # besides torch's

    @property
    def begin(self) -> str:
        """The comment before its table."""
        return f"<!-- written by benchmarks/studies/training.py --part {self.name} -->"

    @property
    def end(self) -> str:
        """The comment behind it."""
        return f"<!-- end of {self.name} -->"


PARTS = {
    part.name: part
    for part in (
        Part("float32", "float32 weights", torch.float32, False, (FLOAT64, *_OF_LOGITS, LINEAR, CONTROL)),
        Part("bfloat16", "bfloat16 weights", torch.bfloat16, False, (*_OF_LOGITS, LINEAR, CONTROL)),
        Part(
            "autocast",
            "float32 weights under torch.autocast in bfloat16",
            torch.float32,
            True,
            (FLOAT64, *_OF_LOGITS, LINEAR, CONTROL),
        ),
    )
}


@dataclass
class Run:
    """What one training run gave."""

    loss: str  # one of LOSSES
    order: int  # of the data: its seed
    losses: list[float]  # of the steps
    gradient_norms: list[float]  # of the steps
    held_out: float
    threads: int

    @property
    def last(self) -> float:
        """The mean of the last training losses."""
        return mean(self.losses[-LAST:])


# ---- one run ---------------------------------------------------------------------------------------------------------


def gradient_norm(model: gpt.GPT) -> float:
    """Of all parameters together, summed in float64."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in model.parameters()]
    return torch.stack(norms).norm().item()


def train(
    model: gpt.GPT,
    loss: gpt.Loss,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: bool = False,
) -> Iterator[tuple[float, float]]:
    """Yields the loss and the norm of the gradient of each step."""
    for inputs, target in batches:
        value, _ = gpt.train_step(model, loss, optimizer, inputs, target, autocast)
        yield value, gradient_norm(model)


@torch.no_grad()
def held_out_loss(model: gpt.GPT, tokens: Tensor) -> float:
    """The loss by torch of the model, which becomes float64, on batches that are the same for all runs."""
    model = model.double()
    return mean(
        F.cross_entropy(F.linear(model(inputs), model.head.weight).flatten(0, 1), target.flatten()).item()
        for inputs, target in gpt.batches(tokens, HELD_OUT_BATCHES, SEQUENCES)
    )


def run(part: Part, loss: str, order: int, tokens: Tensor) -> Run:
    """Trains in this process."""
    torch.manual_seed(gpt.SEED)
    model = gpt.GPT().to(part.dtype)
    batches = gpt.batches(tokens[:-HELD_OUT], STEPS, SEQUENCES, seed=order)
    steps = list(train(model, LOSSES[loss], gpt.adamw(model), batches, part.autocast))
    losses, gradient_norms = (list(values) for values in zip(*steps, strict=True))
    held_out = held_out_loss(model, tokens[-HELD_OUT:])
    return Run(loss, order, losses, gradient_norms, held_out, torch.get_num_threads())


def run_apart(part: Part, loss: str, order: int, tokens: Path) -> Run:
    """Trains in a process of its own."""
    command = [sys.executable, __file__, "--part", part.name, "--run", loss, str(order), str(tokens)]
    return Run(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))


def run_part(part: Part, tokens: Path, console: Console) -> list[Run]:
    """First torch with every order of the data, then the others with order 0."""
    jobs = [(TORCH, order) for order in range(ORDERS)] + [(loss, 0) for loss in part.losses]
    return [run_apart(part, *job, tokens) for job in track(jobs, part.what, console=console)]


# ---- what the runs say -----------------------------------------------------------------------------------------------


class Findings:
    """The runs of a part beside torch's first, and the noise."""

    def __init__(self, part: Part, runs: list[Run]):
        self.part, self.runs = part, runs
        self.baseline = runs[0]
        self.noise = stdev(run.held_out for run in runs if run.loss == TORCH)

    def distance(self, run: Run) -> float:
        """From torch's end with the same order of the data, in standard deviations of the noise."""
        return (run.held_out - self.baseline.held_out) / self.noise

    def norm_error(self, run: Run) -> float:
        """Of the first step's gradient, whose weights and data are the baseline's; relative."""
        return abs(run.gradient_norms[0] / self.baseline.gradient_norms[0] - 1)

    def allowed_norm_error(self) -> float:
        """A spacing of the least exact dtype that the gradient passes through."""
        return torch.finfo(torch.bfloat16 if self.part.autocast else self.part.dtype).eps

    def complaints(self) -> Iterator[str]:
        """A sentence for each run that is not where it has to be."""
        for run in self.runs:
            where = f"{self.part.name}, {run.loss}"
            distance, norm_error, allowed = self.distance(run), self.norm_error(run), self.allowed_norm_error()
            near = abs(distance) <= ALLOWED  # false for NaN
            if run.loss == CONTROL and near:
                yield f"{where}: ends {distance:+.2f} standard deviations from torch; a wrong gradient has to be seen."
            if run.loss not in (TORCH, CONTROL):
                if not near:
                    yield f"{where}: ends {distance:+.2f} standard deviations from torch; {ALLOWED:g} are allowed."
                if not norm_error <= allowed:
                    yield f"{where}: the first gradient's norm is off by {norm_error:.2g}; {allowed:.2g} is allowed."

    def cells(self, run: Run) -> list[str]:
        """A line of the table."""
        cells = [run.loss, str(run.order), f"{run.held_out:.5f}", f"{run.last:.5f}"]
        if run.loss == TORCH:
            return [*cells, "", "", ""]
        difference = run.held_out - self.baseline.held_out
        return [*cells, f"{difference:+.1e}", f"{self.distance(run):+.1e}", f"{self.norm_error(run):.1e}"]

    def sentences(self) -> Iterator[str]:
        """The noise, then the steps of each run beside torch's."""
        yield (
            f"The noise, the standard deviation of the held-out loss over torch's {ORDERS} orders of the data, is"
            f" {self.noise:.4f}; the control ends {abs(self.distance(self.runs[-1])):.1f} of them away."
        )
        if self.part.dtype == torch.float32 and not self.part.autocast:
            for run in self.runs:
                if run.loss not in (TORCH, CONTROL):
                    yield f"{run.loss}: {Agreement.of(self.baseline.losses, run.losses).in_words()}."


_HEAD = [
    "loss",
    "order of the data",
    "held-out loss",
    f"mean of the last {LAST} training losses",
    "held-out loss minus torch's",
    "in standard deviations",
    "first gradient's norm, relative to torch's, off by",
]


def markdown(findings: Findings, measured: str) -> str:
    """For the page."""
    rows = [_HEAD, ["---", *["---:"] * (len(_HEAD) - 1)], *(findings.cells(run) for run in findings.runs)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n\n".join(["\n".join(lines), *findings.sentences(), f"Measured on {measured}."])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="one of the tables (default: all)")
    parser.add_argument("--run", nargs=3, metavar=("LOSS", "ORDER", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        loss, order, path = options.run
        json.dump(asdict(run(PARTS[options.part], loss, int(order), torch.from_numpy(np.load(path)))), sys.stdout)
        return 0

    console = Console()
    complaints: list[str] = []
    environment = describe_cpu({})  # before the first table is written, which changes the checkout
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "tokens.npy"
        np.save(tokens, gpt.read_tokens(console).numpy())
        for part in [PARTS[options.part]] if options.part else PARTS.values():
            findings = Findings(part, run_part(part, tokens, console))
            text = markdown(findings, measured_on(environment, findings.baseline.threads))
            console.print(
                f"\n{part.what}: {STEPS} steps of {SEQUENCES * gpt.CONTEXT} tokens", text, sep="\n\n", highlight=False
            )
            _PAGE.write_text(between(_PAGE.read_text(), part.begin, part.end, text))
            complaints += findings.complaints()
    for complaint in complaints:
        print(f"training.py: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
