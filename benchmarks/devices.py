"""What devices send and hold: formulas, checked against compiled programs.

    python benchmarks/devices.py [--save [NAME]]

The network is a chain of L layers x + tanh(x W), W of d × d, so that P = L d²
parameters; N examples of T positions each are shared out to D devices. Nothing is run:
XLA compiles each product for 1, 2, 4 and 8 simulated devices, and the program says what
it exchanges and what memory it asks for. Bytes sent are those of a ring: (D-1)/D of the
array for gathering or scattering it, twice that for a sum of which every device has the
result. A loop counts as often as it turns.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from _measure import environment, human_bytes, markdown_table
from _results import add_save_option, save
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pytree_grads import chain_rule_grad, jacobian

FLOAT = 4  # bytes of a number
DEVICES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Size:
    """A network, a batch, and so many devices."""

    layers: int  # L
    width: int  # d
    examples: int  # N, on all devices together
    positions: int  # T
    devices: int  # D
    chunk: int  # k, examples of a chunk on all devices together

    @property
    def params(self) -> float:
        """P."""
        return self.layers * self.width**2

    @property
    def activations(self) -> float:
        """A, the numbers in one layer's activations on one device."""
        return self.examples * self.positions * self.width / self.devices

    @property
    def others(self) -> float:
        """The part of an array that is on other devices."""
        return (self.devices - 1) / self.devices


def network(params, x):
    for w in params:
        x = x + jnp.tanh(x @ w)
    return jnp.sum(x**2)


Formula = Callable[[Size], float]


@dataclass(frozen=True)
class Product:
    """One call, and formulas for the numbers that a device sends and holds.

    Where parameters are sharded as the batch is, they are gathered first: `gathers`
    times P more are sent, and `gathered` times P more are held.
    """

    name: str
    call: Callable[[Size], Callable[..., Any]]
    sent: Formula
    temporary: Formula
    result: Formula
    formulas: tuple[
        str, str, str
    ]  # of what is sent, of temporary memory, and of the result
    gathers: int = 1
    gathered: int = 1
    manual: bool = False  # inside shard_map

    def expected(
        self, size: Size, sharded: bool, *, scatters: bool = False
    ) -> tuple[float, float]:
        """Numbers sent and held; `scatters` says whether a sharded sum is sent once."""
        send, hold = self.sent(size), self.temporary(size)
        arguments, result = size.params + size.activations, self.result(size)
        if sharded and size.devices > 1:
            send = (
                send / (2 if scatters else 1) + self.gathers * size.others * size.params
            )
            hold += self.gathered * size.params
            arguments = size.params / size.devices + size.activations
            result /= size.devices if result == size.params else 1
        return send, hold + arguments + result


def ordinary(size: Size):
    def of(params, x):
        whole = [jax.sharding.reshard(w, PartitionSpec()) for w in params]
        grads = jax.grad(lambda p: jnp.sum(jax.vmap(network, (None, 0))(p, x)))(whole)
        return [
            jax.sharding.reshard(g, jax.typeof(w).sharding)
            for g, w in zip(grads, params, strict=True)
        ]

    return of


def clipped(**settings):
    def of(size: Size):
        chunk = size.chunk // (size.devices if "axis_name" in settings else 1)
        own = (
            {**settings, "chunk_size": chunk} if "chunk_size" in settings else settings
        )
        return lambda p, x: jacobian(network, **own)(p, x).clip(1.0).sum()

    return of


def chain(size: Size):
    return chain_rule_grad(jax.nn.logsumexp, network, chunk_size=size.chunk)


def of_sum(s: Size) -> float:
    return 2 * s.others * s.params


def of_sums(s: Size) -> float:
    return of_sum(s) * math.ceil(s.examples / s.chunk)


def clip_memory(s: Size) -> float:
    return (2.5 * s.layers - 1) * s.activations


def gradient_memory(s: Size) -> float:
    return (2 * s.layers + 2) * s.activations


def norm_memory(s: Size) -> float:
    return (s.layers * (1 + s.positions / s.width) + 3) * s.activations


def in_chunks(whole: Formula) -> Formula:
    return lambda s: max(whole(s) * s.chunk / s.examples, 2 * s.params)


def like_params(s: Size) -> float:
    return s.params


def per_row(s: Size) -> float:
    return s.examples / s.devices


def nothing(s: Size) -> float:
    return 0.0


PRODUCTS = [
    Product(
        "ordinary gradient",
        ordinary,
        of_sum,
        gradient_memory,
        like_params,
        ("2 P", "(2 L + 2) A", "P"),
    ),
    Product(
        "`clip().sum()`",
        clipped(),
        of_sum,
        clip_memory,
        like_params,
        ("2 P", "(2.5 L - 1) A", "P"),
    ),
    Product(
        "the same, in chunks",
        clipped(chunk_size=1),
        of_sums,
        in_chunks(clip_memory),
        like_params,
        ("2 P · N/k", "max((2.5 L - 1) A · k/N, 2 P)", "P"),
    ),
    Product(
        "the same, in `shard_map`",
        clipped(chunk_size=1, axis_name="data"),
        of_sum,
        lambda s: clip_memory(s) * s.chunk / s.examples + s.params,
        like_params,
        ("2 P", "(2.5 L - 1) A · k/N + P", "P"),
        manual=True,
    ),
    Product(
        "chain rule, in chunks",
        chain,
        of_sums,
        in_chunks(gradient_memory),
        like_params,
        ("2 P · N/k", "max((2 L + 2) A · k/N, 2 P)", "P"),
        gathered=2,
    ),
    Product(
        "`norms()`",
        lambda s: lambda p, x: jacobian(network)(p, x).norms(),
        nothing,
        norm_memory,
        per_row,
        ("0", "(L (1 + T/d) + 3) A", "N/D"),
    ),
    Product(
        "`J @ v`",
        lambda s: lambda p, x: jacobian(network)(p, x) @ p,
        nothing,
        gradient_memory,
        per_row,
        ("0", "(2 L + 2) A", "N/D"),
        gathers=2,
        gathered=2,
    ),
    Product(
        "`gram()`",
        lambda s: lambda p, x: jacobian(network)(p, x).gram(),
        lambda s: 2 * s.layers * s.others * s.devices * s.activations,
        lambda s: 2 * s.layers * (s.devices + 1) * s.activations,
        lambda s: per_row(s) * s.examples,
        ("2 L D A", "2 L (D + 1) A", "N²/D"),
    ),
    Product(
        "`to_rows()`",
        lambda s: lambda p, x: jacobian(network)(p, x).to_rows(),
        nothing,
        lambda s: (s.layers + 3) * s.activations,
        lambda s: per_row(s) * s.params,
        ("0", "(L + 3) A", "N P/D"),
    ),
]


@dataclass(frozen=True)
class Found:
    """What a compiled program exchanges and holds, in numbers, on one device."""

    sent: float
    held: float


def compiled(product: Product, size: Size, sharded: bool) -> Found:
    mesh = jax.make_mesh(
        (size.devices,),
        ("data",),
        axis_types=(AxisType.Explicit,),
        devices=jax.devices()[: size.devices],
    )
    split, whole = PartitionSpec("data"), PartitionSpec()
    call = product.call(size)
    with jax.set_mesh(mesh):
        if product.manual:
            call = jax.shard_map(call, in_specs=(whole, split), out_specs=whole)

        def array(shape, spec):
            return jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=NamedSharding(mesh, spec)
            )

        params = [array((size.width,) * 2, split if sharded else whole)] * size.layers
        x = array((size.examples, size.positions, size.width), split)
        program = jax.jit(call).lower(params, x).compile()
    memory = program.memory_analysis()
    held = (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
    )
    return Found(sent(program.as_text(), size), held / FLOAT)


RINGS = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0}


def sent(text: str, size: Size) -> float:
    """The numbers that a device sends, as often as its loops turn."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?(\S+) .*\{$", line):
            name = head[1]
        bodies.setdefault(name, []).append(line)
    turns = {
        body: int(count)
        for body, count in re.findall(
            r"body=%?([\w.-]+).*?known_trip_count\":\{\"n\":\"(\d+)\"", text
        )
    }
    total = 0.0
    for name, lines in bodies.items():
        for shapes, op in re.findall(
            r" = (.*?) (all-\w+|reduce-scatter|collective-permute)\(", "\n".join(lines)
        ):
            count = sum(
                math.prod(int(n) for n in dims.split(",") if n)
                for dims in re.findall(r"\b[a-z]+\d+\[([\d,]*)\]", shapes)
            )
            count *= size.devices if op == "reduce-scatter" else 1
            total += RINGS[op] * count * size.others * turns.get(name, 1)
    return total


def checks(
    sharded: bool, devices: Sequence[int] = DEVICES
) -> list[tuple[Product, list[float]]]:
    """For each product, what programs send and hold over what was expected, D by D."""
    found = []
    for product in PRODUCTS:
        if product.manual and sharded:
            continue
        quotients: list[float] = []
        for count in devices:
            size = Size(8, 128, 1024, 4, count, 128)
            program, (send, hold) = (
                compiled(product, size, sharded),
                product.expected(size, sharded),
            )
            quotients += [
                program.sent / send if send else 1 + program.sent,
                program.held / hold,
            ]
        found.append((product, quotients))
        print(f"{product.name}: {quotients}", file=sys.stderr, flush=True)
    return found


def check_table(sharded: bool) -> str:
    header = ["product", "sent", "temporary", "result"]
    header += [f"D = {d}" for d in DEVICES]
    rows = []
    for product, quotients in checks(sharded):
        pairs = zip(quotients[::2], quotients[1::2], strict=True)
        rows.append(
            [product.name, *product.formulas, *(f"{s:.2f}, {h:.2f}" for s, h in pairs)]
        )
    return markdown_table(header, rows)


def far_table() -> str:
    """A model of 7 billion parameters on 1,024 devices."""
    size = Size(
        layers=416, width=4096, examples=4096, positions=2048, devices=1024, chunk=1024
    )
    rows = []
    for product in PRODUCTS:
        if product.name == "`gram()`":
            continue
        whole = product.expected(size, False)
        split = product.expected(size, True, scatters=True)
        texts = [human_bytes(FLOAT * x) for x in (*whole, *split)]
        rows.append(
            [product.name, *texts[:2], *(texts[2:] if not product.manual else ["", ""])]
        )
    header = ["product", "replicated: sent", "held", "sharded: sent", "held"]
    return markdown_table(header, rows)


PROGRAMS = "Programs compiled for L = 8, d = 128, N = 1,024, T = 4, chunks of k = 128."


def report() -> str:
    return f"""\
A device sends (D - 1)/D of what stands under *sent*. It holds its arguments, P + A, in
addition to what stands under *temporary* and *result*; A = N T d / D is the number of
activations of one layer. All are counts of numbers, four bytes each. The last columns
are what the compiled program sends and holds over what the formulas say.

## Parameters on every device

{check_table(False)}

## Parameters sharded as the batch is

They are gathered first: one P more is sent and held, two for `J @ v`, whose v is
gathered too (the chain rule in chunks holds two as well). Arguments and sums take P/D.
On GPUs and TPUs, XLA scatters as it sums, which sends P where the formula has 2 P; on
CPUs it sums and then cuts, as counted here.

{check_table(True)}

## 7 billion parameters on 1,024 devices

L = 416 matrices of d = 4,096; N = 4,096 sequences of T = 2,048; chunks of one sequence
a device; sums of sharded parameters are scattered.

{far_table()}
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_save_option(parser, "devices")
    options = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    ran_on, tables = f"{environment()}. {PROGRAMS}", report()
    print(f"{ran_on}\n\n{tables}")
    if options.save:
        save(options.save, "Many devices", ran_on, tables)


if __name__ == "__main__":
    main()
