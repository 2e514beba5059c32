"""Time products with the per-example gradients against the ordinary gradient.

    python benchmarks/per_example.py [--only NAME ...] [--quick] [--products clipped
        gram ...] [--peers [NAME ...]] [--no-routes] [--depths [N ...]] [--repeats 5]
        [--times 1] [--save [NAME]]

Prints Markdown, and tells what it does meanwhile on the standard error. The ordinary
gradient is `jax.grad` of the sum of the losses of the batch, which is mapped over with
`jax.vmap`; all else is given as multiples of it, measured in the same run. See
`_models.py` for the models. A fast peer may work on microbatches of 8 examples or of 1;
`at best` lets ours take such chunks too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
from _figures import (
    Figure,
    log_progress,
    measure,
    over_families,
    shown,
)
from _layers import Draw, Problem
from _measure import (
    Program,
    compile_program,
    environment,
    human_bytes,
    human_seconds,
    markdown_table,
    trace_seconds,
)
from _models import COMPUTED, MODELS, Model, mlp
from _results import add_save_option, save
from _ways import PEERS, PRODUCTS, ROUTES, installed, ordinary, ours, peers_with

CHOICES = (
    "factored",
    "materialised",
    "one at a time",
    "vmap(grad)",
)  # for the cost model
SIZES = ("8 at a time", "one at a time")  # of chunks, as those of peers
DEEPEST_COMPILED = 300  # layers
TORCH = (
    "The peers of PyTorch are multiples of torch's own ordinary gradient of the same "
    "model in the "
    "same run, and count as such in ÷ best peer; their memory is not known, and – is "
    "what they "
    "cannot do."
)


@dataclass(frozen=True)
class Entry:
    """A product of a model, by all ways that were tried."""

    model: Model
    problem: Problem
    base: Program
    seconds: float  # of the ordinary gradient
    figures: Mapping[str, Figure]

    @property
    def ours(self) -> Figure:
        """The package, with the route that it chooses."""
        return self.figures["auto"]

    def times(self, names: Iterable[str]) -> dict[str, float]:
        """The times of those of some ways that were run."""
        found = {
            name: self.figures[name].time for name in names if name in self.figures
        }
        return {name: x for name, x in found.items() if x is not None}

    def bytes_of(self, names: Sequence[str]) -> list[int]:
        """The temporary memory of those of some ways that could be compiled."""
        found = [
            self.figures[name].temp_bytes for name in names if name in self.figures
        ]
        return [count for count in found if count >= 0]

    def best(self, names: Iterable[str]) -> float | None:
        """The least time of those of some ways that were run."""
        return min(self.times(names).values(), default=None)

    @property
    def best_peer(self) -> float | None:
        """The time of the fastest peer."""
        return self.best(self.figures.keys() - ROUTES.keys())

    @property
    def over_best_peer(self) -> float | None:
        """Our time over that of the fastest peer."""
        return _over(self.ours.time, self.best_peer)

    @property
    def best_over_best_peer(self) -> float | None:
        """The same, where we too may take a few examples at a time, as peers do."""
        return _over(self.best(("auto", *SIZES)), self.best_peer)

    @property
    def over_best_route(self) -> float | None:
        """Our time over that of the fastest route, rows by hand among them."""
        return _over(self.ours.time, self.best(CHOICES))


def _over(one: float | None, other: float | None) -> float | None:
    """A quotient of times, if both are known."""
    return one / other if one and other else None


def run(model: Model, options: argparse.Namespace) -> dict[str, Entry]:
    """The entries of a model, by product."""
    problem = model()
    base = compile_program(ordinary(problem), *problem.args, repeats=3)
    entries = {}
    for product in options.products:
        names = ["auto"]
        if options.peers and product == "clipped":
            names.append("8 at a time")
        if options.routes:
            names += [x for x in ROUTES if product == "clipped" or x == "factored"]
        if options.peers:
            names += [
                x for x in peers_with(product, problem.size) if x in options.peers
            ]
        ways = {
            name: partial((ROUTES | PEERS)[name], product=product) for name in names
        }
        seconds, figures = measure(
            problem,
            base,
            ways,
            rounds=options.repeats,
            seconds=options.seconds,
            cap=options.memory_cap * 2**30,
            careful=("auto",),
        )
        if "torch" in options.peers:
            figures |= torch_figures(model, problem, product, options)
        entries[product] = Entry(model, problem, base, seconds, figures)
        told = ", ".join(f"{name} {figure}" for name, figure in figures.items())
        log_progress(f"    {product}, {human_seconds(seconds)}: {told}")
    return entries


def torch_figures(
    model: Model, problem: Problem, product: str, options: argparse.Namespace
) -> dict[str, Figure]:
    """The figures of the peers of PyTorch, none where it is not installed."""
    if not installed("torch", "torch"):
        return {}
    import _torch_peers

    cap = options.memory_cap * 2**30
    return _torch_peers.figures(
        model.family, problem, product, rounds=options.repeats, cap=cap
    )


# --------------------------------------------------------------------------------------
# Tables


def peers_of(entries: Sequence[Entry]) -> tuple[list[str], list[str]]:
    """The peers that were tried, those of JAX and those of PyTorch."""
    tried = dict.fromkeys(name for entry in entries for name in entry.figures)
    others = [name for name in tried if name not in ROUTES and name not in PEERS]
    return [name for name in PEERS if name in tried], others


def product_table(entries: Sequence[Entry]) -> str:
    jax_peers, torch_peers = peers_of(entries)
    names = jax_peers + torch_peers
    header = [
        "model",
        "ordinary",
        "memory",
        "**time**",
        "**memory**",
        "**FLOPs**",
        "**compile**",
    ]
    few = any("8 at a time" in entry.figures for entry in entries)
    if names:
        header += ["8 at a time"] * few + [*names, "÷ best peer"] + ["at best"] * few
    rows = []
    for entry in entries:
        mine = entry.ours
        row = [
            entry.model.name,
            human_seconds(entry.seconds),
            human_bytes(entry.base.temp_bytes),
            *map(shown, (mine.time, mine.memory, mine.flops, mine.build)),
        ]
        row[3] += mine.note
        if names:
            shares = [entry.over_best_peer] + [entry.best_over_best_peer] * few
            told = ["8 at a time"] * few + names
            row += [str(entry.figures.get(name, "–")) for name in told]
            row += map(shown, shares)
        rows.append(row)
    table = markdown_table(header, rows)
    return f"{TORCH}\n\n{table}" if torch_peers else table


def route_table(entries: Sequence[Entry]) -> str:
    names = list(ROUTES)
    rows = [
        [
            entry.model.name,
            *(str(entry.figures.get(name, "")) for name in names),
            shown(entry.over_best_route),
        ]
        for entry in entries
    ]
    return markdown_table(["model", *names, "auto ÷ best"], rows)


def summary(results: Mapping[str, Sequence[Entry]]) -> str:
    rows = []
    for product, entries in results.items():
        families = {entry.model.name: entry.model.family for entry in entries}
        # One example is its own sum: what it takes beside is next to nothing, and would
        # say much.
        several = [entry for entry in entries if entry.problem.size > 1]
        counted = {
            "time": entries,
            "memory": several,
            "flops": entries,
            "build": entries,
        }
        columns = {
            name: {entry.model.name: getattr(entry.ours, name) for entry in own}
            for name, own in counted.items()
        }
        columns["peer"] = {entry.model.name: entry.over_best_peer for entry in entries}
        columns["at best"] = {
            entry.model.name: entry.best_over_best_peer for entry in entries
        }
        row = [PRODUCTS[product]]
        for values in columns.values():
            known = {name: x for name, x in values.items() if x is not None and x == x}
            worst = max(known, key=known.__getitem__, default=None)
            row.append(shown(over_families(known, families)))
            row.append("–" if worst is None else f"{shown(known[worst])} ({worst})")
        rows.append(row)
    header = ["product"]
    for name in (
        "time",
        "memory",
        "FLOPs",
        "compile",
        "time ÷ best peer",
        "best ÷ best peer",
    ):
        header += [name, f"worst {name}"]
    # a row per figure reads better than twelve columns
    return markdown_table(
        ["", *(row[0] for row in rows)],
        [[header[i], *(row[i] for row in rows)] for i in range(1, len(header))],
    )


def choices(results: Mapping[str, Sequence[Entry]]) -> str:
    """How often the choice of route is good."""
    lines, good, total = [], 0, 0
    for product, entries in results.items():
        for entry in entries:
            if (quotient := entry.over_best_route) is None:
                continue
            total += 1
            good += quotient <= 1.1
            if quotient > 1.1:
                routes = entry.times(CHOICES)
                best = min(routes, key=routes.__getitem__)
                lines.append(
                    [entry.model.name, PRODUCTS[product], shown(quotient), best]
                )
    told = (
        "The route that is chosen is within 10 % of the best one of factors, rows and "
        "one example "
        f"at a time in {good} of {total} entries."
    )
    if lines:
        told += " The others:\n\n"
        told += markdown_table(["model", "product", "auto ÷ best", "best"], lines)
    return told


def memory_against_peers(entries: Sequence[Entry]) -> str:
    """The least memory in which a clipped sum is had, ours against the peers'."""
    rows = []
    for entry in entries:
        mine, theirs = entry.bytes_of(list(ROUTES)), entry.bytes_of(PEERS)
        if mine and theirs:
            quotient = min(mine) / max(1, min(theirs))
            rows.append(
                [
                    entry.model.name,
                    human_bytes(min(mine)),
                    human_bytes(min(theirs)),
                    shown(quotient),
                ]
            )
    return markdown_table(["model", "ours", "peers", "quotient"], rows)


# --------------------------------------------------------------------------------------


def depth_table(depths: Sequence[int]) -> str:
    """The time to trace and to compile a list of layers of the same shape.

    Very deep ones are only traced.
    """
    rows = []
    for layers in depths:
        problem = mlp(Draw("depth"), (16,) * (layers + 1), 8)
        log_progress(f"depth {layers}")
        seconds = []
        for fun in (ordinary(problem), ours(problem, "clipped")):
            if layers > DEEPEST_COMPILED:
                seconds.append((trace_seconds(fun, *problem.args), None))
            else:
                made = compile_program(
                    fun, *problem.args, repeats=3 if layers <= 100 else 1
                )
                seconds.append((made.trace_seconds, made.compile_seconds))
        (trace, build), (our_trace, our_build) = seconds
        rows.append(
            [
                f"{layers:,}",
                *((x and human_seconds(x)) or "–" for pair in seconds for x in pair),
                shown(our_trace / trace),
                shown(our_build / build if build else None),
                shown((our_trace + our_build) / (trace + build) if build else None),
                human_seconds(our_trace / layers),
            ]
        )
    header = ["layers", "ordinary: trace", "compile", "ours: trace", "compile"]
    header += ["trace ×", "compile ×", "both ×", "trace per layer"]
    return markdown_table(header, rows)


def versions() -> str:
    """What was run and what was not there."""
    packages = {"optax": "optax", "jax_privacy": "jax_privacy", "opacus": "opacus"}
    packages |= {"backpack": "backpack-for-pytorch", "torch": "torch"}
    found = {name: installed(name, package) for name, package in packages.items()}
    told = [f"{name} {version or 'not installed'}" for name, version in found.items()]
    return f"{environment()}; {', '.join(told)}."


def rounds(options: argparse.Namespace) -> str:
    """How often it was timed."""
    told = f"Medians of {options.repeats} rounds"
    if options.seconds:
        told += f"; of what can be done in {options.seconds:g} s where ways are nearly "
        told += "the fastest"
    return f"{told}."


def report(results: Mapping[str, Sequence[Entry]], options: argparse.Namespace) -> str:
    results = {product: entries for product, entries in results.items() if entries}
    parts = ["## Means and worst cases", summary(results)]
    for product, entries in results.items():
        title = PRODUCTS[product]
        parts += [f"## {title[0].upper()}{title[1:]}", product_table(entries)]
    if options.routes:
        parts += ["## Routes to the clipped sum"] if "clipped" in results else []
        parts += [route_table(results["clipped"])] if "clipped" in results else []
        parts.append(choices(results))
        if options.peers and "clipped" in results:
            parts += ["## The least memory", memory_against_peers(results["clipped"])]
    if options.depths:
        parts += ["## Depth", depth_table(options.depths)]
    return "\n\n".join(parts) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add(
        "--only",
        nargs="+",
        default=[],
        help="models whose name contains one of these words",
    )
    add(
        "--quick", action="store_true", help="three models, to see that everything runs"
    )
    add(
        "--computed",
        action="store_true",
        help="models whose weights are computed from parameters, and no others",
    )
    add("--times", type=int, default=1, help="as many examples, for larger devices")
    add("--products", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    peers = [*PEERS, "torch"]
    add("--peers", nargs="*", choices=peers, default=peers, help="none to skip")
    add("--routes", action=switch, default=True)
    add(
        "--depths",
        nargs="*",
        type=int,
        default=[10, 100, 1000],
        help="layers; none to skip",
    )
    add("--repeats", type=int, default=5, help="rounds of timing")
    add(
        "--seconds",
        type=float,
        default=4,
        help="for which the fastest are timed, at least",
    )
    add(
        "--memory-cap",
        type=float,
        default=6,
        help="GiB; what would need more is not run",
    )
    add(
        "--minutes",
        type=float,
        default=float("inf"),
        help="no model is begun after that many",
    )
    add_save_option(parser, "per_example")
    return parser.parse_args()


def main() -> None:
    options = parse()
    log_progress(versions())
    results: dict[str, list[Entry]] = {product: [] for product in options.products}
    began = time.perf_counter()
    for model in COMPUTED if options.computed else MODELS:
        wanted = any(word.lower() in model.name.lower() for word in options.only)
        if (options.only and not wanted) or (options.quick and not model.quick):
            continue
        if time.perf_counter() - began > 60 * options.minutes:
            log_progress(f"{model.name}: left out")
            continue
        start = time.perf_counter()
        model = model.repeated(options.times)
        log_progress(model.name)
        try:
            for product, entry in run(model, options).items():
                results[product].append(entry)
        except Exception as error:  # a table with a gap is better than none
            log_progress(f"    {type(error).__name__}: {str(error)[:500]}")
        log_progress(f"    {time.perf_counter() - start:.0f} s")
        jax.clear_caches()
    tables = report(results, options)
    ran_on = f"{versions()} {rounds(options)}"
    print(f"{ran_on}\n\n{tables}")
    if options.save:
        save(options.save, "Per-example products", ran_on, tables)


if __name__ == "__main__":
    main()
