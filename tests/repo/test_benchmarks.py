"""The tables of ``benchmarks/per_example.py``, of figures made by hand."""

import math
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pytree_grads._engine import thresholds

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.md"))


@pytest.fixture
def per_example(benchmarks):
    import per_example

    return per_example


@pytest.fixture
def benchmarks(monkeypatch):
    before = set(sys.modules)
    folder = BENCHMARKS
    monkeypatch.syspath_prepend(str(folder))
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
            del sys.modules[name]


def entry(per_example, name, **times):
    """An entry with a figure for each time.

    One that ends in `_` knows the time alone.
    """
    figures = {}
    for key, time in times.items():
        other, size = (math.nan, -1) if key.endswith("_") else (1.0, 1024)
        figures[key.rstrip("_")] = per_example.Figure(time, other, other, other, size)
    base = SimpleNamespace(temp_bytes=1024)
    return per_example.Entry(
        per_example.Model(name, name, None), None, base, 0.5, figures
    )


def test_a_peer_that_knows_its_time_alone_counts(per_example):
    made = entry(per_example, "a", auto=1.0, optax=4.0, BackPACK_=2.0)
    assert str(made.figures["BackPACK"]) == "2.00 · –"
    assert made.over_best_peer == 0.5
    table = per_example.product_table(
        [made, entry(per_example, "b", auto=1.0, optax=4.0)]
    )
    assert table.startswith(per_example.TORCH)
    header, _, one, other = (
        [x.strip() for x in row.split("|")] for row in table.splitlines()[2:]
    )
    assert header[-4:-1] == ["optax", "BackPACK", "÷ best peer"]
    assert one[-4:-1] == ["4.00 · 1.00", "2.00 · –", "0.50"]
    assert other[-4:-1] == ["4.00 · 1.00", "–", "0.25"]


def test_a_few_examples_at_a_time_are_compared_with_peers_too(per_example):
    made = entry(
        per_example,
        "a",
        **{"auto": 1.2, "8 at a time": 0.8, "factored": 0.1, "optax": 1.0},
    )
    table = per_example.product_table([made])
    header, _, row = (
        [x.strip() for x in line.split("|")] for line in table.splitlines()
    )
    assert header[-5:-1] == ["8 at a time", "optax", "÷ best peer", "at best"]
    assert row[-5:-1] == ["0.80 · 1.00", "1.00 · 1.00", "1.20", "0.80"]


def test_peers_of_jax_alone_are_shown_alone(per_example):
    table = per_example.product_table([entry(per_example, "a", auto=1.0, optax=4.0)])
    assert table.startswith("| model")
    assert "÷ best peer" in table
    assert "÷ best peer" not in per_example.product_table(
        [entry(per_example, "a", auto=1.0)]
    )


def test_every_number_that_the_package_chooses_by_is_timed_on_both_sides(benchmarks):
    import constants

    names = {field.name for field in fields(thresholds.Thresholds)}
    taken: dict[str, set[bool]] = {}
    for case in constants.cases():
        taken.setdefault(case.name, set()).add(case.is_above)
    assert taken.keys() == names
    assert all(sides == {True, False} for sides in taken.values())


def test_operations_are_counted_as_often_as_they_run(benchmarks):
    import _flops

    def fun(x):
        unused = x @ x
        return jax.lax.scan(
            lambda c, _: (jnp.tanh(c @ x).T, jnp.sum(c)), x, length=3
        ), unused

    jaxpr = jax.make_jaxpr(lambda x: fun(x)[0])(jnp.ones((4, 4))).jaxpr
    assert _flops.count(jaxpr) == 3 * 2 * 4**3
    assert _flops.count(jaxpr, everything=True) == 3 * (2 * 4**3 + 4**2 + 4**2)


@pytest.mark.any_release
def test_factored_sketches_of_a_transformer_cost_less_than_a_gradient(benchmarks):
    """By operations, beyond the making of J; `sketches.py` has the times."""
    import _flops
    import sketches
    from _models import MODELS

    (problem,) = (model() for model in MODELS if model.name == sketches.NAMES[1])

    def operations(fun):
        with jax.numpy_rank_promotion("allow"):
            jaxpr = jax.make_jaxpr(fun)(*problem.args).jaxpr
        return _flops.count(jaxpr, everything=True)

    gradient = operations(sketches.ordinary(problem))
    alone = operations(sketches.making(problem))
    assert alone < gradient
    for kind in ("kronecker", "tensor"):
        own = operations(sketches.sketched(problem, 1024, kind)) - alone
        assert 0 < own < gradient / 2, kind


def test_programs_above_what_they_were_are_listed(benchmarks):
    import programs

    old = programs.Entry(100.0, 50.0, 0, 1.0, 2.0, "a")
    found = programs.Found(
        {"same": old, "worse": old, "gone": old},
        {
            "same": old,
            "worse": replace(old, operations=103.0, temp_bytes=8, instructions="b"),
        },
        {"worse": [(1.0, 2.0), (2.0, 3.0), (1.0, 1.5)]},
    )
    told = programs.comparison(found)
    assert "2 programs, 1 of them the same." in told
    assert (
        "Above 1.01: 1.\n\n- worse: operations 1.030, products 1.000, memory inf"
        in told
    )
    assert "Only old: gone." in told
    assert "Mean ratio of the time of a call: 1.500." in told


def test_saved_tables_keep_the_title_and_the_notes(benchmarks, monkeypatch, tmp_path):
    import _results

    monkeypatch.setattr(_results, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/b.py", "--only", "a b", "--save"])
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    path = _results.save("made", "Made", "Python 3", "| a |\n|---|\n")
    first = path.read_text()
    expected = "# Made\n\nPython 3\n\n    python benchmarks/b.py --only 'a b' --save\n"
    assert first.startswith(expected)
    assert first.endswith(_results.NOTES + "\n")
    path.write_text(first.replace("# Made", "# Mine") + "\nA note.\n")
    again = _results.save("made", "Made", "Python 4", "| b |\n|---|\n").read_text()
    assert again.startswith("# Mine\n\nPython 4\n")
    assert again.endswith(f"| b |\n|---|\n\n{_results.NOTES}\n\nA note.\n")


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_a_result_file_begins_with_what_it_ran_on_and_its_command(path):
    title, _, environment, *rest = path.read_text().splitlines()
    assert title.startswith("# ")
    assert "core" in environment
    assert any(line.startswith("    ") and "python " in line for line in rest[:4])


def test_every_result_file_is_linked():
    page = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text()
    assert {path.stem for path in RESULTS} == set(
        re.findall(r"/results/(\w+)\.md\)", page)
    )
