"""One table of rules: for each primitive, which cuts make up its output.

`decompose` walks back from a gradient leaf and asks the table at every equation. A rule
answers with cuts: operands from which the walk goes on, and terms at which it ends.
What has no rule becomes a dense term: slower, never wrong. A new primitive is one
function in one of these files, and one row in `tests/engine/test_rules.py`.

================  ====================================================================
``table``         the table, its decorator `rule`, and what a rule takes and returns
``walk``          `decompose`: the walk, and the check of what each rule returns
``structural``    steps that move, pad, scale, negate or add
``dots``          contractions: outer products
``scatters``      lines added to zeros at indices: scattered terms
``convolutions``  gradients of kernels: patches of an image with a cotangent
``scans``         bodies of loops, stacked or added up over their steps
================  ====================================================================
"""

from . import convolutions, dots, scans, scatters, structural
from .table import RULES as RULES
from .walk import decompose as decompose

__all__ = [
    "RULES",
    "convolutions",
    "decompose",
    "dots",
    "scans",
    "scatters",
    "structural",
]
