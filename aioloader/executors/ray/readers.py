"""Parts of a pipeline that run in actors, as seen from the process that reads them.

Each part is a *stream*: it is opened in an actor that runs, read there, and opened again elsewhere, after the newest
entry that has come, when that actor is lost. Everything here happens in the thread of `RayThread`, but for what others
call.

Who is to blame when an actor dies is found out by `Trials`.
"""

import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Final

from aioloader.core.memory import Alloc
from aioloader.errors import LoaderClosedError, WorkerDiedError
from aioloader.executors.processes.failures import cannot_travel
from aioloader.executors.processes.stream_worker import (
    Arrived,
    Failure,
    Heard,
    Rested,
    StreamEnded,
)
from aioloader.executors.processes.wire import can_pickle_by_value
from aioloader.executors.ray.actors import is_loss, words_of
from aioloader.executors.ray.cluster import Membership
from aioloader.executors.ray.lookout import Lookout
from aioloader.executors.ray.owners import Owner, this_process
from aioloader.executors.ray.reader_seats import Seats
from aioloader.executors.ray.reader_streams import ReaderSeat, ReaderStream
from aioloader.executors.ray.same_host import Inbox, SegmentsGoneError, answer_bytes
from aioloader.executors.ray.stores import Stores, part_of_room
from aioloader.executors.ray.suspects import Suspects
from aioloader.executors.ray.thread import RayThread
from aioloader.executors.ray.trials import Trials
from aioloader.executors.ray.values import pack, unpack
from aioloader.executors.ray.workers import RayWorkers
from aioloader.insight.actors import ActorStats

__all__ = ["Readers", "ReadersTerms"]

SETTLE_SECONDS: Final = 1.0  # so long the first actors that run leave parts to those that are about to
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
        place: Of the stage in its pipeline.
    """

    actors: int
    workers: RayWorkers
    pool: str | None = None
    first: int = 0
    shared: bool = True
    place: Any = None


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
        self._owner: Owner
        self._membership: Membership | None = None
        self._seats = self._new_seats()
        self._apart: Seats[ReaderStream] | None = None  # of a pool: with an actor that nobody shares, for trials
        self._wanted = terms.actors
        self._streams: dict[int, ReaderStream] = {}
        self._trials = Trials(self, terms.workers.retries)
        self._lookout = Lookout(
            thread, waits=self._waits, has_gone=self._has_gone, fail=self._fail_all, seen=self._seen
        )
        self._retired = False
        self._settled = False  # nobody waits for actors that are about to run
        self._settling = False
        self._entry_bytes = 0.0  # the running mean
        self._stores = Stores()
        self._short = False  # a stream waits for room in them
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

    @property
    def terms(self) -> ReadersTerms:
        """What is wanted."""
        return self._terms

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

    def retire(self) -> None:
        """End the actors as soon as nothing is open there: others are wanted now, and need their place."""
        self._thread.call(self._guarded, self._retire)

    def stats(self) -> tuple[ActorStats, ...]:
        """What is known of the actors."""
        return self._seats.stats()

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _guarded(self, fn: Callable[..., None], *args: Any) -> None:
        """Call `fn`; what it raises ends all streams: nobody would hear of them otherwise."""
        self._has_gone()
        try:
            fn(*args)
        except BaseException as error:
            self._fail_all(error)

    def _has_gone(self) -> bool:
        """Whether the connection was ended by the user: then all that was there is lost.

        Asked before each use: Ray would join any cluster that it finds instead. The next epoch begins with a new one.
        """
        if self._membership is None:
            return False
        if self._membership.alive:
            return False
        self._membership = self._program = None
        self._settled = self._settling = False
        for seats in filter(None, (self._seats, self._apart)):
            seats.abandon()
        self._seats, self._apart = self._new_seats(), None
        self._fail_all(
            WorkerDiedError("the connection to Ray has ended, and with it all Ray readers; call ray.init again")
        )
        return True

    def _fail_all(self, error: BaseException) -> None:
        streams, self._streams = list(self._streams.values()), {}
        self._trials.now = None
        for stream in streams:
            with suppress(Exception):  # its actor is told, if that can be
                self._leave(stream)
            stream.leave()
            stream.listener(Failure(error))
        if self._retired:
            self._retire()

    def _seen(self) -> None:
        """The head answers."""
        self._stores.learn()
        self._read_more()

    def _waits(self) -> bool:
        return not self._ended and any(stream.granted > 0 for stream in self._streams.values())

    def then(self, ref: Any, fn: Callable[..., None], *args: Any) -> None:
        """Call `fn(*args, future)` in the thread when a call has been answered, if the connection is still the same."""
        thread, membership = self._thread, self._membership

        def answered(future: Any) -> None:
            if self._membership is membership:
                fn(*args, future)

        ref.future().add_done_callback(lambda future: thread.call(self._guarded, answered, future))

    def later(self, seconds: float, fn: Callable[..., None], *args: Any) -> None:
        """Call `fn` in so many seconds; 0: soon."""
        if seconds:
            self._thread.later(seconds, self._guarded, fn, *args)
        else:
            self._thread.call(self._guarded, fn, *args)

    def _open(self, stream: ReaderStream) -> None:
        if self._ended or self._thread.closed:
            stream.listener(Failure(_closed()))
            return
        self._streams[stream.number] = stream
        self._retired = False
        if self._program is None:
            self._begin()
        self._lookout.watch()
        self._seats.scale(self._wanted)
        self.place()

    def _begin(self) -> None:
        """Connect, and ask for the actors."""
        self._membership = self._thread.join_cluster(self._terms.workers.address)
        import ray

        try:
            program = pack(self._make_program())
        except BaseException as error:
            raise cannot_travel("what is before in_ray()", error, by_value=can_pickle_by_value()) from error
        self._program = ray.put(program)
        self._owner = this_process()

    def _retire(self) -> None:
        self._retired = True
        if not self._streams and self._program is not None:
            self._end_actors()
            self._program = None
            self._seats, self._apart = self._new_seats(), None
            self._settled = self._settling = False

    def _end_actors(self) -> None:
        for seats in filter(None, (self._apart, self._seats)):
            seats.end(self._name)

    def _end_part(self, number: int) -> None:
        if (stream := self._streams.get(number)) is not None:
            self._forget(stream)

    def tell_last(self, stream: ReaderStream, heard: Heard) -> None:
        """The last that is heard of a stream."""
        self._forget(stream)
        stream.listener(heard)

    def _forget(self, stream: ReaderStream) -> None:
        self._streams.pop(stream.number, None)
        self._leave(stream)
        if self._trials.forget(stream):
            self.place()
        self._read_more()
        if self._retired:
            self._retire()

    def end(self) -> None:
        """See `RayOwner`."""
        self._ended = True
        streams, self._streams = list(self._streams.values()), {}
        if self._program is not None and not self._has_gone():
            for stream in streams if self._terms.pool is not None else ():
                self._leave(stream)
            self._end_actors()
        self._program = None

    # -- what is read ------------------------------------------------------------------------------------------------

    def _grant(self, number: int, entries: int, handed_out: int) -> None:
        if (stream := self._streams.get(number)) is not None:
            stream.granted += entries
            stream.handed_out = handed_out
            self._lookout.watch()
            self._read(stream)

    def _read(self, stream: ReaderStream) -> None:
        """Ask for what may come: by a read for each batch, or by a few for samples, which come several at a time."""
        seat = stream.seat
        if not stream.opened or seat is None:
            return
        may = stream.told if stream.leaving else min(stream.granted, self._room(stream, seat))
        self._short |= may < min(1, stream.granted)
        wanted = may if stream.batches else min(READS, may)
        while stream.sent - stream.came < wanted:
            more = min(1, may - stream.told) if stream.batches else max(0, may - stream.told)
            stream.told += more
            told = None if stream.inbox is None else stream.inbox.told()
            ref = seat.actor.read.remote(stream.wire, stream.sent, more, stream.handed_out, told)
            stream.refs[stream.sent] = ref
            self.then(ref, self._came, stream, seat, seat.actor, stream.wire, stream.sent)
            stream.sent += 1

    def _room(self, stream: ReaderStream, seat: ReaderSeat) -> int:
        """How many of its entries may be in the object stores of its node and of ours.

        A store that is full writes to disk what is in it, also what others have there. How large entries are is known
        when the first one has come.
        """
        assert seat.place is not None
        if not self._entry_bytes:
            return min(1, stream.granted)
        here = [one for one in self._streams.values() if one.seat is not None]
        there = [one for one in here if _node_of(one) == seat.place.node_id]
        most = stream.granted
        for streams, node in ((there, seat.place.node_id), (here, self._stores.here)):
            if (share := self._stores.share([node])) is not None:
                others = sum(one.told for one in streams) - stream.told
                most = min(most, part_of_room(int(share / self._entry_bytes), len(streams), others))
        return most

    def _read_more(self) -> None:
        """Streams that had to wait for room may have it now; those first of which the least is here."""
        if self._short:
            self._short = False
            for stream in sorted(self._streams.values(), key=lambda one: -one.granted):
                if not stream.told:
                    self._read(stream)

    def _came(self, stream: ReaderStream, seat: ReaderSeat, actor: Any, wire: str, number: int, future: Any) -> None:
        """A read is answered. Over a wire that is not the stream's any more it falls on deaf ears."""
        if stream.wire != wire:
            return
        stream.refs.pop(number, None)
        if (error := future.exception()) is not None:
            self._call_failed(stream, seat, actor, error)
            return
        stream.answers[number], seat.cpu_seconds = future.result()
        del future
        while stream.wire == wire and stream.came in stream.answers:
            answer = stream.answers.pop(stream.came)
            stream.came += 1
            self._take(stream, seat, answer)
        if stream.wire == wire:
            self._read(stream)
            self._move_if_leaving(stream)
        self._read_more()

    def _take(self, stream: ReaderStream, seat: ReaderSeat, answer: tuple[Any, ...]) -> None:
        """The next answer in the order of a stream."""
        match answer:
            case ("entries", places, packed):
                self._take_entries(stream, seat, places, packed)
            case ("ended", packed):
                self.tell_last(stream, StreamEnded(unpack(packed)))
            case ("failed", packed):
                self.tell_last(stream, Failure(unpack(packed)))
            case _:  # its run was stopped, and nobody here did that
                self._begin_again(stream, "its run was stopped")
                self.place()

    def _take_entries(self, stream: ReaderStream, seat: ReaderSeat, places: list[tuple[Any, ...]], answer: Any) -> None:
        value, refused = None, None
        try:
            value = stream.unpack(answer)
        except SegmentsGoneError as error:
            stream.by_store = True
            self._begin_again(stream, str(error))
            self.place()
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
        self._trials.came(stream, len(places))
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
            self.then(ref, self._rests, stream, stream.pause, still)

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
        self._stores.learn()
        if not self._settling:
            self._settling = True
            self._thread.later(SETTLE_SECONDS, self._guarded, self._settle)
        self.place()

    def _settle(self) -> None:
        """Wait no longer for actors that do not run yet."""
        if not self._settled:
            self._settled = True
            self.place()

    def place(self) -> None:
        """Open the streams that are open nowhere, and even out how many each actor has."""
        if self._ended or self._program is None:
            return
        self._trials.end_if_done()
        self._trials.begin()
        if self._trials.now is None and self._apart is not None:
            self._end_apart(self._apart)
        running = self._seats.running()  # one of them may have been ended for a trial
        free = [seat for seat in running if not self._trials.at(seat)]
        if not free:
            return
        most = self._most_each(len(running))
        for stream in list(self._streams.values()):
            if stream.seat is None and not self._trials.is_suspect(stream):
                seat = min(free, key=self._load)
                if len(seat.streams) < most:
                    self.open_at(stream, seat)
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
            self.move(max(seat.streams, key=lambda one: one.number))

    def move(self, stream: ReaderStream) -> None:
        """Let it leave its seat as soon as what was asked for has come."""
        stream.leaving = True
        self._move_if_leaving(stream)

    def _move_if_leaving(self, stream: ReaderStream) -> None:
        if stream.leaving and stream.opened and not stream.told:
            self._leave(stream)
            self.place()

    def open_at(self, stream: ReaderStream, seat: ReaderSeat, *, one_by_one: bool = False) -> None:
        """Open a stream in an actor."""
        stream.seat, stream.wire = seat, f"{self._name}-{next(self._wires)}"
        if seat.place is not None and not stream.by_store:
            stream.inbox = Inbox.of(seat.place.pid, seat.place.file)
        seat.streams.add(stream)
        seat.used = True
        suspects = Suspects(one_by_one, tuple(stream.guilty)) if one_by_one or stream.guilty else None
        request = (stream.request, stream.epoch, stream.cursor, stream.batches, stream.pause, suspects)
        mine = (self._name, self._owner)
        ref = seat.actor.open.remote(stream.wire, mine, self._program, self._terms.shared, pack(request))
        self.then(ref, self._opened, stream, seat, seat.actor, stream.wire, stream.pause)

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
            self.tell_last(stream, Failure(unpack(failed)))
            return
        stream.opened = True
        if pause and not stream.pause:
            actor.let_go.remote(wire, pause)
        elif stream.pause:
            self._rest(stream)
        self._trials.opened(stream)
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
            self.vacate(seat)
            if self._trials.at(seat):
                self._trials.now = None
            self._seats.dismiss(seat)
        self.place()

    # -- losses ------------------------------------------------------------------------------------------------------

    def _call_failed(self, stream: ReaderStream, seat: ReaderSeat, actor: Any, error: BaseException) -> None:
        """A call was not answered."""
        from ray.exceptions import RayActorError

        if not is_loss(error):
            self.tell_last(stream, Failure(error))
        elif isinstance(error, RayActorError):
            seat.home.lose(seat, actor, error)
        else:  # its result is lost, and the actor may not be
            self._begin_again(stream, words_of(error))
            self.place()

    def _actor_lost(self, seat: ReaderSeat, why: str) -> None:
        for stream in sorted(seat.streams, key=lambda one: one.number):
            self._begin_again(stream, why)
        if not seat.home.shared:
            seat.left.clear()
        self.place()
        self._read_more()

    def _begin_again(self, stream: ReaderStream, why: str) -> None:
        """What was under way in a stream is lost: it is made again, from its cursor on."""
        stream.lose()
        seat = stream.seat
        self._leave(stream)
        if stream.pause:
            stream.rested()
        self._trials.lost(stream, seat, why)

    def vacate(self, seat: ReaderSeat) -> None:
        """Let the streams leave a seat."""
        for stream in list(seat.streams):
            self._leave(stream)

    # -- for `Trials` ------------------------------------------------------------------------------------------------

    def streams(self) -> Iterable[ReaderStream]:
        """All of them."""
        return self._streams.values()

    def shared_seats(self) -> "Seats[ReaderStream]":
        """Where streams are usually."""
        return self._seats

    def seats_for_trials(self) -> "Seats[ReaderStream]":
        """Whose actors nobody else uses. Those of a pool are others' too, so there it is one more, for a while.

        It holds no CPUs, since nothing says that some are free.
        """
        if self._terms.pool is None:
            return self._seats
        if self._apart is None:
            self._apart = Seats(
                self._thread,
                replace(self._terms.workers, cpus=0),
                None,
                guarded=self._guarded,
                runs=self.place,
                late=None,
                lost=self._actor_lost,
            )
            self._apart.scale(1)
        return self._apart

    def _end_apart(self, seats: "Seats[ReaderStream]") -> None:
        """There is no trial, and there may be none for long."""
        if not any(seat.streams for seat in seats.running()):
            self._apart = None
            seats.end(self._name)


def _node_of(stream: ReaderStream) -> str | None:
    return None if stream.seat is None or stream.seat.place is None else stream.seat.place.node_id


def _closed() -> LoaderClosedError:
    return LoaderClosedError("the loader was closed while it began an epoch in actors")
