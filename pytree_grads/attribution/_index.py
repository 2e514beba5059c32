"""An index of features on disk, which grows batch by batch, and survives a kill."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks
from ._stores import STORES, Store
from ._trak import solve_moment

# What a difference between two fingerprints means, in words for users.
MEANINGS = {
    "leaves": "parameters of another structure, order, shape or dtype",
    "values": "another model: the parameters have other values",
    "key": "another key",
    "kind": "another kind of sketch",
}


def fingerprint(params: Any, key: Any = None, *, kind: str = "dense") -> dict[str, Any]:
    """What features were made of: the parameters, and the key and kind of a sketch.

    Do not compare features with different fingerprints. An ``Index`` stores one
    fingerprint, and raises an error if features have another.

    Args:
      params: the parameters of J, a tree of arrays; their values are hashed.
      key: the PRNG key of the sketch; None for features that have none.
      kind: the kind of the sketch, a name.

    Returns:
      A dict of strings and lists, as JSON holds it.

    Raises:
      TypeError: a leaf of ``params`` is not an array.

    >>> import jax, jax.numpy as jnp
    >>> from pytree_grads.attribution import fingerprint
    >>> made_of = fingerprint({"w": jnp.zeros((2, 3))}, jax.random.key(0))
    >>> made_of["leaves"], made_of["kind"]
    ([["['w']", [2, 3], 'float32']], 'dense')
    """
    digest = hashlib.sha256()
    leaves = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path)
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"params{name} must be an array, got {leaf!r}")
        value = np.ascontiguousarray(leaf)
        digest.update(value.tobytes())
        leaves.append([name, list(np.shape(leaf)), str(leaf.dtype)])
    return {
        "leaves": leaves,
        "values": digest.hexdigest(),
        "key": None if key is None else _key_text(key),
        "kind": kind,
    }


def _key_text(key: Any) -> str:
    """The numbers of a key, typed or of the old kind, with its algorithm."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        numbers, name = jax.random.key_data(key), str(jax.random.key_impl(key))
    else:
        numbers, name = key, str(jax.random.key_impl(jax.random.wrap_key_data(key)))
    return f"{name}:{np.asarray(numbers).tolist()}"


def open_index(
    path: Any, *, size: int, dim: int, made_of: dict[str, Any], store: str = "numpy"
) -> "Index":
    """Make an index of N features of k numbers in float32, or open the one that exists.

    Args:
      path: a directory. It must not exist yet, or hold an index with the same ``size``,
        ``dim``, ``made_of`` and ``store``. Several processes may open it at the same
        time. For tensorstore also a URL, such as ``gs://bucket/index``.
      size: N, the number of training examples, an int ≥ 1.
      dim: k, the length of a feature, an int ≥ 1.
      made_of: the fingerprint of the features, from ``fingerprint(params, key)``.
      store: ``"numpy"`` keeps memory maps, for the processes of one machine.
        ``"tensorstore"`` keeps Zarr arrays in blocks of 1,024 rows, for many machines
        that share a file system or a cloud store; it needs the extra ``store``.

    Returns:
      An ``Index``, with the rows that were written before.

    Raises:
      TypeError: ``size`` or ``dim`` is not an int, or ``made_of`` is no fingerprint.
      ValueError: one is less than 1; ``store`` is another word; ``path`` is not an
        index, or has another size, dim, store, model, order of parameters, key or kind.
      ImportError: tensorstore is asked for and not installed.

    >>> import jax, jax.numpy as jnp, tempfile
    >>> from pytree_grads.attribution import fingerprint, open_index
    >>> made_of = fingerprint({"w": jnp.zeros(3)}, jax.random.key(0))
    >>> path = tempfile.mkdtemp() + "/index"
    >>> index = open_index(path, size=5, dim=2, made_of=made_of)
    >>> index.write(0, jnp.ones((3, 2)))
    >>> open_index(path, size=5, dim=2, made_of=made_of).rows()
    array([0, 1, 2])
    """
    size = _checks.whole("size", size, low=1)
    dim = _checks.whole("dim", dim, low=1)
    if store not in STORES:
        raise ValueError(f"store must be one of {[*STORES]}, got {store!r}")
    _check_fingerprint(made_of)
    path = str(path)
    header = {"size": size, "dim": dim, "store": store, "made_of": made_of}
    found, kept = STORES[store](path, header)
    for name in ("size", "dim", "store"):
        if found[name] != header[name]:
            raise ValueError(
                f"the index at {path} has {name} {found[name]}, not {header[name]}: "
                "open it with that, or make another index"
            )
    _check_made_of(found["made_of"], made_of, f"the index at {path}")
    return Index(path, size, dim, found["made_of"], kept)


def _check_fingerprint(given: Any) -> None:
    """Raise unless this has the parts of a fingerprint."""
    if not isinstance(given, dict) or not given.keys() >= MEANINGS.keys():
        raise TypeError(
            f"made_of must be what fingerprint(params, key) returns, got {given!r}"
        )


def _check_made_of(found: dict[str, Any], given: dict[str, Any], what: str) -> None:
    """Raise if two fingerprints differ, and say what that means."""
    _check_fingerprint(given)
    given = json.loads(json.dumps(given))
    for name, meaning in MEANINGS.items():
        if found.get(name) != given.get(name):
            told = "" if name == "values" else f" ({found.get(name)}, not "
            told += "" if name == "values" else f"{given.get(name)})"
            raise ValueError(
                f"{what} was made of {meaning}{told}: features of both must not be "
                "compared, so make another index"
            )


@dataclass(frozen=True, eq=False)
class Index:
    """Features of training examples on disk, of which any part may be written already.

    ``open_index`` makes it. ``write`` writes rows first and marks them afterwards. So a
    killed run loses only its current batch, and a marked row is always complete. Other
    processes see rows as soon as they are marked.

    Attributes:
      path: the directory or URL, which holds ``header.json``, the features and the
        marks.
      size: N, the number of training examples.
      dim: k, the length of a feature.
      made_of: the fingerprint of the features.
      store: what keeps the arrays. ``store.features``, (N, k) in float32 with zeros
        where nothing is written, and ``store.written``, (N,) bools, are a memory map or
        an array of tensorstore; ``np.asarray`` reads both.

    >>> import jax.numpy as jnp, tempfile
    >>> from pytree_grads.attribution import fingerprint, open_index
    >>> path = tempfile.mkdtemp() + "/index"
    >>> made_of = fingerprint({"w": jnp.zeros(2)})
    >>> index = open_index(path, size=4, dim=2, made_of=made_of)
    >>> for start, stop in index.missing(batch_size=3):
    ...     index.write(start, jnp.ones((stop - start, 2)))
    >>> scores, rows = index.scores(jnp.array([[1.0, 2.0]]), made_of)
    >>> print(scores, rows)
    [[3. 3. 3. 3.]] [0 1 2 3]
    """

    path: str
    size: int
    dim: int
    made_of: dict[str, Any]
    store: Store

    def missing(
        self, batch_size: int, *, part: int = 0, parts: int = 1
    ) -> Iterator[tuple[int, int]]:
        """The batches that are still to be written, as ``(start, stop)``.

        The call looks once, at the beginning, for what is missing. To divide the
        examples between processes, pass ``part=jax.process_index(),
        parts=jax.process_count()``.

        Args:
          batch_size: the largest number of examples of a batch, an int ≥ 1.
          part: which share of the examples, an int from 0 to ``parts`` − 1.
          parts: the number of shares, an int ≥ 1; each is a run of examples.

        Returns:
          An iterator over pairs of ints, in order.

        Raises:
          TypeError: an argument is not an int.
          ValueError: it is out of range.

        >>> import jax.numpy as jnp, tempfile
        >>> from pytree_grads.attribution import fingerprint, open_index
        >>> path = tempfile.mkdtemp() + "/index"
        >>> made_of = fingerprint({"w": jnp.zeros(2)})
        >>> index = open_index(path, size=6, dim=2, made_of=made_of)
        >>> index.write(1, jnp.ones((2, 2)))
        >>> list(index.missing(2)), list(index.missing(2, part=1, parts=2))
        ([(0, 1), (3, 5), (5, 6)], [(3, 5), (5, 6)])
        """
        batch_size = _checks.whole("batch_size", batch_size, low=1)
        parts = _checks.whole("parts", parts, low=1)
        part = _checks.whole("part", part, low=0)
        if part >= parts:
            raise ValueError(f"part must be less than parts, {parts}, got {part}")
        first, last = part * self.size // parts, (part + 1) * self.size // parts
        written = np.asarray(self.store.written[first:last])
        free = np.concatenate([[False], ~written, [False]])
        (edges,) = np.nonzero(free[1:] != free[:-1])
        runs = (first + edges).reshape(-1, 2).tolist()
        return (
            (start, min(start + batch_size, end))
            for begin, end in runs
            for start in range(begin, end, batch_size)
        )

    def write(self, start: int, features: Any) -> None:
        """Write the features of a batch, and mark its rows when they are on disk.

        Args:
          start: the number of the batch's first example, an int.
          features: (B, k) in float32.

        Raises:
          TypeError: ``features`` is not in float32, or ``start`` not an int.
          ValueError: its shape does not fit, a number is not finite, or a row is
            already written.

        >>> import jax.numpy as jnp, tempfile
        >>> from pytree_grads.attribution import fingerprint, open_index
        >>> path = tempfile.mkdtemp() + "/index"
        >>> made_of = fingerprint({"w": jnp.zeros(2)})
        >>> index = open_index(path, size=4, dim=2, made_of=made_of)
        >>> index.write(2, jnp.array([[1.0, 2.0]]))
        >>> index.store.features[2]
        memmap([1., 2.], dtype=float32)
        """
        start = _checks.whole("start", start, low=0)
        block = np.asarray(features)
        if block.dtype != np.float32:
            raise TypeError(
                f"features must be in float32, got {block.dtype}: write "
                "features.astype('float32')"
            )
        fits = block.ndim == 2 and block.shape[1] == self.dim
        if not fits or start + len(block) > self.size:
            raise ValueError(
                f"features must have shape (B, {self.dim}) with start + B at most "
                f"{self.size}, got {block.shape} from {start} on"
            )
        stop = start + len(block)
        if np.asarray(self.store.written[start:stop]).any():
            raise ValueError(
                f"some of the rows {start} to {stop - 1} are already written: "
                "loop over index.missing(batch_size)"
            )
        if not np.isfinite(block).all():
            bad = start + np.nonzero(~np.isfinite(block).all(axis=1))[0]
            raise ValueError(f"features of examples {bad[:8].tolist()} are not finite")
        if len(block):
            self.store.put(start, block)
            self.store.mark(start, stop)

    def rows(self) -> np.ndarray:
        """The numbers of the examples that are written, in order.

        Returns:
          An array of ints, (R,).

        >>> import jax.numpy as jnp, tempfile
        >>> from pytree_grads.attribution import fingerprint, open_index
        >>> path = tempfile.mkdtemp() + "/index"
        >>> made_of = fingerprint({"w": jnp.zeros(2)})
        >>> open_index(path, size=4, dim=2, made_of=made_of).rows()
        array([], dtype=int64)
        """
        return np.nonzero(np.asarray(self.store.written))[0]

    def scores(
        self,
        queries: Any,
        made_of: dict[str, Any],
        *,
        damping: float | None = None,
        block_size: int = 65536,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the examples that are written, read block by block.

        Without ``damping`` they are inner products Φ_q Φᵀ, as TracIn has them. With it,
        they are Φ_q (ΦᵀΦ + λ)⁻¹ Φᵀ, as TRAK has them before residuals multiply them:
        ``scores * residuals[rows]``.

        Args:
          queries: (Q, k) of floats, features of the queries; the scores have their
            dtype, and no less than float32.
          made_of: their fingerprint, which must be that of the index.
          damping: λ ≥ 0, or None for inner products.
          block_size: how many rows are in memory at a time, an int ≥ 1.

        Returns:
          ``(scores, rows)``, (Q, R) and (R,), for the R examples that are written at
          the time of the call: ``rows`` holds their numbers.

        Raises:
          TypeError: an argument is of the wrong kind.
          ValueError: the fingerprints differ; a shape does not fit; or ΦᵀΦ + λ is
            singular.

        >>> import jax.numpy as jnp, tempfile
        >>> from pytree_grads.attribution import fingerprint, open_index
        >>> path = tempfile.mkdtemp() + "/index"
        >>> made_of = fingerprint({"w": jnp.zeros(2)})
        >>> index = open_index(path, size=3, dim=2, made_of=made_of)
        >>> index.write(0, jnp.array([[1.0, 0.0], [0.0, 2.0]]))
        >>> print(*index.scores(jnp.array([[1.0, 1.0]]), made_of, damping=0.0))
        [[1.  0.5]] [0 1]
        """
        _check_made_of(self.made_of, made_of, f"the index at {self.path}")
        block_size = _checks.whole("block_size", block_size, low=1)
        queries = _checks.floats("queries", queries, "(Q, k)")
        _checks.same("numbers of a feature", queries=queries.shape[1], index=self.dim)
        rows = self.rows()
        blocks = [rows[i : i + block_size] for i in range(0, len(rows), block_size)]
        if damping is not None:
            damping = _checks.number("damping", damping, low=0.0)
            moment = jnp.zeros((self.dim, self.dim), queries.dtype)
            for block in blocks:
                phi = self._read(block).astype(queries.dtype)
                moment = moment + phi.T @ phi
            queries = solve_moment(moment, damping, queries)
        scores = np.empty((len(queries), len(rows)), queries.dtype)
        for i, block in enumerate(blocks):
            own = slice(i * block_size, i * block_size + len(block))
            scores[:, own] = queries @ self._read(block).T.astype(queries.dtype)
        return scores, rows

    def _read(self, rows: np.ndarray) -> jax.Array:
        """The features of examples, whose numbers ascend: (R, k)."""
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows):
            rows = slice(first, last + 1)  # type: ignore[assignment]
        return jnp.asarray(np.asarray(self.store.features[rows]))
