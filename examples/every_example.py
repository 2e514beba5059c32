"""A step that makes no image of the batch worse
=============================================

A step along the mean gradient of a batch makes some of its images worse, often a third
of them. UPGrad, with every example as its own loss (instance-wise risk minimisation,
arXiv 2406.16232), gives a direction along which no loss of the batch rises. It needs
the inner products of all gradients. `J.gram()` computes these from factors, and builds
no gradient of an example. Both rules train the same network on the same batches of
scanned digits.

The figure shows the losses, for how many images of each batch the step raises the loss,
the cosines of all gradients with the steps, and what the parts of a step cost. UPGrad
lowers the loss faster at first, and needs a small learning rate: at 0.3 it falls behind
the mean. ::

    python examples/every_example.py [--steps 400] [--output every_example.png]
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

from pytree_grads import jacobian, value_and_jacobian, weightings

BATCH, WIDTH = 32, 256
INK, QUIET, ACCENT = "#22223b", "#8d8d9b", "#c8553d"
RULES: dict[str, Callable] = {"mean": weightings.mean, "upgrad": weightings.upgrad}
COLOURS = {"mean": QUIET, "upgrad": ACCENT}


def init_params(key: jax.Array) -> list[dict]:
    """A network 64-256-256-10."""
    shapes = list(pairwise((64, WIDTH, WIDTH, 10)))
    return [
        {"w": jax.random.normal(k, s) * (2 / s[0]) ** 0.5, "b": jnp.zeros(s[1])}
        for k, s in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]


def logits(params: list[dict], image: jax.Array) -> jax.Array:
    """The scores of the ten digits, (64,) -> (10,)."""
    *hidden, last = params
    for layer in hidden:
        image = jax.nn.relu(image @ layer["w"] + layer["b"])
    return image @ last["w"] + last["b"]


def loss(params: list[dict], image: jax.Array, label: jax.Array) -> jax.Array:
    """The cross-entropy of one image."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, image), label)


# ----------------------------------------------------------------------------- training


@dataclass
class Run:
    """What a run remembers of every step."""

    losses: list = field(default_factory=list)
    losers: list = field(default_factory=list)  # the share of images that lose
    cosines: list = field(default_factory=list)  # (BATCH,) each, with the step
    checked: list = field(default_factory=list)
    test: list = field(default_factory=list)


def train(name: str, data: tuple, test: tuple, steps: int) -> Run:
    """One run, with a progress bar."""
    optimizer = optax.sgd(0.05)

    @jax.jit
    def step(params, state, images, labels):
        values, J = value_and_jacobian(loss)(params, images, labels)
        gram = J.gram()
        weights = RULES[name](gram)
        products = gram @ weights
        length = jnp.sqrt(jnp.maximum(weights @ products, 1e-30))
        cosines = products / (length * jnp.sqrt(jnp.diagonal(gram)))
        updates, state = optimizer.update(J.weighted_sum(weights), state, params)
        params = optax.apply_updates(params, updates)
        return params, state, (values.mean(), (cosines < -1e-3).mean(), cosines)

    @jax.jit
    def tested(params):
        read = jax.vmap(logits, (None, 0))(params, test[0]).argmax(axis=1)
        return (read == test[1]).mean()

    run, params = Run(), init_params(jax.random.key(0))
    state, generator = optimizer.init(params), np.random.default_rng(1)
    bar = tqdm(range(1, steps + 1), desc=f"{name:6}", unit="step")
    for number in bar:
        chosen = generator.choice(len(data[1]), BATCH, replace=False)
        params, state, seen = step(params, state, *(x[chosen] for x in data))
        for kept, value in zip(
            (run.losses, run.losers, run.cosines), seen, strict=True
        ):
            kept.append(value)
        if number % max(1, steps // 30) == 0 or number == steps:
            run.checked.append(number)
            run.test.append(float(tested(params)))
            bar.set_postfix(test=f"{run.test[-1]:.1%}", losers=f"{seen[1]:.0%}")
    for kept in ("losses", "losers", "cosines"):
        setattr(run, kept, np.asarray(jnp.stack(getattr(run, kept))))
    return run


# ----------------------------------------------------------------------------- the cost


def costs(images: jax.Array, labels: jax.Array, rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of the parts of a step, taken in turns."""
    params = init_params(jax.random.key(0))

    def ordinary(params):
        return jax.grad(
            lambda p: jax.vmap(loss, (None, 0, 0))(p, images, labels).mean()
        )(params)

    def from_rows(params):
        rows = jax.vmap(jax.grad(loss), (None, 0, 0))(params, images, labels)
        leaves = [x.reshape(len(x), -1) for x in jax.tree.leaves(rows)]
        return sum(x @ x.T for x in leaves)

    def whole(params):
        J = jacobian(loss)(params, images, labels)
        return J.weighted_sum(weightings.upgrad(J.gram()))

    ways = {
        "ordinary gradient": ordinary,
        "Gramian, from factors": lambda p: jacobian(loss)(p, images, labels).gram(),
        "Gramian, from vmap(grad)": from_rows,
        "Gramian, UPGrad, sum": whole,
    }
    ways = {name: jax.jit(way) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way(params))
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(x[1:])) for name, x in times.items()}


def beside_torchjd(gram: np.ndarray) -> float | None:
    """The largest difference from TorchJD's weights, where it is installed."""
    if importlib.util.find_spec("torchjd") is None:
        return None
    import torch
    from torchjd.aggregation import UPGradWeighting

    theirs = UPGradWeighting()(torch.tensor(gram)).numpy()
    ours = weightings.upgrad(jnp.asarray(gram), regularization=1e-4)
    return float(np.abs(np.asarray(ours) - theirs).max())


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


def draw(runs: dict[str, Run], cost: dict[str, float]) -> Figure:
    """Losses, losers, cosines and costs."""
    figure = Figure(figsize=(14, 8), facecolor="white", layout="constrained")
    (losses, losers), (cosines, bars) = figure.subplots(2, 2)
    bins = np.linspace(-1, 1, 81)
    for name, run in runs.items():
        style = {"color": COLOURS[name], "label": name}
        losses.plot(smooth(run.losses), **style)
        losers.plot(100 * smooth(run.losers), **style)
        cosines.hist(run.cosines.ravel(), bins, alpha=0.6, density=True, **style)
    losses.set_yscale("log")
    losses.legend(frameon=False, labelcolor="linecolor")
    cosines.legend(frameon=False, labelcolor="linecolor")
    cosines.axvline(0, color=INK, linewidth=0.7)
    for axes in (losses, losers):
        axes.set_xlabel("step", color=QUIET)
    drawn = bars.barh(
        list(cost), list(cost.values()), color=[QUIET, ACCENT, INK, ACCENT]
    )
    bars.bar_label(drawn, [f" {x:.2f} ms" for x in cost.values()], color=INK)
    bars.set_xlim(0, 1.25 * max(cost.values()))
    bars.invert_yaxis()
    bars.set_xticks([])
    tidy(losses, "mean loss of the batch")
    tidy(losers, "images of the batch that lose by the step, in percent")
    tidy(cosines, "cosine of each image's gradient with the step")
    tidy(bars, f"time for {BATCH} images")
    bars.tick_params(axis="y", labelcolor=INK, length=0)
    bars.spines["bottom"].set_visible(False)
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    """Train with both rules, report, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("every_example.png"))
    options = parser.parse_args(argv)

    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    first, rest = order[:1400], order[1400:]
    data = jnp.asarray(images[first]), jnp.asarray(labels[first])
    test = jnp.asarray(images[rest]), jnp.asarray(labels[rest])

    cost = costs(data[0][:BATCH], data[1][:BATCH])
    plain = cost["ordinary gradient"]
    for name, milliseconds in cost.items():
        print(f"{name:24} {milliseconds:6.2f} ms, {milliseconds / plain:.1f} gradients")
    runs = {name: train(name, data, test, options.steps) for name in RULES}
    for name, run in runs.items():
        print(
            f"{name:6} loss {smooth(run.losses)[-1]:.3f}, test accuracy "
            f"{run.test[-1]:.1%}; {run.losers.mean():.1%} of the images lose by a step"
        )
    J = jacobian(loss)(init_params(jax.random.key(0)), data[0][:8], data[1][:8])
    away = beside_torchjd(np.asarray(J.gram()))
    if away is None:
        print("TorchJD is not installed: no comparison of the weights")
    else:
        print(f"weights differ from TorchJD's by at most {away:.1e}")
    figure = draw(runs, cost)
    figure.savefig(options.output, dpi=130, bbox_inches="tight", pad_inches=0.15)
    print(f"figure saved to {options.output}")
    return runs


if __name__ == "__main__":
    main()
