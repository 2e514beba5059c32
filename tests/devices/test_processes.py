"""Several processes over ``jax.distributed``: the same as one, no hanging, and a way to
go on.
"""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import tree_allclose

pytestmark = pytest.mark.any_release

SUPPORT = Path(__file__).resolve().parents[1] / "support"
STARTING = (
    150  # seconds that two processes may take to start and compile on a busy machine
)
# Seconds after which a process that lost its peer has ended; its heartbeat takes 10.
ENDING = 90


class Run:
    """Processes of one run, which end with it whatever happens."""

    def __init__(self, directory, processes, worker="worker.py", **options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.started, self.stack = [], ExitStack()
        paths = [str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment.pop("XLA_FLAGS", None)
        for own in range(processes):
            arguments = {"own": own, "processes": processes, "port": port, **options}
            log = self.stack.enter_context((directory / f"log{own}").open("w"))
            self.started.append(
                subprocess.Popen(
                    [sys.executable, str(SUPPORT / worker), json.dumps(arguments)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.started:
            process.kill()
            process.communicate()
        self.stack.close()

    def said(self, own):
        return (self.directory / f"log{own}").read_text()

    def wait_for(self, words, seconds=STARTING):
        """Until every process has said some words."""
        for own, process in enumerate(self.started):
            for _ in range(10 * seconds):
                ended = process.poll() is not None
                if words in self.said(own):
                    break
                assert not ended, self.said(own)
                time.sleep(0.1)
            else:
                pytest.fail(f"process {own} has not said {words!r}: {self.said(own)}")

    def finish(self, seconds=STARTING):
        for own, process in enumerate(self.started):
            assert process.wait(seconds) == 0, self.said(own)


def parameters(path):
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one")
    with Run(directory, 1, output=str(directory / "params.npz")) as run:
        run.finish()
    return parameters(directory / "params.npz")


def test_two_processes_train_as_one_does(tmp_path, in_one_process):
    with Run(tmp_path, 2, output=str(tmp_path / "params.npz")) as run:
        run.finish()
    assert tree_allclose(parameters(tmp_path / "params.npz"), in_one_process)


def test_one_process_trains_as_one_device_does(in_one_process):
    import worker

    with jax.enable_x64(True):
        params = worker.start()
        for step in range(6):
            params, _ = worker.advance(params, *worker.batch(step))
        assert tree_allclose(in_one_process, params)


def test_a_process_whose_peer_is_killed_ends_with_an_error(tmp_path):
    with Run(tmp_path, 2, steps=10**9) as run:
        run.wait_for("step 3")
        run.started[1].kill()
        assert run.started[0].wait(ENDING) != 0
        assert "rror" in run.said(0)


def test_a_killed_run_resumes_from_its_checkpoint(tmp_path, in_one_process):
    checkpoints = {"checkpoints": str(tmp_path / "checkpoints")}
    with Run(tmp_path / "first", 2, pause=5, **checkpoints) as run:
        run.wait_for("waiting")
    with Run(
        tmp_path / "second", 2, output=str(tmp_path / "params.npz"), **checkpoints
    ) as run:
        run.finish()
        assert "resumed at step 4" in run.said(0)
        assert "step 4:" not in run.said(0)
    assert tree_allclose(parameters(tmp_path / "params.npz"), in_one_process)


def test_processes_write_their_shares_of_an_index(tmp_path):
    """In both stores; the scores are the same numbers as those of one process."""
    pytest.importorskip("tensorstore", reason="the extra `store` is not installed")
    found = []
    for processes in (1, 2):
        directory = tmp_path / str(processes)
        with Run(directory, processes, "index_worker.py", folder=str(directory)) as run:
            run.finish()
        found += [np.load(path) for path in sorted(directory.glob("*.npy"))]
    first, *others = found
    assert first.shape == (3, 64)
    assert len(others) == 5  # of two stores, by each process
    for other in others:
        np.testing.assert_array_equal(other, first)
