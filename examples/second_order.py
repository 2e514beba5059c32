"""Step along the curvature: Gauss-Newton steps by conjugate gradients on real digits.

A gradient says which way is down, and not how far. The Gauss-Newton matrix G = Jᵀ H J
of the loss knows: J are the derivatives of the network's outputs, H is the curvature of
the loss by them. With 2,400 parameters one would rather not build G.
`gauss_newton_product` gives v ↦ G v, here 256 images at a time, and conjugate gradients
solve (G + λ) step = gradient with nothing but such products. For a cross-entropy of
logits G is the Fisher matrix, and the step is the natural gradient.

Printed is the training loss after each of a few such steps, beside Adam's: after as
many steps, where the curvature wins by a lot; and after as many passes over the images
as the conjugate gradients took, where on this easy problem Adam is ahead, though by
less and less.

    python examples/second_order.py [--steps 10]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def main(argv: Sequence[str] | None = None) -> None:
    """Train both ways and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=10, help="of Gauss-Newton (%(default)s)"
    )
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
    lines = []
    for number in tqdm(range(1, options.steps + 1), desc="training", unit="step"):
        params, damping, loss = gauss_newton_step(params, train_x, train_y, damping)
        lines.append(
            f"step {number:2}: Gauss-Newton {loss:.4f}, Adam {losses[number]:.4f}, "
            f"and {losses[passes * number - 1]:.4f} after as many passes"
        )
    print("\n".join(lines))
    for name, trained in (("Gauss-Newton", params), ("Adam", adams)):
        read = jax.vmap(logits, (None, 0))(trained, test_x).argmax(axis=1)
        print(
            f"{name}: test accuracy {(read == test_y).mean():.1%} on {len(test_y)} "
            "images"
        )


if __name__ == "__main__":
    main()
