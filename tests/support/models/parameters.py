"""What is done with parameters before they are used: ties, reuse, constants, dtypes,
nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ._table import N, model


@model()
def tied_embedding(draw):
    def fun(p, tokens):
        hidden = jnp.tanh(p["table"][tokens] @ p["w"])
        logits = hidden @ p["table"].T
        return -jnp.sum(jax.nn.log_softmax(logits)[:, 0])

    return fun, {"table": draw(11, 3), "w": draw(3, 3)}, (draw.ints(11, N, 4),)


@model()
def tied_by_one_hot(draw):
    def fun(p, tokens):
        hidden = jnp.tanh(jax.nn.one_hot(tokens, 11, dtype=float) @ p["table"])
        return jnp.sum(
            jax.nn.logsumexp(jnp.einsum("td,vd->tv", hidden, p["table"]), -1)
        )

    return fun, {"table": draw(11, 3)}, (draw.ints(11, N, 4),)


@model()
def tied_autoencoder(draw):
    def fun(p, x):
        return jnp.sum((jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T - x) ** 2)

    return fun, {"w": draw(3, 5), "b": draw(5)}, (draw(N, 3),)


@model()
def one_weight_many_times(draw):
    def fun(p, x, y):
        for _ in range(3):
            x = jnp.tanh(x @ p["w"])  # (3,): T = 1
        y = jnp.sin(y @ p["w"]) @ p["w"]  # (4, 3): T = 4
        turned = jnp.einsum("td,ed->te", y, p["w"])
        return (
            jnp.sum(x) + jnp.sum(y**2) + jnp.sum(jnp.sin(turned)) + jnp.sum(p["w"] ** 2)
        )

    return fun, {"w": draw(3, 3)}, (draw(N, 3), draw(N, 4, 3))


@model()
def the_same_array_in_two_layers(draw):
    shared = draw(3, 3)

    def fun(p, x):
        return jnp.sum(jnp.tanh(x @ p["a"]) @ p["b"][0])

    return fun, {"a": shared, "b": [shared]}, (draw(N, 3),)


@model()
def low_rank_adapter(draw):
    frozen = [draw(3, 5), np.asarray(draw(5, 3))]

    def fun(p, x):
        for w, (down, up) in zip(frozen, p, strict=True):
            x = jnp.tanh(x @ w + 0.5 * (x @ down) @ up)
        return jnp.sum(jnp.sin(x))

    return fun, [(draw(3, 2), draw(2, 5)), (draw(5, 2), draw(2, 3))], (draw(N, 4, 3),)


@model()
def merged_adapter(draw):
    frozen = draw(3, 5)

    def fun(p, x):
        merged = p["merged"] + p["down"] @ p["up"] + frozen
        return jnp.sum(jnp.sin(x @ merged))

    params = {"down": draw(3, 2), "up": draw(2, 5), "merged": draw(3, 5)}
    return fun, params, (draw(N, 3),)


@model()
def multiples_of_a_weight(draw):
    def fun(p, x):
        w, scale = (
            p["w"],
            np.float64(0.25) if x.dtype == jnp.float64 else np.float32(0.25),
        )
        parts = [
            x @ (2 * w),
            x @ -w,
            (x @ w) / 3,
            0.1 * (x @ (w / 7)),
            -(-x @ (w * scale)),
        ]
        return sum(jnp.sum(jnp.sin(part)) for part in parts) - jnp.sum(
            x @ p["v"] - x @ p["v"] * 2
        )

    return fun, {"w": draw(3, 5), "v": draw(3, 2)}, (draw(N, 3),)


@model("['doubled']")
def sums_of_sums_of_a_weight(draw):
    def fun(p, x):
        few, many = p["few"], p["doubled"]
        for _ in range(3):
            few = few + few.T
        for _ in range(40):
            many = (many + many.T) / 2
        return jnp.sum(jnp.sin(x @ few)) + jnp.sum(jnp.sin(x @ many))

    return fun, {"few": draw(3, 3), "doubled": draw(3, 3)}, (draw(N, 3),)


@model("['squared']", "['masked']", "['normal']", "['gated']", "['exp']")
def functions_of_a_weight(draw):
    mask = np.arange(15).reshape(3, 5) % 2 == 0

    def fun(p, x):
        direction = p["normal"] / jnp.linalg.norm(p["normal"], axis=0, keepdims=True)
        parts = [
            x @ p["squared"] ** 2,
            x @ jnp.where(mask, p["masked"], 0),
            x @ (p["gain"][None] * direction),
            x @ (p["gated"] * jax.nn.sigmoid(x)[:, None]),
            x @ jnp.exp(p["exp"]),
        ]
        return sum(jnp.sum(jnp.sin(part)) for part in parts)

    names = ("squared", "masked", "normal", "gated", "exp")
    return fun, {name: draw(3, 5) for name in names} | {"gain": draw(5)}, (draw(N, 3),)


@model()
def linear_algebra_of_a_weight(draw):
    def fun(p, x):
        positive = p["cholesky"] @ p["cholesky"].T + jnp.eye(3)
        lower = jnp.linalg.cholesky(positive)
        solved = jnp.linalg.solve(p["solve"] + 3 * jnp.eye(3), x)
        return jnp.sum(jnp.sin(lower @ x)) + jnp.sum(solved**2)

    return fun, {"cholesky": draw(3, 3), "solve": draw(3, 3)}, (draw(N, 3),)


@model("['zeroed']")
def unused_empty_and_scalar_parameters(draw):
    def fun(p, x):
        stopped = jax.lax.stop_gradient(p["stopped"])
        zeroed = 0 * jnp.sum(p["zeroed"] * x[:, None])
        empty = jnp.sum(p["empty"]) + jnp.sum(x[:0] @ p["no rows"])
        return jnp.sum(jnp.sin(p["scalar"] * x @ stopped)) + zeroed + empty

    params = {
        "stopped": draw(3, 5),
        "zeroed": draw(3, 5),
        "unused": draw(2, 2),
        "scalar": draw(),
        "empty": draw(0, 3),
        "no rows": draw(0, 4),
        "nothing": None,
    }
    return fun, params, (draw(N, 3),)


@model("['tile']", "['repeat']")
def broadcast_parameters(draw):
    def fun(p, x):
        tall = jnp.broadcast_to(p["row"], (4, 3))
        tiled = jnp.tile(p["tile"], (2, 1))
        repeated = jnp.repeat(p["repeat"], 2, axis=0)
        return jnp.sum(jnp.sin(x * tall)) + jnp.sum(
            jnp.sin(x @ tiled.T + x @ repeated.T)
        )

    return (
        fun,
        {"row": draw(3), "tile": draw(2, 3), "repeat": draw(2, 3)},
        (draw(N, 4, 3),),
    )


@model("['whole']", "['conj']")
def complex_parameters(draw):
    def fun(p, x, z):
        hidden = jnp.einsum("ti,io->to", z, p["w"]) + p["b"][None]
        spectrum = jnp.fft.fft(x, axis=0) @ p["w"]
        turned = jnp.einsum("ti,oi->to", z, p["conj"].conj())
        real = jnp.sin(jnp.real(turned)) @ p["real"]
        power = jnp.abs(hidden * (1 + 2j)) ** 2 + jnp.real(spectrum * hidden.conj())
        whole = jnp.sum(jnp.imag(p["whole"] * z))
        return jnp.sum(jnp.sin(power)) + jnp.sum(jnp.sin(jnp.sum(real) + whole))

    params = {
        "w": draw.complex(3, 5),
        "b": draw.complex(5),
        "conj": draw.complex(2, 3),
        "real": draw(2),
        "whole": draw.complex(4, 3),
    }
    x, z = draw(N, 4, 3).astype(complex), draw.complex(N, 4, 3)
    return fun, params, (x, z)


@model()
def gradients_inside(draw):
    """A loss that holds derivatives of the network by its input, as in physics or meta-
    learning.
    """

    def net(p, x):
        return jnp.sum(jnp.tanh(x @ p["v"]) * p["u"])

    def fun(p, x):
        slope = jax.grad(net, argnums=1)(p, x)
        _, curvature = jax.jvp(
            lambda x: jax.grad(net, argnums=1)(p, x), (x,), (jnp.ones(3),)
        )
        fast = p["w"] - 0.1 * jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(p["w"])
        return jnp.sum(slope**2) + jnp.sum(curvature) + jnp.sum(jnp.sin(x @ fast))

    return fun, {"w": draw(3, 5), "v": draw(3, 7), "u": draw(7)}, (draw(N, 3),)


@model("['b']")
def ensemble(draw):
    def fun(p, x):
        member = jax.vmap(lambda w, b: jnp.sin(x @ w + b[None]))
        return jnp.sum(member(p["w"], p["b"])) + jnp.sum(
            jax.vmap(jnp.dot, (0, None))(p["v"], x[0])
        )

    return fun, {"w": draw(3, 3, 5), "b": draw(3, 5), "v": draw(2, 3)}, (draw(N, 4, 3),)
