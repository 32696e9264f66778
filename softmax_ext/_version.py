"""The version, said once: pyproject.toml, the libraries and the package read it here."""

__version__ = "0.1.0"
