"""What holds for all tests, before any of them imports torch."""

import os

# The tensors are tiny: a second thread saves nothing, and waiting for it takes most of the time
# where processors are few or busy.
os.environ["OMP_NUM_THREADS"] = "1"

# What the tests ask is on this machine.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
