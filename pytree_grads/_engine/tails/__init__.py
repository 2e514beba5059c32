"""Tails: the linear map, the same for all examples, from terms to gradient leaves.

If a weight is computed from parameters (`w * mask`, `w / norm(w)`, `u @ v`), the
backward pass goes on after the equation where the example enters. What follows is
linear, and its coefficients are the same for all examples. Sums of rows are added up
before it. Norms fold it into the factors where that is possible.

============  ========================================================================
``linear``    which equations are linear in the operands that differ between examples
``part``      the parts of a tail in a graph and in its loops, which run on arrays
``search``    the largest such map behind each leaf, and the values where it begins
``tail``      the map as a program: of sums, of its transpose, of one row
``axes``      which axes of a value belong to which factor of a term
``folding``   the interpretation of a program on terms, and the table of its rules
``moves``     rules of steps that add values or move their entries
``multiply``  rules of products with shared arrays, and of sums over axes
``fold``      terms of leaves from terms of sources
``through``   rows that go through a tail that does not fold
============  ========================================================================
"""
