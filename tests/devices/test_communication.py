"""What devices send to each other, read from the compiled programs: what the
mathematics needs.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pytree_grads import chain_rule_grad, jacobian

WIDTHS = [24, 32, 16]
SHAPES = list(itertools.pairwise(WIDTHS))
COUNT = sum(m * n for m, n in SHAPES)
FACTORS = sum(m + n for m, n in SHAPES)
N, T = 64, 3
SENDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
MODES = [{}, {"recompute": True}, {"chunk_size": 16}]

both_kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
all_modes = pytest.mark.parametrize("settings", MODES, ids=str)


def mlp(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def exchanges(text):
    """``(operation, number of entries)`` for each array that is sent, from a compiled
    program.
    """
    found = []
    for shapes, name in re.findall(rf" = (.*?) ({SENDS})(?:-start)?\(", text):
        for dims in re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]*)\]", shapes):
            found.append((name, math.prod(int(n) for n in dims.split(",") if n)))
    return found


def sent(call, kind, names=None, positions=()):
    """What is sent where the batch is sharded over eight devices, and parameters over
    `names`.
    """
    spec = P(names)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        params = [
            jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
            for shape in SHAPES
        ]
        x = jax.device_put(
            jnp.ones((N, *positions, WIDTHS[0])), NamedSharding(mesh, P("data"))
        )
        out = jax.eval_shape(call, params, x)
        is_sum = isinstance(out, list) and [leaf.shape for leaf in out] == SHAPES
        options = {"out_shardings": NamedSharding(mesh, spec)} if is_sum else {}
        return exchanges(jax.jit(call, **options).lower(params, x).compile().as_text())


def test_the_reader_of_programs_reads():
    """An exchange of two arrays at once, and one whose result comes later."""
    text = """
      %all-reduce.3 = (f32[24,32]{1,0}, f32[]) all-reduce(%a, %b), channel_id=1
      %all-reduce.4 = pred[] all-reduce(%d), channel_id=2
      ROOT %ag = (bf16[2,3]{1,0}, bf16[16,3]{1,0}) all-gather-start(%c), dimensions={0}
      %done = bf16[16,3]{1,0} all-gather-done(%ag)
    """
    assert exchanges(text) == [
        ("all-reduce", 768),
        ("all-reduce", 1),
        ("all-reduce", 1),
        ("all-gather", 6),
        ("all-gather", 48),
    ]


def chain_rule(settings):
    return chain_rule_grad(jnp.sum, mlp, chunk_size=settings.get("chunk_size"))


SUMS = {
    "sum": lambda settings: lambda p, x: jacobian(mlp, **settings)(p, x).sum(),
    "clipped": lambda settings: (
        lambda p, x: jacobian(mlp, **settings)(p, x).clip(0.5).sum()
    ),
    "squares": lambda settings: (
        lambda p, x: jacobian(mlp, **settings)(p, x).square_sum()
    ),
    "chain rule": chain_rule,
}
CASES = [
    *itertools.product(SUMS, MODES, [()]),
    *itertools.product(["clipped"], MODES, [(T,)]),
]


@both_kinds
@pytest.mark.parametrize("name, settings, positions", CASES, ids=str)
def test_a_sum_over_rows_is_one_sum_over_devices(kind, name, settings, positions):
    """Of as many numbers as there are parameters, whatever N is, and of a scalar at the
    most.
    """
    found = sent(SUMS[name](settings), kind, positions=positions)
    assert {name for name, _ in found} == {"all-reduce"}, found
    large = [size for _, size in found if size > 1]
    assert sum(large) == COUNT, found
    assert len(found) - len(large) <= 1, found


@both_kinds
@all_modes
@pytest.mark.parametrize("positions", [(), (T,)], ids=["vectors", "sequences"])
def test_numbers_per_row_send_nothing(kind, settings, positions):
    def call(params, x):
        J = jacobian(mlp, **settings)(params, x)
        return J.clip(0.5).norms(), J @ params

    assert sent(call, kind, positions=positions) == []


@both_kinds
@pytest.mark.parametrize("settings", [{}, {"recompute": True}], ids=str)
@pytest.mark.parametrize("positions", [(), (T,)], ids=["vectors", "sequences"])
def test_a_gramian_gathers_factors_and_no_rows(kind, settings, positions):
    found = sent(
        lambda p, x: jacobian(mlp, **settings)(p, x).gram(), kind, positions=positions
    )
    assert {name for name, _ in found} == {"all-gather"}, found
    factors = N * math.prod(positions) * FACTORS
    assert sum(size for _, size in found) == factors, found
    assert max(size for _, size in found) < N * min(m * n for m, n in SHAPES)


@both_kinds
@pytest.mark.parametrize("settings", [{}, {"recompute": True}], ids=str)
def test_sharded_parameters_are_gathered_once_and_their_sums_scattered(kind, settings):
    """XLA scatters as it sums where it has the pass for it; on CPUs it sums, and then
    cuts.

    What is recomputed is gathered again where XLA sees to it: nothing is held between
    two passes.
    """
    found = sent(
        lambda p, x: jacobian(mlp, **settings)(p, x).clip(0.5).sum(), kind, names="data"
    )
    names = {name for name, _ in found}
    assert names <= {"all-gather", "all-reduce", "reduce-scatter"}, found
    passes = 2 if settings and kind == AxisType.Auto else 1
    assert (
        sum(size for name, size in found if name == "all-gather") == passes * COUNT
    ), found
    sums = [size for name, size in found if name == "all-reduce"]
    if passes == 2:  # one number tells XLA that the second pass is taken
        assert sums.count(1) <= 1, found
        sums = [size for size in sums if size > 1]
    assert sum(sums) in (0, COUNT), found


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("settings", MODES, ids=str)
def test_inside_shard_map_nothing_is_sent_unless_asked(checked, settings):
    def compiled(fun, out):
        mapped = jax.shard_map(
            fun, mesh=mesh, in_specs=(P(), P("data")), out_specs=out, check_vma=checked
        )
        return exchanges(jax.jit(mapped).lower(params, x).compile().as_text())

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, x = [jnp.ones(shape) for shape in SHAPES], jnp.ones((N, WIDTHS[0]))
    settings = {**settings, "chunk_size": 4} if "chunk_size" in settings else settings

    def local(params, x):
        sums = jacobian(mlp, **settings)(params, x).clip(0.5).sum()
        return jax.tree.map(lambda leaf: leaf[None], sums)

    def scattered(params, x):
        sums = jacobian(mlp, **settings)(params, x).clip(0.5).sum()
        return jax.lax.psum_scatter(sums, "data", tiled=True)

    def asked(params, x):
        return jacobian(mlp, axis_name="data", **settings)(params, x).clip(0.5).sum()

    assert compiled(local, P("data")) == []
    assert sorted(compiled(scattered, P("data"))) == sorted(
        ("reduce-scatter", m * n // 8) for m, n in SHAPES
    )
    found = compiled(asked, P())
    assert {name for name, _ in found} == {"all-reduce"}
    assert sum(size for _, size in found) == COUNT
