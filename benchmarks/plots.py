"""Draws the pictures of a results.csv, into the directory where it is: ``python benchmarks/plots.py results.csv``.

vocabulary.png  time of the loss against the vocabulary size, with the limit line, and memory beside it
scaling.png     time of an element against the number of elements
gpu.png         as vocabulary.png, of a gpu.csv
linear.png      time and memory of linear cross entropy against the vocabulary size, of a linear.csv
gpu_linear.png  the same of a gpu_linear.csv
"""

import sys
from pathlib import Path

from cases import (
    COMPILE,
    COPY,
    DEFAULT,
    EAGER,
    INPLACE,
    JAX,
    LIGER,
    LOSS,
    MEMORY,
    MUL,
    QUACK,
    SCALING,
    TENSORFLOW,
    VOCABULARY,
    Case,
)
from gpu_cases import SECTION, VOCABULARY_SECTION
from gpu_cases import VOCABULARY as GPU_VOCABULARY
from linear_cases import CHUNKED, CUT, LinearCase
from linear_cases import GPU_TABLE as GPU_LINEAR_TABLE
from linear_cases import GPU_VOCABULARY as GPU_LINEAR_VOCABULARY
from linear_cases import SECTION as LINEAR_TABLE_SECTION
from linear_cases import VOCABULARY as LINEAR_VOCABULARY
from linear_cases import VOCABULARY_SECTION as LINEAR_SECTION
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Environment, GpuEnvironment, Record, measured_on, read_csv

_LABELS = {
    EAGER: "F.cross_entropy",
    COMPILE: "torch.compile of it",
    JAX: "JAX, optax, jitted",
    TENSORFLOW: "TensorFlow",
    LIGER: "Liger-Kernel, in place",
    QUACK: "quack",
    DEFAULT: "softmax_ext",
    INPLACE: "softmax_ext, in place",
}
_LINEAR_LABELS = {
    EAGER: "F.linear, F.cross_entropy",
    COMPILE: "torch.compile of it",
    CHUNKED: "F.linear_cross_entropy, chunked",
    LIGER: "Liger-Kernel",
    CUT: "Cut Cross-Entropy",
    DEFAULT: "softmax_ext.linear_cross_entropy",
}
_COLOURS = {
    EAGER: "#7f7f7f",
    COMPILE: "#9467bd",
    JAX: "#2ca02c",
    TENSORFLOW: "#ff7f0e",
    LIGER: "#2ca02c",
    QUACK: "#ff7f0e",
    CHUNKED: "#17becf",
    CUT: "#ff7f0e",
    DEFAULT: "#d62728",
    INPLACE: "#1f77b4",
}


def _series(
    records: list[Record], cases: tuple[Case, ...] | tuple[LinearCase, ...], what: str, variant: str
) -> list[Record]:
    """The records with a median, in the order of the cases."""
    names = [case.name for case in cases]
    found = [
        record
        for record in records
        if (record.what, record.variant) == (what, variant) and record.case in names and record.median is not None
    ]
    return sorted(found, key=lambda record: names.index(record.case))


def _line(axes: Axes, series: list[Record], **style: str) -> None:
    """The medians by number of classes, with the quartiles as a band."""
    classes = [record.classes for record in series]
    axes.plot(classes, [record.median for record in series], "o-", markersize=3.5, **style)
    quartiles = [record.q1 for record in series], [record.q3 for record in series]
    axes.fill_between(classes, *quartiles, color=style["color"], alpha=0.2, linewidth=0)


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _footnote(records: list[Record], environment: Environment | GpuEnvironment) -> str:
    return measured_on(environment, max(record.threads for record in records))


def _draw_against_vocabulary(axes: Axes, records: list[Record], cases: tuple[Case, ...], what: str) -> None:
    for variant, label in _LABELS.items():
        series = _series(records, cases, what, variant)
        if series:
            _line(axes, series, color=_COLOURS[variant], label=label)


def draw_vocabulary(records: list[Record], environment: Environment) -> Figure:
    """Time and memory of the loss by vocabulary size."""
    records = [record for record in records if record.section in ("table", "vocabulary")]
    return _against_vocabulary(records, environment, VOCABULARY, MUL)


def draw_gpu(records: list[Record], environment: GpuEnvironment) -> Figure:
    """The same on a GPU."""
    records = [record for record in records if record.section in (SECTION, VOCABULARY_SECTION)]
    return _against_vocabulary(records, environment, GPU_VOCABULARY, COPY)


def _against_vocabulary(
    records: list[Record], environment: Environment | GpuEnvironment, cases: tuple[Case, ...], limit: str
) -> Figure:
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    time, memory = figure.subplots(1, 2)
    title = f"cross entropy of {cases[0].rows} tokens, {cases[0].dtype}, forward and backward"
    figure.suptitle(f"{title}\n{_footnote(records, environment)}", fontsize=9)
    _draw_against_vocabulary(time, records, cases, LOSS)
    least = _series(records, cases, LOSS, limit)
    label = f"limit: the logits read and written once ({limit})"
    time.plot([record.classes for record in least], [record.median for record in least], "k--", label=label)
    time.set(title="time", xlabel="vocabulary size", ylabel="ms (medians; band: quartiles)")
    _draw_against_vocabulary(memory, records, cases, MEMORY)
    logits = _series(records, cases, MEMORY, DEFAULT)
    xs = [record.classes for record in logits]
    memory.plot(xs, [record.logits_mib for record in logits], "k:", label="the logits themselves")
    memory.set(title="memory that a step adds at most", xlabel="vocabulary size", ylabel="MiB")
    for axes in (time, memory):
        _finish(axes)
    return figure


def draw_linear(records: list[Record], environment: Environment | GpuEnvironment) -> Figure:
    """Time and memory of linear cross entropy by vocabulary size."""
    on_gpu = isinstance(environment, GpuEnvironment)
    cases = GPU_LINEAR_VOCABULARY + GPU_LINEAR_TABLE if on_gpu else LINEAR_VOCABULARY
    cases = tuple(sorted(cases, key=lambda case: case.classes))
    records = [record for record in records if record.section in (LINEAR_SECTION, LINEAR_TABLE_SECTION)]
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    time, memory = figure.subplots(1, 2)
    case = cases[0]
    title = f"linear cross entropy of {case.rows} tokens, hidden size {case.features}, {case.dtype}"
    figure.suptitle(f"{title}, forward and backward\n{_footnote(records, environment)}", fontsize=9)
    for variant, label in _LINEAR_LABELS.items():
        for axes, what in ((time, LOSS), (memory, MEMORY)):
            series = _series(records, cases, what, variant)
            if series:
                _line(axes, series, color=_COLOURS[variant], label=label)
    logits = _series(records, cases, LOSS, DEFAULT)
    memory.plot([r.classes for r in logits], [r.logits_mib for r in logits], "k:", label="the logits")
    time.set(title="time", xlabel="vocabulary size", ylabel="ms (medians; band: quartiles)")
    memory.set(title="memory that a step adds at most, gradients aside", xlabel="vocabulary size", ylabel="MiB")
    for axes in (time, memory):
        _finish(axes)
    return figure


def draw_scaling(records: list[Record], environment: Environment) -> Figure:
    """Nanoseconds of an element by their number."""
    records = [record for record in records if record.section == "scaling"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    title = f"cross entropy over {SCALING[0].classes} classes, float32, forward and backward"
    figure.suptitle(f"{title}\n{_footnote(records, environment)}", fontsize=7)
    limit = (MUL, "limit: read and written once (mul_)", "black")
    for variant, label, colour in [(v, _LABELS[v], _COLOURS[v]) for v in (DEFAULT, INPLACE)] + [limit]:
        series = _series(records, SCALING, LOSS, variant)
        elements = [record.rows * record.classes for record in series]
        per_element = [1e6 * record.median / count for record, count in zip(series, elements, strict=True)]
        axes.plot(elements, per_element, "o-", color=colour, label=label)
    axes.set(xscale="log", xlabel="logits", ylabel="ns for each")
    _finish(axes)
    return figure


def draw(csv: Path) -> list[Path]:
    """Draws the pictures beside the file; those of which it has no section are left out."""
    records, environment = read_csv(csv)
    written = []
    pictures = [
        ("vocabulary", "vocabulary", draw_vocabulary),
        ("scaling", "scaling", draw_scaling),
        (VOCABULARY_SECTION, "gpu", draw_gpu),
        (LINEAR_SECTION, "gpu_linear" if isinstance(environment, GpuEnvironment) else "linear", draw_linear),
    ]
    for section, name, draw_one in pictures:
        if any(record.section == section and record.median is not None for record in records):
            written.append(csv.with_name(f"{name}.png"))
            draw_one(records, environment).savefig(written[-1], dpi=110)
    return written


def main() -> int:
    """The command."""
    if len(sys.argv) != 2:
        print("usage: python benchmarks/plots.py results.csv", file=sys.stderr)
        return 2
    try:
        written = draw(Path(sys.argv[1]))
    except ValueError as error:
        print(f"plots.py: {error}", file=sys.stderr)
        return 2
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
