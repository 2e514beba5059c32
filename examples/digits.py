"""The gradient of every handwritten digit
=======================================

A small network learns the 1,797 scanned digits of scikit-learn. One jit-compiled step
does all the work. `value_and_jacobian` runs the network once. The same J gives the norm
of each image's own gradient, and the mean of the gradients, each clipped to a norm of
20. The norm says how strongly an image pulls at the network. Early in the training
every image pulls. Later few images do, and these are hard to read for a person too.

No gradient of a single image is ever built. Before the training, the script measures
what that saves on the same network and images: the time and memory of the loss, the
norms and the clipped mean. It compares them with `vmap(grad)`, which builds every
gradient, and with the ordinary gradient of the batch, which gives no norms. ::

    python examples/digits.py [--steps 1500] [--output digits.png]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import ticker
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from pytree_grads import jacobian, value_and_jacobian

BATCH_SIZE, MAX_NORM = 64, 20.0
INK, QUIET, ACCENT = "#22223b", "#8d8d9b", "#c8553d"


# ---------------------------------------------------------------------------- the model


def init_params(
    key: jax.Array, widths: Sequence[int] = (64, 128, 128, 10)
) -> list[dict]:
    """A list of dense layers.

    The weights of each are scaled to its number of inputs.
    """
    shapes = list(pairwise(widths))
    return [
        {
            "w": jax.random.normal(key, shape) * (2 / shape[0]) ** 0.5,
            "b": jnp.zeros(shape[1]),
        }
        for key, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]


def logits(params: list[dict], image: jax.Array) -> jax.Array:
    """The network's scores of the ten digits for one image, (64,) -> (10,)."""
    *hidden, last = params
    for layer in hidden:
        image = jax.nn.relu(image @ layer["w"] + layer["b"])
    return image @ last["w"] + last["b"]


def surprise(params: list[dict], image: jax.Array, label: jax.Array) -> jax.Array:
    """The cross-entropy of one image: what the network did not expect, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, image), label)


def jitter(key: jax.Array, image: jax.Array) -> jax.Array:
    """The image moved by at most one pixel in each direction, (64,) -> (64,)."""
    corner = jax.random.randint(key, (2,), 0, 3)
    return jax.lax.dynamic_slice(
        jnp.pad(image.reshape(8, 8), 1), corner, (8, 8)
    ).ravel()


def norms_of_gradients(params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The norm of each image's own gradient, (N,)."""
    return jacobian(surprise)(params, images, labels).norms()


# ------------------------------------------- loss, clipped mean and norms, and the cost


def from_factors(params, images, labels):
    """Mean loss, mean of the clipped gradients and their norms before, in one pass."""
    losses, J = value_and_jacobian(surprise)(params, images, labels)
    return losses.mean(), J.clip(MAX_NORM).mean(), J.norms()


def from_rows(params, images, labels):
    """What `from_factors` returns, from the stacked gradients of all images."""
    losses, rows = jax.vmap(jax.value_and_grad(surprise), (None, 0, 0))(
        params, images, labels
    )
    norms = jax.vmap(optax.tree.norm)(rows)
    weights = jnp.minimum(1.0, MAX_NORM / norms) / len(norms)
    return (
        losses.mean(),
        jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), rows),
        norms,
    )


def ordinary(params, images, labels):
    """Mean loss and its gradient, without norms and without clipping."""

    def mean_loss(params):
        return jax.vmap(surprise, (None, 0, 0))(params, images, labels).mean()

    return jax.value_and_grad(mean_loss)(params)


WAYS: dict[str, Callable] = {
    "ordinary gradient": ordinary,
    "pytree_grads": from_factors,
    "vmap(grad)": from_rows,
}


@dataclass(frozen=True)
class Cost:
    """What one call takes."""

    milliseconds: float
    mebibytes: float  # beside arguments and results


def costs(params, images, labels, rounds: int = 11) -> dict[str, Cost]:
    """Median times, taken in turns, and temporary memory of compiled programs."""
    args = params, images, labels
    programs = {name: jax.jit(way).lower(*args).compile() for name, way in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            times[name].append(time.perf_counter() - start)
    return {
        name: Cost(
            1e3 * float(np.median(times[name][1:])),  # the first call warms up
            program.memory_analysis().temp_size_in_bytes / 2**20,
        )
        for name, program in programs.items()
    }


# ------------------------------------------------------------------------- the training


@dataclass(frozen=True)
class History:
    """Loss and norms of every step, and accuracies now and then."""

    losses: np.ndarray  # (steps,)
    norms: np.ndarray  # (steps, batch)
    checked: np.ndarray  # (checks,): the steps at which the accuracies were taken
    train_accuracy: np.ndarray  # (checks,)
    test_accuracy: np.ndarray  # (checks,)


def train(train_set, test_set, steps: int, seed: int) -> tuple[list[dict], History]:
    """Train for so many steps, with a progress bar."""
    images, labels = map(jnp.asarray, train_set)
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-2)

    @jax.jit
    def step(params, opt_state, chosen, key):
        keys = jax.random.split(key, len(chosen))
        batch = jax.vmap(jitter)(keys, images[chosen]), labels[chosen]
        loss, gradient, norms = from_factors(params, *batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, norms

    @jax.jit
    def accuracy(params, images, labels):
        read = jax.vmap(logits, (None, 0))(params, images).argmax(axis=1)
        return (read == labels).mean()

    key = jax.random.key(seed)
    params = init_params(key)
    opt_state = optimizer.init(params)
    losses, norms, checks = [], [], []
    bar = tqdm(
        batches(len(labels), steps, seed), total=steps, desc="training", unit="step"
    )
    for number, chosen in enumerate(bar, start=1):
        params, opt_state, loss, norm = step(
            params, opt_state, chosen, jax.random.fold_in(key, number)
        )
        losses.append(loss)
        norms.append(norm)
        if number == 1 or number % 25 == 0 or number == steps:
            right = (
                float(accuracy(params, images, labels)),
                float(accuracy(params, *test_set)),
            )
            checks.append((number, *right))
            bar.set_postfix(
                loss=f"{loss:.3f}", test=f"{right[1]:.1%}", norm=f"{norm.mean():.2f}"
            )
    checked, train_accuracy, test_accuracy = np.array(checks).T
    history = History(
        np.array(losses), np.array(norms), checked, train_accuracy, test_accuracy
    )
    return params, history


def batches(count: int, steps: int, seed: int):
    """The indices of each batch: all images in a random order, then again."""
    generator = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int32)
    for _ in range(steps):
        while len(order) < BATCH_SIZE:
            order = np.concatenate(
                [order, generator.permutation(count).astype(np.int32)]
            )
        yield order[:BATCH_SIZE]
        order = order[BATCH_SIZE:]


# --------------------------------------------------------------------------- the figure


@dataclass(frozen=True)
class Surprises:
    """Training images, hardest pull first."""

    images: np.ndarray  # (n, 64)
    labels: np.ndarray  # (n,)
    read: np.ndarray  # (n,): the network's reading
    belief: np.ndarray  # (n,): its probability for the label
    norms: np.ndarray  # (n,)


def most_surprising(params, train_set, count: int) -> Surprises:
    """The training images whose gradients are the largest."""
    images, labels = train_set
    norms = np.asarray(jax.jit(norms_of_gradients)(params, images, labels))
    first = np.argsort(-norms)[:count]
    odds = jax.nn.softmax(jax.vmap(logits, (None, 0))(params, images[first]), axis=1)
    belief = np.asarray(odds)[np.arange(len(first)), labels[first]]
    read = np.asarray(odds.argmax(axis=1))
    return Surprises(images[first], labels[first], read, belief, norms[first])


def draw(history: History, surprises: Surprises, cost: dict[str, Cost]) -> Figure:
    """Loss, accuracy, norms over time, their cost, and the most surprising digits."""
    figure = Figure(figsize=(15, 7.4), facecolor="white", layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2.3, 1), hspace=0.02)
    left, middle, right = above.subfigures(1, 3, width_ratios=(1, 1.45, 0.9))
    loss_axes, accuracy_axes = left.subplots(2, 1, sharex=True)
    draw_loss(loss_axes, history.losses)
    draw_accuracy(accuracy_axes, history)
    draw_norms(middle.subplots(), history.norms)
    time_axes, memory_axes = right.subplots(2, 1)
    draw_costs(
        time_axes, "time", "ms", {name: x.milliseconds for name, x in cost.items()}
    )
    draw_costs(
        memory_axes, "memory", "MiB", {name: x.mebibytes for name, x in cost.items()}
    )
    draw_digits(below, surprises)
    return figure


def tidy(axes, title: str) -> None:
    """Only what is needed to read the curve."""
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9, which="both")


def draw_loss(axes, losses: np.ndarray) -> None:
    """Every batch in the background, the running mean in front."""
    steps = np.arange(1, len(losses) + 1)
    window = np.minimum(steps, max(1, len(losses) // 40))
    sums = np.insert(np.cumsum(losses), 0, 0.0)
    axes.plot(steps, losses, color=QUIET, alpha=0.4, linewidth=0.6)
    axes.plot(steps, (sums[steps] - sums[steps - window]) / window, color=INK)
    axes.set_yscale("log")
    tidy(axes, "loss of the batch")


def draw_accuracy(axes, history: History) -> None:
    """Training and test accuracy."""
    for name, values, colour in (
        ("train", history.train_accuracy, QUIET),
        ("test", history.test_accuracy, ACCENT),
    ):
        axes.plot(
            history.checked, values, color=colour, label=f"{name} {values[-1]:.1%}"
        )
    axes.set_ylim(min(0.8, history.test_accuracy[-1] - 0.1), 1.005)
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("step", color=QUIET)
    axes.legend(frameon=False, loc="lower right", fontsize=10, labelcolor="linecolor")
    tidy(axes, "accuracy")


def draw_norms(axes, norms: np.ndarray) -> None:
    """A histogram of the norms for each stretch of the training, side by side."""
    steps = len(norms)
    columns = min(60, steps)
    levels = np.log10(np.maximum(norms, 1e-30))
    highest = levels.max() + 0.1
    edges = np.linspace(max(np.quantile(levels, 0.01), highest - 6), highest, 46)
    stretches = np.array_split(levels, columns)
    density = np.stack(
        [np.histogram(part, edges)[0] / part.size for part in stretches], axis=1
    )
    ends = np.linspace(0.5, steps + 0.5, columns + 1)
    shade = LinearSegmentedColormap.from_list(
        "shade", ["white", "#f2cc8f", ACCENT, "#4a1942"]
    )
    # Square roots of the shares: the eye sees faint tails as well.
    scale = PowerNorm(0.5, vmin=0, vmax=np.quantile(density, 0.998))
    mesh = axes.pcolormesh(
        ends, 10**edges, density, cmap=shade, norm=scale, rasterized=True
    )
    bar = axes.figure.colorbar(
        mesh,
        ax=axes,
        orientation="horizontal",
        extend="max",
        aspect=45,
        shrink=0.9,
        pad=0.02,
    )
    bar.set_label("share of the images in these steps with this norm", color=QUIET)
    bar.ax.xaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    bar.ax.tick_params(colors=QUIET, labelsize=9)
    bar.outline.set_edgecolor(QUIET)
    axes.axhline(
        MAX_NORM, color=INK, linewidth=1.0, linestyle=":", label="clipping bound"
    )
    middles = (ends[:-1] + ends[1:]) / 2
    for quantile, style, name in (
        (0.99, "--", "99th percentile"),
        (0.5, "-", "median"),
    ):
        values = [10 ** np.quantile(part, quantile) for part in stretches]
        axes.plot(
            middles, values, color=INK, linewidth=1.4, linestyle=style, label=name
        )
    axes.set_yscale("log")
    axes.set_ylim(10 ** edges[0], 10 ** edges[-1])
    axes.set_xlabel("step", color=QUIET)
    axes.legend(frameon=False, loc="lower left", fontsize=10, labelcolor=INK)
    tidy(axes, "norm of each image's own gradient")


def draw_costs(axes, what: str, unit: str, values: dict[str, float]) -> None:
    """A bar for each way."""
    names = [
        f"{name},\nno norms" if name == "ordinary gradient" else name for name in values
    ]
    bars = axes.barh(
        names, list(values.values()), color=[QUIET, ACCENT, INK], height=0.6
    )
    axes.bar_label(
        bars, [f" {x:.2g} {unit}" for x in values.values()], color=INK, fontsize=10
    )
    axes.set_xlim(0, 1.35 * max(values.values()))
    axes.invert_yaxis()
    tidy(axes, f"{what} for {BATCH_SIZE} images, in {unit}")
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.set_xticks([])  # the numbers stand at the bars
    axes.spines["bottom"].set_visible(False)


def draw_digits(figure, surprises: Surprises) -> None:
    """The images with the largest gradients, their labels and predictions."""
    figure.suptitle(
        "the training images with the largest gradients",
        x=0.008,
        ha="left",
        color=INK,
        fontsize=11,
        fontweight="bold",
    )
    for axes, image, label, read, belief, norm in zip(
        figure.subplots(1, len(surprises.labels)),
        surprises.images,
        surprises.labels,
        surprises.read,
        surprises.belief,
        surprises.norms,
        strict=True,
    ):
        axes.imshow(image.reshape(8, 8), cmap="gray_r", interpolation="nearest")
        axes.set_axis_off()
        wrong = read != label
        axes.set_title(
            f"{label}, read as {read}" if wrong else f"{label}, {belief:.0%} sure",
            color=ACCENT if wrong else INK,
            fontsize=10,
        )
        axes.text(
            0.5,
            -0.06,
            f"norm {norm:.2g}",
            transform=axes.transAxes,
            ha="center",
            va="top",
            color=QUIET,
            fontsize=9,
        )


# -------------------------------------------------------------------------- the program


def report_costs(count: int, cost: dict[str, Cost]) -> None:
    """A line for each way."""
    print(f"loss, clipped mean and norms of {count:,} images:")
    for name, each in cost.items():
        note = ", without norms and clipping" if name == "ordinary gradient" else ""
        print(
            f"  {name:18} {each.milliseconds:7.2f} ms, {each.mebibytes:7.2f} MiB{note}"
        )


def main(argv: Sequence[str] | None = None) -> float:
    """Train, report, draw; returns the test accuracy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=1500, help="steps of training (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights and order (%(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("digits.png"),
        help="the figure (%(default)s)",
    )
    options = parser.parse_args(argv)

    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    start = init_params(jax.random.key(options.seed))
    cost = costs(start, train_x[:BATCH_SIZE], train_y[:BATCH_SIZE])
    report_costs(BATCH_SIZE, cost)
    report_costs(len(train_y), costs(start, train_x, train_y))
    params, history = train(
        (train_x, train_y), (test_x, test_y), options.steps, options.seed
    )
    surprises = most_surprising(params, (train_x, train_y), count=10)

    accuracy = float(history.test_accuracy[-1])
    print(f"test accuracy {accuracy:.1%} on {len(test_y)} images never trained on")
    print("training images with the largest gradients:")
    for label, read, belief, norm in list(
        zip(
            surprises.labels,
            surprises.read,
            surprises.belief,
            surprises.norms,
            strict=True,
        )
    )[:5]:
        print(
            f"  a {label}, read as {read}: norm {norm:.3g}, {belief:.0%} sure of the "
            f"{label}"
        )
    figure = draw(history, surprises, cost)
    figure.savefig(options.output, dpi=150, bbox_inches="tight", pad_inches=0.15)
    print(f"figure saved to {options.output}")
    return accuracy


if __name__ == "__main__":
    main()
