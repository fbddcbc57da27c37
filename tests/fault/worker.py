"""A training worker as a process of its own: it writes down what it pushes and what became of it, before and after.

    python tests/fault/worker.py --server ADDRESS --job NAME --folder FOLDER --rank R --world-size W --steps N [...]

The loss of a step is a function of worker and sequence number alone, so that a process that is started again computes
the same gradients. What it pushes is in `FOLDER/push-<rank>-<sequence>.pt`, written before the push; receipts are lines
on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimd.client import Adam, ProxyOptions, Sync, statetransfer
from optimd.wire import bundles

ELEMENTS = 2000
BUCKET_BYTES = 1024


def gradient(rank: int, number: int) -> torch.Tensor:
    return torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(10_000 * (rank + 1) + number))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", default="elastic")
    parser.add_argument("--steps", type=int, required=True, help="the job step to stop at")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--on-loss", default="shrink")
    parser.add_argument("--stall-at", type=int, default=-1, help="the job step in whose push to stop, for the test")
    parser.add_argument("--pause-s", type=float, default=0.0, help="how long each step computes")
    parser.add_argument("--wait", action="store_true", help="open the job when a line comes on stdin")
    args = parser.parse_args()

    world_size: Any = args.world_size if args.world_size == "elastic" else int(args.world_size)
    stalls = [False]
    original = statetransfer.bucket_message
    sent: list[int] = []

    def stalling(kind: str, bucket: object, *rest: object) -> bytes:
        if kind == "gradient" and stalls[0]:
            if len(sent) == 3:
                print(json.dumps({"stalled": True}), flush=True)
                sys.stdin.readline()
            sent.append(1)
        return original(kind, bucket, *rest)

    statetransfer.bucket_message = stalling  # type: ignore[assignment]
    # So that each bucket that is out has been sent.
    bundles.BUNDLE_BYTES = 0  # type: ignore[misc]  # for the test
    aggregation = Sync(world_size=world_size, deterministic=args.deterministic, on_loss=args.on_loss)
    options = ProxyOptions(
        rank=args.rank, worker_id=f"worker-{args.rank}", aggregation=aggregation, bucket_bytes=BUCKET_BYTES
    )
    p = nn.Parameter(torch.zeros(ELEMENTS))
    if args.wait:
        print(json.dumps({"waits": True}), flush=True)
        sys.stdin.readline()
    with Adam([p], lr=0.05, server=args.server, job=args.job, options=options) as optimizer:
        print(json.dumps({"opened": optimizer.job_step, "next_sequence": optimizer.next_sequence}), flush=True)
        while optimizer.job_step < args.steps:
            time.sleep(args.pause_s)
            p.grad = gradient(args.rank, optimizer.next_sequence)
            torch.save(p.grad, args.folder / f"push-{args.rank}-{optimizer.next_sequence}.pt")
            stalls[0] = optimizer.job_step == args.stall_at
            optimizer.step()
            print(json.dumps(asdict(optimizer.last_receipt)), flush=True)
        optimizer.pull_parameters()
        torch.save(p.detach(), args.folder / f"final-{args.rank}.pt")


if __name__ == "__main__":
    main()
