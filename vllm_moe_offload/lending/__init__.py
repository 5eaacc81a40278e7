"""Expert slots borrowed from the KV cache's buffer, and handed back when requests need it.

One buffer, two tenants, one boundary. ``boundary`` says which blocks and bytes lie on either side
of it and how kernels address a slot there; ``ledger`` knows which block ids vLLM must not use;
``orders`` is what the scheduler and the workers say to each other; ``controller`` decides where
the boundary should be; ``lender`` is the scheduler's half of all this, over vLLM's block pool.
Nothing here imports vLLM.
"""
