"""Time both sides of each number in `pytree_grads/_engine/thresholds.py`.

    python benchmarks/constants.py [--only apart narrow ...] [--seconds 2]
                                   [--save [NAME]]

Each row of the table is a small model in which one number decides between two ways. The
package works in the way called `below` if the size is less than the number, and in the
way called `above` otherwise. Each ratio divides what `above` takes by what `below`
takes, in the same run. A number is well placed if the ratio falls below 1 at that size.
The column `taken` says which way the package takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from _figures import log_progress
from _images import conv
from _layers import Draw, Problem, dense
from _measure import (
    Program,
    compile_program,
    environment,
    human_seconds,
    interleaved,
    markdown_table,
)
from _results import add_save_option, save
from _ways import ours

from pytree_grads._engine import thresholds

HUGE = thresholds.NEVER


@dataclass(frozen=True)
class Case:
    """A model in which a threshold decides, and the size that is compared with it."""

    name: str
    size: int
    problem: Problem
    product: str
    below: int = HUGE  # a threshold at which the model takes the way `below`
    above: int = 0  # and one at which it takes the way `above`

    @property
    def is_above(self) -> bool:
        """Whether the package takes the way `above`."""
        limit = getattr(thresholds.current(), self.name)
        return self.size > limit if self.name in LAST else self.size >= limit


# A size equal to one of these numbers is below it; for all other numbers it is above.
LAST = (
    "dearer",
    "entries_at_once",
    "squares_at_once",
    "small",
    "apart",
    "narrow",
    "shared",
    "pairs",
    "compared",
)


def compiled(case: Case, value: int) -> Program:
    with thresholds.changed(**{case.name: value}):
        return compile_program(
            ours(case.problem, case.product), *case.problem.args, repeats=3
        )


# --------------------------------------------------------------------------------------
# Models


def layer(n: int, m: int, k: int) -> Problem:
    """One dense layer of m inputs and k outputs, and its bias."""
    draw = Draw("layer")

    def fun(p, x):
        return jnp.sum(jnp.tanh(dense(p, x)))

    return Problem(fun, draw.dense(m, k), (draw(n, m),))


def many_layers(n: int, layers: int, d: int) -> Problem:
    draw = Draw("many layers")

    def fun(p, x):
        for own in p:
            x = jnp.tanh(dense(own, x))
        return jnp.sum(x)

    return Problem(fun, [draw.dense(d, d) for _ in range(layers)], (draw(n, d),))


def uses(n: int, times: int, d: int) -> Problem:
    """One weight, several times."""
    draw = Draw("uses")

    def fun(w, x):
        for _ in range(times):
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    return Problem(fun, draw.weight(d, d), (draw(n, d),))


def scales(n: int, d: int) -> Problem:
    """The scale of a normalisation: its rows are vectors, stored as they are."""
    draw = Draw("scales")
    return Problem(lambda p, x: jnp.sum(jnp.tanh(p * x)), draw(d), (draw(n, d),))


def look_ups(n: int, count: int, words: int, d: int) -> Problem:
    draw = Draw("look-ups")

    def fun(table, tokens):
        return jnp.sum(jnp.tanh(table[tokens]))

    return Problem(fun, draw(words, d), (draw.ints(words, n, count),))


def convolution(n: int, pixels: int, channels: int, kernel: int = 3) -> Problem:
    draw = Draw("convolution")

    def fun(w, x):
        return jnp.sum(conv(x, w) ** 2)

    weight = draw.weight(kernel, kernel, channels, channels)
    return Problem(fun, weight, (draw(n, pixels, pixels, channels),))


def cases() -> Iterator[Case]:
    """For each number, sizes from at most a quarter of it to at least four times it."""
    yield from convolution_cases()
    yield from memory_cases()
    yield from program_cases()
    yield from sum_cases()


def convolution_cases() -> Iterator[Case]:
    """Whether the factors of a convolution are kept."""
    for pixels, channels in ((16, 16), (8, 32), (8, 64), (4, 64), (2, 64)):
        problem = convolution(16, pixels, channels)
        yield Case("dearer", 9 * channels // (2 * pixels**2), problem, "clipped")


def memory_cases() -> Iterator[Case]:
    """How many rows are materialised at a time, and how look-ups are compared."""
    for n in (4, 32):
        most = thresholds.current().entries_at_once
        yield Case("entries_at_once", n * 512**2, uses(n, 3, 512), "gram", above=most)
    for n in (1, 8, 32):
        few = thresholds.current().squares_at_once
        yield Case("squares_at_once", n * 512**2, uses(n, 3, 512), "square", above=few)
    for count, words, d in (
        (8, 1000, 16),
        (32, 8000, 64),
        (32, 8000, 256),
        (32, 16_000, 64),
        (256, 4000, 8),
    ):
        problem = look_ups(32, count, words, d)
        yield Case("pairs", count**2 * 16 // words, problem, "clipped")
    for count in (64, 128, 512, 1024):
        yield Case("compared", count, look_ups(8, count, 1 << 22, 8), "clipped")


def program_cases() -> Iterator[Case]:
    """How many leaves, or uses of a weight, are worked on as one array."""
    for layers in (2, 4, 8, 16):
        yield Case("many", layers, many_layers(32, layers, 8), "clipped")
    for d in (8, 32, 128):
        yield Case("small", 32 * d, many_layers(32, 12, d), "clipped", above=-1)
    for times in (2, 4, 8, 16):
        yield Case("apart", times, uses(64, times, 128), "clipped")


def sum_cases() -> Iterator[Case]:
    """In which form a weighted sum of rows is taken."""
    for d in (1 << 10, 1 << 13, 1 << 16):
        yield Case("large_product", 128 * d, scales(128, d), "weighted")
    for columns in (8, 32, 64, 128, 192, 256):
        yield Case("narrow", columns, layer(512, 1024, columns), "weighted")
    for n in (8, 32, 128):
        yield Case("large_narrow", n * 1024 * 8, layer(n, 1024, 8), "weighted")
    for n in (64, 128, 256, 1024):
        yield Case("fewer", n // 64, layer(n, 1024, 64), "weighted", above=1)
    for columns in (256, 1024, 2048, 4096):
        yield Case("shared", columns // 256, layer(1024, 256, columns), "weighted")


# --------------------------------------------------------------------------------------


def row(case: Case, seconds: float) -> list[str]:
    below, above = (compiled(case, value) for value in (case.below, case.above))
    ways: dict[str, Callable[[], Any]] = {"below": below, "above": above}
    timing = interleaved(ways, seconds=seconds, rounds=5)
    ratios = [
        timing["above"].over(timing["below"]),
        (above.temp_bytes + 1) / (below.temp_bytes + 1),
        above.build_seconds / below.build_seconds,
    ]
    return [
        case.name,
        f"{getattr(thresholds.current(), case.name):,}",
        f"{case.size:,}",
        "above" if case.is_above else "below",
        human_seconds(timing["below"].median),
        *(f"{x:.2f}" for x in ratios),
    ]


HEADER = ["number", "value", "size", "taken", "below", "time", "memory", "compile"]


def main(argv: Sequence[str] | None = None) -> None:
    """Time the cases; print the environment and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="names of thresholds")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="for each row (%(default)s)"
    )
    add_save_option(parser, "constants")
    options = parser.parse_args(argv)
    rows = []
    for case in cases():
        if options.only and case.name not in options.only:
            continue
        try:
            rows.append(row(case, options.seconds))
            log_progress(" ".join(rows[-1]))
        except Exception as error:  # a table with a gap is better than none
            log_progress(
                f"{case.name} {case.size}: {type(error).__name__}: {str(error)[:300]}"
            )
    ran_on, table = f"{environment()}.", markdown_table(HEADER, rows)
    print(f"{ran_on}\n\n{table}")
    if options.save:
        save(options.save, "The numbers that choices rest on", ran_on, table)


if __name__ == "__main__":
    main()
