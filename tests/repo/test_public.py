"""Every public name has a page and a docstring with all of its parts."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import pytree_grads

pytestmark = pytest.mark.any_release

ROOT = Path(__file__).resolve().parents[2]
INDEX = (ROOT / "docs" / "api.md").read_text()

# The top, and the submodules for uses; those that begin with `_` are private.
MODULES = [pytree_grads] + [
    importlib.import_module(f"pytree_grads.{found.name}")
    for found in pkgutil.iter_modules(pytree_grads.__path__)
    if not found.name.startswith("_")
]
NAMES = {
    name
    if module is pytree_grads
    else f"{module.__name__.split('.')[-1]}.{name}": value
    for module in MODULES
    for name in module.__all__
    if not inspect.ismodule(value := getattr(module, name))
}
CLASSES = {name: value for name, value in NAMES.items() if inspect.isclass(value)}
FUNCTIONS = {name: value for name, value in NAMES.items() if not inspect.isclass(value)}
# What JAX calls on a pytree class.
PYTREE_HOOKS = {"tree_flatten", "tree_flatten_with_keys", "tree_unflatten"}
MEMBERS = {
    f"{name}.{member}": inspect.getattr_static(value, member)
    for name, value in CLASSES.items()
    for member in dir(value)
    if not member.startswith("_") and member not in PYTREE_HOOKS
}
METHODS = {
    name: getattr(value, "__func__", value)
    for name, value in MEMBERS.items()
    if callable(getattr(value, "__func__", value))
}
SECTION = re.compile(r"^ *(Args|Returns|Raises|Attributes):$", re.MULTILINE)


def each(table):
    return pytest.mark.parametrize("name", table)


def sections(value):
    return set(SECTION.findall(value.__doc__ or ""))


def arguments(value):
    """The names of what a function takes, apart from self and cls."""
    return [x for x in inspect.signature(value).parameters if x not in ("self", "cls")]


def has_doctest(value):
    return bool(doctest.DocTestParser().get_examples(value.__doc__ or ""))


def test_the_reference_has_a_page_for_every_public_name_and_no_other():
    """Members of a class stand on its page, by autodoc."""
    listed, module = [], ""
    for line in INDEX.splitlines():
        if found := re.fullmatch(r"\.\. currentmodule:: pytree_grads\.?(\w*)", line):
            module = found[1]
        elif found := re.fullmatch(r"   (\w+)", line):
            listed.append(f"{module}.{found[1]}".strip("."))
    assert sorted(listed) == sorted(NAMES)


@each(FUNCTIONS)
def test_a_function_says_what_it_takes_returns_and_raises(name):
    doc = sections(FUNCTIONS[name])
    raises = {"Args", "Returns", "Raises"} - doc
    # What has the arguments of another function may say so.
    if re.search(r"are those of ``\w+``", FUNCTIONS[name].__doc__):
        raises -= {"Args", "Raises"}
    assert not raises, f"{name} lacks {sorted(raises)}"


@each([*FUNCTIONS, *METHODS])
def test_it_has_a_doctest(name):
    assert has_doctest((FUNCTIONS | METHODS)[name]), name


@each(CLASSES)
def test_a_class_has_a_doctest(name):
    assert has_doctest(CLASSES[name]), name


@each(METHODS)
def test_a_method_says_what_it_takes_and_returns(name):
    value = METHODS[name]
    doc = sections(value)
    if arguments(value):
        assert {"Args", "Raises"} <= doc, f"{name} has {sorted(doc)}"
    if inspect.signature(value).return_annotation is not None:
        assert "Returns" in doc, f"{name} has {sorted(doc)}"


@each([*NAMES, *MEMBERS])
def test_no_docstring_begins_with_a_riddle(name):
    value = (NAMES | MEMBERS)[name]
    first = (getattr(value, "__doc__", None) or "").strip()
    assert first, name
    assert not re.match(r"(The same|Those|That of)\b", first), first.splitlines()[0]
