"""`stateferry bench`: what the machine at hand makes of the pipeline, always beside what it could do at most.

Every figure comes with a baseline row of the same run, measured in turns with it, so that a slow disk or a busy
neighbour hits both; the ratio is what carries over to another machine. Rows that are timed have a process of their
own, so that their peak memory is theirs.
"""
