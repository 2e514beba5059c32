"""Kinds of term: what one row of a gradient leaf is made of.

Each kind is one class in one file, with the methods of ``protocol``. No product asks
which kind it is given, except for `pairs.gram_of_counts`, `products.kernels` and
`products.metric`. To add a kind, derive a
frozen dataclass from ``ByRow`` and define ``shape``, ``dtype`` and ``materialize``.
Everything else then works, since the defaults build the row as an array. Override the
methods that have a cheaper form.

============  ==================================================================
``protocol``  the methods of every kind, with their shapes
``by_row``    the defaults: every product from the materialised row
``dense``     the row itself
``outer``     sums of outer products
``scatter``   lines that are added at indices
``weighed``   outer products times an array that all rows share
``patches``   patches of an image times a cotangent, from convolutions
``pairs``     inner products of two terms, and their costs
``scales``    squared norms of factors, with scales that prevent overflow
============  ==================================================================

A row is an array of shape ``(B, m, n)``, or of any shape if it is dense. ``B`` counts
blocks, such as scanned layers or experts. ``T`` counts the pairs of vectors whose outer
products add up in a block, such as positions of a sequence or uses of a weight.
"""

from .dense import Dense as Dense
from .outer import Outer as Outer
from .patches import Patches as Patches
from .protocol import Term as Term
from .scatter import Scatter as Scatter
from .weighed import Weighed as Weighed
