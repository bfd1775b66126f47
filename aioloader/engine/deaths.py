"""Deaths of worker processes, in words."""

from aioloader.core.entry import Entry
from aioloader.core.safe_text import safe_repr
from aioloader.executors.processes.worker_pool import Died

__all__ = ["hint", "named", "who"]


def who(death: Died) -> str:
    """Which worker died, and how, for a sentence."""
    return f"worker process {death.slot} (pid {death.pid}) {death.reason}"


def hint(death: Died) -> str:
    """What may help, for the end of a sentence."""
    return "; if memory ran out, use fewer workers" if "SIGKILL" in death.reason else ""


def named(entry: Entry) -> str:
    """A sample, for a sentence; a batch by its keys."""
    return f"{'samples' if type(entry.key) is list else 'key'} {safe_repr(entry.key)}"
