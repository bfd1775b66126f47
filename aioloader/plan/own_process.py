"""What runs in a process of its own for `in_process`, and the worker that it runs in. Pure, as `build` is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from aioloader.core.address import Address
from aioloader.core.memory import Alloc
from aioloader.engine.admission import RemoteAdmission
from aioloader.engine.process_server import Serving
from aioloader.engine.window import Window
from aioloader.executors.epochs import Copies, Epochs, epochs_of, with_set_epoch
from aioloader.executors.processes.stream_worker import StreamWorker
from aioloader.executors.processes.worker_thread import WorkerThread
from aioloader.memory.pool import BatchMemory
from aioloader.plan.elsewhere import sends_what_it_collates
from aioloader.plan.plan import (
    Plan,
    functions_of,
)
from aioloader.sources.sampler_order import Draws
from aioloader.stages.base import Pass

__all__ = ["InProcessProgram", "worker_of"]


@dataclass(frozen=True)
class InProcessProgram:
    """In the other process: the nodes of `plan`.

    Args:
        plan: What runs there.
        path: See `PlanBuilder`.
        live: See `PlanBuilder`.
        build: Gives the window that ends the nodes of a plan.
        size: For how many samples one of the entries stands, if the consumer decides when samples begin; else None.
        epochs: Those that the user's objects in it are in.
    """

    plan: Plan
    path: Address
    live: bool
    build: Callable[..., Window]
    size: int | None = None
    epochs: Epochs = ()

    def __call__(self, request: tuple[Pass, Epochs], resumed: bool, alloc: Alloc) -> Window:
        this_pass, epochs = request
        self._copies.tell(epochs)
        # Nothing is drawn there but by `shuffle`: `Pipeline.in_process` refuses samplers that draw.
        draws = Draws(resumed=resumed)
        admission = None if self.size is None else RemoteAdmission(self.size)
        window = self.build(
            self.plan,
            this_pass,
            alloc=alloc if self._lends else self._memory.alloc,
            draws=draws,
            path=self.path,
            live=self.live,
            gate=None,
            warns=True,
            admission=admission,
        )
        if admission is not None:
            admission.output = window
        return window

    @cached_property
    def _copies(self) -> Copies:
        return Copies(functions_of(self.plan), self.epochs)

    @cached_property
    def _lends(self) -> bool:
        return sends_what_it_collates(self.plan)

    @cached_property
    def _memory(self) -> BatchMemory:
        return BatchMemory()


def worker_of(processes: Callable[[], WorkerThread], key: object, program: InProcessProgram) -> StreamWorker:
    """The process of its own, that of the epoch before if there was one."""
    host = processes()

    def make() -> StreamWorker:
        return StreamWorker(host, serving)

    def serving() -> Serving:
        return Serving(replace(program, epochs=epochs_of(with_set_epoch(functions_of(program.plan)))))

    remote: StreamWorker = host.get_or_create(key, make)
    return remote
