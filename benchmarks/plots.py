"""Draws the pictures of a results.csv, into the directory where it is: ``python benchmarks/plots.py results.csv``.

vocabulary.png  time of the loss against the vocabulary size, with the limit line, and memory beside it
scaling.png     time of an element against the number of elements
gpu.png         as vocabulary.png, of a gpu.csv
linear.png      time and memory of linear cross entropy against the vocabulary size, of a linear.csv
gpu_linear.png  the same of a gpu_linear.csv
"""

import sys
from pathlib import Path

import cases
from cases import Case
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Environment, Record, measured_on, of_gpu, read_csv

_LABELS = {
    cases.EAGER: "F.cross_entropy",
    cases.COMPILE: "torch.compile of it",
    cases.JAX: "JAX, optax, jitted",
    cases.TENSORFLOW: "TensorFlow",
    cases.LIGER: "Liger-Kernel, in place",
    cases.QUACK: "quack",
    cases.DEFAULT: "softmax_ext",
    cases.INPLACE: "softmax_ext, in place",
}
_LINEAR_LABELS = {
    cases.EAGER: "F.linear, F.cross_entropy",
    cases.COMPILE: "torch.compile of it",
    cases.CHUNKED: "F.linear_cross_entropy, chunked",
    cases.LIGER: "Liger-Kernel",
    cases.CUT: "Cut Cross-Entropy",
    cases.DEFAULT: "softmax_ext.linear_cross_entropy",
}
_COLOURS = {
    cases.EAGER: "#7f7f7f",
    cases.COMPILE: "#9467bd",
    cases.JAX: "#2ca02c",
    cases.TENSORFLOW: "#ff7f0e",
    cases.LIGER: "#2ca02c",
    cases.QUACK: "#ff7f0e",
    cases.CHUNKED: "#17becf",
    cases.CUT: "#ff7f0e",
    cases.DEFAULT: "#d62728",
    cases.INPLACE: "#1f77b4",
}


def _series(records: list[Record], shown: tuple[Case, ...], what: str, variant: str) -> list[Record]:
    """The records with a median, in the order of the cases."""
    names = [case.name for case in shown]
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


def _footnote(records: list[Record], environment: Environment) -> str:
    return measured_on(environment, max(record.threads for record in records))


def _in_sections(records: list[Record], *sections: str) -> list[Record]:
    return [record for record in records if record.section in sections]


def _two_axes(title: str, memory_title: str) -> tuple[Figure, Axes, Axes]:
    """A picture of time and, beside it, of memory."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    time, memory = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=9)
    time.set(title="time", xlabel="vocabulary size", ylabel="ms (medians; band: quartiles)")
    memory.set(title=memory_title, xlabel="vocabulary size", ylabel="MiB")
    return figure, time, memory


def _draw_variants(
    axes: Axes, records: list[Record], shown: tuple[Case, ...], what: str, labels: dict[str, str]
) -> None:
    for variant, label in labels.items():
        series = _series(records, shown, what, variant)
        if series:
            _line(axes, series, color=_COLOURS[variant], label=label)


def _draw_logits(axes: Axes, series: list[Record], label: str) -> None:
    axes.plot([record.classes for record in series], [record.logits_mib for record in series], "k:", label=label)


def draw_vocabulary(records: list[Record], environment: Environment) -> Figure:
    """Time and memory of the loss by vocabulary size."""
    if of_gpu(environment):
        records = _in_sections(records, cases.GPU_SECTION, cases.GPU_VOCABULARY_SECTION)
        shown, limit = cases.GPU_VOCABULARY, cases.COPY
    else:
        records = _in_sections(records, cases.TABLE_SECTION, cases.VOCABULARY_SECTION)
        shown, limit = cases.VOCABULARY, cases.MUL
    title = f"cross entropy of {shown[0].rows} tokens, {shown[0].dtype}, forward and backward"
    title += f"\n{_footnote(records, environment)}"
    figure, time, memory = _two_axes(title, "memory that a step adds at most")
    _draw_variants(time, records, shown, cases.LOSS, _LABELS)
    least = _series(records, shown, cases.LOSS, limit)
    label = f"limit: the logits read and written once ({limit})"
    time.plot([record.classes for record in least], [record.median for record in least], "k--", label=label)
    _draw_variants(memory, records, shown, cases.MEMORY, _LABELS)
    _draw_logits(memory, _series(records, shown, cases.MEMORY, cases.DEFAULT), "the logits themselves")
    for axes in (time, memory):
        _finish(axes)
    return figure


def draw_linear(records: list[Record], environment: Environment) -> Figure:
    """Time and memory of linear cross entropy by vocabulary size."""
    shown = cases.LINEAR_VOCABULARY[cases.CPU]
    if of_gpu(environment):
        shown = cases.LINEAR_VOCABULARY[cases.CUDA] + cases.LINEAR_TABLE[cases.CUDA]
    shown = tuple(sorted(shown, key=lambda case: case.classes))
    records = _in_sections(records, cases.LINEAR_SECTION, cases.LINEAR_VOCABULARY_SECTION)
    title = f"linear cross entropy of {shown[0].rows} tokens, hidden size {shown[0].features}, {shown[0].dtype}"
    title += f", forward and backward\n{_footnote(records, environment)}"
    figure, time, memory = _two_axes(title, "memory that a step adds at most, gradients aside")
    _draw_variants(time, records, shown, cases.LOSS, _LINEAR_LABELS)
    _draw_variants(memory, records, shown, cases.MEMORY, _LINEAR_LABELS)
    _draw_logits(memory, _series(records, shown, cases.LOSS, cases.DEFAULT), "the logits")
    for axes in (time, memory):
        _finish(axes)
    return figure


def draw_scaling(records: list[Record], environment: Environment) -> Figure:
    """Nanoseconds of an element by their number."""
    records = _in_sections(records, cases.SCALING_SECTION)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    title = f"cross entropy over {cases.SCALING[0].classes} classes, float32, forward and backward"
    figure.suptitle(f"{title}\n{_footnote(records, environment)}", fontsize=7)
    limit = (cases.MUL, "limit: read and written once (mul_)", "black")
    for variant, label, colour in [(v, _LABELS[v], _COLOURS[v]) for v in (cases.DEFAULT, cases.INPLACE)] + [limit]:
        series = _series(records, cases.SCALING, cases.LOSS, variant)
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
        (cases.VOCABULARY_SECTION, "vocabulary", draw_vocabulary),
        (cases.SCALING_SECTION, "scaling", draw_scaling),
        (cases.GPU_VOCABULARY_SECTION, "gpu", draw_vocabulary),
        (cases.LINEAR_VOCABULARY_SECTION, "gpu_linear" if of_gpu(environment) else "linear", draw_linear),
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
