"""Many losses, one direction: from the Gramian of K gradients to K weights.

With the gradients of K losses as the rows of J, a weighting is a function of
``J.gram()``, of shape (K, K), and returns weights of shape (K,). The combined gradient
is ``J.weighted_sum(weights)``. ``combined_value_and_grad`` does all of it for a
function that returns K losses.

=========================  =============================================================
what you want              call
=========================  =============================================================
fixed weights              ``mean``, ``sum``, ``constant``, ``random``
no loss gets worse         ``upgrad``, ``dualproj``, ``pcgrad``, ``config``
the shortest combination   ``mgda``; near the mean: ``cagrad``
a bargain between losses   ``nash_mtl``, ``fairgrad``, ``imtl_g``
equal scales               ``aligned_mtl``
outliers left out          ``krum``, ``trimmed_mean``
with a state               ``gradvac``, ``cr_mogm``, ``excess_mtl``
from two batches           ``modo``, ``sdmgrad``
from stacked rows          ``graddrop``, ``trimmed_mean``, ``excess_mtl``
K losses in one call       ``combined_value_and_grad``
=========================  =============================================================

Every weighting is compiled, and works inside ``jax.jit``, ``jax.vmap`` and
``jax.lax.scan``. Weights are in float32, or in the dtype of the Gramian if that is
wider. A row of zeros, opposite rows and equal rows give finite weights; a NaN in the
Gramian makes the weights NaN.
"""

from ._balanced import aligned_mtl as aligned_mtl
from ._balanced import config as config
from ._balanced import imtl_g as imtl_g
from ._bargains import fairgrad as fairgrad
from ._bargains import nash_mtl as nash_mtl
from ._combined import combined_value_and_grad as combined_value_and_grad
from ._cones import dualproj as dualproj
from ._cones import upgrad as upgrad
from ._distances import krum as krum
from ._entries import excess_mtl as excess_mtl
from ._entries import graddrop as graddrop
from ._entries import trimmed_mean as trimmed_mean
from ._fixed import constant as constant
from ._fixed import mean as mean
from ._fixed import random as random
from ._fixed import sum as sum
from ._pairwise import gradvac as gradvac
from ._pairwise import pcgrad as pcgrad
from ._simplex import cagrad as cagrad
from ._simplex import mgda as mgda
from ._stateful import StatefulWeighting as StatefulWeighting
from ._stateful import cr_mogm as cr_mogm
from ._two_batches import modo as modo
from ._two_batches import sdmgrad as sdmgrad

__all__ = [
    "StatefulWeighting",
    "aligned_mtl",
    "cagrad",
    "combined_value_and_grad",
    "config",
    "constant",
    "cr_mogm",
    "dualproj",
    "excess_mtl",
    "fairgrad",
    "graddrop",
    "gradvac",
    "imtl_g",
    "krum",
    "mean",
    "mgda",
    "modo",
    "nash_mtl",
    "pcgrad",
    "random",
    "sdmgrad",
    "sum",
    "trimmed_mean",
    "upgrad",
]
