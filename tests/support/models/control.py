"""Control flow and calls: scans, remat, jit, custom rules, cond, loops, sorting."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ._table import N, model


@model("['b']")
def scan_over_layers(draw):
    def fun(p, x):
        def layer(x, own):
            return jnp.tanh(x @ own["w"] + own["b"][None]) + x @ p["shared"], None

        x, _ = lax.scan(layer, x, {"w": p["w"], "b": p["b"]})
        return jnp.sum(jnp.sin(x))

    params = {"w": draw(3, 3, 3), "b": draw(3, 3), "shared": draw(3, 3)}
    return fun, params, (draw(N, 4, 3),)


@model("['b']")
def scan_over_wide_layers_of_one_vector(draw):
    def fun(p, x):
        def layer(x, own):
            w, b = own
            return jnp.tanh(w @ x + b), jnp.sum(x)

        x, sums = lax.scan(layer, x, (p["w"], p["b"]), reverse=True, unroll=2)
        return jnp.sum(x) + jnp.sum(sums**2)

    return fun, {"w": draw(3, 5, 5), "b": draw(3, 5)}, (draw(N, 5),)


@model()
def scan_over_layers_of_padded_flipped_weights(draw):
    """What becomes of a weight in the body is undone for all layers at once."""

    def fun(p, x):
        def layer(x, w):
            whole = jnp.concatenate(
                [
                    jnp.pad(w, ((0, 0), (1, 1)))[:, :4],
                    jnp.pad(w[::-1], ((0, 0), (0, 1))),
                ]
            )
            return jnp.tanh(x @ whole), w[0]

        x, firsts = lax.scan(layer, x, p)
        return jnp.sum(jnp.sin(x)) + jnp.sum(firsts**2)

    return fun, draw(3, 2, 3), (draw(N, 3, 4),)


@model()
def scan_over_layers_with_tied_tables(draw):
    def fun(p, tokens):
        def layer(x, table):
            return jnp.tanh(x + table[tokens]) @ table.T @ table, None

        x, _ = lax.scan(layer, jnp.zeros((4, 2)), p)
        return jnp.sum(jnp.sin(x))

    return fun, draw(3, 5, 2), (draw.ints(5, N, 4),)


@model()
def scan_over_layers_with_tables(draw):
    def fun(p, tokens):
        x, _ = lax.scan(
            lambda x, table: (jnp.tanh(x + table[tokens]), 1.0), jnp.zeros((4, 2)), p
        )
        return jnp.sum(jnp.sin(x))

    return fun, draw(3, 5, 2), (draw.ints(5, N, 4),)


@model()
def scan_that_returns_its_weights(draw):
    def fun(p, x):
        x, weights = lax.scan(lambda x, w: (jnp.tanh(x @ w), w), x, p)
        return jnp.sum(x) + jnp.sum(jnp.sin(jnp.einsum("ti,lij->ltj", x, weights)))

    return fun, draw(3, 3, 3), (draw(N, 4, 3),)


@model()
def scan_over_time(draw):
    def fun(p, x):
        def step(h, x):
            h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
            return h, jnp.sin(h @ p["v"])

        h, ys = lax.scan(step, jnp.zeros(5), x)
        return jnp.sum(h) + jnp.sum(ys**2)

    params = {"w": draw(3, 5), "u": draw(5, 5), "b": draw(5), "v": draw(5, 2)}
    return fun, params, (draw(N, 4, 3),)


@model()
def gated_recurrence_backwards(draw):
    """One weight used three times in every step, once by its transpose, in a reversed
    scan.
    """

    def fun(p, x):
        def step(h, x):
            gate = jax.nn.sigmoid(x @ p["w"] + h @ p["u"])
            new = jnp.tanh((gate * h) @ p["u"] + h @ p["u"].T)
            return (1 - gate) * h + gate * new, new

        h, ys = lax.scan(step, p["start"], x, reverse=True)
        return jnp.sum(h) + jnp.sum(jnp.sin(ys @ p["u"]))

    return fun, {"w": draw(3, 5), "u": draw(5, 5), "start": draw(5)}, (draw(N, 4, 3),)


@model("['b']")
def scan_over_layers_of_scans_over_time(draw):
    def fun(p, x):
        def layer(x, own):
            def step(h, x):
                h = jnp.tanh(x @ own["w"] + h @ own["u"] + own["b"])
                return h, h @ p["out"]

            return lax.scan(step, jnp.zeros(3), x)[1], None

        x, _ = lax.scan(layer, x, {name: p[name] for name in "wub"})
        return jnp.sum(jnp.sin(x))

    params = {
        "w": draw(2, 3, 3),
        "u": draw(2, 3, 3),
        "b": draw(2, 3),
        "out": draw(3, 3),
    }
    return fun, params, (draw(N, 4, 3),)


@model("['b']")
def scan_over_time_of_scans_over_layers(draw):
    def fun(p, x):
        def step(h, x):
            def layer(carry, own):
                h, x = carry
                w, b = own
                return (jnp.tanh(h @ w + x + b), x @ p["mix"]), None

            (h, _), _ = lax.scan(layer, (h, x), (p["w"], p["b"]))
            return h, h

        _, hs = lax.scan(step, jnp.zeros(3), x)
        return jnp.sum(jnp.sin(hs))

    return (
        fun,
        {"w": draw(2, 3, 3), "b": draw(2, 3), "mix": draw(3, 3)},
        (draw(N, 4, 3),),
    )


@model()
def embeddings_in_a_scan(draw):
    def fun(p, tokens):
        def step(h, token):
            h = jnp.tanh(p["table"][token] + h @ p["w"])
            return h, h @ p["table"].T

        _, logits = lax.scan(step, jnp.zeros(3), tokens)
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1))

    return fun, {"table": draw(7, 3), "w": draw(3, 3)}, (draw.ints(7, N, 4),)


@model("['b']")
def remat_around_and_in_a_scan(draw):
    policies = jax.checkpoint_policies

    def fun(p, x):
        @partial(jax.checkpoint, policy=policies.dots_with_no_batch_dims_saveable)
        def layer(x, own):
            w, b = own
            return jnp.tanh(x @ w + b[None]) + x, None

        @jax.checkpoint
        def trunk(x):
            return lax.scan(layer, x, (p["w"], p["b"]))[0]

        @partial(jax.checkpoint, policy=policies.save_only_these_names("hidden"))
        def head(x):
            hidden = checkpoint_name(jnp.tanh(x @ p["v"]), "hidden")
            return jnp.sum(jnp.sin(hidden @ p["v"].T))

        return head(trunk(x))

    return fun, {"w": draw(3, 3, 3), "b": draw(3, 3), "v": draw(3, 5)}, (draw(N, 4, 3),)


@model()
def remat_in_a_scan_over_time(draw):
    def fun(p, x):
        @partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.nothing_saveable,
            prevent_cse=False,
        )
        def step(h, x):
            h = jnp.tanh(x @ p["w"] + h @ p["u"])
            return h, jnp.sum(jnp.sin(h @ p["w"].T))

        h, ys = lax.scan(step, jnp.zeros(5), x)
        return jnp.sum(h) + jnp.sum(ys)

    return fun, {"w": draw(3, 5), "u": draw(5, 5)}, (draw(N, 4, 3),)


@model()
def nested_jit(draw):
    @jax.jit
    def dense(w, x):
        return jnp.tanh(x @ w)

    @jax.jit
    def block(p, x):
        return dense(p["v"], dense(p["w"], x)) + dense(p["w"], x[:, ::-1])[:, :3]

    def fun(p, x):
        return jnp.sum(jax.jit(jnp.sin)(jax.jit(block)(p, x)))

    return fun, {"w": draw(3, 5), "v": draw(5, 3)}, (draw(N, 4, 3),)


@jax.custom_vjp
def _matmul(x, w):
    return x @ w


_matmul.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, g: (g @ saved[1].T, 2 * jnp.outer(saved[0], g)),
)


@jax.custom_jvp
def _smooth(x):
    return jnp.tanh(x)


@_smooth.defjvp
def _smooth_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _smooth(x), 1.5 * dx * (1 - _smooth(x) ** 2)


@jax.custom_vjp
def _clipped(x):
    return x


_clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.5, 0.5),))


@model("['w']", "['clipped']")
def custom_rules(draw):
    """Rules that do not give the derivative of the function that they stand beside."""

    def fun(p, x):
        hidden = _smooth(_matmul(x, p["w"]))
        hidden = jax.nn.relu(hidden @ p["v"]) + jax.nn.gelu(
            hidden @ _clipped(p["clipped"])
        )
        return jnp.sum(jax.nn.log_softmax(hidden) * jnp.arange(2.0))

    return fun, {"w": draw(3, 5), "v": draw(5, 2), "clipped": draw(5, 2)}, (draw(N, 3),)


@model("['left']", "['right']", "['either']", "['choice']")
def branches(draw):
    def fun(p, x, n):
        hidden = lax.cond(
            jnp.sum(x) > 0,
            lambda: x @ p["left"] @ p["either"],
            lambda: x @ p["right"] @ p["either"],
        )
        switched = lax.switch(
            n,
            [lambda x: x, lambda x: jnp.sin(x @ p["choice"]), lambda x: x * p["scale"]],
            hidden,
        )
        return jnp.sum(jnp.sin(switched @ p["after"]))

    params = {
        name: draw(3, 3) for name in ("left", "right", "either", "choice", "after")
    }
    return fun, params | {"scale": draw(3)}, (draw(N, 3), draw.ints(3, N))


@model()
def loops(draw):
    def fun(p, x):
        x = lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["w"]), x)
        steps = lax.while_loop(
            lambda i: i < jnp.abs(x[0]) * 5, lambda i: i + 1, jnp.zeros(())
        )
        halves = lax.stop_gradient(steps)
        return jnp.sum(jnp.sin(x @ p["v"])) * (1 + halves)

    return fun, {"w": draw(3, 3), "v": draw(3, 2)}, (draw(N, 3),)


@model("['w']", "['v']", "['decay']")
def branches_in_a_scan(draw):
    def fun(p, x):
        def step(h, x):
            return lax.cond(
                x[0] > 0, lambda: jnp.tanh(h @ p["w"]), lambda: x @ p["v"]
            ), None

        h, _ = lax.scan(step, x[0], x)
        return jnp.sum(h * p["decay"][0])

    return (
        fun,
        {"w": draw(3, 3), "v": draw(3, 3), "decay": draw(2, 3)},
        (draw(N, 4, 3),),
    )


@model()
def prefix_sums_and_sorting(draw):
    def fun(p, x):
        gates = jax.nn.sigmoid(x @ p["gate"])
        inputs = x @ p["w"]
        states = lax.associative_scan(
            lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (gates, inputs)
        )[1]
        total = (
            jnp.cumsum(states @ p["v"], axis=0)
            + lax.cumlogsumexp(states, axis=0)[:, :2]
        )
        ranked = jnp.sort(total @ p["rank"]) * jnp.arange(4.0)
        best = lax.top_k(states[:, 0], 2)[0] + jnp.sort(p["sorted"])[:2]
        return jnp.sum(jnp.sin(total)) + jnp.sum(ranked) + jnp.sum(best**2)

    params = {
        "gate": draw(3, 5),
        "w": draw(3, 5),
        "v": draw(5, 2),
        "rank": draw(2),
        "sorted": draw(3),
    }
    return fun, params, (draw(N, 4, 3),)


@model("['cumulated']", "['at']", "['row']", "['update']")
def moves_that_depend_on_data(draw):
    def fun(p, x, n):
        table = p["at"].at[n].multiply(jnp.sum(x))
        row = lax.dynamic_slice_in_dim(p["row"], n, 2, axis=1)
        update = lax.dynamic_update_slice(p["update"], x[None], (n, jnp.zeros_like(n)))
        parts = [x @ jnp.cumsum(p["cumulated"], 0), x @ table, x @ row, update @ x]
        return sum(jnp.sum(jnp.sin(part)) for part in parts)

    params = {name: draw(3, 5) for name in ("cumulated", "at", "row")}
    return fun, params | {"update": draw(3, 3)}, (draw(N, 3), draw.ints(3, N))


@model()
def a_scan_of_no_steps(draw):
    def fun(p, x):
        h, _ = lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x), None), x[0], x[:0])
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w) @ w, None), h, p["layers"])
        return jnp.sum(jnp.sin(h @ p["v"]))

    params = {"w": draw(3, 3), "v": draw(3, 2), "layers": draw(0, 3, 3)}
    return fun, params, (draw(N, 4, 3),)


@model()
def no_layers_over_a_sequence(draw):
    def fun(p, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])
        return jnp.sum(jnp.sin(h @ p["v"]))

    return fun, {"v": draw(3, 2), "layers": draw(0, 3, 3)}, (draw(N, 4, 3),)


@model()
def accumulators_in_a_scan(draw):
    """Carries that do more than add: one passes through, one is scaled, two are
    exchanged.
    """

    def fun(p, x):
        def step(carry, x):
            kept, decayed, a, b = carry
            decayed = 0.5 * decayed + x @ p["w"]
            return (kept, decayed, b @ p["u"], a + x @ p["w"]), jnp.sum(kept)

        start = x[0] @ p["w"]
        (kept, decayed, a, b), ys = lax.scan(step, (start, start, start, start), x)
        return jnp.sum(jnp.sin(decayed + a * b + kept)) + jnp.sum(ys**2)

    return fun, {"w": draw(3, 5), "u": draw(5, 5)}, (draw(N, 4, 3),)


@model()
def weights_in_an_unrolled_loop(draw):
    def fun(p, x, tokens):
        h = x[0]
        for t in range(6):
            h = jnp.tanh(h @ p["w"] + p["table"][tokens[t]])
            x = jnp.sin(x @ p["w"]) @ p["w"].T
        return jnp.sum(h) + jnp.sum(x)

    return (
        fun,
        {"w": draw(3, 3), "table": draw(7, 3)},
        (draw(N, 2, 3), draw.ints(7, N, 6)),
    )


@model()
def scans_nested_deeply(draw):
    def fun(p, x):
        def nested(depth):
            if not depth:
                return lambda h: jnp.tanh(h @ p["w"])
            inner = nested(depth - 1)
            length = 2 if depth < 4 else 1
            return lambda h: lax.scan(lambda h, _: (inner(h), None), h, length=length)[
                0
            ]

        return jnp.sum(nested(9)(x))

    return fun, {"w": draw(3, 3)}, (draw(N, 3),)
