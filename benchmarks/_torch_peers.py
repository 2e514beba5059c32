"""The peers of PyTorch, each against torch's ordinary gradient of the same model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import jax
import numpy as np
import torch
from _figures import Case, Figure, log_progress, multiples, timed
from _layers import Problem
from _measure import human_bytes, human_seconds
from _torch_models import COUNTERPARTS, tensor
from _ways import MAX_NORM
from torch import Tensor, nn

TOLERANCE = (
    1e-4  # of a product, against that of rows; over the largest entry of the leaf
)
Batch = tuple[Tensor, ...]


def _learned(module: nn.Module) -> list[nn.Parameter]:
    """In the order of their names, which is the same for all ways."""
    return [p for _, p in sorted(module.named_parameters()) if p.requires_grad]


def _ordinary(module: nn.Module, batch: Batch) -> Case:
    """The gradient of the sum of the losses."""
    parameters = _learned(module)

    def run():
        module.zero_grad()
        module(*batch).sum().backward()
        return [p.grad for p in parameters]

    return run


def _by_rows(module: nn.Module, batch: Batch, product: str) -> list[Tensor]:
    """A product of rows, taken one by one in float64: what the peers are held to."""
    module = deepcopy(module).double()
    batch = tuple(x.double() if x.is_floating_point() else x for x in batch)
    parameters = _learned(module)
    total = [torch.zeros_like(p) for p in parameters]
    for example in zip(*(x.split(1) for x in batch), strict=True):
        row = torch.autograd.grad(module(*example).sum(), parameters)
        factor = min(
            1.0, MAX_NORM / float(torch.cat([x.flatten() for x in row]).norm())
        )
        for x, y in zip(total, row, strict=True):
            x += y**2 if product == "square" else factor * y
    return total


# --------------------------------------------------------------------------------------
# Opacus


def _for_opacus(module: nn.Module) -> nn.Module:
    """Recurrent layers are replaced by those of Opacus, as it asks for."""
    from opacus.layers import DPGRU, DPLSTM, DPRNN

    twins = {nn.RNN: DPRNN, nn.LSTM: DPLSTM, nn.GRU: DPGRU}
    for name, layer in list(module.named_children()):
        if type(layer) in twins:
            twin = twins[type(layer)](
                layer.input_size, layer.hidden_size, batch_first=True
            )
            twin.load_state_dict(layer.state_dict())
            own = dict(layer.named_parameters())
            for key, p in twin.named_parameters():
                p.requires_grad_(own[key].requires_grad)
            setattr(module, name, twin)
    return module


def _opacus_ghost(module: nn.Module, batch: Batch) -> Case:
    """Ghost clipping: a backward pass for norms, another with weighted losses."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    module = GradSampleModuleFastGradientClipping(
        _for_opacus(module), loss_reduction="sum", max_grad_norm=MAX_NORM
    )
    optimizer = _noiseless(DPOptimizerFastGradientClipping, module)
    parameters = _learned(module)

    def run():
        optimizer.zero_grad(set_to_none=True)
        DPTensorFastGradientClipping(
            module, optimizer, module(*batch), "sum"
        ).backward()
        return [p.grad for p in parameters]

    return run


def _opacus_hooks(module: nn.Module, batch: Batch) -> Case:
    """All rows, made layer by layer in a backward pass."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    module = GradSampleModule(_for_opacus(module), loss_reduction="sum")
    optimizer = _noiseless(DPOptimizer, module)
    parameters = _learned(module)

    def run():
        optimizer.zero_grad(set_to_none=True)
        module(*batch).sum().backward()
        optimizer.clip_and_accumulate()
        return [p.summed_grad for p in parameters]

    return run


def _noiseless(kind: type, module: nn.Module) -> Any:
    return kind(
        torch.optim.SGD(_learned(module)),
        noise_multiplier=0,
        max_grad_norm=MAX_NORM,
        expected_batch_size=None,
        loss_reduction="sum",
    )


# --------------------------------------------------------------------------------------
# BackPACK


def _backpack_norms(module: nn.Module, batch: Batch) -> Case:
    """Squared norms by a backward pass, and another one with the losses weighted."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    module = extend(module)
    parameters = _learned(module)

    def run():
        losses = module(*batch)
        with backpack(BatchL2Grad()):
            losses.sum().backward(retain_graph=True)
        norms = torch.stack([p.batch_l2 for p in parameters]).sum(0).sqrt()
        module.zero_grad()
        (losses * (MAX_NORM / norms).clamp(max=1)).sum().backward()
        return [p.grad for p in parameters]

    return run


def _backpack_square(module: nn.Module, batch: Batch) -> Case:
    """The sum of the squares of rows, from a backward pass."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    module = extend(module)
    parameters = _learned(module)

    def run():
        module.zero_grad()
        with backpack(SumGradSquared()):
            module(*batch).sum().backward()
        return [p.sum_grad_squared for p in parameters]

    return run


# --------------------------------------------------------------------------------------

PEERS: dict[str, dict[str, Callable[[nn.Module, Batch], Case]]] = {  # by product
    "clipped": {
        "Opacus ghost": _opacus_ghost,
        "Opacus hooks": _opacus_hooks,
        "BackPACK": _backpack_norms,
    },
    "square": {"BackPACK": _backpack_square},
}
WITH_ROWS = ("Opacus hooks",)


def figures(
    family: str, problem: Problem, product: str, *, rounds: int, cap: float
) -> dict[str, Figure]:
    """Figures of the installed peers, for a product of a model with a counterpart.

    They know no memory, FLOPs and compilation. What gives a wrong result is not timed.
    """
    if (
        family not in COUNTERPARTS
        or product not in PEERS
        or jax.default_backend() != "cpu"
    ):
        return {}
    torch.set_num_threads(os.cpu_count() or 1)
    module = COUNTERPARTS[family](problem.params)
    batch = tuple(map(tensor, problem.batch))
    _check_counterpart(module, batch, problem)
    wanted: list[Tensor] = []
    cases: dict[str, tuple[Case, float]] = {}
    notes: dict[str, str] = {}
    for name, peer in PEERS[product].items():
        rows = 2 * 4 * problem.size * problem.parameters if name in WITH_ROWS else 0
        if rows > cap:
            notes[name] = f"about {human_bytes(rows)}"
            continue
        try:
            with warnings.catch_warnings(
                action="ignore"
            ):  # of modules that cannot be handled
                case = peer(deepcopy(module), batch)
                found, seconds = timed(case)
        except ImportError:
            continue
        except Exception as error:
            log_progress(f"    {name}: {type(error).__name__}: {str(error)[:300]}")
            notes[name] = "–"
            continue
        wanted = wanted or _by_rows(module, batch, product)
        if (distance := _distance(found, wanted)) > TOLERANCE:
            log_progress(f"    {name}: off by {distance:.1e}")
            notes[name] = f"wrong by {distance:.0e}"
        else:
            cases[name] = case, seconds
        del found
    times: dict[str, float] = {}
    if cases:
        with warnings.catch_warnings(action="ignore"):
            seconds, times = multiples(_ordinary(module, batch), cases, rounds)
        log_progress(f"    torch's own ordinary gradient, {human_seconds(seconds)}")
    unknown = float("nan")
    return {
        name: Figure(
            times.get(name), unknown, unknown, unknown, -1, notes.get(name, "")
        )
        for name in PEERS[product]
        if name in times or name in notes
    }


def _check_counterpart(module: nn.Module, batch: Batch, problem: Problem) -> None:
    """The same losses, with as many parameters."""
    theirs = module(*batch).detach().numpy()
    ours = np.asarray(jax.vmap(problem.fun, in_axes=problem.in_axes)(*problem.args))
    np.testing.assert_allclose(theirs, ours, rtol=1e-4)
    assert sum(p.numel() for p in _learned(module)) == problem.parameters


def _distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, over the largest entry of the leaf."""
    pairs = zip(found, wanted, strict=True)
    return max(float((x - y).abs().max() / (y.abs().max() + 1e-12)) for x, y in pairs)
