"""Images that helped and hurt, and wrong labels found
===================================================

A tenth of the labels of scanned digits is wrong, on purpose. Softmax regression with a
penalty fits them all as well as it can. `attribution.influence` says what leaving one
training image out would do to the loss of others. It uses conjugate gradients, and no
retraining. Four scores rank the suspects: the influence of an image on its own loss;
how much it hurts a hundred validation images, by influence or by TracIn over
checkpoints; and its own loss. The script counts how many of the first suspects have
planted labels. In a model this simple, the loss finds them too. Only influence says
which images they hurt.

Then a network learns from the same labels. Of every 128 images it takes the 32 whose
gradients lower the loss of validation images most, by one product, `J @ v`.

The figure shows two test images with those that helped and hurt them most, the share of
planted labels among the suspects, and the accuracy of the network with chosen and with
random images. ::

    python examples/attribution.py [--steps 400] [--output attribution.png]
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

from pytree_grads import attribution, gauss_newton_product, jacobian

L2, DRAWN, TAKEN, WIDTH = 1e-3, 128, 32, 64
INK, QUIET, ACCENT, BLUE = "#22223b", "#8d8d9b", "#c8553d", "#3d7ea6"
COLOURS = {
    "influence on itself": INK,
    "influence on others": ACCENT,
    "TracIn on others": BLUE,
    "its loss": QUIET,
}


def logits(w: jax.Array, image: jax.Array) -> jax.Array:
    """The scores of softmax regression, (64,) -> (10,)."""
    return image @ w


def loss(w: jax.Array, image: jax.Array, label: jax.Array) -> jax.Array:
    """The cross-entropy of one image."""
    scores = logits(w, image)
    return optax.softmax_cross_entropy_with_integer_labels(scores, label)


def penalised(w: jax.Array, image: jax.Array, label: jax.Array) -> jax.Array:
    """What the training minimises the mean of."""
    return loss(w, image, label) + L2 / 2 * jnp.sum(w**2)


# --------------------------------------------------------------------- who taught it


def train(images: jax.Array, labels: jax.Array, steps: int) -> list[jax.Array]:
    """Checkpoints of gradient descent with momentum on all images."""
    optimizer = optax.sgd(0.5, momentum=0.9)

    def objective(w):
        return jax.vmap(penalised, (None, 0, 0))(w, images, labels).mean()

    @jax.jit
    def step(w, state):
        updates, state = optimizer.update(jax.grad(objective)(w), state, w)
        return optax.apply_updates(w, updates), state

    w = jnp.zeros((64, 10))
    state, path = optimizer.init(w), []
    for number in tqdm(range(steps), desc="regression", unit="step"):
        if number % max(1, steps // 8) == 0:
            path.append(w)
        w, state = step(w, state)
    return [*path, w]


def influences(w: jax.Array, query: tuple, data: tuple) -> jax.Array:
    """What leaving each image out would add to the loss of each query: (Q, N)."""

    def mean_loss(scores):
        return optax.softmax_cross_entropy_with_integer_labels(scores, data[1]).mean()

    product = gauss_newton_product(mean_loss, logits)(w, data[0])
    return attribution.influence(
        jacobian(loss)(w, *query),
        jacobian(penalised)(w, *data),
        product,
        damping=L2,
        tolerance=1e-3,
    )


def precision(suspicion: np.ndarray, is_wrong: np.ndarray) -> np.ndarray:
    """The share of planted labels among the first k suspects, for each k."""
    found = is_wrong[np.argsort(-suspicion)]
    return np.cumsum(found) / np.arange(1, len(found) + 1)


# ------------------------------------------------------------------- whom to learn from


def init_network(key: jax.Array) -> dict[str, jax.Array]:
    """A network 64-64-10."""
    first, second = jax.random.split(key)
    return {
        "w": jax.random.normal(first, (64, WIDTH)) / 8,
        "b": jnp.zeros(WIDTH),
        "v": jax.random.normal(second, (WIDTH, 10)) / 8,
    }


def read(params: dict, image: jax.Array) -> jax.Array:
    """The scores of the network, (64,) -> (10,)."""
    return jnp.tanh(image @ params["w"] + params["b"]) @ params["v"]


def network_loss(params: dict, image: jax.Array, label: jax.Array) -> jax.Array:
    """The cross-entropy of one image."""
    scores = read(params, image)
    return optax.softmax_cross_entropy_with_integer_labels(scores, label)


def learn(name: str, data: tuple, valid: tuple, test: tuple, steps: int) -> list:
    """Test accuracies, with or without a choice of the images to learn from."""
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, images, labels):
        J = jacobian(network_loss)(params, images, labels)
        gains = J @ jacobian(network_loss)(params, *valid).mean()
        if name == "any":
            gains = jnp.arange(DRAWN, 0.0, -1.0)
        chosen = (gains >= jnp.sort(gains)[-TAKEN]).astype(gains.dtype)
        grads = J.weighted_sum(chosen / chosen.sum())
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def tested(params):
        found = jax.vmap(read, (None, 0))(params, test[0]).argmax(axis=1)
        return (found == test[1]).mean()

    params, generator = init_network(jax.random.key(0)), np.random.default_rng(3)
    state, seen = optimizer.init(params), []
    bar = tqdm(range(1, steps + 1), desc=f"network, {name}", unit="step")
    for number in bar:
        drawn = generator.choice(len(data[1]), DRAWN, replace=False)
        params, state = step(params, state, *(x[drawn] for x in data))
        if number % max(1, steps // 25) == 0 or number == steps:
            seen.append((number, float(tested(params))))
            bar.set_postfix(test=f"{seen[-1][1]:.1%}")
    return seen


# --------------------------------------------------------------------------- the figure


def tidy(axes, title: str) -> None:
    """Only what is needed to read the curve."""
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9)


def draw_image(axes, image, label, is_wrong: bool, title: str = "") -> None:
    """A digit with its label, in red if the label was planted."""
    axes.imshow(np.asarray(image).reshape(8, 8), cmap="Greys")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(ACCENT if is_wrong else QUIET)
    axes.spines[:].set_linewidth(2.5 if is_wrong else 0.8)
    axes.set_xlabel(f"“{label}”", color=ACCENT if is_wrong else INK, fontsize=11)
    axes.set_title(title, loc="left", color=INK, fontsize=10, fontweight="bold")


def draw(shown, scores, data, is_wrong, curves, seen) -> Figure:
    """Images that helped and hurt, precision, accuracies."""
    figure = Figure(figsize=(14, 8), facecolor="white", layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.05, 1])
    words = "in a red frame: a wrong label that was planted"
    above.suptitle(words, color=ACCENT, fontsize=10, x=0.01, ha="left")
    grid = above.subplots(2, 11)
    for row, (image, label), own in zip(
        grid, zip(*shown, strict=True), scores, strict=True
    ):
        draw_image(row[0], image, label, False, "test image")
        order = np.argsort(-own)
        for i, n in enumerate([*order[:5], *order[::-1][:5]]):
            title = {0: "helped most", 5: "hurt most"}.get(i, "")
            draw_image(row[i + 1], data[0][n], data[1][n], is_wrong[n], title)
    precisions, accuracies = below.subplots(1, 2)
    wrong = int(is_wrong.sum())
    for name, curve in curves.items():
        precisions.plot(
            np.arange(1, len(curve) + 1), 100 * curve, label=name, color=COLOURS[name]
        )
    precisions.axvline(wrong, color=QUIET, linewidth=0.7, linestyle=":")
    precisions.axhline(100 * is_wrong.mean(), color=QUIET, linewidth=0.7, linestyle=":")
    precisions.set_xlim(1, 3 * wrong)
    precisions.set_ylim(0, 102)
    precisions.set_xlabel(
        f"suspects (dotted: the {wrong} that were planted)", color=QUIET
    )
    precisions.legend(frameon=False, labelcolor="linecolor")
    tidy(precisions, "planted wrong labels among the first suspects, in percent")
    for (name, points), colour in zip(seen.items(), (QUIET, ACCENT), strict=True):
        steps, values = np.array(points).T
        label = (
            f"any {TAKEN} images"
            if name == "any"
            else f"the best {TAKEN} of {DRAWN} by J @ v"
        )
        accuracies.plot(steps, 100 * values, color=colour, label=label)
    accuracies.set_xlabel("step", color=QUIET)
    accuracies.legend(frameon=False, labelcolor="linecolor")
    tidy(
        accuracies,
        "test accuracy of a network that learns from these labels, in percent",
    )
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Train, attribute, report, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("attribution.png"))
    options = parser.parse_args(argv)

    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    generator = np.random.default_rng(0)
    order = generator.permutation(len(labels))
    first, middle, last = order[:1200], order[1200:1300], order[1300:]
    is_wrong = generator.random(1200) < 0.1
    shift = generator.integers(1, 10, 1200)
    told = np.where(is_wrong, (labels[first] + shift) % 10, labels[first])
    data = jnp.asarray(images[first]), jnp.asarray(told.astype(np.int32))
    valid, test = (
        (jnp.asarray(images[part]), jnp.asarray(labels[part]))
        for part in (middle, last)
    )

    path = train(*data, options.steps)
    harm = -np.asarray(influences(path[-1], valid, data)).mean(axis=0)
    pairs = ((jacobian(loss)(w, *valid), jacobian(loss)(w, *data)) for w in path)
    traced = -np.asarray(attribution.tracin(pairs, [1.0] * len(path))).mean(axis=0)
    own = np.asarray(jax.vmap(loss, (None, 0, 0))(path[-1], *data))
    itself = np.diagonal(influences(path[-1], data, data))
    suspicions = {
        "influence on itself": itself,
        "influence on others": harm,
        "TracIn on others": traced,
        "its loss": own,
    }
    curves = {name: precision(x, is_wrong) for name, x in suspicions.items()}
    wrong = int(is_wrong.sum())
    for name, curve in curves.items():
        share = f"{curve[wrong - 1]:.0%}"
        print(f"{name:20} of the first {wrong} suspects, {share} were planted")
    seen = {
        name: learn(name, data, valid, test, options.steps) for name in ("any", "best")
    }
    for name, points in seen.items():
        print(f"network, {name:4} test accuracy {points[-1][1]:.1%}")

    losses = np.asarray(jax.vmap(loss, (None, 0, 0))(path[-1], *test))
    asked = np.argsort(-losses)[[4, 20]]  # hard images: others have much to say on them
    shown = test[0][asked], test[1][asked]
    scores = np.asarray(influences(path[-1], shown, data))
    figure = draw(shown, scores, data, is_wrong, curves, seen)
    figure.savefig(options.output, dpi=130, bbox_inches="tight", pad_inches=0.15)
    print(f"figure saved to {options.output}")
    return curves


if __name__ == "__main__":
    main()
