"""Where an index keeps its features and marks: memory maps, or tensorstore."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

CHUNK = 1024  # rows of a block of tensorstore


class Store(Protocol):
    """(N, k) features in float32, and N marks of what is written."""

    @property
    def features(self) -> Any: ...  # (N, k), which NumPy reads as an array

    @property
    def written(self) -> Any: ...  # (N,) bools, likewise

    def put(self, start: int, block: np.ndarray) -> None:
        """Write rows, and return when they last."""
        ...

    def mark(self, start: int, stop: int) -> None:
        """Mark rows as written, and return when the marks last."""
        ...


# ------------------------------------------------------------------------------------
# NumPy's memory maps, for one machine


@dataclass(frozen=True)
class Maps:
    """Two files, which processes of one machine share."""

    features: np.ndarray
    written: np.ndarray

    def put(self, start: int, block: np.ndarray) -> None:
        self.features[start : start + len(block)] = block
        self.features.flush()  # type: ignore[attr-defined]

    def mark(self, start: int, stop: int) -> None:
        self.written[start:stop] = True
        self.written.flush()  # type: ignore[attr-defined]


def open_maps(path: str, header: dict[str, Any]) -> tuple[dict[str, Any], Maps]:
    """The header that is found, which is the given one if the index is new."""
    folder = Path(path)
    if not folder.exists():
        _create_maps(folder, header)
    if not (folder / "header.json").is_file():
        raise ValueError(f"{path} exists and is no index: give a path that is free")
    found = json.loads((folder / "header.json").read_text())
    if found["store"] != header["store"]:
        return found, Maps(np.zeros((0, 0)), np.zeros(0))  # which is refused

    def opened(name: str) -> np.ndarray:
        return np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+")

    return found, Maps(opened("features"), opened("written"))


def _create_maps(folder: Path, header: dict[str, Any]) -> None:
    """Make an empty index beside the path, and move it there as a whole.

    If another process was faster, its index stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.draft."))
    shape = header["size"], header["dim"]
    np.lib.format.open_memmap(draft / "features.npy", "w+", np.float32, shape)
    np.lib.format.open_memmap(draft / "written.npy", "w+", np.bool_, shape[:1])
    (draft / "header.json").write_text(json.dumps(header, indent=1))
    try:
        os.rename(draft, folder)
    except OSError:
        shutil.rmtree(draft)


# ------------------------------------------------------------------------------------
# tensorstore, for many machines


@dataclass(frozen=True)
class Blocks:
    """Two Zarr arrays of tensorstore in blocks of some rows."""

    features: Any
    written: Any

    def put(self, start: int, block: np.ndarray) -> None:
        self.features[start : start + len(block)].write(block).result()

    def mark(self, start: int, stop: int) -> None:
        self.written[start:stop].write(np.ones(stop - start, np.bool_)).result()


def open_blocks(path: str, header: dict[str, Any]) -> tuple[dict[str, Any], Blocks]:
    """The header that is found, which is the given one if the index is new."""
    try:
        import tensorstore
    except ImportError as error:
        raise ImportError(
            'store="tensorstore" needs the package tensorstore: install '
            "pytree_grads[store]"
        ) from error
    root = path if "://" in path else f"file://{Path(path).resolve()}"
    root = root.rstrip("/") + "/"
    files = tensorstore.KvStore.open(root).result()
    found = files.read("header.json").result()
    if found.state == "missing":
        # Another process may be making the same index: its parts are no strangers.
        own_keys = b"features/", b"written/", b"header.json"
        if not all(key.startswith(own_keys) for key in files.list().result()):
            raise ValueError(f"{path} exists and is no index: give a path that is free")

    def opened(name: str, dtype: Any, shape: list[int]) -> Any:
        spec = {"driver": "zarr3", "kvstore": f"{root}{name}/"}
        layout = tensorstore.ChunkLayout(chunk_shape=[CHUNK, *shape[1:]])
        options = {"dtype": dtype, "shape": shape, "chunk_layout": layout}
        return tensorstore.open(spec, create=True, open=True, **options).result()

    told = header if found.state == "missing" else json.loads(found.value)
    if told["store"] != header["store"]:
        return told, Blocks(None, None)  # which is refused
    shape = [told["size"], told["dim"]]
    own = Blocks(
        opened("features", "float32", shape), opened("written", "bool", shape[:1])
    )
    if found.state == "missing":
        # The arrays come first, so that an index with a header is whole. If another
        # process was faster, its header stays.
        text = json.dumps(header, indent=1)
        files.write("header.json", text, if_equal=found.stamp.generation).result()
        told = json.loads(files.read("header.json").result().value)
    return told, own


STORES = {"numpy": open_maps, "tensorstore": open_blocks}
