"""A worker's counts on their way to ``/metrics`` and the log.

``reporter`` reads the engines' counters in each worker, ``page`` carries them to the API servers
through a file a worker, ``families`` makes Prometheus metrics of the pages. The API servers read
all pages, so that each of them answers for all workers, however many of both there are.
"""
