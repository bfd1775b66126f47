"""How much memory a process and all its descendants use."""

import re
from pathlib import Path

import psutil

PROPORTIONAL = Path("/proc/self/smaps_rollup").exists()
"""Whether the kernel tells how many processes share a page (Linux); elsewhere shared pages count for each process."""

MEANING = (
    "anonymous and shared pages of the process tree, each shared page counted once (Linux PSS without mapped files)"
    if PROPORTIONAL
    else "resident set size (RSS), added up over the process tree, so pages that processes share count more than once"
)


def tree_memory_bytes(pid: int) -> int:
    """Return what process `pid` and its descendants use now; 0 when it has ended.

    Files mapped into memory are left out on Linux: the code of torch is the same for every contender, and its share per
    process would depend on who else has loaded it.
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
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return 0
    return 1024 * sum(
        int(kilobytes) for kilobytes in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB$", rollup, re.MULTILINE)
    )
