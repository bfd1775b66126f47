"""The object stores of nodes, and how much of them one loader may fill, so that nothing is spilled to disk for it."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Final

__all__ = ["SHARE", "Stores", "part_of_room"]

SHARE: Final = 0.25  # of a store, that what is on its way to one loader may take
NEARLY_FULL: Final = 0.25  # of a store that is free: then it is a share of that


class Stores:
    """What is known of them. In the thread of `RayThread`."""

    def __init__(self) -> None:
        self._bytes: dict[str, float] = {}
        self.here = ""
        """The node of this process: what comes from others goes through its store, too."""

    def learn(self) -> None:
        """Look. Asks the head."""
        self.here, seen = look()
        self._bytes = {
            node: total if free >= NEARLY_FULL * total else free for node, (total, free) in seen.items() if total
        }

    def share(self, nodes: Iterable[str] | None = None) -> float | None:
        """Bytes in the smallest store of these nodes, or of all, that one loader may fill; None: nothing is known."""
        known = self._bytes.values() if nodes is None else [self._bytes[node] for node in nodes if node in self._bytes]
        smallest = min(known, default=None)
        return None if smallest is None else SHARE * smallest


def look() -> tuple[str, dict[str, tuple[float, float]]]:
    """The node of this process; and of each one that lives, how large its store is, and how much of that is free."""
    import ray

    free: dict[str, dict[str, float]] = {}
    with suppress(Exception):  # private; else they count as empty
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
    seen = {}
    for node in ray.nodes():
        if node["Alive"]:
            total = node["Resources"].get("object_store_memory", 0.0)
            known = free.get(node["NodeID"])
            seen[node["NodeID"]] = total, total if known is None else known.get("object_store_memory", 0.0)
    return ray.get_runtime_context().get_node_id(), seen


def part_of_room(entries: int, streams: int, others: int) -> int:
    """How many of its entries one of several streams may have in a store.

    Args:
        entries: So many fit.
        streams: How many share them, this one included.
        others: What those beside it have there, or may have by now.
    """
    if entries >= streams:
        return entries // streams
    return int(others < max(1, entries))  # one after the other
