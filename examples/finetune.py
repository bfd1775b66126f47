"""Fine-tune a language model on questions and answers in packed rows; only the answers are learned.

    python examples/finetune.py 'chats/*.jsonl' --epochs 3

A line is `{"question": "...", "answer": "..."}`, and the bytes of the text are the tokens. A row has 256 tokens of
several documents, which do not see each other. The exit status is 1 unless each line was in a row in each epoch. Needs
`pip install 'aioloader[progress]'`. `pretrain.py` is for several sources and ranks.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from aioloader import Packed, Pipeline
from aioloader.sources import Lines

SEQ_LEN, END, WIDTH = 256, 256, 32


class TinyModel(nn.Module):
    """One layer of attention, in which a token sees those before it in its document."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(END + 1, WIDTH), nn.Embedding(SEQ_LEN, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, END + 1)

    def forward(self, rows: Packed) -> Tensor:
        """Logits [B, L, 257]."""
        x = self.tokens(rows.tokens["input_ids"]) + self.positions(rows.positions)
        seen = (rows.segments[:, :, None] == rows.segments[:, None, :]).tril()
        q, k, v = self.qkv(x).chunk(3, -1)
        logits: Tensor = self.out(x + scaled_dot_product_attention(q, k, v, attn_mask=seen))
        return logits


def encode(line: dict[str, str]) -> dict[str, Tensor]:
    """Tokens, and the token after each; -100 where it is the question's, which nothing has to predict."""
    question, answer = line["question"].encode(), line["answer"].encode()
    ids = torch.tensor([*question, *answer, END])
    labels = ids[1:].clone()
    labels[: len(question) - 1] = -100
    return {"input_ids": ids[:-1], "labels": labels}


def train(paths: str, epochs: int) -> bool:
    """Train; returns whether each line was in a row in each epoch."""
    lines: Pipeline[dict[str, str]] = Pipeline(Lines(paths, decode="json", shuffle=True, seed=0))
    count = sum(1 for _ in lines)
    loader = lines.shuffle(1000, seed=0).map(encode).pack(SEQ_LEN).batch(8)
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    whole = True
    for epoch in range(epochs):
        seen, places = set[str](), 0
        for rows in loader.progress(f"epoch {epoch}"):
            loss = cross_entropy(model(rows).flatten(0, 1), rows.tokens["labels"].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.update(key for keys in rows.keys for key in keys)
            places += rows.segments.numel()
        print(f"epoch {epoch}: loss {loss.item():.6f}, {len(seen)} documents in {places // SEQ_LEN} rows")
        whole = whole and len(seen) == count
    return whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", help="a file, a folder or a glob")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    raise SystemExit(0 if train(options.paths, options.epochs) else 1)
