"""Combine gradients as one combines numbers
=========================================

This package began with a question. You have the gradients of a model at two inputs, and
each is a tree of arrays shaped like the parameters. The loss of the two outputs p1 and
p2 is p1² + p2². By the chain rule its gradient is ::

    2*p1 * grad1  +  2*p2 * grad2

How do you write that sum if grad1 and grad2 are trees and not numbers? Here are the
ordinary gradient and four ways to write the sum. The first model is f(x) = m*x + b,
where you can check the answer by hand: 5.76 for m, and 3.2 for b. The second model has
1,000 parameter arrays, and nothing else changes. ::

    python examples/linear_combinations.py [--lines 500] [--output sum.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from pytree_grads import (
    Vector,
    chain_rule_grad,
    linear_combination,
    per_example_grad,
    reassemble,
)


def line(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """f(x) = m*x + b."""
    return params["m"] * x + params["b"]


def many_lines(params: dict[str, dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """The mean of many bent lines, each with a slope m and an offset b of its own."""
    m = jnp.stack([one["m"] for one in params.values()])
    b = jnp.stack([one["b"] for one in params.values()])
    return jnp.tanh(m * x + b).mean()


def loss(outputs: jax.Array) -> jax.Array:
    """Σ f²."""
    return jnp.sum(outputs**2)


def five_ways(model: Callable[..., jax.Array]) -> dict[str, Callable[..., Any]]:
    """The same gradient, written in five ways.

    Each takes the parameters and two inputs.
    """

    def ordinary(params, xs):
        return jax.grad(lambda params: loss(jax.vmap(model, (None, 0))(params, xs)))(
            params
        )

    def operators(params, xs):
        p1, grad1 = jax.value_and_grad(model)(params, xs[0])
        p2, grad2 = jax.value_and_grad(model)(params, xs[1])
        return (2 * p1 * Vector(grad1) + 2 * p2 * Vector(grad2)).tree

    def combination(params, xs):
        p1, grad1 = jax.value_and_grad(model)(params, xs[0])
        p2, grad2 = jax.value_and_grad(model)(params, xs[1])
        return linear_combination([2 * p1, 2 * p2], [grad1, grad2])

    def rows_in_hand(params, xs):
        outputs = jax.vmap(model, (None, 0))(params, xs)
        rows = per_example_grad(model)(params, xs)
        return reassemble(loss, outputs, rows)

    def without_rows(params, xs):
        return chain_rule_grad(loss, model)(params, xs)

    return {
        "jax.grad of the whole": ordinary,
        "2*p1*Vector(grad1) + 2*p2*Vector(grad2)": operators,
        "linear_combination": combination,
        "reassemble": rows_in_hand,
        "chain_rule_grad": without_rows,
    }


def draw(params, xs, path: Path) -> None:
    """Draw both terms of the sum, tip to tail, in the plane of m and b."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    start = (0.0, 0.0)
    for x, color, name in zip(
        xs, ("#c8553d", "#3d6fc8"), ("2 p1 · grad1", "2 p2 · grad2"), strict=True
    ):
        p, grad = jax.value_and_grad(line)(params, x)
        term = 2 * p * Vector(grad)
        end = (start[0] + term.tree["m"], start[1] + term.tree["b"])
        axes.annotate("", end, start, arrowprops={"color": color, "width": 2})
        axes.plot([], [], color=color, lw=3, label=f"{name}, p = {p:.1f}")
        start = end
    axes.annotate("", start, (0, 0), arrowprops={"color": "#22223b", "width": 2})
    axes.plot([], [], color="#22223b", lw=3, label="their sum, the gradient")
    axes.set(xlim=(-1, 6.5), ylim=(-1.2, 4.2), xlabel="m", ylabel="b")
    axes.set_title("2 p1 · grad1 + 2 p2 · grad2 for f(x) = m·x + b", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the gradient of both models, in five ways."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lines", type=int, default=500, help="of the larger model")
    parser.add_argument("--output", type=Path, default=Path("sum.png"))
    options = parser.parse_args(argv)
    xs = jnp.array([0.3, 1.5])

    print("f(x) = m*x + b, m = 2, b = -1; inputs 0.3 and 1.5; loss Σ f²")
    params = {"m": jnp.array(2.0), "b": jnp.array(-1.0)}
    for name, way in five_ways(line).items():
        gradient = way(params, xs)
        print(f"  {name:<42} dm = {gradient['m']:.4g}   db = {gradient['b']:.4g}")
    draw(params, xs, options.output)

    slopes, offsets = jax.random.uniform(jax.random.key(0), (2, options.lines))
    params = {
        f"line{i}": {"m": m, "b": b}
        for i, (m, b) in enumerate(zip(slopes, offsets, strict=True))
    }
    print(f"\nthe same with {len(jax.tree.leaves(params)):,} parameter arrays")
    ways = five_ways(many_lines)
    expected = Vector(next(iter(ways.values()))(params, xs))
    for name, way in ways.items():
        gradient = Vector(way(params, xs))
        difference = (gradient - expected).norm() / expected.norm()
        print(
            f"  {name:<42} norm {gradient.norm():.6f}   off by {difference:.0e} of it"
        )


if __name__ == "__main__":
    main()
