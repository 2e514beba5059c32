"""What the models share: a problem to measure, random arrays, and a few layers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Problem:
    """`fun(params, *shared, *example)` is a scalar.

    `batch` holds the stacked examples.
    """

    fun: Callable[..., jax.Array]
    params: Any
    batch: tuple[jax.Array, ...]
    shared: tuple[Any, ...] = ()

    @property
    def args(self) -> tuple[Any, ...]:
        return (self.params, *self.shared, *self.batch)

    @property
    def in_axes(self) -> tuple[int | None, ...]:
        return (None,) * (1 + len(self.shared)) + (0,) * len(self.batch)

    @property
    def size(self) -> int:
        return self.batch[0].shape[0]

    def head(self, size: int) -> Problem:
        """The problem of the first examples."""
        return replace(self, batch=tuple(x[:size] for x in self.batch))

    def repeated(self, times: int) -> Problem:
        """The problem with every example as many times, one after another."""
        return replace(
            self, batch=tuple(jnp.repeat(x, times, axis=0) for x in self.batch)
        )

    @property
    def parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.params))


class Draw:
    """Random arrays, the same for the same name at every run."""

    def __init__(self, name: str):
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))

    def __call__(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.standard_normal(shape, dtype="float32"))

    def weight(self, *shape: int, fan: int | None = None) -> jax.Array:
        """Weights that keep the scale; `fan` inputs, by default all axes but one."""
        return self(*shape) * float(fan or max(1, np.prod(shape[:-1]))) ** -0.5

    def ints(self, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.integers(high, size=shape), "int32")

    def dense(self, fan_in: int, fan_out: int) -> Any:
        return {"w": self.weight(fan_in, fan_out), "b": jnp.zeros(fan_out)}


def dense(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def layer_norm(p: Any, x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    spread = jnp.mean(centred**2, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(spread + 1e-5) * p["scale"] + p["bias"]


def norm_params(d: int) -> Any:
    return {"scale": jnp.ones(d), "bias": jnp.zeros(d)}


def stacked(blocks: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *blocks)
