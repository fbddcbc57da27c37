"""One worker as a program: trains a model for some steps and prints its peak memory as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks import models
from benchmarks.processes import peak_bytes, reset_peak
from optimd.client import Adam, ProxyOptions


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__)
    parser.add_argument("--model", required=True, choices=models.NAMES)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--server", help="where the server listens; without it, torch's own Adam steps here")
    parser.add_argument("--transport", choices=("auto", "grpc", "shm"), default="auto")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    model = models.build(parsed.model)
    reset_peak("self")
    with _optimizer(model, parsed) as optimizer:
        for step in range(parsed.steps):
            optimizer.zero_grad(set_to_none=True)
            models.compute_gradients(model, step, (parsed.rank,))
            optimizer.step()
        print(json.dumps({"peak_bytes": peak_bytes("self"), "parameters": models.parameter_count(model)}))


@contextmanager
def _optimizer(model: models.Model, parsed: argparse.Namespace) -> Iterator[torch.optim.Adam]:
    if parsed.server is None:
        yield torch.optim.Adam(model.parameters(), fused=True)
        return
    options = ProxyOptions(
        rank=parsed.rank,
        world_size=parsed.world_size,
        worker_id=f"worker-{parsed.rank}",
        transport=parsed.transport,
    )
    with Adam(model.parameters(), server=parsed.server, job="benchmark", options=options) as remote:
        yield remote


if __name__ == "__main__":
    main()
