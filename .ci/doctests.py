"""Run the doctests of the installed pytree_grads, with nothing else installed."""

import doctest
import importlib
import pkgutil
import sys
from pathlib import Path

import pytree_grads

CHECKOUT = Path(__file__).resolve().parent.parent
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def main() -> int:
    """Return 0 if there were doctests and all of them passed."""
    location = Path(pytree_grads.__file__).resolve()
    if location.is_relative_to(CHECKOUT / "pytree_grads"):
        sys.exit(f"{location} is the checkout, not an installed package")
    print(f"pytree_grads {pytree_grads.__version__} from {location.parent}")
    names = [
        module.name
        for module in pkgutil.walk_packages(
            pytree_grads.__path__, prefix="pytree_grads."
        )
    ]
    attempted = failed = 0
    for name in ["pytree_grads", *names]:
        result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
        attempted += result.attempted
        failed += result.failed
    print(
        f"doctest examples of the installed package: {attempted} run, {failed} failed"
    )
    return 0 if attempted and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
