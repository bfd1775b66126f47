"""`FaultPlan`: a seeded schedule of what goes wrong, so that a test can tell beforehand which call fails, and how."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from math import isfinite
from typing import Any, Final, Generic, Literal, TypeVar, get_args

from aioloader.core.checks import callable_name, is_async_callable

__all__ = ["Fault", "FaultError", "FaultKind", "FaultPlan"]

FaultKind = Literal[
    "latency", "throttled", "unavailable", "reset", "hang", "drip", "truncated", "wrong_length", "changed_etag"
]
"""What goes wrong; `FaultPlan` says what each is."""

KINDS: Final[tuple[FaultKind, ...]] = get_args(FaultKind)
STATUS: Final[dict[str, int]] = {"throttled": 429, "unavailable": 503, "changed_etag": 412}
RAISES: Final = frozenset({"throttled", "unavailable", "reset", "truncated", "changed_etag"})

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one call.

    Attributes:
        kind: What.
        key: Of the call.
        attempt: Which call with this key, from 1.
        seconds: How long it is delayed, for `latency` and `drip`; else 0.
        retry_after: What a server that is `throttled` asks to wait, in seconds; else None.
    """

    kind: FaultKind
    key: Any
    attempt: int
    seconds: float = 0.0
    retry_after: float | None = None

    @property
    def status(self) -> int | None:
        """What a server answers: 429, 503 or 412; None: another fault."""
        return STATUS.get(self.kind)

    @property
    def error(self) -> "FaultError | None":
        """What a function raises; None: it returns something, or nothing."""
        return FaultError(self) if self.kind in RAISES else None


class FaultError(ConnectionError):
    """Raised by a plan.

    Attributes:
        fault: The fault.
        status: See `Fault`.
        retry_after: See `Fault`; the retries of aioloader, and of others, look for this name.
    """

    def __init__(self, fault: Fault) -> None:
        status = f" (status {fault.status})" if fault.status else ""
        super().__init__(f"{fault.kind}{status}: key {fault.key!r}, attempt {fault.attempt}")
        self.fault = fault
        self.status = fault.status
        self.retry_after = fault.retry_after

    def __reduce__(self) -> Any:
        return FaultError, (self.fault,)


@dataclass
class FaultPlan:
    """Faults by chance, which depend on nothing but the seed, the key and the number of the attempt.

    ```python
    plan = FaultPlan(seed=1, throttled=0.05, hang=0.01)
    flaky = plan.wrap(fetch)             # sync or async
    plan.fault(key=7, attempt=1)         # what the first call of flaky(7) will meet: a Fault, or None
    ```

    Each kind has a share of the calls, 0 to 1, all together 1 at most:

    | kind | a function | an HTTP server |
    | --- | --- | --- |
    | `latency` | is called after `latency_seconds` | answers after them |
    | `throttled` | raises, with `retry_after` | 429 with `Retry-After` |
    | `unavailable` | raises | 503 |
    | `reset` | raises | resets the connection |
    | `hang` | never returns, until it is cancelled or `release()` is called | never answers |
    | `drip` | returns after `drip_seconds` | the body comes in pieces during them |
    | `truncated` | is called, and raises | closes the connection in the middle of the body |
    | `wrong_length` | returns half of its result, if that can be sliced | gives half of the body as if it was all |
    | `changed_etag` | raises | says that the object is another one |

    What is raised is a `FaultError`, which is a `ConnectionError`. Calls may come from any thread and any event loop.

    Args:
        seed: Any integer.
        latency: Share, as all up to `changed_etag`.
        throttled: See above.
        unavailable: See above.
        reset: See above.
        hang: See above.
        drip: See above.
        truncated: See above.
        wrong_length: See above.
        changed_etag: See above.
        latency_seconds: 0 or more.
        drip_seconds: 0 or more.
        retry_after: What a throttled call says, in seconds, 0 or more.
        attempts: How many attempts of one key may fail, at least 1: with 2, the third one is fine. None: any.

    Raises:
        TypeError, ValueError: An argument is none of these.
    """

    seed: int
    latency: float = 0.0
    throttled: float = 0.0
    unavailable: float = 0.0
    reset: float = 0.0
    hang: float = 0.0
    drip: float = 0.0
    truncated: float = 0.0
    wrong_length: float = 0.0
    changed_etag: float = 0.0
    latency_seconds: float = field(default=0.05, kw_only=True)
    drip_seconds: float = field(default=0.05, kw_only=True)
    retry_after: float = field(default=0.05, kw_only=True)
    attempts: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer, got {self.seed!r}")
        total = sum(_share(kind, getattr(self, kind)) for kind in KINDS)
        if total > 1 + 1e-9:
            raise ValueError(f"the shares of all faults must be 1 together at most, got {total:g}; lower some of them")
        for name in ("latency_seconds", "drip_seconds", "retry_after"):
            _at_least_zero(name, getattr(self, name))
        if self.attempts is not None and (isinstance(self.attempts, bool) or not isinstance(self.attempts, int)):
            raise TypeError(f"attempts must be an integer of at least 1, got {self.attempts!r}")
        if self.attempts is not None and self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}; leave it out for any number")
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()
        self._released = threading.Event()
        self._hanging: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()  # calls are counted in each process

    # -- what will happen --------------------------------------------------------------------------------------------

    def fault(self, key: object, attempt: int = 1) -> Fault | None:
        """What goes wrong with call number `attempt` (from 1) for `key`; None: nothing does."""
        if self.attempts is not None and attempt > self.attempts:
            return None
        digest = blake2b(f"{self.seed}|{_text(key)}|{attempt}".encode("utf-8", "surrogatepass"), digest_size=8)
        point = int.from_bytes(digest.digest(), "big") / 2.0**64
        for kind in KINDS:
            point -= getattr(self, kind)
            if point < 0:
                return self._made(kind, key, attempt)
        return None

    def next_fault(self, key: object) -> Fault | None:
        """The same for the next call for `key`, which this is: the attempts are counted here."""
        with self._lock:
            self._calls[_text(key)] += 1
            attempt = self._calls[_text(key)]
        return self.fault(key, attempt)

    def calls(self, key: object) -> int:
        """How many calls for `key` there were, in this process."""
        with self._lock:
            return self._calls[_text(key)]

    def _made(self, kind: FaultKind, key: object, attempt: int) -> Fault:
        seconds = {"latency": self.latency_seconds, "drip": self.drip_seconds}.get(kind, 0.0)
        return Fault(kind, key, attempt, seconds, self.retry_after if kind == "throttled" else None)

    # -- making it happen --------------------------------------------------------------------------------------------

    def wrap(self, fn: F, *, key: Callable[..., Any] | None = None) -> F:
        """`fn` with the faults of this plan: async if `fn` is, and picklable if `fn` is.

        Args:
            fn: Any function.
            key: From its arguments, what tells its calls apart. None: its first argument.
        """
        wrapped: Any = (_FlakyAsync if is_async_callable(fn) else _Flaky)(self, fn, _first if key is None else key)
        return wrapped  # type: ignore[no-any-return]  # it is called as `fn` is

    def release(self) -> None:
        """Let all calls that hang end, with a `TimeoutError`, and those that would hang from now on."""
        self._released.set()
        with self._lock:
            hanging, self._hanging = self._hanging, set()
        for loop, future in hanging:
            loop.call_soon_threadsafe(_let_go, future)

    async def enter(self, fault: Fault | None) -> None:
        """What comes before an async call: a delay, an error, or no end."""
        if fault is None or fault.kind == "truncated":
            return
        if fault.kind == "hang":
            await self._hang()
        if (error := fault.error) is not None:
            raise error
        if fault.seconds:
            await asyncio.sleep(fault.seconds)

    def enter_sync(self, fault: Fault | None) -> None:
        """What comes before a sync call."""
        if fault is None or fault.kind == "truncated":
            return
        if fault.kind == "hang":
            self._released.wait()
            raise TimeoutError(f"a call that hung was released: key {fault.key!r}, attempt {fault.attempt}")
        if (error := fault.error) is not None:
            raise error
        if fault.seconds:
            time.sleep(fault.seconds)

    @staticmethod
    def leave(fault: Fault | None, result: object) -> Any:
        """What becomes of a result."""
        if fault is not None and fault.kind == "truncated":
            raise FaultError(fault)
        if fault is not None and fault.kind == "wrong_length" and isinstance(result, bytes | str | list | tuple):
            return result[: len(result) // 2]
        return result

    async def _hang(self) -> None:
        loop = asyncio.get_running_loop()
        waits = (loop, loop.create_future())
        with self._lock:
            released = self._released.is_set()
            if not released:
                self._hanging.add(waits)
        try:
            if not released:
                await waits[1]
        finally:
            with self._lock:
                self._hanging.discard(waits)
        raise TimeoutError("a call that hung was released")


class _Flaky(Generic[F]):
    """A sync function with faults."""

    def __init__(self, plan: FaultPlan, fn: F, key: Callable[..., Any]) -> None:
        self._plan = plan
        self._fn = fn
        self._key = key
        self.__name__ = self.__qualname__ = callable_name(fn)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        fault = self._plan.next_fault(self._key(*args, **kwargs))
        self._plan.enter_sync(fault)
        return self._plan.leave(fault, self._fn(*args, **kwargs))


class _FlakyAsync(_Flaky[F]):
    """An async function with faults."""

    async def __call__(self, *args: object, **kwargs: object) -> Any:
        fault = self._plan.next_fault(self._key(*args, **kwargs))
        await self._plan.enter(fault)
        return self._plan.leave(fault, await self._fn(*args, **kwargs))


def _first(*args: object, **kwargs: object) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _text(key: object) -> str:
    """Of a key, the same in each process: `hash` is not."""
    return f"{type(key).__name__} {key!r}"


def _let_go(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a share of the calls, 0 to 1, got {value!r}")
    if not (isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must be a share of the calls, 0 to 1, got {value!r}")
    return value


def _at_least_zero(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, 0 or more, got {value!r}")
    if not (isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be 0 or more seconds, got {value!r}")
