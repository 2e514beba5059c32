"""``Accumulator``: weighted sums and means of gradients that arrive one after
another.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CompilationCounter, tree_allclose
from hypothesis import given
from hypothesis import strategies as st

from pytree_grads import Accumulator

KEY = jax.random.key(5)


def gradients(count, dtype=jnp.float32):
    """So many trees of different numbers."""
    return [
        {
            "w": jax.random.normal(jax.random.fold_in(KEY, i), (3, 2), dtype),
            "b": (jnp.full(2, i + 0.5, dtype), jnp.asarray(-i, dtype)),
        }
        for i in range(count)
    ]


def accumulated(grads, weights):
    accumulator = Accumulator.zeros_like(grads[0])
    for grad, weight in zip(grads, weights, strict=True):
        accumulator = accumulator.add(grad, weight)
    return accumulator


def weighted_mean(grads, weights):
    """The same in NumPy and double precision."""
    weights = np.asarray(weights, np.float64)

    def mean(*leaves):
        stacked = np.stack([np.asarray(x, np.float64) for x in leaves])
        return np.asarray(
            np.tensordot(weights, stacked, 1) / weights.sum(), leaves[0].dtype
        )

    return jax.tree.map(mean, *grads)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_mean_and_sum_of_weighted_gradients():
    grads, weights = gradients(4), [3, 0.5, np.float32(2), jnp.float32(7)]
    accumulator = accumulated(grads, weights)
    assert tree_allclose(accumulator.weight, jnp.float32(12.5))
    mean = weighted_mean(grads, [float(w) for w in weights])
    assert tree_allclose(accumulator.mean(), mean)
    expected_sum = jax.tree.map(lambda x: np.asarray(12.5 * x, x.dtype), mean)
    assert tree_allclose(accumulator.sum(), expected_sum)


def test_by_default_every_gradient_weighs_one():
    grads = gradients(3)
    accumulator = Accumulator.zeros_like(grads[0])
    for grad in grads:
        accumulator = accumulator.add(grad)
    assert tree_allclose(accumulator.mean(), weighted_mean(grads, [1, 1, 1]))


def test_the_mean_of_means_is_another_number():
    """Two microbatches of 1 and 7 tokens: each token has one vote, not each
    microbatch.
    """
    tokens = jax.random.normal(KEY, (8, 3))
    params = jnp.ones(3)

    def loss(params, tokens):
        return jnp.mean((tokens @ params) ** 2)

    whole = jax.grad(loss)(params, tokens)
    parts = [tokens[:1], tokens[1:]]
    accumulator = accumulated([jax.grad(loss)(params, part) for part in parts], [1, 7])
    assert tree_allclose(accumulator.mean(), whole)
    unweighted = accumulated(
        [jax.grad(loss)(params, part) for part in parts], [1, 1]
    ).mean()
    assert jnp.linalg.norm(unweighted - whole) > 0.1 * jnp.linalg.norm(whole)


def test_optax_multisteps_takes_the_mean_of_means():
    """Why it does not stand underneath; if this fails, optax has learned to weigh."""
    steps = optax.MultiSteps(optax.sgd(1.0), 2)
    params = jnp.zeros(())
    state = steps.init(params)
    for mean_gradient in (8.0, 0.0):  # means of 1 and of 7 tokens: the mean of all is 1
        with jax.numpy_dtype_promotion("standard"):  # as optax has it
            updates, state = steps.update(jnp.asarray(mean_gradient), state, params)
    assert float(updates) == -4
    means = [jnp.asarray(8.0), jnp.asarray(0.0)]
    assert float(accumulated(means, [1, 7]).mean()) == 1


def test_padding_masks():
    """Gradients of single examples, with a mask that says which are real."""
    x = jnp.arange(12.0).reshape(4, 3)
    mask = jnp.array([True, True, False, True])
    grads = [{"w": row} for row in x]
    accumulator = accumulated(grads, list(mask))
    assert tree_allclose(accumulator.mean(), {"w": x[mask].mean(axis=0)})
    assert tree_allclose(accumulator.weight, jnp.float32(3))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_has_no_weight_is_left_out(bad):
    grads = [{"w": jnp.ones(2)}, {"w": jnp.full(2, bad)}]
    accumulator = accumulated(grads, [2.0, 0.0])
    assert tree_allclose(accumulator.mean(), grads[0])
    # A microbatch of padding alone: its mean is 0 / 0.
    in_jit = jax.jit(accumulated)(grads, [jnp.float32(2), jnp.float32(0)])
    assert tree_allclose(in_jit.mean(), grads[0])
    assert not jnp.isfinite(accumulated(grads, [2.0, 1.0]).mean()["w"]).any()

    def squared(weight):
        return jnp.sum(accumulated(grads, [2.0, weight]).sum()["w"] ** 2)

    assert jnp.isfinite(jax.grad(squared)(jnp.float32(0)))


def test_a_thousand_ones_in_bfloat16():
    ones = {"w": jnp.ones(3, jnp.bfloat16)}
    accumulator = jax.lax.fori_loop(
        0, 1000, lambda _, acc: acc.add(ones), Accumulator.zeros_like(ones)
    )
    assert tree_allclose(
        accumulator.sum(), {"w": jnp.full(3, 1000, jnp.bfloat16)}, rtol=0
    )
    assert tree_allclose(accumulator.mean(), ones, rtol=0)
    # Why optax's microbatching does not stand underneath.
    summed = optax.microbatching.microbatch(lambda x: x.sum(0), 0, microbatch_size=1)
    assert summed(jnp.ones((1000, 1), jnp.bfloat16)) == 256


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float32", "float64", "complex64"]
)
def test_dtypes_are_kept(dtype, x64):
    grads = gradients(3, jnp.dtype(dtype))
    accumulator = accumulated(grads, [1, 2, 3])
    assert tree_allclose(
        accumulator.sum(),
        jax.tree.map(
            lambda a, b, c: (
                a + jnp.asarray(2, a.dtype) * b + jnp.asarray(3, a.dtype) * c
            ),
            *grads,
        ),
    )
    for leaf in jax.tree.leaves(accumulator.mean()):
        assert leaf.dtype == dtype
    for leaf in jax.tree.leaves(accumulator.total):
        assert leaf.dtype == {"bfloat16": "float32", "float16": "float32"}.get(
            dtype, dtype
        )


def test_float0_leaves_pass_through():
    grads = {"n": np.zeros(2, jax.dtypes.float0), "w": jnp.ones(2)}
    accumulator = accumulated([grads, grads], [1, 3])
    assert tree_allclose(accumulator.merge(accumulator).mean(), grads)
    assert tree_allclose(accumulator.sum(), {**grads, "w": jnp.full(2, 4.0)})


def test_nothing_added():
    accumulator = Accumulator.zeros_like({"w": jnp.ones(2)})
    assert tree_allclose(accumulator.sum(), {"w": jnp.zeros(2)})
    assert tree_allclose(accumulator.mean(), {"w": jnp.full(2, jnp.nan)})


def test_a_sum_that_was_thrown_away():
    grads = {"w": jnp.ones(2)}
    accumulator = Accumulator.zeros_like(grads)
    accumulator.add(grads, 2)
    for read in (accumulator.mean, accumulator.sum):
        with pytest.raises(
            ValueError, match="add returns another and leaves this one as it is"
        ):
            read()
    assert tree_allclose(accumulator.add(grads, 2).mean(), grads)
    # What jit takes has no history, and what it traces is used once.
    assert tree_allclose(
        jax.jit(lambda a: a.mean())(accumulator), {"w": jnp.full(2, jnp.nan)}
    )
    empty = Accumulator.zeros_like(grads)
    jax.jit(lambda g: empty.add(g).mean())(grads)
    assert tree_allclose(empty.sum(), {"w": jnp.zeros(2)})


def test_equality_is_identity():
    one, other = (Accumulator.zeros_like({"w": jnp.ones(2)}) for _ in range(2))
    assert one == one != other
    assert len({one, other}) == 2


def test_inside_scan_and_across_jit():
    grads, weights = gradients(6), jnp.arange(6.0)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)

    @jax.jit
    def scanned(accumulator, stacked, weights):
        def step(accumulator, pair):
            return accumulator.add(*pair), None

        return jax.lax.scan(step, accumulator, (stacked, weights))[0]

    first, second = (jax.tree.map(lambda x, s=s: x[s], stacked) for s in np.s_[:3, 3:])
    accumulator = scanned(Accumulator.zeros_like(grads[0]), first, weights[:3])
    accumulator = scanned(accumulator, second, weights[3:])
    assert tree_allclose(accumulator.mean(), weighted_mean(grads, weights))


def test_nothing_compiles_again():
    grads = gradients(1)[0]
    accumulator = Accumulator.zeros_like(grads).add(grads, 2)
    accumulator.merge(accumulator).mean()
    accumulator.sum()
    with CompilationCounter() as counter:
        accumulator = Accumulator.zeros_like(grads)
        for weight in (3, 0.25, np.float32(7), True):
            accumulator = accumulator.add(grads, weight)
        accumulator.merge(accumulator).mean()
        accumulator.sum()
    assert counter.count == 0


@given(
    st.lists(
        st.tuples(st.integers(-100, 100), st.integers(0, 20), st.integers(0, 3)),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_merging_is_exact(entries):
    """Sums of integers are representable: however they are spread, not one bit
    differs.
    """
    one = accumulated(
        [jnp.float32(g) for g, _, _ in entries], [w for _, w, _ in entries]
    )
    parts = [Accumulator.zeros_like(jnp.float32(0)) for _ in range(4)]
    for grad, weight, device in entries:
        parts[device] = parts[device].add(jnp.float32(grad), weight)
    for order in itertools.islice(itertools.permutations(parts), 0, None, 5):
        merged = order[0].merge(order[1].merge(order[2])).merge(order[3])
        assert bits(merged) == bits(one)
        assert bits(merged.mean()) == bits(one.mean())


def test_merging_commutes_and_rounds_once():
    grads = gradients(7)
    left, right = (
        accumulated(grads[:3], [1, 5, 2]),
        accumulated(grads[3:], [3, 1, 0.1, 8]),
    )
    assert bits(left.merge(right)) == bits(right.merge(left))
    exact = jax.tree.map(
        lambda a, b: np.asarray(np.float64(a) + np.float64(b), np.float32),
        left.total,
        right.total,
    )
    assert bits(left.merge(right).total) == bits(exact)
    empty = Accumulator.zeros_like(grads[0])
    assert bits(left.merge(empty)) == bits(left)


def test_devices_merge_by_psum():
    mesh = jax.make_mesh((4,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    grads, weights = jax.random.normal(KEY, (4, 5)), jnp.array([3.0, 0.0, 1.0, 4.0])

    def local(grad, weight):
        accumulator = Accumulator.zeros_like(grad[0]).add(grad[0], weight[0])
        return jax.lax.psum(accumulator, "i")

    spec = jax.P("i")
    merged = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=jax.P())
    )(grads, weights)
    assert tree_allclose(merged.mean(), weighted_mean(list(grads), weights))


def test_vmap_of_accumulators():
    grads, weights = jax.random.normal(KEY, (3, 5)), jnp.arange(3.0)
    empty = Accumulator.zeros_like(jnp.zeros(5))
    got = jax.vmap(lambda g, w: empty.add(g, w).add(g, 1).mean())(grads, weights)
    assert tree_allclose(got, grads)


class TestErrors:
    @property
    def grads(self):
        return {"w": jnp.ones((3,)), "b": jnp.ones(2, jnp.bfloat16)}

    def add(self, grads, weight=1):
        return Accumulator.zeros_like(self.grads).add(grads, weight)

    def test_a_leaf_that_cannot_be_summed(self):
        with pytest.raises(TypeError, match=r"argument grads\['n'\] is an integer"):
            Accumulator.zeros_like({"n": jnp.arange(3)})
        with pytest.raises(TypeError, match=r"argument grads\['f'\] is not an array"):
            Accumulator.zeros_like({"f": jnp.sin})

    def test_trees_that_disagree(self):
        with pytest.raises(
            ValueError, match=r"grads\['w'\] .*expected float32\[3\], got .*\[3,1"
        ):
            self.add({**self.grads, "w": jnp.ones((3, 1))})
        with pytest.raises(
            ValueError, match=r"grads\['b'\] .*bfloat16\[2\], got float32"
        ):
            self.add({**self.grads, "b": jnp.ones(2)})
        with pytest.raises(ValueError, match=r"missing keys \['b'\]"):
            self.add({"w": jnp.ones(3)})
        wide = Accumulator.zeros_like({**self.grads, "b": jnp.ones(2)})
        with pytest.raises(
            ValueError, match=r"other.total\['b'\] .*bfloat16\[2\], got float32"
        ):
            self.add(self.grads).merge(wide)

    def test_weights(self):
        with pytest.raises(
            ValueError, match=r"weight must be a scalar, got float32\[3\]"
        ):
            self.add(self.grads, jnp.ones(3))
        with pytest.raises(TypeError, match="weight must be real, got complex64"):
            self.add(self.grads, 1j)
        with pytest.raises(
            TypeError, match="weight must be a real scalar, got a value of type"
        ):
            self.add(self.grads, "1")

    def test_merging_something_else(self):
        with pytest.raises(
            TypeError, match="must be an Accumulator, got a value of type dict"
        ):
            self.add(self.grads).merge(self.grads)


@pytest.mark.parametrize("jitted", [False, True])
def test_the_mean_of_a_window_without_weight(jitted):
    grads = {"w": jnp.array([1.0, 2.0]), "h": jnp.ones(2, jnp.bfloat16)}
    other = jax.tree.map(lambda x: 3 * x, grads)

    def means(weight):
        accumulator = Accumulator.zeros_like(grads).add(grads, weight)
        return (
            accumulator.mean(),
            accumulator.mean(default=0),
            accumulator.mean(default=np.float64(0.5)),
            accumulator.mean(default=other),
        )

    means = jax.jit(means) if jitted else means
    nans, zeros, halves, others = means(0.0)
    assert tree_allclose(nans, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), grads))
    assert tree_allclose(zeros, jax.tree.map(jnp.zeros_like, grads))
    assert tree_allclose(halves, jax.tree.map(lambda x: jnp.full_like(x, 0.5), grads))
    assert tree_allclose(others, other)
    for mean in means(2.0):
        assert tree_allclose(mean, grads)


def test_the_mean_with_a_default_has_derivatives():
    def first(weight, x):
        return Accumulator.zeros_like(x).add(x, weight).mean(default=0.0)[0]

    assert jax.grad(first)(0.0, jnp.ones(2)) == 0
    assert tree_allclose(jax.grad(first, 1)(2.0, jnp.ones(2)), jnp.array([1.0, 0.0]))


def test_a_default_that_does_not_fit():
    accumulator = Accumulator.zeros_like({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"argument default\['w'\] does not match"):
        accumulator.mean(default={"w": jnp.ones(3)})
    with pytest.raises(TypeError, match="default must be a real number"):
        accumulator.mean(default=1j)
