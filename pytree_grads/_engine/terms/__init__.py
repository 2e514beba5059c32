"""Kinds of term: what one row of a gradient leaf is made of.

A kind is one class in one file. It has the methods of ``protocol``, and no product
asks which kind it has before it. To add a kind, derive a frozen dataclass from
``ByRow`` and define ``shape``, ``dtype`` and ``materialize``. Everything else then
works, from the row as an array; override what has a cheaper form.

============  ==================================================================
``protocol``  what every kind offers, with shapes and defaults
``dense``     the row itself
``by_row``    the defaults: each product from the materialised row
``outer``     sums of outer products
``scatter``   lines that are added at an index
``patches``   convolutions: patches of an image against cotangents
``pairs``     what takes two terms: inner products, what they cost
``scales``    squared norms of factors, with scales that prevent overflow
============  ==================================================================

A row is a block of shape ``(B, m, n)``, or of any shape if it is dense. ``B``
counts blocks (scanned layers, experts), ``T`` the pairs of vectors whose outer
products add up in a block (positions of a sequence, uses of a weight).
"""

from .dense import Dense as Dense
from .outer import Outer as Outer
from .patches import Patches as Patches
from .protocol import Term as Term
from .scatter import Scatter as Scatter
