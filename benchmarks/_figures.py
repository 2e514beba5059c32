"""What is measured of a way to a product, and the means over models."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import exp, log
from typing import Any

import jax
import jax.numpy as jnp
from _layers import Problem
from _measure import Program, compile_program, human_bytes, interleaved

LONG = 15  # seconds; what would take longer is not run to its end
LARGE = 1 << 29  # bytes; what needs more is tried on an eighth of the batch first
# Times the ordinary gradient; what is slower is timed once, apart from the others.
SLOW = 5
# Times the fastest way; what is no slower is timed for longer.
NEAR = 1.3


Way = Callable[[Problem], Callable[..., Any]]
Case = Callable[[], Any]


@dataclass(frozen=True)
class Figure:
    """One way to a product, as multiples of the ordinary gradient."""

    time: float | None  # None: not run
    memory: float
    flops: float
    build: float
    temp_bytes: int
    note: str = ""

    def __str__(self) -> str:
        if self.time is None and self.temp_bytes < 0:
            return self.note
        if self.time is None:
            return f"{self.note or 'not run'} · {shown(self.memory)}"
        return f"{shown(self.time)} · {shown(self.memory)}{self.note}"


def shown(x: float | None) -> str:
    """A multiple, with the digits that matter."""
    if x is None or x != x:
        return "–"
    return f"{x:.2f}" if x < 9.995 else f"{x:,.0f}"


def log_progress(text: str) -> None:
    """Tell a person who waits."""
    print(text, file=sys.stderr, flush=True)


def measure(
    problem: Problem,
    base: Program,
    ways: Mapping[str, Way],
    *,
    rounds: int,
    seconds: float = 0,
    cap: float,
    careful: Iterable[str] = (),
) -> tuple[float, dict[str, Figure]]:
    """The seconds of the ordinary gradient, and the figures of all ways.

    `cap` bounds the temporary memory, in bytes, of what is run. The ways in `careful`
    are compiled as often as the ordinary gradient was, for the sake of the time that
    this takes.
    """
    programs: dict[str, Program] = {}
    failed: dict[str, Figure] = {}
    for name, way in ways.items():
        try:
            programs[name] = compile_program(
                way(problem), *problem.args, repeats=3 if name in careful else 1
            )
        except Exception as error:
            log_progress(f"    {name}: {type(error).__name__}: {str(error)[:300]}")
            failed[name] = Figure(
                None, *[float("nan")] * 3, -1, f"({type(error).__name__})"
            )
    once = interleaved({"ordinary": base}, seconds=0, rounds=2)["ordinary"].median
    run: dict[str, float] = {}
    notes: dict[str, str] = {}
    reference = None
    for name, program in programs.items():
        if program.temp_bytes > cap:
            notes[name] = human_bytes(program.temp_bytes)
            continue
        if (
            program.temp_bytes > max(LARGE, cap / 8)
            and (least := _estimate(ways[name], problem)) > LONG
        ):
            notes[name] = f"> {shown(least / once)}"
            continue
        result, run[name] = timed(program)
        reference = result if reference is None else reference
        if _distance(result, reference) > 1e-2:
            notes[name] = " (differs)"
        del result
    cases = {name: (programs[name], run[name]) for name in run}
    base_seconds, times = multiples(base, cases, rounds, seconds)
    cached = jax.config.jax_compilation_cache_dir is not None

    def figure(name: str, program: Program) -> Figure:
        return Figure(
            times.get(name),
            _quotient(program.temp_bytes, base.temp_bytes),
            _quotient(program.flops, base.flops),
            # with a cache, how long programs take to come out of it says nothing
            float("nan") if cached else program.build_seconds / base.build_seconds,
            program.temp_bytes,
            notes.get(name, ""),
        )

    found = {name: figure(name, program) for name, program in programs.items()}
    return base_seconds, failed | found


def multiples(
    base: Case, cases: Mapping[str, tuple[Case, float]], rounds: int, seconds: float = 0
) -> tuple[float, dict[str, float]]:
    """The seconds of `base`, and those of cases as multiples of it.

    Beside a case stand the seconds of its first call. Slow cases are not called many
    times more; those that are nearly the fastest are timed once more, for `seconds` or
    longer.
    """
    once = interleaved({"ordinary": base}, seconds=0, rounds=2)["ordinary"].median
    fast: dict[str, Case] = {}
    times: dict[str, float] = {}
    for name, (case, took) in cases.items():
        if took < 1 + SLOW * once:
            _, took = timed(case)
        if took > max(SLOW * once, 0.02):
            times[name] = took / once
        else:
            fast[name] = case
    taken = interleaved({"ordinary": base, **fast}, seconds=0, rounds=rounds)
    found = {name: taken[name].over(taken["ordinary"]) for name in fast}
    near = {
        name: fast[name] for name, x in found.items() if x <= NEAR * min(found.values())
    }
    if near and seconds:
        taken = interleaved({"ordinary": base, **near}, seconds=seconds, rounds=rounds)
        found |= {name: taken[name].over(taken["ordinary"]) for name in near}
    return taken["ordinary"].median, times | found


def _estimate(way: Way, problem: Problem) -> float:
    """Seconds for the batch, from those for an eighth of it."""
    part = problem.head(max(8, problem.size // 8))
    program = compile_program(way(part), *part.args)
    return timed(program)[1] * problem.size / part.size


def timed(case: Case) -> tuple[Any, float]:
    """The result of a call and its seconds."""
    start = time.perf_counter()
    result = jax.block_until_ready(case())
    return result, time.perf_counter() - start


def _quotient(x: float, y: float) -> float:
    return x / y if y else float("nan")


def _distance(one: Any, other: Any) -> float:
    """The largest difference of two trees, over the largest entry of the leaf."""

    def of(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(x - y)) / (jnp.max(jnp.abs(y)) + 1e-12)

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return float(jnp.max(jnp.stack([jax.jit(of)(x, y) for x, y in pairs])))


def geometric_mean(values: Iterable[float]) -> float:
    """NaN where there are no values."""
    logs = [log(x) for x in values if x > 0]
    return exp(sum(logs) / len(logs)) if logs else float("nan")


def over_families(
    values: Mapping[str, float | None], families: Mapping[str, str]
) -> float:
    """The geometric mean over families of the geometric means over their members."""
    groups: dict[str, list[float]] = {}
    for name, x in values.items():
        if x is not None and x == x:
            groups.setdefault(families[name], []).append(x)
    return geometric_mean(map(geometric_mean, groups.values()))
