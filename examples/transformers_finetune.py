"""Trains a small Llama of Hugging Face's transformers with its Trainer, and with this package's loss by one line.

The model is random, the text is the standard library of the Python that runs this script, and its
tokens are those of gpt.py: a vocabulary of 32768. Of each step's 2048 tokens the logits are 256 MiB.

    python examples/transformers_finetune.py --loss own        # transformers' loss
    python examples/transformers_finetune.py --loss logits     # apply(model)
    python examples/transformers_finetune.py --loss linear     # apply(model, linear=True): no logits

It prints the loss, the median time of a step, and the memory that training adds.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import explain_missing, positive_int

try:
    import accelerate  # noqa: F401  which Trainer asks for
    import numpy as np
    import torch
    import transformers
    from gpt import CONTEXT, SEED, SEQUENCES, VOCABULARY, peak_memory_mib, read_tokens, restart_peak_memory
    from rich.console import Console
    from torch import Tensor

    import softmax_ext.integrations.transformers
except ModuleNotFoundError as error:
    sys.exit(explain_missing(error))

LOSSES = ("own", "logits", "linear")
STEPS = 20


def new_model(loss: str) -> transformers.LlamaForCausalLM:
    """A random Llama with the loss of this name."""
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    if loss != "own":
        softmax_ext.integrations.transformers.apply(model, linear=loss == "linear")
    return model


class Pieces(torch.utils.data.Dataset):
    """The text in pieces of CONTEXT tokens; the model shifts the labels itself."""

    def __init__(self, tokens: Tensor) -> None:
        self.pieces = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


class Clock(transformers.TrainerCallback):
    """When each step began and ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def train(loss: str, tokens: Tensor, steps: int, folder: str) -> str:
    """Trains, and returns the figures of the run in one sentence."""
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=SEQUENCES // 2,
        gradient_accumulation_steps=2,
        max_steps=steps,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        seed=SEED,
    )
    clock = Clock()
    trainer = transformers.Trainer(new_model(loss), arguments, train_dataset=Pieces(tokens), callbacks=[clock])
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    restart_peak_memory()
    before = peak_memory_mib()
    trainer.train()
    added = peak_memory_mib() - before
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return (
        f"{loss}: loss {losses[0]:.4f} at first, {losses[-1]:.4f} at step {len(losses)};"
        f" {1000 * median(clock.seconds):.0f} ms a step (median); training adds {added:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, default="linear", help="whose loss (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("--tokens", type=Path, help="take the token ids from this .npy file, not from the text")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # transformers' own
    console = Console()
    tokens = torch.from_numpy(np.load(options.tokens)) if options.tokens else read_tokens(console)
    with tempfile.TemporaryDirectory() as folder:
        console.print(train(options.loss, tokens, options.steps, folder), highlight=False)


if __name__ == "__main__":
    main()
