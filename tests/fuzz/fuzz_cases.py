"""Whole calls of the public functions, drawn by hypothesis: shapes, memory, dtypes, values, options and mistakes.

A case is a frozen description that prints itself; ``build`` makes its tensors. Numbers come from a seed that is drawn,
not one by one, so that ten thousand of them cost no more than ten. Around every tensor, and in the gaps between its
elements, lies a filler (NaN, or a class that is out of range), so that a read at the wrong place shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import oracle
import torch
from hypothesis import strategies as st
from torch import Tensor

# None, one, and both sides of the vectors, tiles and blocks of every instruction set.
SIZES = [0, 1, 1, 2, 2, 3, 3, 4, 5, 7]
CLASSES = [0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 127, 128, 129, 200, 256, 300]
MANY_CLASSES = [1000, 1023, 1025, 2047, 2049, 4095, 4096, 4097, 5000]
MANY_ROWS = [15, 16, 17, 33, 64, 100, 131]
MOST_ELEMENTS = 12_000

FILLER = {torch.int64: -(2**62), torch.int32: -(2**30), torch.uint8: 251}


def sometimes(one_in: int) -> st.SearchStrategy[bool]:
    """True once in so many; shrinks to False."""
    return st.integers(0, one_in - 1).map(lambda i: i == one_in - 1)


def mostly(usual: Any, others: list[Any], one_in: int = 3) -> st.SearchStrategy[Any]:
    """One of the others once in so many."""
    return sometimes(one_in).flatmap(lambda other: st.sampled_from(others) if other else st.just(usual))


SEEDS = st.integers(0, 2**20)
# float32, the dtype of most calls, twice.
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float16])


# ---- memory ----------------------------------------------------------------------------------------------------------


class Placed(NamedTuple):
    storage: Tensor  # all of the memory, 1-d
    values: Tensor  # the view that is the argument


@dataclass(frozen=True)
class Memory:
    """How a tensor lies: its dimensions in any order (outermost first), with gaps, expanded, at an offset."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    expanded: tuple[bool, ...]
    offset: int

    def place(self, values: Tensor, device: torch.device) -> Placed:
        """The values in a memory of their own; of an expanded dimension the first."""
        strides, span = [0] * values.dim(), 1
        for dim in reversed(self.order):
            if not self.expanded[dim]:
                strides[dim] = span * self.steps[dim]
                span = strides[dim] * max(values.shape[dim], 1)
        shape = values.shape
        storage = torch.full((self.offset + span + 8,), FILLER.get(values.dtype, torch.nan), dtype=values.dtype)
        for dim, repeated in enumerate(self.expanded):
            values = values.narrow(dim, 0, min(shape[dim], 1)) if repeated else values
        storage.as_strided(values.shape, strides, self.offset).copy_(values)
        storage = storage.to(device)
        return Placed(storage, storage.as_strided(shape, strides, self.offset))


@st.composite
def memories(draw: Any, rank: int, expanded_one_in: int = 6) -> Memory:
    """Contiguous half of the time; 0: never expanded."""
    order, one, flat = tuple(range(rank)), (1,) * rank, (False,) * rank
    if draw(sometimes(2)):
        return Memory(order, one, flat, 0)
    if draw(sometimes(2)):
        order = tuple(draw(st.permutations(range(rank))))
    steps = tuple(draw(st.lists(mostly(1, [2, 3], 4), min_size=rank, max_size=rank)))
    expanded = flat
    if expanded_one_in and draw(sometimes(expanded_one_in)):
        expanded = tuple(draw(st.lists(st.booleans(), min_size=rank, max_size=rank)))
    return Memory(order, steps, expanded, draw(st.sampled_from([0, 1, 3, 8])))


# ---- numbers ---------------------------------------------------------------------------------------------------------

FINITE = ["normal", "peaked", "flat", "ties", "wide", "offset", "subnormal"]
EXTREME = ["huge", "masked", "largest", "tiny"]
SPECIAL = {"-inf": [-math.inf], "inf": [math.inf], "nan": [math.nan], "all": [-math.inf, math.inf, math.nan, -0.0]}


@dataclass(frozen=True)
class Values:
    """Logits of a kind; ``special`` values stand among them."""

    kind: str
    seed: int
    special: str = ""

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        chance = torch.rand(shape, generator=generator)
        limits = torch.finfo(dtype)
        values = {
            "normal": 3 * x,
            "peaked": torch.where(chance < 0.1, x + 25, x),
            "flat": 0 * x,
            "ties": x.round(),
            "wide": 50 * x,
            "offset": x + (1e4 if dtype.itemsize > 2 else 100),
            "subnormal": x * limits.smallest_normal / 4,
            "tiny": x * 1e-30,
            "huge": x * 1e30,
            "masked": torch.where(chance < 0.3, -1e9, x),
            "largest": torch.where(chance < 0.1, limits.max, torch.where(chance > 0.9, limits.min, x)),
        }[self.kind]
        values = values.clamp(limits.min, limits.max).to(dtype)
        if self.special:
            among = torch.tensor(SPECIAL[self.special], dtype=dtype)
            some = torch.rand(shape, generator=generator) < torch.rand((), generator=generator) / 4
            values = torch.where(some, among[torch.randint(len(among), shape, generator=generator)], values)
        return values


def values(calm: bool = False) -> st.SearchStrategy[Values]:
    if calm:
        return st.builds(Values, st.sampled_from(FINITE[:4]), SEEDS)
    kinds = mostly("normal", FINITE + EXTREME, 2)
    return st.builds(Values, kinds, SEEDS, mostly("", list(SPECIAL), 6))


def uniform(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def batches(draw: Any, classes: int, most: int) -> tuple[int, ...]:
    """Sizes of the dimensions beside the classes, none to ``most`` of them."""
    rank = draw(st.integers(0, most))
    sizes = draw(st.lists(st.sampled_from(SIZES), min_size=rank, max_size=rank))
    if sizes and draw(sometimes(3)):
        sizes[draw(st.integers(0, rank - 1))] = draw(st.sampled_from(MANY_ROWS))
    while math.prod(sizes) * max(classes, 1) > MOST_ELEMENTS:
        sizes[sizes.index(max(sizes))] = 2 if max(sizes) > 2 else 1
    return tuple(sizes)


def class_counts(calm: bool = False) -> st.SearchStrategy[int]:
    return st.sampled_from([1, 2, 3, 5, 17] if calm else CLASSES + CLASSES + MANY_CLASSES)


# ---- softmax ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoftmaxCase:
    """softmax or log_softmax; an integer ``dtype`` and a ``dim`` out of range are mistakes."""

    log: bool
    shape: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    result: torch.dtype | None
    values: Values
    memory: Memory
    upstream: int
    requires_grad: bool

    def build(self, device: torch.device) -> Placed:
        if self.dtype.is_floating_point:
            return self.memory.place(self.values.draw(self.shape, self.dtype), device)
        integers = (100 * uniform(self.values.seed, self.shape)).to(self.dtype)
        return self.memory.place(integers, device)


@st.composite
def softmax_cases(draw: Any, log: bool, calm: bool = False) -> SoftmaxCase:
    batch = draw(batches(classes := draw(class_counts(calm)), 2 if calm else 4))
    at = draw(st.integers(0, len(batch)))
    shape = (*batch[:at], classes, *batch[at:])
    if draw(sometimes(60)):
        shape, at = (), 0
    rank = len(shape) or 1
    dim = draw(st.sampled_from([at, at, at - rank, draw(st.integers(-rank, rank - 1))]))
    if not calm and draw(sometimes(40)):
        dim = draw(st.sampled_from([rank, -rank - 1, 2**40]))
    dtype = torch.float64 if calm else draw(DTYPES)
    result = None if calm else draw(mostly(None, oracle.DTYPES, 4))
    if not calm and draw(sometimes(40)):
        dtype = torch.int64
    grad = dtype.is_floating_point and (calm or not draw(sometimes(8)))
    memory = draw(memories(len(shape)))
    return SoftmaxCase(log, shape, dim, dtype, result, draw(values(calm)), memory, draw(SEEDS), grad)


# ---- cross entropy ---------------------------------------------------------------------------------------------------

PROBABILITIES = ["distribution", "one-hot", "sparse", "unnormalised", "signed"]
# Each is refused, or is accepted by one of us and torch alone: see fuzz_check.
MISTAKES = [
    "class out of range",
    "batch",
    "target's rank",
    "target's dtype",
    "weight's length",
    "weight's rank",
    "weight's dtype",
    "smoothing",
    "reduction",
    "leaf",
    "input's dtype",
]
MISTAKES_OF_LINEAR = ["features", "bias", "parameter's dtype"]


@dataclass(frozen=True)
class Target:
    """Classes (int64, uint8) or probabilities of a kind."""

    kind: str  # "classes" or one of PROBABILITIES
    dtype: torch.dtype
    seed: int
    ignored: float  # the share of ignored rows
    memory: Memory
    requires_grad: bool

    @property
    def probabilities(self) -> bool:
        return self.kind != "classes"

    def draw(self, shape: tuple[int, ...], dim: int, ignore_index: int) -> Tensor:
        """For logits of this shape."""
        generator = torch.Generator().manual_seed(self.seed)
        classes = shape[dim]
        if self.probabilities:
            q = torch.rand(shape, generator=generator, dtype=torch.float64)
            if self.kind == "distribution":
                q = (8 * q).softmax(dim)
            if self.kind == "one-hot" and classes:
                q = (q == q.amax(dim, keepdim=True)).double()
            if self.kind == "sparse":
                q = torch.where(q < 0.7, 0, q)
            if self.kind == "signed":
                q = 4 * q - 1
            return q.to(self.dtype)
        batch = shape[:dim] + shape[dim + 1 :]
        highest = min(classes, 256) if self.dtype == torch.uint8 else classes
        y = torch.randint(max(highest, 1), batch, generator=generator)
        whole_rows = batch[:1] + (1,) * len(batch[1:])
        lost = torch.rand(whole_rows if self.seed % 2 else batch, generator=generator) < self.ignored
        if self.dtype == torch.uint8 and not 0 <= ignore_index < 256:
            ignore_index = min(ignore_index % 256, max(highest, 1) - 1)  # a class like any other, of the same byte
        return torch.where(lost, ignore_index, y).to(self.dtype)


@dataclass(frozen=True)
class RowWeight:
    """Factors of the rows; ``seed`` None: by probability."""

    dtype: torch.dtype
    seed: int | None
    memory: Memory

    def draw(self, rows: tuple[int, ...]) -> Tensor:
        values = torch.tensor([1.0, 0.5, -2.0, 0.0, 3.0], dtype=self.dtype)
        return values[(5 * uniform(self.seed or 0, rows)).long().clamp(max=4)]


@dataclass(frozen=True)
class Weight:
    """Class weights."""

    dtype: torch.dtype
    seed: int
    zeros: bool
    memory: Memory
    requires_grad: bool

    def draw(self, classes: int) -> Tensor:
        w = 0.25 + 2 * uniform(self.seed, (classes,))
        if self.zeros:
            w[uniform(self.seed + 1, (classes,)) < 0.3] = 0
        return w.to(self.dtype)


@dataclass(frozen=True)
class Linear:
    """The layer of a linear_cross_entropy: ``further`` dimensions of the logits, and what of it requires grad."""

    features: int
    batch: tuple[int, ...]
    further: tuple[int, ...]
    seed: int
    bias: bool
    masked: bool  # some biases are -inf
    matrix_memory: Memory
    bias_memory: Memory
    requires_grad: tuple[bool, bool]
    chunk_rows: int | None
    memory_share: float | None  # of what all logits take, in place of chunk_rows
    tells_live_rows: bool


@dataclass(frozen=True)
class LossCase:
    """cross_entropy, or with ``linear`` linear_cross_entropy, where ``values`` are the features.

    ``upstream`` is the seed of the upstream gradients (0: ones); ``used`` says which of (loss, lse, nll, entropy) have
    one.
    """

    shape: tuple[int, ...]  # of the logits, their classes in dimension 1 (or 0)
    dtype: torch.dtype
    values: Values
    memory: Memory
    requires_grad: bool
    target: Target
    weight: Weight | None
    linear: Linear | None
    reduction: str
    ignore_index: int | None
    label_smoothing: float
    result: torch.dtype | None
    z_loss: float
    softcap: float | None
    logit_scale: float
    denominator: float | None
    row_weight: RowWeight | None
    precompute_grad: bool
    inplace: bool
    return_stats: bool
    upstream: int
    used: tuple[bool, bool, bool, bool]
    ruined: bool  # ignored rows hold NaN
    mistake: str

    @property
    def dim(self) -> int:
        return 1 if len(self.shape) > 1 else 0

    @property
    def classes(self) -> int:
        return self.shape[self.dim] if self.shape else 1

    @property
    def ignored_class(self) -> int:
        return -100 if self.ignore_index is None else self.ignore_index

    def options(self) -> dict[str, Any]:
        """Torch's and ours, as the formulas take them."""
        return {
            "ignore_index": self.ignored_class,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "denominator": self.denominator,
        }

    def input_shape(self) -> tuple[int, ...]:
        return self.shape if self.linear is None else (*self.linear.batch, self.linear.features)

    def build(self, device: torch.device) -> dict[str, Placed]:
        """The tensors by the names of the arguments."""
        tensors = {"input": self.values.draw(self.input_shape(), self.dtype)}
        if self.linear is not None:
            tensors |= self._parameters(self.linear)
        target = self.target.draw(self.shape, self.dim, self.ignored_class) if self.shape else torch.zeros(())
        if self.linear is not None and len(self.linear.batch) > 1:
            target = target.reshape(*self.linear.batch, *target.shape[1:])
        tensors["target"] = target
        if self.ruined and not self.target.probabilities and self.shape:
            self._ruin(tensors["input"], target.long() == self.ignored_class)
        if self.weight is not None:
            tensors["weight"] = self.weight.draw(self.classes)
        memory = {"input": self.memory, "target": self.target.memory}
        if self.weight is not None:
            memory["weight"] = self.weight.memory
        if self.linear is not None:
            memory |= {"linear_weight": self.linear.matrix_memory, "linear_bias": self.linear.bias_memory}
        if self.row_weight is not None and self.row_weight.seed is not None and self.shape:
            factors = self.row_weight.draw((*self.shape[: self.dim], *self.shape[self.dim + 1 :]))
            memory["row_weight"] = self.row_weight.memory
            if self.linear is not None and len(self.linear.batch) > 1:
                factors = factors.reshape(*self.linear.batch)
            if self.ruined and not self.target.probabilities:
                factors[target.long() == self.ignored_class] = torch.nan
            tensors["row_weight"] = factors
        self._mistaken(tensors)
        return {
            name: (memory[name] if len(memory[name].order) == t.dim() else contiguous(t.dim())).place(t, device)
            for name, t in tensors.items()
        }

    def _ruin(self, input: Tensor, ignored: Tensor) -> None:
        if self.linear is None:
            input.movedim(self.dim, -1)[ignored] = torch.nan
        else:
            rank = len(self.linear.batch)
            input[ignored.flatten(rank).all(rank) if ignored.dim() > rank else ignored] = torch.nan

    def _parameters(self, linear: Linear) -> dict[str, Tensor]:
        shape = (self.classes, *linear.further)
        scale = 1 / math.sqrt(linear.features or 1)
        parameters = {
            "linear_weight": Values("normal", linear.seed).draw((*shape, linear.features), torch.float64) * scale
        }
        if linear.bias:
            parameters["linear_bias"] = Values("normal", linear.seed + 1, "-inf" if linear.masked else "").draw(
                shape, torch.float64
            )
        return {name: t.to(self.dtype) for name, t in parameters.items()}

    def _mistaken(self, tensors: dict[str, Tensor]) -> None:
        y, mistake = tensors["target"], self.mistake
        if mistake == "class out of range" and not self.target.probabilities and y.numel():
            high = self.classes if y.dtype == torch.int64 else 250
            y.view(-1)[self.target.seed % y.numel()] = [high, -1 if y.dtype == torch.int64 else 250][
                self.target.seed % 2
            ]
        if mistake == "batch" and y.dim():
            tensors["target"] = torch.cat([y, y[:1]]) if len(y) else y.new_zeros(3, *y.shape[1:])
        if mistake == "target's rank":
            tensors["target"] = y.unsqueeze(-1).expand(*y.shape, 2)
        if mistake == "target's dtype":
            tensors["target"] = y.to(torch.int32)
        if mistake == "input's dtype":
            tensors["input"] = tensors["input"].nan_to_num(0, 0, 0).clamp(-9, 9).to(torch.int64)
        if mistake == "features":
            tensors["linear_weight"] = tensors["linear_weight"].repeat_interleave(2, -1)
        if mistake == "bias" and "linear_bias" in tensors:
            tensors["linear_bias"] = tensors["linear_bias"].unsqueeze(0)
        if mistake == "parameter's dtype":
            other = torch.float64 if self.dtype != torch.float64 else torch.float32
            tensors["linear_weight"] = tensors["linear_weight"].to(other)
        if "weight" in tensors:
            w = tensors["weight"]
            if mistake == "weight's length":
                tensors["weight"] = torch.cat([w, w.new_ones(1)])
            if mistake == "weight's rank":
                tensors["weight"] = w.unsqueeze(0)
            if mistake == "weight's dtype":
                tensors["weight"] = w.to(torch.int64)


def contiguous(rank: int) -> Memory:
    return Memory(tuple(range(rank)), (1,) * rank, (False,) * rank, 0)


def smoothings() -> st.SearchStrategy[float]:
    return mostly(0.0, [0.1, 0.5, 1.0], 2)


@st.composite
def targets(draw: Any, logits_shape: tuple[int, ...], calm: bool, rank: int | None, differentiable: bool) -> Target:
    """``rank`` as the function takes the target, for class indices; None: the logits' without the classes."""
    kind = "classes" if draw(st.integers(0, 2)) else draw(st.sampled_from(PROBABILITIES))
    if kind == "classes":
        dtype = draw(st.sampled_from([torch.int64, torch.int64, torch.uint8]))
        rank = max(len(logits_shape) - 1, 0) if rank is None else rank
    else:
        dtype = torch.float64 if calm else draw(DTYPES)
        rank = len(logits_shape) if rank is None else rank + 1
    grad = kind != "classes" and differentiable and not draw(sometimes(3))
    ignored = draw(st.sampled_from([0.0, 0.3, 0.5, 0.3, 1.0]))
    return Target(kind, dtype, draw(SEEDS), ignored, draw(memories(rank)), grad)


@st.composite
def weights(draw: Any, dtype: torch.dtype, calm: bool, differentiable: bool, always: bool) -> Weight | None:
    if not always and not draw(sometimes(2)):
        return None
    own = dtype if calm else draw(mostly(dtype, oracle.DTYPES, 4))
    grad = differentiable and draw(sometimes(3))
    zeros = draw(sometimes(4))
    return Weight(own, draw(SEEDS), zeros, draw(memories(1)), grad)


@st.composite
def row_weights(draw: Any, logits_shape: tuple[int, ...], target: Target) -> RowWeight:
    by_probability = not target.probabilities and draw(sometimes(3))
    return RowWeight(
        draw(DTYPES), None if by_probability else draw(SEEDS), draw(memories(max(len(logits_shape) - 1, 0)))
    )


@st.composite
def layers(draw: Any, classes: int, calm: bool, has_bias: bool) -> Linear:
    features = draw(st.sampled_from([1, 2, 3] if calm else [0, 1, 2, 3, 5, 8, 16, 17, 40]))
    further = ()
    batch = draw(batches(classes, 1 if calm else 3))
    if draw(sometimes(3)):
        further = tuple(draw(st.lists(st.sampled_from([2, 3, 1, 0, 2, 3]), min_size=1, max_size=2)))
        batch = (draw(st.sampled_from(SIZES)),)
    bias = has_bias or draw(sometimes(2))
    return Linear(
        features,
        batch,
        further,
        draw(SEEDS),
        bias,
        bias and not calm and draw(sometimes(6)),
        draw(memories(2 + len(further))),
        draw(memories(1 + len(further))),
        (calm or not draw(sometimes(4)), calm or not draw(sometimes(4))),
        draw(mostly(None, [1, 2, 7, 64], 2)),
        draw(mostly(None, [0.0, 0.1, 0.4, 1.0], 2)),
        draw(sometimes(3)),
    )


@st.composite
def loss_cases(draw: Any, strategy: str = "default", calm: bool = False, mistake: str | None = None) -> LossCase:
    """``strategy``: default, overwriting (precompute_grad, inplace) or linear; ``calm``: small, float64 and finite.

    ``mistake`` is made where the other arguments allow it; None: seldom one, by chance.
    """
    linear = overwriting = None
    classes = draw(class_counts(calm))
    is_linear, overwriting = strategy == "linear", strategy == "overwriting"
    if mistake is None:
        mistake = "" if calm else draw(mostly("", MISTAKES + (MISTAKES_OF_LINEAR if is_linear else []), 15))
    target_rank = None
    if is_linear:
        classes = min(classes, 300)
        linear = draw(layers(classes, calm, mistake == "bias"))
        rows = (math.prod(linear.batch),) if linear.batch else ()
        shape = (*rows, classes, *linear.further)
        target_rank = len(linear.batch) + len(linear.further)
    else:
        batch = draw(batches(classes, 2 if calm else 4))
        shape = (*batch[:1], classes, *batch[1:])
        if not calm and draw(sometimes(100)):
            shape = ()
    dtype = torch.float64 if calm else draw(DTYPES)
    ways = [(True, False), (True, False), (False, True), (True, True)] if overwriting else [(False, False)]
    precompute, inplace = draw(st.sampled_from(ways))
    if calm:
        inplace = False
    target = draw(targets(shape, calm, target_rank, not inplace or draw(sometimes(20))))
    weight = draw(weights(dtype, calm, target.probabilities, mistake.startswith("weight's")))
    ignore = draw(mostly(None if is_linear else -100, [-100, 0, 1, classes + 3, -1, 200], 3))
    if target.probabilities:
        ignore = None if is_linear else draw(st.sampled_from([-100, -1]))
        if not calm and draw(sometimes(15)):
            ignore, mistake = draw(st.sampled_from([0, 0, 1, 200])), ""  # a mistake of its own
    if not shape:  # as well
        ignore, mistake = -100, ""
    stats = draw(sometimes(3))
    used = tuple(draw(st.lists(st.booleans(), min_size=4, max_size=4))) if stats and draw(sometimes(2)) else (True,) * 4
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    smoothing = draw(smoothings())
    row_weight = draw(row_weights(shape, target)) if draw(sometimes(3)) else None
    case_values = draw(values(calm or (is_linear and not draw(sometimes(4)))))
    if is_linear and case_values.kind in EXTREME:
        case_values = Values("normal", case_values.seed, case_values.special)
    return LossCase(
        shape,
        dtype,
        case_values,
        draw(
            memories(
                len(shape) if linear is None else len(linear.batch) + 1,
                # Overlapping elements are refused, and nothing else is seen of the call.
                6 if not inplace else draw(mostly(0, [2], 10)),
            )
        ),
        calm or not draw(sometimes(8)),
        target,
        weight,
        linear,
        reduction="max" if mistake == "reduction" else reduction,
        ignore_index=ignore,
        label_smoothing=1.5 if mistake == "smoothing" else smoothing,
        result=None if calm else draw(mostly(None, oracle.DTYPES, 6)),
        z_loss=draw(mostly(0.0, [1e-4, 0.1], 4)),
        softcap=draw(mostly(None, [0.5, 5.0, 30.0], 4)),
        logit_scale=draw(mostly(1.0, [0.5, -1.5, 0.01, 3.0], 4)),
        denominator=None if reduction == "none" else draw(mostly(None, [1, 3.5, -7, 1000], 4)),
        row_weight=row_weight,
        precompute_grad=precompute,
        inplace=inplace,
        return_stats=stats,
        upstream=draw(mostly(0, list(range(1, 40)), 2)),
        used=used,
        ruined=not calm and draw(sometimes(2 if is_linear else 4)),
        mistake=mistake,
    )


@st.composite
def mistaken_cases(draw: Any) -> LossCase:
    """With one of the mistakes, each as often as another."""
    mistake = draw(st.sampled_from(MISTAKES + MISTAKES_OF_LINEAR))
    strategies = ["default", "overwriting", "linear"]
    if mistake in MISTAKES_OF_LINEAR:
        strategies = ["linear"]
    if mistake == "leaf":
        strategies = ["overwriting"]
    return draw(loss_cases(draw(st.sampled_from(strategies)), mistake=mistake))
