"""What holds for all tests, before any of them imports torch."""

import os

# The tensors are tiny: a second thread saves nothing, and waiting for it takes most of the time
# where processors are few or busy.
os.environ["OMP_NUM_THREADS"] = "1"
