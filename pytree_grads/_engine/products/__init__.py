"""Products of the rows of leaves, from their factors.

================  ==============================================================
``routes``        how norms and sums of a leaf are taken, and what that costs
``sums``          weighted sums, sums of squares, directional derivatives, rows
``gram``          inner products of rows
``norms``         norms of the rows of all leaves
``vectors``       norms that are products of norms of vectors, many at once
``scaled_norms``  norms as scaled squares, combined over leaves at the end
``tiles``         some rows, or some lines of all rows, at a time
================  ==============================================================
"""
