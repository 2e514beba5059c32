"""Rows of one gradient leaf in factored form.

The backward pass of one example is traced, cut where the leaves of the gradient are put
together, and mapped over the batch. What it returns are factors: two vectors for an
outer product, say.

From a function to its factors:

===============  =======================================================================
``trace``        from a function and a batch to the leaves of J: trace one example, cut, map
``graph``        a jaxpr as a graph to walk backwards in
``facts``        what is known of a value before anything runs
``rules``        a table: for each primitive, which summands make up its output
``sites``        the places in the backward pass where terms are made
``views``        the linear steps from a term to its leaf
``layout``       how the operands of an equation become factors
``plan``         for each leaf, which summands are kept, and in which form
``evaluate``     running the cut graph, with nothing evaluated that is not asked for
===============  =======================================================================

From factors to products:

===============  =======================================================================
``terms``        what one row is made of: a class for each kind of term
``products``     sums, squares, norms and Gramians of the rows of leaves
``leaf``         all rows of one leaf, and how functions map over them
``matrix``       the rows of all leaves together, each with a weight
``thresholds``   the numbers on which choices rest, for each platform
``scaling``      powers of two that keep squares in range, from the bits of floats
``weighing``     arrays with an axis of rows, times weights, and their sums
``einsum``       products of arrays, accumulated in float32 or wider
===============  =======================================================================
"""
