"""Each example runs, and prints and draws what it says."""

import importlib.util
import re
import struct
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_tells_a_story_and_is_tested_here():
    tested = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'load("{path.stem}")' in tested, path.name
        assert len((load(path.stem).__doc__ or "").split()) > 40, path.name


def test_linear_combinations(capsys):
    load("linear_combinations").main([])
    small, large = capsys.readouterr().out.split("the same with 1,000 parameter arrays")
    assert re.findall(r"dm = (\S+) +db = (\S+)", small) == [("5.76", "3.2")] * 5
    differences = [float(text) for text in re.findall(r"off by (\S+) of its norm", large)]
    assert len(differences) == 5
    assert differences[0] == 0  # the ordinary gradient against itself
    assert max(differences) < 1e-5  # float32, a chain of 500 layers


def test_digits(capsys, tmp_path):
    figure = tmp_path / "digits.png"
    accuracy = load("digits").main(["--steps", "600", "--output", str(figure)])
    assert accuracy >= 0.95
    printed = capsys.readouterr().out
    assert f"test accuracy {accuracy:.1%}" in printed
    norms = [float(text) for text in re.findall(r"norm ([\d.]+),", printed)]
    assert len(norms) == 5
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] > 0
    header = figure.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", header[16:24]) > (1000, 500)  # width and height


def test_digits_stops_at_a_wrong_flag(capsys):
    with pytest.raises(SystemExit):
        load("digits").main(["--steps", "many"])
    assert "invalid int value" in capsys.readouterr().err
