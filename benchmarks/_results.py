"""Result files: what a command measured and on what, and notes written by hand."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
NOTES = "<!-- Notes: written by hand, kept by --save. -->"


def add_save_option(parser: argparse.ArgumentParser, name: str) -> None:
    """Add ``--save [NAME]``, which writes ``results/NAME.md``."""
    parser.add_argument(
        "--save",
        nargs="?",
        const=name,
        metavar="NAME",
        help="write the tables to benchmarks/results/NAME.md (%(const)s)",
    )


def save(name: str, title: str, environment: str, tables: str) -> Path:
    """Write a result file: the environment, the command of this process, the tables.

    A file that is there keeps its title and the notes below its tables.
    """
    path = RESULTS / f"{name}.md"
    notes = ""
    if path.exists():
        page = path.read_text()
        title = page.splitlines()[0].removeprefix("# ")
        notes = page.partition(NOTES)[2].strip()
    parts = [
        f"# {title}",
        environment,
        f"    {command()}",
        tables.strip(),
        NOTES,
        notes,
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def command() -> str:
    """The command of this process, as typed at the root of the repository."""
    flags = os.environ.get("XLA_FLAGS")
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return (f"XLA_FLAGS={shlex.quote(flags)} " if flags else "") + shlex.join(words)
