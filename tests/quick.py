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
    for flag in _FLAGS:
        flags = os.environ.get("XLA_FLAGS", "")
        if flag not in flags and _is_known(flag):
            os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def _is_known(flag: str) -> bool:
    """Whether this release of XLA knows a flag: it ends the process if not."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return not subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": flag}, capture_output=True, check=False
    ).returncode
