"""How the rows of a Jacobian are kept and what its products cost: the table of `J.explain()`."""

from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .._engine import terms as _terms
from .._engine.leaf import Leaf, Piece, materializes
from .._engine.patches import Windows
from .._engine.terms import Dense, Outer, Scatter

if TYPE_CHECKING:
    from .jacobian import Jacobian


def explain(jacobian: "Jacobian") -> str:
    """The table of `Jacobian.explain`."""
    source = jacobian._rows.source
    leaves = jacobian._rows.leaves
    if leaves is None:
        batch = source.batch.chunk(0, min(source.chunk_size or len(jacobian), len(jacobian)))
        leaves = jax.eval_shape(lambda: source.factor(batch).leaves)
    paths = [path for path, _ in jax.tree.leaves_with_path(jacobian._rows.params)]
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
    table = [header, *(_line(p, x) for p, x in zip(paths, leaves, strict=True))]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if i in (4, 5, 6) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    kept = sum(_bytes(leaf) for leaf in leaves)
    dense = sum(prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
    mode = (
        "rows are made again for each product" if jacobian._rows.leaves is None else "rows are kept"
    )
    lines.append(
        f"{jacobian!r}: {mode}; {_number(kept)}B per row, {_number(dense)}B if it were "
        "materialised. FLOPs and bytes are per row."
    )
    return "\n".join(lines)


def _line(path: Any, leaf: Leaf) -> tuple[str, ...]:
    name = jax.tree_util.keystr(path) or "(the parameter)"
    shape = "x".join(map(str, leaf.shape)) or "scalar"
    terms = " + ".join(_term(piece) for piece in leaf.pieces) or "zero"
    norm = "rows" if materializes(leaf, leaf) else "inner products"
    terms_of = [piece.of_one_row for piece in leaf.pieces]
    if all(isinstance(x, Scatter) or not _terms.has_many_pairs(x) for x in terms_of):
        norm = "squares"
    norm_flops = sum(_terms.inner_cost(x, y) for x in terms_of for y in terms_of)
    if len(terms_of) == 1 and isinstance(terms_of[0], Windows):
        norm, norm_flops = "windows", _terms.row_cost(terms_of[0]) + 2 * prod(leaf.shape)
    if norm == "squares":
        norm_flops = 2 * _entries(leaf) + sum(map(_terms.meeting_cost, terms_of))
    sum_flops = sum(_terms.row_cost(term) for term in terms_of)
    note = _note(leaf)
    return (
        name,
        shape,
        terms,
        norm,
        _number(norm_flops),
        _number(sum_flops),
        _number(_bytes(leaf)),
        note,
    )


def _term(piece: Piece) -> str:
    match piece.term:
        case Outer():
            (blocks, m, n), steps = piece.shape, _terms.pair_count(piece.term)
            size = f"{m}x{n}"
            kind = f"outer {size}" if steps == 1 else f"outer {size}, T={steps}"
        case Scatter(_, _, length):
            blocks = piece.shape[0]
            kind = f"scatter {_terms.pair_count(piece.term)} of {length} lines"
        case Windows(offsets=offsets):
            blocks = piece.shape[0]
            kernel = "x".join(map(str, offsets))
            kind = f"windows {kernel} of {piece.term.left.shape[-1]}x{piece.shape[2]}"
        case Dense():
            blocks, kind = 1, "dense, shared by all rows" if piece.levels == (0,) else "dense"
    return kind if blocks == 1 else f"{blocks} x {kind}"


def _note(leaf: Leaf) -> str:
    """Why a matrix is not kept as factors; vectors have none."""
    if len(leaf.shape) < 2:
        return ""
    dense = [p for p in leaf.pieces if isinstance(p.term, Dense) and p.levels != (0,)]
    return "; ".join(dict.fromkeys(piece.reason for piece in dense))


def _entries(leaf: Leaf) -> int:
    """Numbers kept per row."""
    total = 0
    for piece in leaf.pieces:
        arrays = jax.tree.leaves(piece.of_one_row)
        total += sum(x.size for x, level in zip(arrays, piece.levels, strict=True) if level)
    return total


def _bytes(leaf: Leaf) -> int:
    return _entries(leaf) * jnp.dtype(leaf.dtype).itemsize


def _number(x: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if x < 1000:
            return f"{x:.3g}{unit}"
        x /= 1000
    return f"{x:.3g}P"
