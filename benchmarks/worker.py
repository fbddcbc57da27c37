"""One worker as a program: trains a model for some steps and prints what it took as JSON."""

from __future__ import annotations

import argparse
import json

import torch

from benchmarks import models
from benchmarks.memory import peak_bytes, reset_peak
from optimd.client import Adam, ProxyOptions


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__)
    parser.add_argument("--server", required=True, help="where the server listens")
    parser.add_argument("--model", required=True, choices=models.NAMES)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    model = models.build(parsed.model)
    reset_peak("self")
    options = ProxyOptions(rank=parsed.rank, world_size=parsed.world_size, worker_id=f"worker-{parsed.rank}")
    with Adam(model.parameters(), server=parsed.server, job="benchmark", options=options) as optimizer:
        for step in range(parsed.steps):
            optimizer.zero_grad(set_to_none=True)
            model.loss(step).backward()
            optimizer.step()
        print(json.dumps({"peak_bytes": peak_bytes("self"), "parameters": models.parameter_count(model)}))


if __name__ == "__main__":
    main()
