"""Convolutions in loops and branches: rewritten, and the same function as before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose
from jax import lax
from jax.extend import core
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pytree_grads import chain_rule_grad, jacobian
from pytree_grads._jax.compat import all_equations
from pytree_grads._jax.convolutions import with_canonical_convolutions

pytestmark = pytest.mark.usefixtures("x64")


def bodies(equation):
    """The jaxprs among the parameters of an equation, each as a closed or open
    jaxpr.
    """
    for value in jax.tree.leaves(list(equation.params.values())):
        if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
            yield value


def convolutions(jaxpr):
    """The dimension numbers of all convolutions of a program, those in bodies too."""
    for equation in all_equations(jaxpr):
        if equation.primitive.name == "conv_general_dilated":
            yield equation.params["dimension_numbers"]


def inside(jaxpr):
    """The same, of the convolutions in loops and branches only."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        looped = equation.primitive.name in ("scan", "cond", "while")
        for body in bodies(equation):
            yield from convolutions(body) if looped else inside(body)


def is_canonical(numbers):
    rank = len(numbers.lhs_spec)
    images = (0, rank - 1, *range(1, rank - 1))
    return numbers == lax.ConvDimensionNumbers(
        images, (rank - 1, rank - 2, *range(rank - 2)), images
    )


def random_convolution(seed):
    """A convolution of 1 to 3 spatial axes in any order, with every option that there
    is.
    """
    rng = np.random.default_rng(seed)
    space = int(rng.integers(1, 4))
    groups, batch_groups = [(1, 1), (1, 1), (3, 1), (1, 2)][seed % 4]
    image = (2 * batch_groups, 2 * groups, *rng.integers(5, 8, space))
    kernel = (2 * groups * batch_groups, 2, *rng.integers(1, 4, space))
    specs = [tuple(int(i) for i in rng.permutation(space + 2)) for _ in range(3)]
    # A spec says where each of the axes (batch, features, *space) stands in the
    # operand.
    operands = [
        jnp.asarray(rng.standard_normal([shape[i] for i in np.argsort(spec)]))
        for shape, spec in zip((image, kernel), specs, strict=False)
    ]
    options = {
        "window_strides": [int(i) for i in rng.integers(1, 3, space)],
        "padding": [(int(a), int(b)) for a, b in rng.integers(0, 3, (space, 2))],
        "lhs_dilation": [int(i) for i in rng.integers(1, 3, space)],
        "rhs_dilation": [int(i) for i in rng.integers(1, 3, space)],
        "dimension_numbers": lax.ConvDimensionNumbers(*specs),
        "feature_group_count": groups,
        "batch_group_count": batch_groups,
    }
    return functools.partial(lax.conv_general_dilated, **options), operands


@pytest.mark.parametrize("seed", range(12))
def test_a_convolution_and_its_gradients_stay_what_they_are(seed):
    convolution, operands = random_convolution(seed)

    def with_gradients(image, kernel):
        value, pull = jax.vjp(convolution, image, kernel)
        return value, pull(jnp.cos(value))

    rewritten = with_canonical_convolutions(with_gradients)
    got, wanted = jax.jit(lambda *x: (rewritten(*x), with_gradients(*x)))(*operands)
    assert tree_allclose(got, wanted, rtol=1e-12)
    before, after = (
        list(convolutions(jax.make_jaxpr(f)(*operands)))
        for f in (with_gradients, rewritten)
    )
    assert len(before) == len(after) == 3
    assert not all(map(is_canonical, before))
    assert all(map(is_canonical, after))


def filtered(kernel, image):
    """A convolution in PyTorch's order: images (N, C, H, W), kernels (O, I, H, W)."""
    return lax.conv(image, kernel, (1, 1), "SAME")


@jax.custom_vjp
def custom(kernel, image):
    return filtered(kernel, image)


custom.defvjp(
    lambda kernel, image: (filtered(kernel, image), (kernel, image)),
    lambda kept, cotangent: jax.vjp(filtered, *kept)[1](cotangent),
)


def in_scan(kernel, image):
    return lax.scan(
        lambda x, _: (jnp.tanh(filtered(kernel, x)), None), image, length=2
    )[0]


def in_branch(kernel, image):
    positive = jnp.sum(image) > 0
    return lax.cond(positive, filtered, lambda k, x: -filtered(k, x), kernel, image)


def in_while(kernel, image):
    def step(state):
        return state[0] + 1, jnp.tanh(filtered(kernel, state[1]))

    return lax.while_loop(lambda state: state[0] < 2, step, (0, image))[1]


def in_loops_and_calls(kernel, image):
    return jax.checkpoint(jax.jit(in_scan))(kernel, image) + custom(kernel, image)


KERNEL = np.random.default_rng(1).standard_normal((2, 2, 3, 3)) / 4
IMAGES = np.random.default_rng(2).standard_normal((7, 1, 2, 5, 4))


@pytest.mark.parametrize(
    "fun", [in_scan, in_branch, in_while, in_loops_and_calls, custom]
)
def test_the_bodies_of_loops_branches_and_calls_are_rewritten(fun):
    rewritten = with_canonical_convolutions(fun)
    found = list(convolutions(jax.make_jaxpr(rewritten)(KERNEL, IMAGES[0])))
    assert found
    assert all(map(is_canonical, found))
    got, wanted = jax.jit(lambda *x: (rewritten(*x), fun(*x)))(KERNEL, IMAGES[0])
    assert tree_allclose(got, wanted, rtol=1e-12)
    if fun is not in_while:  # has no reverse mode
        gradients = [
            jax.grad(lambda k, f=f: jnp.sum(f(k, IMAGES[0]) ** 2))
            for f in (rewritten, fun)
        ]
        got, wanted = jax.jit(lambda k: [gradient(k) for gradient in gradients])(KERNEL)
        assert tree_allclose(got, wanted, rtol=1e-12)


def test_a_function_without_convolutions_is_the_same_program():
    def fun(x):
        return lax.scan(lambda c, y: (c @ jnp.tanh(y), c), x, jnp.stack([x, x]))

    x = jnp.eye(3)
    got, wanted = (
        jax.make_jaxpr(f)(x) for f in (with_canonical_convolutions(fun), fun)
    )
    assert str(got) == str(wanted)


def test_a_linear_solver_stays_as_it_is():
    def blurred(kernel, image):
        return 3 * image + filtered(kernel, image)

    def sharpened(kernel, image):
        return jax.scipy.sparse.linalg.cg(
            lambda x: blurred(kernel, x), image, maxiter=5
        )[0]

    def loss(kernel, image):
        return jnp.sum(sharpened(kernel, image) ** 2)

    kernel = jnp.zeros((2, 2, 3, 3)).at[:, :, 1, 1].set(jnp.eye(2) / 4)
    got, wanted = jax.jit(
        lambda kernel: (
            jacobian(loss, chunk_size=3)(kernel, IMAGES).to_rows(),
            jax.vmap(jax.grad(loss), (None, 0))(kernel, IMAGES),
        )
    )(kernel)
    assert tree_allclose(got, wanted, rtol=1e-12)


def test_a_function_is_traced_once():
    traces = []

    def fun(x, tree):
        traces.append(x)
        return {"a": x * tree["b"], "none": None}

    got = with_canonical_convolutions(fun)(2.0, {"b": 3.0, "none": None})
    assert got == {"a": 6.0, "none": None}
    assert len(traces) == 1


def outer(embeddings):
    return jnp.sum(
        jax.nn.logsumexp(jnp.einsum("nchw,mchw->nm", embeddings, embeddings), axis=1)
    )


PROGRAMS = {
    "clip, recompute": lambda k: (
        jacobian(filtered_loss, recompute=True)(k, IMAGES).clip(1.0).sum()
    ),
    "clip, chunks": lambda k: (
        jacobian(filtered_loss, chunk_size=3)(k, IMAGES).clip(1.0).sum()
    ),
    "chain rule, chunks": lambda k: chain_rule_grad(
        outer, lambda kernel, image: filtered(kernel, image)[0], chunk_size=3
    )(k, IMAGES),
}


def filtered_loss(kernel, image):
    return jnp.sum(jnp.tanh(filtered(kernel, image)))


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_runs_chunk_by_chunk_has_the_fast_order(name):
    found = list(inside(jax.make_jaxpr(PROGRAMS[name])(KERNEL)))
    assert found
    assert all(map(is_canonical, found))


@pytest.mark.parametrize("options", [{"recompute": True}, {"chunk_size": 2}])
def test_chunks_on_every_device(options):
    images = np.random.default_rng(3).standard_normal((8, 1, 2, 5, 4))

    def clipped(kernel, images, **options):
        return jacobian(filtered_loss, **options)(kernel, images).clip(1.0).sum()

    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )
    on_devices = jax.shard_map(
        functools.partial(clipped, axis_name="data", **options),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    assert tree_allclose(
        jax.jit(on_devices)(KERNEL, images), clipped(KERNEL, images), rtol=1e-12
    )
