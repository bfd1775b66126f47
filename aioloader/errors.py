"""The exceptions of aioloader. They never replace a user's exception.

    AioloaderError
    ├── BrokenDataError (ValueError)         a file is damaged; names the file and the place in it
    │   └── CutShortError                    a store gave fewer bytes than it promised; asking again may help
    ├── StateError (ValueError)              a state cannot be loaded: broken, or of another pipeline
    ├── SourceUsedUpError (RuntimeError)     a single-use generator was iterated for a second epoch
    ├── LeakedContextError (RuntimeError)    a user generator holds a torch context across a `yield`
    ├── SampleCancelledError (RuntimeError)  user code raised `CancelledError` without having been cancelled
    ├── LoaderClosedError (RuntimeError)     the iterator was closed while a caller waited for a batch
    ├── ChannelClosedError (RuntimeError)    a sample was sent to a closed channel
    ├── NothingPassesError (RuntimeError)    a filter has refused more samples in a row than it may
    ├── TooManySkippedError (RuntimeError)   more errors than `skip_errors` may leave out; `__cause__` is the newest
    ├── RankError (RuntimeError)             ranks that agree on their batches cannot: one failed, or is elsewhere
    ├── WorkerDiedError (RuntimeError)       a worker process was killed, crashed or exited while it had a sample
    └── DeviceError (RuntimeError)           a batch could not be pinned or copied; `__cause__` is torch's error

    UnknownLengthError (TypeError)           `len(loader)` is only known when an epoch has run

    LengthWarning (UserWarning)              an epoch had another number of batches than `with_length` says
    ReadAllWarning (UserWarning)             several ranks each read all files, and keep their share of the samples
    ReplayWarning (UserWarning)              a resumed source reads samples again and drops them
    UnevenWarning (UserWarning)              ranks may get different numbers of batches
    UnsplitWarning (UserWarning)             several ranks each read all of the same data

Messages hide the secrets in URLs, see `aioloader.masking`. Wrong arguments raise plain `TypeError` and `ValueError`, as
in torch's DataLoader.
"""

from aioloader.masking import masked

__all__ = [
    "AioloaderError",
    "BrokenDataError",
    "ChannelClosedError",
    "CutShortError",
    "DeviceError",
    "LeakedContextError",
    "LengthWarning",
    "LoaderClosedError",
    "NothingPassesError",
    "RankError",
    "ReadAllWarning",
    "ReplayWarning",
    "SampleCancelledError",
    "SourceUsedUpError",
    "StateError",
    "TooManySkippedError",
    "UnevenWarning",
    "UnknownLengthError",
    "UnsplitWarning",
    "WorkerDiedError",
]


class AioloaderError(Exception):
    """Base of all exceptions that aioloader defines."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(masked(part) if isinstance(part, str) else part for part in args))

    def __str__(self) -> str:
        # File names that are not UTF-8 contain surrogates, which `print` refuses: they are shown as `\udce9`.
        return super().__str__().encode("utf-8", "backslashreplace").decode()


class BrokenDataError(AioloaderError, ValueError):
    """A file is damaged: half a line, invalid JSON, a truncated archive. The message says where."""


class CutShortError(BrokenDataError):
    """A store has ended an answer before it was whole. Asking once more may help, unlike for a damaged file."""


class UnknownLengthError(TypeError):
    """`len()` of a loader whose number of batches is only known when it has run; a `TypeError`, as `len()` raises."""


class StateError(AioloaderError, ValueError):
    """This loader cannot load a state, or follow a recorded order. The message says what is different."""


class LengthWarning(UserWarning):
    """An epoch had another number of batches than `with_length` says."""


class ReadAllWarning(UserWarning):
    """Each rank reads all files of a source and keeps its share of the samples, where files could be dealt."""


class ReplayWarning(UserWarning):
    """A resumed epoch reads samples again and drops them, since its source cannot start in the middle."""


class UnevenWarning(UserWarning):
    """Ranks may get different numbers of batches, and then those that have more wait for the others for ever."""


class UnsplitWarning(UserWarning):
    """Nothing splits the data of a loader among the ranks, so each of them trains on all of it."""


class SourceUsedUpError(AioloaderError, RuntimeError):
    """A generator, which can be iterated once, was iterated for a second epoch."""


class LeakedContextError(AioloaderError, RuntimeError):
    """A user generator holds a torch context (`no_grad`, `torch.device(...)`) across a `yield`."""


class SampleCancelledError(AioloaderError, RuntimeError):
    """A user's function raised `CancelledError`, but the loader had not been cancelled."""


class LoaderClosedError(AioloaderError, RuntimeError):
    """The iterator was closed by another caller while this one waited for its next batch."""


class ChannelClosedError(AioloaderError, RuntimeError):
    """The `Channel` was closed before or while a sample was sent to it. The sample has not been sent."""


class NothingPassesError(AioloaderError, RuntimeError):
    """A filter has refused more samples in a row than its `max_dropped_in_a_row`; raised in place of the last one."""


class TooManySkippedError(AioloaderError, RuntimeError):
    """Past a limit of `skip_errors`, an error is raised after all; `__cause__` is the error of the sample."""


class RankError(AioloaderError, RuntimeError):
    """`shard(even="agree")`: another rank has failed at this batch, is at another one, or is gone."""


class WorkerDiedError(AioloaderError, RuntimeError):
    """A worker process ended while it had a sample. The message says how, and which one. A new worker takes over."""


class DeviceError(AioloaderError, RuntimeError):
    """A batch could not be page-locked or copied to the device; `__cause__` is torch's error."""
