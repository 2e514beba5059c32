"""Time linear combinations of trees against peers and a copy of the same bytes.

    python benchmarks/linear_combination.py [--leaves 1 100 1000] [--megabytes 10 100
        1000] [--save [NAME]]

K trees are combined with K traced coefficients. What is compared is timed in the same
run, call by call in turn, jitted calls beside jitted ones and eager beside eager;
medians are printed, and a quotient of two times is the median, over rounds, of their
quotient in one round. Where the compiled programs of ours and of all peers are the
same, instruction for instruction, a last column says so, and the quotient of their
times shows what noise there was.

A combination reads K trees and writes one. The copy is a jitted program that moves as
many bytes through as many leaves: it reads (K+1)/2 trees and writes as many. What
memory allows is measured in memory that is in use already: the combination is written
over its first tree and the copy over an earlier copy, both donated, as a training step
does it. Beside stands the same with results in memory that is fresh, for which the
operating system hands out pages first: that is dear, and a copy needs more of it than a
combination.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tree_math
from _measure import (
    Program,
    Timing,
    compile_program,
    environment,
    human_bytes,
    human_seconds,
    interleaved,
    markdown_table,
)
from _results import add_save_option, save

from pytree_grads import Vector, linear_combination

Combine = Callable[[jax.Array, list[Any]], Any]


def vectors(coefficients, trees):
    """Our operators."""
    return sum(
        c * Vector(tree) for c, tree in zip(coefficients, trees, strict=True)
    ).tree


def with_optax(coefficients, trees):
    """One `add_scale` after another."""
    total = optax.tree.scale(coefficients[0], trees[0])
    for c, tree in zip(coefficients[1:], trees[1:], strict=True):
        total = optax.tree.add_scale(total, c, tree)
    return total


def with_tree_math(coefficients, trees):
    """The operators of tree-math."""
    terms = zip(coefficients, trees, strict=True)
    return sum(c * tree_math.Vector(tree) for c, tree in terms).tree


def plain(coefficients, trees):
    """What one would write by hand."""
    return jax.tree.map(
        lambda *leaves: sum(
            c * leaf for c, leaf in zip(coefficients, leaves, strict=True)
        ),
        *trees,
    )


OURS = "linear_combination"
IN_PLACE = ", in place"
PEERS = {
    "optax.tree.add_scale": with_optax,
    "tree_math.Vector": with_tree_math,
    "jax.tree.map": plain,
}
COMBINATIONS: dict[str, Combine] = {
    OURS: linear_combination,
    "Vector": vectors,
    **PEERS,
}


@dataclass(frozen=True)
class Case:
    """K trees of so many equal leaves, and the bytes of all of them together."""

    count: int
    leaves: int
    total_bytes: int

    @property
    def leaf_size(self) -> int:
        """Float32 numbers in a leaf."""
        return self.total_bytes // (4 * self.count * self.leaves)

    @property
    def moved_bytes(self) -> int:
        """What a combination reads and writes."""
        return 4 * self.leaf_size * self.leaves * (self.count + 1)

    @property
    def name(self) -> str:
        """As the tables have it."""
        return f"{self.leaves:,} × {self.total_bytes / self.leaves / 1e6:g} MB"

    def arguments(self) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
        """Coefficients and trees."""
        names = [f"leaf{i}" for i in range(self.leaves)]
        trees = [
            {name: jnp.full(self.leaf_size, 1.0 + k) for name in names}
            for k in range(self.count)
        ]
        return jnp.linspace(0.5, 1.5, self.count), trees

    def copied(self) -> dict[str, jax.Array]:
        """As many leaves, with (K+1)/2 times the bytes of one tree."""
        size = self.moved_bytes // (8 * self.leaves)
        return {f"leaf{i}": jnp.ones(size) for i in range(self.leaves)}


def copy(tree):
    """Read and write every byte once."""
    return jax.tree.map(jnp.copy, tree)


class InPlace:
    """A jitted program that writes its result over its first argument."""

    def __init__(self, fun: Callable[..., Any], target: Any, *args: Any):
        self.compiled = jax.jit(fun, donate_argnums=0, keep_unused=True)
        self.target = jax.tree.map(jnp.copy, target)
        self.args = args

    def __call__(self) -> Any:
        """Once more."""
        self.target = self.compiled(self.target, *self.args)
        return self.target


def combine_into(first, coefficients, others):
    """The combination, in the memory of its first tree."""
    return linear_combination(coefficients, [first, *others])


def copy_into(_, tree):
    """The copy, in memory that is donated."""
    return copy(tree)


@dataclass(frozen=True)
class Measured:
    """What was found on one case."""

    case: Case
    programs: dict[str, Program]  # the last that was compiled of each combination
    compiling: dict[str, Timing]
    building: dict[str, Timing]  # tracing and compiling
    jitted: dict[str, Timing]  # each combination, "copy", and both "in place"
    eager: dict[str, Timing]

    def bandwidth_over_copy(self, name: str, where: str = "") -> float:
        """Bytes per second of a combination, as a multiple of those of the copy."""
        return 1 / self.jitted[name + where].over(self.jitted["copy" + where])


def measure(case: Case, seconds: float) -> Measured:
    """Compile and time everything on one case, in turn."""
    arguments, source = case.arguments(), case.copied()
    coefficients, (first, *others) = arguments
    rounds = [
        {
            name: compile_program(combine, *arguments)
            for name, combine in COMBINATIONS.items()
        }
        for _ in range(3)
    ]
    jitted = {name: _call(jax.jit(f), *arguments) for name, f in COMBINATIONS.items()}
    jitted["copy"] = _call(jax.jit(copy), source)
    shrinking = (
        coefficients / coefficients.sum()
    )  # called again and again, it stays finite
    jitted[OURS + IN_PLACE] = InPlace(combine_into, first, shrinking, others)
    jitted["copy" + IN_PLACE] = InPlace(copy_into, source, source)
    eager = {name: _call(combine, *arguments) for name, combine in COMBINATIONS.items()}
    return Measured(
        case,
        rounds[-1],
        {
            name: Timing(tuple(r[name].compile_seconds for r in rounds))
            for name in COMBINATIONS
        },
        {
            name: Timing(
                tuple(r[name].trace_seconds + r[name].compile_seconds for r in rounds)
            )
            for name in COMBINATIONS
        },
        interleaved(jitted, seconds=seconds, rounds=11),
        interleaved(eager, seconds=seconds / 2, rounds=5),
    )


def _call(fun: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: fun(*args)


def rows_of(found: Measured):
    """The rows of the table of times for one case."""
    for name in COMBINATIONS:
        yield [
            found.case.name,
            name,
            human_seconds(found.eager[name].median),
            human_seconds(found.jitted[name].median),
            f"{found.case.moved_bytes / found.jitted[name].median / 1e9:.1f}",
            human_seconds(found.building[name].median),
            human_bytes(found.programs[name].temp_bytes),
        ]


HEADER = [
    "leaves × size",
    "way",
    "eager",
    "jitted",
    "GB/s",
    "trace + compile",
    "temporary",
]


def verdict(found: Measured) -> list[str]:
    """Ours against the fastest peer, and against the copy."""

    def over_peers(times: dict[str, Timing]) -> str:
        return f"{max(times[OURS].over(times[peer]) for peer in PEERS):.2f}"

    programs = {program.instructions() for program in found.programs.values()}
    return [
        found.case.name,
        over_peers(found.eager),
        over_peers(found.jitted),
        "yes" if len(programs) == 1 else "no",
        f"{found.bandwidth_over_copy(OURS, IN_PLACE):.2f}",
        f"{found.bandwidth_over_copy(OURS):.2f}",
        f"{found.building[OURS].over(found.building['jax.tree.map']):.2f}",
        f"{found.compiling[OURS].over(found.compiling['jax.tree.map']):.2f}",
    ]


VERDICT = [
    "leaves × size",
    "eager / fastest peer",
    "jitted / fastest peer",
    "same program",
    "bandwidth / copy, in place",
    "bandwidth / copy, fresh",
    "trace + compile / plain sum",
    "compile / plain sum",
]


def main(argv: Sequence[str] | None = None) -> None:
    """Print what it ran on and both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--leaves", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--trees", type=int, default=4, help="K (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="a case (%(default)s)"
    )
    add_save_option(parser, "linear_combination")
    options = parser.parse_args(argv)
    rows, verdicts = [], []
    for megabytes in options.megabytes:
        for leaves in options.leaves:
            case = Case(options.trees, leaves, megabytes * 10**6)
            found = measure(case, options.seconds)
            rows += rows_of(found)
            verdicts.append(verdict(found))
    ran_on = (
        f"{environment()}. K = {options.trees} trees of float32; MB are of all K trees."
    )
    tables = f"{markdown_table(VERDICT, verdicts)}\n\n{markdown_table(HEADER, rows)}"
    print(f"{ran_on}\n\n{tables}")
    if options.save:
        save(options.save, "Linear combinations", ran_on, tables)


if __name__ == "__main__":
    main()
