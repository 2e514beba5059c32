"""Time and memory of the chain rule in chunks against the ordinary gradient.

    python benchmarks/chain_rule.py [--only NAME ...] [--chunks 16 32 64 128 256]
        [--seconds 4] [--save [NAME]]

The loss is contrastive, so it couples all examples and no average over microbatches has
its gradient. What is compared is timed in the same run, call by call in turn; a
quotient of two times is the median, over rounds, of their quotient in one round. The
chunked gradient evaluates every example once more than the ordinary one does: 4/3 of
its work, if a backward pass is worth two evaluations; `work` counts its products of
matrices. `microbatches` is what chunks alone cost: the mean of the gradients of the
losses of the same chunks, which is the gradient of another loss, but evaluates every
example once; `/ microbatches` is then the price of the chain rule itself.

Differences are those to the ordinary gradient, in float32 as measured and in float64,
relative to the largest entry of each leaf. The last line of an encoder has the memory
of the loss and its derivative by given outputs, N × N similarities among it, below
which no chunk can go.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _images import conv
from _layers import Draw, dense, layer_norm, norm_params
from _measure import (
    Program,
    compile_program,
    environment,
    human_bytes,
    human_seconds,
    interleaved,
    markdown_table,
)
from _results import add_save_option, save
from _transformers import block_params, transformer_block

from pytree_grads import chain_rule_grad


@dataclass(frozen=True)
class Encoder:
    """A function that embeds one example, its parameters and a batch."""

    name: str
    fun: Callable[[Any, jax.Array], jax.Array]
    params: Any
    batch: jax.Array


SHALLOW, DEEP = (784, 512, 512, 64), (256, *[512] * 6, 64)


def mlp(n: int, widths: Sequence[int]) -> Encoder:
    def fun(params, x):
        *hidden, last = params
        for p in hidden:
            # Smooth: another order of summation turns no unit on or off.
            x = jax.nn.gelu(dense(p, x))
        return dense(last, x)

    draw = Draw("chain rule mlp")
    params = [draw.dense(a, b) for a, b in pairwise(widths)]
    return Encoder(
        f"MLP {'-'.join(map(str, widths))}, N = {n:,}", fun, params, draw(n, widths[0])
    )


def conv_net(n: int, channels: Sequence[int] = (1, 16, 32)) -> Encoder:
    def fun(params, x):
        for w in params["convs"]:
            x = jax.nn.gelu(conv(x, w, stride=2))
        return dense(params["out"], x.reshape(-1))

    draw = Draw("chain rule conv net")
    convs = [draw.weight(5, 5, a, b) for a, b in pairwise(channels)]
    params = {"convs": convs, "out": draw.dense(7 * 7 * channels[-1], 64)}
    return Encoder(f"conv net 28×28, N = {n:,}", fun, params, draw(n, 28, 28, 1))


def transformer(n: int, t: int = 32, d: int = 128, layers: int = 2) -> Encoder:
    def fun(params, x):
        for p in params["layers"]:
            x = transformer_block(p, x)
        return jnp.mean(layer_norm(params["norm"], x), axis=0) @ params["out"]

    draw = Draw("chain rule transformer")
    blocks = [block_params(draw, d) for _ in range(layers)]
    params = {"layers": blocks, "norm": norm_params(d), "out": draw.weight(d, 64)}
    return Encoder(
        f"transformer {layers} × {d}, T = {t}, N = {n:,}", fun, params, draw(n, t, d)
    )


def contrastive(outputs: jax.Array) -> jax.Array:
    """Which of the batch's second halves belongs to which first half."""
    outputs = outputs / jnp.linalg.norm(outputs, axis=1, keepdims=True)
    first, second = jnp.split(outputs, 2, axis=1)
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(first @ second.T / 0.1, axis=1)))


def ordinary(encoder: Encoder) -> Callable[..., Any]:
    """The gradient of the composed loss, as one writes it."""

    def loss(params, batch):
        return contrastive(jax.vmap(encoder.fun, (None, 0))(params, batch))

    return jax.grad(loss)


def chunked(encoder: Encoder, size: int | None) -> Callable[..., Any]:
    return chain_rule_grad(contrastive, encoder.fun, chunk_size=size)


def averaged(encoder: Encoder, size: int) -> Callable[..., Any]:
    """The mean of the gradients of the losses of microbatches."""
    return optax.microbatching.microbatch(
        ordinary(encoder),
        argnums=1,
        microbatch_size=size,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )


def difference(got: Any, expected: Any) -> float:
    """The largest difference of an entry, relative to the largest of its leaf."""
    return max(
        float(np.max(np.abs(np.asarray(x) - np.asarray(y))) / np.max(np.abs(y)))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    )


def in_float64(encoder: Encoder, size: int | None, examples: int = 300) -> float:
    """The difference in double precision, on fewer examples."""
    with jax.enable_x64(True):
        args = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64),
            (encoder.params, encoder.batch[:examples]),
        )
        got = jax.jit(chunked(encoder, size))(*args)
        return difference(got, jax.jit(ordinary(encoder))(*args))


HEADER = [
    "encoder",
    "gradient",
    "time",
    "/ ordinary",
    "/ microbatches",
    "work / ordinary",
    "temporary",
    "off by",
    "float64",
]


def rows_of(encoder: Encoder, chunks: Sequence[int], seconds: float) -> list[list[str]]:
    """The table's rows for one encoder."""
    args = encoder.params, encoder.batch
    count = len(encoder.batch)
    sizes = {f"chunks of {k:,}": k for k in chunks if k < count} | {
        f"one of {count:,}": None
    }
    programs: dict[str, Program] = {
        "ordinary": compile_program(ordinary(encoder), *args)
    }
    for name, size in sizes.items():
        programs[name] = compile_program(chunked(encoder, size), *args)
    means = {
        f"mean of {name}": compile_program(averaged(encoder, size), *args)
        for name, size in sizes.items()
        if size and count % size == 0
    }
    timings = interleaved(programs | means, seconds=seconds, rounds=5)
    expected = programs["ordinary"]()
    outputs = jax.vmap(encoder.fun, (None, 0))(*args)
    rows = []
    for name, program in programs.items():
        mean = f"mean of {name}"
        row = [
            encoder.name,
            name,
            human_seconds(timings[name].median),
            f"{timings[name].over(timings['ordinary']):.2f}",
            f"{timings[name].over(timings[mean]):.2f}" if mean in means else "",
            f"{program.flops / programs['ordinary'].flops:.2f}",
            human_bytes(program.temp_bytes),
        ]
        if name == "ordinary":
            rows.append([*row, "", ""])
        else:
            wide = in_float64(encoder, sizes[name])
            rows.append([*row, f"{difference(program(), expected):.0e}", f"{wide:.0e}"])
    loss = human_bytes(compile_program(jax.grad(contrastive), outputs).temp_bytes)
    return [*rows, [encoder.name, "of the loss alone", "", "", "", "", loss, "", ""]]


def main(argv: Sequence[str] | None = None) -> None:
    """Print what it ran on and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument(
        "--examples",
        type=int,
        nargs=2,
        default=[1024, 512],
        metavar="N",
        help="of the networks of vectors and images, and of the transformer "
        "(%(default)s)",
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="encoders by their first letters"
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="an encoder (%(default)s)"
    )
    add_save_option(parser, "chain_rule")
    options = parser.parse_args(argv)
    rows = []
    flat, sequences = options.examples
    encoders = (
        mlp(flat, SHALLOW),
        mlp(flat, DEEP),
        conv_net(flat),
        transformer(sequences),
    )
    for encoder in encoders:
        if encoder.name.startswith(tuple(options.only)):
            rows += rows_of(encoder, options.chunks, options.seconds)
    ran_on, table = f"{environment()}.", markdown_table(HEADER, rows)
    print(f"{ran_on}\n\n{table}")
    if options.save:
        save(options.save, "The chain rule in chunks", ran_on, table)


if __name__ == "__main__":
    main()
