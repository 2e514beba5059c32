"""How large should a batch be?
============================

The gradient noise scale tr Σ / ‖G‖² is the batch size at which the noise of the mean
gradient is as large as the gradient itself. With a smaller batch, doubling it nearly
halves the number of steps; with a larger one, it gains little. A small network reads
scanned digits, and `statistics.noise_scale` takes both parts from the J of the step.
The script averages each part over steps, and divides last. An average of the ratios of
single steps would fail, since single estimates of ‖G‖² are often negative.

First the script repeats known numbers for softmax regression on all 1,797 images. Then
the figure shows both parts and their ratio over the training, for the whole network and
for each layer. ::

    python examples/noise_scale.py [--steps 600] [--output noise_scale.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

from pytree_grads import jacobian, statistics

BATCH, DECAY = 64, 0.99
INK, QUIET, ACCENT = "#22223b", "#8d8d9b", "#c8553d"
LAYERS = {"first": "#3d7ea6", "second": "#588157", "last": "#b5838d"}
# tr Σ without bias over the plain ‖G‖², and over ‖G‖² without bias; by step.
KNOWN = {
    0: (72.0, 75.0),
    10: (97.4, 103.0),
    100: (528.8, 749.3),
    300: (1838.4, -79748.0),
}


# ------------------------------------------------------------- the known numbers first


def linear_loss(params: dict, image: jax.Array, label: jax.Array) -> jax.Array:
    """Softmax regression: the cross-entropy of one image."""
    scores = image @ params["w"] + params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, label)


def compare(images: jax.Array, labels: jax.Array) -> None:
    """Print the noise scales of full batches beside the known ones."""

    @jax.jit
    def step(params):
        J = jacobian(linear_loss)(params, images, labels)
        pairs = [statistics.noise_scale(J, unbiased=u) for u in (False, True)]
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, J.mean()), pairs

    params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
    print("softmax regression, all images; in brackets the known numbers:")
    for number in range(max(KNOWN) + 1):
        params, (plain, unbiased) = step(params)
        if number in KNOWN:
            print(
                f"  step {number:3}: {plain.ratio():.1f} ({KNOWN[number][0]}), without "
                f"bias {unbiased.ratio():.1f} ({KNOWN[number][1]})"
            )


# -------------------------------------------------------------------------- the network


def init_params(key: jax.Array) -> dict:
    """Three dense layers, 64-128-128-10."""
    shapes = list(pairwise((64, 128, 128, 10)))
    return {
        name: {
            "w": jax.random.normal(k, shape) * (2 / shape[0]) ** 0.5,
            "b": jnp.zeros(shape[1]),
        }
        for name, k, shape in zip(LAYERS, jax.random.split(key, 3), shapes, strict=True)
    }


def loss(params: dict, image: jax.Array, label: jax.Array) -> jax.Array:
    """The cross-entropy of one image."""
    for name in ("first", "second"):
        image = jax.nn.relu(image @ params[name]["w"] + params[name]["b"])
    scores = image @ params["last"]["w"] + params["last"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, label)


@dataclass(frozen=True)
class History:
    """A row for each step."""

    losses: np.ndarray  # (steps,)
    single: statistics.NoiseScale  # of each step, (steps,)
    average: statistics.NoiseScale  # moving averages, (steps,)
    layers: dict[str, np.ndarray]  # the ratio of moving averages, (steps,) each


def train(images: jax.Array, labels: jax.Array, steps: int) -> History:
    """Train by gradient descent, with the noise scale in the progress bar."""
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.05, steps))

    @jax.jit
    def step(params, state, average, number, chosen):
        J = jacobian(loss)(params, images[chosen], labels[chosen])
        whole = statistics.noise_scale(J)
        layers = statistics.noise_scale(J, labels={name: name for name in LAYERS})
        now = whole, layers
        # As Adam corrects its averages, so that the first steps count in full.
        average = jax.tree.map(lambda a, b: DECAY * a + (1 - DECAY) * b, average, now)
        shown = jax.tree.map(lambda a: a / (1 - DECAY**number), average)
        updates, state = optimizer.update(J.mean(), state, params)
        params = optax.apply_updates(params, updates)
        value = jax.vmap(loss, (None, 0, 0))(params, images[chosen], labels[chosen])
        return params, state, average, (value.mean(), whole, shown)

    params = init_params(jax.random.key(0))
    state = optimizer.init(params)
    zero = jnp.zeros(())
    parts = dict.fromkeys(LAYERS, zero)
    average = statistics.NoiseScale(zero, zero), statistics.NoiseScale(parts, parts)
    seen, generator = [], np.random.default_rng(0)
    bar = tqdm(range(1, steps + 1), desc="training", unit="step")
    for number in bar:
        chosen = generator.choice(len(labels), BATCH, replace=False)
        params, state, average, out = step(
            params, state, average, jnp.float32(number), chosen
        )
        seen.append(out)
        if number % 25 == 0:
            bar.set_postfix(loss=f"{out[0]:.3f}", noise=f"{out[2][0].ratio():.0f}")
    losses, single, (whole, layers) = jax.tree.map(
        lambda *x: np.asarray(jnp.stack(x)), *seen
    )
    return History(losses, single, whole, layers.ratio())


# --------------------------------------------------------------------------- the figure


def tidy(axes, title: str) -> None:
    """Only what is needed to read the curve."""
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9)
    axes.set_yscale("log")


def positive(values: np.ndarray) -> np.ndarray:
    """What a logarithmic axis can show."""
    return np.where(values > 0, values, np.nan)


def draw(history: History) -> Figure:
    """Both parts, their ratio, and the ratio of each layer."""
    figure = Figure(figsize=(14, 4.8), facecolor="white", layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps = np.arange(1, len(history.losses) + 1)
    for name, colour in (("trace", ACCENT), ("squared_norm", INK)):
        single = getattr(history.single, name)
        left.scatter(
            steps[single > 0], single[single > 0], s=2, color=colour, alpha=0.25
        )
        label = {"trace": "tr Σ", "squared_norm": "‖G‖²"}[name]
        left.plot(steps, getattr(history.average, name), color=colour, label=label)
    floor = np.percentile(
        history.single.squared_norm[history.single.squared_norm > 0], 1
    )
    negative = history.single.squared_norm < 0
    left.scatter(
        steps[negative], np.full(negative.sum(), floor), s=8, marker="|", color=INK,
        label=f"‖G‖² estimated below 0: {negative.mean():.0%}",
    )  # fmt: skip
    left.set_ylim(bottom=floor / 30)
    left.legend(frameon=False, fontsize=10, loc="lower left")
    middle.plot(steps, positive(history.average.ratio()), color=ACCENT)
    middle.axhline(BATCH, color=QUIET, linestyle=":")
    middle.text(steps[-1], BATCH * 1.08, f"the batch, {BATCH}", color=QUIET, ha="right")
    for name, colour in LAYERS.items():
        right.plot(steps, positive(history.layers[name]), color=colour, label=name)
    right.legend(frameon=False, labelcolor="linecolor", fontsize=10)
    tidy(left, "both parts: dots of single steps, lines of averages")
    tidy(middle, "the batch size that the noise advises")
    tidy(right, "and that of each layer")
    for axes in (left, middle, right):
        axes.set_xlabel("step", color=QUIET)
    return figure


def main(argv: Sequence[str] | None = None) -> History:
    """Compare with known numbers, train, report, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("noise_scale.png"))
    options = parser.parse_args(argv)

    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 16, jnp.float32)
    labels = jnp.asarray(labels, jnp.int32)
    compare(images, labels)
    history = train(images, labels, options.steps)
    first, last = (
        float(history.average.ratio()[i]) for i in (len(history.losses) // 20, -1)
    )
    print(f"the advised batch grows from {first:.0f} to {last:.0f}")
    single = history.single
    print(
        f"‖G‖² is estimated below 0 in {(single.squared_norm < 0).mean():.0%} of the "
        f"steps; the mean of all ratios is {single.ratio().mean():.0f}, the ratio of "
        f"means {single.trace.mean() / single.squared_norm.mean():.0f}"
    )
    figure = draw(history)
    figure.savefig(options.output, dpi=130, bbox_inches="tight", pad_inches=0.15)
    print(f"figure saved to {options.output}")
    return history


if __name__ == "__main__":
    main()
