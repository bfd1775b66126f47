"""The exceptions that are aioloader's own; a user's exception is never replaced by one of them.

    AioloaderError
    ├── BrokenDataError (ValueError)         a file does not hold what it should; says which, and where in it
    ├── StateError (ValueError)              a state that cannot be loaded: not ours, another pipeline's, broken
    ├── SourceUsedUpError (RuntimeError)     a single-use generator was asked for a second epoch
    ├── LeakedContextError (RuntimeError)    a torch context is held across a `yield` of a user generator
    ├── SampleCancelledError (RuntimeError)  user code was cancelled, but not by us
    ├── LoaderClosedError (RuntimeError)     the iterator was closed while somebody waited for a batch
    ├── ChannelClosedError (RuntimeError)    a sample was sent to a channel that is closed
    ├── WorkerDiedError (RuntimeError)       a worker process was killed, crashed or exited, with a sample in its hands
    └── DeviceError (RuntimeError)           a batch could not be pinned or copied; `__cause__` is torch's error

    ReplayWarning (UserWarning)              a resumed source reads samples again, only to drop them
    UnsplitWarning (UserWarning)             several ranks each read all of the same data

What they say is shown without the secrets in URLs, see `aioloader.masking`.
Arguments that are wrong raise plain `TypeError` and `ValueError`, as torch's DataLoader does.
"""

from aioloader.masking import masked

__all__ = [
    "AioloaderError",
    "BrokenDataError",
    "ChannelClosedError",
    "DeviceError",
    "LeakedContextError",
    "LoaderClosedError",
    "ReplayWarning",
    "SampleCancelledError",
    "SourceUsedUpError",
    "StateError",
    "UnsplitWarning",
    "WorkerDiedError",
]


class AioloaderError(Exception):
    """Base of all exceptions that aioloader defines."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(masked(part) if isinstance(part, str) else part for part in args))

    def __str__(self) -> str:
        # Names of files that are no UTF-8 have surrogates, which `print` refuses: they are shown as `\udce9`.
        return super().__str__().encode("utf-8", "backslashreplace").decode()


class BrokenDataError(AioloaderError, ValueError):
    """What a file holds is not what it should be: half a line, not JSON, a truncated archive; says where."""


class StateError(AioloaderError, ValueError):
    """A state that this loader cannot load, or a recorded order that it cannot follow; says what is different."""


class ReplayWarning(UserWarning):
    """A resumed epoch reads samples again and drops them, since its source cannot be entered in the middle."""


class UnsplitWarning(UserWarning):
    """There are several ranks, and nothing splits the data of a loader among them: each trains on everything."""


class SourceUsedUpError(AioloaderError, RuntimeError):
    """A generator, which can be iterated once, was asked for a second epoch."""


class LeakedContextError(AioloaderError, RuntimeError):
    """A user generator holds a torch context (`no_grad`, `torch.device(...)`) across a `yield`."""


class SampleCancelledError(AioloaderError, RuntimeError):
    """A user's function raised `CancelledError` while nobody had cancelled the loader."""


class LoaderClosedError(AioloaderError, RuntimeError):
    """The iterator was closed by somebody else while this caller waited for its next batch."""


class ChannelClosedError(AioloaderError, RuntimeError):
    """A sample was sent to a `Channel` that is closed, or was closed while the sender waited: it has not been sent."""


class WorkerDiedError(AioloaderError, RuntimeError):
    """A worker process ended while it had a sample: says how, and which one. The epoch goes on in a fresh worker."""


class DeviceError(AioloaderError, RuntimeError):
    """A batch could not be page-locked or copied to the device; `__cause__` is torch's error."""
