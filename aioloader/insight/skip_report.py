"""The report of errors that were left out: a line of JSON for each, and what a file of them comes down to."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from aioloader.core.safe_text import safe_repr, safe_str
from aioloader.masking import masked

__all__ = ["SkippedError", "append", "summary"]

MOST_TEXT: Final = 2000  # characters of a message or a key
WORST: Final = 10  # kinds and keys that a summary names


@dataclass(frozen=True, slots=True)
class SkippedError:
    """One error that was left out.

    Attributes:
        key: Of the sample, or the list of those of a batch; None: not known.
        epoch: The number of the epoch.
        position: As in an `Entry`.
        stage: Where it failed, `map(fetch)`; empty: not known.
        attempts: How often work on it was begun.
        seconds: How long the last attempt took; None: not known.
        error: The exception.
        rank: Of this process; None: there is only one.
        when: When it was left out; seconds since 1970.
    """

    key: Any
    epoch: int
    position: int | None
    stage: str
    attempts: int
    seconds: float | None
    error: BaseException
    rank: int | None
    when: float

    def line(self) -> bytes:
        """As a line of the report, without secrets. Runs `str` of the user's exception and `repr` of keys."""
        record = {
            "key": _plain(self.key),
            "epoch": self.epoch,
            "position": self.position,
            "stage": masked(self.stage),
            "attempts": self.attempts,
            "seconds": None if self.seconds is None else round(self.seconds, 6),
            "error": _cut(masked(f"{type(self.error).__name__}: {safe_str(self.error)}")),
            "rank": self.rank,
            "time": datetime.fromtimestamp(self.when, UTC).isoformat(timespec="milliseconds"),
        }
        return json.dumps(record).encode() + b"\n"


def append(path: Path, skipped: Sequence[SkippedError]) -> None:
    """Add a line for each, in one write.

    The file is opened anew each time: errors that are left out are few, and so nothing has to be closed, a fork shares
    nothing, and whoever moves the file away gets a new one. With `O_APPEND` the lines of several processes do not mix,
    as long as the file is on a disk of this machine.

    Raises:
        OSError: It cannot be written.
    """
    content = memoryview(b"".join([one.line() for one in skipped]))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        while content:  # more than one write only where a disk is full, or a signal comes
            content = content[os.write(descriptor, content) :]
    finally:
        os.close(descriptor)


def _plain(key: Any) -> Any:
    """`key` in JSON's types."""
    if key is None or type(key) in (bool, int, float):
        return key
    if type(key) is str:
        return _cut(masked(key))
    if type(key) in (list, tuple):
        return [_plain(part) for part in key]
    return safe_repr(key, MOST_TEXT)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 3]}..."


# -- what a report comes down to ---------------------------------------------------------------------------------------


def summary(paths: Iterable[Path]) -> str:
    """What was left out, by kind, when, and the keys that failed most often.

    Lines that are none of a report are counted and named, and change nothing: a run that was killed may leave half of
    one.

    Raises:
        OSError: A file cannot be read.
    """
    records: list[dict[str, Any]] = []
    broken: list[str] = []
    for path in paths:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                record = _read(line)
                if record is not None:
                    records.append(record)
                elif line.strip():
                    broken.append(f"{path}:{number}")
    lines = _summed_up(records) if records else ["No error was left out."]
    if broken:
        named = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        lines.append(f"not read, since they are no lines of a report: {len(broken)} ({named})")
    return "\n".join(lines)


def _read(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("error"), str) else None


def _summed_up(records: list[dict[str, Any]]) -> list[str]:
    in_order = sorted(records, key=lambda record: str(record.get("time", "")))
    epochs = len({record.get("epoch") for record in records})
    ranks = {rank for record in records if (rank := record.get("rank")) is not None}
    of_ranks = f", {len(ranks)} ranks" if ranks else ""
    keys = Counter(json.dumps(record.get("key")) for record in records)
    lines = [
        f"{_times(len(records), 'error')} left out, {_times(len(keys), 'key')}, {_times(epochs, 'epoch')}{of_ranks}",
        f"first: {_told(in_order[0])}",
        f"last:  {_told(in_order[-1])}",
        "kinds:",
    ]
    kinds = Counter((record["error"].partition(":")[0], str(record.get("stage", ""))) for record in records)
    examples = {record["error"].partition(":")[0]: record["error"] for record in records}
    for (kind, stage), count in kinds.most_common(WORST):
        lines.append(f"  {count:6}  {kind} in {stage or 'an unknown stage'}, for instance {_one_line(examples[kind])}")
    if len(kinds) > WORST:
        lines.append(f"  and {len(kinds) - WORST} more kinds")
    lines.append("keys that failed most often:")
    lines += [f"  {count:6}  {key}" for key, count in keys.most_common(WORST)]
    if len(keys) > WORST:
        lines.append(f"  and {len(keys) - WORST} more keys")
    return lines


def _times(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _told(record: dict[str, Any]) -> str:
    place = f"epoch {record.get('epoch')}, position {record.get('position')}"
    return f"{record.get('time')}  key {json.dumps(record.get('key'))}, {place}: {_one_line(record['error'])}"


def _one_line(text: str, most: int = 120) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
