"""Who is to blame when the actors of `in_ray` die again and again: found out by a trial.

All streams of an actor were at work when it died, and each of them, and each sample of them, may have been its death.
So all are opened again at once, elsewhere. One whose actors die again and again before anything comes of it is put into
an actor alone, where its calls begin one by one, each with leave from here (`Trial`): what has got leave last has been
the death of that actor.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from aioloader.executors.processes.stream_worker import Heard, StreamWorkerDied
from aioloader.executors.ray.reader_seats import Seats
from aioloader.executors.ray.reader_streams import ReaderSeat, ReaderStream, Trial

__all__ = ["Court", "Trials"]

PROBATION: Final = 8  # entries that must come of a stream on trial, and twice as many the next time
RENEW_SECONDS: Final = 10.0  # so long a stream waits for a new actor to be tried in
MOST_BLAMED: Final = 64  # calls of a stream in a row, with nothing that came in between, before it ends


class Court(Protocol):
    """What a trial needs of those who have the streams."""

    def streams(self) -> Iterable[ReaderStream]:
        """All of them."""

    def seats_for_trials(self) -> "Seats[ReaderStream]":
        """Whose actors nobody else uses."""

    def shared_seats(self) -> "Seats[ReaderStream]":
        """Where streams are usually."""

    def open_at(self, stream: ReaderStream, seat: ReaderSeat, *, one_by_one: bool) -> None:
        """Open a stream in an actor."""

    def vacate(self, seat: ReaderSeat) -> None:
        """Let the streams leave a seat."""

    def place(self) -> None:
        """Open the streams that are open nowhere."""

    def move(self, stream: ReaderStream) -> None:
        """Let it leave its seat as soon as what was asked for has come."""

    def tell_last(self, stream: ReaderStream, heard: Heard) -> None:
        """The last that is heard of a stream."""

    def later(self, seconds: float, fn: Callable[..., None], *args: Any) -> None:
        """Call a function in so many seconds."""

    def then(self, ref: Any, fn: Callable[..., None], *args: Any) -> None:
        """Call a function when a call has been answered."""


class Trials:
    """One after the other. In the thread of `RayThread`.

    Args:
        court: Who has the streams.
        retries: See `RayWorkers`.
    """

    def __init__(self, court: Court, retries: int) -> None:
        self._court = court
        self._retries = retries
        self.now: Trial | None = None

    def is_suspect(self, stream: ReaderStream) -> bool:
        """Whether it must be tried before it is opened beside others."""
        return stream.suspect or stream.deaths >= 2 or stream.deaths > self._retries

    def tries(self, stream: ReaderStream) -> bool:
        """Whether it is tried now."""
        return self.now is not None and self.now.stream is stream

    def at(self, seat: ReaderSeat) -> bool:
        """Whether the trial is there."""
        return self.now is not None and self.now.seat is seat

    def begin(self) -> None:
        """Put a suspect into an actor alone, if there is one.

        It is one in which nothing else has ever been: calls that are under way cannot be stopped, and one of another
        stream might be its death yet. Most often the replacement of the one that was lost is about to run. If none is,
        or there is no room for it, one that runs is ended: then there is room for one of the two.
        """
        if self.now is None:
            suspects = (one for one in self._court.streams() if one.seat is None and self.is_suspect(one))
            stream = next(suspects, None)
            if stream is None:
                return
            # What kills may be as far ahead as its actor works: if more than that comes of it, it is tried for longer.
            stream.suspect, stream.probation = True, 2 * stream.probation or PROBATION
            self.now = Trial(stream, None, stream.probation)
            self._court.later(RENEW_SECONDS, self._late_for, self.now)
        trial = self.now
        if trial.seat is not None:
            return
        seats = self._court.seats_for_trials()
        running = seats.running()
        seat = next((one for one in running if not one.used), None)
        if seat is not None:
            self._open(trial, seat)
        elif running and not seats.starting:
            self._renew_for(trial, seats)

    def _open(self, trial: Trial, seat: ReaderSeat) -> None:
        self._court.vacate(seat)
        trial.seat = seat
        self._court.open_at(trial.stream, seat, one_by_one=True)

    def _late_for(self, trial: Trial) -> None:
        """No new actor has come for so long. Actors of a pool are others' too, and are not ended: it is tried there."""
        if self.now is trial and trial.seat is None:
            seats, shared = self._court.seats_for_trials(), self._court.shared_seats()
            if seats is shared:
                self._renew_for(trial, seats)
            elif running := shared.running():
                self._open(trial, min(running, key=lambda seat: len(seat.streams)))
        self._court.place()

    def _renew_for(self, trial: Trial, seats: "Seats[ReaderStream]") -> None:
        """Have an actor in which nothing has been, at the cost of one that runs, if there is none yet."""
        if self.now is trial and trial.seat is None and (running := seats.running()):
            seat = min(running, key=lambda seat: len(seat.streams))
            self._court.vacate(seat)
            seats.renew(seat)

    def opened(self, stream: ReaderStream) -> None:
        """It is open."""
        if self.now is not None and self.now.stream is stream:
            self._watch(self.now, stream.wire, 0)

    def _watch(self, trial: Trial, wire: str, number: int) -> None:
        assert trial.seat is not None
        self._court.then(trial.seat.actor.watch.remote(wire, number), self._asks, trial, wire)

    def _asks(self, trial: Trial, wire: str, future: Any) -> None:
        """A call waits for leave: note it, then let it begin."""
        if self.now is not trial or trial.stream.wire != wire or future.exception() is not None:
            return
        if (asked := future.result()) is not None and trial.seat is not None:
            trial.asked = asked
            trial.seat.actor.go.remote(wire, asked[0])
            self._watch(trial, wire, asked[0] + 1)

    def came(self, stream: ReaderStream, entries: int) -> None:
        """So much has come of a stream."""
        stream.deaths = stream.blamed = 0
        if self.now is not None and self.now.stream is stream:
            self.now.left -= entries
            if self.now.left <= 0 or stream.granted <= 0:
                self._court.later(0.0, self._court.place)  # when the entries are on their way

    def end_if_done(self) -> None:
        """Let a stream go on as the others do when enough has come of it.

        Or when no more may come before others, which wait for it to end: entries are taken from all in turn.
        """
        trial = self.now
        if trial is None or not trial.stream.opened:
            return
        waits = trial.stream.granted <= 0 and any(one.seat is None for one in self._court.streams())
        if trial.left > 0 and not waits:
            return
        self.now = None
        trial.stream.suspect = False
        if trial.seat is not None and trial.seat.actor is not None:
            trial.seat.actor.go.remote(trial.stream.wire, None)
        if self._court.seats_for_trials() is not self._court.shared_seats():
            self._court.move(trial.stream)

    def forget(self, stream: ReaderStream) -> bool:
        """It has ended; whether it was the one that was tried."""
        found = self.tries(stream)
        if found:
            self.now = None
        return found

    def lost(self, stream: ReaderStream, seat: ReaderSeat | None, why: str) -> None:
        """An actor was lost, in which a stream was."""
        trial = self.now
        if trial is not None and trial.stream is stream and trial.seat is seat:
            self.now = None
            if stream.deaths > self._retries:
                self._blame(trial, why)

    def _blame(self, trial: Trial, why: str) -> None:
        stream, asked = trial.stream, trial.asked
        times = "" if stream.deaths == 1 else f", {stream.deaths} times in a row"
        stream.blamed += 1
        if asked is None:
            self._court.tell_last(stream, StreamWorkerDied(None, f"{why}{times}, before it called any function"))
            return
        _, stage, key, call = asked
        if stream.blamed > MOST_BLAMED or any(known == call for known, _ in stream.guilty):  # that was not it
            self._court.tell_last(stream, StreamWorkerDied(None, f"{why}{times}"))
            return
        stream.guilty.append((call, f"{why}{times}; the last time in {stage} with key {key}"))
        for one in self._court.streams():  # the others have lost the same actors
            one.deaths, one.suspect = 0, False
