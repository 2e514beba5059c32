"""Time linear combinations of trees against the peers and against a copy of the same bytes.

    python benchmarks/linear_combination.py [--leaves 1 100 1000] [--megabytes 10 100 1000]

K trees are combined with K traced coefficients. Everything that is compared is timed in the same
run, call by call in turn, and medians are printed; a quotient of two times is the median, over
rounds, of their quotient in one round. A combination reads K trees and writes one. The copy is a
jitted program that moves as many bytes through as many leaves: it reads (K+1)/2 trees and writes as
many. Like every result of JAX, both are written to memory that is fresh; what the memory does where
the operating system need not hand out pages first is printed beside, as copied by NumPy.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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

from pytree_grads import Vector, linear_combination

Combine = Callable[[jax.Array, list[Any]], Any]


def vectors(coefficients, trees):
    """Our operators."""
    return sum(c * Vector(tree) for c, tree in zip(coefficients, trees, strict=True)).tree


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
        lambda *leaves: sum(c * leaf for c, leaf in zip(coefficients, leaves, strict=True)), *trees
    )


OURS = "linear_combination"
PEERS = {"optax.tree.add_scale": with_optax, "tree_math.Vector": with_tree_math,
         "jax.tree.map": plain}  # fmt: skip
COMBINATIONS: dict[str, Combine] = {OURS: linear_combination, "Vector": vectors, **PEERS}


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
            {name: jnp.full(self.leaf_size, 1.0 + k) for name in names} for k in range(self.count)
        ]
        return jnp.linspace(0.5, 1.5, self.count), trees

    def copied(self) -> dict[str, jax.Array]:
        """As many leaves, with (K+1)/2 times the bytes of one tree."""
        size = self.moved_bytes // (8 * self.leaves)
        return {f"leaf{i}": jnp.ones(size) for i in range(self.leaves)}


def copy(tree):
    """Read and write every byte once."""
    return jax.tree.map(jnp.copy, tree)


@dataclass(frozen=True)
class Measured:
    """What was found on one case."""

    case: Case
    programs: dict[str, Program]  # the last that was compiled of each combination
    compiling: dict[str, Timing]
    building: dict[str, Timing]  # tracing and compiling
    running: dict[str, Timing]  # "jit NAME", "eager NAME" and "jit copy"


def measure(case: Case, seconds: float) -> Measured:
    """Compile and time everything on one case, in turn."""
    arguments, source = case.arguments(), case.copied()
    rounds = [
        {name: compile_program(combine, *arguments) for name, combine in COMBINATIONS.items()}
        for _ in range(3)
    ]
    cases = {"jit copy": _call(jax.jit(copy), source)}
    for name, combine in COMBINATIONS.items():
        cases[f"jit {name}"] = _call(jax.jit(combine), *arguments)
        cases[f"eager {name}"] = _call(combine, *arguments)
    return Measured(
        case,
        rounds[-1],
        {name: Timing(tuple(r[name].compile_seconds for r in rounds)) for name in COMBINATIONS},
        {
            name: Timing(tuple(r[name].trace_seconds + r[name].compile_seconds for r in rounds))
            for name in COMBINATIONS
        },
        interleaved(cases, seconds=seconds),
    )


def _call(fun: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: fun(*args)


def rows_of(found: Measured):
    """The rows of the table of times for one case."""
    for name in COMBINATIONS:
        jitted = found.running[f"jit {name}"]
        yield [
            found.case.name,
            name,
            human_seconds(found.running[f"eager {name}"].median),
            human_seconds(jitted.median),
            f"{1 / jitted.over(found.running['jit copy']):.2f}",
            f"{found.case.moved_bytes / jitted.median / 1e9:.1f}",
            human_seconds(found.building[name].median),
            human_bytes(found.programs[name].temp_bytes),
        ]


HEADER = ["leaves × size", "way", "eager", "jitted", "bandwidth / copy", "GB/s",
          "trace + compile", "temporary"]  # fmt: skip


def _operations(program: Program) -> tuple[str, ...]:
    """The operations of the compiled program, by name."""
    return tuple(sorted(re.findall(r"= \S+ ([a-z][\w-]*)\(", program.compiled.as_text())))


def verdict(found: Measured) -> list[str]:
    """Ours against the fastest peer, in each respect."""

    def over_peers(kind: str) -> str:
        mine = found.running[f"{kind} {OURS}"]
        return f"{max(mine.over(found.running[f'{kind} {peer}']) for peer in PEERS):.2f}"

    programs = {_operations(program) for program in found.programs.values()}
    return [
        found.case.name,
        over_peers("eager"),
        over_peers("jit"),
        f"{1 / found.running[f'jit {OURS}'].over(found.running['jit copy']):.2f}",
        f"{found.building[OURS].over(found.building['jax.tree.map']):.2f}",
        f"{found.compiling[OURS].over(found.compiling['jax.tree.map']):.2f}",
        "yes" if len(programs) == 1 else "no",
    ]


VERDICT = ["leaves × size", "eager / fastest peer", "jitted / fastest peer", "bandwidth / copy",
           "trace + compile / plain sum", "compile / plain sum", "same program"]  # fmt: skip


def touched_copy_bandwidth(size: int = 400 * 10**6, repeats: int = 7) -> float:
    """Bytes per second, read and written, of a copy into memory that is in use already."""
    source = np.ones(size, np.uint8)
    target = np.ones(size, np.uint8)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return 2 * size / statistics.median(times)


def main(argv: Sequence[str] | None = None) -> None:
    """Print what it ran on and both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--leaves", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--trees", type=int, default=4, help="K (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="a case (%(default)s)")
    options = parser.parse_args(argv)
    rows, verdicts = [], []
    for megabytes in options.megabytes:
        for leaves in options.leaves:
            case = Case(options.trees, leaves, megabytes * 10**6)
            found = measure(case, options.seconds)
            rows += rows_of(found)
            verdicts.append(verdict(found))
    print(f"{environment()}. K = {options.trees} trees of float32; MB are those of all K trees.")
    print(f"NumPy copies into touched memory at {touched_copy_bandwidth() / 1e9:.0f} GB/s.\n")
    print(markdown_table(HEADER, rows), "\n")
    print(markdown_table(VERDICT, verdicts))


if __name__ == "__main__":
    main()
