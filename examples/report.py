"""Runs both examples and reports what softmax_ext changes: `make demo`.

It runs digits.py first. Then it trains the GPT of gpt.py once with each of its losses, from the
same weights and on the same batches. Each training has a process of its own, so that none finds
memory that another left. It prints a table of the figures and writes into demo/, in the directory
above examples/:

    report.png  loss curves and their difference, time, memory, and the digits, side by side
    report.csv  one line for each step of each run: its loss, its times, its memory

Every figure comes from the run itself. Times are medians over the steps.

    python examples/report.py
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import explain_missing, positive_int

try:
    import digits
    import gpt
    import numpy as np
    from agreement import Agreement
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.ticker import MaxNLocator
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(explain_missing(error))

DIRECTORY = Path(__file__).resolve().parents[1] / "demo"
BASELINE, *OTHERS = gpt.LOSSES
COLOURS = dict(zip(gpt.LOSSES, ["#7f7f7f", "#d62728", "#1f77b4"], strict=False))


# ----------------------------------------------------------------------------------------- the runs


def run_gpt(loss_name: str, tokens: Path, steps: int) -> list[gpt.Step]:
    """Trains a GPT in a process of its own, which shows its progress in this terminal."""
    figures = tokens.with_name(f"{loss_name}.csv")
    command = [sys.executable, str(Path(gpt.__file__))]
    command += ["--loss", loss_name, "--steps", str(steps)]
    command += ["--tokens", str(tokens), "--csv", str(figures)]
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(f"report.py: training with {loss_name} ended with status {status}; see above.")
    return gpt.read_csv(figures)


def run_gpts(steps: int, console: Console) -> dict[str, list[gpt.Step]]:
    """Trains the GPT with each loss on the same tokens; returns the steps of each."""
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "tokens.npy"
        np.save(tokens, gpt.read_tokens(console).numpy())
        return {name: run_gpt(name, tokens, steps) for name in gpt.LOSSES}


# ---------------------------------------------------------------------------------------- the table


def comparison(totals: dict[str, gpt.Totals], runs: dict[str, list[gpt.Step]]) -> Table:
    """The figures of each run in columns, then the baseline's divided by those of each of OTHERS."""
    table = Table(title=f"the same GPT, {len(runs[BASELINE])} steps, by loss")
    table.add_column("", no_wrap=True)
    for name in gpt.LOSSES:
        table.add_column(name, justify="right", overflow="fold")
    for name in OTHERS:
        table.add_column(f"{BASELINE} / {name}", justify="right", overflow="fold")

    table.add_row("loss at the last step", *(f"{steps[-1].loss:.6f}" for steps in runs.values()))
    for label, attribute, unit in [
        ("time of a step", "step_ms", "ms"),
        ("  in output layer and loss", "loss_ms", "ms"),
        ("    forward", "loss_forward_ms", "ms"),
        ("    backward", "loss_backward_ms", "ms"),
        ("  in all else", "rest_ms", "ms"),
        ("peak memory", "peak_memory_mib", "MiB"),
        ("  before the first step", "initial_memory_mib", "MiB"),
        ("  added by training", "added_memory_mib", "MiB"),
    ]:
        values = {name: getattr(totals[name], attribute) for name in gpt.LOSSES}
        ratios = [values[BASELINE] / values[name] for name in OTHERS]
        table.add_row(
            label,
            *(f"{value:.0f} {unit}" for value in values.values()),
            *(f"{ratio:.2f}" for ratio in ratios),
        )
    return table


# ------------------------------------------------------------------------------------ the picture


def draw_curves(axes: Axes, runs: dict[str, list[gpt.Step]]) -> None:
    """The loss of each run. The baseline's line is wide, so that the others do not hide it."""
    for name, steps in runs.items():
        axes.plot(
            [step.step for step in steps],
            [step.loss for step in steps],
            color=COLOURS[name],
            linewidth=5 if name == BASELINE else 1.5,
            alpha=0.5 if name == BASELINE else 1,
            label=name,
        )
    axes.set(title="loss", xlabel="step", ylabel="cross entropy (nats per token)")
    axes.legend()


def draw_difference(axes: Axes, agreements: dict[str, Agreement]) -> None:
    """The difference of the losses, counted in spacings of float32 at the baseline's loss.

    The points of each run are smaller than those of the run before, so that all can be seen.
    """
    for size, (name, agreement) in zip((7, 3), agreements.items(), strict=True):
        steps = np.arange(1, len(agreement.difference) + 1)
        axes.vlines(steps, 0, agreement.spacings, color=COLOURS[name])
        axes.plot(
            steps,
            agreement.spacings,
            "o",
            markersize=size,
            color=COLOURS[name],
            label=f"{name}: at most {np.abs(agreement.difference).max():.2g}",
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.3)
    axes.set(title=f"loss minus {BASELINE}'s", xlabel="step", ylabel="difference (float32 spacings)")
    axes.legend(loc="upper left")


def draw_bars(
    axes: Axes,
    totals: dict[str, gpt.Totals],
    parts: dict[str, tuple[str, str]],
    ends: list[str],
) -> None:
    """A bar for each run: ``parts``, {attribute: (label, colour)}, side by side, and then a text of ``ends``."""
    left = np.zeros(len(totals))
    for attribute, (label, colour) in parts.items():
        widths = np.array([getattr(run, attribute) for run in totals.values()])
        axes.barh(list(totals), widths, left=left, color=colour, label=label, height=0.5)
        left += widths
    for row, (end, text) in enumerate(zip(left, ends, strict=True)):
        axes.annotate(text, (end, row), (6, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.4)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=len(parts), frameon=False)


def draw_time(axes: Axes, totals: dict[str, gpt.Totals]) -> None:
    """The time of a step in three parts: output layer and loss forward, the same backward, and all else."""
    parts = {
        "loss_forward_ms": ("output layer and loss, forward", "#ff7f0e"),
        "loss_backward_ms": ("backward", "#d62728"),
        "rest_ms": ("all else", "#b0b0b0"),
    }
    ends = [f"{run.step_ms:.0f} ms,\n{run.loss_ms:.0f} in layer and loss" for run in totals.values()]
    draw_bars(axes, totals, parts, ends)
    axes.set(title="time of a training step (medians)", xlabel="ms")


def draw_memory(axes: Axes, totals: dict[str, gpt.Totals]) -> None:
    """The peak memory in two parts: added by training, and present before the first step."""
    parts = {
        "added_memory_mib": ("added by training", "#1f77b4"),
        "initial_memory_mib": ("before the first step", "#b0b0b0"),
    }
    ends = [f"{run.peak_memory_mib:.0f} MiB,\n{run.added_memory_mib:.0f} added" for run in totals.values()]
    draw_bars(axes, totals, parts, ends)
    axes.set(title="peak memory of the process", xlabel="MiB")


def draw_digits(figure: SubFigure, result: digits.Result) -> None:
    """The digits that digits.py shows, each beside its predicted distribution."""
    figure.suptitle(
        f"digits.py: {result.accuracy:.2%} of {len(result.prediction)} held-out digits recognised;\n"
        "the first two of them and the two least certain\n"
        "(green: what it is; red: what it is taken for and is not)"
    )
    positions = digits.interesting(result)
    grid = figure.subplots(len(positions), 2, width_ratios=[2, 3])
    for (image, bars), position in zip(grid, positions, strict=True):
        target = int(result.test.target[position])
        prediction = int(result.prediction[position])
        probabilities = result.probabilities[position].tolist()
        image.imshow(result.test.images[position].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        image.set(xticks=[], yticks=[], ylabel=f"a {target}")
        colours = ["#1f77b4"] * 10
        colours[prediction] = "#d62728"
        colours[target] = "#2ca02c"
        bars.bar(range(10), probabilities, color=colours)
        bars.set(xticks=range(10), ylim=(0, 1.2), yticks=[0, 0.5, 1])
        bars.text(prediction, probabilities[prediction] + 0.03, f"{max(probabilities):.1%}", ha="center")
        bars.spines[["top", "right"]].set_visible(False)


def draw(
    path: Path,
    runs: dict[str, list[gpt.Step]],
    totals: dict[str, gpt.Totals],
    agreements: dict[str, Agreement],
    result: digits.Result,
) -> None:
    """Draws the whole report."""
    figure = Figure(figsize=(16, 9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[7, 3], wspace=0.03)
    tokens = gpt.SEQUENCES * gpt.CONTEXT
    left.suptitle(
        "gpt.py: the same GPT trained with each loss\n"
        f"{tokens} tokens a step, vocabulary {gpt.VOCABULARY}:"
        f" {tokens * gpt.VOCABULARY * 4 / gpt.MIB:.0f} MiB of logits"
    )
    ((curves, difference), (time_bars, memory_bars)) = left.subplots(2, 2, height_ratios=[3, 2])
    draw_curves(curves, runs)
    draw_difference(difference, agreements)
    draw_time(time_bars, totals)
    draw_memory(memory_bars, totals)
    for axis in (curves.xaxis, difference.xaxis, difference.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    for axes in left.axes:
        axes.spines[["top", "right"]].set_visible(False)
    draw_digits(right, result)
    figure.savefig(path, dpi=100)


# -------------------------------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps",
        type=positive_int,
        default=gpt.STEPS,
        help="training steps of each GPT (default: %(default)s)",
    )
    options = parser.parse_args()
    console = Console()
    start = time.perf_counter()
    DIRECTORY.mkdir(exist_ok=True)

    result = digits.train(digits.EPOCHS, console)
    digits.show(result, console)

    runs = run_gpts(options.steps, console)
    totals = {name: gpt.Totals.of(steps) for name, steps in runs.items()}
    losses = {name: [step.loss for step in steps] for name, steps in runs.items()}
    agreements = {name: Agreement.of(losses[BASELINE], losses[name]) for name in OTHERS}
    console.print(comparison(totals, runs))
    for name, agreement in agreements.items():
        console.print(f"{name} and {BASELINE}: {agreement.in_words()}", highlight=False)

    gpt.write_csv(DIRECTORY / "report.csv", [step for steps in runs.values() for step in steps])
    draw(DIRECTORY / "report.png", runs, totals, agreements, result)
    console.print(f"wrote report.png and report.csv to {DIRECTORY} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
