"""Rows of one gradient leaf in factored form.

The backward pass of one example is traced, cut just before it builds the gradient, and
mapped over the batch. The arrays at the cut are factors: two vectors for an outer
product, for example. All products are computed from factors.

From a function to its factors, in the order of the work:

==============  ========================================================================
``trace``       a function and a batch in, the leaves of J out: trace, cut, map
``graph``       a jaxpr as a graph that can be walked backwards
``facts``       what is known about a value before anything runs, such as zeros
``rules``       one table: for each primitive, the cuts that add up to its output
``sites``       where the backward pass can be cut, and the cuts
``views``       the linear steps from a term to its leaf
``layout``      how the operands of an equation become the factors of a term
``plan``        for each leaf, which cuts are kept, and in which form
``tails``       the linear maps that all examples share, between a cut and its leaf
``keys``        the names of the arrays that terms are made from
``lookups``     norms of a table that a scan reads by parts, and that is looked up
``evaluate``    the cut graph runs, and nothing is evaluated that no term needs
==============  ========================================================================

From factors to products, from the whole to the parts:

==============  ========================================================================
``matrix``      the rows of all leaves, with weights
``absorbed``    rows whose weights become part of their factors
``added``       the sum of two matrices of rows
``products``    sums, norms and Gramians of one leaf, and the routes to them
``leaf``        all rows of one leaf, and maps over these rows
``terms``       what a row is made of: one class for each kind of term
``thresholds``  the numbers that decide between two ways, for each platform
==============  ========================================================================

Arithmetic that both share:

==============  ========================================================================
``einsum``      products of arrays, accumulated in float32 or wider
``weighing``    arrays with a row axis: times weights, and summed
``scaling``     powers of two that keep squares in range, from the bits of floats
==============  ========================================================================
"""
