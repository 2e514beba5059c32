"""The rooms of the package form a ladder, no import goes up it, and no room has a cycle
inside.
"""

import ast
from pathlib import Path

import pytest

import pytree_grads

PACKAGE = Path(pytree_grads.__file__).parent
# Each room imports from those before it, and from itself.
ROOMS = ["_jax", "_trees", "_batches", "_engine", "_jacobian"]
# Rooms, and rooms inside of rooms: each has a map in the docstring of its `__init__`.
MAPPED = [
    *ROOMS,
    "_engine.rules",
    "_engine.tails",
    "_engine.terms",
    "_engine.products",
]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Public packages for uses: their modules are private, their names public.
USES = sorted(
    {name.split(".")[0] for name in MODULES if "." in name and not name.startswith("_")}
)


def imports_of(module):
    """The modules of the package that a module imports, for types too, as dotted
    names.
    """
    path = MODULES[module]
    package = list(path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - (node.level - 1)]
        full = [*base, *(node.module.split(".") if node.module else [])]
        for alias in node.names:
            names = [[*full, alias.name], full, [*full, "__init__"]]
            yield next(x for x in map(".".join, names) if x in MODULES)


def room(module):
    return module.split(".")[0]


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in ROOMS])
def test_no_import_goes_up_the_ladder(module):
    allowed = ROOMS[: ROOMS.index(room(module)) + 1]
    for other in imports_of(module):
        assert room(other) in allowed, f"{module} imports {other}"


@pytest.mark.parametrize(
    "module", [name for name in MODULES if room(name) not in ROOMS]
)
def test_what_stands_above_the_rooms_is_public(module):
    """Public modules for uses import public names alone, and their own parts.

    The top imports from the rooms.
    """
    assert module == "__init__" or not module.startswith("_")
    if module != "__init__":
        for other in imports_of(module):
            own = room(other) == room(module)
            assert own or other in ("", "__init__"), (
                f"{module} imports {other}, which is not public"
            )


@pytest.mark.parametrize("name", [*ROOMS, *USES])
def test_modules_in_a_room_have_no_cycle(name):
    graph = {
        module: {x for x in imports_of(module) if room(x) == name}
        for module in MODULES
        if room(module) == name
    }
    while graph:
        ready = {module for module, needs in graph.items() if not needs & graph.keys()}
        assert ready, f"a cycle among {sorted(graph)}"
        graph = {
            module: needs for module, needs in graph.items() if module not in ready
        }


@pytest.mark.parametrize("name", MAPPED)
def test_the_map_of_a_room_names_its_modules(name):
    """A room inside of it counts as one module."""
    docstring = ast.get_docstring(ast.parse(MODULES[f"{name}.__init__"].read_text()))
    for module in MODULES:
        if module.startswith(f"{name}.") and module != f"{name}.__init__":
            part = module.removeprefix(f"{name}.").split(".")[0]
            assert f"``{part}``" in docstring, f"the map of {name} lacks {part}"


def test_every_room_has_a_map():
    found = [name for name in MODULES if name.endswith(".__init__")]
    rooms = {name.removesuffix(".__init__") for name in found}
    assert rooms == {*MAPPED, *USES}


def test_public_names_are_documented():
    public = [n for n in vars(pytree_grads) if not n.startswith("_")]
    for name in public:
        assert getattr(pytree_grads, name).__doc__, name
