"""One process that writes its share of an index, for ``test_processes.py``.

Run as ``python index_worker.py '{"own": 0, "processes": 2, "folder": ...}'``.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from pytree_grads import attribution, jacobian

N, BATCH, DIM = 64, 8, 16


def fun(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


def main(own, processes, port, folder):
    """Write a share, wait for the others, and save the scores of three queries."""
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}", processes, own, initialization_timeout=120
        )
    part, parts = jax.process_index(), jax.process_count()
    assert (part, parts) == (own, processes)
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((6, 5), np.float32), "b": np.zeros(5, "f")}
    x = rng.standard_normal((N, 6), np.float32)
    key = jax.random.key(0)
    sketch = jax.jit(lambda x: jacobian(fun)(params, x).sketch(key, DIM, kind="tensor"))
    made_of = attribution.fingerprint(params, key, kind="tensor")
    path = Path(folder).joinpath
    for store in ("numpy", "tensorstore"):
        index = attribution.open_index(
            path(f"index_{store}"), size=N, dim=DIM, made_of=made_of, store=store
        )
        for start, stop in index.missing(BATCH, part=part, parts=parts):
            index.write(start, sketch(x[start:stop]))
        if processes > 1:
            multihost_utils.sync_global_devices(store)
        scores, rows = index.scores(sketch(x[:BATCH])[:3], made_of, damping=0.1)
        assert rows.tolist() == list(range(N))
        np.save(path(f"{store}{own}.npy"), scores)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
