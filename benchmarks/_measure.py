"""Measures of JAX programs: interleaved medians, compile time, memory and FLOPs."""

from __future__ import annotations

import gc
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import _flops
import jax

MIB = 2**20


@dataclass(frozen=True)
class Program:
    """A compiled function, its arguments, and what the compiler said of it."""

    compiled: Callable[..., Any]
    args: tuple[Any, ...]
    trace_seconds: float
    compile_seconds: float
    temp_bytes: int
    flops: float  # of products of matrices and convolutions
    operations: (
        float  # these, and what is reduced, scattered or computed entry by entry
    )

    @property
    def build_seconds(self) -> float:
        """What it takes from Python to a program that can run."""
        return self.trace_seconds + self.compile_seconds

    def instructions(self) -> str:
        """The optimised program, with numbers for names, without source lines."""
        text = re.sub(r", metadata=\{[^}]*\}", "", self.compiled.as_text())
        lines = "\n".join(re.findall(r"^ +((?:ROOT )?%.* = .*)$", text, re.MULTILINE))
        numbers: dict[str, str] = {}
        return re.sub(
            r"%[\w.-]+",
            lambda name: numbers.setdefault(name[0], f"%{len(numbers)}"),
            lines,
        )

    def __call__(self) -> Any:
        return self.compiled(*self.args)


@dataclass(frozen=True)
class Timing:
    """The seconds of one call, a number per round.

    Rounds of one measurement belong together.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: Timing) -> float:
        """The median over rounds of this time divided by the other's."""
        return statistics.median(
            mine / theirs
            for mine, theirs in zip(self.seconds, other.seconds, strict=True)
        )


def compile_program(
    fun: Callable[..., Any],
    *args: Any,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Program:
    """Trace and compile `fun` for `args`, from empty caches.

    Times are medians of `repeats`, or of fewer where these would take more than three
    seconds. They say nothing where a cache on disk (`JAX_COMPILATION_CACHE_DIR`) is in
    use. Those of the clock `time.process_time` are of all cores together, whatever else
    runs.
    """
    repeats = 1 if jax.config.jax_compilation_cache_dir else repeats
    started = time.perf_counter()
    trace, build = [], []
    for _ in range(repeats):
        jax.clear_caches()
        start = clock()
        traced = jax.jit(fun).trace(*args)
        middle = clock()
        compiled = traced.lower().compile()
        trace.append(middle - start)
        build.append(clock() - middle)
        if time.perf_counter() - started > 3:
            break
    memory = compiled.memory_analysis()
    return Program(
        compiled=compiled,
        args=args,
        trace_seconds=statistics.median(trace),
        compile_seconds=statistics.median(build),
        temp_bytes=-1 if memory is None else int(memory.temp_size_in_bytes),
        flops=_flops.count(traced.jaxpr.jaxpr),
        operations=_flops.count(traced.jaxpr.jaxpr, everything=True),
    )


def trace_seconds(fun: Callable[..., Any], *args: Any) -> float:
    """The time to trace `fun` for `args`, from empty caches."""
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(fun).trace(*args)
    return time.perf_counter() - start


def interleaved(
    cases: Mapping[str, Callable[[], Any]], *, seconds: float = 5.0, rounds: int = 7
) -> dict[str, Timing]:
    """Time every case once per round, each round in a shuffled order.

    What else the machine does then falls on all cases alike, and so does what a case
    leaves behind for the next (a cold cache, freed memory). Where one ends too soon for
    the clock, all are called several times in each round, and equally often, for a call
    in a row is faster than one alone; fewer times only where that would take a tenth of
    a second. At least `rounds` rounds are run, and more until about `seconds` have
    passed.
    """
    names = list(cases)
    for name in names:
        jax.block_until_ready(cases[name]())  # compiles
    once = {name: min(_seconds(cases[name], 1) for _ in range(3)) for name in names}
    most = max(1, int(2e-3 / max(min(once.values()), 1e-7)))
    repeats = {name: max(1, min(most, int(0.1 / once[name]))) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        done = 0
        while done < rounds or time.perf_counter() - start < seconds:
            for name in order.sample(names, len(names)):
                samples[name].append(_seconds(cases[name], repeats[name]))
            done += 1
    finally:
        gc.enable()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _seconds(case: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        result = case()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def environment() -> str:
    """One line that says what the figures were measured on."""
    device = jax.devices()[0]
    return (
        f"Python {platform.python_version()}, jax {jax.__version__}, "
        f"{len(jax.devices())} × {device.device_kind} ({device.platform}), "
        f"{os.cpu_count()} cores, {platform.machine()}"
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = (
        "|"
        + "|".join(
            f"{':' if i == 0 else '-'}{'-' * width}{'-' if i == 0 else ':'}"
            for i, width in enumerate(widths)
        )
        + "|"
    )
    return "\n".join([line(header), rule, *map(line, rows)])


def human_seconds(seconds: float) -> str:
    """A duration in the unit in which it reads best."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def human_bytes(count: float) -> str:
    """A size in the unit in which it reads best."""
    for unit, size in (("GiB", 2**30), ("MiB", MIB), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
