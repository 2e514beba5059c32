"""The tables of ``benchmarks/per_example.py``, of figures made by hand."""

import math
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytree_grads._engine import thresholds


@pytest.fixture
def per_example(benchmarks):
    import per_example

    return per_example


@pytest.fixture
def benchmarks(monkeypatch):
    before = set(sys.modules)
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
            del sys.modules[name]


def entry(per_example, name, **times):
    """An entry with a figure for each time; one that ends in `_` knows the time alone."""
    figures = {}
    for key, time in times.items():
        other, size = (math.nan, -1) if key.endswith("_") else (1.0, 1024)
        figures[key.rstrip("_")] = per_example.Figure(time, other, other, other, size)
    base = SimpleNamespace(temp_bytes=1024)
    return per_example.Entry(per_example.Model(name, name, None), None, base, 0.5, figures)


def test_a_peer_that_knows_its_time_alone_counts(per_example):
    made = entry(per_example, "a", auto=1.0, optax=4.0, BackPACK_=2.0)
    assert str(made.figures["BackPACK"]) == "2.00 · –"
    assert made.over_best_peer == 0.5
    table = per_example.product_table([made, entry(per_example, "b", auto=1.0, optax=4.0)])
    assert table.startswith(per_example.TORCH)
    header, _, one, other = ([x.strip() for x in row.split("|")] for row in table.splitlines()[2:])
    assert header[-4:-1] == ["optax", "BackPACK", "÷ best peer"]
    assert one[-4:-1] == ["4.00 · 1.00", "2.00 · –", "0.50"]
    assert other[-4:-1] == ["4.00 · 1.00", "–", "0.25"]


def test_a_few_examples_at_a_time_are_compared_with_peers_too(per_example):
    made = entry(
        per_example, "a", **{"auto": 1.2, "8 at a time": 0.8, "factored": 0.1, "optax": 1.0}
    )
    table = per_example.product_table([made])
    header, _, row = ([x.strip() for x in line.split("|")] for line in table.splitlines())
    assert header[-5:-1] == ["8 at a time", "optax", "÷ best peer", "at best"]
    assert row[-5:-1] == ["0.80 · 1.00", "1.00 · 1.00", "1.20", "0.80"]


def test_peers_of_jax_alone_are_shown_alone(per_example):
    table = per_example.product_table([entry(per_example, "a", auto=1.0, optax=4.0)])
    assert table.startswith("| model")
    assert "÷ best peer" in table
    assert "÷ best peer" not in per_example.product_table([entry(per_example, "a", auto=1.0)])


def test_every_number_that_the_package_chooses_by_is_timed_on_both_sides(benchmarks):
    import constants

    names = {field.name for field in fields(thresholds.Thresholds)}
    taken: dict[str, set[bool]] = {}
    for case in constants.cases():
        taken.setdefault(case.name, set()).add(case.is_above)
    assert taken.keys() == names
    assert all(sides == {True, False} for sides in taken.values())
