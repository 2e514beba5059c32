"""Rows of one gradient leaf in factored form.

The backward pass of one example is traced, cut where the leaves of the gradient are put together,
and mapped over the batch. What it returns are factors: two vectors for an outer product, say.

From a function to its factors:

===============  ===================================================================================
``trace``        from a function and a batch to the leaves of J: trace one example, cut, map
``graph``        a jaxpr as a graph to walk backwards in
``facts``        what is known of a value before anything runs
``rules``        a table: for each primitive, which summands make up its output
``sites``        the places in the backward pass where terms are made
``views``        the linear steps from a term to its leaf
``layout``       how the operands of an equation become factors
``plan``         for each leaf, which summands are kept, and in which form
``evaluate``     running the cut graph, with nothing evaluated that is not asked for
===============  ===================================================================================

From factors to products:

===============  ===================================================================================
``terms``        what one row is made of: outer products, scattered lines, arrays
``patches``      the same for convolutions
``leaf``         all rows of one leaf, and how functions map over them
``sums``         weighted sums, sums of squares, directional derivatives, rows
``gram``         inner products of rows
``norms``        norms of rows; ``scaled_norms`` of one row; ``scaling`` has their arithmetic
``tiles``        rows cut into parts that are small enough
``matrix``       the rows of all leaves together, each with a weight
``thresholds``   the numbers on which choices rest
``einsum``       products of arrays, carried in float32 or wider
===============  ===================================================================================
"""
