"""What actors are asked for: `RayWorkers`, a description."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from aioloader.core.checks import check_count
from aioloader.executors.ray.cluster import check_ray

__all__ = ["RayWorkers", "actors_for"]


@dataclass(frozen=True)
class RayWorkers:
    """Actors of a Ray cluster that run functions: `map(fn, executor=RayWorkers(cpus=2))`.

    Making one neither imports Ray nor connects to a cluster. That happens at the first `next()`, and with the user's
    own `ray.init(...)`, or the cluster that the variable RAY_ADDRESS names. No cluster is joined or begun by accident:
    where there is neither, `ValueError` says so.

    `docs/ray.md` tells when actors help, what to size, and what is promised when machines die.

    Args:
        cpus: CPUs of the cluster that each actor holds while it lives, at least 0; fractions are fine.
        gpus: GPUs that each one holds.
        resources: Other resources of the cluster that each one holds, by name.
        runtime_env: Ray's description of what its process needs: packages, files, variables.
        retries: How many deaths of its actor a sample survives. It is made again elsewhere; at the next death it fails,
            with `WorkerDiedError`.
        spread: Ask Ray to spread the actors over its nodes; False: to fill one node before the next.
        address: The cluster; None: that of `ray.init(...)`, else of RAY_ADDRESS. `"local"`: one of the loader's own on
            this machine, without a dashboard, which ends when the last loader that uses it is closed.

    Raises:
        ImportError: Ray is not installed; says what to install.
        TypeError, ValueError: An argument does not fit.
    """

    cpus: float = 1
    gpus: float = 0
    resources: Mapping[str, float] | None = None
    runtime_env: Mapping[str, Any] | None = None
    retries: int = 3
    spread: bool = True
    address: str | None = None

    def __post_init__(self) -> None:
        check_ray("RayWorkers")
        _check_amount("cpus", self.cpus)
        _check_amount("gpus", self.gpus)
        check_count("retries", self.retries, least=0)
        if self.resources is not None:
            if not isinstance(self.resources, Mapping):
                raise TypeError(f"resources must be a mapping of names to numbers, got {self.resources!r}")
            for name, amount in self.resources.items():
                if name in ("CPU", "GPU"):
                    raise ValueError(f"resources must not have {name!r}; pass {name.lower()}s={amount!r}")
                _check_amount(f"resources[{name!r}]", amount)
        if self.runtime_env is not None and not isinstance(self.runtime_env, Mapping):
            raise TypeError(f"runtime_env must be a mapping, as Ray takes it, got {self.runtime_env!r}")
        if self.address is not None and not isinstance(self.address, str):
            raise TypeError(f"address must be a str such as 'local' or 'host:6379', got {self.address!r}")
        if self.address is not None and self.address.startswith("ray://"):
            raise ValueError(
                f"address must be that of a cluster whose node this process runs on, got {self.address!r} of the Ray "
                f"client, which buffers cross twice; run the program on a node of the cluster"
            )

    def __hash__(self) -> int:
        return hash((self.cpus, self.gpus, self.retries, self.spread, self.address))  # mappings have none

    def asked(self) -> dict[str, float]:
        """What one actor needs, by the names that Ray has for resources."""
        wanted = {"CPU": float(self.cpus), "GPU": float(self.gpus), **(self.resources or {})}
        return {name: amount for name, amount in wanted.items() if amount}

    def options(self, **more: Any) -> dict[str, Any]:
        """The options for `ray.remote(...).options`, with `more` of them.

        Ray restarts no actor and repeats no call: that would be behind our back, and count nothing.
        """
        found: dict[str, Any] = {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD" if self.spread else "DEFAULT",
            **more,
        }
        if self.resources:
            found["resources"] = dict(self.resources)
        if self.runtime_env:
            found["runtime_env"] = dict(self.runtime_env)
        return found


def actors_for(worker_type: Any) -> RayWorkers | None:
    """What a `DataLoader` asks for by its `worker_type`; None: its workers are no actors.

    Raises:
        ValueError: There is no such type.
    """
    if isinstance(worker_type, RayWorkers):
        return worker_type
    if worker_type == "ray":
        return RayWorkers()
    if worker_type not in ("thread", "process"):
        raise ValueError(f"worker_type must be 'thread', 'process' or 'ray', got {worker_type!r}")
    return None


def _check_amount(name: str, amount: Any) -> None:
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise TypeError(f"{name} must be a number, got {amount!r}")
    if not (isfinite(amount) and amount >= 0):
        raise ValueError(f"{name} must be at least 0 and finite, got {amount!r}")
