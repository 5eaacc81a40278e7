"""What a checkpoint needs and what a machine can do with it, from its headers alone.

``checkpoint`` reads, ``hf_config``, ``tensors`` and ``kv_cache`` interpret, ``planner`` and
``changes`` decide, ``report`` prints. Nothing here imports torch, so an answer takes a second.
"""
