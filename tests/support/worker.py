"""One process of a training run over several, for ``test_processes.py``.

Every step descends along a clipped sum of rows and along the gradient of a contrastive
loss that couples all examples, taken in chunks. Run as ``python worker.py
'{"processes": 2, ...}'``.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pytree_grads import Vector, chain_rule_value_and_grad, jacobian

N, WIDTH, OUT = 16, 6, 4


def embed(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def loss(params, x, y):
    return jnp.sum((embed(params, x) - y) ** 2)


def contrast(embeddings):
    """Neighbours in the batch are alike, all others are not."""
    similar = embeddings @ embeddings.T
    pairs = jnp.roll(jnp.eye(N), 1, axis=1)
    return -jnp.sum(pairs * jax.nn.log_softmax(similar, axis=1)) / N


def start():
    rng = np.random.default_rng(0)
    return {
        "w": rng.standard_normal((WIDTH, 8)) / 2,
        "v": rng.standard_normal((8, OUT)) / 2,
    }


def batch(step):
    rng = np.random.default_rng(step + 1)
    return rng.standard_normal((N, WIDTH)), rng.standard_normal((N, OUT))


@jax.jit
def advance(params, x, y):
    clipped = jacobian(loss)(params, x, y).clip(0.5).mean()
    value, grads = chain_rule_value_and_grad(contrast, embed, chunk_size=8)(params, x)
    return (Vector(params) - 0.1 * Vector(clipped) - 0.1 * Vector(grads)).tree, value


def resumed(manager, params):
    """The parameters and the step of the latest checkpoint, or these and step 0."""
    import orbax.checkpoint as ocp

    latest = manager.latest_step()
    if latest is None:
        return params, 0
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    print(f"resumed at step {latest}", flush=True)
    return manager.restore(latest, args=ocp.args.StandardRestore(shapes)), latest


def main(
    own, processes=1, port=None, steps=6, output=None, checkpoints=None, pause=None
):
    """Train.

    ``pause`` is a step after which nothing more is done until the process is killed.
    """
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 4 // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}", processes, own, initialization_timeout=120,
            heartbeat_timeout_seconds=10,
        )  # fmt: skip
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    jax.set_mesh(mesh)
    replicated, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def place(sharding, tree):
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(
                x.shape, sharding, lambda index: x[index]
            ),
            tree,
        )

    params, first, manager = place(replicated, start()), 0, None
    if checkpoints is not None:
        import orbax.checkpoint as ocp

        manager = ocp.CheckpointManager(Path(checkpoints))
        params, first = resumed(manager, params)
    for step in range(first, steps):
        params, value = advance(params, *place(sharded, batch(step)))
        print(f"step {step + 1}: {float(value):.6f}", flush=True)
        if manager is not None and (step + 1) % 2 == 0:
            manager.save(step + 1, args=ocp.args.StandardSave(params))
            manager.wait_until_finished()
        if step + 1 == pause:
            print("waiting", flush=True)
            sys.stdin.read()
    if output is not None and own == 0:
        np.savez(output, **jax.tree.map(np.asarray, params))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
