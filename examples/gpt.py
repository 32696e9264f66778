"""Trains a small GPT on Python's own sources, with PyTorch's loss or with one of softmax_ext's.

The text is the standard library of the Python that runs this script. A byte-level BPE (byte pair
encoding) of 32768 entries is trained on the text first, and cuts it into tokens. With every loss
the same seed gives the same initial weights and the same batches. A step takes 2048 tokens, so
the logits are 2048 x 32768 floats, 256 MiB. That is large beside everything else that so small a
model computes. Such a model gains most from another loss: one of softmax_ext's computes the same
loss from the logits, the other includes the output layer and never holds all logits.

Each step records its loss, its time, the part of that time in the output layer and the loss, and
the highest resident memory.

    python examples/gpt.py --loss torch --steps 50
    python examples/gpt.py --loss softmax_ext --steps 50
    python examples/gpt.py --loss linear_cross_entropy --steps 50
"""

import argparse
import csv
import re
import resource
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from common import explain_missing, positive_int

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from rich.console import Console
    from rich.progress import track
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from torch import Tensor, nn

    import softmax_ext
except ModuleNotFoundError as error:
    sys.exit(explain_missing(error))

# Hidden states [tokens, width], the output layer's weight [vocabulary, width], target [tokens] -> loss
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def of_logits(criterion: nn.Module) -> Loss:
    """The output layer, and a loss that takes its output."""
    return lambda hidden, weight, target: criterion(F.linear(hidden, weight), target)


LOSSES: dict[str, Loss] = {
    "torch": of_logits(nn.CrossEntropyLoss()),
    "softmax_ext": of_logits(softmax_ext.CrossEntropyLoss()),
    "linear_cross_entropy": softmax_ext.linear_cross_entropy,
}

SEED = 0
STEPS = 50
SEQUENCES = 8  # in a batch
CONTEXT = 256  # tokens in a sequence
VOCABULARY = 32768
WIDTH = 128
HEADS = 4
BLOCKS = 2
LEARNING_RATE = 1e-3

TEXT_BYTES = 8 * 2**20  # the text ends here, so that training the tokeniser takes little time
SKIPPED = {  # directories
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",  # generated tables
    "pydoc_data",  # generated tables
}
END_OF_FILE = "<|endoftext|>"

MIB = 2**20


# ----------------------------------------------------------------------------------------- the text


def stdlib_sources() -> list[str]:
    """The sources of the standard library, in alphabetical order, up to TEXT_BYTES."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    sources: list[str] = []
    remaining = TEXT_BYTES
    for path in paths:
        if SKIPPED.isdisjoint(path.parts):
            source = (root / path).read_bytes()
            remaining -= len(source)
            if remaining < 0:
                break
            sources.append(source.decode("utf-8", errors="replace"))
    return sources


def train_tokenizer(sources: list[str]) -> Tokenizer:
    """A byte-level BPE of VOCABULARY entries, trained on these sources."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_FILE],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sources, trainer)
    return tokenizer


def read_tokens(console: Console) -> Tensor:  # [tokens]
    """The standard library as one stream of token ids, with END_OF_FILE after each file."""
    sources = stdlib_sources()
    text_bytes = sum(len(source.encode()) for source in sources)
    with console.status("training the tokeniser"):
        tokenizer = train_tokenizer(sources)
    ids: list[int] = []
    for source in track(sources, "cutting the text into tokens", console=console):
        ids += tokenizer.encode(source + END_OF_FILE).ids
    if len(ids) <= CONTEXT:
        sys.exit(
            f"{sysconfig.get_path('stdlib')} holds only {len(ids)} tokens of Python source, fewer"
            f" than one sequence of {CONTEXT + 1}: this Python came without its sources."
        )
    console.print(
        f"{len(sources)} files of the standard library, {text_bytes / MIB:.1f} MiB, are"
        f" {len(ids)} tokens from a vocabulary of {tokenizer.get_vocab_size()}"
    )
    return torch.tensor(ids)


def batches(
    tokens: Tensor, steps: int, sequences: int = SEQUENCES, context: int = CONTEXT, seed: int = SEED
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random pieces of the text: inputs, and targets one token later; [sequences, context] each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - context, (sequences, 1), generator=generator)
        places = starts + torch.arange(context)
        yield tokens[places], tokens[places + 1]


# ---------------------------------------------------------------------------------------- the model


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def attention(self, x: Tensor) -> Tensor:  # [sequences, positions, width], returns the same
        sequences, positions, width = x.shape
        heads = self.query_key_value(x).view(sequences, positions, 3, HEADS, width // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [sequences, heads, positions, features]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_output(mixed.transpose(1, 2).reshape(x.shape))

    def forward(self, x: Tensor) -> Tensor:  # [sequences, positions, width], returns the same
        x = x + self.attention(self.attention_norm(x))
        return x + self.perceptron(x)


class GPT(nn.Module):
    """Token ids -> hidden states, from which the output layer ``head`` predicts the next token."""

    def __init__(self, vocabulary: int = VOCABULARY, context: int = CONTEXT, width: int = WIDTH) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.token_embedding.weight  # tied: one matrix reads and writes tokens

    def forward(self, ids: Tensor) -> Tensor:  # [sequences, positions], returns [..., width]
        positions = torch.arange(ids.shape[1])
        x = self.token_embedding(ids) + self.position_embedding(positions)
        return self.norm(self.blocks(x))


# ------------------------------------------------------------------------------------- the training


@dataclass
class Step:
    """The loss, the times and the memory of one training step."""

    loss_name: str
    step: int
    loss: float
    step_ms: float
    loss_forward_ms: float  # of the output layer and the loss
    loss_backward_ms: float
    initial_memory_mib: float  # resident before the first step
    peak_memory_mib: float  # the most that was resident during this step


@dataclass
class Totals:
    """A training run in a few figures: medians over its steps, and the highest memory of any step."""

    step_ms: float
    loss_forward_ms: float
    loss_backward_ms: float
    initial_memory_mib: float
    peak_memory_mib: float

    @classmethod
    def of(cls, steps: list[Step]) -> "Totals":
        return cls(
            step_ms=median(step.step_ms for step in steps),
            loss_forward_ms=median(step.loss_forward_ms for step in steps),
            loss_backward_ms=median(step.loss_backward_ms for step in steps),
            initial_memory_mib=steps[0].initial_memory_mib,
            peak_memory_mib=max(step.peak_memory_mib for step in steps),
        )

    @property
    def loss_ms(self) -> float:
        return self.loss_forward_ms + self.loss_backward_ms

    @property
    def rest_ms(self) -> float:
        return self.step_ms - self.loss_ms

    @property
    def added_memory_mib(self) -> float:
        """The memory that training adds to that of the model, the text and the libraries."""
        return self.peak_memory_mib - self.initial_memory_mib


def restart_peak_memory() -> None:
    """Makes peak_memory_mib count from now on, if the system can do that (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib() -> float:
    """The most memory that was resident in this process."""
    with suppress(OSError):
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if peak:
            return int(peak[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def adamw(model: GPT) -> torch.optim.Optimizer:
    """The optimiser of every run."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))


def train_step(
    model: GPT,
    loss_fn: Loss,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    target: Tensor,
    autocast: bool = False,
) -> tuple[float, dict[str, float]]:
    """One training step; returns its loss, and its times in milliseconds under the names of Step."""
    hidden_gradient_ready: list[float] = []

    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model(inputs)
        # Backward begins with the loss and the output layer. The gradient of the hidden states is their
        # last result: when this hook gets it, they are done and nothing else has begun.
        hidden.register_hook(lambda _: hidden_gradient_ready.append(time.perf_counter()))
        loss_start = time.perf_counter()
        loss = loss_fn(hidden.flatten(0, 1), model.head.weight, target.flatten())
        loss_end = time.perf_counter()
    optimizer.zero_grad()
    backward_start = time.perf_counter()
    loss.backward()
    optimizer.step()
    end = time.perf_counter()

    return loss.item(), {
        "step_ms": 1000 * (end - start),
        "loss_forward_ms": 1000 * (loss_end - loss_start),
        "loss_backward_ms": 1000 * (hidden_gradient_ready[0] - backward_start),
    }


def train(loss_name: str, tokens: Tensor, steps: int) -> Iterator[Step]:
    """Trains a new GPT with one of LOSSES and yields each step when it is done."""
    torch.manual_seed(SEED)
    model = GPT()
    optimizer = adamw(model)

    restart_peak_memory()
    initial_memory_mib = peak_memory_mib()
    for step, (inputs, target) in enumerate(batches(tokens, steps), start=1):
        restart_peak_memory()
        loss, milliseconds = train_step(model, LOSSES[loss_name], optimizer, inputs, target)
        yield Step(
            loss_name,
            step,
            loss,
            **milliseconds,
            initial_memory_mib=initial_memory_mib,
            peak_memory_mib=peak_memory_mib(),
        )


# -------------------------------------------------------------------------------------- the command


def write_csv(path: Path, steps: list[Step]) -> None:
    """Writes one line for each step; the columns are the fields of Step."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, asdict(steps[0]).keys())
        writer.writeheader()
        writer.writerows(asdict(step) for step in steps)


def read_csv(path: Path) -> list[Step]:
    """The steps that write_csv wrote."""
    with path.open(newline="") as file:
        lines = csv.reader(file)
        next(lines)
        return [Step(name, int(step), *map(float, figures)) for name, step, *figures in lines]


def summary(steps: list[Step]) -> str:
    """A training run in one sentence."""
    totals = Totals.of(steps)
    return (
        f"{steps[0].loss_name}: loss {steps[0].loss:.4f} at first, {steps[-1].loss:.4f} at step"
        f" {len(steps)}; {totals.step_ms:.0f} ms a step, {totals.loss_ms:.0f} ms of it in the"
        f" output layer and the loss (medians); peak memory {totals.peak_memory_mib:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, default="softmax_ext", help="whose loss (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("--tokens", type=Path, help="take the token ids from this .npy file, not from the text")
    parser.add_argument("--csv", type=Path, help="write a line of figures for each step there")
    options = parser.parse_args()

    console = Console()
    tokens = torch.from_numpy(np.load(options.tokens)) if options.tokens else read_tokens(console)
    steps = list(
        track(
            train(options.loss, tokens, options.steps),
            f"training with {options.loss}",
            total=options.steps,
            console=console,
        )
    )
    console.print(summary(steps), highlight=False)
    if options.csv:
        write_csv(options.csv, steps)


if __name__ == "__main__":
    main()
