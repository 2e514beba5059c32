"""The import graph of the package has no cycle and respects its layers."""

import ast
from pathlib import Path

import pytest

import pytree_grads

PACKAGE = Path(pytree_grads.__file__).parent
# Each module imports only from earlier layers; modules of one layer know nothing of each other.
LAYERS = [
    {"_checks", "_compat"},
    {"_canonical", "_chunks", "_effects", "_sharding", "_tree"},
    {"_axes", "_differentiable", "_misuse", "_notes", "_refused"},
    {"_batch"},
    {"_push_pull"},
    {"_factored"},
    {"_clip", "_outputs", "_sketch", "_source"},
    {"_once", "_report"},
    {"_kept"},
    {"_accumulator", "_combine", "_gramian", "_vector", "_per_example", "_reassemble"},
    {"_chain_rule", "_jacobian"},
    {"_jacobian_of", "_second_order"},
    {"__init__"},
]


def units():
    """The modules of the package by name; a subpackage counts as one."""
    return sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")})


def at_run_time(node):
    """Every node of a module but those under ``if TYPE_CHECKING``, which never runs."""
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from at_run_time(child)


def imported(unit):
    """The units that a unit imports."""
    path = PACKAGE / unit
    for file in [path] if path.is_file() else path.rglob("*.py"):
        inside = len(file.relative_to(PACKAGE).parts)
        for node in at_run_time(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level != inside:
                continue
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (name.split(".")[0] for name in names)


def layer(unit):
    name = unit.removesuffix(".py")
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"{unit} has no layer in the table"
    return found[0]


@pytest.mark.parametrize("unit", units())
def test_imports_point_to_earlier_layers(unit):
    for other in imported(unit):
        assert layer(other) < layer(unit), f"{unit} imports {other}"


def test_modules_inside_the_engine_have_no_cycle():
    files = {path.stem: path for path in (PACKAGE / "_factored").glob("*.py")}
    graph = {
        name: {
            node.module.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        }
        for name, path in files.items()
    }
    while graph:
        ready = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert ready, f"a cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in ready}


def test_public_names_are_documented():
    public = [n for n in vars(pytree_grads) if not n.startswith("_")]
    for name in public:
        assert getattr(pytree_grads, name).__doc__, name
