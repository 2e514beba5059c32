"""Time products with J, the matrix of per-example gradients, against the ordinary gradient.

    python benchmarks/per_example.py [--only NAME] [--quick]

The ordinary gradient is `jax.grad` of the sum of the losses of the batch, a `jax.vmap`.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
from _measure import MIB, compile_program, environment, interleaved, markdown_table
from models import MODELS

from pytree_grads import jacobian

MAX_NORM = 1.0


def ordinary(problem):
    def total(params, *rest):
        return jnp.sum(jax.vmap(problem.fun, in_axes=problem.in_axes)(params, *rest))

    return jax.grad(total)


def clipped(problem):
    def product(*args):
        J = jacobian(problem.fun, in_axes=problem.in_axes)(*args)
        return J.clip(MAX_NORM).sum(), J.norms()

    return product


def clipped_rows(problem):
    def product(*args):
        rows = jax.vmap(jax.grad(problem.fun), in_axes=problem.in_axes)(*args)
        squares = [jnp.sum(x**2, axis=range(1, x.ndim)) for x in jax.tree.leaves(rows)]
        norms = jnp.sqrt(sum(squares))
        factors = jnp.minimum(1, MAX_NORM / norms)
        return jax.tree.map(lambda x: jnp.tensordot(factors, x, 1), rows), norms

    return product


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(environment())
    rows = []
    for model in MODELS:
        if options.only and not any(word.lower() in model.name.lower() for word in options.only):
            continue
        if options.quick and not model.quick:
            continue
        problem = model()
        ways = {"ordinary": ordinary, "ours": clipped}
        if options.peers:
            ways["vmap(grad)"] = clipped_rows
        programs = {
            name: compile_program(way(problem), *problem.args) for name, way in ways.items()
        }
        times = interleaved(programs, seconds=0, rounds=options.repeats)
        base, base_time = programs["ordinary"], times["ordinary"]
        row = [model.name, f"{base_time.median * 1e3:.1f} ms", f"{base.temp_bytes / MIB:.1f} MiB"]
        for name in list(programs)[1:]:
            program = programs[name]
            compiling = program.trace_seconds + program.compile_seconds
            row += [
                f"{times[name].over(base_time):.2f}",
                f"{program.temp_bytes / MIB:.1f}",
                f"{program.temp_bytes / base.temp_bytes:.2f}",
                f"{program.flops / base.flops:.2f}",
                f"{compiling / (base.trace_seconds + base.compile_seconds):.2f}",
            ]
        rows.append(row)
        print(row, flush=True)
    header = ["model", "ordinary", "memory"]
    for name in list(ways)[1:]:
        header += [f"{name} time", "MiB", "memory", "FLOPs", "compile"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
