"""`examples/pretrain.py`, killed by `SIGKILL` while it writes a checkpoint, and started again by torchrun."""

import argparse
import io
import json
import os
import random
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from aioloader import Pipeline
from tests._pretrain_worker import EXAMPLE, note_of
from tests._servers import S3Server

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "_pretrain_worker.py"
DEADLINE = 300.0
"""Of what hangs, in seconds: six processes import torch one after the other, on cores that others use too."""

FILES = 4


def corpus(server: S3Server) -> tuple[str, str]:
    """Documents of all lengths, as compressed lines and as Parquet; returns the URLs of both."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    zstd = pytest.importorskip("zstandard")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(300)]

    def documents(count: int) -> list[str]:
        return [" ".join(rng.choices(words, k=1 + int(rng.lognormvariate(4, 1)))) for _ in range(count)]

    bucket = server.make_bucket()
    store = server.store(bucket)
    for number in range(FILES):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(30))
        store.put(f"web-{number}.jsonl.zst", zstd.compress(lines.encode()))
        table = io.BytesIO()
        pq.write_table(pa.table({"content": documents(20), "stars": list(range(20))}), table)
        store.put(f"code-{number}.parquet", table.getvalue())
    last = FILES - 1
    return f"s3://{bucket}/web-{{0..{last}}}.jsonl.zst", f"s3://{bucket}/code-{{0..{last}}}.parquet"


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> Iterator[tuple[str, str]]:
    """The URLs of a corpus, which the environment leads to."""
    variables = {"AWS_ENDPOINT_URL": s3_server.endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (variables | {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}).items():
            patch.setenv(name, value)
        yield corpus(s3_server)


class Run:
    """What a torchrun of two processes did, which started them twice.

    Attributes:
        folder: The example's.
        said: By rank 0, a line for each step.
        steps: Of each start and rank: what was in the rows, and a checksum of the weights.
    """

    def __init__(self, folder: Path, said: list[str], notes: Path) -> None:
        self.folder, self.said = folder, said
        self.steps: dict[tuple[int, int], list[Any]] = {
            (start, rank): [json.loads(line) for line in (notes / f"{start}-{rank}.txt").read_text().splitlines()]
            for start in (0, 1)
            for rank in (0, 1)
        }


@pytest.fixture(scope="module")
def killed(bucket: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Nine steps, with a checkpoint after each fourth; rank 0 is killed while it writes that of step 8.

    It is a fixture since the time that a test may take is for what hangs, and processes that import torch do not.
    """
    pytest.importorskip("tokenizers")
    notes, folder = tmp_path_factory.mktemp("notes"), tmp_path_factory.mktemp("run")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    web, code = bucket
    arguments = [str(folder), "--web", web, "--code", code, "--steps", "9", "--save-every", "4"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent.parent)}
    process = subprocess.Popen(
        [*launcher, str(WORKER), str(notes), *arguments],
        env=environment | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            said, errors = process.communicate(timeout=DEADLINE)
        finally:
            process.terminate()  # torchrun ends its processes then
    assert process.returncode == 0, f"{said}\n{errors}"
    assert "(exitcode: -9) local_rank: 0" in errors  # SIGKILL
    assert not re.search("(ReadAll|Uneven|Unsplit)Warning", errors)
    return Run(folder, said.splitlines(), notes)


def test_steps_after_the_checkpoint_are_made_again_bit_for_bit(killed: Run) -> None:
    """Of the same rows, with the same loss, and the same weights after each."""
    assert [line.partition(":")[0] for line in killed.said] == [f"step {n}" for n in (*range(1, 9), *range(5, 10))]
    assert killed.said[4:8] == killed.said[8:12]
    for rank in (0, 1):
        before, after = killed.steps[0, rank], killed.steps[1, rank]
        assert len(after) == 5
        assert before[4:8] == after[:4]
        assert len({weights for *_, weights in before[:8]}) == 8
    assert [weights for *_, weights in killed.steps[1, 0]] == [weights for *_, weights in killed.steps[1, 1]]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_step_has_the_rows_of_a_run_without_a_break(
    killed: Run, bucket: tuple[str, str], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here ranks do not ask each other: nobody ends before the others."""
    shard = Pipeline.shard
    monkeypatch.setattr(
        Pipeline, "shard", lambda self, *, group, even, by: shard(self, rank, 2, even="keep" if group else even, by=by)
    )
    example = runpy.run_path(str(EXAMPLE))
    tokenizer = example["Tokenizer"].from_file(str(killed.folder / "tokenizer.json"))
    sources = example["texts"](argparse.Namespace(web=bucket[0], code=bucket[1]))
    with example["rows_of"](sources, tokenizer, "both").batch(1) as loader:
        whole = [note_of(rows) for rows in islice(loader, 9)]
    assert [step[:2] for step in killed.steps[0, rank][:4] + killed.steps[1, rank]] == whole
    assert {key.rpartition(" ")[2] for keys, _ in whole for key in keys[0]} == {"0", "1"}  # web and code


def test_a_checkpoint_is_whole_or_the_one_before_it(killed: Run) -> None:
    """In the end it is that of the last step, with a state of each rank; half a file has been replaced."""
    assert sorted(path.name for path in killed.folder.iterdir()) == ["checkpoint.pt", "tokenizer.json"]
    saved = torch.load(killed.folder / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 9
    assert len(saved["loaders"]) == 2
    assert saved["loaders"][0] != saved["loaders"][1]
