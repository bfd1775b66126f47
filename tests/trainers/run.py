"""One script for all trainers: each job in a process of its own, forked from one that has only imported the trainer.

    python -m tests.trainers.run lightning        # one trainer: its cells of the table, as JSON
"""

import importlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.trainers._job import EPOCHS, KINDS, N, OURS, STEPS, Job, Kind, batches_of, end_of, epochs_of

DEADLINE: Final = 120.0

PLACES: Final = {"middle": 5, "end of epoch": STEPS, "second epoch": STEPS + 5}
"""Where a run is killed: steps after which its checkpoint was written."""


def load(trainer: str) -> Any:
    return importlib.import_module(f"tests.trainers._{trainer}")


def fork(script: Any, job: dict[str, Any], environment: dict[str, str], log: Path) -> int:
    """Run a job in a child; what it says goes to `log`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(environment)
        os.environ.update(TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        mine = Job(**job)
        script.run(mine)
        mine.finish()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(pids: list[int]) -> list[int]:
    """Exit statuses; what takes too long is killed, and gives -9."""
    limit = time.monotonic() + DEADLINE
    statuses = {}
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > limit:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[pid] for pid in pids]


def go(script: Any, job: dict[str, Any], ranks: int = 1) -> list[int]:
    """Run a job on each of `ranks`."""
    port = free_port()
    pids = []
    for rank in range(ranks):
        environment = {}
        if ranks > 1:
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "run",
            }
        log = Path(job["folder"]) / f"{job['run']}-{rank}.log"
        pids.append(fork(script, job, environment, log))
    return wait(pids)


@dataclass
class Cell:
    """What came out for one trainer and one kind of loader.

    Attributes:
        once: Each sample once in each epoch, the length right, validation right, nothing left; else what was wrong.
        resume: By place: "exact", or what was wrong.
        ranks: Each sample once over two ranks; else what was wrong.
    """

    once: str = "not run"
    resume: dict[str, str] = field(default_factory=dict)
    ranks: str = "not run"
    seconds: float = 0.0


def last_line(folder: Path, run: str) -> str:
    """Of what it said: the error."""
    for path in sorted(folder.glob(f"{run}-*.log")):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Interrupt"))]
        if errors or lines:
            return (errors or lines)[-1][:200]
    return "it says nothing"


def judge_once(folder: Path, run: str, statuses: list[int], script: Any) -> str:
    if statuses != [0]:
        return f"fails: {last_line(folder, run)}"
    batches, end = batches_of(folder, run), end_of(folder, run)
    assert end is not None
    wrong = []
    if len(batches) != EPOCHS * STEPS or any(sorted(epoch) != list(range(N)) for epoch in epochs_of(batches)):
        wrong.append(f"{len(batches)} steps, {[len(set(epoch)) for epoch in epochs_of(batches)]} samples")
    if end.get("length", STEPS) != STEPS:
        wrong.append(f"length {end['length']}")
    evaluations = getattr(script, "EVALUATIONS", None)
    if sorted(set(end["validated"])) != list(range(10)) and evaluations != 0:
        wrong.append(f"validated {end['validated']}")
    if end["left"]:
        wrong.append(f"left {end['left']}")
    return "; ".join(wrong) or "once"


def judge_resume(folder: Path, run: str, whole: list[list[int]], at: int, statuses: list[int]) -> str:
    if statuses != [0]:
        return f"fails: {last_line(folder, run)}"
    rest, expected = batches_of(folder, run), whole[at:]
    if rest == expected:
        return "exact"
    left = -at % STEPS or STEPS
    what = "another order"
    if rest[:left] == expected[:left]:
        what = "rest of the epoch exact, later epochs in another order"
    same = next((n for n, (a, b) in enumerate(zip(rest, expected, strict=False)) if a != b), min(len(rest), len(expected)))
    if same == min(len(rest), len(expected)):
        what = ""
    if len(rest) != len(expected):
        what = f"{len(rest)} steps instead of {len(expected)}" + (f", {what}" if what else "")
    return what


def judge_ranks(folder: Path, run: str, statuses: list[int]) -> str:
    if statuses != [0, 0]:
        return f"fails: {last_line(folder, run)}"
    each = [batches_of(folder, run, rank) for rank in (0, 1)]
    if len(each[0]) != len(each[1]):
        return f"{[len(one) for one in each]} steps"
    steps = len(each[0]) // EPOCHS
    for epochs in zip(*(epochs_of(one, steps) for one in each), strict=True):
        both = [n for epoch in epochs for n in epoch]
        if sorted(set(both)) != list(range(N)):
            return f"{len(set(both))} of {N} samples in an epoch"
        if len(both) > N + 2 * 4:
            return f"both ranks train on {[len(set(epoch)) for epoch in epochs]} samples"
    samples = sum(len(batch) for one in each for batch in one) / EPOCHS
    return "once" if samples == N else f"once, and {samples - N:g} fillers"


def resume(script: Any, job: dict[str, Any], folder: Path, at: int) -> str:
    """Three processes: one is never killed, one is killed in the step after its checkpoint, one goes on from there.

    All write that checkpoint, since asking for a state settles orders that are drawn from a global generator. The last
    one begins with another global random state; if it is not exact, it is tried with the same.
    """
    def at_work(name: str, **more: Any) -> tuple[Path, list[int]]:
        place = folder / name
        place.mkdir(exist_ok=True)
        return place, go(script, job | {"folder": str(place), **more})

    place, statuses = at_work("whole", run="whole")
    if statuses != [0]:
        return f"fails: {last_line(place, 'whole')}"
    whole = batches_of(place, "whole")
    found = "not run"
    for seed in (8, 1):
        place, statuses = at_work(f"seed-{seed}", run="first", dies=True)
        if statuses != [9]:
            return f"fails: {last_line(place, 'first')}"
        if batches_of(place, "first") != whole[: at + 1]:
            return "the first run is never the same"
        place, statuses = at_work(f"seed-{seed}", run="second", resumes=True, seed=seed)
        verdict = judge_resume(place, "second", whole, at, statuses)
        if verdict == "exact":
            return "exact" if seed == 8 else "exact if both processes seed torch alike"
        found = verdict if seed == 8 else found
    return found


def cell(script: Any, kind: Kind, folder: Path, options: dict[str, Any]) -> Cell:
    """All runs of one trainer with one kind of loader."""
    began = time.monotonic()
    result = Cell()
    folder.mkdir(parents=True)
    base = {"kind": kind, "folder": str(folder), **options}
    statuses = go(script, base | {"run": "whole"})
    result.once = judge_once(folder, "whole", statuses, script)
    if getattr(script, "RESUMES", True):
        for name, at in PLACES.items():
            place = folder / name.replace(" ", "-")
            place.mkdir()
            result.resume[name] = resume(script, base | {"checkpoint_at": at}, place, at)
    if getattr(script, "RANKS", True):
        place = folder / "ranks"
        place.mkdir()
        statuses = go(script, base | {"run": "ranks", "folder": str(place)}, ranks=2)
        result.ranks = judge_ranks(place, "ranks", statuses)
    result.seconds = round(time.monotonic() - began, 1)
    return result


@contextmanager
def temporary_folder(keep: str | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        shutil.rmtree(keep, ignore_errors=True)
        Path(keep).mkdir(parents=True)
        yield Path(keep)


def main() -> None:
    trainer = sys.argv[1]
    kinds = [kind for kind in KINDS if len(sys.argv) < 3 or kind in sys.argv[2].split(",")]
    script = load(trainer)
    found: dict[str, Any] = {"trainer": trainer, "version": script.VERSION}
    with temporary_folder(sys.argv[3] if len(sys.argv) > 3 else None) as folder:
        for kind in kinds:
            found[kind] = asdict(cell(script, kind, folder / kind, getattr(script, "OPTIONS", {})))
            print(kind, found[kind], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
