"""Random programs: a grammar of primitives that grows functions of parameters and one
example.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

N, T, D, WORDS = 4, 3, 3, 6
Step = Callable[[dict[str, Any], Any, Any], Any]  # (params, h, (x, tokens)) -> h


@dataclass
class Scope:
    """The parameters made so far, by name and shape, and the shape of the current value
    h.
    """

    choose: Callable[[list], Any]
    shape: tuple[int, int] = (T, D)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outer: "Scope | None" = None
    names: list[str] = field(default_factory=list)  # of the steps taken
    casts: list[bool] = field(default_factory=list)

    @property
    def depth(self):
        return 0 if self.outer is None else 1 + self.outer.depth

    def visible(self):
        return self.shapes | (self.outer.visible() if self.outer else {})

    def number(self, low, high):
        return self.choose(list(range(low, high + 1)))

    def param(self, *shape):
        """A parameter of a shape: an old one, perhaps, or its transpose.

        Else a new one.
        """
        old = [(name, False) for name, s in self.visible().items() if s == shape]
        if len(shape) == 2:
            old += [
                (name, True) for name, s in self.visible().items() if s == shape[::-1]
            ]
        if old and self.choose([True, True, False]):
            name, turned = self.choose(old)
            self.names.append(f"reuse {name}{'.T' if turned else ''}")
            return lambda p: p[name].T if turned else p[name]
        name = f"p{self.depth}_{len(self.visible())}"
        made, read = self.choose(DISGUISES)(self, shape)
        self.shapes[name] = made
        return lambda p: read(p[name])

    def inner(self):
        return Scope(
            self.choose, self.shape, outer=self, names=self.names, casts=self.casts
        )


# How a parameter may be stored: its shape, and how what is used comes from it.


def plain(scope, shape):
    return shape, lambda w: w


def folded(scope, shape):
    return (int(np.prod(shape)),), lambda w: w.reshape(shape)


def cut(scope, shape):
    bigger = (*shape[:-1], shape[-1] + 2)
    return bigger, lambda w: w[..., 1:-1]


def split(scope, shape):
    bigger = (*shape[:-1], 2 * shape[-1])
    return bigger, lambda w: jnp.subtract(*jnp.split(w, 2, axis=-1))


def joined(scope, shape):
    return (2, *shape), lambda w: jnp.concatenate([w[0], w[1]], axis=0)[-shape[0] :]


def backwards(scope, shape):
    return shape, lambda w: jnp.flip(w, 0)


def multiple(scope, shape):
    factor = scope.choose([2.0, -1.0, 0.5])
    return shape, lambda w: factor * w if factor != -1.0 else -w


def strided(scope, shape):
    return (2 * shape[0], *shape[1:]), lambda w: w[::2]


def narrow(scope, shape):
    scope.casts.append(True)
    return shape, lambda w: w.astype(jnp.float32).astype(w.dtype)


def squared(scope, shape):
    return shape, lambda w: w * jnp.abs(w)


# Weights that are computed from parameters, with coefficients that all examples share.


def _mask(shape):
    return np.arange(int(np.prod(shape))).reshape(shape) % 3 != 1


def masked(scope, shape):
    return shape, lambda w: w * _mask(shape).astype(w.dtype)


def chosen(scope, shape):
    return shape, lambda w: jnp.where(_mask(shape), w, jnp.zeros((), w.dtype))


def positive(scope, shape):
    return shape, jax.nn.softplus


def normal(scope, shape):
    """Normalised along one axis, or along all."""
    axis = scope.choose([0, -1, None])

    def read(w):
        return w / jnp.sqrt(0.1 + jnp.sum(w**2, axis=axis, keepdims=True))

    return shape, read


def permuted(scope, shape):
    order = np.random.default_rng(sum(shape)).permutation(shape[0])
    return shape, lambda w: w[order]


def repeated(scope, shape):
    """Lines of a smaller parameter, taken several times."""
    lines = np.arange(shape[0]) // 2
    return (int(lines[-1]) + 1, *shape[1:]), lambda w: w[lines]


def through(scope, shape):
    size = shape[0]
    matrix = np.sin(np.arange(size * (size + 1)).reshape(size, size + 1))
    return (size + 1, *shape[1:]), lambda w: jnp.tensordot(
        matrix.astype(w.dtype), w, axes=1
    )


def scaled(scope, shape):
    """Scaled by lines of the same parameter: of all entries, or of the first axis."""
    if scope.choose([True, False]):
        return (shape[0] + 1, *shape[1:]), lambda w: w[1:] * w[:1]
    return (*shape[:-1], shape[-1] + 1), lambda w: w[..., 1:] * w[..., :1]


def merged(scope, shape):
    """The product of two thin matrices."""
    if len(shape) != 2:
        return scaled(scope, shape)
    lines = shape[0]
    return (sum(shape), 2), lambda w: w[:lines] @ w[lines:].T


def cumulative(scope, shape):
    return shape, lambda w: jnp.cumsum(w, axis=0)


def solved(scope, shape):
    size = shape[0]
    lower = np.tril(np.ones((size, size))) + np.eye(size)

    def read(w):
        flat = w.reshape(size, -1)
        solution = jax.scipy.linalg.solve_triangular(
            lower.astype(w.dtype), flat, lower=True
        )
        return solution.reshape(shape)

    return shape, read


COMPUTED = [
    masked,
    chosen,
    positive,
    normal,
    permuted,
    repeated,
    through,
    scaled,
    merged,
    cumulative,
    solved,
]
DISGUISES = (
    [plain] * 8
    + COMPUTED
    + [
        folded,
        cut,
        split,
        joined,
        backwards,
        multiple,
        strided,
        narrow,
        squared,
    ]
)


# Steps: each takes h of shape (t, d) to another such array. Those in BODY keep t.


def dense(scope):
    t, d = scope.shape
    width = scope.number(1, 4)
    w = scope.param(d, width)
    spec = scope.choose(["td,de->te", "de,td->te", "td,de->et"])
    scope.shape = (t, width)

    def step(p, h, example):
        out = jnp.einsum(spec, *((w(p), h) if spec.startswith("de") else (h, w(p))))
        return out.T if spec.endswith("et") else out

    return step


def bias(scope):
    b = scope.param(scope.shape[1])
    return lambda p, h, example: h + b(p)[None]


def scale(scope):
    g = scope.param(scope.shape[1])
    return lambda p, h, example: h * g(p)[None]


def nonlinear(scope):
    fun = scope.choose(
        [jnp.tanh, jnp.sin, jax.nn.sigmoid, jax.nn.relu, partial(jnp.cumsum, axis=0)]
    )
    return lambda p, h, example: fun(h)


def softmax(scope):
    return lambda p, h, example: jax.nn.softmax(h, axis=-1) + h


def normalize(scope):
    return lambda p, h, example: h * lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 0.1)


def words(scope):
    """Look words up in a table, all at once or one of them, and add or multiply."""
    t, d = scope.shape
    table = scope.param(WORDS, d)
    kind = scope.choose(["all", "one", "one-hot", "fill", "mapped", "along", "entries"])

    def step(p, h, example):
        tokens = jnp.resize(example[1], t)
        if kind == "one":
            return h * table(p)[tokens[0]][None]
        if kind == "one-hot":
            return h + jax.nn.one_hot(tokens, WORDS, dtype=h.dtype) @ table(p)
        if kind == "fill":
            return h + jnp.take(table(p), tokens + 2, axis=0, mode="fill", fill_value=0)
        if kind == "mapped":
            return h + jax.vmap(lambda i: table(p)[i])(tokens)
        if kind == "along":
            return h + jnp.take_along_axis(table(p), tokens[:, None], axis=0)
        if kind == "entries":
            return h + table(p)[tokens[:, None], jnp.arange(d)[None]]
        return h + table(p)[tokens]

    return step


def penalty(scope):
    """A term that all examples share, and one that they share up to a factor."""
    t, d = scope.shape
    w = scope.param(t, d)
    return lambda p, h, example: h + 0.1 * jnp.sum(w(p) ** 2) + h[0, 0] * w(p)


def convolve(scope):
    t, d = scope.shape
    width, taps = scope.number(1, 3), scope.number(1, 3)
    kernel = scope.param(taps, d, width)
    scope.shape = (t, width)

    def step(p, h, example):
        numbers = ("NHC", "HIO", "NHC")
        return lax.conv_general_dilated(
            h[None], kernel(p), (1,), "SAME", dimension_numbers=numbers
        )[0]

    return step


def attend(scope):
    _, d = scope.shape
    q, k, v = scope.param(d, 2), scope.param(d, 2), scope.param(d, d)

    def step(p, h, example):
        scores = jnp.einsum("tk,sk->ts", h @ q(p), h @ k(p))
        return h + jax.nn.softmax(scores) @ (h @ v(p))

    return step


def residual(scope):
    step = body(scope)
    return lambda p, h, example: h + step(p, h, example)


def remat(scope):
    policies = jax.checkpoint_policies
    policy = scope.choose([None, policies.dots_saveable, policies.nothing_saveable])
    prevent_cse = scope.choose([True, False])
    step = body(scope)

    def whole(p, h, example):
        again = jax.checkpoint(step, policy=policy, prevent_cse=prevent_cse)
        return again(p, h, example)

    return whole


def call(scope):
    step = body(scope)
    return lambda p, h, example: jax.jit(step)(p, h, example)


def branch(scope):
    one, other = body(scope), body(scope)

    def step(p, h, example):
        return lax.cond(example[0][0, 0] > 0, one, other, p, h, example)

    return step


def again(scope):
    """The same body several times, with one set of parameters: the gradient is in the
    carry.
    """
    step, reverse = body(scope), scope.choose([True, False])

    def whole(p, h, example):
        return lax.scan(
            lambda h, _: (step(p, h, example), None), h, length=2, reverse=reverse
        )[0]

    return whole


def remember(scope):
    """A reference that a body reads and writes: at once, in a call, or in a loop."""
    step, how = body(scope), scope.choose(["at once", "in a call", "in a loop"])

    def whole(p, h, example):
        memory = jax.new_ref(h)

        def write():
            memory[...] = 0.5 * step(p, memory[...], example)
            memory[0] += jnp.sin(memory[-1])

        if how == "in a loop":
            lax.scan(lambda *_: (write(), None), None, length=2)
        else:
            (jax.jit(write) if how == "in a call" else write)()
        memory[0] = memory[-1] * memory[0]
        return memory[...]

    return whole


def layers(scope):
    """A body with parameters of its own for each of a few layers."""
    count, unroll = scope.number(1, 3), scope.choose([1, 2])
    inner = scope.inner()
    step = body(inner)
    own = list(inner.shapes)
    for name, shape in inner.shapes.items():
        scope.shapes[name] = (count, *shape)

    def whole(p, h, example):
        def layer(h, slices):
            return step(p | slices, h, example), None

        return lax.scan(layer, h, {n: p[n] for n in own}, length=count, unroll=unroll)[
            0
        ]

    return whole


def over_time(scope):
    """A recurrent net over the lines of h."""
    _, d = scope.shape
    width, reverse = scope.number(1, 3), scope.choose([True, False])
    w, u = scope.param(d, width), scope.param(width, width)
    twice = scope.choose([True, False])
    scope.shape = (scope.shape[0], width)

    def step(p, h, example):
        def cell(c, line):
            c = jnp.tanh(line @ w(p) + c @ u(p) + (jnp.sin(c) @ u(p).T if twice else 0))
            return c, c * 2

        return lax.scan(cell, jnp.zeros(width, h.dtype), h, reverse=reverse)[1]

    return step


def transpose(scope):
    scope.shape = scope.shape[::-1]
    return lambda p, h, example: h.T


def reshape(scope):
    t, d = scope.shape
    rows = scope.choose([n for n in range(1, t * d + 1) if t * d % n == 0])
    scope.shape = (rows, t * d // rows)
    shape = scope.shape
    return lambda p, h, example: h.reshape(shape)


def part(scope):
    t, d = scope.shape
    end = scope.number(1, t)
    scope.shape = (end, d)
    return lambda p, h, example: h[:end] if end % 2 else h[::-1][:end]


def widen(scope):
    t, d = scope.shape
    if t * d > 12:
        return part(scope)
    scope.shape = (2 * t, d)
    return lambda p, h, example: jnp.concatenate([h, jnp.roll(h, 1, axis=0)])


def pool(scope):
    _, d = scope.shape
    scope.shape = (2, d)
    return lambda p, h, example: jax.ops.segment_sum(
        h, jnp.arange(len(h)) % 2, num_segments=2
    )


SIMPLE = [
    dense,
    dense,
    dense,
    bias,
    scale,
    nonlinear,
    softmax,
    normalize,
    words,
    convolve,
    attend,
]
SIMPLE += [over_time, penalty]
NESTED = [residual, remat, call, branch, again, layers, remember]
SHAPES = [transpose, reshape, part, widen, pool]


def body(scope):
    """A few steps that end in the shape in which they start."""
    shape = scope.shape
    kinds = SIMPLE + (NESTED if scope.depth < 1 and len(scope.names) < 12 else [])
    steps = grow(scope, kinds, scope.number(1, 2))
    if scope.shape != shape:
        back = scope.param(scope.shape[1], shape[1])
        steps.append(lambda p, h, example: jnp.tanh(h @ back(p)))
        scope.shape = shape
    return in_turn(steps)


def grow(scope, kinds, count):
    steps = []
    for _ in range(count):
        kind = scope.choose(kinds)
        scope.names.append(kind.__name__)
        steps.append(kind(scope))
    return steps


def in_turn(steps):
    def step(p, h, example):
        for one in steps:
            h = one(p, h, example)
        return h

    return step


@dataclass(frozen=True)
class Program:
    fun: Callable[..., Any]  # of params, x (T, D) and tokens (T,)
    shapes: dict[str, tuple[int, ...]]
    names: tuple[str, ...]
    casts: bool  # whether it rounds to float32 on the way
    outputs: int | None

    def arguments(self, seed):
        rng = np.random.default_rng(seed)
        params = {
            name: jnp.asarray(0.7 * rng.standard_normal(shape), float)
            for name, shape in self.shapes.items()
        }
        x = jnp.asarray(rng.standard_normal((N, T, D)), float)
        return params, x, jnp.asarray(rng.integers(WORDS, size=(N, T)), "int32")


def program(choose):
    """A random program; `choose` picks one of a list."""
    scope = Scope(choose)
    steps = grow(scope, SIMPLE * 2 + NESTED * 2 + SHAPES, choose([2, 3, 4, 5]))
    if not scope.shapes:
        steps.append(dense(scope))
    outputs = choose([None, None, 2])

    def fun(p, x, tokens):
        h = in_turn(steps)(p, x, (x, tokens))
        if outputs is None:
            return jnp.sum(jnp.sin(h))
        return jnp.stack([jnp.sum(jnp.sin(h)), jnp.sum(h[0])])

    return Program(fun, scope.shapes, tuple(scope.names), bool(scope.casts), outputs)
