"""Tests of the package's own parts: no vLLM, no GPU."""

import hypothesis

hypothesis.settings.register_profile("unit", deadline=None, max_examples=60, database=None)
hypothesis.settings.load_profile("unit")
