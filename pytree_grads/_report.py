"""What a Jacobian says of itself: how its rows are kept, at what cost, and if they are right."""

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._checks import PyTree, located
from ._factored import _terms
from ._factored._leaves import Leaf, Piece, materializes
from ._factored._matrix import Matrix
from ._factored._terms import Dense, Outer, Scatter

if TYPE_CHECKING:
    from ._jacobian import Jacobian


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
    if all(_terms.cannot_cancel(piece.term) for piece in leaf.pieces):
        norm = "squares"
    pairs = [(x.term, y.term) for x in leaf.pieces for y in leaf.pieces]
    norm_flops = sum(_terms.inner_cost(x, y) for x, y in pairs)
    if norm == "squares":
        norm_flops = 2 * _entries(leaf)
    sum_flops = sum(_terms.row_cost(piece.term) for piece in leaf.pieces)
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
            (blocks, m, n), steps = piece.shape, piece.term.left.shape[-2]
            size = f"{m}x{n}"
            kind = f"outer {size}" if steps == 1 else f"outer {size}, T={steps}"
        case Scatter(_, right, length):
            blocks = piece.shape[0]
            kind = f"scatter {right.shape[-2]} of {length} lines"
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
        for x, level in zip(jax.tree.leaves(piece.term), piece.levels, strict=True):
            total += prod(x.shape) // prod(leaf.rows[:level]) if level else 0
    return total


def _bytes(leaf: Leaf) -> int:
    return _entries(leaf) * jnp.dtype(leaf.dtype).itemsize


def _number(x: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if x < 1000:
            return f"{x:.3g}{unit}"
        x /= 1000
    return f"{x:.3g}P"


def check(jacobian: "Jacobian", rows: int) -> None:
    """The comparison of `Jacobian.check`."""
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(jacobian)):
        raise TypeError("J.check() looks at values: call it outside jit, vmap and grad")
    count = min(rows, len(jacobian))
    if not count:
        return
    few = jacobian[:count]
    want = _plain_rows(few)
    depth = len(few._rows.shape)
    c = jnp.asarray(np.linspace(-1, 1, prod(few._rows.shape)).reshape(few._rows.shape))

    def products(matrix: Matrix) -> Any:
        return matrix.rows(), matrix.leaf_norms()

    bare = replace(few._rows, weights=None, valid=None)
    got, norms = bare.map(products)
    c = c.astype(jnp.zeros(()).dtype)
    sums = bare.fold(lambda matrix, c: matrix.weighted_sum(c), c)
    squares = bare.fold(lambda matrix, c: matrix.square_sum(c), None, lambda d: jnp.finfo(d).dtype)
    for i, (path, _) in enumerate(jax.tree.leaves_with_path(jacobian._rows.params)):
        plain = np.asarray(want[i]).astype(np.result_type(np.float64, want[i].dtype))
        flat = plain.reshape(*few._rows.shape, -1)
        weights = np.asarray(c, np.float64)
        expected = {
            "to_rows": (got[i], plain),
            "norms": (norms[i], np.linalg.norm(flat, axis=-1)),
            "weighted_sum": (sums[i], np.tensordot(weights, plain, depth)),
            "square_sum": (squares[i], np.sum(np.abs(plain) ** 2, axis=tuple(range(depth)))),
        }
        eps = float(jnp.finfo(jacobian._rows.primals[i].dtype).eps)
        for product, (found, right) in expected.items():
            _compare(path, product, np.asarray(found), right, eps)


def _compare(path: Any, product: str, found: np.ndarray, right: np.ndarray, eps: float) -> None:
    found = found.astype(np.result_type(np.float64, found.dtype))
    scale = np.max(np.abs(right), initial=0.0)
    error = np.max(np.abs(found - right), initial=0.0)
    if not np.array_equal(np.isfinite(found), np.isfinite(right)) or error > 8 * eps**0.5 * scale:
        raise ValueError(
            f"{located('params', path)}: {product} differs from plain jax.grad by {error:.3g}, "
            f"where the largest entry is {scale:.3g}: please report the function, with J.explain()"
        )


def _plain_rows(jacobian: "Jacobian") -> list[jax.Array]:
    """The rows of each leaf by `jax.grad` or `jax.jacrev` of one example after the other."""
    source = jacobian._rows.source
    rows = []
    for i in range(len(jacobian)):
        one = source.batch.chunk(i, 1)

        def outputs(primals: PyTree, one: Any = one) -> jax.Array:
            batch = one.with_primals(primals)
            leaves = [
                x if axis is None else jax.lax.index_in_dim(x, 0, axis, keepdims=False)
                for x, axis in zip(batch.leaves, batch.axes, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(batch.treedef, leaves)
            result = source.fun(*args, **kwargs)
            result = result[0] if source.has_aux else result
            if jacobian._outputs.is_scalar:
                return result
            flat = [jnp.ravel(x) for x in jax.tree.leaves(result)]
            dtype = jnp.result_type(*(x.dtype for x in flat))
            return jnp.concatenate([x.astype(dtype) for x in flat])

        differentiate = jax.grad if jacobian._outputs.is_scalar else jax.jacrev
        rows.append(jax.tree.leaves(differentiate(outputs)(one.primals)))
    return [jnp.stack(leaf) for leaf in zip(*rows, strict=True)]
