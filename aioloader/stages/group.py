"""The samples of a batch before they are collated, and the entry that they travel in."""

from typing import Any

from aioloader.core.entry import Entry, failed_in
from aioloader.core.safe_text import add_note, safe_repr

__all__ = ["Group", "group_entries"]


class Group:
    """The samples of one batch, before collate.

    Attributes:
        samples: In order.
        keys: What each was loaded by, None where nothing names it.
        places: The position of each in its source, see `Entry.places`.
        begun: See `Entry.begun_each`.
        left_over: There are too few of them: they are only loaded, since that may fail, and no batch is made of them.
    """

    __slots__ = ("begun", "keys", "left_over", "places", "samples")

    def __init__(
        self,
        samples: list[Any],
        keys: list[Any],
        places: list[int | None] | None = None,
        begun: list[int] | None = None,
    ) -> None:
        self.samples = samples
        self.keys = keys
        self.places = [] if places is None else places
        self.begun = [] if begun is None else begun
        self.left_over = False

    def leave_out(self, out: list[bool]) -> None:
        """Forget the samples for which `out` is true; the batch's entry shares `keys`, `places`, `begun`."""
        self.samples = [sample for sample, gone in zip(self.samples, out, strict=True) if not gone]
        self.keys[:] = [key for key, gone in zip(self.keys, out, strict=True) if not gone]
        self.places[:] = [place for place, gone in zip(self.places, out, strict=True) if not gone]
        self.begun[:] = [begun for begun, gone in zip(self.begun, out, strict=True) if not gone]


def group_entries(entries: list[Entry]) -> Entry:
    """One entry of many. The first error among them is its error; the note names how many others there are."""
    samples = [entry.value for entry in entries]
    keys = [entry.key for entry in entries]
    places = [entry.position for entry in entries]
    begun = [entry.begun for entry in entries]
    group = Entry(Group(samples, keys, places, begun), entries[-1].cursor, keys, entries[0].position)
    group.places = places
    group.begun = begun[0]
    group.begun_each = begun
    odd = [entry for entry in entries if entry.error is not None or entry.rare is not None]  # most often none
    if odd and (attempts := max(entry.attempts for entry in odd)) > 1:
        group.attempts = attempts
    failed = [entry for entry in odd if entry.error is not None]
    if failed:
        group.value = None
        group.error = first = failed[0].error
        group.stage, group.seconds = failed_in(failed[0]), getattr(failed[0], "seconds", None)
        others = [entry for entry in failed if entry.error is not first]
        if first is not None and others:
            named = "; ".join(f"key {safe_repr(entry.key)}: {safe_repr(entry.error)}" for entry in others[:3])
            add_note(first, f"aioloader: {len(others)} more samples of this batch failed: {named}")
        for entry in failed:  # the traceback of an error may lead back to its entry
            entry.error = None
        del entry, first, others
    return group
