"""Worker processes: for Python code that holds the GIL.

    main process                                  fork server        loader server              worker
    worker_thread.py  one thread per loader ────▶ fork_server.py     imports user modules,      worker.py
    worker_pool.py    n workers, one program      imports torch ──▶  forks and reaps       ──▶  runs the program
                │                                                                               │
                └──────────────── wire.py: one socket per worker ───────────────────────────────┘
                                  segments.py: batches, in shared memory that is used again

The main process is never forked: a fork would copy the locks of its threads, its CUDA state and its connections.
"""
