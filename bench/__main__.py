"""Runs every script of this folder, each in a process of its own: `python -m bench`, or `python -m bench --quick`."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

SCRIPTS: Final[dict[str, list[str]]] = {
    "overhead": ["--quick"],
    "state": ["--quick"],
    "sources_lines": ["--quick"],
    "sources_objects": ["--quick"],
    "sources_tar": ["--quick"],
    "sources_parquet": ["--quick"],
    "cache": ["--quick"],
    "endless": ["--quick"],
    "processes": ["--quick"],
    "memory_pss": ["--quick"],
    "own_process": ["--quick"],
    "gpu": ["--mib", "16", "--batches", "10", "--rounds", "2"],
}
"""The scripts, in order, and what makes each of them quick."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them all, whatever fails in between, and return 1 when something did."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="in about a minute, with figures that vary more")
    options = parser.parse_args(arguments)
    failed = []
    for script, quick in SCRIPTS.items():
        print(f"== {script}", flush=True)
        command = [sys.executable, "-m", f"bench.{script}", *(quick if options.quick else ())]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(script)
        print(flush=True)
    if failed:
        print(f"bench: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
