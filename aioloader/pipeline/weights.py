"""The weights of a mixture, while it runs."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import empty, int64

from aioloader.core.checks import check_count
from aioloader.core.mix_control import Mixes, check_changes
from aioloader.core.mixture import check_weights
from aioloader.core.typevars import T_co
from aioloader.engine.progress import Progress
from aioloader.loader import Loader
from aioloader.pipeline.described import Described
from aioloader.plan.mixing import mixture_named, mixtures_of
from aioloader.plan.parts import global_draws
from aioloader.plan.plan import Plan, flow_of, with_ranks
from aioloader.plan.ranks import is_shared

__all__ = ["Weights"]


class Weights(Described[T_co]):
    """They are set from any thread, and are in the state."""

    _weights: dict[str, tuple[float, ...]]  # that were set, by the addresses of their mixes
    _weights_next: dict[str, tuple[tuple[float, ...], int | None]]  # for an epoch that has not begun

    def _begin_with(self, plan: Plan) -> None:
        super()._begin_with(plan)
        self._weights = {}
        self._weights_next = {}

    def set_weights(self, weights: Mapping[str, float], *, at: int | None = None) -> int | None:
        """Mix named sources by other weights from now on, in later epochs too. Safe in any thread.

        Draws are made ahead of what is handed out; those that are made stay. What was set is in the state, with the
        number of the draw from which it holds: a resume goes on exactly. Several ranks that must draw alike say `at`,
        since one has made more draws ahead than another.

        ```python
        loader.set_weights({"web": 1, "code": 1})
        ```

        Args:
            weights: One for each of the sources that one `Pipeline.mix` has named; 0 for one that is not drawn.
            at: The number of the draw, counted from 0 in this epoch; None: the next one that is not made yet.

        Returns:
            The draw from which they hold; None: no draw has been made, and they hold from the first one.

        Raises:
            TypeError, ValueError: There is no such mix, or more than one, or the weights are none, or that draw has
                been made; or it is not said, and there are several ranks that must agree.
        """
        address, mixture = mixture_named(self._plan, weights)
        checked = check_weights(mixture.names, weights)
        if is_shared(self._plan):
            raise ValueError(
                "set_weights does not reach the rank that reads for the others of share(); say the change beforehand, "
                "by a Schedule"
            )
        if at is not None:
            at = check_count("at", at, least=0)
        elif (ranks := flow_of(with_ranks(self._plan)).ranks) is not None and ranks.world_size > 1:
            raise ValueError(
                "set_weights needs at=, the same on all ranks: each has made another number of draws ahead, and ranks "
                "that draw differently would deal samples twice; pass for instance the number of samples that all "
                "ranks have had so far, and some thousands more"
            )
        with self._lock:
            progress = self._progress
            running = self._loaded is None and progress is not None and not progress.over
            mixes = progress.mixes if running and progress is not None else None
            found = at if mixes is None else mixes.control(address, mixture).set(checked, at)
            if mixes is None:
                self._weights_next[address] = checked, at
            else:
                self._weights[address] = checked
        return found

    def _random_state(self) -> dict[str, Any]:
        state = super()._random_state()
        if self._weights:
            state["weights"] = {address: [[[], 0, list(weights)]] for address, weights in self._weights.items()}
        for address, (weights, at) in self._weights_next.items():
            changes = state.setdefault("weights", {}).setdefault(address, [])
            changes[:] = [*(changes if at else []), [[], at or 0, list(weights)]]
        return state

    def _random_of(self, loaded: dict[str, Any]) -> dict[str, Any]:
        random = super()._random_of(loaded)
        with self._lock:
            set_since = dict(self._weights_next)
        if not set_since:
            return random
        progress = Progress(loaded["epoch"], loaded["cursor"], loaded["batches"])
        changes = {address: list(changes) for address, changes in random.get("weights", {}).items()}
        progress.mixes = Mixes(changes, set_since)
        nodes = self._nodes(progress)
        if progress.cursor is not None:
            nodes.resume(progress.cursor)  # from which draw on they hold
        progress.mixes.settle()
        return random | {"weights": changes}

    def _random_kept(
        self, random: dict[str, Any] | None, epoch: int, batches: int, cursor: Any
    ) -> dict[str, Any] | None:
        changes = {address: list(each) for address, each in (random or {}).get("weights", {}).items()}
        if cursor is not None and any(len(each) > 1 for each in changes.values()):
            progress = Progress(epoch, cursor, batches)
            progress.mixes = Mixes(changes)
            with suppress(Exception):  # what the user's dataset is now may not fit any more: then all of them
                self._nodes(progress).resume(cursor)  # which tells how many draws were made before it
                return {**(random or {}), "weights": progress.mixes.needed()}
        return random

    def _check_random_state(self, state: dict[str, Any], *, begun: bool) -> None:
        super()._check_random_state(state, begun=begun)
        check_changes(state.get("weights", {}), mixtures_of(self._plan))

    def _set_random_state(self, state: dict[str, Any]) -> None:
        super()._set_random_state(state)
        self._weights = {
            address: tuple(changes[-1][2]) for address, changes in state.get("weights", {}).items() if changes
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        with self._lock:
            self._weights_next = {}  # what was set before is not in the state

    load_state_dict.__doc__ = Loader.load_state_dict.__doc__

    def _begins(self, progress: Progress) -> None:
        super()._begins(progress)
        if mixtures_of(self._plan):
            with self._lock:
                progress.mixes = Mixes(progress.loader_state.setdefault("weights", {}), self._weights_next)
                self._weights |= {address: weights for address, (weights, _) in self._weights_next.items()}
                self._weights_next = {}
        if global_draws(self._plan) > 1 and not progress.begun_before:
            empty((), dtype=int64, device="cpu").random_()  # for all of them, or the next epoch would be the same
