"""A running server in a terminal.

``sample`` reads ``/metrics``, ``change`` subtracts two readings, ``view`` draws,
``command`` repeats.
"""
