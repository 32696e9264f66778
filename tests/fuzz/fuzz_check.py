"""Makes a drawn call, by softmax_ext and by torch, and says whether it went as it must.

Where torch raises, the same type is raised; where it does not, nothing is, but for the differences that are listed
here. What is not written to is left as it was, byte by byte, the memory between and around its elements included.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import fuzz_bounds
import oracle
import torch
import torch.nn.functional as F
from fuzz_bounds import Bounded, Rows, assert_bounded
from fuzz_cases import LossCase, SoftmaxCase
from torch import Tensor

import softmax_ext
from softmax_ext import plans

# What softmax_ext refuses and torch does not: here a type, the one that the docstrings name.
INPLACE = ValueError  # a leaf, overlapping elements, or a target that requires grad, with inplace=True
INTEGER_WEIGHT = RuntimeError  # class weights that are integers, with probabilities
SHAPED_WEIGHT = RuntimeError  # class weights of shape [1, C], with logits of more than two dimensions
NO_INTEGERS = NotImplementedError  # integer logits, which torch refuses only where there are any


def outcome(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(), None
        except Exception as error:
            return None, error


def as_bytes(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def leaf(t: Tensor, requires_grad: bool) -> Tensor:
    return t.detach().requires_grad_(requires_grad and t.is_floating_point())


def random_like(t: Tensor, seed: int) -> Tensor:
    """An upstream gradient; seed 0: ones."""
    if seed == 0:
        return torch.ones_like(t)
    generator = torch.Generator().manual_seed(seed)
    size = [1.0, 1.0, 1e-3, 300.0][seed % 4]
    values = size * (torch.rand(t.shape, generator=generator, dtype=torch.float64) - 0.5)
    if seed % 3 == 0:
        values = torch.where(torch.rand(t.shape, generator=generator) < 0.3, 0, values)
    return values.to(t.dtype).to(t.device)


def same_refusal(ours: Exception | None, theirs: Exception | None) -> None:
    """Ours is of torch's type, or neither raised."""
    if theirs is None:
        assert ours is None, f"torch accepts this; {type(ours).__name__}: {ours}"
    else:
        assert isinstance(ours, type(theirs)), f"torch raises {theirs!r}; ours: {ours!r}"


# ---- softmax ---------------------------------------------------------------------------------------------------------


def check_softmax(case: SoftmaxCase, device: torch.device) -> None:
    ours, theirs = (getattr(m, "log_softmax" if case.log else "softmax") for m in (softmax_ext, F))
    placed = case.build(device)
    before = as_bytes(placed.storage)
    x = leaf(placed.values, case.requires_grad)
    y, error = outcome(lambda: ours(x, case.dim, case.result))
    reference, torchs = outcome(lambda: theirs(x.detach(), case.dim, dtype=case.result))
    if not case.dtype.is_floating_point and 0 in case.shape:
        torchs = torchs or error  # torch refuses integers only where there are any
    same_refusal(error, torchs)
    if error is None:
        assert y.dtype == reference.dtype
        _check_softmax(case, x, y)
    assert as_bytes(placed.storage) == before, "the input has changed"


def _check_softmax(case: SoftmaxCase, x: Tensor, y: Tensor) -> None:
    upstream = random_like(y, case.upstream)
    source = x.to(y.dtype) if not x.is_floating_point() else x
    exact, exact_grad = oracle.softmax(source, case.dim, case.log, upstream)
    work = oracle.arithmetic(source.dtype, y.dtype)
    dim = case.dim if case.shape else 0
    wide, squeezed = (oracle.double(source), exact) if case.shape else (oracle.double(source)[None], exact[None])
    if case.log:
        bound = fuzz_bounds.log_softmax_bound(wide, squeezed, dim, work, y.dtype)
    else:
        bound = Bounded(squeezed, oracle.softmax_tolerance(squeezed, dim, False, y.dtype, work))
    assert_bounded(y if case.shape else y[None], bound, y.dtype, "value")
    if not case.requires_grad:
        return
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert grad.dtype == x.dtype
    g = oracle.double(upstream) if case.shape else oracle.double(upstream)[None]
    exact_grad = exact_grad if case.shape else exact_grad[None]
    allowed = oracle.softmax_grad_tolerance(squeezed, exact_grad, g, dim, case.log, y.dtype, x.dtype)
    # A probability that is subnormal is 0, and what float64 subtracts.
    flushed = torch.finfo(work).smallest_normal * (1 + g.abs().sum(dim, keepdim=True))
    bound = Bounded(exact_grad, fuzz_bounds.finite(allowed) + flushed + oracle.underflow(y.dtype) * g.abs())
    assert_bounded(grad if case.shape else grad[None], bound, x.dtype, "gradient")


# ---- cross entropy ---------------------------------------------------------------------------------------------------


class Call:
    """A LossCase with its tensors: those of ours, placed and differentiated."""

    def __init__(self, case: LossCase, device: torch.device) -> None:
        self.case = case
        self.placed = case.build(device)
        self.before = {name: as_bytes(p.storage) for name, p in self.placed.items()}
        self.gaps = as_bytes(self._input_gaps())
        linear = case.linear
        requires = {
            "input": case.requires_grad,
            "target": case.target.requires_grad,
            "weight": case.weight is not None and case.weight.requires_grad,
            "row_weight": False,
            "linear_weight": linear is not None and linear.requires_grad[0],
            "linear_bias": linear is not None and linear.requires_grad[1],
        }
        self.tensors = {name: leaf(p.values, requires[name]) for name, p in self.placed.items()}
        self.leaves = {name: t for name, t in self.tensors.items() if t.requires_grad}
        if case.inplace and case.mistake != "leaf" and "input" in self.leaves:
            self.tensors["input"] = self.leaves["input"] = self._computed_input()
        # Of logits that will be overwritten: they are no longer what the loss was computed from, then.
        self.edge = torch.autograd.graph.get_gradient_edge(self.leaves["input"]) if self.overwrites() else None

    def _computed_input(self) -> Tensor:
        storage, values = self.placed["input"]
        if self.overlaps():  # no operation writes there
            return oracle.as_computed(storage).as_strided(values.shape, values.stride(), values.storage_offset())
        return oracle.as_computed(values)

    def refuses_inplace(self) -> bool:
        """Whether ``inplace`` would lose or corrupt something."""
        case = self.case
        is_leaf = case.mistake == "leaf" and "input" in self.leaves
        return case.inplace and (is_leaf or self.overlaps() or "target" in self.leaves)

    def overlaps(self) -> bool:
        shape = self.tensors["input"].shape
        repeated = any(e and n > 1 for e, n in zip(self.case.memory.expanded, shape, strict=False))
        return repeated and self.tensors["input"].numel() > 0

    def _input_gaps(self) -> Tensor:
        placed = self.placed["input"]
        kept = torch.ones_like(placed.storage, dtype=torch.bool)
        kept.as_strided(placed.values.shape, placed.values.stride(), placed.values.storage_offset()).fill_(False)
        return placed.storage[kept]

    def ours(self) -> Any:
        case, tensors = self.case, dict(self.tensors)
        options = {
            "weight": tensors.pop("weight", None),
            "reduction": case.reduction,
            "ignore_index": case.ignore_index,
            "label_smoothing": case.label_smoothing,
            "dtype": case.result,
            "z_loss": case.z_loss,
            "softcap": case.softcap,
            "logit_scale": case.logit_scale,
            "denominator": case.denominator,
            "return_stats": case.return_stats,
        }
        factors = self.row_weight(tensors)
        tensors.pop("row_weight", None)
        if factors is not None:
            options["row_weight"] = factors
        if case.linear is not None:
            return softmax_ext.linear_cross_entropy(**tensors, **options, **self.limits())
        return softmax_ext.cross_entropy(
            **tensors, **options, precompute_grad=case.precompute_grad, inplace=case.inplace
        )

    def limits(self) -> dict[str, int | None]:
        """What selects the plan of a linear layer: rows of a chunk, or a share of the memory of all logits."""
        case, layer = self.case, self.case.linear
        live_rows = None
        if layer.tells_live_rows and not case.mistake:
            live_rows = math.prod(layer.batch)
            if not case.target.probabilities:
                live = self.tensors["target"].long() != case.ignored_class
                live_rows = int(live.reshape(live_rows, math.prod(layer.further)).any(1).sum())
        if layer.memory_share is None:
            return {"chunk_rows": layer.chunk_rows, "live_rows": live_rows}
        positions = math.prod(layer.further)
        sizes = (math.prod(layer.batch), layer.features, case.classes * positions)
        problem = plans.Problem(*sizes, case.dtype, "cpu", target_bytes=8, positions=positions)
        whole, least = (plans._bytes(problem, name, size) for name, size in (("whole", sizes[0]), ("rows", 1)))
        if sizes[2]:
            least = min(least, plans._bytes(problem, "classes", positions))
        return {"memory": least + int(layer.memory_share * max(whole - least, 0)), "live_rows": live_rows}

    def row_weight(self, tensors: dict[str, Tensor]) -> Tensor | str | None:
        by_probability = self.case.row_weight is not None and self.case.row_weight.seed is None
        return "probability" if by_probability else tensors.get("row_weight")

    def options(self, wide: dict[str, Tensor]) -> dict[str, Any]:
        factors = self.row_weight(wide)
        if isinstance(factors, Tensor) and self.many_dimensions():
            factors = factors.flatten()  # as the target of Layer
        return {**self.case.options(), "row_weight": factors}

    def torchs(self) -> Tensor:
        """What torch makes of the arguments that it has; with int64 and the input's dtype, where it needs them.

        On the CPU: a class out of range, of which it says so there, ends the use of a GPU, or is accepted.
        """
        case, t = self.case, {name: x.detach().cpu() for name, x in self.tensors.items()}
        if t["target"].dtype == torch.uint8:  # which torch has for the plain loss alone
            t["target"] = t["target"].long()
        if "weight" in t and not case.target.probabilities and t["weight"].is_floating_point():
            t["weight"] = t["weight"].to(self.tensors["input"].dtype)
        options = {"weight": t.get("weight"), "reduction": case.reduction, "label_smoothing": case.label_smoothing}
        if case.linear is None:
            return F.cross_entropy(t["input"], t["target"], ignore_index=case.ignored_class, **options)
        rows, target = t["input"], t["target"]
        if self.many_dimensions():  # which torch does not take
            rows, target = rows.reshape(math.prod(case.linear.batch), rows.shape[-1]), self._flat(target)
        matrix, bias = t["linear_weight"], t.get("linear_bias")
        if hasattr(F, "linear_cross_entropy"):
            return F.linear_cross_entropy(
                rows, matrix, target, linear_bias=bias, ignore_index=case.ignore_index, **options
            )
        # Before torch 2.13.
        logits = F.linear(rows, matrix.flatten(0, -2), None if bias is None else bias.flatten())
        logits = logits.unflatten(-1, matrix.shape[:-1])
        return F.cross_entropy(logits, target, ignore_index=case.ignored_class, **options)

    def product_spreads_nan(self) -> bool:
        """Whether torch's products make NaN of more rows than have one: in half types, on a processor with AMX."""
        if self.case.linear is None:
            return False
        x, matrix = self.tensors["input"].detach(), self.tensors["linear_weight"].detach().flatten(0, -2)
        clean = x.isfinite().all(-1)
        alone = F.linear(torch.where(clean.unsqueeze(-1), x, 0), matrix)
        if not torch.equal(F.linear(x, matrix).isnan()[clean], alone.isnan()[clean]):
            return True
        of_logits = torch.where(clean.unsqueeze(-1), torch.zeros_like(alone), torch.nan)
        finite = torch.where(matrix.isfinite(), matrix, 0)
        return bool((of_logits @ finite).isnan()[clean].any())

    def overwrites(self) -> bool:
        """Whether the gradient goes over the logits; it does not where the class weights have one too."""
        return self.case.inplace and "input" in self.leaves and "weight" not in self.leaves

    def many_dimensions(self) -> bool:
        return self.case.linear is not None and len(self.case.linear.batch) > 1

    def of_the_logits_shape(self) -> bool:
        """Whether the target is, be it by mistake."""
        return self.tensors["target"].shape == (*self.case.linear.batch, self.case.classes)

    def _flat(self, target: Tensor) -> Tensor:
        batch = self.case.linear.batch
        if target.shape[: len(batch)] != batch:
            raise ValueError("another batch")
        return target.reshape(math.prod(batch), *target.shape[len(batch) :])

    def check_untouched(self) -> None:
        for name, placed in self.placed.items():
            if name != "input" or not self.overwrites():
                assert as_bytes(placed.storage) == self.before[name], f"{name} has changed"
        assert as_bytes(self._input_gaps()) == self.gaps, "memory beside the input has changed"


def check_loss(case: LossCase, device: torch.device) -> None:
    call = Call(case, device)
    results, error = outcome(call.ours)
    theirs, torchs = outcome(call.torchs)
    if not case.classes and len(case.shape) > 2:
        torchs = error  # torch's word on a shape without classes is about another
    if error is not None:
        _check_refusal(call, error, torchs)
        for name, placed in call.placed.items():
            assert as_bytes(placed.storage) == call.before[name], f"{name} has changed, and {error!r} was raised"
        return
    assert torchs is None, f"torch raises {torchs!r}"
    assert not call.refuses_inplace(), "inplace=True has been accepted"
    if case.classes and not call.product_spreads_nan():
        if theirs is not None and case.result is None:
            loss = results[0] if case.return_stats else results
            assert loss.dtype == theirs.dtype, "dtype"
        _check_results(call, results)
    call.check_untouched()


def _check_refusal(call: Call, error: Exception, torchs: Exception | None) -> None:
    """Ours is of torch's type, or one of the documented."""
    case = call.case
    if case.mistake == "weight's dtype" and case.weight is not None and case.target.probabilities:
        assert isinstance(error, INTEGER_WEIGHT), repr(error)
        return
    if case.mistake == "weight's rank" and case.weight is not None and len(case.shape) > 2:
        assert isinstance(error, (SHAPED_WEIGHT, type(torchs))), repr(error)
        return
    if case.mistake == "input's dtype" and torchs is None and 0 in case.input_shape():
        assert isinstance(error, NO_INTEGERS), repr(error)
        return
    if call.refuses_inplace():
        assert isinstance(error, (INPLACE, type(torchs))), repr(error)
        return
    if call.many_dimensions() and case.mistake in ("batch", "target's rank") and not call.of_the_logits_shape():
        # As torch has no such inputs; of probabilities it is the type that torch has for two dimensions.
        assert isinstance(error, RuntimeError if case.target.probabilities else ValueError), repr(error)
        return
    same_refusal(error, torchs)


def _check_results(call: Call, results: Any) -> None:
    case = call.case
    loss, stats = results if case.return_stats else (results, ())
    input_dtype = call.tensors["input"].dtype
    dtypes = [input_dtype, loss.dtype]
    if case.target.probabilities:
        dtypes.append(case.target.dtype)
    work = oracle.arithmetic(*dtypes)
    # The backward of a linear layer knows nothing of the loss's dtype.
    of_rows = work if case.linear is None else oracle.arithmetic(dtypes[0], *dtypes[2:])
    wide = {}
    for name, placed in call.placed.items():
        values = torch.frombuffer(bytearray(call.before[name]), dtype=placed.storage.dtype)
        values = values.as_strided(placed.values.shape, placed.values.stride(), placed.values.storage_offset())
        wide[name] = oracle.double(values).requires_grad_(name in call.leaves and name != "target")
    layer = Layer(case, wide) if case.linear is not None else None
    logits = wide["input"] if layer is None else layer.logits
    target = wide["target"] if layer is None else layer.target
    error = None if layer is None else layer.error
    rows = Rows(logits, target, wide.get("weight"), call.options(wide), of_rows, error, "weight" in call.leaves)

    if rows.no_weight and (case.linear is not None or case.z_loss or case.label_smoothing):
        assert not loss.isfinite().any()  # x/0, of which nobody promises more
        return
    exact_loss = fuzz_bounds.exact_loss(logits, target, wide.get("weight"), rows)
    exact = [exact_loss]
    if case.return_stats:
        own = {"softcap": case.softcap, "logit_scale": case.logit_scale}
        *exact_stats, _ = oracle.stats(logits, target, ignore_index=case.ignored_class, **own)
        exact += exact_stats if layer is None else [rows.of_live(t) for t in exact_stats]
    flat = [t.detach().reshape(exact_loss.shape) for t in (loss,)] + [t.reshape(exact[1].shape) for t in stats]
    assert_bounded(flat[0], rows.reduced(exact_loss.detach(), loss.dtype), loss.dtype, "loss")
    if case.return_stats:
        for name, ours, bound in zip(
            ("lse", "nll", "entropy"), flat[1:4], rows.stats([t.detach() for t in exact[1:]], work), strict=True
        ):
            assert ours.dtype == work
            if layer is not None:
                bound = Bounded(*map(rows.of_live, bound))
            assert_bounded(ours, bound, work, name)
        _check_prediction(flat[4], rows, logits.detach(), layer is not None)
    outputs = [loss, *stats[:3]]
    for ours, right in zip(outputs, exact, strict=True):
        assert ours.requires_grad or not right.requires_grad, "no gradient"
    # Overwritten logits have no statistics to differentiate.
    overwritten = case.precompute_grad and call.overwrites()
    used = [i == 0 if overwritten else u for i, u in enumerate(case.used[: len(outputs)])]
    used[0] = used[0] or not any(used)
    used = [u and t.requires_grad for u, t in zip(used, outputs, strict=True)]
    if not any(used):
        return
    if case.linear is not None and any(used[1:]) and rows.sick.any():
        return  # NaN, whose gradients nobody promises
    seeds = [case.upstream + 4 * i if case.upstream else 0 for i in range(len(outputs))]
    upstream = [random_like(t, s) if u else None for t, u, s in zip(outputs, used, seeds, strict=True)]
    chosen = [(t, u) for t, u in zip(outputs, upstream, strict=True) if u is not None]
    wide_upstream = [
        None if u is None else oracle.double(u).reshape(t.shape) for u, t in zip(upstream, exact, strict=True)
    ]
    wide_upstream += [None] * (4 - len(wide_upstream))
    wanted = list(call.leaves)
    again = not call.overwrites()
    for attempt in range(2 if again and case.upstream % 2 else 1):
        grads = torch.autograd.grad(
            [t for t, _ in chosen],
            [call.leaves[n] for n in wanted] if call.edge is None else [call.edge],
            [u for _, u in chosen],
            retain_graph=again,
            materialize_grads=call.edge is None,
        )
        _check_gradients(call, dict(zip(wanted, grads, strict=True)), exact, wide, wide_upstream, rows, layer, attempt)
    if call.overwrites():
        grad = grads[wanted.index("input")]
        assert grad.data_ptr() == call.tensors["input"].data_ptr() or not grad.numel()


def _check_prediction(ours: Tensor, rows: Rows, logits: Tensor, skips_ignored: bool) -> None:
    z = oracle.transformed(logits, rows.options["softcap"], rows.options["logit_scale"])
    right = z.argmax(-1)
    off = 2 * (rows.unit * rows.off).squeeze(-1)  # of the difference of two, each that far off
    ours = ours.cpu()
    if skips_ignored:
        live = rows.live.squeeze(-1)
        assert (ours[~live] == -1).all()
        ours = torch.where(live, ours, right)
    picked, best = (z.gather(-1, i.unsqueeze(-1)).squeeze(-1) for i in (ours, right))
    good = (ours == right) | (best - picked <= off) | rows.lost.squeeze(-1)
    assert good.all(), f"prediction: {ours[~good].tolist()[:3]} instead of {right[~good].tolist()[:3]}"


class Layer:
    """The linear layer of a case in float64: its logits, their error in the kernel, and that of its gradients.

    Of a row that is ignored whatever its position, the input is 0 here, as it is not read.
    """

    def __init__(self, case: LossCase, wide: dict[str, Tensor]) -> None:
        self.case, self.dtype = case, case.dtype
        self.accumulated = oracle.roundoff(oracle.arithmetic(case.dtype)) * 4
        w = wide["linear_weight"]
        x = wide["input"].reshape(math.prod(case.linear.batch), w.shape[-1])
        target = wide["target"]
        dead = torch.zeros(len(x), dtype=torch.bool)
        if not case.target.probabilities:
            y = target.reshape(len(x), *case.linear.further)
            dead = (y == case.ignored_class).flatten(1).all(1) if y.dim() > 1 else y == case.ignored_class
        matrix, x = w.flatten(0, -2), torch.where(dead[:, None], 0, x)
        self.x, self.w = x, w
        logits, magnitude = (F.linear(*t).unflatten(-1, w.shape[:-1]) for t in ((x, matrix), (x.abs(), matrix.abs())))
        if "linear_bias" in wide:
            logits, magnitude = logits + wide["linear_bias"], magnitude + wide["linear_bias"].abs()
        error = (self.accumulated * (w.shape[-1] + 4)) * magnitude + oracle.roundoff(self.dtype) * logits.abs()
        # Processors with instructions for products of bfloat16 take subnormal factors for 0.
        self.flushed = torch.finfo(self.dtype).smallest_normal if self.dtype == torch.bfloat16 else 0.0
        # Of a product that is subnormal, in each sum.
        self.lost = oracle.underflow(oracle.arithmetic(self.dtype))
        subnormal = self.flushed * (x.abs().sum(1, keepdim=True) + matrix.abs().sum(1)).unflatten(-1, w.shape[:-1])
        subnormal = subnormal + w.shape[-1] * self.lost + oracle.underflow(self.dtype) * 4
        self.error = fuzz_bounds.finite((error + subnormal).detach())
        self.logits = logits if case.linear.batch else logits[0]
        self.error = self.error if case.linear.batch else self.error[0]
        self.target = target
        if len(case.linear.batch) > 1:
            self.target = target.reshape(case.shape if case.target.probabilities else case.shape[:1])

    def gradient_errors(self, of_logits: Tensor, error: Tensor, scale: float) -> dict[str, Tensor]:
        """What the products make of the error of the logits' gradient, which is rounded to the dtype itself."""
        g = fuzz_bounds.finite(of_logits.reshape(len(self.x), math.prod(self.w.shape[:-1]))).abs()
        u = oracle.roundoff(self.dtype)
        e = error.reshape(g.shape).clamp(max=1e300) + u * g + oracle.underflow(self.dtype) * (1 + scale)
        x, w = fuzz_bounds.finite(self.x.detach()).abs(), fuzz_bounds.finite(self.w.detach()).abs().flatten(0, -2)
        rows, columns = self.accumulated * (len(g) + 4), self.accumulated * (g.shape[1] + 4)
        e = e + self.flushed
        per_chunk = u if self.dtype.itemsize == 2 else 0  # each chunk's product is rounded
        of_input, of_weight = self.flushed * g.sum(1, keepdim=True), self.flushed * g.sum(0).unsqueeze(1)
        return {
            "input": e @ w + (columns + per_chunk) * (g @ w) + of_input + g.shape[1] * self.lost,
            "linear_weight": e.t() @ x + (rows + per_chunk) * (g.t() @ x) + of_weight + len(g) * self.lost,
            "linear_bias": e.sum(0) + rows * g.sum(0),
        }


def _check_gradients(
    call: Call,
    grads: dict[str, Tensor],
    exact: list[Tensor],
    wide: dict[str, Tensor],
    upstream: list[Tensor | None],
    rows: Rows,
    layer: Layer | None,
    attempt: int,
) -> None:
    case = call.case
    pairs = [(t, u) for t, u in zip(exact, upstream, strict=False) if u is not None and t.requires_grad]
    names = [n for n in grads if n != "target"]
    of_logits, right = None, ()
    if pairs:
        logits = [layer.logits] if layer is not None and layer.logits.requires_grad else []
        inputs, (outputs, along) = [wide[n] for n in names] + logits, zip(*pairs, strict=True)
        right = torch.autograd.grad(outputs, inputs, along, retain_graph=True, materialize_grads=True)
        of_logits = right[-1] if logits else None
    right_of = dict(zip(names, right, strict=False))
    for name in names:  # what no used result depends on
        right_of.setdefault(name, torch.zeros_like(wide[name]))
    if layer is None:
        of_logits = right_of.get("input")
    elif of_logits is None:
        of_logits = torch.zeros_like(layer.logits)
    loss_upstream = upstream[0]
    for name, grad in grads.items():
        assert grad.dtype == call.leaves[name].dtype, name
    if of_logits is not None:
        error = rows.gradient_error(of_logits, upstream)
    after = torch.zeros(())  # what multiplies a gradient that has been rounded already
    if loss_upstream is not None:
        after = fuzz_bounds.finite(rows.factor(loss_upstream).amax()) if rows.m.numel() else after
    twice = case.linear is not None or (case.precompute_grad and attempt == 0)
    roundings = {"roundings": 2 if twice else 1, "factor": after}
    for name, grad in grads.items():
        what = f"gradient of {name}, backward {attempt + 1}"
        if name == "target":
            bound = rows.target_gradient(upstream, grad.dtype)
            bound = Bounded(*(t.reshape(grad.shape) for t in bound))
        elif name == "weight":
            bound = rows.weight_gradient(right_of[name], loss_upstream, grad.dtype)
        elif layer is None:
            bound = Rows.rounded(right_of[name], error, grad.dtype, **roundings)
        else:
            allowed = layer.gradient_errors(of_logits, error, float(after))[name].reshape(grad.shape)
            allowed = torch.where(allowed > 1e200, torch.inf, allowed)
            bound = Rows.rounded(right_of[name], allowed, grad.dtype, **roundings)
        assert_bounded(grad, bound, grad.dtype, what)


# ---- second derivatives ----------------------------------------------------------------------------------------------


def check_second_derivatives(case: SoftmaxCase | LossCase, device: torch.device) -> None:
    """Of a float64 call, against autograd through torch's functions: double backward, in the upstream gradient too."""
    if isinstance(case, SoftmaxCase):
        x = leaf(case.build(device).values, True)
        ours = getattr(softmax_ext, "log_softmax" if case.log else "softmax")(x, case.dim)
        wide = oracle.double(x).requires_grad_()
        theirs = wide.log_softmax(case.dim) if case.log else wide.softmax(case.dim)
        _compare_second([ours], [x], [theirs], [wide], case.upstream)
        return
    call = Call(case, device)
    results = call.ours()
    ours = [results[0], *results[1][:3]] if case.return_stats else [results]
    names = list(call.leaves)
    wide = {n: oracle.double(t).requires_grad_(n in names) for n, t in call.tensors.items()}
    layer = Layer(case, wide) if case.linear is not None else None
    logits = wide["input"] if layer is None else layer.logits
    target = wide["target"] if layer is None else layer.target
    rows = Rows(logits, target, wide.get("weight"), call.options(wide), torch.float64)
    if rows.no_weight:
        return
    theirs = [fuzz_bounds.exact_loss(logits, target, wide.get("weight"), rows)]
    if case.return_stats:
        own = {"softcap": case.softcap, "logit_scale": case.logit_scale}
        lse, nll, entropy, _ = oracle.stats(logits, target, ignore_index=case.ignored_class, **own)
        theirs += [lse, nll, entropy] if layer is None else [rows.of_live(t) for t in (lse, nll, entropy)]
    theirs = [t.reshape(o.shape) for t, o in zip(theirs, ours, strict=True)]
    _compare_second(ours, [call.leaves[n] for n in names], theirs, [wide[n] for n in names], case.upstream)


def _compare_second(
    ours: list[Tensor], leaves: list[Tensor], theirs: list[Tensor], wide_leaves: list[Tensor], seed: int
) -> None:
    seconds = []
    for outputs, inputs in ((ours, leaves), (theirs, wide_leaves)):
        upstream = [random_like(t.detach(), 4 * (seed + i) + 1).requires_grad_() for i, t in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, inputs, upstream, create_graph=True, materialize_grads=True)
        along = [random_like(g.detach(), 4 * (seed + i) + 5) for i, g in enumerate(grads)]
        pairs = [(g, a) for g, a in zip(grads, along, strict=True) if g.requires_grad]
        of_numbers = [u for u, t in zip(upstream, theirs, strict=True) if not t.isnan().any()]  # no mean of no rows
        second = torch.autograd.grad(
            [g for g, _ in pairs], inputs + of_numbers, [a for _, a in pairs], materialize_grads=True
        )
        seconds.append((grads, second))
    for kind, mine, right in zip(("gradient", "second derivative"), *seconds, strict=True):
        for i, (a, b) in enumerate(zip(mine, right, strict=True)):
            b = b.detach()
            scale = b.abs().max() if b.numel() else b.sum()
            allowed = 1e3 * fuzz_bounds.FLOAT64 * (1 + fuzz_bounds.finite(scale)).expand_as(b)
            oracle.assert_within(a, b, allowed, f"{kind} {i}")
