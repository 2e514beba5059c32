"""Facts stand in one place; what repeats them agrees with it."""

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import pytree_grads

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def names_of(requirements):
    return {
        re.split(r"[<>=!~\[; ]", text)[0].lower().replace("-", "_")
        for text in requirements
    }


def test_version_is_said_once():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_installed_version_is_the_one_said():
    try:
        installed = version("pytree-grads")
    except PackageNotFoundError:
        pytest.skip("the package is on the path, not installed")
    assert pytree_grads.__version__ == installed == PROJECT["version"]


def test_what_it_is_is_said_once():
    assert PROJECT["description"] in (ROOT / "CITATION.cff").read_text()
    sentence = PROJECT["description"].split(":")[0]
    assert sentence in README


def test_license_is_said_once():
    assert PROJECT["license"] in (ROOT / "CITATION.cff").read_text()
    assert "Apache License" in (ROOT / PROJECT["license-files"][0]).read_text()
    assert PROJECT["license"] in README


def test_python_bound_is_said_once():
    bound = PROJECT["requires-python"].removeprefix(">=")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert f"Python ≥ {bound}" in README
    assert f"Python >= {bound}" in MAKEFILE
    assert tools["ruff"]["target-version"] == "py" + bound.replace(".", "")
    assert tools["pyright"]["pythonVersion"] == bound
    assert sys.version_info >= tuple(map(int, bound.split(".")))


def test_runtime_imports_are_declared():
    needed = names_of(PROJECT["dependencies"])
    # What one module imports when it is asked for, from an extra.
    asked_for = {"_stores.py": names_of(PROJECT["optional-dependencies"]["store"])}
    for path in (ROOT / "pytree_grads").rglob("*.py"):
        declared = needed | asked_for.get(path.name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                top = module.split(".")[0]
                assert top in sys.stdlib_module_names | declared | {"pytree_grads"}, (
                    path,
                    top,
                )


@pytest.mark.parametrize("target", ["demo", "test"])
def test_readme_says_what_make_does(target):
    said = re.search(rf"^make {target} +# (.*)$", README, re.MULTILINE)
    assert said is not None
    make_env, install, command = said[1].split("; ")
    assert make_env == "python3 -m venv .venv"
    rule = re.search(
        rf"^{target}: \$\(VENV\)/\.(\w+)\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE
    )
    assert rule is not None
    extra, recipe = rule[1], rule[2].strip()
    assert install == f".venv/bin/pip install -e '.[{extra}]'"
    assert extra in PROJECT["optional-dependencies"]
    assert "install pip -e '.[$*]'" in MAKEFILE
    defaults = dict(re.findall(r"^(\w+) \?= (.*)$", MAKEFILE, re.MULTILINE))
    expanded = re.sub(r"\$\((\w+)\)", lambda match: defaults[match[1]], recipe)
    assert command == expanded


def test_the_package_is_typed():
    assert (ROOT / "pytree_grads" / "py.typed").exists()
