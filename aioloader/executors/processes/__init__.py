"""Worker processes: for Python code that holds the GIL.

    the user's process                            the fork server    the loader's server        a worker
    worker_thread.py  one thread per loader ────▶ fork_server.py     imports the user's         worker.py
    worker_pool.py    n workers, one program      imports torch ──▶  modules, forks, reaps ──▶  runs the program
                │                                                                               │
                └──────────────── wire.py: one socket per worker ───────────────────────────────┘
                                  segments.py: batches, in shared memory that is used again

The user's process is never forked: a fork copies its threads' locks, its CUDA state and its connections.
"""
