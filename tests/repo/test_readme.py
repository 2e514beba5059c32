"""Code in README and docs is run, and prints or gives what they say."""

import contextlib
import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from models import MODELS

import pytree_grads

pytestmark = pytest.mark.any_release

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
NO_CODE = [
    *(
        ROOT / name
        for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
    ),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]
MAKEFILE = (ROOT / "Makefile").read_text()
PUBLIC = {
    name: value
    for name, value in vars(pytree_grads).items()
    if getattr(value, "__module__", "").startswith("pytree_grads.")
    and not name.startswith("_")
}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
ZYGOTE = (ROOT / "docs" / "zygote.md").read_text()


def every(paths):
    return pytest.mark.parametrize("page", paths, ids=[path.name for path in paths])


def run(page):
    """What the blocks of a page define, run in order as a reader would.

    And what they printed.
    """
    names: dict = {"__name__": page.stem}
    printed, said = io.StringIO(), []
    text = page.read_text()
    for block in BLOCK.finditer(text):
        # Errors and warnings show the line of the page.
        code = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        # optax and equinox promote dtypes, as JAX does for the reader.
        with contextlib.redirect_stdout(printed), jax.numpy_dtype_promotion("standard"):
            exec(compile(code, str(page), "exec"), names)
        said += re.findall(r"^ *print\(.*\)  +# (.*)$", block[1], re.MULTILINE)
    return names, printed.getvalue().splitlines(), said


def zygote_rows():
    """The code and the result of every row of the table."""
    for line in ZYGOTE.splitlines():
        cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
        if len(cells) == 3 and "`" in cells[2]:
            _, code, result = (cell.strip().replace(r"\|", "|") for cell in cells)
            yield pytest.param(code.strip("`"), result.strip("`"), id=cells[0].strip())


@pytest.fixture(scope="module")
def zygote_names():
    return run(ROOT / "docs" / "zygote.md")[0]


@every(PAGES)
def test_python_blocks_print_what_they_say(page):
    names, printed, said = run(page)
    assert printed == said
    if "```python" in page.read_text():
        assert len(names) > 1


def test_enough_is_said_to_be_checked():
    counts = {
        page.stem: len(re.findall(r"print\(.*\)  +# ", page.read_text()))
        for page in PAGES
    }
    assert counts["README"] >= 2
    assert sum(counts.values()) >= 20


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
    expected = jax.tree.map(
        np.asarray, expected, is_leaf=lambda leaf: isinstance(leaf, list)
    )
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected
    )


def test_zygote_table_names_what_it_must():
    for name in (
        "gs1 .+ gs2", "2 .* gs", "map(", "keys must match", "copy!(x", "copy!(gs",
        "merge!", "withgradient", "pullback", "jacobian", "destructure",
    ):  # fmt: skip
        assert name in ZYGOTE, name


def test_the_readme_is_short_and_has_an_example_by_line_25():
    assert README.count("\n") <= 200
    assert README.split("import jax")[0].count("\n") + 1 <= 25


def test_every_public_call_is_named():
    assert "linear_combination" in PUBLIC
    for name in PUBLIC:
        assert re.search(rf"\b{name}\b", README), name


@every([*PAGES, *NO_CODE])
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target, heading in re.findall(r"\]\(([\w./-]*[a-zA-Z])?(?:#([\w-]+))?\)", text):
        other = (page.parent / target).resolve() if target else page
        assert other.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            anchors = {
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
            }
            assert heading in anchors, (target, heading)


@every(DOCS)
def test_the_readme_links_to_every_page(page):
    assert f"(docs/{page.name})" in README


def test_readme_and_makefile_name_the_same_targets():
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    assert set(re.findall(r"\bmake ([a-z]+)\b", README)) <= set(phony[1].split())


def test_make_quick_runs_what_is_there():
    quick = re.search(r"^QUICK \?= (.*?[^\\])\n", MAKEFILE, re.DOTALL | re.MULTILINE)
    models = re.search(
        r"^QUICK_MODELS \?= (.*?[^\\])\n", MAKEFILE, re.DOTALL | re.MULTILINE
    )
    assert quick is not None
    assert models is not None
    files = re.findall(r"[\w/]*\w+\.py", quick[1])
    assert files
    for name in files:
        assert list((ROOT / "tests").rglob(f"*{name}")), name
    assert set(models[1].replace("\\", " ").split()) <= set(MODELS)
