"""One call: its arguments, the batch of examples in them, and functions of a batch.

==================  ====================================================================
``axes``            the batch axis of each argument, as ``in_axes`` says it
``differentiable``  which arguments can be differentiated, and hints for those that
                    cannot
``batch``           ``Batch``: the arguments of one call
``chunks``          which examples are worked on together
``chosen``          which rows of a batch are chosen, by a slice or by indices
``loops``           a function over the chunks of a batch, in one compiled loop
``functions``       ``fun`` and ``outer`` with their options
``named``           functions that are mapped over an axis of examples with a name
``unbound``         errors about such names
``notes``           what an error in a user's function says of the call
``misuse``          what likely went wrong when ``fun`` or ``outer`` failed
``vjp``             products with the Jacobian of a batch's outputs, chunk by chunk
``per_example``     ``per_example_grad`` and ``per_example_value_and_grad``
``chain_rule``      ``chain_rule_grad`` and ``chain_rule_value_and_grad``
``reassemble``      ``reassemble``: the chain rule with rows in hand
``curvature``       ``gauss_newton_product`` and ``fisher_product``
==================  ====================================================================
"""
