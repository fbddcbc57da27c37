"""Trains a small transformer to write Python's manual, letter by letter, with an optimizer that lives on a server.

    python examples/train_chars.py                                   # starts a server of its own
    python examples/train_chars.py --server gpu-host:50551           # uses that one
    python examples/train_chars.py --server gpu-host:50551 --wire-dtype bfloat16       # half the bytes on the line
    torchrun --nproc-per-node 2 examples/train_chars.py              # two workers: each step is their mean

The text is that of pydoc's help topics, which Python brings along. Restarted with the same --job against a server that
still holds it, the script goes on where the job stands.
"""

import argparse
import os
from pydoc_data import topics

import torch
from torch import nn

from optimd.client import AdamW, ProxyOptions

CONTEXT, BATCH, WIDTH, LAYERS = 64, 16, 64, 2
HELD_OUT = 20_000  # characters at the end of the text

WIRE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def load_text():
    """What is trained on and what is held out, as numbers of characters; and the characters."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    characters = sorted(set(text))
    numbers = {character: number for number, character in enumerate(characters)}
    data = torch.tensor([numbers[character] for character in text])
    return data[:-HELD_OUT], data[-HELD_OUT:], characters


class Writer(nn.Module):
    """Tells from up to `CONTEXT` characters which one is likely to follow, for each of their beginnings."""

    def __init__(self, characters):
        super().__init__()
        self.character = nn.Embedding(characters, WIDTH)
        self.place = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.next = nn.Linear(WIDTH, characters)

    def forward(self, x):
        """From numbers of characters, (rows, length), to logits, (rows, length, characters)."""
        length = x.shape[1]
        hidden = self.character(x) + self.place.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.next(self.layers(hidden, mask=mask, is_causal=True))


def batch_of(data, number):
    """The same for the same number."""
    generator = torch.Generator().manual_seed(number)
    starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,), generator=generator)
    runs = torch.stack([data[start : start + CONTEXT + 1] for start in starts])
    return runs[:, :-1], runs[:, 1:]


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def write(model, characters, length):
    written = torch.zeros(1, 1, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for _ in range(length):
        likely = model(written[:, -CONTEXT:])[0, -1].softmax(0)
        written = torch.cat([written, torch.multinomial(likely, 1, generator=generator)[None]], 1)
    return "".join(characters[number] for number in written[0, 1:].tolist())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="host:port or unix:///path (default: start one)")
    parser.add_argument("--job", help="the name of the training job, to be found again")
    parser.add_argument(
        "--wire-dtype", choices=WIRE_DTYPES, help="what gradients and weights are rounded to on the line"
    )
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()

    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    data, held_out, characters = load_text()
    torch.manual_seed(0)
    model = Writer(len(characters))
    options = ProxyOptions(wire_dtype=WIRE_DTYPES.get(args.wire_dtype))
    with AdamW(model.parameters(), lr=3e-3, server=args.server, job=args.job, options=options) as optimizer:
        while optimizer.job_step < args.steps:
            x, y = batch_of(data, optimizer.job_step * world_size + rank)
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            optimizer.step()
            if rank == 0 and optimizer.job_step % 50 == 0:
                print(f"step {optimizer.job_step:4d}  loss {loss.item():.4f}", flush=True)
        # The weights with all of their digits, whatever the line has rounded.
        optimizer.pull_parameters()

    if rank == 0:
        model.eval()
        print(write(model, characters, 200))
        with torch.no_grad():
            losses = [loss_of(model, *batch_of(held_out, number)).item() for number in range(20)]
        print(f"held-out loss {sum(losses) / len(losses):.4f}")


if __name__ == "__main__":
    main()
