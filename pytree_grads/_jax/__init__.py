"""What depends on the releases of JAX and XLA; no other room works around them.

================  ======================================================================
``compat``        what changes between releases of JAX: jaxprs and their equations
``effects``       side effects of a function: made pure, let pass, or refused by name
``sharding``      the layout of arrays on a mesh, and the axes over which values vary
``xla``           workarounds for XLA: the habit, the gain, and what shows it may go
``convolutions``  convolutions inside loops, in the layout that is fast on CPUs
================  ======================================================================
"""
