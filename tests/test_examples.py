"""Each example runs as its reader would run it, and prints and draws what it says."""

import ast
import re
import struct
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *flags: str, expected: int = 0) -> str:
    """What the example prints, with warnings as errors and a bounded time."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == expected, done.stderr
    return done.stdout if expected == 0 else done.stderr


def test_every_example_tells_a_story_and_is_run_here():
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in here, path.name
        story = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(story.split()) > 40, path.name


def test_linear_combinations():
    small, large = run("linear_combinations.py").split("the same with 1,000 parameter arrays")
    assert re.findall(r"dm = (\S+) +db = (\S+)", small) == [("5.76", "3.2")] * 5
    differences = [float(text) for text in re.findall(r"off by (\S+) of it", large)]
    assert len(differences) == 5
    assert max(differences) < 1e-6  # float32 rounding


def test_digits(tmp_path):
    figure = tmp_path / "digits.png"
    printed = run("digits.py", "--steps", "600", "--output", str(figure))
    accuracy = re.search(r"test accuracy ([\d.]+)%", printed)
    assert accuracy is not None
    assert float(accuracy[1]) >= 95
    norms = [float(text) for text in re.findall(r"norm ([\d.]+),", printed)]
    assert len(norms) == 5
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] > 0
    header = figure.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", header[16:24]) > (1000, 500)  # width and height


def test_digits_refuses_a_wrong_flag():
    assert "invalid int value" in run("digits.py", "--steps", "many", expected=2)
