"""What a type checker knows of a user's program."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyright", reason="pyright comes with the extra 'dev' alone")

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import jax.numpy as jnp
from pytree_grads import (
    chain_rule_grad, chain_rule_value_and_grad, jacobian, per_example_grad,
    per_example_value_and_grad, value_and_jacobian
)

def f(p, x):
    return jnp.dot(p, x)

p, xs = jnp.ones(2), jnp.ones((3, 2))
reveal_type(jacobian(f)(p, xs))
reveal_type(jacobian(f, has_aux=True)(p, xs))
reveal_type(jacobian(f, argnums=(0,), batched=False)(p, xs))
reveal_type(value_and_jacobian(f)(p, xs))
reveal_type(value_and_jacobian(f, has_aux=True)(p, xs))
reveal_type(per_example_grad(f)(p, xs))
reveal_type(per_example_grad(f, has_aux=True)(p, xs))
reveal_type(per_example_grad(f, (0, 1))(p, xs))
reveal_type(per_example_grad(f, argnums=[0], has_aux=True)(p, xs))
reveal_type(per_example_value_and_grad(f)(p, xs))
reveal_type(per_example_value_and_grad(f, (0, 1), has_aux=True)(p, xs))
reveal_type(chain_rule_grad(jnp.sum, f)(p, xs))
reveal_type(chain_rule_grad(jnp.sum, f, (0,))(p, xs))
reveal_type(chain_rule_grad(jnp.sum, f, outer_has_aux=True)(p, xs))
reveal_type(chain_rule_value_and_grad(jnp.sum, f)(p, xs))
reveal_type(chain_rule_value_and_grad(jnp.sum, f, (0, 1))(p, xs))
reveal_type(chain_rule_value_and_grad(jnp.sum, f, has_aux=True)(p, xs))
J = jacobian(f)(p, xs)
reveal_type(2 * J)
reveal_type(J + J)
reveal_type(J[1:])
reveal_type(J.clip(1.0))
reveal_type(J.clip(1.0, with_norms=True))
reveal_type(J.scale(J.norms(groups="leaves"), groups="leaves"))
reveal_type(J.shape)
J.nroms()
J.gram(trace=1)
jacobian(f, bached=False)
"""
REVEALED = [
    "Jacobian",
    "tuple[Jacobian, Any]",
    "Jacobian",
    "tuple[Any, Jacobian]",
    "tuple[tuple[Any, Any], Jacobian]",
    "Any",
    "tuple[Any, Any]",
    "tuple[Any, ...]",
    "tuple[tuple[Any, ...], Any]",
    "tuple[Array, Any]",
    "tuple[tuple[Array, Any], tuple[Any, ...]]",
    "Any",
    "tuple[Any, ...]",
    "tuple[Any, Any]",
    "tuple[Array, Any]",
    "tuple[Array, tuple[Any, ...]]",
    "tuple[Any, Any]",
    "Jacobian",
    "Jacobian",
    "Jacobian",
    "Jacobian",
    "tuple[Jacobian, Any]",
    "Jacobian",
    "tuple[int, ...]",
]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    program = tmp_path_factory.mktemp("types") / "program.py"
    program.write_text(PROGRAM)
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}
    program.with_name("pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson"]
    command += ["--pythonpath", sys.executable, "--project", str(program.parent)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(run.stdout)["generalDiagnostics"]


def test_results_have_types(said):
    found = [x["message"] for x in said if x["severity"] == "information"]
    assert [x.split(' is "')[1].removesuffix('"') for x in found] == REVEALED


def test_slips_are_underlined(said):
    lines = PROGRAM.splitlines()
    errors = [x for x in said if x["severity"] == "error"]
    wrong = {lines[x["range"]["start"]["line"]] for x in errors}
    assert wrong == {"J.nroms()", "J.gram(trace=1)", "jacobian(f, bached=False)"}
