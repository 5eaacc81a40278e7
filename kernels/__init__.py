"""The device work of one MoE layer: resolve, gather, expert MLP, combine.

Each module holds a function in plain torch with the suffix ``_torch``. That form is the
specification of the operation and runs wherever torch runs. Nothing is re-exported here, so
that a function never hides the module of the same name.
"""
