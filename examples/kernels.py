"""A network as a kernel, and its limit
====================================

The tangent kernel of a network is Θ(x, x′) = Σₖ ⟨∇fₖ(x), ∇fₖ(x′)⟩, the inner products
of the gradients of its outputs: `jacobian(f)(params, x).gram(trace=True)`. If the
gradients did not change during training, training would be a regression with this
kernel. On scanned digits, four kernels learn from 50 to 1,200 labels: the kernel of a
network before its training, the kernel of the same network after it, the closed form of
an infinitely wide network, and plain products of pixels. The script compares them with
the network itself.

Then it tests the closed form, which is known for two layers of rectified units. The
kernel of a random network of m units approaches it like m^(−1/2). The script prints the
distance for growing widths, and the slope of a line through the logarithms.

The figure shows the kernels before and after training, images sorted by their digit;
test accuracy by the number of labels; and the distance by width. ::

    python examples/kernels.py [--steps 300] [--seeds 24] [--output kernels.png]
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
from tqdm import tqdm

from pytree_grads import jacobian

WIDTH, BLOCK, RIDGE = 256, 300, 1e-3
LABELS = (50, 100, 200, 400, 800, 1200)
WIDTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
INK, QUIET, ACCENT, BLUE = "#22223b", "#8d8d9b", "#c8553d", "#3d7ea6"
COLOURS = {
    "pixels": QUIET,
    "before training": BLUE,
    "infinite width": INK,
    "after training": ACCENT,
    "the network": ACCENT,
}


# ------------------------------------------------------------------------- the network


def init(key: jax.Array, width: int, outputs: int = 10) -> dict[str, jax.Array]:
    """A network of two layers without biases; every number has variance 1."""
    first, second = jax.random.split(key)
    return {
        "w": jax.random.normal(first, (64, width)),
        "v": jax.random.normal(second, (width, outputs)),
    }


def network(params: dict[str, jax.Array], image: jax.Array) -> jax.Array:
    """The scores of the digits, (64,) -> (10,)."""
    hidden = jax.nn.relu(image @ params["w"])
    return hidden @ params["v"] / params["v"].shape[0] ** 0.5


@jax.jit
def block_of_kernel(params, images, others) -> jax.Array:
    """Θ between some images and others."""
    J, J_others = (jacobian(network)(params, x) for x in (images, others))
    return J.gram(J_others, trace=True)


def tangent_kernel(name: str, params, images, others) -> np.ndarray:
    """Θ of all images, some lines at a time, with a progress bar."""
    parts = range(0, len(images), BLOCK)
    return np.concatenate(
        [
            np.asarray(block_of_kernel(params, images[i : i + BLOCK], others))
            for i in tqdm(parts, desc=name, leave=False)
        ]
    )


def infinite_kernel(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The limit of Θ for one output, by arc-cosines (Cho and Saul 2009, Jacot 2018)."""
    products = images.astype(float) @ others.T.astype(float)
    sizes = np.linalg.norm(images, axis=1)[:, None] * np.linalg.norm(others, axis=1)
    angle = np.arccos(np.clip(products / sizes, -1, 1))
    of_v = sizes * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
    of_w = products * (np.pi - angle) / (2 * np.pi)
    return of_v + of_w


@jax.jit
def train(params, images, labels, steps) -> dict[str, jax.Array]:
    """So many steps of Adam on all images."""
    optimizer = optax.adam(0.03)

    def loss(params):
        scores = jax.vmap(network, (None, 0))(params, images)
        targets = jax.nn.one_hot(labels, 10) - 0.1
        return jnp.mean(jnp.sum((scores - targets) ** 2, axis=1))

    def step(_, carry):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]


# -------------------------------------------------------------------------- regression


def accuracy(kernel: np.ndarray, cross: np.ndarray, labels, truth) -> float:
    """Of kernel ridge regression: (N, N) of the training images, (Q, N) of the test."""
    targets = np.eye(10)[labels] - 0.1
    ridge = RIDGE * np.trace(kernel) / len(kernel) * np.eye(len(kernel))
    scores = cross @ np.linalg.solve(kernel.astype(float) + ridge, targets)
    return float((scores.argmax(axis=1) == truth).mean())


def learn(params, data: tuple, test: tuple, steps: int) -> dict[str, float]:
    """The test accuracy of each way, from some labels."""
    images, labels = data
    trained = train(params, images, labels, steps)
    scores = jax.vmap(network, (None, 0))(trained, test[0])
    found = {
        "the network": float((np.asarray(scores).argmax(axis=1) == test[1]).mean())
    }
    for name, of in (("before training", params), ("after training", trained)):
        kernel = tangent_kernel(name, of, images, images)
        cross = tangent_kernel(name, of, test[0], images)
        found[name] = accuracy(kernel, cross, labels, test[1])
    for name, fun in (("infinite width", infinite_kernel), ("pixels", np.inner)):
        kernel, cross = fun(images, images), fun(test[0], images)
        found[name] = accuracy(kernel, cross, labels, test[1])
    return found


# --------------------------------------------------------------------- wider and wider


def distances(images: np.ndarray, seeds: int) -> list[float]:
    """The root mean square distance of Θ from its limit, relative, for each width."""
    limit = infinite_kernel(images, images)

    @jax.jit
    def kernels(keys, units):
        def one(key):
            params = init(key, len(units), outputs=1)
            return jacobian(lambda p, x: network(p, x)[0])(params, images).gram()

        return jax.lax.map(one, keys)

    keys, found = jax.random.split(jax.random.key(1), seeds), []
    for width in tqdm(WIDTHS, desc="widths", leave=False):
        off = np.asarray(kernels(keys, jnp.zeros(width))) - limit
        sizes = np.linalg.norm(off, axis=(1, 2)) / np.linalg.norm(limit)
        found.append(float(np.sqrt(np.mean(sizes**2))))
    return found


# -------------------------------------------------------------------------- the figure


def tidy(axes, title: str) -> None:
    """Only what is needed to read the curve."""
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9)


def draw_kernel(axes, kernel: np.ndarray, labels: np.ndarray, title: str) -> None:
    """A kernel as correlations, images sorted by their digit."""
    scale = np.sqrt(np.diagonal(kernel))
    image = kernel / scale[:, None] / scale
    axes.imshow(image, cmap="magma", vmin=0, vmax=1)
    middles = [np.flatnonzero(labels == digit).mean() for digit in range(10)]
    axes.set_xticks(middles, range(10))
    axes.set_yticks(middles, range(10))
    axes.tick_params(colors=QUIET, labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")


def draw(
    kernels: dict, labels, counts, curves: dict, off: list[float], slope: float
) -> Figure:
    """Two kernels, accuracies, and distances."""
    figure = Figure(figsize=(11, 9.5), layout="constrained")
    (one, two), (accuracies, widths) = figure.subplots(2, 2)
    for axes, (name, kernel) in zip((one, two), kernels.items(), strict=True):
        draw_kernel(axes, kernel, labels, f"tangent kernel {name}")
    for name, colour in COLOURS.items():
        line = "--" if name == "the network" else "-"
        values = [100 * x for x in curves[name]]
        accuracies.plot(counts, values, line, color=colour, label=name, marker=".")
    accuracies.set_xscale("log")
    accuracies.set_xticks(counts, map(str, counts))
    accuracies.minorticks_off()
    accuracies.set_xlabel("labels", color=QUIET)
    accuracies.legend(frameon=False, labelcolor="linecolor", loc="lower right")
    tidy(accuracies, "test accuracy of regression with each kernel, in percent")
    line = np.array(WIDTHS) ** -0.5 * off[0] * WIDTHS[0] ** 0.5
    widths.loglog(WIDTHS, line, color=QUIET, linestyle=":", label="slope −1/2")
    label = f"found: slope {slope:.2f}".replace("-", "−")
    widths.loglog(WIDTHS, off, "o", color=ACCENT, label=label)
    widths.set_xticks(WIDTHS[::2], map(str, WIDTHS[::2]))
    widths.set_yticks([0.05, 0.1, 0.2, 0.4], ["0.05", "0.1", "0.2", "0.4"])
    widths.minorticks_off()
    widths.set_xlabel("width", color=QUIET)
    widths.legend(frameon=False, labelcolor="linecolor")
    tidy(widths, "distance from the kernel of infinite width, relative")
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Regress, widen, report, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="(%(default)s)")
    parser.add_argument(
        "--labels", type=int, nargs="+", default=LABELS, help="how many to learn from"
    )
    parser.add_argument("--seeds", type=int, default=24, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("kernels.png"))
    options = parser.parse_args(argv)

    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order], labels[order]
    test = images[1200:], labels[1200:]

    params = init(jax.random.key(0), WIDTH)
    curves: dict[str, list[float]] = {name: [] for name in COLOURS}
    for count in tqdm(options.labels, desc="labels"):
        found = learn(params, (images[:count], labels[:count]), test, options.steps)
        for name, value in found.items():
            curves[name].append(value)
    print(f"test accuracy from {', '.join(map(str, options.labels))} labels")
    for name, values in curves.items():
        told = "  ".join(f"{100 * x:.1f}%" for x in values)
        print(f"{name:16} {told}")

    off = distances(images[:100], options.seeds)
    slope = float(np.polyfit(np.log(WIDTHS), np.log(off), 1)[0])
    for width, value in zip(WIDTHS, off, strict=True):
        print(f"width {width:5}  distance {value:.4f}")
    print(f"slope {slope:.3f} in log width (the limit theorem: -0.5)")

    trained = train(params, images[:1200], labels[:1200], options.steps)
    shown = np.argsort(labels[1200:1500], kind="stable") + 1200
    kernels = {
        name: tangent_kernel(name, of, images[shown], images[shown])
        for name, of in (("before training", params), ("after training", trained))
    }
    figure = draw(kernels, labels[shown], options.labels, curves, off, slope)
    figure.savefig(options.output, dpi=110, bbox_inches="tight", pad_inches=0.15)
    print(f"figure saved to {options.output}")
    return curves


if __name__ == "__main__":
    main()
