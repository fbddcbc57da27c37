"""Trains a small convolutional net on handwritten digits with an optimizer that lives on a server.

    python examples/train_digits.py                                  # starts a server of its own
    python examples/train_digits.py --server gpu-host:50551          # uses that one
    torchrun --nproc-per-node 2 examples/train_digits.py             # two workers: each step is their mean
    torchrun --nproc-per-node 3 examples/train_digits.py --mode async      # nobody waits for anybody
    torchrun --nproc-per-node 3 examples/train_digits.py --mode bounded    # at most two steps ahead of the slowest
    python examples/train_digits.py --server gpu-host:50551 --wire-dtype bfloat16      # half the bytes on the line

Needs scikit-learn for its bundled data set. Restarted with the same --job against a server that still holds it, the
script goes on where the job stands; so does a worker that torchrun starts again (--max-restarts).
"""

import argparse
import math
import os

import torch
from sklearn.datasets import load_digits
from torch import nn

from optimd.client import Adam, Async, ProxyOptions, Sync

BATCH = 64  # images a step: shared by the workers of a synchronous one, an asynchronous one is a single worker's

WIRE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

MODES: dict[str, Sync | Async] = {"sync": Sync(), "async": Async(), "bounded": Async(max_staleness=2)}


def load_data():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:359], order[359:]
    return images[train], labels[train], images[test], labels[test]


def build_model():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="host:port or unix:///path (default: start one)")
    parser.add_argument("--job", help="the name of the training job, to be found again")
    parser.add_argument("--mode", choices=MODES, default="sync", help="how the workers' steps are put together")
    parser.add_argument(
        "--wire-dtype", choices=WIRE_DTYPES, help="what gradients and weights are rounded to on the line"
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--save", metavar="PATH", help="where to save the trained weights")
    args = parser.parse_args()

    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    x_train, y_train, x_test, y_test = load_data()
    batches = len(y_train) // BATCH
    total = args.epochs * batches

    torch.manual_seed(0)
    model = build_model()
    options = ProxyOptions(aggregation=MODES[args.mode], wire_dtype=WIRE_DTYPES.get(args.wire_dtype))
    with Adam(model.parameters(), lr=3e-3, server=args.server, job=args.job, options=options) as optimizer:
        # By the job's clock: a worker that joins or comes back later takes the schedule up where the others are.
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda _: (1 + math.cos(math.pi * min(1, optimizer.job_step / total))) / 2
        )
        told = optimizer.job_step // batches
        while optimizer.job_step < total:
            if args.mode == "sync":
                # Everybody is at the same step: each takes its part of the step's batch.
                number, part = optimizer.job_step, slice(rank, None, world_size)
            else:
                # Everybody is at a step of its own, and takes batches of its own.
                number, part = optimizer.next_sequence * world_size + rank, slice(None)
            epoch, batch = divmod(number, batches)
            order = torch.randperm(len(y_train), generator=torch.Generator().manual_seed(epoch))
            mine = order[batch * BATCH : (batch + 1) * BATCH][part]

            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x_train[mine]), y_train[mine])
            loss.backward()
            optimizer.step()
            scheduler.step()

            if rank == 0 and optimizer.job_step // batches > told:
                told = optimizer.job_step // batches
                print(f"step {optimizer.job_step:4d}  loss {loss.item():.4f}", flush=True)
        optimizer.pull_parameters()

    if rank == 0:
        with torch.no_grad():
            accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
        print(f"test accuracy {accuracy:.2%}")
        if args.save:
            torch.save(model.state_dict(), args.save)


if __name__ == "__main__":
    main()
