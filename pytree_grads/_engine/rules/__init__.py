"""One table of rules: for each primitive, which cuts make up its output.

`decompose` walks back from a gradient leaf, and asks the table at every equation. A
rule answers with cuts: operands from which the walk goes on, and terms at which it
ends. A value without a rule becomes a dense term, which is slower but never wrong. To
support a new primitive, add one function to one of these files, and one row to
`tests/engine/test_rules.py`.

================  ====================================================================
``table``         the table, its decorator `rule`, and what a rule takes and returns
``walk``          `decompose`: the walk, and the check of what each rule returns
``structural``    steps that move, pad, scale, negate or add
``dots``          contractions, which are sums of outer products
``scatters``      lines that are added to an array at indices
``convolutions``  gradients of kernels: patches of an image times a cotangent
``scans``         terms in the body of a loop, stacked or added up over its steps
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
