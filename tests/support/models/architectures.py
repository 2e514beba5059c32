"""Parts of architectures: attention, positions, experts, graphs."""

import jax
import jax.numpy as jnp

from ._table import N, model

T, D, HEADS, K = 4, 6, 2, 3


def _rotate(x):
    """Rotary positions of (T, heads, k)."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[0], dtype=x.dtype)[:, None, None] * 0.3
    left, right = x[..., :half], x[..., half : 2 * half]
    turned = [left * jnp.cos(angles) - right * jnp.sin(angles)]
    turned += [left * jnp.sin(angles) + right * jnp.cos(angles), x[..., 2 * half :]]
    return jnp.concatenate(turned, -1)


@model()
def attention_with_rotary_positions(draw):
    def fun(p, x):
        q = _rotate(jnp.einsum("td,dhk->thk", x, p["q"]))
        k = _rotate(jnp.einsum("td,dhk->thk", x, p["k"]))
        v = jnp.einsum("td,dhk->thk", x, p["v"])
        scores = jnp.einsum("thk,shk->hts", q, k) / jnp.sqrt(jnp.asarray(K, x.dtype))
        causal = jnp.tril(jnp.ones((T, T), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
        mixed = jnp.einsum("hts,shk->thk", weights, v)
        return jnp.sum(jnp.sin(jnp.einsum("thk,hkd->td", mixed, p["o"])))

    params = {name: draw(D, HEADS, K) for name in "qkv"} | {"o": draw(HEADS, K, D)}
    return fun, params, (draw(N, T, D),)


@model()
def grouped_query_attention(draw):
    def fun(p, x):
        q = (x @ p["q"]).reshape(T, 1, 2, K)  # one key head for two query heads
        k, v = jnp.split(x @ p["kv"], 2, axis=-1)
        scores = jnp.einsum("tgqk,sgk->gqts", q, k.reshape(T, 1, K))
        weights = jax.nn.softmax(scores, axis=-1)
        mixed = jnp.einsum("gqts,sgk->tgqk", weights, v.reshape(T, 1, K))
        return jnp.sum(jnp.sin(mixed.reshape(T, -1) @ p["o"]))

    params = {"q": draw(D, 2 * K), "kv": draw(D, 2 * K), "o": draw(2 * K, D)}
    return fun, params, (draw(N, T, D),)


@model("['positions']", promotes=True)
def attention_as_jax_has_it(draw):
    def fun(p, x, memory):
        q, k = (x @ p["q"]).reshape(T, HEADS, K), (memory @ p["k"]).reshape(3, HEADS, K)
        v = (memory @ p["v"]).reshape(3, HEADS, K)
        mixed = jax.nn.dot_product_attention(q, k, v)
        return jnp.sum(jnp.sin(mixed.reshape(T, -1) @ p["o"] + p["positions"]))

    params = {name: draw(D, D) for name in "qkvo"} | {"positions": draw(T, D)}
    return fun, params, (draw(N, T, D), draw(N, 3, D))


@model("['router']")
def mixture_of_experts(draw):
    def fun(p, x):
        gates = jax.nn.softmax(
            x @ p["router"] + jnp.sum(p["router"] ** 2), axis=-1
        )  # (T, E)
        chosen, expert = jax.lax.top_k(gates, 2)
        dispatch = jnp.sum(
            jax.nn.one_hot(expert, 3, dtype=x.dtype) * chosen[..., None], axis=1
        )
        hidden = jnp.tanh(jnp.einsum("te,td,edf->etf", dispatch, x, p["up"]))
        mixed = jnp.einsum("etf,efd,te->td", hidden, p["down"], dispatch)
        return jnp.sum(jnp.sin(mixed))

    params = {"router": draw(D, 3), "up": draw(3, D, 5), "down": draw(3, 5, D)}
    return fun, params, (draw(N, T, D),)


@model()
def mixture_by_capacity(draw):
    def fun(p, x):
        gates = jax.nn.softmax(x @ p["router"], axis=-1)  # (T, E)
        best = jax.nn.one_hot(jnp.argmax(gates, -1), 3, dtype=x.dtype)
        place = (jnp.cumsum(best, 0) * best).sum(-1).astype("int32")
        slot = jax.nn.one_hot(place, 2, dtype=x.dtype)
        dispatch = jnp.einsum("te,tc->tec", best, slot)
        inputs = jnp.einsum("tec,td->ecd", dispatch, x)
        outputs = jnp.tanh(jnp.einsum("ecd,edf->ecf", inputs, p["expert"]))
        return jnp.sum(jnp.sin(jnp.einsum("tec,ecf,te->tf", dispatch, outputs, gates)))

    return fun, {"router": draw(D, 3), "expert": draw(3, D, 5)}, (draw(N, T, D),)


@model()
def graph_network(draw):
    def fun(p, nodes, senders, receivers):
        for layer in p["layers"]:
            messages = jnp.tanh(nodes[senders] @ layer["message"])
            pooled = jax.ops.segment_sum(messages, receivers, num_segments=5)
            nodes = jnp.tanh(nodes @ layer["self"] + pooled)
        best = jax.ops.segment_max(nodes, jnp.array([0, 0, 1, 1, 1]), num_segments=2)
        return jnp.sum(jnp.sin(best @ p["readout"]))

    layers = [{"message": draw(3, 3), "self": draw(3, 3)} for _ in range(2)]
    edges = draw.ints(5, N, 7), draw.ints(5, N, 7)
    return fun, {"layers": layers, "readout": draw(3)}, (draw(N, 5, 3), *edges)


@model()
def segments_of_an_embedding(draw):
    def fun(p, tokens, segments):
        bags = jax.ops.segment_sum(p["table"][tokens], segments, num_segments=3)
        return jnp.sum(jnp.sin(bags @ p["w"]))

    return (
        fun,
        {"table": draw(11, 3), "w": draw(3, 2)},
        (draw.ints(11, N, 6), draw.ints(3, N, 6)),
    )


@model()
def dropout_by_a_key(draw):
    def fun(p, x, key):
        kept = jax.random.bernoulli(key, 0.6, (5,))
        hidden = jnp.where(kept, jnp.tanh(x @ p["w"]) / 0.6, 0)
        noise = jax.random.normal(jax.random.fold_in(key, 1), (2,), x.dtype)
        return jnp.sum(jnp.sin(hidden @ p["v"]) * noise)

    keys = jax.random.split(jax.random.key(3), N)
    return fun, {"w": draw(3, 5), "v": draw(5, 2)}, (draw(N, 3), keys)
