"""The README is run: its Python blocks print what they say, its Zygote table gives what it says."""

import contextlib
import io
import re
from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import pytree_grads

pytestmark = pytest.mark.any_release

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PUBLIC = {
    name: value
    for name, value in vars(pytree_grads).items()
    if getattr(value, "__module__", "").startswith("pytree_grads.") and not name.startswith("_")
}
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def zygote_rows():
    """The code and the result of every row of the table."""
    section = README.split("## Coming from Zygote")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
        if len(cells) == 3 and "`" in cells[2]:
            _, code, result = (cell.strip().replace(r"\|", "|") for cell in cells)
            yield pytest.param(code.strip("`"), result.strip("`"), id=cells[0].strip())


@pytest.fixture(scope="module")
def zygote_names():
    section = README.split("## Coming from Zygote")[1].split("\n## ")[0]
    named = {}
    for assignment in re.findall(r"`((?:gs1|gs2|xs) = [^`]*)`", section):
        exec(assignment, {"jnp": jnp}, named)
    ps = re.search(r"`ps` are the parameters `([^`]*)`", section)
    assert ps is not None
    named["ps"] = eval(ps[1])
    source = re.search(r"^def f\(.*?\n\n", README, re.DOTALL | re.MULTILINE)
    assert source is not None
    exec(source[0], {}, named)
    return {"jax": jax, "jnp": jnp, **PUBLIC, **named}


def test_python_blocks_print_what_they_say():
    assert len(BLOCKS) >= 4
    names: dict = {}
    compared = 0
    for block in BLOCKS:  # one after the other, as a reader would
        printed = io.StringIO()
        # optax and equinox promote dtypes, as JAX does for the reader of the README.
        with contextlib.redirect_stdout(printed), jax.numpy_dtype_promotion("standard"):
            exec(compile(block, "README.md", "exec"), names)
        said = re.findall(r"^ *print\(.*\)  +# (.*)$", block, re.MULTILINE)
        assert printed.getvalue().splitlines() == said
        compared += len(said)
    assert compared >= 6


@pytest.mark.parametrize("code, result", list(zygote_rows()))
def test_zygote_table(code, result, zygote_names):
    if result.endswith("Error"):
        with pytest.raises(getattr(__import__("builtins"), result), match="'b'"):
            eval(code, zygote_names)
        return
    got = jax.tree.map(np.asarray, eval(code, zygote_names))
    expected = eval(result)
    if isinstance(expected, list):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        return
    expected = jax.tree.map(np.asarray, expected, is_leaf=lambda leaf: isinstance(leaf, list))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_zygote_table_names_what_it_must():
    section = README.split("## Coming from Zygote")[1].split("\n## ")[0]
    for name in (
        "gs1 .+ gs2", "2 .* gs", "map(", "keys must match", "copy!(x", "copy!(gs", "merge!",
        "withgradient", "pullback", "jacobian", "destructure",
    ):  # fmt: skip
        assert name in section, name


def test_real_example_by_line_thirty():
    before = README.split("import jax")[0].count("\n") + 1
    assert before <= 30


def test_every_public_call_is_named():
    assert "linear_combination" in PUBLIC
    for name in PUBLIC:
        assert re.search(rf"\b{name}\b", README), name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([\w./-]*[a-zA-Z])\)", README):
        assert (ROOT / target).exists(), target
