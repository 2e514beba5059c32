r"""One script for one device, for many, and for several processes
==============================================================

A network learns to read handwritten digits, some of which carry a wrong label. The
gradient of every image is clipped, so that no label, however wrong, pulls harder than
the bound. The script shards each batch over all devices that it finds, and does nothing
else about them. Each row of the Jacobian and its norm are on the device that holds the
image. Devices exchange only the mean of the clipped rows, and a number or two to
report. It prints the same losses in each of these ways to start it::

    python examples/multi_device.py
    JAX_NUM_CPU_DEVICES=8 python examples/multi_device.py
    for i in 0 1; do JAX_COORDINATOR_ADDRESS=127.0.0.1:9911 JAX_NUM_PROCESSES=2 \
        JAX_PROCESS_ID=$i python examples/multi_device.py & done; wait

On a cluster that JAX knows (Slurm, GKE, TPU pods) add `--cluster`, and JAX finds the
other processes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pytree_grads import value_and_jacobian

BATCH, MAX_NORM, WRONG = 256, 1.0, 0.2
optimizer = optax.adam(3e-3)


def find_other_processes(cluster: bool) -> None:
    """Join the other processes of the run, if there are any."""
    if cluster:
        jax.distributed.initialize()
    elif "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )


def logits(params, image):
    """The network's scores of the ten digits for one image, (64,) -> (10,)."""
    return jnp.tanh(image @ params["w"] + params["b"]) @ params["v"]


def loss(params, image, label):
    """How surprised the network is by the label of one image."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, image), label)


@jax.jit
def train_step(params, state, images, labels):
    """One step along the mean of clipped gradients; it knows nothing of devices."""
    losses, J = value_and_jacobian(loss)(params, images, labels)
    updates, state = optimizer.update(J.clip(MAX_NORM).mean(), state, params)
    return (
        optax.apply_updates(params, updates),
        state,
        losses.mean(),
        (J.norms() > MAX_NORM).mean(),
    )


@jax.jit
def accuracy(params, images, labels):
    """The part of the images that is read correctly."""
    return (jax.vmap(logits, (None, 0))(params, images).argmax(axis=1) == labels).mean()


def draw(seen: list[tuple[float, float]], path: Path) -> None:
    """Draw the loss of every step, and the share of clipped gradients."""
    losses, clipped = np.array(seen).T
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    above, below = figure.subplots(1, 2)
    above.plot(losses, color="#22223b")
    above.set(xlabel="step", ylabel="loss of the batch")
    below.plot(100 * clipped, color="#c8553d")
    below.set(xlabel="step", ylabel="clipped gradients, %", ylim=(0, 100))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    places = f"{jax.device_count()} devices, {jax.process_count()} processes"
    figure.suptitle(places, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Train on whatever is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=300, help="of training (%(default)s)"
    )
    parser.add_argument(
        "--cluster", action="store_true", help="let JAX find other processes"
    )
    parser.add_argument("--output", type=Path, default=Path("multi_device.png"))
    options = parser.parse_args(argv)

    find_other_processes(options.cluster)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    shared_out = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x, sharding):
        """An array of which every process makes the parts that its own devices hold."""
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    random = np.random.default_rng(0)  # the same numbers in every process
    wrong = random.random(len(train_y)) < WRONG
    train_y = np.where(wrong, random.integers(0, 10, len(train_y)), train_y).astype(
        np.int32
    )
    params = {
        "w": random.standard_normal((64, 64), np.float32) / 8,
        "b": np.zeros(64, np.float32),
        "v": random.standard_normal((64, 10), np.float32) / 8,
    }
    params = jax.tree.map(lambda x: place(x, everywhere), params)
    state = optimizer.init(params)

    def say(text):
        if jax.process_index() == 0:
            print(text, flush=True)

    every, seen = max(1, options.steps // 5), []
    say(f"{jax.device_count()} devices in {jax.process_count()} processes")
    for step in range(1, options.steps + 1):
        chosen = random.choice(len(train_x), BATCH, replace=False)
        batch = place(train_x[chosen], shared_out), place(train_y[chosen], shared_out)
        params, state, mean_loss, clipped = train_step(params, state, *batch)
        # A step at a time: simulated devices share the threads of one processor.
        jax.block_until_ready(params)
        seen.append((float(mean_loss), float(clipped)))
        if step % every == 0:
            average, part = np.mean(seen[-every:], axis=0)
            say(
                f"to step {step:4}: loss {average:.3f}, {part:.0%} of the gradients "
                "clipped"
            )
    read = accuracy(params, place(test_x, everywhere), place(test_y, everywhere))
    say(
        f"test accuracy {read:.1%}, with {WRONG:.0%} of the training labels drawn at "
        "random"
    )
    if jax.process_index() == 0:
        draw(seen, options.output)


if __name__ == "__main__":
    main()
