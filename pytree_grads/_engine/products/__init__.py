"""Products of the rows of leaves, from their factors.

===================  ===========================================================
``routes``           how a norm, sum or Gramian is computed, and what it costs
``sums``             weighted sums, sums of squares, directional derivatives, rows
``gram``             inner products of rows
``kernels``          inner products of rows of one pair each, and sums over outputs
``metric``           rows times a diagonal in parameter space
``norms``            norms of the rows of all leaves
``vectors``          norms that are products of the norms of vectors, for many leaves
``scaled_norms``     norms as scaled squares, combined over leaves at the end
``tiles``            some rows at a time, or some lines of all rows
``factored_sketch``  random projections, one side of the factors at a time
===================  ===========================================================
"""
