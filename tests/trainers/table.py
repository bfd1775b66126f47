"""`make trainers`: every trainer with every loader, and the table of `docs/trainers.md`.

python -m tests.trainers.table             # all, an hour
python -m tests.trainers.table keras ray   # these; the other rows stay
"""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from tests.trainers._job import KINDS, OURS

ROOT: Final = Path(__file__).parent.parent.parent
PAGE: Final = ROOT / "docs" / "trainers.md"
RESULTS: Final = ROOT / "build" / "trainers"
BEGIN: Final = "<!-- the table: written by make trainers -->"
END: Final = "<!-- the end of the table -->"

TRAINERS: Final = {
    "lightning": ("Lightning", "the loader"),
    "fabric": ("Fabric", "`as_torch_dataloader`"),
    "hf_trainer": ("Hugging Face `Trainer`", "`as_torch_dataloader`, callback"),
    "accelerate": ("Accelerate", "`as_torch_dataloader`"),
    "ignite": ("ignite", "the loader, in `to_save`"),
    "composer": ("composer", "the loader"),
    "keras": ("Keras 3", "`as_torch_dataloader`, callback"),
    "torchtnt": ("torchtnt", "`as_torch_dataloader(read_ahead=1)`"),
    "ray": ("Ray Train", "`as_torch_dataloader(read_ahead=1)`"),
    "fastai": ("fastai", "the loader"),
    "skorch": ("skorch", "`iterator_train=`"),
}

DEADLINE: Final = 3600.0


def measure(trainer: str) -> dict[str, Any]:
    """One trainer, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.trainers.run", trainer],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=DEADLINE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"trainer": trainer, "version": "", "why": "it takes too long"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"trainer": trainer, "version": "", "why": "it cannot be imported here"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def places(resume: dict[str, str], ours: bool) -> str:
    """In few words, what came out of all places."""
    if not resume:
        return "no resume in an epoch"
    by_verdict: dict[str, list[str]] = {}
    for place, verdict in resume.items():
        by_verdict.setdefault(verdict, []).append(place)
    if set(by_verdict) == {"exact"}:
        return "**exact**" if ours else "exact"
    return "; ".join(f"{', '.join(where)}: {verdict}" for verdict, where in by_verdict.items())


def cell(found: dict[str, Any], kind: str) -> str:
    if kind not in found:
        return "not run"
    one = found[kind]
    parts = [one["once"], places(one["resume"], kind in OURS)]
    if one["ranks"] != "not run":
        parts.append(f"two ranks: {one['ranks']}")
    return "; ".join(parts).replace("|", "/").replace("\n", " ")


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"| trainer | it gets | {' | '.join(KINDS.values())} |",
        f"| --- | --- | {' | '.join('---' for _ in KINDS)} |",
    ]
    for found in results:
        name, gets = TRAINERS[found["trainer"]]
        if "why" in found:
            lines.append(f"| {name} | {gets} | {' | '.join(found['why'] for _ in KINDS)} |")
        else:
            lines.append(f"| {name} {found['version']} | {gets} | {' | '.join(cell(found, kind) for kind in KINDS)} |")
    return lines


def write(results: list[dict[str, Any]]) -> None:
    import torch

    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    said = f"torch {torch.__version__}, Python {platform.python_version()}."
    PAGE.write_text(before + "\n".join([BEGIN, said, "", *table(results), END]) + after)


def main() -> None:
    asked = sys.argv[1:] or list(TRAINERS)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for trainer in asked:
        print(f"{TRAINERS[trainer][0]} ...", flush=True)
        (RESULTS / f"{trainer}.json").write_text(json.dumps(measure(trainer)))
    kept = [RESULTS / f"{trainer}.json" for trainer in TRAINERS]
    write([json.loads(path.read_text()) for path in kept if path.exists()])
    print(f"written into {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
