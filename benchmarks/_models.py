"""Models to measure: per-example losses, each with parameters and a batch.

Nothing here is written for the package: the losses are plain `jax.numpy`, scans and
convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import _computed as computed
import jax
import jax.numpy as jnp
from _images import depthwise_net, mixer, residual_net, small_conv_net
from _layers import Draw, Problem, cross_entropy, dense
from _sequences import embedding_bag, gru, lstm, next_word, rnn, state_space
from _transformers import low_rank_adapters, mixture_of_experts, transformer


def mlp(draw: Draw, widths: tuple[int, ...], n: int) -> Problem:
    def fun(params, x, label):
        *hidden, last = params
        for p in hidden:
            x = jax.nn.relu(dense(p, x))
        return cross_entropy(dense(last, x), label)

    params = [draw.dense(a, b) for a, b in pairwise(widths)]
    return Problem(fun, params, (draw(n, widths[0]), draw.ints(widths[-1], n)))


def task_heads(draw: Draw, tasks: int, n: int, d: int = 512) -> Problem:
    """One trunk, and a small network for each task."""

    def fun(p, x, labels):
        x = jax.nn.gelu(dense(p["trunk"][1], jax.nn.gelu(dense(p["trunk"][0], x))))
        losses = [
            cross_entropy(dense(head["out"], jnp.tanh(dense(head["hidden"], x))), label)
            for head, label in zip(p["heads"], labels, strict=True)
        ]
        return sum(losses)

    heads = [
        {"hidden": draw.dense(d, 32), "out": draw.dense(32, 5)} for _ in range(tasks)
    ]
    params = {"trunk": [draw.dense(256, d), draw.dense(d, d)], "heads": heads}
    return Problem(fun, params, (draw(n, 256), draw.ints(5, n, tasks)))


def deep_sets(
    draw: Draw, n: int, members: int = 64, groups: int = 8, d: int = 128
) -> Problem:
    """Members are embedded and added up by group, and the groups once more."""

    def fun(p, x, group, label):
        x = jax.nn.relu(dense(p["inner"][1], jax.nn.relu(dense(p["inner"][0], x))))
        x = jax.ops.segment_sum(x, group, groups) / 8
        x = jnp.mean(jax.nn.relu(dense(p["outer"], x)), axis=0)
        return cross_entropy(dense(p["out"], x), label)

    inner = [draw.dense(16, d), draw.dense(d, d)]
    params = {"inner": inner, "outer": draw.dense(d, d), "out": draw.dense(d, 10)}
    batch = draw(n, members, 16), draw.ints(groups, n, members), draw.ints(10, n)
    return Problem(fun, params, batch)


@dataclass(frozen=True)
class Model:
    """A member of a family at a certain shape."""

    name: str
    family: str
    build: Callable[[Draw], Problem]
    quick: bool = False  # part of the short run

    def __call__(self) -> Problem:
        """The same problem at every run."""
        return self.build(Draw(self.family))

    def repeated(self, times: int) -> Model:
        """The model with every example as many times."""
        if times == 1:
            return self
        name = re.sub(r"(?<=N=)\d+", lambda size: str(times * int(size[0])), self.name)
        return replace(
            self, name=name, build=lambda draw: self.build(draw).repeated(times)
        )


def _model(
    name: str,
    build: Callable[..., Problem],
    *shape: Any,
    quick: bool = False,
    **options,
):
    family = build.__name__ + "".join(
        f" {key}" for key in options if options[key] is True
    )
    return Model(name, family, lambda draw: build(draw, *shape, **options), quick)


DIGITS = (784, 1024, 1024, 10)

MODELS = [
    _model("MLP 784-1024-1024-10, N=128", mlp, DIGITS, 128, quick=True),
    _model("MLP 784-1024-1024-10, N=1", mlp, DIGITS, 1),
    _model("MLP 784-1024-1024-10, N=384", mlp, DIGITS, 384),
    _model("MLP 784-1024-1024-10, N=1024", mlp, DIGITS, 1024),
    _model("MLP of 32 layers of 64, N=256", mlp, (64,) * 33, 256),
    _model("MLP 512-4096-4096-10, N=64", mlp, (512, 4096, 4096, 10), 64),
    _model("20 task heads, N=128", task_heads, 20, 128),
    _model("deep sets, 64 members, N=64", deep_sets, 64),
    _model("tanh RNN, 32 steps, 256 units, N=64", rnn, 32, 256, 64, quick=True),
    _model("LSTM, 64 steps, 128 units, N=32", lstm, 64, 128, 32),
    _model("GRU, 16 steps, 512 units, N=32", gru, 16, 512, 32),
    _model("state space, 256 steps, N=16", state_space, 256, 16),
    _model(
        "embedding bag, 20,000 words, N=256",
        embedding_bag,
        20_000,
        64,
        64,
        256,
        quick=True,
    ),
    _model("next of 50,000 words, N=64", next_word, 50_000, 64, 8, 64),
    _model("transformer, list, T=64, N=32", transformer, 64, 32),
    _model("transformer, list, T=16, N=64", transformer, 16, 64),
    _model("transformer, list, T=256, N=8", transformer, 256, 8),
    _model("transformer, remat list, T=64, N=16", transformer, 64, 16, remat=True),
    _model("transformer, scan, T=64, N=32", transformer, 64, 32, scan=True),
    _model(
        "transformer, remat scan, T=64, N=32",
        transformer,
        64,
        32,
        scan=True,
        remat=True,
    ),
    _model(
        "tied language model, T=32, N=16",
        transformer,
        32,
        16,
        layers=2,
        d=128,
        vocabulary=8000,
        tied=True,
    ),
    _model("mixture of 8 experts, T=32, N=16", mixture_of_experts, 32, 16),
    _model("low-rank adapters, T=64, N=16", low_rank_adapters, 64, 16),
    _model("conv net 28×28, N=128", small_conv_net, 128),
    _model("residual net 32×32, N=16", residual_net, 16),
    _model("depthwise net 64×64, N=16", depthwise_net, 16),
    _model("MLP-mixer, 64 patches, N=32", mixer, 32),
]

# Weights that are computed from parameters, and terms that examples share.
COMPUTED = [
    _model("mask, N=128", computed.mask, 512, 128),
    _model("learned scale, N=128", computed.learned_scale, 512, 128),
    _model("weight norm, N=128", computed.weight_norm, 512, 128),
    _model("spectral norm, N=128", computed.spectral_norm, 512, 128),
    _model("merged adapters, N=128", computed.merged_adapters, 512, 128),
    _model("permuted, N=128", computed.permuted, 512, 128),
    _model("softplus, N=128", computed.softplus, 512, 128),
    _model("mask at 16 positions, N=64", computed.masked_sequence, 256, 64),
    _model("weight decay in the loss, N=128", computed.weight_decay, 512, 128),
    _model("learned step, N=128", computed.learned_step, 512, 128),
    _model("flow with log-determinant, N=128", computed.flow, 256, 128),
    _model("Kalman filter, N=64", computed.kalman_filter, 16, 64),
    _model("vmapped embedding, N=64", computed.vmapped_embedding, 128, 64),
    _model("word2vec with 16 negatives, N=256", computed.word2vec, 128, 256),
    _model("hash grid, N=128", computed.hash_grid, 64, 128),
    _model("vocabulary in chunks, N=16", computed.chunked_vocabulary, 128, 16),
]
