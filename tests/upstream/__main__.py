"""`python -m tests.upstream`: see the package."""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.upstream.different import reason_of
from tests.upstream.plugin import Plugin

VARIABLE = "AIOLOADER_UPSTREAM"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.upstream", description="Their tests, run with our loader.")
    parser.add_argument("paths", nargs="*", default=os.environ.get(VARIABLE, "").split(os.pathsep), help=VARIABLE)
    parser.add_argument("--worker-type", choices=("thread", "process"), default="thread")
    own, others = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, others = own[:at], own[at + 1 :]
    arguments = parser.parse_args(own)
    paths = [Path(path).resolve() for path in arguments.paths if path]
    if not paths:
        parser.error(f"say where their test files are, or set {VARIABLE}")
    plugin = Plugin(arguments.worker_type)
    options = ["-q", "-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += ["-c", os.devnull, "--rootdir", str(paths[0].parent)]
    pytest.main([*map(str, paths), *options, *others], plugins=[plugin])
    return report(plugin)


def report(plugin: Plugin) -> int:
    """Say what came out; how many tests failed of which nothing is known."""
    failed = [name for name, outcome in plugin.outcomes.items() if outcome == "failed"]
    known = {name: reason for name in failed if (reason := reason_of(name))}
    unknown = [name for name in failed if name not in known]
    count = Counter(plugin.outcomes.values())
    print(f"\n{count['passed']} passed, {count['skipped']} skipped, {len(failed)} failed")
    for reason, number in Counter(known.values()).most_common():
        print(f"  {number:3} different by design: {reason}")
    for name in unknown:
        print(f"  not known: {name}: {plugin.errors[name]}")
    return len(unknown)


if __name__ == "__main__":
    sys.exit(min(1, main()))
