"""Says whether an installed softmax_ext works: imports, agrees with torch, trains, explains itself.

Needs torch and nothing else, and belongs to no test suite: .ci/run starts it in a clean environment
where the wheel is installed, from a directory outside the checkout.
"""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

import softmax_ext


def check_installation() -> None:
    package = Path(softmax_ext.__file__).resolve().parent
    checkout = Path(__file__).resolve().parents[2]
    assert not package.is_relative_to(checkout), f"{package} is the checkout, not the installed package"
    assert softmax_ext.__version__ == version("softmax_ext")
    assert (package / "py.typed").exists()
    said = subprocess.run([sys.executable, "-m", "softmax_ext"], capture_output=True, text=True, check=True).stdout
    assert softmax_ext.__version__ in said, said
    # A library for any Python; and the CUDA kernels, where the wheel has them and torch has CUDA (or the report fails).
    assert f"softmax_ext-{softmax_ext.__version__}-py3-none-" in said, said
    if torch.version.cuda and (package / "libsoftmax_ext_cuda.so").exists():
        assert "CUDA kernels compiled" in said, said
    print(said)


def check_values() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0]])
    expected = torch.tensor([[0.705385, 0.259496, 0.035119]])
    torch.testing.assert_close(softmax_ext.softmax(logits + 10000, 1), expected, atol=1e-6, rtol=0)

    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(33, 1001, generator=generator, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    target = torch.randint(0, 1001, (33,), generator=generator)
    loss = softmax_ext.cross_entropy(ours, target, label_smoothing=0.1)
    reference = F.cross_entropy(theirs, target, label_smoothing=0.1)
    loss.backward()
    reference.backward()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(ours.grad, theirs.grad)


def check_linear() -> None:
    head = softmax_ext.LinearCrossEntropyLoss(16, 101)
    hidden, target = torch.randn(7, 16, requires_grad=True), torch.arange(7)
    loss = head(hidden, target)
    reference = F.cross_entropy(head.linear(hidden), target)
    torch.testing.assert_close(loss, reference)
    parameters = (hidden, head.linear.weight)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(reference, parameters))


def check_training() -> None:
    torch.manual_seed(0)
    points = torch.randn(256, 2)
    labels = (points[:, 0] * points[:, 1] > 0).long()
    model = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    criterion = softmax_ext.CrossEntropyLoss()
    for _ in range(100):
        optimizer.zero_grad()
        criterion(model(points), labels).backward()
        optimizer.step()
    accuracy = (model(points).argmax(1) == labels).float().mean().item()
    assert accuracy > 0.95, f"a model trained with softmax_ext.CrossEntropyLoss got {accuracy:.0%} of its own points"


if __name__ == "__main__":
    check_installation()
    check_values()
    check_linear()
    check_training()
    print(f"softmax_ext {softmax_ext.__version__} with torch {torch.__version__}: works")
