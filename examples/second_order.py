"""Gauss-Newton steps by conjugate gradients
=========================================

A gradient says which way is down, but not how far. The Gauss-Newton matrix G = Jᵀ H J
of the loss knows: J holds the derivatives of the network's outputs, and H is the
Hessian of the loss with respect to them. G has 2,400² entries, and the script does not
build it. `gauss_newton_product` gives v ↦ G v, here 256 images at a time, and conjugate
gradients solve (G + λ) step = gradient with such products alone. For a cross-entropy of
logits, G is the Fisher matrix, and the step is the natural gradient.

The script prints and draws the training loss after each step, beside that of Adam. For
the same number of steps, Gauss-Newton is far ahead. For the same number of passes over
the images, Adam is ahead on this easy problem, but by less and less. ::

    python examples/second_order.py [--steps 10] [--output second_order.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from pytree_grads import Vector, chain_rule_value_and_grad, gauss_newton_product

ITERATIONS = 20  # of the conjugate gradients, in a step
CHUNK = 256


def logits(params: dict[str, jax.Array], image: jax.Array) -> jax.Array:
    """The network's scores of the ten digits for one image, (64,) -> (10,)."""
    return jnp.tanh(image @ params["w"] + params["b"]) @ params["v"]


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean surprise of the labels."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


@jax.jit
def gauss_newton_step(params, images, labels, damping):
    """Solve (G + λ) step = gradient, and go there if it is down.

    (params, damping, loss).
    """
    value_and_grad = chain_rule_value_and_grad(cross_entropy, logits, chunk_size=CHUNK)
    loss, grad = value_and_grad(params, images, outer_args=(labels,))
    product = gauss_newton_product(cross_entropy, logits, chunk_size=CHUNK)(
        params, images, outer_args=(labels,)
    )
    step, _ = jax.scipy.sparse.linalg.cg(
        lambda v: (Vector(product(v)) + damping * Vector(v)).tree,
        grad,
        maxiter=ITERATIONS,
    )
    there = (Vector(params) - Vector(step)).tree
    new_loss = cross_entropy(jax.vmap(logits, (None, 0))(there, images), labels)
    # Levenberg and Marquardt's rule: trust the curvature more when it was right.
    better = new_loss < loss
    params = jax.tree.map(lambda new, old: jnp.where(better, new, old), there, params)
    return params, damping * jnp.where(better, 0.5, 4.0), jnp.minimum(loss, new_loss)


def adam(params, images, labels, steps: int):
    """So many steps of Adam on all images; the loss at every step."""
    optimizer = optax.adam(1e-2)
    value_and_grad = chain_rule_value_and_grad(cross_entropy, logits)

    def step(carry, _):
        params, state = carry
        loss, grad = value_and_grad(params, images, outer_args=(labels,))
        updates, state = optimizer.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, _), losses = jax.lax.scan(
        step, (params, optimizer.init(params)), length=steps
    )
    return params, losses


def draw(curved, losses, passes: int, path: Path) -> None:
    """Draw the losses of both by steps, and by passes over the images."""
    steps = np.arange(1, len(curved) + 1)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_step, by_pass = figure.subplots(1, 2, sharey=True)
    by_step.semilogy(steps, losses[steps], "o-", color="#8d8d9b", label="Adam")
    by_pass.semilogy(np.arange(1, len(losses) + 1), losses, color="#8d8d9b")
    for axes, where in ((by_step, steps), (by_pass, steps * passes)):
        axes.semilogy(where, curved, "o-", color="#c8553d", label="Gauss-Newton")
        axes.grid(alpha=0.3)
    by_step.set(xlabel="steps", ylabel="training loss")
    by_pass.set(xlabel="passes over the images")
    by_step.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Train both ways and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=10, help="of Gauss-Newton (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("second_order.png"))
    options = parser.parse_args(argv)

    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    keys = jax.random.split(jax.random.key(0))
    start = {
        "w": jax.random.normal(keys[0], (64, 32)) / 8,
        "b": jnp.zeros(32),
        "v": jax.random.normal(keys[1], (32, 10)) / 6,
    }

    # A product evaluates each chunk twice, with its derivatives, as two gradients do.
    passes = 1 + 2 * ITERATIONS
    adams, losses = jax.jit(adam, static_argnums=3)(
        start, train_x, train_y, passes * options.steps
    )
    params, damping = start, jnp.float32(0.1)
    lines, curved = [], []
    for number in tqdm(range(1, options.steps + 1), desc="training", unit="step"):
        params, damping, loss = gauss_newton_step(params, train_x, train_y, damping)
        curved.append(loss)
        lines.append(
            f"step {number:2}: Gauss-Newton {loss:.4f}, Adam {losses[number]:.4f}, "
            f"and {losses[passes * number - 1]:.4f} after as many passes"
        )
    print("\n".join(lines))
    draw(curved, losses, passes, options.output)
    for name, trained in (("Gauss-Newton", params), ("Adam", adams)):
        read = jax.vmap(logits, (None, 0))(trained, test_x).argmax(axis=1)
        print(
            f"{name}: test accuracy {(read == test_y).mean():.1%} on {len(test_y)} "
            "images"
        )


if __name__ == "__main__":
    main()
