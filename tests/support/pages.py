"""Run the Python code of a Markdown page, and compare what it prints with the page."""

import contextlib
import io
import re
from pathlib import Path

import jax

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SAID = re.compile(r"^ *print\(.*\)  +# (.*)$", re.MULTILINE)


@contextlib.contextmanager
def as_for_a_reader():
    """JAX promotes dtypes and ranks, as it does where nothing is set."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(page: Path) -> tuple[dict, list[str], list[str]]:
    """What the blocks of a page define, run in order as a reader would.

    And the lines that they printed, and those that the page says they print.
    """
    names: dict = {"__name__": page.stem}
    printed, said = io.StringIO(), []
    text = page.read_text()
    for block in BLOCK.finditer(text):
        # Errors and warnings show the line of the page.
        code = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        with contextlib.redirect_stdout(printed), as_for_a_reader():
            exec(compile(code, str(page), "exec"), names)
        said += SAID.findall(block[1])
    return names, printed.getvalue().splitlines(), said
