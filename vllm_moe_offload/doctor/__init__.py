"""What this machine offers to expert offloading, and what is wrong with it.

``probe`` and ``rates`` read and measure ``facts``, ``checks`` judges them, ``report`` prints.
vLLM is never imported, torch only where there is a GPU to measure.
"""
