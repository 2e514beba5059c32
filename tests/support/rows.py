"""The oracle: J as plain stacked rows from `jax.vmap(jax.grad(f))`, and its products in
NumPy.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Rows:
    """Rows of a function with a scalar output: one array (N, *shape) for each leaf."""

    leaves: list[np.ndarray]
    treedef: Any

    @classmethod
    def of(cls, fun, params, batch, **options):
        axes = (None, *[0] * len(batch))
        rows = jax.jit(jax.vmap(jax.grad(fun), axes), **options)(params, *batch)
        return cls.from_tree(rows)

    @classmethod
    def from_tree(cls, tree):
        leaves, treedef = jax.tree.flatten(tree)
        return cls([np.asarray(x) for x in leaves], treedef)

    def like(self, leaves):
        return jax.tree.unflatten(self.treedef, list(leaves))

    @property
    def flat(self):
        n = len(self.leaves[0])
        return np.concatenate([x.reshape(n, -1) for x in self.leaves], axis=1)

    def to_rows(self):
        return self.like(self.leaves)

    def weighted_sum(self, c=None):
        c = np.ones(len(self.leaves[0])) if c is None else np.asarray(c)
        return self.like(np.tensordot(c, x, 1).astype(x.dtype) for x in self.leaves)

    def mean(self):
        return self.like(x.mean(0) for x in self.leaves)

    def square_sum(self, c=None):
        c = np.ones(len(self.leaves[0])) if c is None else np.asarray(c)
        return self.like(np.tensordot(c, np.abs(x) ** 2, 1) for x in self.leaves)

    def norms(self):
        return np.linalg.norm(self.flat, axis=1)

    def by_leaf(self, of):
        """A tree like the parameters, of a number per row for each leaf."""
        return self.like(of(Rows([x], None)) for x in self.leaves)

    def gram(self, other=None):
        return self.flat.conj() @ (self if other is None else other).flat.T

    def apply(self, v):
        n = len(self.leaves[0])
        parts = zip(self.leaves, jax.tree.leaves(v), strict=True)
        return sum(np.real(x.reshape(n, -1) @ np.ravel(y)) for x, y in parts)

    def scale(self, *s):
        """Rows times numbers; one array of them, or one for each leaf."""
        s = s * len(self.leaves) if len(s) == 1 else s
        pairs = zip(self.leaves, s, strict=True)
        scaled = [
            x * np.reshape(np.asarray(a), (-1, *[1] * (x.ndim - 1))) for x, a in pairs
        ]
        return Rows(scaled, self.treedef)

    def clip(self, max_norm):
        bounds = jax.tree.broadcast(max_norm, self.to_rows())
        whole = jax.tree.leaves(max_norm)
        if len(whole) == 1:
            return self.scale(_shrink(self.norms(), whole[0]))
        factors = []
        for x, bound in zip(self.leaves, jax.tree.leaves(bounds), strict=True):
            factors.append(
                _shrink(np.linalg.norm(x.reshape(len(x), -1), axis=1), bound)
            )
        return self.scale(*factors)

    def __getitem__(self, index):
        return Rows([x[index] for x in self.leaves], self.treedef)


def _shrink(norms, bound):
    return np.minimum(1, bound / np.where(norms > 0, norms, 1))


@dataclass(frozen=True)
class Given:
    """What products take besides J: weights c of rows, scales s, a direction v, bounds
    of norms.
    """

    c: Any
    s: Any
    v: Any
    bound: Any
    bounds: Any  # one for each leaf

    @classmethod
    def draw(cls, rows, params, seed=0):
        rng = np.random.default_rng(seed)
        n = len(rows.leaves[0])

        def normal(shape, dtype=float):
            return jnp.asarray(rng.standard_normal(shape), dtype)

        def bound(x):
            norms = np.linalg.norm(x.reshape(n, -1), axis=1)
            return jnp.asarray(np.median(norms) if n else 1.0, float)

        v = jax.tree.map(lambda x: normal(x.shape, x.dtype), params)
        bounds = rows.like(map(bound, rows.leaves))
        return cls(
            normal(n), normal(n), v, jnp.asarray(np.median(rows.norms()), float), bounds
        )


jax.tree_util.register_dataclass(Given)

# Every product, of a Jacobian and of the oracle.
PRODUCTS = {
    "to_rows": (lambda J, _: J.to_rows(), lambda R, _: R.to_rows()),
    # Before norms: a sum takes rows that these have made.
    "weighted_sum": (
        lambda J, g: J.weighted_sum(g.c),
        lambda R, g: R.weighted_sum(g.c),
    ),
    "norms": (lambda J, _: J.norms(), lambda R, _: R.norms()),
    "squared_norms": (lambda J, _: J.squared_norms(), lambda R, _: R.norms() ** 2),
    "sum": (lambda J, _: J.sum(), lambda R, _: R.weighted_sum()),
    "mean": (lambda J, _: J.mean(), lambda R, _: R.mean()),
    "J @ v": (lambda J, g: J @ g.v, lambda R, g: R.apply(g.v)),
    "gram": (lambda J, _: J.gram(), lambda R, _: R.gram()),
    "J @ other.T": (
        lambda J, g: J @ J[1:4].scale(g.s[1:4]).T,
        lambda R, g: R.gram(R[1:4].scale(g.s[1:4])),
    ),
    "square_sum": (lambda J, _: J.square_sum(), lambda R, _: R.square_sum()),
    "square_sum(c)": (lambda J, g: J.square_sum(g.c), lambda R, g: R.square_sum(g.c)),
    "scale": (
        lambda J, g: J.scale(g.s).sum(),
        lambda R, g: R.scale(g.s).weighted_sum(),
    ),
    "scale twice": (
        lambda J, g: J.scale(g.s).scale(g.c).to_rows(),
        lambda R, g: R.scale(np.asarray(g.s * g.c)).to_rows(),
    ),
    "norms of leaves": (
        lambda J, _: J.norms(groups="leaves"),
        lambda R, _: R.by_leaf(Rows.norms),
    ),
    "gram of leaves": (
        lambda J, _: J.gram(groups="leaves"),
        lambda R, _: R.by_leaf(Rows.gram),
    ),
    "scale leaves": (
        lambda J, g: J.scale(J.norms(groups="leaves"), groups="leaves").weighted_sum(
            g.c
        ),
        lambda R, g: R.scale(*jax.tree.leaves(R.by_leaf(Rows.norms))).weighted_sum(g.c),
    ),
    "clip": (
        lambda J, g: J.clip(g.bound).sum(),
        lambda R, g: R.clip(g.bound).weighted_sum(),
    ),
    "clip each": (
        lambda J, g: J.clip(g.bounds, nan_safe=True).weighted_sum(g.c),
        lambda R, g: R.clip(g.bounds).weighted_sum(g.c),
    ),
    "slice": (
        lambda J, g: J[1:4].T @ g.c[1:4],
        lambda R, g: R[1:4].weighted_sum(g.c[1:4]),
    ),
}
# Those that a mode may compute in a way of its own; the others are made from the same
# parts.
CORE = (
    "weighted_sum",
    "norms",
    "sum",
    "gram",
    "square_sum(c)",
    "clip",
    "clip each",
    "J @ v",
)


def products(J, given, names=tuple(PRODUCTS)):
    return {name: PRODUCTS[name][0](J, given) for name in names}


def expected(rows, given, names=tuple(PRODUCTS)):
    return {name: PRODUCTS[name][1](rows, given) for name in names}


def assert_close(got, want, rtol, *, also=0.0):
    """Leaves agree within `rtol` times their largest entry, plus a number (or a tree of
    them).

    A leaf that is all but zero beside the others (the bias of a key in attention) holds
    rounding errors of the others' size: a thousandth of their largest entry counts for
    it.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    sizes = [np.max(np.abs(x), initial=0.0) for x in jax.tree.leaves(want)]
    extra = jax.tree.leaves(jax.tree.broadcast(also, want))
    pairs = zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), sizes, extra, strict=True
    )
    for (path, x), y, size, more in pairs:
        where = jax.tree_util.keystr(path)
        assert x.shape == y.shape, f"{where}: shape {x.shape} is not {y.shape}"
        atol = rtol * max(size, 1e-3 * max(sizes)) + more
        np.testing.assert_allclose(np.asarray(x), y, rtol=0, atol=atol, err_msg=where)
