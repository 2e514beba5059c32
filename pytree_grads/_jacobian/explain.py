"""The table of `J.explain()`: how rows are kept, and what products cost."""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from .._engine.leaf import Leaf, Summand
from .._engine.matrix import Matrix
from .._engine.products.factored_sketch import KINDS
from .._engine.products.metric import all_absorbed
from .._engine.products.routes import norm_route, rows_route, sum_flops
from .kept import Kept
from .rows import Rows
from .sketch import FactoredProjection


def explain(rows: Rows, title: str) -> str:
    """The table of `Jacobian.explain`, for a Jacobian of some title."""
    if isinstance(rows, Kept):
        matrix, mode = rows.matrix, "rows are kept"
    else:
        matrix, mode = rows.of_a_chunk(), "rows are recomputed for each product"
    leaves = jax.eval_shape(lambda x: x.leaves, matrix)
    costs = zip(matrix.by_leaf(sum_flops), matrix.by_leaf(_bytes), strict=True)
    paths = [path for path, _ in jax.tree.leaves_with_path(rows.origin.params)]
    header = (
        "leaf",
        "shape",
        "terms of a row",
        "norm",
        "norm FLOPs",
        "sum FLOPs",
        "bytes",
        "why materialised",
    )
    diagonal = rows.diagonal or (None,) * len(leaves)
    leaves, left = jax.eval_shape(all_absorbed, leaves, diagonal)
    built = [x is not None for x in left or (None,) * len(leaves)]
    words = matrix.words_by_leaf()
    table = [header, *map(_line, paths, leaves, built, costs, words)]
    lines = _laid_out(table, numbers=(4, 5, 6))
    if rows.diagonal is not None:
        mode += ", times a diagonal in parameter space"
    kept = sum(map(_bytes, matrix.sources))
    dense = sum(prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
    lines.append(
        f"{title}: {mode}; {_number(kept)}B per row, {_number(dense)}B if it were "
        "materialised. FLOPs and bytes are per row."
    )
    return "\n".join(lines)


def explain_sketches(rows: Rows, dim: int) -> str:
    """How `J.sketch` takes each leaf, for each kind: the second table."""
    of_rows = rows.matrix if isinstance(rows, Kept) else rows.of_a_chunk()
    paths = [path for path, _ in jax.tree.leaves_with_path(rows.origin.params)]
    found: dict[str, list[str]] = {}

    def ask(matrix: Matrix) -> tuple[()]:
        chosen = matrix.selected()
        for kind in KINDS:
            found[kind] = FactoredProjection(dim, kind).words(chosen)
        return ()

    jax.eval_shape(ask, of_rows)
    header = ("leaf", *KINDS)
    lines = [
        (jax.tree_util.keystr(path) or "(the parameter)", *words)
        for path, *words in zip(paths, *found.values(), strict=True)
    ]
    told = [
        f"Sketches to {dim} numbers. A dense sketch multiplies each row by signs.",
        "A factored one projects both sides of each outer product: `factors`. Where",
        "factors are no gain, it takes the row in full, by the same map.",
    ]
    return "\n".join([*_laid_out([header, *lines]), *told])


def _laid_out(
    table: Sequence[tuple[str, ...]], numbers: Sequence[int] = ()
) -> list[str]:
    """The lines of a table with a rule below its header; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def _line(
    path: Any,
    leaf: Leaf,
    is_built: bool,
    costs: tuple[float, float],
    words: Sequence[str],
) -> tuple[str, ...]:
    """The cells of one leaf; routes and costs are those that the products use.

    `is_built` says that norms build rows, to multiply them by a diagonal.
    """
    route = rows_route(leaf) if is_built else norm_route(leaf)
    return (
        jax.tree_util.keystr(path) or "(the parameter)",
        "x".join(map(str, leaf.shape)) or "scalar",
        ", ".join([" + ".join(map(_term, leaf.summands)) or "zero", *words]),
        route.way,
        _number(route.flops),
        *map(_number, costs),
        _note(leaf),
    )


def _term(summand: Summand) -> str:
    words = summand.of_one_row.describe()
    return f"{words}, shared by all rows" if summand.is_shared else words


def _note(leaf: Leaf) -> str:
    """Why a matrix is not kept as factors; vectors have none."""
    if len(leaf.shape) < 2:
        return ""
    dense = [x for x in leaf.summands if x.term.is_dense and not x.is_shared]
    return "; ".join(dict.fromkeys(x.reason for x in dense))


def _entries(leaf: Leaf) -> float:
    """Numbers kept per row; outputs share those that are kept once for an example."""
    total, outputs = 0, leaf.outputs or 1
    for summand in leaf.summands:
        arrays = jax.tree.leaves(summand.of_one_row)
        for x, row_axes in zip(arrays, summand.row_axes, strict=True):
            total += x.size / (outputs if row_axes == 1 else 1) if row_axes else 0
    return total


def _bytes(leaf: Leaf) -> float:
    return _entries(leaf) * jnp.dtype(leaf.dtype).itemsize


def _number(x: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if x < 1000:
            return f"{x:.3g}{unit}"
        x /= 1000
    return f"{x:.3g}P"
