"""XLA that spends little on a program, for programs that run once."""

import os
import subprocess
import sys

_FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
)


def spend_little() -> None:
    """For this process and those that it starts; has to come before JAX does."""
    given = os.environ.get("XLA_FLAGS", "")
    if _FLAGS[0] not in given:
        choices = (
            " ".join([given, *_FLAGS[:n]]).strip() for n in range(len(_FLAGS), -1, -1)
        )
        os.environ["XLA_FLAGS"] = next(filter(_are_known, choices))


def _are_known(flags: str) -> bool:
    """Whether this release of XLA knows some flags: it ends the process if not."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = {**os.environ, "XLA_FLAGS": flags}
    return not subprocess.run(
        command, env=environment, capture_output=True, check=False
    ).returncode
