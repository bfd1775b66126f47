"""Pretrain a language model on text in a bucket: several sources, mixed, packed, and exact after any crash.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nproc-per-node 2 --max-restarts 3 examples/pretrain.py run --steps 10000 \\
        --web 's3://bucket/web-{000..255}.jsonl.zst' --code 's3://bucket/code-{000..063}.parquet'

It needs `pip install 'aioloader[examples]'`. Lines have the text in `text`, Parquet files in `content`. The checkpoint
and the tokenizer, a byte-level BPE that is trained first, go into the folder `run`. Whatever kills a process, torchrun
starts all of them again, and they make the steps that they would have made, bit for bit. (Without the variable the new
processes may wait for the addresses of the dead ones: pytorch#135712.)

Files are dealt to ranks, so that each byte is read, decompressed and tokenized once, however many ranks there are. The
price: a state is that of one rank, and as many ranks go on from it. If their number is to change, pack before
`shard()`, as `torchtitan_loader.py` does; then each rank reads everything.

Documents have all lengths, so nobody can count the rows of a rank. With `even="agree"` ranks ask each other before each
batch. If one fails, all fail at the same step, instead of waiting for it in an all-reduce; and they would end together,
if `repeat()` did not hold the weights of the sources to the last step.
"""

import argparse
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

from aioloader import Packed, Pipeline
from aioloader.sources import Lines, ParquetRows

SEQ_LEN, VOCABULARY, WIDTH = 2048, 512, 32
END = 0  # the token after each document
WEIGHTS = {"web": 3, "code": 1}


class TinyModel(nn.Module):
    """One layer of attention, in which a token sees those before it in its document."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(SEQ_LEN, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, rows: Packed) -> Tensor:
        """Logits [B, L, vocabulary]."""
        x = self.tokens(rows.tokens["input_ids"]) + self.positions(rows.positions)
        seen = (rows.segments[:, :, None] == rows.segments[:, None, :]).tril()
        q, k, v = self.qkv(x).chunk(3, -1)
        logits: Tensor = self.out(x + scaled_dot_product_attention(q, k, v, attn_mask=seen))
        return logits


def texts(options: argparse.Namespace) -> dict[str, Pipeline[str]]:
    """Each source by its name, in the order of the epoch."""
    order: Any = {"shuffle": True, "seed": 0, "interleave": 4, "retry": 4}
    web = Pipeline(Lines(options.web, decode="json", **order)).map(itemgetter("text"))
    code = Pipeline(ParquetRows(options.code, columns=["content"], **order)).map(itemgetter("content"))
    return {"web": web, "code": code}


def train_tokenizer(path: Path, sources: dict[str, Pipeline[str]]) -> None:
    """On the first thousand documents, by the rank that calls it."""
    some = Pipeline.mix({name: text.shard(0, 1) for name, text in sources.items()}, WEIGHTS).take(1000)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(iter(some), VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.save(str(path))


def rows_of(sources: dict[str, Pipeline[str]], tokenizer: Tokenizer, ranks: Any) -> Pipeline[Packed]:
    """Rows of this rank's documents."""

    def tokenize(text: str) -> dict[str, Tensor]:
        ids = torch.tensor([*tokenizer.encode(text).ids, END])
        labels = ids.clone()
        labels[0] = -100  # nothing before it would predict it
        return {"input_ids": ids, "labels": labels}

    dealt = {name: text.shard(group=ranks, even="agree", by="file").repeat() for name, text in sources.items()}
    return Pipeline.mix(dealt, WEIGHTS, seed=0).shuffle(1000, seed=0).map(tokenize).pack(SEQ_LEN)


def train(options: argparse.Namespace) -> None:
    """Go on from the checkpoint, if there is one, until so many steps are made."""
    rank, ranks = dist.get_rank(), dist.new_group(backend="gloo")
    checkpoint, vocabulary = options.folder / "checkpoint.pt", options.folder / "tokenizer.json"
    sources = texts(options)
    if rank == 0 and not checkpoint.exists():
        train_tokenizer(vocabulary, sources)
    dist.barrier()
    loader = rows_of(sources, Tokenizer.from_file(str(vocabulary)), ranks).batch(options.batch_size)
    torch.manual_seed(0)
    model = DistributedDataParallel(TinyModel())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    done = 0
    if checkpoint.exists():
        saved: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loaders"][rank])
        done = saved["step"]

    def save(step: int) -> None:
        """All ranks' states in one file, which takes the place of the last one when it is whole."""
        states: Any = [None] * dist.get_world_size()
        dist.all_gather_object(states, loader.state_dict(), group=ranks)
        if rank == 0:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({"step": step, "loaders": states, **state}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)

    with loader:
        for step, rows in enumerate(loader, done + 1):
            logits = model(rows)
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), rows.tokens["labels"][:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if rank == 0:
                print(f"step {step}: loss {loss.item():.6f}", flush=True)
            if step % options.save_every == 0 or step == options.steps:
                save(step)
            if step == options.steps:
                return


def main(arguments: Sequence[str] | None = None) -> None:
    """Join the other processes, and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="for tokenizer and checkpoint; all ranks see it")
    parser.add_argument("--web", required=True, help="JSON lines")
    parser.add_argument("--code", required=True, help="Parquet files")
    parser.add_argument("--steps", type=int, default=1000, help="those of earlier runs included")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=1, help="rows of 2,048 tokens, of each rank")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo")
    try:
        train(options)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
