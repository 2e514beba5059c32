"""Random programs against plain rows in float64: `python -m tests.fuzz --programs N
--seed S`.
"""

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "support"))

from grammar import N, program
from quick import spend_little
from routes import factors_kept, is_dense, is_matrix, leaves_of
from rows import Rows, assert_close

from pytree_grads import jacobian

MODES = {"kept": {}, "recomputed": {"recompute": True}, "chunks": {"chunk_size": 3}}


@dataclass
class Count:
    programs: int = 0
    leaves: int = 0
    matrices: int = 0
    factored: int = 0
    refused: int = 0  # programs that `jax.grad` itself cannot differentiate
    undefined: int = (
        0  # programs with rows that are not finite: compared by the other rows alone
    )

    def __str__(self):
        return (
            f"{self.programs} programs, {self.leaves} leaves; of {self.matrices} "
            "matrices "
            f"{self.factored} factored, {self.matrices - self.factored} dense; "
            f"{self.undefined} more with rows that are not finite, {self.refused} that "
            "jax.grad refuses"
        )


def products(J, c, v):
    alone = J.weighted_sum(c)  # before norms, which may make rows that later sums take
    clipped = J.clip(0.7)
    return {
        "norms": J.norms(),
        "weighted_sum": J.weighted_sum(c),
        "weighted_sum alone": alone,
        "clip": clipped.sum(),
        "gram": J.gram(),
        "square_sum": J.square_sum(c),
        "J @ v": J @ v,
        "part": J[1:3].scale(c[1:3]).to_rows(),
    }


def expected(rows, c, v, outputs):
    """The same from the oracle, whose rows are those of all outputs one after the
    other.
    """
    shape = (N,) if outputs is None else (N, outputs)
    flat = c.reshape(-1)
    part = rows.scale(flat)[slice(1 * (outputs or 1), 3 * (outputs or 1))]
    own = [x.reshape(2, *shape[1:], *x.shape[1:]) for x in part.leaves]
    return {
        "norms": rows.norms().reshape(shape),
        "weighted_sum": rows.weighted_sum(flat),
        "weighted_sum alone": rows.weighted_sum(flat),
        "clip": rows.clip(0.7).weighted_sum(),
        "gram": rows.gram().reshape(shape + shape),
        "square_sum": rows.square_sum(flat),
        "J @ v": rows.apply(v).reshape(shape),
        "part": rows.like(own),
    }


def plain_rows(made, params, x, tokens):
    """The rows by `jax.grad` of plain JAX, mapped, unless `jax.vmap` cannot map
    references.
    """
    if "remember" not in made.names:
        plain = jax.grad if made.outputs is None else jax.jacrev
        return jax.vmap(plain(made.fun), (None, 0, 0))(params, x, tokens)

    def of_one(i):
        if made.outputs is None:
            return jax.grad(made.fun)(params, x[i], tokens[i])
        rows = [
            jax.grad(lambda p, k=k: made.fun(p, x[i], tokens[i])[k])(params)
            for k in range(made.outputs)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(of_one, range(N)))


def is_refused(made, params, x, tokens):
    """Whether plain `jax.grad` fails: JAX cannot rematerialise some bodies with
    references.
    """
    if "remember" not in made.names:
        return False
    try:
        jax.eval_shape(
            lambda p: jax.vjp(lambda p: made.fun(p, x[0], tokens[0]), p)[0], params
        )
        jax.eval_shape(lambda p: plain_rows(made, p, x, tokens), params)
    except Exception:
        return True
    return False


def check(made, seed, mode, count=None):
    """Raise if a product of a program differs from the oracle's, by any of the
    routes.
    """
    params, x, tokens = made.arguments(seed)
    if is_refused(made, params, x, tokens):
        if count is not None:
            count.refused += 1
        return
    rng = np.random.default_rng(seed)
    shape = (N,) if made.outputs is None else (N, made.outputs)
    c = jnp.asarray(rng.standard_normal(shape))
    v = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape)), params)

    @jax.jit
    def of_all(params, x, tokens, c, v):
        auto = products(jacobian(made.fun)(params, x, tokens), c, v)
        with factors_kept():
            forced = products(
                jacobian(made.fun, **MODES[mode])(params, x, tokens), c, v
            )
        return (auto, forced), plain_rows(made, params, x, tokens)

    got, rows = of_all(params, x, tokens, c, v)
    leaves, treedef = jax.tree.flatten(rows)
    flat = [
        np.asarray(r).reshape(-1, *p.shape)
        for r, p in zip(leaves, jax.tree.leaves(params), strict=False)
    ]
    finite = np.all([np.isfinite(r.reshape(len(r), -1)).all(1) for r in flat], axis=0)
    if finite.all():
        want = expected(Rows(flat, treedef), c, v, made.outputs)
    else:  # sums depend on the order: compare what each other row has alone
        flat = [r[finite] for r in flat]
        rows = Rows(flat, treedef)
        want = {"norms": rows.norms(), "J @ v": rows.apply(v)}
        got = [{name: x[name][finite.reshape(shape)] for name in want} for x in got]
    # Norms of cancelling rows are known to half the digits of their parts.
    size = max(1.0, max((np.max(np.abs(r), initial=0) for r in flat), default=0))
    for route, found in zip(("auto", f"factored, {mode}"), got, strict=True):
        compare(made, route, found, want, size)
    if count is not None:
        tally(count, made, (params, x, tokens), finite.all())


def compare(made, route, found, want, size):
    """Raise if a product is off, naming it, its route and the program."""
    tolerance = 1e-4 if made.casts else 1e-11
    for name in want:
        try:
            assert_close(found[name], want[name], tolerance, also=1e-13 * size)
        except AssertionError as error:
            where = f"{name} ({route}) of {describe(made)}"
            raise AssertionError(f"{where}: {error}") from None


def tally(count, made, arguments, is_finite):
    """Count a program that has passed, and how many of its matrices are factored."""
    if not is_finite:
        count.undefined += 1
        return
    with factors_kept():
        leaves = leaves_of(jax.eval_shape(jacobian(made.fun), *arguments))
    matrices = [leaf for leaf in leaves if is_matrix(leaf)]
    count.programs += 1
    count.leaves += len(leaves)
    count.matrices += len(matrices)
    count.factored += sum(not is_dense(leaf) for leaf in matrices)


def describe(made):
    return f"{' > '.join(made.names)} with {made.shapes}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first program; then 1 more each"
    )
    parser.add_argument("--show", action="store_true", help="print each program")
    options = parser.parse_args()
    spend_little()
    jax.config.update("jax_enable_x64", True)
    count, failures, start = Count(), [], time.time()
    for seed in range(options.seed, options.seed + options.programs):
        rng = random.Random(seed)
        made = program(rng.choice)
        if options.show:
            print(seed, describe(made), flush=True)
        try:
            check(made, seed, rng.choice(list(MODES)), count)
        except Exception as error:
            failures.append(seed)
            print(
                f"seed {seed}: {type(error).__name__}: {error}\n  {describe(made)}",
                flush=True,
            )
        if (seed - options.seed + 1) % 20 == 0:
            jax.clear_caches()
            print(
                f"{count}; {len(failures)} failures; {time.time() - start:.0f} s",
                flush=True,
            )
    print(
        f"{count}; failures at seeds {failures or 'none'}; {time.time() - start:.0f} s"
    )
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
