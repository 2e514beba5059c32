"""Each example runs as its reader would run it, and prints and draws what it says."""

import ast
import os
import re
import socket
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_release

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *flags: str, expected: int = 0, **environment: str) -> str:
    """What the example prints, with warnings as errors and a bounded time."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == expected, done.stderr
    return done.stdout if expected == 0 else done.stderr


def test_every_example_tells_a_story_and_is_run_here():
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in here, path.name
        story = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(story.split()) > 40, path.name


def test_linear_combinations(tmp_path):
    figure = tmp_path / "sum.png"
    printed = run("linear_combinations.py", "--lines", "50", "--output", str(figure))
    small, large = printed.split("the same with 100 parameter arrays")
    assert re.findall(r"dm = (\S+) +db = (\S+)", small) == [("5.76", "3.2")] * 5
    differences = [float(text) for text in re.findall(r"off by (\S+) of it", large)]
    assert len(differences) == 5
    assert max(differences) < 1e-6  # float32 rounding
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")


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
    ways = re.findall(r"^  (\S.*?) +[\d.]+ ms, +([\d.]+) MiB", printed, re.MULTILINE)
    assert len(ways) == 6  # of a batch, and of all training images
    for plain, ours, rows in (
        map(float, dict(ways[i : i + 3]).values()) for i in (0, 3)
    ):
        assert ours < 2 * plain
        assert ours < rows / 10
    header = figure.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", header[16:24]) > (1000, 500)  # width and height


def test_digits_refuses_a_wrong_flag():
    assert "invalid int value" in run("digits.py", "--steps", "many", expected=2)


def test_contrastive(tmp_path):
    figure = tmp_path / "contrastive.png"
    flags = [
        "--steps",
        "4",
        "--images",
        "256",
        "--chunk",
        "64",
        "--output",
        str(figure),
    ]
    printed = run("contrastive.py", *flags)
    assert re.search(r"the whole batch (wins|loses) by [\d.]+ nats", printed)
    ways = re.findall(
        r"held-out loss ([\d.]+), neighbours right ([\d.]+)%, (\d+) MiB", printed
    )
    assert len(ways) == 2
    whole = re.search(r"in one piece takes (\d+) MiB", printed)
    assert whole is not None
    for loss, right, memory in ways:
        assert float(loss) < 6.8  # the logarithm of 904 images: the answer of a guess
        assert float(right) > 60
        assert int(memory) < int(whole[1]) / 2
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")


def test_contrastive_refuses_uneven_microbatches():
    refused = run("contrastive.py", "--images", "100", "--chunk", "64", expected=2)
    assert "multiple of --chunk" in refused


def test_second_order(tmp_path):
    figure = tmp_path / "second_order.png"
    printed = run("second_order.py", "--steps", "4", "--output", str(figure))
    losses = re.findall(r"Gauss-Newton ([\d.]+), Adam ([\d.]+), and", printed)
    curved = [float(loss) for loss, _ in losses]
    assert len(curved) == 4
    assert curved == sorted(curved, reverse=True)
    assert curved[-1] < float(losses[-1][1]) / 3
    accuracies = re.findall(r"test accuracy ([\d.]+)%", printed)
    assert min(map(float, accuracies)) > 85
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")


def test_weights(tmp_path):
    figure = tmp_path / "weights.png"
    printed = run("weights.py", "--steps", "150", "--output", str(figure))
    *models, soup = map(float, re.findall(r"([\d.]+)%", printed.splitlines()[0]))
    assert soup >= min(models)
    assert soup > 90
    tasks = dict(
        re.findall(r"^(.*\S) +reads ([\d.]+)% of 0 to 4", printed, re.MULTILINE)
    )
    before, after = float(tasks["the start"]), float(tasks["with the task of 0 to 4"])
    assert after > before > float(tasks["without the task of 0 to 4"]) + 50
    of_all = dict(
        re.findall(r"^(.*\S) +reads .* ([\d.]+)% of all", printed, re.MULTILINE)
    )
    assert float(of_all["with half of both"]) > float(of_all["the start"]) + 5
    carried, by_hand = map(float, re.findall(r"off by ([\d.]+)% of its way", printed))
    assert carried < 2  # the last rounding to bfloat16
    assert by_hand > 20  # stalled
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")


def test_two_tasks(tmp_path):
    figure = tmp_path / "two_tasks.png"
    printed = run("two_tasks.py", "--steps", "150", "--output", str(figure))
    rises = dict(
        re.findall(r"^(\w+) +a loss rises in +([\d.]+)%", printed, re.MULTILINE)
    )
    assert float(rises["mean"]) > 10
    for rule in ("upgrad", "mgda", "nash_mtl"):
        assert float(rises[rule]) == 0
    read = re.findall(r"reads ([\d.]+)% of the digits, ([\d.]+)% of the", printed)
    assert min(max(float(x) for x in both) for both in read) > 30
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")


def test_noise_scale(tmp_path):
    figure = tmp_path / "noise_scale.png"
    printed = run("noise_scale.py", "--steps", "200", "--output", str(figure))
    known = re.findall(
        r": ([\d.]+) \(([\d.]+)\), without bias (\S+) \((\S+)\)", printed
    )
    assert len(known) == 4
    for plain, expected, unbiased, sign_change in known:
        assert float(plain) == pytest.approx(float(expected), rel=1e-3)
        assert float(unbiased) == pytest.approx(float(sign_change), rel=1e-3)
    grows = re.search(r"grows from (\d+) to (\d+)", printed)
    assert grows is not None
    assert int(grows[2]) > 2 * int(grows[1])
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")


def test_every_example(tmp_path):
    figure = tmp_path / "every_example.png"
    printed = run("every_example.py", "--steps", "60", "--output", str(figure))
    told = re.findall(
        r"^(\w+) +loss ([\d.]+), test accuracy ([\d.]+)%; ([\d.]+)%",
        printed,
        re.MULTILINE,
    )
    losers = {name: float(share) for name, _, _, share in told}
    assert losers["mean"] > 5
    assert losers["upgrad"] < 0.1
    assert min(float(accuracy) for _, _, accuracy, _ in told) > 80
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")


def test_language_model(tmp_path):
    figure = tmp_path / "language_model.png"
    printed = run("language_model.py", "--steps", "80", "--output", str(figure))
    line = re.search(r"correlation ([\d.-]+), slope ([\d.-]+)", printed)
    assert line is not None
    assert float(line[1]) > 0.8
    assert 1 < float(line[2]) < 2
    losses = re.findall(r"held-out loss ([\d.]+) nats", printed)
    assert len(losses) == 2
    assert max(map(float, losses)) < 3.2  # 4.6 is the logarithm of 96 letters
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")


def test_attribution(tmp_path):
    figure = tmp_path / "attribution.png"
    printed = run("attribution.py", "--steps", "100", "--output", str(figure))
    found = dict(
        re.findall(
            r"^(\S.*\S) +of the first \d+ suspects, (\d+)%", printed, re.MULTILINE
        )
    )
    assert float(found["influence on itself"]) > 75
    assert min(map(float, found.values())) > 20  # a tenth of all labels is wrong
    accuracies = re.findall(r"test accuracy ([\d.]+)%", printed)
    assert len(accuracies) == 2
    assert min(map(float, accuracies)) > 75
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")


def test_kernels(tmp_path):
    figure = tmp_path / "kernels.png"
    flags = ["--steps", "100", "--seeds", "12", "--labels", "50", "400"]
    printed = run("kernels.py", *flags, "--output", str(figure))
    told = {
        name: [float(x) for x in re.findall(r"([\d.]+)%", values)]
        for name, values in re.findall(r"^(\D+?)  +(\d.*%)$", printed, re.MULTILINE)
    }
    assert len(told) == 5
    assert min(told["before training"][-1], told["infinite width"][-1]) > 95
    assert told["pixels"][-1] < told["infinite width"][-1]
    slope = re.search(r"slope (\S+) in log width", printed)
    assert slope is not None
    assert -0.6 < float(slope[1]) < -0.4
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")


def test_private_digits(tmp_path):
    pytest.importorskip("jax_privacy", reason="the extra `privacy` is not installed")
    figure = tmp_path / "private.png"
    printed = run("private_digits.py", "--steps", "40", "--output", str(figure))
    told = dict(
        re.findall(r"^(\S.*\S) +test accuracy ([\d.]+)%", printed, re.MULTILINE)
    )
    assert float(told["not private"]) > 80
    assert told["private"] == told["jax_privacy"]
    assert min(float(x) for x in told.values()) > 50
    away = re.search(r"differ by at most (\S+)", printed)
    assert away is not None
    assert float(away[1]) < 1e-5
    sensitivities = re.findall(r"a sensitivity of ([\d.]+)", printed)
    assert [float(x) for x in sensitivities] == [0.005, 0.00492]
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")


def test_multi_device(tmp_path):
    """One device, eight, and two processes print the same."""
    flags = ["--steps", "100", "--output", str(tmp_path / "multi_device.png")]

    def process(own):
        return run(
            "multi_device.py", *flags, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(own),
        )  # fmt: skip

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        both, other = pool.map(process, range(2))
    assert "step" not in other  # one of them tells
    one = run("multi_device.py", *flags)
    eight = run("multi_device.py", *flags, JAX_NUM_CPU_DEVICES="8")
    told = [
        re.findall(r"^(?:to step|test).*", text, re.MULTILINE)
        for text in (one, eight, both)
    ]
    assert len(told[0]) == 6
    losses, *rest = [
        [float(x) for x in re.findall(r"loss ([\d.]+)", str(ls))] for ls in told
    ]
    assert rest == [pytest.approx(losses, abs=2e-3)] * 2
    for lines in told:
        assert float(re.findall(r"accuracy ([\d.]+)%", lines[-1])[0]) > 85
    for text, found in (
        (one, "1 devices in 1"),
        (eight, "8 devices in 1"),
        (both, "2 devices in 2"),
    ):
        assert f"{found} processes" in text
