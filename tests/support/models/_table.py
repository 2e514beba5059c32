"""The table of models: small functions of one example, each with parameters and a
batch.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

N = 5  # examples in a batch


class Draw:
    """Random numbers of float32 in arrays of the default precision, the same at every
    run.
    """

    def __init__(self, name: str):
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))

    def __call__(self, *shape: int, scale: float = 0.7):
        return jnp.asarray(np.float32(scale * self.rng.standard_normal(shape)), float)

    def ints(self, high: int, *shape: int):
        return jnp.asarray(self.rng.integers(high, size=shape), "int32")

    def complex(self, *shape: int):
        x = np.float32(self.rng.standard_normal((2, *shape)))
        return jnp.asarray(x[0] + 1j * x[1], complex)


@dataclass(frozen=True)
class Model:
    """`build(draw)` gives `(fun, params, batch)`; `fun(params, *example)` is a scalar.

    `dense` names the leaves that are known to have a dense term of their size: no other
    leaf with two wide axes may lose its factors. `promotes` says that a library
    promotes dtypes when it runs in float64.
    """

    name: str
    build: Callable[[Draw], tuple[Callable[..., Any], Any, tuple[Any, ...]]]
    dense: frozenset[str]
    promotes: bool

    def __call__(self):
        return self.build(Draw(self.name))


MODELS: dict[str, Model] = {}


def model(*dense: str, promotes: bool = False):
    """Put a builder into the table.

    `dense` are key paths as `jax.tree_util.keystr` prints them.
    """

    def register(build):
        name = build.__name__
        assert name not in MODELS
        MODELS[name] = Model(name, build, frozenset(dense), promotes)
        return build

    return register
