"""J, whose row i is the gradient of a function at example i, as an operator."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._batches.chosen import Span, outputs_of
from .._engine.matrix import Matrix
from .._trees import algebra
from .._trees.algebra import carried_reals
from .._trees.checks import (
    NotATree,
    PyTree,
    check_bool,
    check_key,
    check_matching,
    describe,
    positive_int,
    structure_difference,
)
from .._trees.vector import Vector
from . import check as _check
from . import clip as _clip
from . import explain as _explain
from . import groups as _groups
from . import metric as _metric
from . import rows as _rows
from . import sketch as _sketch
from .added import add
from .gram import gram
from .groups import Groups
from .index import read as read_index
from .kept import Kept
from .outputs import Outputs
from .refused import NotAnArray, written


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["_rows"],
    meta_fields=["_outputs"],
)
@dataclass(frozen=True, repr=False, eq=False)
class Jacobian(NotAnArray):
    """J: a row for each example, or for each output of each example.

    J is not a tree of rows. It is a pytree whose leaves are factors of rows, so
    ``jax.tree.map`` over J gives nonsense of the right shape. ``J.scale(s)`` multiplies
    rows by numbers, and ``J.to_rows()`` returns the rows themselves.

    ``jacobian`` and ``value_and_jacobian`` make it. N is the number of examples, P the
    number of parameters. If the function returns a scalar, "a number per row" is an
    array of shape (N,). Otherwise it is a tree like the function's output, with leaves
    of shape ``(N, *k)``. For losses of a whole batch (``batched=False``) there is no N,
    and it is a tree like the function's output.

    J keeps its rows as factors, and computes every product from these. Or, with
    ``recompute=True`` or ``chunk_size=k``, it keeps nothing, and recomputes rows for
    each product. A Jacobian may leave ``jit``, and enter ``vmap``, ``scan`` and
    ``grad``. If it recomputes rows, it carries its function, which must not close over
    tracers if J leaves ``jit``.

    ===========================  =======================================================
    case                         result
    ===========================  =======================================================
    N = 0                        sums are zero, ``mean()`` is NaN, a number per row has
                                 shape (0,)
    a row of zeros               norm 0, with derivative 0; ``clip`` leaves it
    a row with a NaN or inf      its norm is NaN or infinite; so is every sum, unless
                                 ``clip(..., nan_safe=True)`` has made the row zero
    a norm that overflows        is infinite or NaN; ``clip`` treats the row as infinite
    a norm > 9e37 × its bound    ``clip`` makes the row zero, in float32, since the
                                 scale would not be a normal number
    complex parameters           rows follow ``jax.grad`` (step along the conjugate);
                                 ``gram`` conjugates the left row, ``J @ v`` is real
    ===========================  =======================================================

    >>> import jax.numpy as jnp
    >>> from pytree_grads import jacobian
    >>> f = lambda p, x: jnp.dot(p["w"], x)
    >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
    >>> J
    Jacobian(shape=(2, 2), leaves=1, rows kept)
    >>> print(J.norms(), J.clip(5.0).sum()["w"])
    [ 5. 10.] [6. 8.]
    """

    _rows: _rows.Rows
    _outputs: Outputs

    @property
    def _has_one_output(self) -> bool:
        return self._outputs.is_array

    def _per_row(self, name: str, tree: PyTree) -> jax.Array:
        """A user's tree of one number per row as an array."""
        origin = self._rows.origin
        return self._outputs.flatten(name, tree, origin.shape[0], origin.params)

    def __len__(self) -> int:
        if not self._outputs.batched:
            raise TypeError(
                "a Jacobian of losses of a whole batch (batched=False) has no examples "
                f"to count: J.shape is {self.shape}"
            )
        size = self._rows.origin.shape[0]
        if not isinstance(size, int):
            raise TypeError(
                f"the number of examples is symbolic, {size}, and len(J) would be an "
                "int: use "
                "J.shape[0], or J.mean() for the sum divided by it"
            )
        return size

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, P)``, or ``(N, *k, P)`` for outputs of shape k.

        A tree of K numbers counts as an array of shape (K,). There is no N for losses
        of a whole batch (``batched=False``).
        """
        outputs = self._outputs
        middle = outputs.shapes[0] if outputs.is_array else (outputs.count,)
        return (
            *outputs.lead(self._rows.origin.shape[0]),
            *middle,
            sum(map(prod, self._rows.origin.param_shapes)),
        )

    def __repr__(self) -> str:
        kept = "kept" if isinstance(self._rows, Kept) else "recomputed"
        origin = self._rows.origin
        leaves = len(origin.param_shapes)
        text = f"Jacobian(shape={self.shape}, leaves={leaves}, rows {kept})"
        return f"a stack of {text}" if origin.is_stack else text

    def __getitem__(self, index: Any) -> "Jacobian":
        """The rows of some of the examples, as a ``Jacobian``.

        ``J[i]`` has one example, and the shape (1, P). Like J, it keeps its rows or
        recomputes them. Weights and clips of rows stay with them. For an array of
        losses of a whole batch (``batched=False``), an index chooses losses along the
        first axis.

        Args:
          index: an int; a slice with static bounds; an array (k,) or a list of ints,
            in any order, with repeats if wanted; or, if its values are known, a mask
            (N,) of bools. Negative indices count from the end. A traced index that is
            out of range is clamped to the first or last example, as in ``jnp.take``
            with ``mode="clip"``.

        Raises:
          IndexError: an index that is not traced is out of range.
          TypeError: the index is of another kind, or its number of rows is not known;
            or J has one loss of a whole batch, or a tree of them.
          ValueError: an array has more than one axis, or a mask does not have one entry
            for each example.

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> print(J[1].norms(), J[jnp.array([1, 0, 1])].norms(), J[::-1].norms())
        [10.] [10.  5. 10.] [10.  5.]
        """
        if self._outputs.batched:
            chosen = read_index(index, self._rows.origin.shape[0], "examples")
            return replace(self, _rows=self._rows.chosen(chosen))
        losses = self._outputs.shapes[0] if self._outputs.is_array else ()
        if not losses:
            raise TypeError(
                "an index chooses from an array of losses of a whole batch "
                "(batched=False), and fun returns one loss or a tree: stack losses, or "
                "J.scale with zeros drops some"
            )
        chosen = read_index(index, losses[0], "losses")
        rows = self._rows.chosen(outputs_of(chosen, losses))
        outputs = self._outputs.chosen(chosen.size)
        return replace(self, _rows=rows, _outputs=outputs)

    def __mul__(self, number: Any) -> "Jacobian":
        """All rows times one real number, traced, as in ``2 * J`` and ``J * 2.0``."""
        return self._times(number, f"{{}} * {written(number)}", "{}")

    def __rmul__(self, number: Any) -> "Jacobian":
        return self._times(number, f"{written(number)} * {{}}", "{}")

    def __truediv__(self, number: Any) -> "Jacobian":
        """All rows divided by one real number."""
        return self._times(number, f"{{}} / {written(number)}", "1 / {}")

    def __neg__(self) -> "Jacobian":
        return self._times(-1, "-{}", "{}")

    def _times(self, number: Any, expression: str, form: str) -> "Jacobian":
        """All rows times a number, or divided by it if the form is a fraction."""
        if isinstance(number, NotATree) or np.ndim(number):
            self._refuse_scaling(expression, number, form)
        meets = carried_reals(self._rows.origin.params)
        factor = jnp.asarray(algebra.floating("the factor", number, meets, real=True))
        factor = 1 / factor if form != "{}" else factor
        factors = jnp.broadcast_to(factor, self._rows.origin.shape)
        return self._scaled([factors] * len(self._rows.origin.param_shapes))

    def _scaled(self, factors: Sequence[jax.Array]) -> "Jacobian":
        """The rows times numbers, an array of them for each leaf."""
        return replace(self, _rows=self._rows.scaled(factors))

    def __add__(self, other: Any) -> "Jacobian":
        """J + J′: row i is the sum of the rows of example i.

        It is the Jacobian of the sum of both functions. Both Jacobians must have the
        same shape, and parameters of the same structure, shapes and dtypes (their
        values may differ). Either both keep their rows, or both recompute them in
        chunks of the same size.

        Raises:
          TypeError: ``other`` is not a Jacobian.
          ValueError: ``other`` has another shape, other parameters, or another mode.
        """
        if not isinstance(other, Jacobian):
            return super().__add__(other)
        params, theirs = self._rows.origin.params, other._rows.origin.params
        check_matching(params, theirs, "the parameters", "other")
        if self.shape != other.shape or self._outputs != other._outputs:
            raise ValueError(
                "J + other takes Jacobians with the same examples and outputs, got "
                f"{self} and {other}"
            )
        mine, yours = self._rows.mode, other._rows.mode
        if mine != yours:
            raise ValueError(
                "J + other takes Jacobians that were made with the same options, got "
                f"{mine} and {yours}"
            )
        return replace(self, _rows=add(self._rows, other._rows))

    def __sub__(self, other: Any) -> "Jacobian":
        """J - J′: J plus -1 times the other, as in ``+``."""
        if not isinstance(other, Jacobian):
            return super().__sub__(other)
        return self + -other

    @property
    def T(self) -> "TransposedJacobian":
        """The transpose, for ``J.T @ c`` and ``J @ other.T``."""
        return TransposedJacobian(self)

    def __matmul__(self, other: Any) -> PyTree:
        """Directional derivatives ``J @ v``, or inner products of rows ``J @ other.T``.

        Args:
          other: a tree v like the parameters (or a ``Vector`` of one), or a transposed
            Jacobian.

        Returns:
          For a tree, a real number per row, as ``jax.jvp`` gives it; else
          ``J.gram(other)``.

        Raises:
          TypeError: a leaf of v does not hold numbers.
          ValueError: v has another structure or other shapes than the parameters, or is
            complex where they are real, or real where they are complex.
        """
        if isinstance(other, TransposedJacobian):
            return self.gram(other.T)
        if isinstance(other, Jacobian):
            raise TypeError(
                "J @ J is not defined: J @ other.T, or J.gram(other), are the inner "
                "products of rows"
            )
        self._check_direction(other)
        v = other.tree if isinstance(other, Vector) else other
        v = algebra.floating_like(
            "v", v, self._rows.origin.params, "the parameters", carried=True
        )
        check_matching(self._rows.origin.params, v, "the parameters", "v", dtypes=False)
        vectors = jax.tree.leaves(v)
        return self._outputs.expand(self._rows.map(Matrix.apply, vectors))

    def _check_direction(self, v: PyTree) -> None:
        """Raise if v holds a number per row, and nothing like the parameters."""
        if self._is_per_row(v) and not self._is_direction(v):
            raise ValueError(
                "J @ v takes a tree v like the parameters, and v holds a number per "
                "row: J.T @ v is the weighted sum of rows"
            )

    def _check_weights(self, c: PyTree) -> None:
        """Raise if c is a tree like the parameters, and holds no number per row."""
        if self._is_direction(c) and not self._is_per_row(c):
            raise ValueError(
                "J.T @ c takes a number per row, and c is a tree like the parameters: "
                "J @ c are its directional derivatives"
            )

    def _is_per_row(self, tree: PyTree) -> bool:
        """Whether a tree has the structure and shapes of a number per row."""
        size = self._rows.origin.shape[0]
        lead = self._outputs.lead(size)
        shapes = [(*lead, *shape) for shape in self._outputs.shapes]
        return _has_shapes(tree, self._outputs.treedef, shapes)

    def _is_direction(self, tree: PyTree) -> bool:
        """Whether a tree has the structure and shapes of the parameters."""
        origin = self._rows.origin
        tree = tree.tree if isinstance(tree, Vector) else tree
        structure = jax.tree.structure(origin.params)
        return _has_shapes(tree, structure, origin.param_shapes)

    def __rmatmul__(self, c: Any) -> PyTree:
        raise TypeError(
            f"{describe(c)} @ J is not defined: J.T @ c is the weighted sum of rows"
        )

    def weighted_sum(self, c: PyTree) -> PyTree:
        """The weighted sum of rows, Jᵀ c = Σᵢ cᵢ Jᵢ. It costs one ordinary gradient.

        What the sum is computed from depends on how J was made, and on where the sum is
        taken.

        ====================================  ==========================================
        case                                  the sum is computed from
        ====================================  ==========================================
        unscaled rows, in the trace of J      the factors, no rows; one backward pass if
                                              a leaf has no factors, or a scan is
                                              rematerialised
        scaled or clipped rows                the factors or rows that norms use
        J outside ``jit``, or inside a loop   the factors or rows that norms use
        J that keeps nothing                  the factors, or with ``recompute`` one
                                              backward pass
        ====================================  ==========================================

        Args:
          c: a real number per row, traced.

        Returns:
          A tree like the parameters, in their dtypes; the sum is carried in float32 or
          wider.

        Raises:
          TypeError: ``c`` does not hold real numbers.
          ValueError: ``c`` does not have one number per row.

        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> J.weighted_sum(jnp.array([1.0, -1.0]))
        {'w': Array([-2., -2.], dtype=float32)}
        """
        return self._rows.origin.rounded(self._rows.sum(self._per_row("c", c)))

    def sum(self) -> PyTree:
        """The sum of all rows, Jᵀ 1.

        Returns:
          A tree like the parameters, in their dtypes; zero if there are no rows. The
          sum is carried in float32 or wider.

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> J.sum()
        {'w': Array([ 9., 12.], dtype=float32)}
        """
        return self._rows.origin.rounded(self._rows.sum(None))

    def mean(self) -> PyTree:
        """The sum of all rows divided by their number.

        Returns:
          A tree like the parameters, in their dtypes; NaN if there are no rows. It is
          divided before it is rounded.

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> J.mean()
        {'w': Array([4.5, 6. ], dtype=float32)}
        """
        rows = self._rows
        return rows.origin.rounded(rows.sum(None), rows.origin.count)

    def norms(self, *, groups: PyTree = None) -> PyTree:
        """The Euclidean norms of the rows, ‖Jᵢ‖, or of their parts.

        Squaring neither overflows nor underflows when the norm itself is representable,
        even if the factors of a row share its size unevenly, as when the inputs of the
        layers of a scan grow while their cotangents shrink.

        Accuracy: norms of single outer products, of biases and of materialised rows are
        sums of squares, correct to rounding. If a row adds up T > 1 outer products of
        aₜ and bₜ, its squared norm comes from inner products of those, and is off by
        about eps·(Σₜ‖aₜ‖‖bₜ‖)². That is significant only if the parts of a row nearly
        cancel. If it exceeds a thousandth of the squared norm, the error is added: such
        a norm may be too large, never too small.

        Args:
          groups: a prefix tree of the parameters, for the norms of the parts of rows
            that belong to each of its leaves, a layer say, or ``"leaves"`` for those of
            each leaf. The leaves of the prefix tree are ignored.

        Returns:
          A real number per row, in float32 or wider. With ``groups``, a tree like the
          prefix that holds such numbers for each group; the root of the sum of their
          squares is the norm of the row.

        Raises:
          ValueError: ``groups`` is not a prefix tree of the parameters.

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> print(J.norms(), J.norms(groups="leaves"))
        [ 5. 10.] {'w': Array([ 5., 10.], dtype=float32)}
        """
        if groups is None:
            (whole,) = self._rows.norms((self._all_leaves,))
            return self._outputs.expand(whole)
        own = _groups.named(groups, self._rows.origin.params)
        return own.tree(list(map(self._outputs.expand, self._rows.norms(own.members))))

    @property
    def _all_leaves(self) -> tuple[int, ...]:
        return tuple(range(len(self._rows.origin.param_shapes)))

    def squared_norms(self, *, groups: PyTree = None) -> PyTree:
        """The squared norms of the rows, ‖Jᵢ‖², or of their parts.

        Args:
          groups: as in ``norms``.

        Returns:
          A real number per row, in float32 or wider; infinite if the square overflows.
          With ``groups``, a tree like the prefix that holds such numbers.

        Raises:
          ValueError: as ``norms``.

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> print(J.squared_norms())
        [ 25. 100.]
        """
        return jax.tree.map(jnp.square, self.norms(groups=groups))

    def gram(
        self,
        other: "Jacobian | None" = None,
        *,
        trace: bool = False,
        groups: PyTree = None,
    ) -> PyTree:
        """Inner products of rows, J J′ᵀ; J′ is J itself by default.

        If ``f`` is the network's output instead of a loss, the result is the empirical
        neural tangent kernel. Rows of complex leaves are conjugated on the left. Unlike
        in norms, the factors are not scaled: products beyond 1e±19 in float32 may be
        NaN or zero.

        Args:
          other: a Jacobian of N′ rows by parameters of the same structure and shapes,
            or None for J itself. Its dtypes may differ.
          trace: whether to sum over the outputs of an example, Σₖ ⟨Jᵢₖ, J′ⱼₖ⟩. The
            products of different outputs are not computed. Static.
          groups: a prefix tree of the parameters, for the inner products over the parts
            of rows that belong to each of its leaves, or ``"leaves"``, as in ``norms``.

        Returns:
          Shape (N, N′) for scalar functions; ``(N, *k, N′, *k′)`` for outputs of shapes
          k and k′; for trees of outputs, a tree like the output of J that holds trees
          like that of the other. With ``trace``, shape (N, N′) for all of them. In
          float32, or in the wider dtype of the two if that is wider. With ``groups``, a
          tree like the prefix that holds such products for each group; they add up to
          the whole.

        Raises:
          TypeError: ``other`` is not a Jacobian, or ``trace`` not a bool.
          ValueError: its parameters have another structure or other shapes, or one of a
            pair of leaves is complex and the other real; or with ``trace``, its outputs
            are others; or ``groups`` is not a prefix tree of the parameters.

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> print(J.gram())
        [[ 25.  50.]
         [ 50. 100.]]
        """
        other = self if other is None else other
        if not isinstance(other, Jacobian):
            raise TypeError(f"argument other must be a Jacobian, got {describe(other)}")
        params, theirs = self._rows.origin.params, other._rows.origin.params
        check_matching(params, theirs, "the parameters", "other", dtypes=False)
        self._check_trace(trace, other)
        own = None if groups is None else _groups.named(groups, params)
        members = (self._all_leaves,) if own is None else own.members
        theirs = None if other is self else other._rows
        products = gram(self._rows, theirs, members=members, trace=bool(trace))
        if not trace:
            products = [self._expand_pairs(x, other) for x in products]
        elif not self._outputs.batched:  # (1, 1): one batch with one batch
            products = [x.reshape(()) for x in products]
        return products[0] if own is None else own.tree(products)

    def _check_trace(self, trace: bool, other: "Jacobian") -> None:
        """Raise if ``trace`` is not a bool, or outputs have no counterparts."""
        check_bool("trace", trace)
        if trace and self._outputs != other._outputs:
            raise ValueError(
                "J.gram(other, trace=True) takes Jacobians with the same outputs, got "
                f"{self} and {other}"
            )

    def _expand_pairs(self, products: jax.Array, other: "Jacobian") -> PyTree:
        """A tree like the outputs that holds trees like those of the other."""
        depth = len(other._rows.origin.shape)
        return jax.tree.map(
            lambda x: other._outputs.expand(x, axis=x.ndim - depth),
            self._outputs.expand(products),
        )

    def square_sum(self, c: PyTree = None) -> PyTree:
        """The weighted sum of the squares of rows, entry by entry: Σᵢ cᵢ Jᵢ∘Jᵢ.

        For a loss per example and c of ones, it is N times the diagonal of the
        empirical Fisher matrix. A complex entry counts with its squared absolute value.
        As in ``gram``, factors are not scaled.

        Args:
          c: a real number per row, traced; None for ones.

        Returns:
          A tree like the parameters, of real leaves in the precision of theirs.

        Raises:
          TypeError: ``c`` does not hold real numbers.
          ValueError: ``c`` does not have one number per row.

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> J.square_sum()
        {'w': Array([45., 80.], dtype=float32)}
        """
        weights = None if c is None else self._per_row("c", c)
        sums = self._rows.fold(Matrix.square_sum, weights, _real)
        pairs = zip(sums, self._rows.origin.primals, strict=True)
        narrow = [x.astype(_real(p.dtype)) for x, p in pairs]
        return self._rows.origin.like_params(narrow)

    def scale(self, s: PyTree, *, groups: PyTree = None) -> "Jacobian":
        """Every row times its own real number, diag(s) J.

        Args:
          s: a real number per row, traced. With ``groups``, a tree like the prefix that
            holds such numbers for each group, by which its part of the rows is scaled.
          groups: a prefix tree of the parameters, or ``"leaves"``, as in ``norms``.

        Returns:
          A ``Jacobian`` of the same shape.

        Raises:
          TypeError: ``s`` does not hold real numbers.
          ValueError: ``s`` does not have one number per row, or for each group; or
            ``groups`` is not a prefix tree of the parameters.

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> print(J.scale(jnp.array([2.0, 0.5])).norms())
        [10.  5.]
        """
        if groups is None:
            return self._scaled([self._per_row("s", s)] * len(self._all_leaves))
        own = _groups.named(groups, self._rows.origin.params)
        return self._scaled(own.of_leaves(self._per_group("s", s, own)))

    def _per_group(self, name: str, tree: PyTree, groups: Groups) -> list[jax.Array]:
        """A user's tree of one number per row for each group as arrays."""
        count = groups.treedef.num_leaves
        shown = groups.tree(range(count))
        try:
            parts = groups.treedef.flatten_up_to(tree)
        except ValueError:
            per_row = jax.tree.unflatten(self._outputs.treedef, self._outputs.shapes)
            path, clause = structure_difference(groups.tree([per_row] * count), tree)
            raise ValueError(
                f"argument {name} must have a number per row for each group, as "
                f"J.norms(groups=groups) has, but {name}{jax.tree_util.keystr(path)} "
                f"does not match: {clause}"
            ) from None
        paths = [path for path, _ in jax.tree.leaves_with_path(shown)]
        return [
            self._per_row(f"{name}{jax.tree_util.keystr(path)}", part)
            for path, part in zip(paths, parts, strict=True)
        ]

    def scale_params(self, diagonal: PyTree) -> "Jacobian":
        """Every row times one real number per parameter, J diag(d).

        Norms, clips and inner products are then those of another metric: d may hold the
        roots of Adam's second moments, say, or their inverses. A number for a whole
        leaf, or one for each line or column of a matrix, becomes part of the factors.
        With any other diagonal, norms of single outer products still need no rows;
        norms of sums of several outer products, and of kernels of convolutions, build
        rows, some at a time. A sum is multiplied once.

        Args:
          diagonal: a tree like the parameters, of real numbers of any sign, traced. A
            leaf has the shape of the parameter, or its rank with some axes of length 1,
            or is one number.

        Returns:
          A ``Jacobian`` of the same shape.

        Raises:
          TypeError: a leaf does not hold real numbers.
          ValueError: it is not a tree like the parameters.

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> print(J.scale_params({"w": jnp.array([1.0, 0.5])}).to_rows()["w"])
        [[3. 2.]
         [6. 4.]]
        """
        entries = _metric.read(diagonal, self._rows.origin.params)
        return replace(self, _rows=self._rows.in_metric(entries))

    @overload
    def clip(
        self,
        max_norm: PyTree,
        *,
        nan_safe: bool = ...,
        with_norms: Literal[False] = ...,
    ) -> "Jacobian": ...

    @overload
    def clip(
        self, max_norm: PyTree, *, nan_safe: bool = ..., with_norms: Literal[True]
    ) -> tuple["Jacobian", PyTree]: ...

    def clip(
        self, max_norm: PyTree, *, nan_safe: bool = False, with_norms: bool = False
    ) -> "Jacobian | tuple[Jacobian, PyTree]":
        """Rows scaled down to a norm of ``max_norm``: Jᵢ · min(1, max_norm/‖Jᵢ‖).

        Guarantee: no clipped row's norm exceeds its bound by more than rounding. A row
        whose parts nearly cancel may come out too short, because its norm may be
        overestimated (see ``norms``).

        With ``chunk_size=k``, a clip waits for the product that follows, and
        ``clip(...).sum()`` is one pass over the chunks. ``with_norms=True`` takes one
        more pass; ``clipped_sum`` computes both in one pass.

        Args:
          max_norm: a non-negative scalar for the whole row; or a prefix tree of the
            parameters with a scalar for each part (a layer, say), which are then
            clipped separately.
          nan_safe: whether a row that holds a NaN or an infinity counts as zero.
            Otherwise it spoils every sum, as it would without clipping. (If each
            example has its own kernel, derived from a parameter, XLA runs one grouped
            convolution, which spreads a NaN to every example, as in
            ``jax.vmap(jax.grad(f))``. All rows count as zero then.)
          with_norms: whether to return the norms before the clip as well.

        Returns:
          A ``Jacobian`` of the same shape. With ``with_norms``, the pair of it and the
          norms that the bounds were compared with: a number per row in place of each
          bound of ``max_norm``.

        Raises:
          TypeError: a bound is not a real number.
          ValueError: a bound is negative or NaN (if it is traced, the rows become NaN
            instead), or not a scalar; or ``max_norm`` is not a prefix tree of
            the parameters.

        Source: Abadi et al., "Deep Learning with Differential Privacy", 2016, Algorithm
          1.

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> print(J.clip(5.0).norms())
        [5. 5.]
        """
        clip = _clip.read(max_norm, self._rows.origin.params, nan_safe)
        if not with_norms:
            return replace(self, _rows=self._rows.clipped(clip))
        rows, norms = self._rows.clipped_with_norms(clip)
        return replace(self, _rows=rows), self._for_bounds(max_norm, norms)

    def clipped_sum(
        self, max_norm: PyTree, c: PyTree = None, *, nan_safe: bool = False
    ) -> tuple[PyTree, PyTree]:
        """The sum of the clipped rows, and the norms before the clip, from one pass.

        It equals ``clipped, norms = J.clip(max_norm, with_norms=True)`` and then
        ``clipped.weighted_sum(c)``. With ``chunk_size=k``, both come from one pass over
        the chunks.

        Args:
          max_norm: a bound, or a prefix tree of bounds, as in ``clip``.
          c: a real number per row, by which the clipped rows are multiplied, or None.
          nan_safe: whether a row that holds a NaN or an infinity counts as zero.

        Returns:
          ``(sum, norms)``: a tree like the parameters, and a number per row in the
          place of each bound of ``max_norm``.

        Raises:
          TypeError: as ``clip``.
          ValueError: as ``clip``.

        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p, x)
        >>> x = jnp.array([[3.0, 4.0], [0.0, 1.0]])
        >>> total, norms = jacobian(f, chunk_size=1)(jnp.zeros(2), x).clipped_sum(1.0)
        >>> print(total, norms)
        [0.6 1.8] [5. 1.]
        """
        clip = _clip.read(max_norm, self._rows.origin.params, nan_safe)
        weights = None if c is None else self._per_row("c", c)
        sums, norms = self._rows.clipped_sum(clip, weights)
        return self._rows.origin.rounded(sums), self._for_bounds(max_norm, norms)

    def _for_bounds(self, max_norm: PyTree, numbers: Sequence[jax.Array]) -> PyTree:
        """A tree like ``max_norm`` of a number per row for each bound."""
        treedef = jax.tree.structure(max_norm)
        return jax.tree.unflatten(treedef, [self._outputs.expand(x) for x in numbers])

    def sketch(self, key: jax.Array, dim: int, *, kind: str = "dense") -> PyTree:
        """A random projection of every row to ``dim`` real numbers, J R.

        R is made from ``key`` and never stored. The same key gives the same R for every
        batch, so sketches of different batches can be compared, if they have the same
        key, ``dim`` and ``kind``. The expected inner product of two sketches is that of
        the rows; for complex rows, it is the real part of the inner product.

        ================  ============================  ================================
        kind              R                             variance of an inner product of
                                                        x and y, over ‖x‖²‖y‖²
        ================  ============================  ================================
        ``"dense"``       independent entries ±1/√dim   at most 2/dim
        ``"kronecker"``   signs for each side of a      in one leaf, at most
                          matrix, l and r numbers with  (1 + 2/l)(1 + 2/r) − 1, with 0
                          l·r ≤ dim                     for 2/l if a side is kept whole
        ``"tensor"``      count sketches of both sides  at most 8/(dim − 1)
                          of a matrix, convolved
        ================  ============================  ================================

        A dense R costs T·m·n·dim operations for an m × n matrix whose row is a sum of T
        outer products. A Kronecker R costs T·(m + n)·√dim, a tensor sketch T·(m + n +
        dim·log dim). Rows that are not sums of outer products are projected as
        matrices. The axes of a leaf are split in two where the sum of both sizes is
        least. For ``"kronecker"``, a side of at most √dim entries is kept whole, and
        the other gets dim // side numbers; otherwise the shorter side gets l = ⌊√dim⌋
        numbers and the other ⌊dim/l⌋. A vector has one side: both kinds sketch its row
        in full, by a count sketch of variance at most 2/dim. The sketches of all leaves
        add up in the same ``dim`` numbers, each with its own signs and places. This
        adds at most 2/dim to the variance. ``J.explain(sketch_dim=dim)`` says what each
        leaf takes.

        Args:
          key: one PRNG key.
          dim: the number of entries of a sketch, a positive int; static.
          kind: ``"dense"``, ``"kronecker"`` or ``"tensor"``; static.

        Returns:
          A number per row with a last axis of length ``dim``: (N, dim) for scalar
          functions.

        Raises:
          TypeError: ``key`` is not one PRNG key, or ``dim`` not an int.
          ValueError: ``dim`` is not positive, or ``kind`` is another one.

        Source: Achlioptas, "Database-friendly random projections", 2003; Pham and Pagh,
          "Fast and scalable polynomial kernels via explicit feature maps", 2013; for
          gradients, LoGra (arXiv:2405.13954) and FactGraSS (arXiv:2505.18976).

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> import jax
        >>> J.sketch(jax.random.key(0), 16).shape
        (2, 16)
        """
        check_key(key)
        dim = positive_int("dim", dim)
        projected = self._rows.map(_sketch.projection(dim, kind), key)
        return self._outputs.expand(projected)

    def to_rows(self) -> PyTree:
        """The rows, stacked, as ``per_example_grad`` gives them.

        Returns:
          A tree like the parameters, with leaves of shape ``(N, *leaf)``. If outputs
          are not scalar, a tree like the output that holds such trees, with leaves of
          shape ``(N, *k, *leaf)``, as from ``jax.jacrev``. It takes N times the memory
          of the parameters.

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> J.to_rows()
        {'w': Array([[3., 4.],
                     [6., 8.]], dtype=float32)}
        """
        stacked = _rows.stacked(self._rows)
        parts = [self._outputs.expand(x) for x in stacked]
        if self._outputs.is_scalar:
            return self._rows.origin.like_params(parts)
        outer = self._outputs.treedef
        columns = zip(*(outer.flatten_up_to(part) for part in parts), strict=True)
        return jax.tree.unflatten(
            outer, [self._rows.origin.like_params(list(x)) for x in columns]
        )

    def explain(self, *, sketch_dim: int | None = None) -> str:
        """A table of the leaves: how their rows are kept, what that costs, and why.

        Print it. Each leaf has a line with its key path, its terms, the way its norm is
        computed, FLOPs of norm and weighted sum, the bytes of what is kept, each per
        example, and, for a leaf that is materialised, the primitive at which the search
        for factors ended.

        Args:
          sketch_dim: a positive int adds a second table. It shows what each kind of
            sketch to so many numbers does with each leaf.

        Returns:
          The table, as a string of several lines.

        Raises:
          TypeError: J is a stack of Jacobians, as ``jax.vmap`` returns it, or
            ``sketch_dim`` is not an int.
          ValueError: ``sketch_dim`` is not positive.

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> "['w']" in J.explain()
        True
        """
        self._rows.origin.require_one()
        table = _explain.explain(self._rows, repr(self))
        if sketch_dim is None:
            return table
        dim = positive_int("sketch_dim", sketch_dim)
        return f"{table}\n\n{_explain.explain_sketches(self._rows, dim)}"

    def check(self, rows: int = 4) -> None:
        """Compare the first rows, and their products, with plain ``jax.grad``.

        It compares rows in the metric of ``scale_params``, before scales and clips. It
        looks at values, so it runs outside ``jit`` only.

        Args:
          rows: how many examples to compare, a positive int, at most N. The losses of
            a whole batch are compared together.

        Raises:
          TypeError: ``rows`` is not an int, or J is traced.
          ValueError: ``rows`` is not positive; or a product is wrong by more than
            rounding, and the message names the leaf. The tolerance is min(8·√eps, 1/4)
            times the size of the summands, plus min(64·eps, 1/16) times that of the
            largest leaf. eps is that of the narrowest floats anywhere in the function,
            so 0.003 is allowed in float32, and a quarter in bfloat16.

        >>> import jax.numpy as jnp
        >>> from pytree_grads import jacobian
        >>> f = lambda p, x: jnp.dot(p["w"], x)
        >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [6.0, 8.0]]))
        >>> J.check()
        """
        count = positive_int("rows", rows)
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(self)):
            raise TypeError(
                "J.check() looks at values: call it outside jit, vmap and grad"
            )
        few = self._rows.bare()
        if self._outputs.batched:
            few = few.chosen(Span(0, min(count, len(self))))
        if few.origin.shape[0]:
            _check.check(few, self._outputs)


def _has_shapes(tree: PyTree, structure: Any, shapes: Sequence[Any]) -> bool:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef == structure and all(
        getattr(x, "shape", None) == shape
        for x, shape in zip(leaves, shapes, strict=True)
    )


def _real(dtype: Any) -> Any:
    return jnp.finfo(dtype).dtype


@partial(jax.tree_util.register_dataclass, data_fields=["T"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class TransposedJacobian(NotAnArray):
    """Jᵀ, as it stands in ``J.T @ c`` and ``J @ other.T``."""

    T: Jacobian

    _symbol = "J.T"

    @property
    def _has_one_output(self) -> bool:
        return self.T._has_one_output

    def __matmul__(self, c: PyTree) -> PyTree:
        """Jᵀ c, the weighted sum of rows."""
        if isinstance(c, Jacobian):
            raise TypeError(
                "J.T @ J is a P x P matrix, which is not built; use J.square_sum() for "
                "its diagonal, or J.T @ (J @ v) for its product with a tree v"
            )
        self.T._check_weights(c)
        return self.T.weighted_sum(c)

    def __rmatmul__(self, v: Any) -> PyTree:
        raise TypeError(f"{describe(v)} @ J.T is not defined: J @ v takes a tree v")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Jacobian, name):
            raise AttributeError(f"J.T has no attribute {name!r}")
        raise AttributeError(
            f"J.T has no attribute {name!r}: products are those of J, as J.{name}"
        )
