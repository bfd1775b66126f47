"""Runs every script of this folder, each in a process of its own: `python -m bench`, or `python -m bench --quick`.

The processes come from a server that has imported torch already: twenty imports would be half of the quick run.

With `--write FILE` the tables also go into a page: what was measured, on what, and which aims were missed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from bench._script import run_script

SCRIPTS: Final[dict[str, list[str]]] = {
    "overhead": ["--quick"],
    "insight": ["--quick"],
    "in_memory": ["--quick"],
    "latency": ["--quick"],
    "files": ["--quick"],
    "collate": ["--quick"],
    "decode": ["--quick"],
    "processes": ["--quick"],
    "first_batch": ["--quick"],
    "sync_face": ["--quick"],
    "memory_pss": ["--quick"],
    "endless": ["--quick"],
    "own_process": ["--quick"],
    "sources_lines": ["--quick"],
    "sources_tar": ["--quick"],
    "shards": ["--quick"],
    "sources_parquet": ["--quick"],
    "sources_objects": ["--quick"],
    "cache": ["--quick"],
    "state": ["--quick"],
    "flow": ["--quick"],
    "autotune": ["--quick"],
    "failures": ["--quick"],
    "packing": ["--quick"],
    "share": ["--quick"],
    "ray": ["--quick"],
    "ray_readers": ["--quick"],
    "gpu": ["--mib", "16", "--batches", "10", "--rounds", "2"],
}
"""The scripts, in order, and what makes each of them quick."""

NOTES: Final = Path(__file__).with_name("NOTES.md")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them all, whatever fails in between, and return 1 when something did."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="in two to three minutes, with figures that vary much")
    parser.add_argument("--only", action="append", metavar="SCRIPT", choices=sorted(SCRIPTS), help="not all of them")
    parser.add_argument("--plot", metavar="DIR", help="also draw DIR/<script>.png, of each script that compares")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write what was found into FILE")
    options = parser.parse_args(arguments)
    failed, outputs = [], {}
    for script in options.only or SCRIPTS:
        print(f"== {script}", flush=True)
        arguments = list(SCRIPTS[script] if options.quick else ())
        if options.plot is not None and script != "gpu":
            arguments += ["--plot", options.plot]
        outputs[script], status = run_script(script, arguments)
        if status != 0:
            failed.append(script)
        print(flush=True)
    if options.write is not None:
        options.write.write_text(page_of(outputs, NOTES.read_text()), encoding="utf-8")
    if failed:
        print(f"bench: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def page_of(outputs: dict[str, list[str]], notes: str) -> str:
    """The page about what the scripts printed.

    Args:
        outputs: By script.
        notes: What a person has to say about the figures.
    """
    rows = [json.loads(line) for lines in outputs.values() for line in lines if line.startswith("{")]
    targets = [row for row in rows if row.get("what") == "target"]
    page = ["# Results", ""]
    page += [f"Taken on {datetime.now(UTC):%Y-%m-%d} by `python -m bench`: {_machine(rows)}.", ""]
    page += ["Ratios are medians over the rounds of one run, in which all contenders run by turns.", ""]
    page += ["## Aims", "", "| script | of what | aim | measured | |", "| --- | --- | --- | --- | --- |"]
    for row in targets:
        of = row.get("of") or row["ours"]
        cells = [row["bench"], _plain(of), _plain(row["sentence"]), f"{row['value']:.3g}", _verdict(row)]
        page.append(f"| {' | '.join(cells)} |")
    missed = [row for row in targets if not row["reached"]]
    page += ["", "## What we miss, and the cases we lose", ""]
    page += [f"- {row['bench']}, {_plain(str(row.get('of')))}: {_plain(row['sentence'])}." for row in missed] or [
        "Nothing in this run."
    ]
    page += ["", notes.strip(), "", "## Tables", ""]
    for script, lines in outputs.items():
        text = "".join(line for line in lines if not line.startswith(("{", "drawn: "))).strip()
        page += [f"### {script}", "", "```", text, "```", ""]
    return "\n".join(page)


def _machine(rows: list[dict[str, Any]]) -> str:
    names = ("python", "torch", "cores", "cpu", "memory_gib", "system", "loop_of_for")
    first = next((row for row in rows if "cpu" in row), {})
    return ", ".join(f"{name} {first[name]}" for name in names if name in first) or "unknown"


def _plain(text: str) -> str:
    """As Markdown: `__getitems__` is no bold word."""
    return text.replace("__", r"\_\_")


def _verdict(row: dict[str, Any]) -> str:
    return "reached" if row["reached"] else "**missed**"


if __name__ == "__main__":
    sys.exit(main())
