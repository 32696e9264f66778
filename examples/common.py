"""Helpers of the examples: the message for a missing package, and an argument that is a count."""

import argparse

PYPI_NAMES = {"sklearn": "scikit-learn"}
EXTRAS = {"transformers": "demo,transformers", "accelerate": "demo,transformers", "lightning": "demo,lightning"}


def explain_missing(error: ModuleNotFoundError) -> str:
    """A text that says how to install the package that an example failed to import."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package, "demo")
    if package == "softmax_ext":
        return (
            "softmax_ext is not installed. In the directory above examples/, type\n"
            "    pip install --no-build-isolation '.[demo]'\n"
            "or `make demo`, which installs everything in an environment of its own."
        )
    return (
        f"{package} is not installed. Type\n"
        f"    pip install {PYPI_NAMES.get(package, package)}\n"
        "or, in the directory above examples/, for all that the example needs:\n"
        f"    pip install --no-build-isolation '.[{extra}]'"
    )


def positive_int(text: str) -> int:
    """An argparse type: a whole number, at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number, 1 or more; got {text!r}")
    return number
