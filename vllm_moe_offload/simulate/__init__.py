"""Replay of recorded traces against caches, policies and predictors: numpy, no vLLM, no GPU."""
