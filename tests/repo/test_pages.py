"""Code in the README and on the site is run, and prints or gives what the page says."""

import re
import warnings
from pathlib import Path

import jax
import numpy as np
import pages
import pytest

import pytree_grads

pytestmark = pytest.mark.any_release

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MADE = [DOCS / name for name in ("_build", "api", "gallery", "made")]
PAGES = [
    ROOT / "README.md",
    *sorted(
        path for path in DOCS.rglob("*.md") if not {*path.parents} & {*MADE}
    ),
]  # fmt: skip
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]
# Figures and history: text alone.
NO_CODE = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]
COMING = DOCS / "coming_from.md"
# Packages whose column is run as well.
RUN = {"vmap(grad)", "optax", "jax_privacy"}
PUBLIC = {
    name: value
    for name, value in vars(pytree_grads).items()
    if getattr(value, "__module__", "").startswith("pytree_grads.")
    and not name.startswith("_")
}


def every(paths):
    names = [str(path.relative_to(ROOT)) for path in paths]
    return pytest.mark.parametrize("page", paths, ids=names)


def tables():
    """The section, both calls and the result of every row of the tables of calls."""
    section = ""
    for line in COMING.read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        cells = [x.strip() for x in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if section and len(cells) == 3 and "`" in cells[2]:
            code = [cell.replace(r"\|", "|").strip("`") for cell in cells]
            yield pytest.param(section, *code, id=f"{section}: {code[0]}")


@pytest.fixture(scope="module")
def names():
    names, _, _ = pages.run(COMING)
    return names


def assert_gives(code, result, names):
    got = jax.tree.map(np.asarray, eval(code, names))
    expected = jax.tree.map(
        np.asarray, eval(result), is_leaf=lambda leaf: isinstance(leaf, list)
    )
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        got,
        expected,
    )


@every(WITH_CODE)
def test_python_blocks_print_what_they_say(page):
    names, printed, said = pages.run(page)
    assert printed == said
    assert len(names) > 1


def test_enough_is_said_to_be_checked():
    counts = {page.stem: len(pages.SAID.findall(page.read_text())) for page in PAGES}
    assert counts["README"] >= 2
    assert sum(counts.values()) >= 60


@pytest.mark.parametrize("package, theirs, ours, result", list(tables()))
def test_tables_of_calls(package, theirs, ours, result, names):
    with pages.as_for_a_reader():
        if result.endswith("Error"):
            with pytest.raises(getattr(__import__("builtins"), result), match="'b'"):
                eval(ours, names)
            return
        assert_gives(ours, result, names)
        if package in RUN:
            if package == "jax_privacy":
                names["jax_privacy"] = pytest.importorskip(
                    "jax_privacy", reason="the extra `privacy` is not installed"
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                assert_gives(theirs, result, names)


def test_the_tables_name_what_they_must():
    text = COMING.read_text()
    for name in (
        "gs1 .+ gs2", "2 .* gs", "map(", "keys must match", "copy!(x", "copy!(gs",
        "merge!", "withgradient", "pullback", "jacobian", "destructure",
    ):  # fmt: skip
        assert name in text, name
    assert set(re.findall(r"^## (.*)$", text, re.MULTILINE)) >= RUN


def test_one_page_names_every_public_call():
    text = (DOCS / "calls.md").read_text()
    assert "linear_combination" in PUBLIC
    for name in PUBLIC:
        if name != "Jacobian":  # J itself
            assert re.search(rf"\b{name}\b", text), name


@every([*PAGES, *NO_CODE])
def test_links_lead_somewhere(page):
    code = re.compile(r"^```.*?^```|`[^`\n]*`(?!\])", re.MULTILINE | re.DOTALL)
    text = code.sub("", page.read_text())
    for target, heading in re.findall(r"\]\(([\w./-]*[a-zA-Z])?(?:#([\w-]+))?\)", text):
        if target.startswith("made/"):  # `make docs` makes it, and checks the link
            continue
        other = (page.parent / target).resolve() if target else page
        assert other.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            anchors = {
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
            }
            assert heading in anchors, (target, heading)
