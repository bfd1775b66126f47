"""`python -m aioloader doctor`: what this machine offers to a loader, and which optional packages are missing."""

import os
import platform
import sys
import sysconfig
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

from aioloader.core.cores import usable_cores
from aioloader.engine.loop_thread import new_event_loop
from aioloader.executors.ray.cluster import words_of_named

__all__ = ["OPTIONAL", "REQUIRED", "Facts", "collect", "describe"]

REQUIRED = ("aioloader", "torch", "anyio", "aiofiles")
"""Distributions that are always needed."""

OPTIONAL = {
    "uvloop": ("uvloop", "a faster private loop under `for`"),
    "cloudpickle": ("process", "lambdas, closures and what is defined in `__main__` in worker processes"),
    "obstore": ("objects", "objects and tar shards in S3, GCS, Azure or behind HTTP"),
    "pyarrow": ("parquet", "Parquet files"),
    "watchfiles": ("watch", "files and folders that grow"),
    "zstandard": ("zstd", "`.zst` files before Python 3.14"),
    "ray": ("ray", "functions and batches in actors of a Ray cluster"),
    "tqdm": ("progress", "progress bars"),
    "prometheus-client": ("prometheus", "metrics for Prometheus"),
    "opentelemetry-api": ("otel", "metrics for OpenTelemetry"),
    "rich": ("top", "`python -m aioloader top`, a live view"),
    "aiohttp": ("demo", "the demo's server and its clients"),
    "numpy": ("demo", "arrays in samples, and the demo"),
    "pillow": ("images", "images in tar shards, and the demo's"),
    "psutil": ("demo", "the demo's figures of memory"),
    "scikit-learn": ("demo", "the demo's digits"),
}
"""Optional distributions: the extra of aioloader that installs each, and its purpose."""


@dataclass(frozen=True)
class Facts:
    """What `collect` found.

    Attributes:
        python: Version and implementation.
        system: Operating system and machine.
        threading: Whether Python threads run in parallel.
        versions: Each distribution of `REQUIRED` and `OPTIONAL`; None where it is not installed.
        event_loop: The class of the private loop under `for`.
        accelerators: The name of each device.
        torch_built_for: Where this build of torch can compute, besides the CPU.
        usable_cores: How many cores this process may run on.
        open_files: How many files and sockets may be open at once; None: no limit known.
        ray: Which Ray cluster is named; empty where Ray is not installed.
    """

    python: str
    system: str
    threading: str
    event_loop: str
    torch_built_for: str
    usable_cores: int
    open_files: int | None
    ray: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    accelerators: list[str] = field(default_factory=list)


def collect() -> Facts:
    """Inspect the interpreter, the installed distributions and the machine."""
    return Facts(
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        system=f"{platform.system()} {platform.machine()}",
        threading=_threading(),
        versions={name: _installed(name) for name in (*REQUIRED, *OPTIONAL)},
        event_loop=_event_loop(),
        accelerators=_accelerators(),
        torch_built_for=f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA",
        usable_cores=usable_cores(),
        open_files=_open_files(),
        ray=words_of_named() if _installed("ray") else "",
    )


def describe(facts: Facts) -> str:
    """Return the facts as lines for a terminal, and then what is missing."""
    rows = [
        ("python", facts.python),
        ("system", facts.system),
        ("threads", facts.threading),
        *((name, found) for name, found in facts.versions.items() if found is not None),
        ("loop under `for`", facts.event_loop),
        ("accelerator", ", ".join(facts.accelerators) or f"none found; torch is built {facts.torch_built_for}"),
        ("usable cores", str(facts.usable_cores)),
        ("open files", "no limit known" if facts.open_files is None else f"at most {facts.open_files}"),
        *([("Ray cluster", facts.ray)] if facts.ray else []),
    ]
    width = max(len(name) for name, _ in rows)
    missing = [_missing(name) for name, found in facts.versions.items() if found is None]
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows), "", *(missing or ["nothing is missing"])])


def _missing(name: str) -> str:
    if name in REQUIRED:
        return f"{name}: not installed; always needed; pip install {name}"
    extra, purpose = OPTIONAL[name]
    return f"{name}: not installed; {purpose}; pip install 'aioloader[{extra}]'"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _threading() -> str:
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "share the GIL"
    enabled = getattr(sys, "_is_gil_enabled", lambda: True)()
    return "free-threaded build, with the GIL switched on" if enabled else "free-threaded"


def _event_loop() -> str:
    loop = new_event_loop()
    loop.close()
    return f"{type(loop).__module__}.{type(loop).__name__}"


def _accelerators() -> list[str]:
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is None or not accelerator.is_available():
        return []
    kind = accelerator.current_accelerator().type
    name_of = getattr(torch.get_device_module(kind), "get_device_name", lambda _: kind)  # only some kinds have names
    return [f"{kind}:{index} {name_of(index)}" for index in range(accelerator.device_count())]


def _open_files() -> int | None:
    if os.name == "nt":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft
