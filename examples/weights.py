"""Soups, task vectors and moving averages of weights
==================================================

Weights are trees, as gradients are, and linear combinations of them are useful.

- **A soup** is the average of several trained networks, and reads as well as they do.
- **A task vector** is what training on a task has added to the weights. It can be added
  to a network or subtracted from it. Here two networks start from the same weights and
  learn half of the ten digits each; each forgets the other half. Add half of both task
  vectors to the start, and the network reads more of all ten digits than before.
- **A moving average** combines two trees at every step. In bfloat16 it stalls if you
  write it by hand: a hundredth of the difference is less than the spacing of the
  numbers. A `Vector` keeps its sums in float32, and rounds when you read the tree, so
  it does not stall. (It is rounded when it enters or leaves `jax.jit`. Inside a
  compiled step, keep the average in float32.)

All networks are small, and learn the digits of scikit-learn in some seconds. ::

    python examples/weights.py [--steps 200] [--output weights.png]
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

from pytree_grads import Vector, chain_rule_grad, linear_combination

OPTIMIZER = optax.adam(3e-3)


def logits(params: dict[str, jax.Array], image: jax.Array) -> jax.Array:
    """The network's scores of the ten digits for one image, (64,) -> (10,)."""
    return jax.nn.relu(image @ params["w"] + params["b"]) @ params["v"]


def surprise(
    params: dict[str, jax.Array], image: jax.Array, label: jax.Array
) -> jax.Array:
    """The cross-entropy of one image."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, image), label)


@jax.jit
def step(params, state, images, labels):
    """One step of Adam."""
    grads = chain_rule_grad(jnp.mean, surprise)(params, images, labels)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(params, images, labels, steps: int, seed: int):
    """The parameters after every step on random batches of 64 images."""
    generator, state = np.random.default_rng(seed), OPTIMIZER.init(params)
    for _ in tqdm(range(steps), desc=f"training {seed}", unit="step", leave=False):
        chosen = generator.integers(len(labels), size=64)
        params, state = step(params, state, images[chosen], labels[chosen])
        yield params


def trained(params, images, labels, steps: int, seed: int):
    """Where a training run ends."""
    *_, end = params, *train(params, images, labels, steps, seed)
    return end


def accuracy(params, images, labels) -> float:
    """The fraction of images that are read right."""
    return float(
        (jax.vmap(logits, (None, 0))(params, images).argmax(axis=1) == labels).mean()
    )


def draw(table: dict[str, list[float]], groups: Sequence[str], path: Path) -> None:
    """Draw how much each network reads of each group of digits."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    colors = ("#c8553d", "#3d6fc8", "#22223b")
    for i, (group, color) in enumerate(zip(groups, colors, strict=True)):
        places = np.arange(len(table))[::-1] + 0.25 * (1 - i)
        shares = [100 * shares[i] for shares in table.values()]
        axes.barh(places, shares, 0.22, color=color, label=f"of {group}")
    axes.set_yticks(range(len(table))[::-1], list(table))
    axes.set(xlim=(0, 100), xlabel="digits read, %")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Train a few networks, combine them and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=200, help="of a training (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("weights.png"))
    options = parser.parse_args(argv)
    steps = options.steps

    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    keys = jax.random.split(jax.random.key(0))
    start = {
        "w": jax.random.normal(keys[0], (64, 64)) / 6,
        "b": jnp.zeros(64),
        "v": jax.random.normal(keys[1], (64, 10)) / 6,
    }
    base = trained(start, train_x, train_y, steps // 8, seed=0)

    models = [trained(base, train_x, train_y, steps, seed) for seed in (1, 2, 3)]
    soup = linear_combination([1 / 3] * 3, models)
    each = ", ".join(f"{accuracy(model, test_x, test_y):.1%}" for model in models)
    together = f"{accuracy(soup, test_x, test_y):.1%}"
    print(f"three networks read {each} of the test images; their soup {together}")

    low, high = train_y < 5, train_y >= 5
    task, other = (
        Vector(trained(base, train_x[part], train_y[part], steps // 4, seed))
        - Vector(base)
        for part, seed in ((low, 4), (high, 5))
    )
    groups = {"0 to 4": test_y < 5, "5 to 9": test_y >= 5, "all": ...}
    table = {}
    for name, vector in (
        ("the start", Vector(base)),
        ("with the task of 0 to 4", Vector(base) + task),
        ("with the task of 5 to 9", Vector(base) + other),
        ("with half of both", Vector(base) + 0.5 * (task + other)),
        ("without the task of 0 to 4", Vector(base) - task),
    ):
        table[name] = [
            accuracy(vector.tree, test_x[part], test_y[part])
            for part in groups.values()
        ]
        parts = [
            f"{share:.1%} of {group}"
            for share, group in zip(table[name], groups, strict=True)
        ]
        print(f"{name:27} reads {', '.join(parts)}")
    draw(table, list(groups), options.output)

    rounded = optax.tree.cast(base, jnp.bfloat16)
    average, by_hand = Vector(rounded), rounded
    exact = optax.tree.cast(rounded, jnp.float32)
    for params in train(base, train_x, train_y, steps, seed=6):
        params = optax.tree.cast(params, jnp.bfloat16)
        average = 0.99 * average + 0.01 * Vector(params)
        by_hand = jax.tree.map(lambda a, p: 0.99 * a + 0.01 * p, by_hand, params)
        wide = optax.tree.cast(params, jnp.float32)
        exact = linear_combination([0.99, 0.01], [exact, wide])
    moved = Vector(exact) - Vector(optax.tree.cast(rounded, jnp.float32))
    for name, tree in (("Vector", average.tree), ("jax.tree.map", by_hand)):
        off = Vector(optax.tree.cast(tree, jnp.float32)) - Vector(exact)
        part = f"{off.norm() / moved.norm():.1%}"
        print(f"moving average in bfloat16 by {name}: off by {part} of its way")


if __name__ == "__main__":
    main()
