"""Measures the memory of a process and its descendants."""

import re
from pathlib import Path

import psutil

PROPORTIONAL = Path("/proc/self/smaps_rollup").exists()
"""Whether the kernel shows how many processes share a page (Linux); elsewhere shared pages count for each process."""

MEANING = (
    "anonymous and shared pages of the process tree, each shared page counted once (Linux PSS without mapped files)"
    if PROPORTIONAL
    else "resident set size (RSS), added up over the process tree, so pages that processes share count more than once"
)


def tree_memory_bytes(pid: int) -> int:
    """Return the memory of process `pid` and its descendants; 0 when it has ended.

    On Linux, mapped files are left out: torch's code is the same for every contender, and its share per process would
    depend on how many other processes have loaded it.
    """
    try:
        root = psutil.Process(pid)
        return sum(_memory_bytes(process) for process in [root, *root.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def _memory_bytes(process: psutil.Process) -> int:
    if not PROPORTIONAL:
        return process.memory_info().rss
    try:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    return 1024 * sum(
        int(kilobytes) for kilobytes in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB$", rollup, re.MULTILINE)
    )
