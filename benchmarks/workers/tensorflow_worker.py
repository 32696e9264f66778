"""Measures TensorFlow's fused softmax cross entropy in a tf.function, in an interpreter that has it.

The operators take classes last and neither class weights nor ignored rows; the cases that need more are left out.
"""

import cases
import numpy as np
import tensorflow as tf
from workers import problem, worker
from workers.measure import Prepare


class TensorflowWorkload:
    """A case as TensorFlow tensors, which lie in memory as torch's do."""

    keeps_memory = True
    uncounted_bytes = 0

    def __init__(self, request: worker.Request):
        self.case = case = request.case
        arrays = problem.make(case, request.whats)
        self.answers = problem.Answers(np, case, arrays)
        self.logits = tf.cast(tf.constant(arrays.logits), case.dtype)
        self.target = tf.constant(arrays.target)

    def _loss(self, logits: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        if self.case.probabilities:
            losses = tf.nn.softmax_cross_entropy_with_logits(target, logits)
        else:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(target, logits)
        return tf.reduce_mean(tf.cast(losses, tf.float32))

    def _loss_and_gradient(self, logits: tf.Tensor, target: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = self._loss(logits, target)
        return loss, tape.gradient(loss, logits)

    def variants(self, what: str) -> dict[str, Prepare]:
        """None of softmax, nor where the operators do not take the case."""
        classes_last = self.case.class_axis == len(self.case.memory_shape) - 1
        if self.case.options or not classes_last or what not in (cases.LOSS, cases.FORWARD, cases.MEMORY):
            return {}
        function = tf.function(self._loss if what == cases.FORWARD else self._loss_and_gradient, jit_compile=False)
        if what == cases.MEMORY:
            function(self.logits[:1], self.target[:1])

        def call() -> tuple[float, tf.Tensor | None]:
            result = function(self.logits, self.target)
            loss, gradient = result if isinstance(result, tuple) else (result, None)
            return float(loss), gradient  # float waits for it

        return {cases.TENSORFLOW: lambda calls: call}

    def complaint(self, what: str, result: tuple[float, tf.Tensor | None]) -> str:
        """The loss, and the gradient if there is one."""
        loss, gradient = result
        return self.answers.complaint(what, np.array([[loss]]), None if gradient is None else gradient.numpy())


def set_threads(threads: int) -> None:
    """Within an operator; there is one at a time."""
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


if __name__ == "__main__":
    worker.main(TensorflowWorkload, set_threads)
