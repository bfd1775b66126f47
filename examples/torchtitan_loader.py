"""torchtitan's data loader over a `Pipeline`: packed before it is dealt, finite too, for any number of ranks.

    config.dataloader = PackedLoader.Config(documents=lambda tokenizer: Pipeline(Lines(urls)).map(tokenizer.encode))

It follows torchtitan at commit b5bcd76 (2026-08-21: `components/data/loader.py`, `trainer.py`), and does what is a TODO
there. Documents are packed before rows are dealt to data-parallel ranks: these have rows that are as full, and as many,
so they end together without a word (`repeat=False`). The state is the same on all of them, so the checkpoint has it
once, and any number of ranks goes on from it with the rows that were to come. (Under a name for each dp rank, new ranks
would not find theirs.) `too_long` says what becomes of a document of more than `max_context_length` tokens. And a
`map(executor="process")` in `documents` takes several processes, all of which work for one packer.

The price: each rank reads and tokenizes all documents. Where that is too dear, tokenize once and store the tokens, or
deal files as `pretrain.py` does.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torchtitan.components.data.loader import BaseDataLoader

from aioloader import Packed, Pipeline

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class PackedLoader(BaseDataLoader):  # type: ignore[misc]  # torchtitan need not be installed to check this
    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):  # type: ignore[misc]
        documents: Callable[[Any], Pipeline[Any]]  # from the tokenizer to token ids, the same on all ranks
        too_long: Literal["split", "drop"] = "split"
        even: Literal["drop", "pad"] = "drop"  # what is done with the last rows, if there is not one for each rank
        repeat: bool = True

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: Any,
        max_context_length: int,
        num_tokens_per_batch: int,
        **kwargs: Any,
    ) -> None:
        def examples(document: Any) -> list[dict[str, torch.Tensor]]:
            """Inputs and the tokens after them: of the whole document, or of its pieces."""
            ids = torch.as_tensor(document)
            inputs, labels = ids[:-1].split(max_context_length), ids[1:].split(max_context_length)
            if len(ids) < 2 or (config.too_long == "drop" and len(inputs) > 1):
                return []
            return [{"input_ids": i, "labels": j} for i, j in zip(inputs, labels, strict=True)]

        documents = config.documents(tokenizer)
        rows = (documents.repeat() if config.repeat else documents).flat_map(examples).pack(num_tokens_per_batch)
        self._loader = rows.shard(dp_rank, dp_world_size, even=config.even).map(to_batch)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)

    def state_dict(self) -> dict[str, Any]:
        return {"state": json.dumps(self._loader.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:  # an empty one is of a run that had none
            self._loader.load_state_dict(json.loads(state_dict["state"]))

    def close(self) -> None:
        self._loader.close()


def to_batch(row: Packed) -> Batch:
    """For attention, a document begins at each position 0. The padding is one more, whose labels are -100."""
    used = int(row.cu_seqlens[-1])
    positions = row.positions.long()
    positions[used:] = torch.arange(len(positions) - used)
    return {"input": row.tokens["input_ids"], "positions": positions}, row.tokens["labels"]
