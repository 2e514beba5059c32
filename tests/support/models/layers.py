"""Dense layers in every spelling, biases, scales, norms, embeddings and fused
projections.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ._table import N, model


@model()
def perceptron(draw):
    def fun(p, x, y):
        hidden = jnp.tanh(x @ p["w"] + p["b"]) * p["gain"]
        return jnp.sum((hidden @ p["v"] - y) ** 2)

    params = {"w": draw(3, 7), "b": draw(7), "gain": draw(7), "v": draw(7)}
    return fun, params, (draw(N, 3), draw(N))


@model()
def sequence_of_a_perceptron(draw):
    def fun(p, x):
        hidden = jnp.tanh(x @ p["w"] + p["b"][None]) * p["gain"][None] + p["scalar"]
        return jnp.sum(jnp.sin(hidden @ p["v"]))

    params = {
        "w": draw(3, 7),
        "b": draw(7),
        "gain": draw(7),
        "scalar": draw(),
        "v": draw(7, 2),
    }
    return fun, params, (draw(N, 4, 3),)


def _spelled(specs, sizes):
    """The model with one parameter for each einsum; `p` marks it among the operands."""

    def build(draw):
        def shape(letters):
            return [sizes[letter] for letter in letters]

        params, batch = {}, []
        for spec in specs:
            left, weight = spec.split("->")[0].split(",")
            params[spec] = draw(*shape(weight))
            batch.append(draw(N, *shape(left)))

        def fun(p, *xs):
            made = zip(specs, xs, strict=True)
            return sum(
                jnp.sum(jnp.sin(jnp.einsum(spec, x, p[spec]))) for spec, x in made
            )

        return fun, params, tuple(batch)

    return build


@model()
def einsums_of_matrices(draw):
    specs = [
        "i,io->o",
        "i,oi->o",
        "ti,io->to",
        "ti,oi->ot",
        "bti,io->bto",
        "bti,oi->tob",
    ]
    return _spelled(specs, {"i": 3, "o": 5, "t": 4, "b": 2})(draw)


@model("['td,khd->k']")
def einsums_of_heads(draw):
    specs = [
        "td,dhk->thk",
        "td,hdk->htk",
        "thk,hkd->td",
        "thk,khd->td",
        "hk,hkd->d",
        "td,khd->k",
    ]
    return _spelled(specs, {"t": 4, "d": 3, "h": 2, "k": 5})(draw)


@model()
def einsums_with_blocks(draw):
    specs = [
        "td,tdo->to",
        "etd,edf->etf",
        "td,td->t",
        "td,d->td",
        "ted,ed->t",
        "d,eo->deo",
    ]
    return _spelled(specs, {"t": 4, "d": 3, "o": 2, "e": 3, "f": 5})(draw)


@model()
def einsums_of_three(draw):
    def fun(p, x, y):
        bilinear = jnp.einsum("i,ijk,j->k", x[0], p["bilinear"], y[0])
        chain = jnp.einsum("ti,io,oj->tj", x, p["first"], p["second"])
        gated = jnp.einsum("ti,tj,ijk->tk", x, y, p["gate"])
        trace = jnp.einsum("ti,ij,tj->t", x, p["form"], y)
        parts = (bilinear, chain, gated, trace)
        return sum(jnp.sum(jnp.sin(part)) for part in parts)

    params = {
        "bilinear": draw(3, 2, 5),
        "first": draw(3, 7),
        "second": draw(7, 2),
        "gate": draw(3, 2, 4),
        "form": draw(3, 2),
    }
    return fun, params, (draw(N, 4, 3), draw(N, 4, 2))


@model()
def contractions_by_other_names(draw):
    def fun(p, x):
        parts = [
            jnp.dot(p["dot"], x.T),
            jnp.inner(x, p["inner"]),
            jnp.tensordot(x, p["tensordot"], axes=([0, 1], [1, 0])),
            jnp.matmul(x[:, None, :], p["matmul"][None]),
            jnp.vdot(p["vdot"], x)[None],
            jnp.outer(p["outer"], x[0]),
            lax.dot_general(x, p["general"], (((1,), (2,)), ((0,), (0,)))),
            jnp.linalg.multi_dot([x, p["first"], p["second"]]),
            jax.vmap(lambda row: p["vmapped"] @ row)(x),
        ]
        return sum(jnp.sum(jnp.sin(part)) for part in parts)

    params = {
        "dot": draw(5, 3),
        "inner": draw(5, 3),
        "tensordot": draw(3, 4, 2),
        "matmul": draw(3, 5),
        "vdot": draw(4, 3),
        "outer": draw(5),
        "general": draw(4, 2, 3),
        "first": draw(3, 5),
        "second": draw(5, 2),
        "vmapped": draw(2, 3),
    }
    return fun, params, (draw(N, 4, 3),)


@model()
def layer_norm_rms_norm_group_norm(draw):
    def layer_norm(x, scale, bias):
        centered = x - x.mean(-1, keepdims=True)
        return (
            centered * lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-3) * scale
            + bias
        )

    def fun(p, x):
        x = layer_norm(x @ p["w"], p["scale"][None], p["bias"][None])
        x = x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-3) * p["rms"][None]
        groups = x.reshape(4, 2, 3)
        center = groups.mean((0, 2), keepdims=True)
        groups = (groups - center) / jnp.sqrt(groups.var((0, 2), keepdims=True) + 1e-3)
        x = groups.reshape(4, 6) * p["group scale"][None] + p["group bias"][None]
        return jnp.sum(jnp.sin(x))

    vectors = {
        name: draw(6) for name in ("scale", "bias", "rms", "group scale", "group bias")
    }
    return fun, {"w": draw(3, 6), **vectors}, (draw(N, 4, 3),)


@model()
def embeddings(draw):
    def fun(p, tokens, x):
        one_hot = jax.nn.one_hot(tokens, 11, dtype=x.dtype)
        parts = [
            jnp.take(p["take"], tokens, axis=0),
            jnp.take(p["columns"], tokens, axis=1).T,
            one_hot @ p["one-hot"],
            p["index"][tokens],
            p["twice"][tokens] * jnp.flip(p["twice"][jnp.roll(tokens, 1)], 0),
            p["heads"][tokens].sum(1),
            p["bag"][tokens].sum(0)[None] * x,
        ]
        return sum(jnp.sum(jnp.sin(part * x)) for part in parts)

    params = {
        name: draw(11, 3) for name in ("take", "one-hot", "index", "twice", "bag")
    }
    params |= {"columns": draw(3, 11), "heads": draw(11, 2, 3)}
    return fun, params, (draw.ints(11, N, 4), draw(N, 4, 3))


@model()
def gathers_at_the_edges(draw):
    """Indices that are negative, out of range, repeated, scalar or of two axes."""

    def fun(p, tokens, x):
        parts = [
            p["negative"][tokens - 11],
            jnp.take(p["fill"], tokens + 5, axis=0, mode="fill", fill_value=0),
            jnp.take(p["clip"], tokens + 5, axis=0, mode="clip"),
            p["scalar"][tokens[0]][None] * x,
            p["pairs"][tokens, tokens[::-1]][:, None] * x,
            p["points"].at[tokens, 0].get(mode="drop", fill_value=0)[:, None] * x,
            p["vector"][tokens][:, None] * x,
            p["two axes"][tokens.reshape(2, 2)].reshape(4, 3) * x,
        ]
        return sum(jnp.sum(jnp.sin(part)) for part in parts)

    params = {
        name: draw(11, 3) for name in ("negative", "fill", "clip", "scalar", "two axes")
    }
    params |= {"pairs": draw(11, 11), "points": draw(11, 2), "vector": draw(11)}
    return fun, params, (draw.ints(11, N, 4), draw(N, 4, 3))


@model()
def gathers_of_several_indices(draw):
    """One fixed index and others that are read, of adjacent axes or not, clipped, and
    in a scan.
    """

    def fun(p, tokens, x):
        parts = [
            jnp.sin(p["levels"][1, tokens] * x),
            jnp.sin(p["apart"][tokens, :, tokens[::-1]] * x),
            jnp.sin(p["clip"].at[tokens - 2, 1, tokens].get(mode="clip")[:, None] * x),
            jnp.sin(p["last"][:, tokens, tokens[::-1]].T * x),
        ]

        def step(total, table):
            return total + jnp.sum(jnp.sin(table[tokens, tokens] * x)), None

        one = jnp.sin(p["one"][tokens[0], tokens[1]] + p["one"][tokens[2], 3] + x[0, 0])
        return jax.lax.scan(step, one + sum(map(jnp.sum, parts)), p["scanned"])[0]

    params = {
        "levels": draw(2, 11, 3),
        "apart": draw(11, 3, 11),
        "clip": draw(11, 2, 11),
    }
    params |= {"one": draw(11, 11)}
    params |= {"last": draw(3, 11, 11), "scanned": draw(2, 11, 11, 3)}
    return fun, params, (draw.ints(11, N, 4), draw(N, 4, 3))


@model()
def means_of_words_in_a_scan(draw):
    """One vector goes to all words of a step, and another to those of the next."""

    def fun(p, tokens, x):
        def step(h, words):
            of_pairs = jnp.sum(p["pairs"][words, words[::-1]] * x[:1], 0)
            of_clipped = jnp.mean(p["clip"].at[words + 5].get(mode="clip"), 0)
            return jnp.tanh(
                h + jnp.mean(p["mean"][words], 0) + of_pairs + of_clipped
            ), None

        return jnp.sum(jax.lax.scan(step, x[1], tokens)[0])

    params = {"mean": draw(31, 3), "clip": draw(31, 3), "pairs": draw(9, 9, 3)}
    return fun, params, (draw.ints(9, N, 3, 4), draw(N, 2, 3))


@model()
def many_look_ups(draw):
    """More pairs of places than lines, so that lines of one index are found by the
    lines.
    """

    def fun(p, tokens, x):
        whole, once = p["narrow"][tokens], p["once"][tokens]
        parts = [
            whole * x,
            p["twice"][tokens[:9]],
            p["twice"][tokens[9:]] * x[9:],
            once * x[:1],
        ]
        return sum(jnp.sum(jnp.sin(part)) for part in parts) + jnp.sum(
            p["mean"][tokens]
        )

    names = ("narrow", "once", "twice", "mean")
    params = {name: draw(11, 2) for name in names}
    return fun, params, (draw.ints(11, N, 24), draw(N, 24, 2))


@model()
def indices_that_break_their_promise(draw):
    """Plain indexing takes indices to be in bounds.

    Gradients of those that are not are dropped.
    """

    def fun(p, tokens, x):
        parts = [
            p["below"][tokens - 20],
            p["above"][tokens + 5],
            p["one"][tokens[0] - 20][None] + x,
        ]
        return sum(jnp.sum(jnp.sin(part * x)) for part in parts)

    params = {name: draw(11, 3) for name in ("below", "above", "one")}
    return fun, params, (draw.ints(11, N, 4), draw(N, 4, 3))


@model()
def bytes_as_tokens(draw):
    """The index's own dtype does not hold the number of lines."""

    def fun(p, tokens, x):
        parts = [p["index"][tokens], jnp.take(p["take"], tokens, axis=0)]
        return sum(jnp.sum(jnp.sin(part * x)) for part in parts)

    tokens = draw.ints(256, N, 4).astype("uint8")
    return (
        fun,
        {name: draw(256, 3) for name in ("index", "take")},
        (tokens, draw(N, 4, 3)),
    )


@model()
def linear_in_the_table(draw):
    """The cotangents are the same for all examples, the indices are not."""

    def fun(p, tokens):
        return jnp.sum(p["table"][tokens]) + jnp.sum(
            p["w"][tokens[0]] * jnp.arange(3, dtype=float)
        )

    return fun, {"table": draw(7, 3), "w": draw(7, 3)}, (draw.ints(7, N, 4),)


@model()
def the_same_for_every_example(draw):
    def fun(p, x):
        return jnp.sum(jnp.sin(p["w"]) @ p["v"]) + jnp.sum(x) * p["b"]

    return fun, {"w": draw(3, 5), "v": draw(5, 2), "b": draw()}, (draw(N, 3),)


@model()
def fused_projections(draw):
    def fun(p, x):
        q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
        gate, up = jnp.moveaxis((x @ p["gate"]).reshape(4, 2, 5), 1, 0)
        both = x @ jnp.concatenate([p["left"], p["right"]], axis=1)
        stacked = jnp.einsum("ti,sio->sto", x, jnp.stack([p["one"], p["two"]]))
        rows = x @ jnp.concatenate([p["top"], p["bottom"]], axis=0)
        folded = x @ p["folded"].reshape(3, 10)
        biased = x @ p["joined"][:-1] + p["joined"][-1:]
        parts = [q * k + v, jax.nn.silu(gate) * up, both, stacked, rows, folded, biased]
        return sum(jnp.sum(jnp.sin(part)) for part in parts)

    params = {
        "qkv": draw(3, 15),
        "gate": draw(3, 10),
        "left": draw(3, 2),
        "right": draw(3, 5),
        "one": draw(3, 2),
        "two": draw(3, 2),
        "top": draw(1, 5),
        "bottom": draw(2, 5),
        "folded": draw(3, 2, 5),
        "joined": draw(4, 5),
    }
    return fun, params, (draw(N, 4, 3),)


@model()
def slices_of_a_weight(draw):
    def fun(p, x):
        parts = [
            x[:, :2] @ p["rows"][:2],
            x @ p["columns"][:, 1:-1],
            x[:, :2] @ p["strided"][::2],
            x @ p["reversed"][::-1],
            x @ jnp.flip(p["flipped"], 1),
            x @ jnp.roll(p["rolled"], 1, axis=1),
            x[:, :2] @ p["overlap"][:2] + x[:, 1:] @ p["overlap"][1:],
            x @ jnp.pad(p["padded"], ((1, 0), (0, 2))),
            x @ p["transposed"].T,
            x[:, None, :] @ p["wide"][None, :, :],
            x @ jnp.squeeze(p["squeezed"], 1),
            x @ lax.slice_in_dim(p["middle"], 1, 4, axis=1).reshape(3, 3).T,
            jnp.stack(list(p["listed"])) @ x[0],
        ]
        return sum(jnp.sum(jnp.sin(part)) for part in parts)

    names = (
        "rows",
        "columns",
        "reversed",
        "flipped",
        "rolled",
        "overlap",
        "wide",
        "middle",
    )
    params = {name: draw(3, 5) for name in names}
    params |= {"strided": draw(4, 5), "padded": draw(2, 3), "transposed": draw(5, 3)}
    params |= {"squeezed": draw(3, 1, 5), "listed": draw(4, 3)}
    return fun, params, (draw(N, 4, 3),)
