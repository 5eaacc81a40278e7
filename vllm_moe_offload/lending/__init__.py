"""Expert slots borrowed from the KV cache's buffer, and handed back when requests need it.

One buffer, two tenants, one boundary. ``boundary`` says which blocks and bytes lie on either side
of it and how kernels address a slot there, ``rows`` views them; ``ledger`` knows which block ids
vLLM must not use; ``orders`` is what the scheduler and the workers say to each other;
``controller`` decides where the boundary should be; ``lender`` is the scheduler's half of all
this, over vLLM's block pool (``patches/block_pool``, ``patches/scheduler``), ``borrower`` the
workers' half, over the tables of their slots (``patches/borrowing``). Nothing here imports vLLM.

In the order of a server's life
-------------------------------
1. Once the model is built, a worker knows whether its cache can be shared, and the engine is
   planned without slots: everything streams. The worker then asks for a layout in which a block's
   layers lie together (``patches/kv_layout``).
2. Once the cache is allocated for good, and not as the throw-away one with which vLLM measures its
   graphs, the engine takes its slots from it, all closed but those that are never handed back.
   Graphs are captured over these slots and stay valid, since only tables change.
3. Once the scheduler stands, it gets the workers' boundary, and the workers the first order
   (``patches/lending``). A warm start fills what opens.
4. From then on an order rides on a step. A worker carries it out in its compute stream and before
   anything else of the step: it waits for copies beside the stream, whose plan was made for other
   slots, closes and opens slots, and zeroes what goes back, because bits of weights may be NaN as
   keys and values, and attention multiplies what it masks. An expert that loses its slot is loaded
   again when it is needed.
5. A report rides back on what the runner returns. Miss bytes are counted on the device; the last
   count that has arrived is reported, and nobody waits for one.
6. Sleeping discards the buffer, and so does releasing the cache alone. The boundary stays, and all
   slots are emptied before.

What protects a block
---------------------
The ledger, from its being handed out; the order of each worker's stream, from two steps that
overlap (see ``orders``). Neither depends on reports, which one worker of a group answers alone.
A process that starts has nothing lent, and both halves begin with order 1, so a server that was
killed leaves nothing to repair.
"""
