"""Measures JAX with optax's losses, jitted, in an interpreter that has them.

Compiled ahead of time for the shape, so that neither time nor memory counts the compiler. Its losses take neither class
weights nor ignored rows; that case it leaves out.
"""

import os
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
from workers import problem, worker
from workers.measure import Prepare


class JaxWorkload:
    """A case as JAX arrays, which lie in memory as the tensors do."""

    keeps_memory = False
    uncounted_bytes = 0

    def __init__(self, request: worker.Request):
        self.case = case = request.case
        arrays = problem.make(case, request.whats)
        self.answers = problem.Answers(np, case, arrays)
        self.logits = jnp.asarray(arrays.logits, dtype=case.dtype)
        self.target = jnp.asarray(arrays.target, dtype=jnp.float32 if case.probabilities else jnp.int32)

    def _loss(self, logits: jax.Array, target: jax.Array) -> jax.Array:
        if self.case.probabilities:
            losses = optax.softmax_cross_entropy(logits, target, axis=self.case.class_axis)
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, target, axis=self.case.class_axis)
        return losses.mean()

    def variants(self, what: str) -> dict[str, Prepare]:
        """None of softmax, nor of the case with class weights."""
        if self.case.options or what not in (cases.LOSS, cases.FORWARD, cases.MEMORY):
            return {}
        function = self._loss if what == cases.FORWARD else jax.value_and_grad(self._loss)
        compiled = jax.jit(function).lower(self.logits, self.target).compile()

        def call() -> Any:
            return jax.block_until_ready(compiled(self.logits, self.target))

        return {cases.JAX: lambda calls: call}

    def complaint(self, what: str, result: Any) -> str:
        """The loss, and the gradient if there is one."""
        loss, gradient = result if isinstance(result, tuple) else (result, None)
        return self.answers.complaint(
            what, np.array([[float(loss)]]), None if gradient is None else np.asarray(gradient)
        )


def set_threads(threads: int) -> None:
    """JAX makes its pool, at the first array, for the processors that the process may use."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


if __name__ == "__main__":
    worker.main(JaxWorkload, set_threads)
