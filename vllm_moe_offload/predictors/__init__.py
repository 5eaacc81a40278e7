"""Predictors: which experts the next layer will be asked for, from what this layer was.

Each keeps the tables that ``kernels.predict`` reads and knows how they are learned. Nothing is
imported here, because the simulator shares ``figures`` and ``collection`` and needs no torch.
"""
