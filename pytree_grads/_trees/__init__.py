"""Trees in hand: plain pytrees of gradients, checked and combined, never broadcast.

===============  =======================================================================
``checks``       validators, and the wording of errors
``algebra``      sums, products and dtypes of trees, carried in float32 or wider
``combine``      ``linear_combination``
``vector``       ``Vector``: operator syntax
``accumulator``  ``Accumulator``: a weighted mean of gradients that arrive in turn
===============  =======================================================================
"""
