"""J as a user holds it.

===============  =======================================================================
``call``         ``jacobian`` and ``value_and_jacobian``
``jacobian``     ``Jacobian``: the public products; ``refused`` says what is not defined
``outputs``      what a function returns for one example, and trees of a number per row
``rows``         the rows of J, which are one of two classes:
``kept``         rows that are kept as factors
``streamed``     rows of which nothing is kept, recomputed for each product
``origin``       what both have in common: a source with the shapes of its rows
``source``       the function and the batch from which rows are made
``added``        ``J + other``: the rows of two functions, added
``index``        which rows an index chooses
``groups``       groups of parameters: a prefix tree, or each leaf
``metric``       a diagonal in parameter space
``clip``         bounds for the norms of rows
``gram``         inner products of the rows of two Jacobians
``sketch``       random projections
``compiled``     products outside ``jit``, compiled once for their shapes
``explain``      the table of ``J.explain()``
``check``        compares the rows with those of plain ``jax.grad``
===============  =======================================================================
"""
