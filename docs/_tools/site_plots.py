"""The plots of the benchmarks, drawn from the tables in benchmarks/results."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[1]
RESULTS = DOCS.parent / "benchmarks" / "results"
PLOTS = DOCS / "made" / "plots"
OURS, INK, QUIET = "#c8553d", "#22223b", "#8d8d9b"
PEERS = {
    "optax": ("#3d6fc8", "s"),
    "vmap(grad)": ("#5b9a68", "D"),
    "jax_privacy": ("#b08fd0", "^"),
    "jax_privacy, 1": ("#8b6fb0", "v"),
    "Opacus ghost": ("#3d6fc8", "s"),
    "BackPACK": ("#5b9a68", "D"),
}


def table(name: str, column: str) -> list[dict[str, str]]:
    """The rows of the first table of benchmarks/results/NAME.md with such a column."""
    text = (RESULTS / f"{name}.md").read_text()
    for lines in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        cells = [
            [cell.strip(" *") for cell in line.strip("|").split("|")]
            for line in lines.splitlines()
        ]
        if column in cells[0]:
            return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
    raise ValueError(f"{name}.md has no table with a column {column!r}")


def _number(cell: str, part: int = 0) -> float | None:
    """A figure of a cell, `time · memory`; None if it was not timed."""
    parts = [text.strip().replace(",", "") for text in cell.split("·")]
    try:
        return float(parts[part])
    except (ValueError, IndexError):
        return None


def _dots(
    axes: Axes,
    rows: Sequence[dict[str, str]],
    ways: dict[str, Callable[[dict[str, str]], float | None]],
    title: str,
) -> None:
    """A line for each model, a dot for each way, on a logarithmic scale."""
    for i, row in enumerate(rows):
        for way, figure in ways.items():
            color, marker = PEERS.get(way, (OURS, "o"))
            value = figure(row)
            if value:
                size = 55 if way == "pytree_grads" else 26
                axes.scatter(
                    value, i, size, color, marker, zorder=3, label="" if i else way
                )
    axes.axvline(1, color=INK, lw=1, zorder=1)
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.grid(alpha=0.25)
    axes.set_title(title, loc="left", fontsize=10)


def _legend(figure: Figure, ways: Sequence[str]) -> None:
    """All ways, also those that the first model lacks."""
    handles = [
        figure.axes[0].scatter([], [], 30, *PEERS.get(way, (OURS, "o")), label=way)
        for way in ways
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)


def peers(name: str, title: str, among: Sequence[str]) -> None:
    """Time and memory of ours and of peers, model by model."""
    rows = table(name, among[0])
    figure = Figure(figsize=(8.5, 1.4 + 0.24 * len(rows)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    for axes, part, column in ((time, 0, "time"), (memory, 1, "memory")):
        ways = {way: lambda row, w=way, p=part: _number(row[w], p) for way in among}
        ways["pytree_grads"] = lambda row, c=column: _number(row[c])
        _dots(axes, rows, ways, f"{column} ÷ that of the ordinary gradient")
    _legend(figure, ["pytree_grads", *among])
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(PLOTS / f"{name}.svg")


def torch_peers() -> None:
    """Times of peers of PyTorch."""
    rows = table("torch_peers", "BackPACK")
    among = ["Opacus ghost", "BackPACK"]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    ways = {way: lambda row, w=way: _number(row[w]) for way in among}
    ways["pytree_grads"] = lambda row: _number(row["ours (JAX)"])
    _dots(
        figure.subplots(),
        rows,
        ways,
        "time ÷ that of the ordinary gradient of the same framework",
    )
    _legend(figure, ["pytree_grads", *among])
    figure.savefig(PLOTS / "torch_peers.svg")


def compile_time() -> None:
    """What tracing and compiling takes."""
    rows = table("clipped", "compile")
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    values = [_number(row["compile"]) or 0 for row in rows]
    axes.barh([row["model"] for row in rows], values, color=OURS, height=0.6)
    axes.axvline(1, color=INK, lw=1)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title(
        "time to trace and compile ÷ that of the ordinary gradient",
        loc="left",
        fontsize=10,
    )
    figure.savefig(PLOTS / "compile.svg")


def chain_rule() -> None:
    """Time against memory of the chain rule in chunks."""
    rows = table("chain_rule", "encoder")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, color in zip(
        dict.fromkeys(row["encoder"] for row in rows),
        (OURS, "#3d6fc8", "#5b9a68", "#8b6fb0"),
        strict=False,
    ):
        of_one = [row for row in rows if row["encoder"] == name]
        whole = _mebibytes(of_one[0]["temporary"])
        chunks = [row for row in of_one if row["gradient"].startswith("chunks")]
        memory = [_mebibytes(row["temporary"]) / whole for row in chunks]
        time = [float(row["/ ordinary"]) for row in chunks]
        axes.plot(memory, time, "o-", color=color, label=name, lw=1)
        sizes = [row["gradient"].split()[-1] for row in chunks]
        for i in (0, -1):
            axes.annotate(sizes[i], (memory[i], time[i]), (4, 4), fontsize=8,
                          textcoords="offset points", color=QUIET)  # fmt: skip
    axes.scatter(1, 1, 60, INK, "x", label="ordinary gradient")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.set(xlabel="memory ÷ that of the ordinary gradient")
    title = "time ÷ that of the ordinary gradient, for chunks of 16 to 256 examples"
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(PLOTS / "chain_rule.svg")


def _mebibytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"KiB": 2**-10, "MiB": 1, "GiB": 2**10}[unit]


def draw_all() -> None:
    """Draw every plot of the page on benchmarks."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    of_jax = ["optax", "vmap(grad)", "jax_privacy", "jax_privacy, 1"]
    clipped = "Norms of all gradients and their clipped sum"
    peers("clipped", f"{clipped}, two CPU cores", of_jax)
    peers("gpu", f"{clipped}, one H200", ["vmap(grad)", "jax_privacy"])
    torch_peers()
    compile_time()
    chain_rule()
