"""What single texts tell about a language model
=============================================

A transformer of two layers learns Python's own help pages, letter by letter. Every row
of J is the gradient of one piece of text. The script tries two ideas on these rows.

**Noise scale.** Do the normalisation layers, which hold few parameters, predict the
gradient noise scale of the whole network (arXiv 2411.00999)? At every step the script
takes both, and fits a line through their moving averages.

**Per-example Adam** (arXiv 2510.00236). Adam divides by the root of the squared mean
gradient. Here it divides by the root of the mean of all squared gradients,
`J.square_sum() / N`. Both variants start from the same weights, on the same texts, each
at the best of a few learning rates. Adam wins here, as in the paper: it is better to
divide by the mean of the gradients than by their spread. ::

    python examples/language_model.py [--steps 600] [--output language_model.png]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

from pytree_grads import Jacobian, statistics, value_and_jacobian

LETTERS, LENGTH, WIDTH, HEADS, LAYERS, BATCH, DECAY = 96, 48, 48, 4, 2, 32, 0.97
INK, QUIET, ACCENT, COOL = "#22223b", "#8d8d9b", "#c8553d", "#3d7ea6"


# ------------------------------------------------------------------- the text and model


def letters() -> np.ndarray:
    """All help pages as numbers below 96: printable ASCII, and one for all else."""
    text = "\n".join(topics[name] for name in sorted(topics))
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)
    return np.where((codes >= 32) & (codes < 127), codes - 31, 0)


def init_params(key: jax.Array) -> dict:
    """Embeddings, layers with two norms each, and a last norm; the output is tied."""
    keys = iter(jax.random.split(key, 2 + 4 * LAYERS))

    def dense(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns)) * rows**-0.5

    def norm() -> dict:
        return {"scale": jnp.ones(WIDTH), "shift": jnp.zeros(WIDTH)}

    layers = [
        {
            "norm_1": norm(),
            "qkv": dense(WIDTH, 3 * WIDTH),
            "out": dense(WIDTH, WIDTH),
            "norm_2": norm(),
            "up": dense(WIDTH, 4 * WIDTH),
            "down": dense(4 * WIDTH, WIDTH),
        }
        for _ in range(LAYERS)
    ]
    embeddings = 0.5 * jax.random.normal(next(keys), (LETTERS, WIDTH))
    places = 0.1 * jax.random.normal(next(keys), (LENGTH, WIDTH))
    return {"letters": embeddings, "places": places, "layers": layers, "norm": norm()}


def normalised(norm: dict, x: jax.Array) -> jax.Array:
    """Layer norm with a scale and a shift, (T, d)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    unit = centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return unit * norm["scale"] + norm["shift"]


def loss(params: dict, text: jax.Array) -> jax.Array:
    """The mean cross-entropy of the next letter, of one text (T + 1,)."""
    x = params["letters"][text[:-1]] + params["places"]
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    for layer in params["layers"]:
        qkv = normalised(layer["norm_1"], x) @ layer["qkv"]
        q, k, v = (y.reshape(LENGTH, HEADS, -1) for y in jnp.split(qkv, 3, axis=-1))
        scores = jnp.einsum("thd,shd->hts", q, k) * (WIDTH // HEADS) ** -0.5
        odds = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        mixed = jnp.einsum("hts,shd->thd", odds, v).reshape(LENGTH, WIDTH)
        x = x + mixed @ layer["out"]
        hidden = jax.nn.gelu(normalised(layer["norm_2"], x) @ layer["up"])
        x = x + hidden @ layer["down"]
    scores = normalised(params["norm"], x) @ params["letters"].T
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return entropy(scores, text[1:]).mean()


def kinds(params: dict) -> dict:
    """A label for each part: normalisation layers, and the rest."""

    def kind(path: tuple, _: jax.Array) -> str:
        return "norms" if "norm" in jax.tree_util.keystr(path) else "rest"

    return jax.tree_util.tree_map_with_path(kind, params)


# ------------------------------------------------------------ per-example Adam


class Moments(NamedTuple):
    """What Adam keeps: the number of steps, and two moving averages."""

    count: jax.Array
    first: dict
    second: dict


def adam_from(squares: Callable[[Jacobian], dict]) -> Callable:
    """A step of Adam whose second moment is an average of ``squares(J)``."""

    def step(J: Jacobian, moments: Moments, rate: jax.Array) -> tuple[dict, Moments]:
        count = moments.count + 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments.first, J.mean())
        second = jax.tree.map(
            lambda m, s: 0.99 * m + 0.01 * s, moments.second, squares(J)
        )

        def update(m: jax.Array, s: jax.Array) -> jax.Array:
            m, s = m / (1 - 0.9**count), s / (1 - 0.99**count)
            return -rate * m / (jnp.sqrt(s) + 1e-8)

        return jax.tree.map(update, first, second), Moments(count, first, second)

    return step


OPTIMIZERS = {
    "Adam": adam_from(lambda J: jax.tree.map(jnp.square, J.mean())),
    "per-example Adam": adam_from(statistics.fisher_diagonal),
}
# Dividing by larger numbers asks for a larger rate; each is the best of a few.
RATES = {"Adam": 1e-2, "per-example Adam": 3e-2}


# ----------------------------------------------------------------------------- training


@dataclass(frozen=True)
class History:
    """A row for each step."""

    losses: np.ndarray  # (steps,)
    held_out: list[tuple[int, float]]
    noise: dict[str, np.ndarray]  # of the norms, and of all: (steps,) each


def train(name: str, text: np.ndarray, steps: int, rate: float) -> History:
    """One run, with a progress bar."""
    optimizer = OPTIMIZERS[name]
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 20, steps, rate / 10)
    params = init_params(jax.random.key(0))
    labels = kinds(params)

    @jax.jit
    def step(params, moments, average, number, texts):
        values, J = value_and_jacobian(loss)(params, texts)
        parts = statistics.noise_scale(J, labels=labels)
        average = jax.tree.map(lambda a, b: DECAY * a + (1 - DECAY) * b, average, parts)
        updates, moments = optimizer(J, moments, schedule(number))
        return optax.apply_updates(params, updates), moments, average, values.mean()

    @jax.jit
    def held_out(params):
        return jax.vmap(loss, (None, 0))(params, tested).mean()

    cut = int(0.9 * len(text))
    generator = np.random.default_rng(0)
    ends = generator.integers(cut, len(text) - LENGTH - 1, 128)
    tested = jnp.asarray(text[ends[:, None] + np.arange(LENGTH + 1)])
    zeros = jax.tree.map(jnp.zeros_like, params)
    moments = Moments(jnp.zeros((), jnp.float32), zeros, zeros)
    nothing = dict.fromkeys(("norms", "rest"), jnp.zeros(()))
    average = statistics.NoiseScale(nothing, nothing)
    losses, averages, checks = [], [], []
    bar = tqdm(range(steps), desc=f"{name:16}", unit="step")
    for number in bar:
        starts = generator.integers(0, cut - LENGTH - 1, BATCH)
        texts = text[starts[:, None] + np.arange(LENGTH + 1)]
        params, moments, average, value = step(
            params, moments, average, jnp.int32(number), texts
        )
        losses.append(value)
        averages.append(average)
        if (number + 1) % max(1, steps // 15) == 0 or number + 1 == steps:
            checks.append((number + 1, float(held_out(params))))
            bar.set_postfix(held_out=f"{checks[-1][1]:.3f}")
    stacked = jax.tree.map(lambda *x: np.asarray(jnp.stack(x)), *averages)
    whole = (sum(x.values()) for x in (stacked.trace, stacked.squared_norm))
    noise = {
        "norms": stacked.ratio()["norms"],
        "all": statistics.NoiseScale(*whole).ratio(),
    }
    return History(np.asarray(losses), checks, noise)


def relation(history: History) -> tuple[np.ndarray, float, float]:
    """Which steps count, the correlation, and the slope through zero."""
    norms, whole = history.noise["norms"], history.noise["all"]
    counts = (norms > 0) & (whole > 0) & (np.arange(len(norms)) >= 1 / (1 - DECAY))
    x, y = norms[counts], whole[counts]
    return counts, float(np.corrcoef(x, y)[0, 1]), float((x @ y) / (x @ x))


# --------------------------------------------------------------------------- the figure


def tidy(axes, title: str) -> None:
    """Only what is needed to read the curve."""
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelsize=9)


def draw(runs: dict[str, History]) -> Figure:
    """Noise scales over time and against each other, and the losses of both."""
    figure = Figure(figsize=(14, 4.6), facecolor="white", layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    history = runs["Adam"]
    counts, correlation, slope = relation(history)
    steps = np.arange(1, len(counts) + 1)
    for name, colour in (("all", INK), ("norms", ACCENT)):
        values = np.where(counts, history.noise[name], np.nan)
        text = {"all": "the whole network", "norms": "normalisation layers"}[name]
        left.plot(steps, values, color=colour, label=text)
    left.legend(frameon=False, labelcolor="linecolor")
    left.set_xlabel("step", color=QUIET)
    x, y = history.noise["norms"][counts], history.noise["all"][counts]
    middle.scatter(x, y, c=steps[counts], cmap="copper_r", s=10)
    line = np.array([0.0, x.max()])
    middle.plot(line, slope * line, color=QUIET, linestyle=":")
    middle.text(
        0.05, 0.92, f"slope {slope:.2f}, correlation {correlation:.2f}",
        transform=middle.transAxes, color=INK,
    )  # fmt: skip
    middle.set_xlabel("noise scale of the normalisation layers", color=QUIET)
    for (name, run), colour in zip(runs.items(), (COOL, ACCENT), strict=True):
        window = max(1, len(run.losses) // 30)
        smooth = np.convolve(run.losses, np.ones(window) / window, "valid")
        right.plot(steps[window - 1 :], smooth, color=colour, alpha=0.4)
        right.plot(*zip(*run.held_out, strict=True), color=colour, label=name)
    right.legend(frameon=False, labelcolor="linecolor")
    right.set_xlabel("step", color=QUIET)
    tidy(left, "gradient noise scale")
    tidy(middle, "the whole network's, over that of its norms")
    tidy(right, "held-out loss, and of the batches (pale)")
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, History]:
    """Train with both optimizers, report, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("language_model.png"))
    options = parser.parse_args(argv)

    text = letters()
    runs = {name: train(name, text, options.steps, RATES[name]) for name in OPTIMIZERS}
    _, correlation, slope = relation(runs["Adam"])
    print(
        f"noise scale of the network over that of its norms: correlation "
        f"{correlation:.2f}, slope {slope:.2f}"
    )
    for name, run in runs.items():
        print(f"{name:16} held-out loss {run.held_out[-1][1]:.3f} nats a letter")
    figure = draw(runs)
    figure.savefig(options.output, dpi=130, bbox_inches="tight", pad_inches=0.15)
    print(f"figure saved to {options.output}")
    return runs


if __name__ == "__main__":
    main()
