"""J, the matrix whose row i is the gradient of a function at example i, as an operator."""

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._engine.matrix import Matrix
from .._trees import algebra
from .._trees.checks import PyTree, check_key, check_matching, describe, positive_int
from .._trees.vector import Vector
from . import check as _check
from . import clip as _clip
from . import explain as _explain
from . import sketch as _sketch
from .gram import gram
from .outputs import Outputs
from .refused import NotAnArray
from .rows import Rows


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["_rows"],
    meta_fields=["_outputs"],
)
@dataclass(frozen=True, repr=False, eq=False)
class Jacobian(NotAnArray):
    """J: a row for each example, or for each output of each example.

    J is no tree of rows. Its leaves as a pytree are factors of rows, so ``jax.tree.map`` of J gives
    nonsense of the right shape: ``J.scale(s)`` multiplies rows by numbers, ``J.to_rows()`` gives
    the rows themselves.

    Made by ``jacobian`` and ``value_and_jacobian``. N is the number of examples, P the number of
    parameters. Where the function returns a scalar, "a number per row" is an array of shape (N,);
    otherwise it is a tree like the function's output, with leaves of shape (N, *k).

    Rows are kept as factors, from which every product is computed without the rows; or nothing is
    kept, and each product makes what it needs (``recompute=True``, ``chunk_size=k``). A Jacobian is
    a pytree: it may leave ``jit``, and enter ``vmap``, ``scan`` and ``grad``. Where nothing is
    kept, it takes its function along, which must hold no traced values if it leaves ``jit``.

    ===========================  =================================================================
    case                         result
    ===========================  =================================================================
    N = 0                        sums are zero, ``mean()`` is NaN, a number per row has shape (0,)
    a row of zeros               norm 0, with derivative 0; ``clip`` leaves it
    a row with a NaN or infinity its norm is NaN or infinite, and it poisons every sum, unless
                                 ``clip(..., nan_safe=True)`` has made it zero
    a norm that overflows        is infinite or NaN; ``clip`` takes its row for one with an infinity
    a norm that is 9e37 times    its row is zero once clipped, for no normal float scales it so
    its bound, in float32
    complex parameters           rows follow ``jax.grad``'s convention (step along the conjugate);
                                 ``gram`` conjugates the left row, ``J @ v`` is real
    ===========================  =================================================================
    """

    _rows: Rows
    _outputs: Outputs

    def __len__(self) -> int:
        size = self._rows.shape[0]
        if not isinstance(size, int):
            raise TypeError(
                f"the number of examples is symbolic, {size}, and len(J) would be an int: use "
                "J.shape[0], or J.mean() for the sum divided by it"
            )
        return size

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, P)``, or ``(N, *k, P)`` for outputs of shape k; a tree of K numbers counts (K,)."""
        outputs = self._outputs
        is_array = jax.tree_util.treedef_is_leaf(outputs.treedef)
        middle = outputs.shapes[0] if is_array else (outputs.count,)
        return (self._rows.shape[0], *middle, sum(map(prod, self._rows.param_shapes)))

    def __repr__(self) -> str:
        kept = "recomputed" if self._rows.leaves is None else "kept"
        text = f"Jacobian(shape={self.shape}, leaves={len(self._rows.param_shapes)}, rows {kept})"
        return f"a stack of {text}" if self._rows.is_stack else text

    def __getitem__(self, index: slice) -> "Jacobian":
        """The rows of a slice of examples, with step 1 and bounds that are not traced."""
        parts = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
        if any(isinstance(x, Tracer) for x in parts):
            raise TypeError(
                "the bounds of a slice of a Jacobian are static, got a traced one; to choose rows "
                "by a traced index, index the batch that goes into it"
            )
        if not isinstance(index, slice) or index.step not in (None, 1):
            raise TypeError(
                "a Jacobian takes slices of examples, with step 1, such as J[2:5], got "
                f"{index!r}; for one row as a tree use J[i : i + 1].to_rows()"
            )
        start, stop, _ = index.indices(len(self))
        return replace(self, _rows=self._rows.taken(start, max(stop - start, 0)))

    @property
    def T(self) -> "TransposedJacobian":
        """The transpose, for ``J.T @ c`` and ``J @ other.T``."""
        return TransposedJacobian(self)

    def __matmul__(self, other: Any) -> PyTree:
        """Directional derivatives ``J @ v``, or inner products of rows ``J @ other.T``.

        Args:
          other: a tree v like the parameters (or a ``Vector`` of one), or a transposed Jacobian.

        Returns:
          For a tree, a real number per row, as ``jax.jvp`` gives it; else ``J.gram(other)``.

        Raises:
          TypeError: a leaf of v does not hold numbers.
          ValueError: v has another structure or other shapes than the parameters, or is complex
            where they are real, or real where they are complex.
        """
        if isinstance(other, TransposedJacobian):
            return self.gram(other.T)
        v = other.tree if isinstance(other, Vector) else other
        v = algebra.floating_like("v", v, self._rows.params, "the parameters", carried=True)
        check_matching(self._rows.params, v, "the parameters", "v", dtypes=False)
        vectors = jax.tree.leaves(v)
        return self._outputs.expand(self._rows.map(Matrix.apply, vectors))

    def __rmatmul__(self, c: Any) -> PyTree:
        raise TypeError(f"{describe(c)} @ J is not defined: J.T @ c is the weighted sum of rows")

    def weighted_sum(self, c: PyTree) -> PyTree:
        """The weighted sum of rows, Jᵀ c = Σᵢ cᵢ Jᵢ, at the cost of one ordinary gradient.

        Rows that are smaller than their factors, as those of kernels of convolutions may be, are
        made with J, and added up. But inside ``jit``, a sum that is the first product of its J, and
        not in a loop, needs no rows, and XLA makes none.

        Args:
          c: a real number per row, traced.

        Returns:
          A tree like the parameters, in their dtypes; the sum is carried in float32 or wider.

        Raises:
          TypeError: ``c`` does not hold real numbers.
          ValueError: ``c`` has not one number per row.

        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> J.weighted_sum(jnp.array([1.0, -1.0]))
        {'w': Array([-2., -2.], dtype=float32)}
        """
        return self._rows.sum(self._outputs.flatten("c", c, self._rows.shape[0], self._rows.params))

    def sum(self) -> PyTree:
        """The sum of all rows: a tree like the parameters, zero where there are no rows."""
        return self._rows.sum(None)

    def mean(self) -> PyTree:
        """The sum of all rows divided by their number; NaN where there are none."""
        return self._rows.sum(None, self._rows.count)

    def norms(self) -> PyTree:
        """The Euclidean norms of the rows: a real number per row, float32 or wider.

        There is no overflow or underflow on the way to a norm that is itself representable, also
        where the factors of a row share its size in different ways: layers of a scan whose inputs
        grow as their cotangents shrink, say.

        Accuracy: norms of single outer products, of biases and of materialised rows are sums of
        squares, right to rounding. Where a row adds up T > 1 outer products of aₜ and bₜ, its
        squared norm comes from inner products of those, and is off by about eps·(Σₜ‖aₜ‖‖bₜ‖)²,
        of no weight unless the parts of a row nearly cancel. Where it has weight (a thousandth of
        the squared norm), that error is added: a norm may then be too large, but not too small.
        """
        return self._outputs.expand(self._rows.norms())

    def squared_norms(self) -> PyTree:
        """The squared norms of the rows; they overflow where the square itself does."""
        return jax.tree.map(jnp.square, self.norms())

    def gram(self, other: "Jacobian | None" = None) -> PyTree:
        """Inner products of rows, J J′ᵀ, where J′ is J by default.

        Returns:
          Shape (N, N′) for scalar functions; (N, *k, N′, *k′) for outputs of shape k, the empirical
          neural tangent kernel; for trees of outputs, a tree like J's output that holds trees like
          the other's. Carried in float32, or in the wider dtype of the two Jacobians' leaves;
          rows of complex leaves are conjugated on the left. Squares of factors are not scaled, as
          those of norms are: what is beyond 1e±19 in float32 may make them NaN or zero.

        Raises:
          TypeError: ``other`` is not a Jacobian.
          ValueError: its parameters have another structure or other shapes, or are complex where
            J's are real, or real where they are complex.
        """
        other = self if other is None else other
        if not isinstance(other, Jacobian):
            raise TypeError(f"argument other must be a Jacobian, got {describe(other)}")
        check_matching(
            self._rows.params, other._rows.params, "the parameters", "other", dtypes=False
        )
        products = gram(self._rows) if other is self else gram(self._rows, other._rows)
        rows = self._outputs.expand(products)
        depth = len(other._rows.shape)
        return jax.tree.map(lambda x: other._outputs.expand(x, axis=x.ndim - depth), rows)

    def square_sum(self, c: PyTree = None) -> PyTree:
        """The weighted sum of the squares of rows, entry by entry: Σᵢ cᵢ Jᵢ∘Jᵢ.

        For a loss per example, and ``c=None`` (all ones), N times the diagonal of the empirical
        Fisher matrix. Complex entries count their squared absolute value.

        Args:
          c: a real number per row, or None.

        Returns:
          A tree like the parameters, real, in their precision; of factors beyond 1e±19 in float32,
          as for ``gram``.
        """
        size = self._rows.shape[0]
        c = None if c is None else self._outputs.flatten("c", c, size, self._rows.params)
        sums = self._rows.fold(Matrix.square_sum, c, _real)
        narrow = [x.astype(_real(p.dtype)) for x, p in zip(sums, self._rows.primals, strict=True)]
        return self._rows.like_params(narrow)

    def scale(self, s: PyTree) -> "Jacobian":
        """diag(s) J: every row times a real number of its own."""
        factors = self._outputs.flatten("s", s, self._rows.shape[0], self._rows.params)
        return replace(self, _rows=self._rows.scaled(factors))

    def clip(self, max_norm: PyTree, *, nan_safe: bool = False) -> "Jacobian":
        """Every row scaled down to a norm of at most ``max_norm``: Jᵢ · min(1, max_norm/‖Jᵢ‖).

        Guarantee: no clipped row's norm exceeds its bound by more than rounding. A row whose parts
        nearly cancel may come out too short, for its norm may be overestimated (see ``norms``).

        Args:
          max_norm: a non-negative bound for the whole row, or a prefix tree of the parameters that
            holds a bound for each of its parts (a layer, say), which are then clipped one by one.
          nan_safe: whether a row that holds a NaN or an infinity counts as zero. Otherwise it
            poisons every sum, as it would without clipping. (XLA itself spreads a NaN over all
            examples where it convolves each with a kernel of its own, derived from a parameter, in
            groups, as in ``jax.vmap(jax.grad(f))``: all rows count as zero then.)

        Raises:
          TypeError: a bound is not a real number.
          ValueError: a bound is negative or NaN (one that is traced makes the rows NaN instead),
            or not one number; ``max_norm`` is no prefix of the parameters.

        With ``chunk_size=k``, a clip waits for the product that follows, and ``clip(...).sum()`` is
        one pass over the chunks, unless norms were asked for before. It leaves the norms of J, so
        that ``J.norms()`` takes no other.

        Source: Abadi et al., "Deep Learning with Differential Privacy", 2016, Algorithm 1.
        """
        clip = _clip.read(max_norm, self._rows.params, nan_safe)
        return replace(self, _rows=self._rows.clipped(clip))

    def sketch(self, key: jax.Array, dim: int) -> PyTree:
        """A random projection of every row to ``dim`` real numbers, J R, that keeps inner products.

        R has independent entries ±1/√dim, which are made from ``key`` and never stored: the same
        key gives the same R for another batch, so that sketches of different batches compare. The
        expected inner product of two sketches is that of the rows, with a standard deviation of
        at most √(2/dim) times the product of their norms. Of complex inner products it is the real
        part that is kept.

        Returns:
          A number per row as described for the class, with a last axis of length ``dim``.

        Raises:
          TypeError: ``key`` is not one PRNG key, or ``dim`` not an int.
          ValueError: ``dim`` is not positive.

        Source: Achlioptas, "Database-friendly random projections", 2003.
        """
        check_key(key)
        dim = positive_int("dim", dim)
        projected = self._rows.map(_sketch.Projection(dim), key)
        return self._outputs.expand(projected)

    def to_rows(self) -> PyTree:
        """The rows, stacked, as ``per_example_grad`` gives them: N times the parameters' memory.

        For outputs that are not scalar the result is as from ``jax.jacrev``: a tree like the
        output that holds trees like the parameters, with leaves of shape (N, *k, *leaf).
        """
        stacked = self._rows.stacked()
        if self._outputs.is_scalar:
            return self._rows.like_params(list(stacked))
        parts = [self._outputs.expand(x) for x in stacked]
        outer = self._outputs.treedef
        columns = zip(*(outer.flatten_up_to(part) for part in parts), strict=True)
        return jax.tree.unflatten(outer, [self._rows.like_params(list(x)) for x in columns])

    def explain(self) -> str:
        """A table of the leaves: how their rows are kept, what that costs, and why.

        Print it. A row per leaf with its key path, its terms, the route of its norm, FLOPs per
        example of norm and weighted sum, bytes kept per example, and, for a leaf that is
        materialised, the primitive at which the search for factors ended.
        """
        self._rows.require_one()
        return _explain.explain(self)

    def check(self, rows: int = 4) -> None:
        """Compare the first rows, and the products of them, with plain ``jax.grad``.

        Runs outside ``jit`` only, since it looks at values.

        Args:
          rows: how many examples to recompute, if there are so many.

        Raises:
          TypeError: ``rows`` is not an integer, or J is traced.
          ValueError: a product is wrong by more than rounding, which is taken for 8·√eps of what
            it adds up, at most a quarter, and 64·eps of the largest leaf's, at most a sixteenth;
            eps is that of the narrowest floats that the function makes anywhere, so that 0.003 is
            allowed in float32, a quarter in bfloat16 (the message names the leaf). Or ``rows`` is
            not positive.
        """
        _check.check(self, positive_int("rows", rows))


def _real(dtype: Any) -> Any:
    return jnp.finfo(dtype).dtype


@partial(jax.tree_util.register_dataclass, data_fields=["T"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class TransposedJacobian(NotAnArray):
    """Jᵀ, as it stands in ``J.T @ c`` and ``J @ other.T``."""

    T: Jacobian

    _symbol = "J.T"

    def __matmul__(self, c: PyTree) -> PyTree:
        """Jᵀ c, the weighted sum of rows."""
        if isinstance(c, Jacobian):
            raise TypeError(
                "J.T @ J is a P x P matrix, which is not built; use J.square_sum() for its "
                "diagonal, or J.T @ (J @ v) for its product with a tree v"
            )
        return self.T.weighted_sum(c)

    def __rmatmul__(self, v: Any) -> PyTree:
        raise TypeError(f"{describe(v)} @ J.T is not defined: J @ v takes a tree v")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Jacobian, name):
            raise AttributeError(f"J.T has no attribute {name!r}")
        raise AttributeError(f"J.T has no attribute {name!r}: products are those of J, as J.{name}")
