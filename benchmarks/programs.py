"""Compare the programs that two states of the package compile to: old beside new.

    python benchmarks/programs.py --save OLD.json [--resume] --package OLD_CHECKOUT
    python benchmarks/programs.py --against OLD.json [--save NEW.json]
    python benchmarks/programs.py --time OLD_CHECKOUT

each with [--package NEW_CHECKOUT] [--models NAME ...] [--products clipped gram ...]
[--modes kept ...].

The programs are those of `per_example.py`: the clipped sum and norms of all models in
all modes, and the other products of nine models. Each is compiled for a J of its own.
Operations are counted in the jaxpr, loops as often as they run. Two programs are the
same if their optimised instructions are, up to names. Times to trace and compile are
those of the processor, all cores together; they are comparable only if old and new are
compiled in turn, each in a process of its own. That is what `--time` does; programs
that differ are also called in turn. `--package` is the new checkout, by default that of
this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from _figures import geometric_mean, log_progress, timed
from _layers import Problem
from _measure import (
    Program,
    compile_program,
    environment,
    human_bytes,
    human_seconds,
    markdown_table,
)
from _models import MODELS

HERE = Path(__file__).resolve().parent.parent
COUNTS = "operations", "products", "memory"
TIMES = "trace", "compile", "both"
ALLOWED = 1.01  # times what a count was before
ROUNDS = 7  # of timing, at least
SHORT = 0.02  # seconds; what takes less is called several times in a row

PRODUCTS: dict[str, Callable[[Any, jax.Array], Any]] = {
    "clipped": lambda J, _: (J.clip(1.0).sum(), J.norms()),
    "clip": lambda J, _: J.clip(1.0).sum(),
    "norms": lambda J, _: J.norms(),
    "sum": lambda J, _: J.sum(),
    "weighted": lambda J, weights: J.weighted_sum(weights),
    "gram": lambda J, _: J.gram(),
    "square": lambda J, _: J.square_sum(),
}
MODES: dict[str, dict[str, Any]] = {
    "kept": {},
    "8 at a time": {"chunk_size": 8},
    "one at a time": {"chunk_size": 1},
    "recompute": {"recompute": True},
}
# The models of all products, and the modes of products other than the clipped sum and
# norms.
SEVERAL = {
    "MLP 784-1024-1024-10, N=384",
    "deep sets, 64 members, N=64",
    "tanh RNN, 32 steps, 256 units, N=64",
    "embedding bag, 20,000 words, N=256",
    "next of 50,000 words, N=64",
    "transformer, list, T=64, N=32",
    "mixture of 8 experts, T=32, N=16",
    "conv net 28×28, N=128",
    "residual net 32×32, N=16",
}
FEWER_MODES = {"kept", "8 at a time", "recompute"}

Pair = tuple[float, float]  # old and new


class Case(NamedTuple):
    """A product of a model, in a mode."""

    model: str
    product: str
    mode: str

    def __str__(self) -> str:
        return " · ".join(self)


@dataclass(frozen=True)
class Entry:
    """What is known of a compiled program."""

    operations: float
    flops: float  # of products of matrices and convolutions, which operations include
    temp_bytes: int
    trace_seconds: float
    compile_seconds: float
    instructions: str  # a hash

    @property
    def build_seconds(self) -> float:
        """What it takes from Python to a program that can run."""
        return self.trace_seconds + self.compile_seconds


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for model in MODELS:
        if options.models and not any(
            x.lower() in model.name.lower() for x in options.models
        ):
            continue
        for product in options.products:
            for mode in options.modes:
                if product == "clipped" or (
                    model.name in SEVERAL and mode in FEWER_MODES
                ):
                    yield Case(model.name, product, mode)


# --------------------------------------------------------------------------------------
# In the process that has imported the package of one checkout


_compiled: dict[Case, Program] = {}  # at most one


def _set_up(checkout: Path) -> None:
    """Choose the package.

    Each program is compiled anew, whatever cache there is on disk.
    """
    sys.path.insert(0, str(checkout))
    jax.config.update("jax_enable_compilation_cache", False)


@lru_cache(maxsize=1)
def _problem(name: str) -> Problem:
    return next(model for model in MODELS if model.name == name)()


def _program(case: Case, repeats: int) -> Program:
    from pytree_grads import jacobian

    problem = _problem(case.model)
    weights = jnp.linspace(-1, 2, problem.size, dtype="float32")

    def run(*args):
        J = jacobian(problem.fun, in_axes=problem.in_axes, **MODES[case.mode])(*args)
        return PRODUCTS[case.product](J, weights)

    return compile_program(run, *problem.args, repeats=repeats, clock=time.process_time)


def _build(case: Case, repeats: int) -> Entry:
    """Trace and compile a program, and keep it for `_call`."""
    _compiled.clear()
    try:
        program = _program(case, repeats)
    except (
        Exception
    ) as error:  # JAX has exceptions that cannot be sent to another process
        raise RuntimeError(f"{type(error).__name__}: {str(error)[:300]}") from None
    _compiled[case] = program
    return Entry(
        operations=program.operations,
        flops=program.flops,
        temp_bytes=program.temp_bytes,
        trace_seconds=program.trace_seconds,
        compile_seconds=program.compile_seconds,
        instructions=hashlib.sha256(program.instructions().encode()).hexdigest()[:16],
    )


def _call(case: Case, times: int) -> float:
    program = _compiled[case]
    return timed(lambda: [program() for _ in range(times)])[1] / times


class Worker:
    """A process for the package of one checkout; one that dies is replaced."""

    def __init__(self, checkout: Path):
        self.checkout = checkout.resolve()
        self._start()

    def _start(self) -> None:
        self._pool = ProcessPoolExecutor(
            1, get_context("spawn"), _set_up, (self.checkout,)
        )

    def _run(self, fun: Callable[..., Any], *args: Any) -> Any:
        try:
            return self._pool.submit(fun, *args).result()
        except BrokenProcessPool:
            self._start()
            raise

    def build(self, case: Case, repeats: int) -> Entry:
        """The entry of a program, which is kept for `call`."""
        return self._run(_build, case, repeats)

    def call(self, case: Case, times: int) -> float:
        """The seconds of a call of the last program built, of several in a row."""
        return self._run(_call, case, times)


def calls_in_turn(case: Case, old: Worker, new: Worker, seconds: float) -> list[Pair]:
    """The seconds of a call, a pair per round.

    Old and new take turns in going first.
    """
    once = min(worker.call(case, 1) for worker in (old, new, old, new))
    times = max(1, round(SHORT / once))
    pairs: list[Pair] = []
    began = time.perf_counter()
    while len(pairs) < ROUNDS or time.perf_counter() - began < seconds:
        order = (old, new) if len(pairs) % 2 else (new, old)
        taken = {worker: worker.call(case, times) for worker in order}
        pairs.append((taken[old], taken[new]))
    return pairs


# --------------------------------------------------------------------------------------
# Files


def read(path: Path) -> dict[str, Entry]:
    return {
        name: Entry(**x) for name, x in json.loads(path.read_text())["programs"].items()
    }


def write(path: Path, entries: Mapping[str, Entry]) -> None:
    programs = {name: asdict(entry) for name, entry in entries.items()}
    path.write_text(
        json.dumps({"environment": environment(), "programs": programs}, indent=1)
    )


@dataclass
class Found:
    """What is known of the programs of the old and of the new package, by name."""

    old: dict[str, Entry]
    new: dict[str, Entry]
    calls: dict[str, list[Pair]]  # of those that differ

    def are_same(self, name: str) -> bool:
        """Whether the new program is the old one."""
        return self.old[name].instructions == self.new[name].instructions


def find(options: argparse.Namespace) -> Found:
    """Compile the programs.

    The file is written after each, so that `--resume` goes on there.
    """
    found = Found(read(options.against) if options.against else {}, {}, {})
    if options.resume and options.save.exists():
        found.new = read(options.save)
    missing = [case for case in cases(options) if str(case) not in found.new]
    worker = Worker(options.package)
    other = Worker(options.time) if options.time else None
    began, model = time.perf_counter(), ""
    for case in missing:
        if case.model != model:
            model = case.model
            log_progress(f"{time.perf_counter() - began:5.0f} s: {model}")
        try:
            _find_one(case, worker, other, found, options)
        except RuntimeError as error:  # a table with a gap is better than none
            log_progress(f"    {case}: {error}")
        if options.save:
            write(options.save, found.new)
    log_progress(f"{time.perf_counter() - began:5.0f} s")
    return found


def _find_one(
    case: Case,
    worker: Worker,
    other: Worker | None,
    found: Found,
    options: argparse.Namespace,
) -> None:
    name = str(case)
    if other:
        found.old[name] = other.build(case, options.repeats)
    found.new[name] = worker.build(case, options.repeats)
    if other and not found.are_same(name):
        found.calls[name] = calls_in_turn(case, other, worker, options.seconds)


# --------------------------------------------------------------------------------------
# Tables


def ratio(new: float, old: float) -> float:
    """New over old; 1 if both are zero."""
    if not old:
        return float("inf") if new else 1.0
    return new / old


def ratios(old: Entry, new: Entry) -> dict[str, float]:
    return {
        "operations": ratio(new.operations, old.operations),
        "products": ratio(new.flops, old.flops),
        "memory": ratio(new.temp_bytes, old.temp_bytes),
        "trace": ratio(new.trace_seconds, old.trace_seconds),
        "compile": ratio(new.compile_seconds, old.compile_seconds),
        "both": ratio(new.build_seconds, old.build_seconds),
    }


def comparison(found: Found) -> str:
    """The table of programs, and what there is to say of it."""
    times = {
        name: ratios(found.old[name], x)
        for name, x in found.new.items()
        if name in found.old
    }
    if not times:
        return "No program is in both."
    rows = []
    for name, x in times.items():
        old = found.old[name]
        rows.append(
            [
                name,
                f"{old.operations / 1e6:,.1f} M",
                *(f"{x[key]:.3f}" for key in ("operations", "products")),
                human_bytes(old.temp_bytes),
                f"{x['memory']:.3f}",
                human_seconds(old.build_seconds),
                *(f"{x[key]:.2f}" for key in TIMES),
                "yes" if found.are_same(name) else "no",
            ]
        )
    header = ["program", "operations", "×", "of products ×", "memory", "×"]
    header += ["trace + compile", "trace ×", "compile ×", "both ×", "same program"]
    parts = [markdown_table(header, rows), summary(found, times)]
    if found.calls:
        parts.append(call_table(found.calls))
    return "\n\n".join(parts)


def summary(found: Found, times: Mapping[str, Mapping[str, float]]) -> str:
    same = sum(map(found.are_same, times))
    told = [f"{len(times)} programs, {same} of them the same."]
    for key in COUNTS:
        worst = max(times, key=lambda name: times[name][key])
        told.append(f"Largest ratio of {key}: {times[worst][key]:.3f} ({worst}).")
    means = [
        f"{key} {geometric_mean(x[key] for x in times.values()):.3f}" for key in TIMES
    ]
    above = [
        f"- {name}: {', '.join(f'{key} {x[key]:.3f}' for key in COUNTS)}"
        for name, x in times.items()
        if max(x[key] for key in COUNTS) > ALLOWED
    ]
    parts = [" ".join(told), f"Mean ratios of the time to build: {', '.join(means)}."]
    parts.append(
        f"Above {ALLOWED}: {len(above)}." + "\n\n" * bool(above) + "\n".join(above)
    )
    parts += [f"Only old: {name}." for name in found.old if name not in found.new]
    parts += [f"Only new: {name}." for name in found.new if name not in found.old]
    return "\n\n".join(parts)


def call_table(calls: Mapping[str, Sequence[Pair]]) -> str:
    """The time of a call of those that differ."""
    quotients = {
        name: statistics.median(new / old for old, new in pairs)
        for name, pairs in calls.items()
    }
    rows = [
        [
            name,
            *(
                human_seconds(statistics.median(side))
                for side in zip(*pairs, strict=True)
            ),
            f"{quotients[name]:.3f}",
        ]
        for name, pairs in calls.items()
    ]
    mean = (
        f"Mean ratio of the time of a call: {geometric_mean(quotients.values()):.3f}."
    )
    return f"{markdown_table(['program', 'old', 'new', 'time ×'], rows)}\n\n{mean}"


# --------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--save", type=Path, help="a file to write what is found of the new programs to"
    )
    add(
        "--resume", action="store_true", help="keep what the file of --save has already"
    )
    add("--against", type=Path, help="such a file of the old programs")
    add(
        "--time",
        type=checkout,
        help="the old checkout, to compile and call both in turn",
    )
    add("--package", type=checkout, default=HERE, help="the new checkout")
    add(
        "--models",
        nargs="+",
        default=[],
        help="models whose name contains one of these words",
    )
    add("--products", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add(
        "--repeats",
        type=int,
        default=3,
        help="times that a program is compiled, at most",
    )
    add(
        "--seconds",
        type=float,
        default=2,
        help="for which a program is called, at least",
    )
    options = parser.parse_args()
    if not (options.save or options.against or options.time):
        parser.error("one of --save, --against and --time is needed")
    if options.resume and not options.save:
        parser.error("--resume goes with --save")
    return options


def checkout(name: str) -> Path:
    """A directory that has the package."""
    path = Path(name).resolve()
    if not (path / "pytree_grads" / "__init__.py").exists():
        raise argparse.ArgumentTypeError(f"there is no package in {name}")
    return path


def main() -> None:
    options = parse()
    found = find(options)
    if options.against or options.time:
        wanted = {str(case) for case in cases(options)}
        found.old = {name: x for name, x in found.old.items() if name in wanted}
        found.new = {name: x for name, x in found.new.items() if name in wanted}
        print(
            f"{environment()}. Old beside new; × is new over old.\n\n"
            f"{comparison(found)}"
        )


if __name__ == "__main__":
    main()
