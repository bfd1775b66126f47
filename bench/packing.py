"""How fast documents become rows, and how much of these is padding: `python -m bench.packing`.

Documents of lognormal length lie in memory as tensors, and a map gives them. Reading is that map, and lists of
documents, about as many as there are rows; packing is to cost little on top. The rival is Grain, best fit with as many
open bins, whose documents are arrays. Next fit, which closes a row at the first document that does not fit, is what
many trainers do.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import torch

from aioloader import Pipeline
from aioloader.stages.length_plan import TokenBudget, plan_window
from aioloader.stages.pack_plan import PackPlan
from bench._harness import Comparison, Contender, Epoch, Report, Target, Tick, by_for, parser_for, pick
from bench._rivals import quiet_grain

SEQ_LEN: Final = 4096
OPEN_ROWS: Final = 64
PER_ROW: Final = 6  # documents, about

READING: Final = "reading, in lists of 6"
PACK: Final = "pack, best fit"
GRAIN: Final = "Grain, best fit"


def lengths_of(count: int) -> list[int]:
    """Of documents: the logarithm is normal; at most a row."""
    rng = random.Random(0)
    return [min(SEQ_LEN, max(1, int(rng.lognormvariate(6, 1)))) for _ in range(count)]


def reading(lengths: Sequence[int]) -> Epoch:
    return by_for(_read(lengths).batch(PER_ROW, collate_fn=list), len)


def packing(lengths: Sequence[int], strategy: Any) -> Epoch:
    loader = _read(lengths).pack(SEQ_LEN, strategy=strategy, open_rows=OPEN_ROWS)
    return by_for(loader, lambda row: len(row.keys))


def by_length(lengths: Sequence[int]) -> Epoch:
    return by_for(_read(lengths).batch_by_length(4 * SEQ_LEN, len, collate_fn=list), len)


def planning(lengths: Sequence[int]) -> Epoch:
    def epoch(tick: Tick) -> None:
        for _ in _planned(lengths):
            pass
        tick(len(lengths))

    return epoch


def grain_rows(lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What Grain's best fit gives."""
    grain = quiet_grain()
    from grain.experimental import BestFitPackIterDataset

    documents = [{"tokens": tokens.numpy()} for tokens in _documents(lengths)]
    source = grain.MapDataset.source(documents).to_iter_dataset()
    rows: Iterator[dict[str, Any]] = iter(
        BestFitPackIterDataset(source, length_struct={"tokens": SEQ_LEN}, num_packing_bins=OPEN_ROWS)
    )
    return rows


def by_grain(lengths: Sequence[int]) -> Epoch:
    def epoch(tick: Tick) -> None:
        for row in grain_rows(lengths):
            tick(int(row["tokens_segment_ids"].max()))

    return epoch


def _read(lengths: Sequence[int]) -> Pipeline:
    return Pipeline(range(len(lengths))).map(_documents(lengths).__getitem__)


def _documents(lengths: Sequence[int]) -> list[torch.Tensor]:
    return [torch.ones(length, dtype=torch.int64) for length in lengths]


def _planned(lengths: Sequence[int]) -> Iterator[Any]:
    plan = PackPlan(SEQ_LEN, "best_fit", OPEN_ROWS)
    for number, length in enumerate(lengths):
        while (row := plan.due()) is not None:
            yield row
        if (row := plan.put(number, 0, length)) is not None:
            yield row
    while (row := plan.close_first()) is not None:
        yield row


def next_fit(lengths: Sequence[int]) -> int:
    """Rows of a packer that closes a row at the first document that does not fit."""
    rows, room = 1, SEQ_LEN
    for length in lengths:
        if length > room:
            rows, room = rows + 1, SEQ_LEN
        room -= length
    return rows


def padding_by_length(lengths: Sequence[int]) -> float:
    """Of windows of 2,048."""
    padded = 0
    for start in range(0, len(lengths), 2048):
        window = lengths[start : start + 2048]
        batches = plan_window(window, TokenBudget(4 * SEQ_LEN), 0)
        padded += sum(len(batch) * max(window[number] for number in batch) for batch in batches)
    return 1 - sum(lengths) / padded


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    lengths = lengths_of(pick(options, full=40_000, quick=8_000, smallest=300))
    few = lengths[: pick(options, full=4_000, quick=1_000, smallest=300)]
    report = Report("packing", options)
    found = report.compare(
        f"{len(lengths):,} documents of lognormal length, rows of {SEQ_LEN:,} tokens, {OPEN_ROWS} open",
        [
            Contender(READING, partial(reading, lengths), len(lengths), limit=True),
            Contender("planning alone", partial(planning, lengths), len(lengths)),
            Contender(PACK, partial(packing, lengths, "best_fit"), len(lengths)),
            Contender("pack, first fit", partial(packing, lengths, "first_fit"), len(lengths)),
            Contender("pack, split", partial(packing, lengths, "split"), None),
            Contender("batch_by_length", partial(by_length, lengths), len(lengths)),
            Contender(GRAIN, partial(by_grain, few), len(few), needs=("grain",)),
        ],
        [Target(PACK, "time", GRAIN, 0.2)],
    )
    _judge(report, found, lengths)
    return report.finish()


def _judge(report: Report, found: Comparison, lengths: Sequence[int]) -> None:
    padding: dict[str, Callable[[], int]] = {
        PACK: lambda: sum(1 for _ in _planned(lengths)),
        "next fit": lambda: next_fit(lengths),
        GRAIN: lambda: sum(1 for _ in grain_rows(lengths)),
    }
    for name, rows in padding.items():
        if name == "next fit" or name in found.timings:
            report.figure(f"{name}: padding", 100 * (1 - sum(lengths) / (SEQ_LEN * rows())), "%")
    packed = 100 * (1 - sum(lengths) / (SEQ_LEN * padding[PACK]()))
    report.judge(Target(PACK, "time", "padding", 0.5), packed, "{ours} pads {value} %; at most {reach}")
    batched = 100 * padding_by_length(lengths)
    phrase = "{ours}, windows of 2,048, pads {value} %; at most {reach}"
    report.judge(Target("batch_by_length", "time", "padding", 5), batched, phrase)
    if {PACK, READING} <= found.timings.keys():
        on_top = found.row(PACK)["median"] - found.row(READING)["median"]
        phrase = "{ours} takes {value} µs a document on top of {rival}; at most {reach}"
        report.judge(Target(PACK, "time", READING, 10), on_top, phrase)
    report.note("")


if __name__ == "__main__":
    sys.exit(main())
