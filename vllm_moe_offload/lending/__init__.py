"""Expert slots borrowed from the KV cache's buffer, and handed back when requests need it.

One buffer, two tenants, one boundary. ``boundary`` says which blocks and bytes lie on either side
of it and how kernels address a slot there, ``rows`` views them; ``ledger`` knows which block ids
vLLM must not use; ``orders`` is what the scheduler and the workers say to each other;
``controller`` decides where the boundary should be; ``lender`` is the scheduler's half of all
this, over vLLM's block pool (``patches/block_pool``, ``patches/scheduler``). Nothing here imports
vLLM.

The workers' half
-----------------
It is not there yet, so nothing is lent. What it has to do, in the order of a server's life:

1. Before the KV cache is allocated, ask for a block-outermost layout (``BLNHC``), in which a
   block's layers lie together, and refuse to lend where a backend, a sliding window, a second
   group of caches or a connector does not allow it. There the split is made once.
2. After the KV cache is allocated for good, and not for the throw-away cache with which vLLM
   measures its graphs, make a ``Boundary`` of the buffer: its number of blocks, the distance of
   two blocks, the rows of the offloaded layers. Every worker of a group must come to the same.
   Slots are ``borrowed_rows``, closed by ``Residency.open_from(num_slots)``; graphs are captured
   over these views and stay valid, since only tables change. All steps before stream.
3. Give the boundary to the scheduler's process once its scheduler stands: ``start_lending``.
4. At the start of ``execute_model``, also for a step without tokens, follow the output's order,
   if there is one, on the compute stream and before anything else of the step, the copies of a
   sweep included: let the stream wait for copies beside it (``Sweep.settle``, prefetches), whose
   plan was made for other slots; ``open_from(move.first_open)`` in every layer; zero
   ``move.zeroed``, because bits of weights may be NaN as keys and values, and attention multiplies
   what it masks. A sweep that was begun ahead of its step has to be planned anew.
   An expert that loses its slot is loaded again when it is needed; copying the hottest of them
   into colder slots that stay is a hundred times cheaper than PCIe.
5. Attach ``Follower.report`` to what the runner returns, that is to ``AsyncModelRunnerOutput``'s
   result where there is one, and never to the empty output that vLLM shares between steps. Miss
   bytes are counted on the device: report the last count that has arrived, and wait for none.
6. Sleeping discards the buffer: everything has to be recalled before.

What protects a block
---------------------
The ledger, from its being handed out; the order of each worker's stream, from two steps that
overlap (see ``orders``). Neither depends on reports, which one worker of a group answers alone.
A process that starts has nothing lent, and both halves begin with order 1, so a server that was
killed leaves nothing to repair.
"""
