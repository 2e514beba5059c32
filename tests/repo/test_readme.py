"""The README is short, and names the commands that there are."""

import re
from pathlib import Path

import pytest
from models import MODELS

pytestmark = pytest.mark.any_release

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_readme_is_short_and_has_an_example_by_line_25():
    assert README.count("\n") <= 150
    assert README.split("import jax")[0].count("\n") + 1 <= 25


def test_readme_and_makefile_name_the_same_targets():
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    named = set(re.findall(r"\bmake ([a-z-]+)\b", README))
    assert {"demo", "test"} <= named <= set(phony[1].split())


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
