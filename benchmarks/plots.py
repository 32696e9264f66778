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

# Of each variant its colour, and what it is called beside other losses and beside other layers.
_LINES = {
    cases.EAGER: ("#7f7f7f", "F.cross_entropy", "F.linear, F.cross_entropy"),
    cases.COMPILE: ("#9467bd", "torch.compile of it", "torch.compile of it"),
    cases.CHUNKED: ("#17becf", "", "F.linear_cross_entropy, chunked"),
    cases.JAX: ("#2ca02c", "JAX, optax, jitted", ""),
    cases.TENSORFLOW: ("#ff7f0e", "TensorFlow", ""),
    cases.LIGER: ("#2ca02c", "Liger-Kernel, in place", "Liger-Kernel"),
    cases.QUACK: ("#ff7f0e", "quack", ""),
    cases.CUT: ("#ff7f0e", "", "Cut Cross-Entropy"),
    cases.DEFAULT: ("#d62728", "softmax_ext", "softmax_ext.linear_cross_entropy"),
    cases.WHOLE: ("#ff9896", "", "the same with memory= for all logits"),
    cases.LEAN: ("#1f77b4", "", "the same with memory= 1/32 of the logits"),
    cases.WIDE: ("#e377c2", "", "the same with float32 logits"),
    cases.INPLACE: ("#1f77b4", "softmax_ext, in place", ""),
}


_VOCABULARY_SECTIONS = (
    *(cases.TABLE_SECTION, cases.VOCABULARY_SECTION),
    *(cases.GPU_SECTION, cases.GPU_VOCABULARY_SECTION),
    *(cases.LINEAR_SECTION, cases.LINEAR_VOCABULARY_SECTION),
)


def _series(records: list[Record], shown: tuple[Case, ...], what: str, variant: str) -> list[Record]:
    """The records with a median, in the order of the cases."""
    names = [case.name for case in shown]
    found = [
        record
        for record in records
        if (record.what, record.variant) == (what, variant) and record.case in names and record.median is not None
    ]
    return sorted(found, key=lambda record: names.index(record.case))


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _footnote(records: list[Record], environment: Environment) -> str:
    return measured_on(environment, max(record.threads for record in records))


def _draw_variants(axes: Axes, records: list[Record], shown: tuple[Case, ...], what: str) -> None:
    """The medians by number of classes, with the quartiles as a band."""
    for variant, (colour, *labels) in _LINES.items():
        series = _series(records, shown, what, variant)
        if series:
            classes = [record.classes for record in series]
            medians = [record.median for record in series]
            axes.plot(classes, medians, "o-", markersize=3.5, color=colour, label=labels[shown[0].features > 0])
            quartiles = [record.q1 for record in series], [record.q3 for record in series]
            axes.fill_between(classes, *quartiles, color=colour, alpha=0.2, linewidth=0)


def draw_vocabulary(records: list[Record], environment: Environment) -> Figure:
    """Time and memory by vocabulary size, of the loss or of the layer with it."""
    device = cases.CUDA if of_gpu(environment) else cases.CPU
    linear = any(record.section == cases.LINEAR_VOCABULARY_SECTION for record in records)
    if linear:
        shown, limit = cases.LINEAR_VOCABULARY[device], ""
        if device == cases.CUDA:
            shown = tuple(sorted(shown + cases.LINEAR_TABLE[device], key=lambda case: case.classes))
        title = f"linear cross entropy of {shown[0].rows} tokens, hidden size {shown[0].features}"
    else:
        gpu = (cases.GPU_VOCABULARY, cases.COPY)
        shown, limit = gpu if device == cases.CUDA else (cases.VOCABULARY, cases.MUL)
        title = f"cross entropy of {shown[0].rows} tokens"
    records = [record for record in records if record.section in _VOCABULARY_SECTIONS]
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    time, memory = figure.subplots(1, 2)
    title += f", {shown[0].dtype}, forward and backward\n{_footnote(records, environment)}"
    figure.suptitle(title, fontsize=9)
    _draw_variants(time, records, shown, cases.LOSS)
    if limit:
        least = _series(records, shown, cases.LOSS, limit)
        label = f"limit: the logits read and written once ({limit})"
        time.plot([record.classes for record in least], [record.median for record in least], "k--", label=label)
    time.set(title="time", xlabel="vocabulary size", ylabel="ms (medians; band: quartiles)")
    _draw_variants(memory, records, shown, cases.MEMORY)
    logits = _series(records, shown, cases.LOSS, cases.DEFAULT)
    label = "the logits" if linear else "the logits themselves"
    memory.plot([record.classes for record in logits], [record.logits_mib for record in logits], "k:", label=label)
    title = "memory that a step adds at most" + (", gradients aside" if linear else "")
    memory.set(title=title, xlabel="vocabulary size", ylabel="MiB")
    for axes in (time, memory):
        _finish(axes)
    return figure


def draw_scaling(records: list[Record], environment: Environment) -> Figure:
    """Nanoseconds of an element by their number."""
    records = [record for record in records if record.section == cases.SCALING_SECTION]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    title = f"cross entropy over {cases.SCALING[0].classes} classes, float32, forward and backward"
    figure.suptitle(f"{title}\n{_footnote(records, environment)}", fontsize=7)
    lines = [(variant, _LINES[variant][1], _LINES[variant][0]) for variant in (cases.DEFAULT, cases.INPLACE)]
    for variant, label, colour in [*lines, (cases.MUL, "limit: read and written once (mul_)", "black")]:
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
        (cases.LINEAR_VOCABULARY_SECTION, "gpu_linear" if of_gpu(environment) else "linear", draw_vocabulary),
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
