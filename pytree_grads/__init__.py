"""Gradients as vectors: combinations, per-example rows and the chain rule on plain pytrees."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pytree-grads")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"
