"""What `loader.autotune()` returns: how far the search is, and what it has found."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol
from weakref import ref

from aioloader.core.checks import check_count
from aioloader.core.climbing import FAILING
from aioloader.core.written import Written
from aioloader.engine.knobs import RoomKnob, StageKnob
from aioloader.engine.tuner import Tuner
from aioloader.insight.units import amount, duration, nbytes

__all__ = ["Tuned", "Tuning"]


class Tunable(Protocol):
    """A loader."""

    _tuner: Tuner | None
    _kind: str


@dataclass(frozen=True, slots=True)
class Tuned:
    """A value that is worth changing.

    Attributes:
        stage: As it is written, `map(fetch)`; empty where the argument is the loader's own.
        argument: `"concurrency"`, `"ahead"`, `"prefetch"`, `"num_workers"` or `"prefetch_factor"`.
        before: What it was, also where it was left to the loader.
        after: What to write.
    """

    stage: str
    argument: str
    before: int
    after: int


class Tuning:
    """A search for better values, made by `loader.autotune`; as text, what to write.

    Args:
        loader: What is tuned.
        seconds: How long to measure.
        memory_bytes: Of finished samples and batches; None: as without tuning.
        bounded: The user has said how much may be ahead.
        tell: Called once with the text, at the end.
    """

    def __init__(
        self,
        loader: Tunable,
        seconds: float,
        memory_bytes: int | None,
        *,
        bounded: bool,
        tell: Callable[[str], object] | None,
    ) -> None:
        self._loader = ref(loader)
        self._memory_bytes = memory_bytes
        self._tell = tell
        self._changes: tuple[_Change, ...] = ()
        self._limit = ""
        prefetch = loader._kind == "Pipeline"
        self.tuner = Tuner(seconds, memory_bytes, prefetch=prefetch, bounded=bounded, ended=self._ended)

    @property
    def finished(self) -> bool:
        """Whether nothing is tried any more, and the values stay as they are."""
        return self.tuner.over

    @property
    def settings(self) -> tuple[Tuned, ...]:
        """What to write; empty before the end, and where nothing was better beyond noise."""
        return tuple(change.tuned for change in self._changes)

    @property
    def rate_before(self) -> float | None:
        """Batches per second with the values that were written; None before the end."""
        return None if self.tuner.found is None else self.tuner.found.before.rate

    @property
    def rate_after(self) -> float | None:
        """Batches per second with `settings`; None before the end."""
        return None if self.tuner.found is None else self.tuner.found.after.rate

    @property
    def limit(self) -> str:
        """What the limit is now, in words; empty before the end."""
        return self._limit

    def stop(self) -> None:
        """Try nothing more: back to the values that were written, unless it is finished. From any thread."""
        self.tuner.stop()

    def as_dict(self) -> dict[str, Any]:
        """What was found as plain dictionaries, lists and numbers."""
        return {
            "finished": self.finished,
            "settings": [asdict(one) for one in self.settings],
            "rate_before": self.rate_before,
            "rate_after": self.rate_after,
            "limit": self._limit,
        }

    def _ended(self) -> None:
        """On the loop of an epoch."""
        if self.tuner.found is not None:
            self._limit = self.tuner.limit
            self._changes = tuple(_changes(self.tuner))
        if self._tell is not None:
            try:
                self._tell(str(self))
            except Exception as error:  # it is the user's, and the epoch goes on
                warnings.warn(f"autotune: {self._tell!r} raised {error!r}", stacklevel=2)

    def __str__(self) -> str:
        tuner, found = self.tuner, self.tuner.found
        if tuner.phase == "nothing":
            return (
                "autotune: nothing here can be changed while it runs. Stages with one place, with a Limit, with an "
                "executor, or in other processes are left as they are"
            )
        if tuner.phase == "stopped":
            return "autotune: stopped; the values are those that were written"
        if found is None:
            return f"autotune: {duration(tuner.spent)} of {duration(tuner.seconds)} measured, not finished"
        before, after = found.before.rate, found.after.rate
        took = f"{found.points} settings measured in {duration(tuner.spent)}"
        if not self._changes:
            head = (
                f"autotune: keep what is written, {amount(before)} batches/s: nothing was better beyond noise ({took})"
            )
        else:
            gain = f", {after / before:.2g} times" if before else ""
            head = f"autotune: {amount(before)} -> {amount(after)} batches/s{gain} ({took}). Write:"
        lines = [head, *_lines(self._changes)]
        if found.before.failed >= FAILING and self._changes:
            lines.append(
                f"Calls that fail or are tried again: {found.before.failed:.0%} -> {found.after.failed:.0%} of all."
            )
        lines.append(f"Now {self._limit}.")
        if self._memory_bytes is not None:
            lines.append(f"Finished samples and batches were kept within {nbytes(self._memory_bytes)}.")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<autotune, {self.tuner.phase}, {duration(self.tuner.spent)} of {duration(self.tuner.seconds)}>"


def check_memory(memory_bytes: object) -> int | None:
    """`memory_bytes`, if it is usable.

    Raises:
        TypeError: It is no integer.
        ValueError: It is less than 1.
    """
    if memory_bytes is None:
        return None
    return check_count("memory_bytes", memory_bytes, least=1, hint="autotune(memory_bytes=2 << 30) is 2 GiB")


@dataclass(frozen=True)
class _Change:
    """A value that is worth changing, and where it is written: nowhere but for `.prefetch(n)`."""

    tuned: Tuned
    written: tuple[Written, ...] = ()


def _changes(tuner: Tuner) -> list[_Change]:
    """What differs from what is written."""
    rooms = list(tuner.knobs.rooms.values())
    # No more calls than there is room for: `ahead` is at least `concurrency`.
    most = {stage.key: room.places for room in rooms if room.held_back for stage in room.stages}
    found = []
    for stage in tuner.stages:
        value = min(stage.value, most.get(stage.key, stage.value))
        if value != stage.start:
            found.append(_change(stage, stage.written[0].width, stage.start, value, stage.written))
    found += [change for room in rooms if (change := _change_of_room(room)) is not None]
    return [one for one in found if one.tuned.before != one.tuned.after]


def _change(stage: StageKnob, argument: str, before: int, after: int, written: tuple[Written, ...]) -> _Change:
    return _Change(Tuned("" if written[0].of_loader else stage.name, argument, before, after), written)


def _change_of_room(room: RoomKnob) -> _Change | None:
    places = room.places
    match room.argument:
        case "prefetch":
            return _Change(Tuned("", "prefetch", room.base, places))
        case "ahead" if room.held_back or (room.value > 1 and not room.elastic):
            stage = room.stages[0]
            return _change(stage, "ahead", room.untuned, places, _first_with_room(stage))
        case "prefetch_factor" if room.held_back or room.value > 1:
            stage = room.stages[0]
            before, after = max(1, room.base // stage.start), max(1, places // stage.value)
            return _change(stage, "prefetch_factor", before, after, _first_with_room(stage))
    return None


def _first_with_room(stage: StageKnob) -> tuple[Written, ...]:
    return tuple(written for written in stage.written if written.room)[:1]


def _lines(changes: Sequence[_Change]) -> list[str]:
    """What to write, a line for each call."""
    by_call: dict[Written, list[Tuned]] = {}
    for change in changes:
        for written in change.written:
            by_call.setdefault(written, []).append(change.tuned)
    lines = [
        (written(", ".join(f"{one.argument}={one.after}" for one in several)), several)
        for written, several in by_call.items()
    ]
    lines += [(f".prefetch({one.tuned.after})", [one.tuned]) for one in changes if not one.written]
    return [
        f"    {text:<58}  # {', '.join(f'{one.argument} was {one.before}' for one in several)}"
        for text, several in lines
    ]
