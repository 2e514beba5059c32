"""Rows of one gradient leaf in factored form.

The backward pass of one example is traced, cut where the leaves of the gradient are put together,
and mapped over the batch. What it returns are factors: two vectors for an outer product, say.

From a function to its factors:

===============  ===================================================================================
``trace``        from a function and a batch to the leaves of J: trace one example, cut, map
``graph``        a jaxpr as a graph to walk backwards in
``plan``         for each leaf, where in the backward pass its terms are made
``views``        the linear steps between a term and its leaf
``layout``       how the operands of a product or a scatter become factors
``convolutions`` how those of a convolution do
``evaluate``     running the cut graph, with nothing evaluated that is not asked for
===============  ===================================================================================

From factors to products:

===============  ===================================================================================
``terms``        what one row is made of: a class for each kind of term
``products``     sums, squares, norms and Gramians of the rows of leaves
``leaf``         all rows of one leaf, and how functions map over them
``matrix``       the rows of all leaves together, each with a weight
``thresholds``   the numbers on which choices rest, for each platform
``scaling``      powers of two that keep squares in range, from the bits of floats
``weighing``     arrays with an axis of rows, times weights, and their sums
``einsum``       products of arrays, accumulated in float32 or wider
===============  ===================================================================================
"""
