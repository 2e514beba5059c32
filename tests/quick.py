"""`jit` for tests: XLA spends little on a program that runs once."""

import functools

import jax

_WISHES = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


@functools.cache
def _options():
    """Those of the wishes that this release of XLA knows."""

    def is_known(name):
        try:
            jax.jit(lambda x: x, compiler_options={name: _WISHES[name]}).lower(1.0).compile()
        except Exception as error:
            if "No such compile option" not in str(error):
                raise
            return False
        return True

    return {name: _WISHES[name] for name in _WISHES if is_known(name)}


def quick_jit(fun, **options):
    return jax.jit(fun, compiler_options=_options(), **options)
