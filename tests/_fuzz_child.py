"""Reads mutants in a process of its own, which one may hang or kill: `python -m tests._fuzz_child 17` for one by hand.

From its standard input it takes lines of two numbers, the first mutant and how many; to its output it writes JSON: the
number of a mutant before it is read, and what is wrong with it after.

What one iteration may take is measured from outside of Python, so that memory and time of pyarrow and zlib count too:

- CPU time by the system's `ITIMER_PROF`, whose signal writes the traceback of all threads and ends the process;
- memory by the kernel's high-water mark (`VmHWM` in `/proc/self/status`), reset before each iteration; what arrow and
  the C library keep for later is given back before. Without `/proc` it is not measured.
"""

import asyncio
import ctypes
import faulthandler
import gc
import json
import logging
import random
import re
import resource
import signal
import sys
import tempfile
import threading
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import torch

from aioloader import Pipeline
from aioloader.errors import AioloaderError
from aioloader.sources import Lines, ParquetRows, TarShards, chunks
from tests._mutants import Mutant, Original, mutant, originals

CPU_SECONDS: Final = 1.0
"""Of one iteration."""

PEAK_BYTES: Final = 64 << 20
"""Of one iteration, more than before it."""

SPACE_BYTES: Final = 8 << 30
"""Of addresses, more than at the beginning: what would take the machine's memory gets a `MemoryError`."""

MOST_OUTCOMES: Final = 2000
"""An epoch with more does not end: the originals have 40 samples."""

BATCH_ROWS: Final = 5


@dataclass
class Epoch:
    """What an iteration gave.

    Attributes:
        outcomes: Samples and errors, as text.
        samples: The samples among them that are compared; of a batch, its rows.
        strangers: Errors of a type that is not documented, or that do not say which file is broken.
        states: After each outcome that may be resumed from, by its number.
    """

    outcomes: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    states: dict[int, str] = field(default_factory=dict)

    def add(self, outcome: Any) -> None:
        if isinstance(outcome, BaseException):
            said = f"{type(outcome).__name__}: {outcome}"
            self.outcomes.append(said)
            # An error of the system has a number; without one it is some library's.
            if not isinstance(outcome, AioloaderError) and getattr(outcome, "errno", None) is None:
                frames = traceback.extract_tb(outcome.__traceback__)
                where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
                self.strangers.append(f"not a documented error: {said[:300]} ({where})")
            elif not re.search(r"\b[012]\.\w+", " ".join([str(outcome), *getattr(outcome, "__notes__", ())])):
                self.strangers.append(f"an error that does not name the file: {said[:300]}")
            return
        text = shown(outcome)
        self.outcomes.append(text)
        if not isinstance(outcome, dict) or not outcome.get("__key__", "").startswith("odd"):
            self.samples += rows(outcome) if isinstance(outcome, Batch) else [text]

    @property
    def full(self) -> bool:
        return len(self.outcomes) >= MOST_OUTCOMES


class Batch(dict[str, Any]):
    """Columns, to be told from a row."""


def shown(sample: Any) -> str:
    """A sample as a short text: equal where they are, also for NaN."""
    if isinstance(sample, torch.Tensor):
        text = f"{sample.dtype} {sample.tolist()!r}"
    elif isinstance(sample, dict):
        text = ", ".join(f"{key!r}: {shown(value)}" for key, value in sample.items() if key != "__url__")
    else:
        text = repr(sample)
    return text if len(text) <= 80 else f"{text[:60]}… {len(text)} {zlib.crc32(text.encode()):x}"


def rows(batch: Batch) -> list[str]:
    """The rows of a batch."""
    columns = [[f"{name!r}: {shown(value)}" for value in column] for name, column in batch.items()]
    return [", ".join(row) for row in zip(*columns, strict=True)]


class Reader:
    """Makes loaders of three files: an intact one, the mutant, and an intact one.

    Args:
        folder: For the files.
        original: Of the mutant.
        rng: Chooses among the ways to read them.
    """

    def __init__(self, folder: Path, original: Original, rng: random.Random) -> None:
        self._original = original
        self._paths = [folder / f"{number}{original.suffix}" for number in range(3)]
        self._paths[0].write_bytes(original.packed)
        self._paths[2].write_bytes(original.packed)
        self._in_store = rng.random() < 0.2 and not original.name.endswith(("lines", ".gz", ".zst"))
        self.second_way = rng.random() < 0.5  # batches of rows, decoded members

    def write(self, data: bytes) -> None:
        """The file in the middle."""
        self._paths[1].write_bytes(data)

    def loader(self) -> Pipeline:
        """A fresh one."""
        paths: list[str] = [str(path) for path in self._paths]
        store = None
        if self._in_store:
            from obstore.store import LocalStore

            store = LocalStore(self._paths[0].parent)
            paths = [path.name for path in self._paths]
        suffix = self._original.suffix
        if suffix.startswith(".tar"):
            return Pipeline(TarShards(paths, store=store, decode=self.second_way))
        if suffix == ".parquet":
            if self.second_way:
                return Pipeline(ParquetRows(paths, store=store, batch_rows=BATCH_ROWS)).map(Batch)
            return Pipeline(ParquetRows(paths, store=store))
        return Pipeline(Lines(paths, decode="json" if "json" in suffix else None, max_line_bytes=200_000))

    @property
    def is_batched(self) -> bool:
        """Whether a sample is a batch of rows."""
        return self._original.suffix == ".parquet" and self.second_way


def read(loader: Pipeline, keep: int = 0) -> Epoch:
    """By `for`; states are taken after each error, and after outcome number `keep`."""
    epoch = Epoch()
    iterator = iter(loader)
    while not epoch.full:
        try:
            epoch.add(next(iterator))
        except StopIteration:
            break
        except Exception as error:
            epoch.add(error)
        else:
            if len(epoch.outcomes) != keep:
                continue
        epoch.states[len(epoch.outcomes)] = json.dumps(loader.state_dict())
    return epoch


def read_async(loader: Pipeline) -> Epoch:
    """By `async for`."""

    async def main() -> Epoch:
        epoch = Epoch()
        iterator = loader.__aiter__()
        while not epoch.full:
            try:
                epoch.add(await anext(iterator))
            except StopAsyncIteration:
                break
            except Exception as error:
                epoch.add(error)
        await loader.aclose()
        return epoch

    return asyncio.run(main())


class ShortReads(FileIO):
    """A file that gives less than it is asked for, as it may."""

    most = 1 << 20

    def read(self, size: int | None = -1, /) -> Any:
        return super().read(min(size, self.most) if size is not None and size >= 0 else self.most)


class Check:
    """Reads mutants and collects what is wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._intact: dict[tuple[str, bool], list[str]] = {}
        self.problems: list[str] = []
        logging.getLogger("asyncio").addHandler(_Heard(self.problems))
        sys.unraisablehook = lambda said: self.problems.append(f"unraisable: {said.exc_value!r} in {said.object!r}")
        threading.excepthook = lambda said: self.problems.append(f"a thread died: {said.exc_value!r}")

    def intact(self, reader: Reader, original: Original) -> list[str]:
        """The samples of one intact file."""
        name = original.name, reader.second_way
        if name not in self._intact:
            reader.write(original.packed)
            samples = read(reader.loader()).samples
            count = len(original.known)
            if samples != 3 * samples[:count]:
                self.problems.append(f"intact files cannot be read: {len(samples)} samples, expected {count} of each")
            self._intact[name] = samples[: len(samples) // 3]
        return self._intact[name]

    def check(self, one: Mutant) -> None:
        """All that must hold of a mutant."""
        rng = random.Random(one.seed)
        reader = Reader(self.folder, one.original, rng)
        intact = self.intact(reader, one.original)
        reader.write(one.data)
        at_random = rng.randrange(1, 3 * len(intact))
        whole = self._measured("for", lambda: read(reader.loader(), at_random))
        self._check_outcomes(one, reader, whole, intact)
        by_async = self._measured("async for", lambda: read_async(reader.loader()))
        if by_async.outcomes != whole.outcomes:
            self.problems.append(f"the faces differ: {_difference(whole.outcomes, by_async.outcomes)}")
        numbers = list(whole.states)
        for number in sorted(set(rng.sample(numbers, min(2, len(numbers))))):
            longest = max(len(one.data), len(one.original.packed))  # a mutant may be empty, its neighbours are not
            ShortReads.most = longest // rng.choice((1, 3, 20, 100)) + 1

            def resumed(number: int = number) -> Epoch:
                loader = reader.loader()
                loader.load_state_dict(json.loads(whole.states[number]))
                return read(loader)

            rest = self._measured(f"resumed after {number}", resumed)
            expected = whole.outcomes[number:] or whole.outcomes  # after the last one comes the next epoch
            if rest.outcomes != expected:
                difference = _difference(expected, rest.outcomes)
                after = whole.outcomes[number - 1][:150]
                self.problems.append(f"resumed after outcome {number} ({after}): {difference}")
            ShortReads.most = 1 << 20

    def _check_outcomes(self, one: Mutant, reader: Reader, whole: Epoch, intact: list[str]) -> None:
        if whole.full:
            self.problems.append(f"it does not end: {whole.outcomes[-1][:200]}")
        self.problems.extend(whole.strangers)
        before = len(intact) + one.certain
        expected = (intact + intact)[:before]
        if whole.samples[:before] != expected:
            difference = _difference(expected, whole.samples[:before])
            self.problems.append(f"a sample before the damage is missing or changed: {difference}")
        # A batch may begin in the mutant, and be an error for something there.
        loses = BATCH_ROWS - 1 if reader.is_batched and len(whole.outcomes) * BATCH_ROWS > len(whole.samples) else 0
        if whole.samples[-len(intact) + loses :] != intact[loses:]:
            difference = _difference(intact[loses:], whole.samples[-len(intact) + loses :])
            self.problems.append(f"the next file did not come as it is: {difference}")

    def _measured(self, what: str, call: Callable[[], Epoch]) -> Epoch:
        """Within its time, or the process ends; within its memory, or that is a problem."""
        before = _reset_peak()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            epoch = call()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        more = _memory("VmHWM") - before
        if more > PEAK_BYTES:
            self.problems.append(f"{what}: {more >> 20} MiB more than before")
        return epoch


class _Heard(logging.Handler):
    """What asyncio complains of: exceptions that nobody took."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._problems = problems

    def emit(self, record: logging.LogRecord) -> None:
        self._problems.append(f"asyncio: {record.getMessage()}")


def _difference(expected: list[str], found: list[str]) -> str:
    pairs = enumerate(zip_longest(expected, found))
    at = next((at for at, (one, other) in pairs if one != other), len(expected))
    one, other = (texts[at][:300] if at < len(texts) else "the end" for texts in (expected, found))
    return f"{len(expected)} expected, {len(found)} found; number {at} is {other}, and not {one}"


def _memory(name: str) -> int:
    """Of this process, in bytes; 0 where the system does not tell."""
    with suppress(OSError), Path("/proc/self/status").open() as lines:
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), 0)
    return 0


def _reset_peak() -> int:
    """Returns what is in use now."""
    pa.default_memory_pool().release_unused()
    if _trim is not None:
        _trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmHWM")


_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)


def check_range(check: Check, seeds: Iterable[int]) -> Iterator[dict[str, Any]]:
    """One line before and one after each mutant, and one at the end."""
    for seed in seeds:
        yield {"begin": seed}
        check.problems.clear()
        one = mutant(seed)
        try:
            check.check(one)
        except Exception:
            check.problems.append(f"the check itself failed: {traceback.format_exc()}")
        yield {"seed": seed, "story": one.story, "problems": list(check.problems)}
    check.problems.clear()
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("aioloader"):
            thread.join(10)
    links = [path.readlink() for path in Path("/proc/self/fd").glob("*") if path.is_symlink()]
    left = [str(path) for path in links if path.is_relative_to(check.folder)]
    left += [thread.name for thread in threading.enumerate() if thread.name.startswith("aioloader")]
    yield {"end": True, "problems": check.problems + ([f"left: {left}"] if left else [])}


def main() -> None:
    warnings.simplefilter("ignore")
    faulthandler.register(signal.SIGPROF, all_threads=True, chain=True)  # a traceback, and then the end of the process
    chunks.FileIO = ShortReads  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        check = Check(Path(folder))
        for original in originals():  # what is imported and allocated once is so before anything is measured
            reader = Reader(Path(folder), original, random.Random(0))
            check.intact(reader, original)
            read_async(reader.loader())
        gc.collect()
        gc.freeze()
        space = _memory("VmSize") + SPACE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (space, resource.RLIM_INFINITY))
        if len(sys.argv) > 1:
            for seed in map(int, sys.argv[1:]):
                for line in check_range(check, [seed]):
                    print(json.dumps(line, indent=1))
            return
        print(json.dumps({"ready": True}), flush=True)
        for numbers in sys.stdin:
            first, count = map(int, numbers.split())
            for said in check_range(check, range(first, first + count)):
                print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
