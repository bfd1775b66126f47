"""Runs one script in a process of its own, and reads what it prints."""

import importlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from bench._measure import server

__all__ = ["run_script"]


def run_script(script: str, arguments: Sequence[str]) -> tuple[list[str], int]:
    """The lines that `bench.<script>` prints, which are printed here too as they come, and its exit status."""
    context = server()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(script, arguments, theirs, multiprocessing.get_start_method()))
    process.start()
    theirs.close()
    lines = []
    with os.fdopen(os.dup(ours.fileno()), encoding="utf-8") as output:
        ours.close()
        for line in output:
            print(line, end="", flush=True)
            lines.append(line)
    process.join()
    return lines, process.exitcode or 0


def _main(script: str, arguments: Sequence[str], output: "Connection[Any, Any]", start_method: str) -> None:
    """In the script's process."""
    multiprocessing.set_start_method(start_method, force=True)  # else what it starts would not be forked: see `_serve`
    os.dup2(output.fileno(), 1)
    output.close()
    status = importlib.import_module(f"bench.{script}").main(arguments)
    sys.stdout.flush()
    sys.exit(status)
