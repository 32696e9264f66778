"""Recognises handwritten digits with a LightningModule: the network of digits.py, and this package's loss in one line.

python examples/lightning_digits.py --loss torch
python examples/lightning_digits.py --loss softmax_ext
"""

import argparse
import logging
import sys
import time
import warnings

from common import explain_missing, positive_int

try:
    import lightning
    import torch
    from digits import BATCH, EPOCHS, LEARNING_RATE, SEED, Split, load_data
    from torch import Tensor, nn
    from torch.utils.data import DataLoader, TensorDataset

    import softmax_ext
except ModuleNotFoundError as error:
    sys.exit(explain_missing(error))


LOSSES = {"torch": nn.CrossEntropyLoss, "softmax_ext": softmax_ext.CrossEntropyLoss}


class Digits(lightning.LightningModule):
    """Scans [scans, 64] -> logits [scans, 10]."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.criterion = LOSSES[loss]()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, target = batch
        return self.criterion(self.network(images), target)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        images, target = batch
        loss, stats = softmax_ext.cross_entropy(self.network(images), target, return_stats=True)
        self.log("loss", loss)
        self.log("accuracy", (stats.prediction == target).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


def loader(split: Split, shuffle: bool) -> DataLoader:
    return DataLoader(TensorDataset(split.images, split.target), BATCH if shuffle else len(split.target), shuffle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, default="softmax_ext", help="whose loss (default: %(default)s)")
    parser.add_argument("--epochs", type=positive_int, default=EPOCHS, help="(default: %(default)s)")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # that one worker loads the data
    torch.set_num_threads(1)  # with so little work in a step, threads would wait for each other
    lightning.seed_everything(SEED, verbose=False)
    training, test = load_data()
    model = Digits(options.loss)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=options.epochs, accelerator="auto", enable_model_summary=False, **quiet)
    begin = time.perf_counter()
    trainer.fit(model, loader(training, shuffle=True))
    seconds = time.perf_counter() - begin
    found = trainer.test(model, loader(test, shuffle=False), verbose=False)[0]
    print(
        f"{options.loss}: {found['accuracy']:.2%} of {len(test.target)} held-out digits recognised;"
        f" {seconds:.1f} s of training"
    )


if __name__ == "__main__":
    main()
