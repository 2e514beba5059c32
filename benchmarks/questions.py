"""Time whole batches, groups, private gradients and kernels beside doing it by hand.

    python benchmarks/questions.py [--seconds 4] [--save [NAME]]

The network is an MLP in float32. "By hand" is what one writes in plain JAX: rows from
`jax.jacrev` or from one `jax.grad` for each loss, norms of rows from `jax.vmap` of
`jax.grad`, kernels from products of each layer's inputs and of its cotangents. What is
compared is timed in the same run; a quotient of two times is the median, over rounds,
of their quotient in one round.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
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
from _ways import installed

from pytree_grads import jacobian, privacy

Way = Callable[..., Any]
Layers = list[dict[str, jax.Array]]


def network(sizes: Sequence[int]) -> Layers:
    """The layers of an MLP."""
    pairs = itertools.pairwise(sizes)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return [
        {"w": jax.random.normal(key, pair) / pair[0] ** 0.5, "b": jnp.zeros(pair[1])}
        for key, pair in zip(keys, pairs, strict=False)
    ]


def activations(layers: Layers, x: jax.Array) -> list[jax.Array]:
    """The input of each layer, and the outputs."""
    found = [x]
    for i, layer in enumerate(layers):
        x = x @ layer["w"] + layer["b"]
        x = jnp.tanh(x) if i < len(layers) - 1 else x
        found.append(x)
    return found


def outputs(layers: Layers, x: jax.Array) -> jax.Array:
    return activations(layers, x)[-1]


# ------------------------------------------------------------------------------------
# Losses of a whole batch: their Gramian and the sum that it weighs


def losses(layers: Layers, x: jax.Array, y: jax.Array) -> jax.Array:
    """K losses of the batch."""
    return jnp.mean((outputs(layers, x) - y) ** 2, axis=0)


def weighed(gram: jax.Array) -> jax.Array:
    return jnp.sum(gram, axis=0) / jnp.sum(gram)


def ours_of_losses(layers: Layers, x: jax.Array, y: jax.Array, **mode: Any) -> Any:
    J = jacobian(losses, batched=False, **mode)(layers, x, y)
    gram = J.gram()
    return gram, J.weighted_sum(weighed(gram))


def from_rows(rows: Any) -> Any:
    """The same from rows (K, ...) in a tree."""
    flat = [x.reshape(len(x), -1) for x in jax.tree.leaves(rows)]
    gram = sum(x @ x.T for x in flat)
    return gram, jax.tree.map(lambda x: jnp.tensordot(weighed(gram), x, 1), rows)


def jacrev_of_losses(layers: Layers, x: jax.Array, y: jax.Array) -> Any:
    return from_rows(jax.jacrev(losses)(layers, x, y))


def grads_of_losses(layers: Layers, x: jax.Array, y: jax.Array) -> Any:
    def one(layers: Layers, k: int) -> jax.Array:
        return losses(layers, x, y)[k]

    grads = [jax.grad(one)(layers, k) for k in range(y.shape[1])]
    return from_rows(jax.tree.map(lambda *g: jnp.stack(g), *grads))


# ------------------------------------------------------------------------------------
# Groups: a gradient whose every leaf is normalised for each example


def loss(layers: Layers, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum((outputs(layers, x) - y) ** 2)


def ours_of_groups(layers: Layers, x: jax.Array, y: jax.Array, **mode: Any) -> Any:
    J = jacobian(loss, **mode)(layers, x, y)
    scales = jax.tree.map(lambda n: 1 / (n + 0.01), J.norms(groups="leaves"))
    return J.scale(scales, groups="leaves").mean()


def rows_of_groups(layers: Layers, x: jax.Array, y: jax.Array) -> Any:
    rows = jax.vmap(jax.grad(loss), (None, 0, 0))(layers, x, y)

    def normalised(x: jax.Array) -> jax.Array:
        norms = jnp.linalg.norm(x.reshape(len(x), -1), axis=1)
        return jnp.tensordot(1 / (norms + 0.01), x, 1) / len(x)

    return jax.tree.map(normalised, rows)


def ordinary(layers: Layers, x: jax.Array, y: jax.Array) -> Any:
    """An ordinary gradient."""

    def total(layers: Layers) -> jax.Array:
        return jnp.sum(jax.vmap(loss, (None, 0, 0))(layers, x, y))

    return jax.grad(total)(layers)


# ------------------------------------------------------------------------------------
# Private gradients: bounded, with jax_privacy's own call


def private(clipped_grad: Way, **options: Any) -> Way:
    """The clipped sum and the norms by one of the two `clipped_grad`."""

    def run(layers: Layers, x: jax.Array, y: jax.Array) -> Any:
        clipped = clipped_grad(
            loss,
            l2_clip_norm=1.0,
            batch_argnums=(1, 2),
            keep_batch_dim=False,
            return_grad_norms=True,
            **options,
        )
        total, aux = clipped(layers, x, y)
        return total, aux.grad_norms

    return run


def private_ways() -> dict[str, Way]:
    """Without the peer where it is not installed."""
    ours: dict[str, Way] = {
        "privacy.clipped_grad": private(privacy.clipped_grad),
        "an ordinary gradient": ordinary,
    }
    if not installed("jax_privacy", "jax_privacy"):
        return ours
    peer = import_module("jax_privacy.clipping").clipped_grad
    return {
        "jax_privacy": private(peer),
        "jax_privacy, microbatches of 8": private(peer, microbatch_size=8),
        **ours,
    }


# ------------------------------------------------------------------------------------
# Kernels of many outputs


def kernel_by_hand(layers: Layers, x: jax.Array) -> jax.Array:
    """Products of inputs times products of cotangents, layer by layer."""
    inputs = activations(layers, x)
    (n, k), total = inputs[-1].shape, jnp.zeros(())
    cotangents = jnp.broadcast_to(jnp.eye(k), (n, k, k))
    for i in reversed(range(len(layers))):
        flat = cotangents.reshape(n * k, -1)
        both = (flat @ flat.T).reshape(n, k, n, k)
        total = total + (inputs[i] @ inputs[i].T + 1)[:, None, :, None] * both
        slope = (1 - inputs[i] ** 2)[:, None]
        cotangents = (cotangents @ layers[i]["w"].T) * slope
    return total


def trace_of(kernel: jax.Array) -> jax.Array:
    return jnp.einsum("ikjk->ij", kernel)


KERNELS: dict[str, Way] = {
    "by hand": kernel_by_hand,
    "J.gram()": lambda p, x: jacobian(outputs)(p, x).gram(),
    "J.gram(), recompute=True": lambda p, x: jacobian(outputs, recompute=True)(
        p, x
    ).gram(),
}
TRACES: dict[str, Way] = {
    "by hand, then its trace": lambda p, x: trace_of(kernel_by_hand(p, x)),
    "einsum of J.gram()": lambda p, x: trace_of(jacobian(outputs)(p, x).gram()),
    "J.gram(trace=True)": lambda p, x: jacobian(outputs)(p, x).gram(trace=True),
}
LOSSES: dict[str, Way] = {
    "jax.jacrev": jacrev_of_losses,
    "K calls of jax.grad": grads_of_losses,
    "jacobian(batched=False)": ours_of_losses,
    "the same, recompute=True": partial(ours_of_losses, recompute=True),
}
GROUPS: dict[str, Way] = {
    "rows by hand": rows_of_groups,
    "an ordinary gradient": ordinary,
    "J.scale(groups=)": ours_of_groups,
    "the same, recompute=True": partial(ours_of_groups, recompute=True),
}


def cases() -> list[tuple[str, dict[str, Way], tuple[Any, ...]]]:
    """What is asked, the ways to answer, the first by hand, and arguments."""

    def normal(seed: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape)

    five, ten = network([784, 512, 512, 5]), network([784, 512, 512, 10])
    found = [
        (f"five losses, N = {n}", LOSSES, (five, normal(1, n, 784), normal(2, n, 5)))
        for n in (64, 256)
    ]
    of_ten = (ten, normal(1, 128, 784), normal(2, 128, 10))
    found.append(("leaves normalised, N = 128", GROUPS, of_ten))
    found.append(("private, N = 128", private_ways(), of_ten))
    many = network([784, 512, 512, 24])
    for layers, n in ((ten, 64), (many, 48)):
        k, x = layers[-1]["b"].size, normal(1, n, 784)
        found.append((f"kernel, N = {n}, K = {k}", KERNELS, (layers, x)))
        found.append((f"its trace, N = {n}, K = {k}", TRACES, (layers, x)))
    return found


HEADER = ["question", "way", "time", "/ by hand", "temporary", "/ by hand", "off by"]


def rows_of(
    name: str, ways: dict[str, Way], args: tuple[Any, ...], seconds: float
) -> list[list[str]]:
    """The rows of the table for one case."""
    programs: dict[str, Program] = {
        way: compile_program(fun, *args) for way, fun in ways.items()
    }
    times = interleaved(programs, seconds=seconds)
    first, *_ = programs
    base, rows = programs[first], []
    for way, program in programs.items():
        rows.append(
            [
                name,
                way,
                human_seconds(times[way].median),
                f"{times[way].over(times[first]):.2f}",
                human_bytes(program.temp_bytes),
                f"{program.temp_bytes / max(1, base.temp_bytes):.2f}",
                "" if ways[way] is ordinary else f"{_distance(program(), base()):.0e}",
            ]
        )
    return rows


def _distance(found: Any, want: Any) -> float:
    """The largest difference, relative to the largest entry."""
    pairs = list(zip(*map(jax.tree.leaves, (found, want)), strict=True))
    size = max(float(jnp.max(jnp.abs(y))) for _, y in pairs)
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs) / size


def main(argv: Sequence[str] | None = None) -> None:
    """Print what it ran on and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="a case (%(default)s)"
    )
    add_save_option(parser, "questions")
    options = parser.parse_args(argv)
    rows = []
    for name, ways, args in cases():
        rows += rows_of(name, ways, args, options.seconds)
    ran_on = f"{environment()}. MLPs 784-512-512-K in float32."
    table = markdown_table(HEADER, rows)
    print(f"{ran_on}\n\n{table}")
    if options.save:
        title = "Whole batches, groups and kernels beside doing it by hand"
        save(options.save, title, ran_on, table)


if __name__ == "__main__":
    main()
