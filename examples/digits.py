"""Recognises handwritten digits with a small network, trained by plain SGD.

The data are scikit-learn's 1797 scans of 8 x 8 pixels. A fifth of them is held out. The network
ends in ten logits. softmax_ext turns them into the loss for training (softmax cross entropy) and
into the predicted probabilities (softmax). The script prints the accuracy on the held-out fifth.
It also prints four of these digits with their predicted distributions: the first two, and the two
that the network is least sure of.

    python examples/digits.py
"""

import argparse
import sys
from dataclasses import dataclass

from common import explain_missing, positive_int

try:
    import torch
    from rich.columns import Columns
    from rich.console import Console, Group
    from rich.panel import Panel
    from rich.progress import track
    from rich.table import Table
    from rich.text import Text
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import Tensor, nn

    import softmax_ext
except ModuleNotFoundError as error:
    sys.exit(explain_missing(error))

SEED = 0
EPOCHS = 30
BATCH = 32
LEARNING_RATE = 0.5
SHADES = " ░▒▓█"  # from no ink to full ink
ASCII_SHADES = " .+x#"  # for terminals that cannot show SHADES
BAR_WIDTH = 16  # characters of a probability of 1


@dataclass
class Split:
    """Scans, and the digits that they show."""

    images: Tensor  # [scans, 64], 0 is paper and 1 is ink
    target: Tensor  # [scans]


@dataclass
class Result:
    """The held-out scans, and the trained network's probabilities for them."""

    test: Split
    probabilities: Tensor  # [scans, 10]

    @property
    def prediction(self) -> Tensor:  # [scans]
        return self.probabilities.argmax(dim=1)

    @property
    def accuracy(self) -> float:
        return (self.prediction == self.test.target).float().mean().item()


def load_data() -> tuple[Split, Split]:
    """The scans to train on and a held-out fifth, with equal shares of each digit."""
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    target = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(range(len(target)), test_size=0.2, stratify=digits.target, random_state=SEED)
    return Split(images[train], target[train]), Split(images[test], target[test])


def train(epochs: int, console: Console) -> Result:
    """Trains the network and applies it to the held-out fifth."""
    torch.set_num_threads(1)  # with so little work in a step, threads would wait for each other
    torch.manual_seed(SEED)
    training, test = load_data()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    criterion = softmax_ext.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    for _ in track(range(epochs), "training on the digits", console=console):
        for batch in torch.randperm(len(training.target)).split(BATCH):
            loss = criterion(model(training.images[batch]), training.target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with torch.no_grad():
        probabilities = softmax_ext.softmax(model(test.images), dim=1)
    return Result(test, probabilities)


def interesting(result: Result) -> list[int]:
    """Positions of the first two test digits, and of the two others predicted with least certainty."""
    certainty = result.probabilities.max(dim=1).values
    return [0, 1, *(certainty[2:].argsort()[:2] + 2).tolist()]


def picture(image: Tensor, shades: str) -> Text:
    """The scan in characters. A pixel is two characters, because these are twice as high as wide."""
    levels = (image * (len(shades) - 1)).round().int().reshape(8, 8)
    return Text("\n".join("".join(shades[level] * 2 for level in row) for row in levels.tolist()))


def distribution(probabilities: Tensor, target: int, shades: str) -> Table:
    """The ten probabilities as bars: green for the right digit, red for the highest if it is wrong."""
    bars = Table.grid(padding=(0, 1))
    highest = int(probabilities.argmax())
    for digit, probability in enumerate(probabilities.tolist()):
        style = "green" if digit == target else "red" if digit == highest else "dim"
        bar = shades[-1] * round(probability * BAR_WIDTH)
        bars.add_row(str(digit), f"{bar:{BAR_WIDTH}}", f"{probability:6.1%}", style=style)
    return bars


def show(result: Result, console: Console) -> None:
    """Prints the accuracy and a few test digits with their distributions."""
    shades = SHADES if console.encoding.startswith("utf") else ASCII_SHADES
    panels = []
    for position in interesting(result):
        target = int(result.test.target[position])
        prediction = int(result.prediction[position])
        verdict = "right" if prediction == target else f"wrong: it is a {target}"
        body = Group(
            picture(result.test.images[position], shades),
            distribution(result.probabilities[position], target, shades),
        )
        panels.append(Panel(body, title=f"{prediction}? {verdict}", expand=False))
    console.print(Columns(panels))
    right = int((result.prediction == result.test.target).sum())
    console.print(f"{right} of {len(result.test.target)} held-out digits recognised: {result.accuracy:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--epochs",
        type=positive_int,
        default=EPOCHS,
        help="how often training goes through the data (default: %(default)s)",
    )
    options = parser.parse_args()
    console = Console()
    show(train(options.epochs, console), console)


if __name__ == "__main__":
    main()
