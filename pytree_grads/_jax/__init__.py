"""What leans on JAX and XLA as they are today; nothing outside may know.

===============  =======================================================================
``compat``       what depends on the release of JAX: reading jaxprs, evaluating one equation
``effects``      what a function does besides returning values: made pure, or refused by name
``sharding``     where values live on a mesh, as their types say it
``xla``          habits of XLA that are worked around, each with its reason and its gain
``convolutions`` convolutions inside loops, in the order of axes that XLA for CPU knows fast
===============  =======================================================================
"""
