"""Two tasks on one network: who gives way?
========================================

A small network with two heads reads scanned digits. Every image is two digits, one laid
over the other in a mirror. The first head must name the plain one, the second the
mirrored one. The trunk is narrow, so the gradients of the two losses often conflict.
Moreover, the second loss is counted in tenths of a nat, so that its gradient is ten
times as large: losses of different tasks seldom have the same unit.

Five rules train the same network on the same batches: the mean, UPGrad, MGDA, CAGrad
and Nash-MTL. One call, `combined_value_and_grad`, makes the step. The figure shows the
cosine of the two gradients over the training; the cosine of the step with the gradient
that it serves worse (below zero, a loss rises); and what both heads can read in the
end. ::

    python examples/two_tasks.py [--steps 1000] [--output two_tasks.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import ticker
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

from pytree_grads import weightings

WIDTH, BATCH, UNITS = 24, 64, 10.0
INK, QUIET = "#22223b", "#8d8d9b"
RULES: dict[str, Callable] = {
    "mean": weightings.mean,
    "upgrad": weightings.upgrad,
    "mgda": weightings.mgda,
    "cagrad": weightings.cagrad,
    "nash_mtl": weightings.nash_mtl,
}
COLOURS = dict(
    zip(RULES, ["#8d8d9b", "#c8553d", "#3d7ea6", "#588157", "#b5838d"], strict=True)
)


# ---------------------------------------------------------------- data and model


def pairs(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple:
    """Each digit with another one laid over it in a mirror: (N, 64), (N,), (N,)."""
    other = np.random.default_rng(seed).permutation(len(labels))
    mirrored = images.reshape(-1, 8, 8)[other, :, ::-1].reshape(-1, 64)
    both = np.maximum(images, mirrored)
    return jnp.asarray(both), jnp.asarray(labels), jnp.asarray(labels[other])


def init_params(key: jax.Array) -> tuple[dict, dict]:
    """A trunk 64-24-24, and two heads 24-10."""
    keys = jax.random.split(key, 4)

    def dense(key, rows, columns):
        w = jax.random.normal(key, (rows, columns)) * (2 / rows) ** 0.5
        return {"w": w, "b": jnp.zeros(columns)}

    trunk = {"first": dense(keys[0], 64, WIDTH), "second": dense(keys[1], WIDTH, WIDTH)}
    heads = {"digit": dense(keys[2], WIDTH, 10), "mirror": dense(keys[3], WIDTH, 10)}
    return trunk, heads


def scores(trunk: dict, heads: dict, images: jax.Array) -> dict[str, jax.Array]:
    """The scores of both heads, (B, 10) each."""
    x = images
    for layer in (trunk["first"], trunk["second"]):
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return {name: x @ head["w"] + head["b"] for name, head in heads.items()}


def losses(trunk: dict, heads: dict, images, digits, mirrored) -> jax.Array:
    """The two losses of a batch, (2,)."""
    found = scores(trunk, heads, images)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    first = entropy(found["digit"], digits).mean()
    return jnp.stack([first, UNITS * entropy(found["mirror"], mirrored).mean()])


# ----------------------------------------------------------------------------- training


@dataclass
class Run:
    """What a run remembers of every step."""

    losses: list = field(default_factory=list)  # (2,) each
    cosines: list = field(default_factory=list)
    gains: list = field(default_factory=list)  # (2,): products with the unit direction
    accuracies: list = field(default_factory=list)  # (2,) now and then
    checked: list = field(default_factory=list)


def train(name: str, data: tuple, test: tuple, steps: int) -> Run:
    """One run, with a progress bar."""

    def rule(gram: jax.Array) -> tuple[jax.Array, tuple]:
        """The weights, and what the picture shows: the cosine and the gains."""
        weights = RULES[name](gram)
        norms = jnp.sqrt(jnp.diagonal(gram))
        length = jnp.sqrt(weights @ gram @ weights)
        cosine = gram[0, 1] / (norms[0] * norms[1])
        return weights, (cosine, gram @ weights / (length * norms))

    step_of = weightings.combined_value_and_grad(losses, rule, heads=True, has_aux=True)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    @jax.jit
    def step(params, state, *batch):
        (values, seen), grads = step_of(*params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, values, seen

    @jax.jit
    def accuracy(params):
        found = scores(*params, test[0])
        return jnp.stack(
            [
                (found["digit"].argmax(1) == test[1]).mean(),
                (found["mirror"].argmax(1) == test[2]).mean(),
            ]
        )

    run, params = Run(), init_params(jax.random.key(0))
    state = optimizer.init(params)
    generator = np.random.default_rng(1)
    bar = tqdm(range(1, steps + 1), desc=f"{name:8}")
    for number in bar:
        chosen = generator.choice(len(data[1]), BATCH, replace=False)
        params, state, values, (cosine, gains) = step(
            params, state, *(x[chosen] for x in data)
        )
        run.losses.append(values)
        run.cosines.append(cosine)
        run.gains.append(gains)
        if number % max(1, steps // 30) == 0 or number == steps:
            run.checked.append(number)
            run.accuracies.append(np.asarray(accuracy(params)))
            digit, mirror = run.accuracies[-1]
            bar.set_postfix(digit=f"{digit:.1%}", mirror=f"{mirror:.1%}")
    for kept in ("losses", "cosines", "gains", "accuracies"):
        setattr(run, kept, np.asarray(jnp.stack(getattr(run, kept))))
    return run


# --------------------------------------------------------------------------- the figure


def tidy(axes, title: str) -> None:
    """Only what is needed to read the curve."""
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9)


def smooth(values: np.ndarray) -> np.ndarray:
    """A moving average over a thirtieth of the steps."""
    window = max(1, len(values) // 30)
    return np.convolve(values, np.ones(window) / window, "valid")


def draw(runs: dict[str, Run], data: tuple) -> Figure:
    """Some images, cosines, gains, and accuracies."""
    figure = Figure(figsize=(14, 8), facecolor="white", layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 4.2))
    for axes, image, digit, mirror in zip(
        above.subplots(1, 12), *(np.asarray(x[:12]) for x in data), strict=True
    ):
        axes.imshow(image.reshape(8, 8), cmap="gray_r")
        axes.set_title(f"{digit} and {mirror}", color=INK, fontsize=10)
        axes.set_axis_off()
    left, right = below.subfigures(1, 2, width_ratios=(1.5, 1))
    cosines, gains = left.subplots(2, 1, sharex=True)
    for name, run in runs.items():
        style = {"color": COLOURS[name], "label": name}
        cosines.plot(smooth(run.cosines), **style)
        gains.plot(smooth(run.gains.min(axis=1)), **style)
    for axes in (cosines, gains):
        axes.axhline(0, color=INK, linewidth=0.7)
    cosines.legend(frameon=False, labelcolor="linecolor", ncol=5, loc="lower left")
    gains.set_xlabel("step", color=QUIET)
    tidy(cosines, "cosine of the gradients of the two losses")
    tidy(gains, "cosine of the step with the worse-off gradient: below 0, a loss rises")
    accuracy = right.subplots()
    for name, run in runs.items():
        digit, mirror = run.accuracies.T
        accuracy.plot(digit, mirror, color=COLOURS[name], linewidth=0.8, alpha=0.5)
        accuracy.scatter(digit[-1], mirror[-1], color=COLOURS[name], s=60, zorder=3)
        accuracy.annotate(
            name, (digit[-1], mirror[-1]), (6, -3), textcoords="offset points",
            color=COLOURS[name], fontsize=10,
        )  # fmt: skip
    finals = np.array([run.accuracies[-1] for run in runs.values()])
    low, high = finals.min() - 0.08, finals.max() + 0.04
    accuracy.plot([low, high], [low, high], color=QUIET, linewidth=0.7, linestyle=":")
    accuracy.set_xlim(low, high)
    accuracy.set_ylim(low, high)
    for axis in (accuracy.xaxis, accuracy.yaxis):
        axis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    accuracy.set_xlabel("the digit is read", color=QUIET)
    accuracy.set_ylabel("the mirrored digit is read", color=QUIET)
    tidy(accuracy, "test accuracy of both heads")
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    """Train with each rule, report, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("two_tasks.png"))
    options = parser.parse_args(argv)

    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train_set, test_set = order[:1400], order[1400:]
    data = pairs(images[train_set], labels[train_set], seed=2)
    test = pairs(images[test_set], labels[test_set], seed=3)
    runs = {name: train(name, data, test, options.steps) for name in RULES}
    for name, run in runs.items():
        rises = (run.gains < -1e-3).any(axis=1).mean()
        digit, mirror = run.accuracies[-1]
        print(
            f"{name:8} a loss rises in {rises:5.1%} of the steps; reads {digit:.1%} of "
            f"the digits, {mirror:.1%} of the mirrored ones"
        )
    conflicts = (runs["mean"].cosines < 0).mean()
    print(f"with the mean, the gradients conflict in {conflicts:.0%} of the steps")
    figure = draw(runs, data)
    figure.savefig(options.output, dpi=130, bbox_inches="tight", pad_inches=0.15)
    print(f"figure saved to {options.output}")
    return runs


if __name__ == "__main__":
    main()
