"""Routes of the engine, forced: small shapes would otherwise all be materialised."""

import contextlib
from math import prod

import jax

from pytree_grads._engine import plan as _plan
from pytree_grads._engine import thresholds
from pytree_grads._jacobian.kept import Kept


@contextlib.contextmanager
def factors_kept():
    """Keep the terms of all leaves, also of those that are smaller as they are."""
    plan_leaf = _plan.plan_leaf

    def forced(leaf, varying, route, *outputs):
        route = "factored" if route == "auto" else route
        return plan_leaf(leaf, varying, route, *outputs)

    _plan.plan_leaf = forced
    try:
        yield
    finally:
        _plan.plan_leaf = plan_leaf


# `with with_thresholds(narrow=1):` replaces numbers by which the engine chooses ways.
with_thresholds = thresholds.changed


def few_at_once(entries):
    """Where rows are materialised, those of so many entries are at a time."""
    return with_thresholds(entries_at_once=entries, squares_at_once=entries)


def matrix_of(J):
    """The engine's matrix of a Jacobian, or of its first chunk if it is recomputed."""
    return J._rows.matrix if isinstance(J._rows, Kept) else J._rows.of_a_chunk()


def leaves_of(J):
    """The engine's leaves of a Jacobian, in the order of the parameters, abstract."""
    return list(jax.eval_shape(lambda matrix: matrix.leaves, matrix_of(J)))


def is_dense(leaf):
    """Whether a term that differs between rows has the leaf's own size."""
    own = [x for x in leaf.summands if x.term.is_dense and not x.is_shared]
    return any(prod(x.shape) == prod(leaf.shape) for x in own)


def is_matrix(leaf):
    return sum(n > 1 for n in leaf.shape) > 1
