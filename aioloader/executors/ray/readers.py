"""Parts of a pipeline that run in actors, as seen from the process that reads them.

Each part is a *stream*: it is opened in an actor that runs, read there, and opened again elsewhere, after the newest
entry that has come, when that actor is lost. Everything here happens in the thread of `RayThread`, but for what others
call.

Who is to blame when an actor dies? All of its streams were at work, and each of them, and each sample of them, may have
been its death. So all are opened again at once, elsewhere. One whose actors die again and again before anything comes
of it is put into an actor alone, where its calls begin one by one, each with leave from here (`Trial`): what has got
leave last has been the death of that actor.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from aioloader.core.memory import Alloc
from aioloader.core.safe_text import safe_repr
from aioloader.errors import LoaderClosedError, WorkerDiedError
from aioloader.executors.processes.failures import cannot_travel
from aioloader.executors.processes.stream_worker import (
    Arrived,
    Failure,
    Heard,
    Rested,
    StreamEnded,
    StreamWorkerDied,
)
from aioloader.executors.processes.wire import can_pickle_by_value
from aioloader.executors.ray.actors import is_loss, words_of
from aioloader.executors.ray.reader_seats import Seats
from aioloader.executors.ray.reader_streams import ReaderSeat, ReaderStream, Trial
from aioloader.executors.ray.same_host import Inbox, SegmentsGoneError, answer_bytes
from aioloader.executors.ray.suspects import Suspects
from aioloader.executors.ray.thread import RayThread
from aioloader.executors.ray.values import pack, unpack
from aioloader.executors.ray.workers import RayWorkers
from aioloader.insight.actors import ActorStats

__all__ = ["Readers", "ReadersTerms"]

SETTLE_SECONDS: Final = 1.0  # so long the first actors that run leave parts to those that are about to
PROBATION: Final = 8  # entries that must come of a stream on trial, and twice as many the next time
RENEW_SECONDS: Final = 10.0  # so long a stream waits for a new actor to be tried in
READS: Final = 2  # under way for a stream of samples; one of batches has one for each batch


@dataclass(frozen=True)
class ReadersTerms:
    """What a loader wants of its actors.

    Attributes:
        actors: How many.
        workers: What each needs.
        pool: The name of a pool that others use, too; None: they are the loader's own.
        first: The seat in which this rank's first part is best put.
        shared: Parts may share one copy of the program.
    """

    actors: int
    workers: RayWorkers
    pool: str | None = None
    first: int = 0
    shared: bool = True


class Readers:
    """The actors of one `in_ray`, and the streams in them; kept from one epoch to the next.

    Args:
        thread: Of the loader, with which it ends.
        terms: What is wanted.
        make_program: Gives what the actors run; called in the thread, where it is pickled.
    """

    def __init__(self, thread: RayThread, terms: ReadersTerms, make_program: Callable[[], Any]) -> None:
        self._thread = thread
        self._terms = terms
        self._make_program = make_program
        self._numbers = count(1)
        self._wires = count(1)
        self._name = uuid.uuid4().hex
        self._program: Any = None  # its ref
        self._seats = self._new_seats()
        self._wanted = terms.actors
        self._streams: dict[int, ReaderStream] = {}
        self._trial: Trial | None = None
        self._settled = False  # nobody waits for actors that are about to run
        self._settling = False
        self._entry_bytes = 0.0  # the running mean
        self._ended = False

    def _new_seats(self) -> "Seats[ReaderStream]":
        return Seats(
            self._thread,
            self._terms.workers,
            self._terms.pool,
            guarded=self._guarded,
            runs=self._actor_runs,
            late=self._settle,
            lost=self._actor_lost,
        )

    # -- in any thread -----------------------------------------------------------------------------------------------

    def open(self, request: tuple[Any, ...], listener: Callable[[Heard], None], alloc: Alloc | None) -> int:
        """Begin a part, and return its number. `listener` gets what comes of it, in the thread, until `end_part`."""
        its, epoch, cursor, room, batches, paused = request
        number = next(self._numbers)
        stream = ReaderStream(number, its, epoch, cursor, room, batches, int(paused), listener, alloc)
        self._thread.call(self._guarded, self._open, stream)
        if self._thread.closed:
            listener(Failure(_closed()))
        return number

    def grant(self, number: int, entries: int, handed_out: int) -> None:
        """Let so many entries more come, and say how many batches the consumer has got."""
        self._thread.call(self._guarded, self._grant, number, entries, handed_out)

    def hold(self, number: int, pause: int) -> None:
        """Let nothing begin in a part; `Rested` is the answer."""
        self._thread.call(self._guarded, self._hold, number, pause)

    def let_go(self, number: int) -> None:
        """Let it begin again."""
        self._thread.call(self._guarded, self._let_go, number)

    def end_part(self, number: int) -> None:
        """Stop a part."""
        self._thread.call(self._guarded, self._end_part, number)

    def scale(self, actors: int) -> None:
        """Have so many actors from now on."""
        self._thread.call(self._guarded, self._scale, actors)

    def stats(self) -> tuple[ActorStats, ...]:
        """What is known of the actors."""
        return self._seats.stats()

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _guarded(self, fn: Callable[..., None], *args: Any) -> None:
        """Call `fn`; what it raises ends all streams: nobody would hear of them otherwise."""
        if self._program is not None and not self._thread.connected:
            self._disconnected()
        try:
            fn(*args)
        except BaseException as error:
            self._fail_all(error)

    def _disconnected(self) -> None:
        """The connection was ended by the user: all that was there is lost. The next epoch begins with the next one."""
        self._fail_all(
            WorkerDiedError("the connection to Ray has ended, and with it all Ray readers; call ray.init again")
        )
        self._program = self._trial = None
        self._settled = self._settling = False
        self._seats = self._new_seats()

    def _fail_all(self, error: BaseException) -> None:
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.listener(Failure(error))

    def _then(self, ref: Any, fn: Callable[..., None], *args: Any) -> None:
        """Call `fn(*args, future)` in the thread when a call has been answered."""
        thread, guarded = self._thread, self._guarded
        ref.future().add_done_callback(lambda future: thread.call(guarded, fn, *args, future))

    def _open(self, stream: ReaderStream) -> None:
        if self._ended or self._thread.closed:
            stream.listener(Failure(_closed()))
            return
        self._streams[stream.number] = stream
        if self._program is None:
            self._begin()
        self._seats.scale(self._wanted)
        self._place()

    def _begin(self) -> None:
        """Connect, and ask for the actors."""
        self._thread.join_cluster(self._terms.workers.address)
        import ray

        try:
            program = pack(self._make_program())
        except BaseException as error:
            raise cannot_travel("what is before in_ray()", error, by_value=can_pickle_by_value()) from error
        self._program = ray.put(program)

    def _end_part(self, number: int) -> None:
        if (stream := self._streams.get(number)) is not None:
            self._forget(stream)

    def _tell_last(self, stream: ReaderStream, heard: Heard) -> None:
        """The last that is heard of a stream."""
        self._forget(stream)
        stream.listener(heard)

    def _forget(self, stream: ReaderStream) -> None:
        self._streams.pop(stream.number, None)
        self._leave(stream)
        if self._trial is not None and self._trial.stream is stream:
            self._trial = None
            self._place()

    def end(self) -> None:
        """See `RayOwner`."""
        self._ended = True
        streams, self._streams = list(self._streams.values()), {}
        if self._thread.connected:
            for stream in streams if self._terms.pool is not None else ():
                self._leave(stream)
            self._seats.end(self._name)
        self._program = None

    # -- what is read ------------------------------------------------------------------------------------------------

    def _grant(self, number: int, entries: int, handed_out: int) -> None:
        if (stream := self._streams.get(number)) is not None:
            stream.granted += entries
            stream.handed_out = handed_out
            self._read(stream)

    def _read(self, stream: ReaderStream) -> None:
        """Ask for what may come: by a read for each batch, or by a few for samples, which come several at a time."""
        seat = stream.seat
        if not stream.opened or seat is None:
            return
        may = stream.told if stream.leaving else stream.granted
        if (room := self._seats.room(seat, self._entry_bytes)) is not None:
            may = min(may, room)
        wanted = may if stream.batches else min(READS, may)
        while stream.sent - stream.came < wanted:
            more = min(1, may - stream.told) if stream.batches else max(0, may - stream.told)
            stream.told += more
            told = None if stream.inbox is None else stream.inbox.told()
            ref = seat.actor.read.remote(stream.wire, stream.sent, more, stream.handed_out, told)
            stream.refs[stream.sent] = ref
            self._then(ref, self._came, stream, seat, seat.actor, stream.wire, stream.sent)
            stream.sent += 1

    def _came(self, stream: ReaderStream, seat: ReaderSeat, actor: Any, wire: str, number: int, future: Any) -> None:
        """A read is answered. Over a wire that is not the stream's any more it falls on deaf ears."""
        if stream.wire != wire:
            return
        stream.refs.pop(number, None)
        if (error := future.exception()) is not None:
            self._call_failed(stream, seat, actor, error)
            return
        stream.answers[number] = future.result()
        del future
        while stream.wire == wire and stream.came in stream.answers:
            answer = stream.answers.pop(stream.came)
            stream.came += 1
            self._take(stream, seat, answer)
        if stream.wire == wire:
            self._read(stream)
            self._move_if_leaving(stream)

    def _take(self, stream: ReaderStream, seat: ReaderSeat, answer: tuple[Any, ...]) -> None:
        """The next answer in the order of a stream."""
        match answer:
            case ("entries", places, packed):
                self._take_entries(stream, seat, places, packed)
            case ("ended", packed):
                self._tell_last(stream, StreamEnded(unpack(packed)))
            case ("failed", packed):
                self._tell_last(stream, Failure(unpack(packed)))
            case _:  # its run was stopped, and nobody here did that
                self._begin_again(stream, "its run was stopped")
                self._place()

    def _take_entries(self, stream: ReaderStream, seat: ReaderSeat, places: list[tuple[Any, ...]], answer: Any) -> None:
        value, refused = None, None
        try:
            value = stream.unpack(answer)
        except SegmentsGoneError as error:
            stream.by_store = True
            self._begin_again(stream, str(error))
            self._place()
            return
        except BaseException as error:
            refused = cannot_travel("a batch", error, by_value=can_pickle_by_value())
        nbytes = answer_bytes(answer)
        self._entry_bytes += (nbytes / len(places) - self._entry_bytes) * (0.1 if self._entry_bytes else 1.0)
        seat.samples += len(places)
        seat.received_bytes += nbytes
        stream.granted -= len(places)
        stream.told -= min(stream.told, len(places))
        stream.cursor = places[-1][0]
        places = [stream.with_attempts(place) for place in places]
        stream.deaths = 0
        if (trial := self._trial) is not None and trial.stream is stream:
            trial.left -= len(places)
            if trial.left <= 0 or stream.granted <= 0:
                self._thread.call(self._guarded, self._place)  # when the entries are on their way
        stream.listener(Arrived(places, value, refused))

    # -- pauses ------------------------------------------------------------------------------------------------------

    def _hold(self, number: int, pause: int) -> None:
        if (stream := self._streams.get(number)) is None:
            return
        stream.pause = pause
        if stream.opened:
            self._rest(stream)
        elif stream.seat is None:
            stream.rested()  # it will begin paused; one that is about to begin is told when it has

    def _rest(self, stream: ReaderStream) -> None:
        assert stream.seat is not None
        for still in (False, True):
            ref = stream.seat.actor.rest.remote(stream.wire, stream.pause, still)
            self._then(ref, self._rests, stream, stream.pause, still)

    def _rests(self, stream: ReaderStream, pause: int, still: bool, future: Any) -> None:
        """Nothing begins, or nothing is under way; or its actor is lost, and it will begin paused elsewhere."""
        if stream.number in self._streams and stream.pause == pause:
            stream.listener(Rested(pause, still))

    def _let_go(self, number: int) -> None:
        if (stream := self._streams.get(number)) is not None:
            pause, stream.pause = stream.pause, 0
            if stream.opened and stream.seat is not None:
                stream.seat.actor.let_go.remote(stream.wire, pause)

    # -- where streams are -------------------------------------------------------------------------------------------

    def _actor_runs(self) -> None:
        if not self._settling:
            self._settling = True
            self._thread.later(SETTLE_SECONDS, self._guarded, self._settle)
        self._place()

    def _settle(self) -> None:
        """Wait no longer for actors that do not run yet."""
        if not self._settled:
            self._settled = True
            self._place()

    def _place(self) -> None:
        """Open the streams that are open nowhere, and even out how many each actor has."""
        if self._ended:
            return
        self._end_trial()
        self._try_one(self._seats.running())
        running = self._seats.running()  # one of them may have been ended for a trial
        if not running:
            return
        free = [seat for seat in running if self._trial is None or seat is not self._trial.seat]
        if not free:
            return
        most = self._most_each(len(running))
        for stream in list(self._streams.values()):
            if stream.seat is None and not self._is_suspect(stream):
                seat = min(free, key=self._load)
                if len(seat.streams) < most:
                    self._open_at(stream, seat)
        fullest, emptiest = max(free, key=self._load), min(free, key=self._load)
        if self._load(fullest)[0] - self._load(emptiest)[0] > 1:
            self._move_one(fullest)

    def _most_each(self, running: int) -> int:
        """Streams that an actor gets: its share of them, while others are about to run."""
        total = len(self._streams)
        if running >= self._seats.wanted:
            self._settled = True
        return total if self._settled else -(-total // self._seats.wanted)

    def _load(self, seat: ReaderSeat) -> tuple[int, int]:
        staying = sum(not stream.leaving for stream in seat.streams)
        return staying, (seat.number - self._terms.first) % max(1, self._seats.wanted)

    def _move_one(self, seat: ReaderSeat) -> None:
        """Let a stream leave a seat as soon as what was asked for there has come; one at a time."""
        if not any(stream.leaving for stream in seat.streams):
            stream = max(seat.streams, key=lambda one: one.number)
            stream.leaving = True
            self._move_if_leaving(stream)

    def _move_if_leaving(self, stream: ReaderStream) -> None:
        if stream.leaving and stream.opened and not stream.told:
            self._leave(stream)
            self._place()

    def _open_at(self, stream: ReaderStream, seat: ReaderSeat, *, one_by_one: bool = False) -> None:
        stream.seat, stream.wire = seat, f"{self._name}-{next(self._wires)}"
        if seat.place is not None and not stream.by_store:
            stream.inbox = Inbox.of(seat.place.pid, seat.place.file)
        seat.streams.add(stream)
        seat.used = True
        suspects = Suspects(one_by_one, tuple(stream.guilty)) if one_by_one or stream.guilty else None
        request = (stream.request, stream.epoch, stream.cursor, stream.batches, stream.pause, suspects)
        ref = seat.actor.open.remote(stream.wire, self._name, self._program, self._terms.shared, pack(request))
        self._then(ref, self._opened, stream, seat, seat.actor, stream.wire, stream.pause)

    def _opened(self, stream: ReaderStream, seat: ReaderSeat, actor: Any, wire: str, pause: int, future: Any) -> None:
        error = future.exception()
        if stream.wire != wire:
            if error is None:  # it has been given up meanwhile, but could not be ended before it was there
                actor.end.remote(wire)
            return
        if error is not None:
            self._call_failed(stream, seat, actor, error)
            return
        if (failed := future.result()) is not None:
            self._tell_last(stream, Failure(unpack(failed)))
            return
        stream.opened = True
        if pause and not stream.pause:
            actor.let_go.remote(wire, pause)
        elif stream.pause:
            self._rest(stream)
        if self._trial is not None and self._trial.stream is stream:
            self._watch(self._trial, wire, 0)
        self._read(stream)
        self._move_if_leaving(stream)

    def _leave(self, stream: ReaderStream) -> None:
        """Give up what a stream has at its seat."""
        seat, wire = stream.seat, stream.wire
        if seat is None:
            return
        seat.streams.discard(stream)
        if seat.actor is None:
            seat.left.append(wire)
        elif stream.opened:  # else when the actor answers that it is open
            seat.actor.end.remote(wire)
        stream.leave()

    def _scale(self, actors: int) -> None:
        self._wanted = actors
        if self._program is None:
            return
        for seat in self._seats.scale(actors):
            self._vacate(seat)
            if self._trial is not None and self._trial.seat is seat:
                self._trial = None
            self._seats.dismiss(seat)
        self._place()

    # -- losses ------------------------------------------------------------------------------------------------------

    def _call_failed(self, stream: ReaderStream, seat: ReaderSeat, actor: Any, error: BaseException) -> None:
        """A call was not answered."""
        from ray.exceptions import RayActorError

        if not is_loss(error):
            self._tell_last(stream, Failure(error))
        elif isinstance(error, RayActorError):
            self._seats.lose(seat, actor, error)
        else:  # its result is lost, and the actor may not be
            self._begin_again(stream, words_of(error))
            self._place()

    def _actor_lost(self, seat: ReaderSeat, why: str) -> None:
        for stream in sorted(seat.streams, key=lambda one: one.number):
            self._begin_again(stream, why)
        if self._terms.pool is None:
            seat.left.clear()
        self._place()

    def _begin_again(self, stream: ReaderStream, why: str) -> None:
        """What was under way in a stream is lost: it is made again, from its cursor on."""
        stream.lose()
        seat = stream.seat
        self._leave(stream)
        if stream.pause:
            stream.rested()
        trial = self._trial
        if trial is not None and trial.stream is stream and trial.seat is seat:
            self._trial = None
            if stream.deaths > self._terms.workers.retries:
                self._blame(trial, why)

    def _is_suspect(self, stream: ReaderStream) -> bool:
        return stream.suspect or stream.deaths >= 2 or stream.deaths > self._terms.workers.retries

    def _try_one(self, running: list[ReaderSeat]) -> None:
        """Put a suspect into an actor alone.

        It is one in which nothing else has ever been: calls that are under way cannot be stopped, and one of another
        stream might be its death yet. Most often the replacement of the one that was lost is about to run. If none is,
        or there is no room for it, one that runs is ended: then there is room for one of the two. An actor of a pool
        is others' too, and cannot be had alone.
        """
        if self._trial is None:
            suspects = (one for one in self._streams.values() if one.seat is None and self._is_suspect(one))
            stream = next(suspects, None)
            if stream is None:
                return
            # What kills may be as far ahead as its actor works: if more than that comes of it, it is tried for longer.
            stream.suspect, stream.probation = True, 2 * stream.probation or PROBATION
            self._trial = Trial(stream, None, stream.probation)
            self._thread.later(RENEW_SECONDS, self._guarded, self._late_for, self._trial)
        trial = self._trial
        if trial.seat is not None:
            return
        in_pool = self._terms.pool is not None
        seat = next((one for one in running if in_pool or not one.used), None)
        if seat is not None:
            self._vacate(seat)
            trial.seat = seat
            self._open_at(trial.stream, seat, one_by_one=True)
        elif running and not self._seats.starting:
            self._renew_for(trial)

    def _late_for(self, trial: Trial) -> None:
        """No new actor has come for so long."""
        self._renew_for(trial)
        self._place()

    def _renew_for(self, trial: Trial) -> None:
        """Have an actor in which nothing has been, at the cost of one that runs, if there is none yet."""
        running = self._seats.running()
        if self._trial is trial and trial.seat is None and running and self._terms.pool is None:
            seat = min(running, key=self._load)
            self._vacate(seat)
            self._seats.renew(seat)

    def _vacate(self, seat: ReaderSeat) -> None:
        for stream in list(seat.streams):
            self._leave(stream)

    def _watch(self, trial: Trial, wire: str, number: int) -> None:
        assert trial.seat is not None
        ref = trial.seat.actor.watch.remote(wire, number)
        self._then(ref, self._asks, trial, wire)

    def _asks(self, trial: Trial, wire: str, future: Any) -> None:
        """A call waits for leave: note it, then let it begin."""
        if self._trial is not trial or trial.stream.wire != wire or future.exception() is not None:
            return
        if (asked := future.result()) is not None and trial.seat is not None:
            trial.asked = asked
            trial.seat.actor.go.remote(wire, asked[0])
            self._watch(trial, wire, asked[0] + 1)

    def _end_trial(self) -> None:
        """Let a stream go on as the others do when enough has come of it.

        Or when no more may come before others, which wait for it to end: entries are taken from all in turn.
        """
        trial = self._trial
        if trial is None or not trial.stream.opened:
            return
        waits = trial.stream.granted <= 0 and any(one.seat is None for one in self._streams.values())
        if trial.left > 0 and not waits:
            return
        self._trial = None
        trial.stream.suspect = False
        if trial.seat is not None and trial.seat.actor is not None:
            trial.seat.actor.go.remote(trial.stream.wire, None)

    def _blame(self, trial: Trial, why: str) -> None:
        stream, asked = trial.stream, trial.asked
        times = "" if stream.deaths == 1 else f", {stream.deaths} times in a row"
        if asked is None:
            self._tell_last(stream, StreamWorkerDied(None, f"{why}{times}, before it called any function"))
            return
        _, stage, packed, address = asked
        key = unpack(packed)
        if any(known[:2] == (address, key) for known in stream.guilty):  # that was not it
            self._tell_last(stream, StreamWorkerDied(None, f"{why}{times}"))
            return
        text = f"{why}{times}; the last time in {stage} with key {safe_repr(key)}"
        stream.guilty.append((address, key, text))
        for one in self._streams.values():  # the others have lost the same actors
            one.deaths, one.suspect = 0, False


def _closed() -> LoaderClosedError:
    return LoaderClosedError("the loader was closed while it began an epoch in actors")
