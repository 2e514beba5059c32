"""Time and memory of sketches of rows, beside the ordinary gradient.

    python benchmarks/sketches.py [--only NAME ...] [--dims 256 1024 4096] [--seconds 2]
        [--save [NAME]]

A sketch is a random projection of every row of J to `dim` numbers. All figures are
multiples of the ordinary gradient of the same batch, timed in the same run. `J` alone
makes the factors and projects nothing; `beyond J` is what the sketch adds to that. A
dense sketch takes its numbers one after another, so its cost grows in proportion to
their count: it is timed for few numbers and multiplied; figures with ≈ are such.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
from _figures import log_progress, shown
from _layers import Problem
from _measure import (
    Program,
    Timing,
    compile_program,
    environment,
    human_seconds,
    interleaved,
    markdown_table,
)
from _models import MODELS, Model
from _results import add_save_option, save
from _ways import ordinary

from pytree_grads import jacobian

NAMES = (
    "MLP 784-1024-1024-10, N=128",
    "transformer, list, T=64, N=32",
    "conv net 28×28, N=128",
)
TIMED_DENSE = 4  # numbers of a dense sketch that are timed
HEADER = ["model", "sketch", "dim", "time", "beyond J", "memory", "operations beyond J"]


def making(problem: Problem) -> Callable[..., Any]:
    """The factors of J, and nothing else."""
    return lambda *args: jacobian(problem.fun, in_axes=problem.in_axes)(*args)


def sketched(problem: Problem, dim: int, kind: str) -> Callable[..., jax.Array]:
    """J and its sketch."""

    def run(*args):
        J = jacobian(problem.fun, in_axes=problem.in_axes)(*args)
        return J.sketch(jax.random.key(0), dim, kind=kind)

    return run


def programs(problem: Problem, dims: Sequence[int]) -> dict[Any, Program]:
    """The gradient, J, and the sketches, by kind and dim."""
    made = {
        "gradient": compile_program(ordinary(problem), *problem.args),
        "J": compile_program(making(problem), *problem.args),
    }
    cases = [(kind, dim) for kind in ("kronecker", "tensor") for dim in dims]
    for kind, dim in [*cases, ("dense", TIMED_DENSE)]:
        program = compile_program(sketched(problem, dim, kind), *problem.args)
        made[kind, dim] = program
    return made


def beyond(times: dict[Any, Timing], case: Any) -> float:
    """The median over rounds of (sketch − J) ÷ gradient."""
    rounds = (times[x].seconds for x in (case, "J", "gradient"))
    return statistics.median((s - j) / g for s, j, g in zip(*rounds, strict=True))


def rows_of(model: Model, dims: Sequence[int], seconds: float) -> list[list[str]]:
    """The lines of one model."""
    made = programs(model(), dims)
    times = interleaved(made, seconds=seconds)
    base, alone = made["gradient"], made["J"]

    def memory(program: Program) -> str:
        return shown(program.temp_bytes / base.temp_bytes)

    def operations(program: Program) -> float:
        return (program.operations - alone.operations) / base.operations

    own_time = times["J"].over(times["gradient"])
    bytes_of_J = alone.temp_bytes + sum(x.nbytes for x in jax.tree.leaves(alone()))
    own = shown(own_time), "", shown(bytes_of_J / base.temp_bytes), ""
    lines = [
        [model.name, "ordinary gradient", "", "1.00", "", "1.00", ""],
        ["", "J alone", "", *own],
    ]
    for case, program in ((x, made[x]) for x in made if isinstance(x, tuple)):
        kind, dim = case
        time, more = times[case].over(times["gradient"]), beyond(times, case)
        if kind != "dense":
            cells = time, more, program.temp_bytes / base.temp_bytes
            told = [*map(shown, cells), shown(operations(program))]
            lines.append(["", kind, f"{dim:,}", *told])
            continue
        for other in dims:
            factor = other / dim
            cells = own_time + factor * more, factor * more
            told = [f"≈ {shown(x)}" for x in cells]
            told += [memory(program), f"≈ {shown(factor * operations(program))}"]
            lines.append(["", kind, f"{other:,}", *told])
    lines[0][0] += f" ({human_seconds(times['gradient'].median)})"
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print what it ran on and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = {model.name: model for model in MODELS}
    parser.add_argument("--only", nargs="+", default=NAMES, choices=known)
    parser.add_argument("--dims", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--seconds", type=float, default=10.0, help="(%(default)s)")
    add_save_option(parser, "sketches")
    options = parser.parse_args(argv)
    lines = []
    for name in options.only:
        log_progress(name)
        lines += rows_of(known[name], options.dims, options.seconds)
    table = markdown_table(HEADER, lines)
    ran_on = f"{environment()}. Multiples of the ordinary gradient, in float32."
    print(f"{ran_on}\n\n{table}")
    if options.save:
        save(
            options.save, "Sketches of rows beside the ordinary gradient", ran_on, table
        )


if __name__ == "__main__":
    main()
