"""Which training examples made a prediction what it is: scores from products with J.

Scores have the shape (Q, N): a row for each of Q queries, such as test examples, and a
column for each of N training examples. A positive score means that the training example
helps: without it, the loss of the query would be higher.

=============================  =========================================================
what you want                  call
=============================  =========================================================
gradients of checkpoints       ``tracin(pairs, step_sizes)``
effects of leaving one out     ``influence(J_query, J_train, product, damping=)``
from sketches, several models  ``trak(queries, features, residuals, damping=)``
quality of the scores          ``lds(scores, subsets, losses)`` and
                               ``leave_one_out_correlation(scores, without, losses)``
features larger than memory    ``index = open_index(path, size=, dim=, made_of=)``
=============================  =========================================================

J must have one row per example: its function returns one number.
"""

from ._index import Index as Index
from ._index import fingerprint as fingerprint
from ._index import open_index as open_index
from ._influence import influence as influence
from ._judges import lds as lds
from ._judges import leave_one_out_correlation as leave_one_out_correlation
from ._tracin import tracin as tracin
from ._trak import trak as trak

__all__ = [
    "Index",
    "fingerprint",
    "influence",
    "lds",
    "leave_one_out_correlation",
    "open_index",
    "tracin",
    "trak",
]
