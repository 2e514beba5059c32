"""Run the doctests of the installed pytree_grads and the README, and nothing else."""

import doctest
import importlib
import pkgutil
import sys
from pathlib import Path

import pytree_grads

CHECKOUT = Path(__file__).resolve().parent.parent
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
sys.path.append(str(CHECKOUT / "tests" / "support"))

import pages  # noqa: E402  (found by the line above)


def run_doctests() -> bool:
    """Whether there are doctests, and all pass."""
    modules = [
        module.name
        for module in pkgutil.walk_packages(
            pytree_grads.__path__, prefix="pytree_grads."
        )
    ]
    attempted = failed = 0
    for name in ["pytree_grads", *modules]:
        result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
        attempted += result.attempted
        failed += result.failed
    print(f"doctest examples: {attempted} run, {failed} failed")
    return bool(attempted) and not failed


def run_readme() -> bool:
    """Whether the README prints what it says, and says something."""
    _, printed, said = pages.run(CHECKOUT / "README.md")
    print(f"README: {len(printed)} lines printed, {len(said)} of them foretold")
    return bool(said) and printed == said


def main() -> int:
    """Return 0 if all of this is right."""
    location = Path(pytree_grads.__file__).resolve()
    if location.is_relative_to(CHECKOUT / "pytree_grads"):
        sys.exit(f"{location} is the checkout, not an installed package")
    print(f"pytree_grads {pytree_grads.__version__} from {location.parent}")
    return 0 if run_doctests() and run_readme() else 1


if __name__ == "__main__":
    sys.exit(main())
