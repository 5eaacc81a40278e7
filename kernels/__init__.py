"""The device work of one MoE layer: resolve, gather, expert MLP, combine; and of a step: learn.

Each module holds a function in plain torch with the suffix ``_torch``. That form is the
specification of the operation and runs wherever torch runs. The function of the same name
without the suffix does the same in Triton; its kernels stand in a private module
``_<name>_triton``. Nothing is re-exported here, so that a function never hides the module of the
same name.
"""
