"""What travels narrowed between this worker and its server, and what this worker has that came so."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from optimd.client.exceptions import UnsupportedError
from optimd.client.joblayout import JobLayout
from optimd.client.parameters import FlatWriter
from optimd.v1 import job_pb2
from optimd.wire.encodings import EXACT, Encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class WireEncodings:
    """What gradients and parameters are encoded in, in the course of steps, where they are of a dtype that it takes."""

    gradients: Encoding = EXACT
    parameters: Encoding = EXACT

    def check(self, accepted: job_pb2.LayoutAccepted, address: str) -> None:
        """The server at `address` has answered what it makes of them.

        Raises:
            UnsupportedError: it does not know them.
        """
        for what, asked, answered in (
            ("gradients", self.gradients, accepted.gradients),
            ("parameters", self.parameters, accepted.parameters),
        ):
            if answered != asked.number:
                raise UnsupportedError(
                    f"the server at {address} does not know {what} in {asked.name}: it is older than this worker's "
                    "optimd. Bring it up to date, or leave wire_dtype of ProxyOptions at None"
                )


class NarrowedValues:
    """Knows which of this worker's parameters have values that came narrowed. Not thread-safe.

    What the server has of them has more bits. A worker that comes back to its job is given all of them, and would go on
    from other parameters than if its line had held: it rounds them as the steps that it missed would have.

    Args:
        encoding: What parameters come in, in the course of steps.
    """

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self.indices: set[int] = set()
        """The parameters, by index, of which some or all came narrowed."""

    def came_whole(self, indices: Collection[int] = ()) -> None:
        """All of these parameters has come as it is on the server; without any, of all that there are."""
        if indices:
            self.indices.difference_update(indices)
        else:
            self.indices.clear()

    def round(self, indices: Collection[int], tensors: Sequence[torch.Tensor], layout: JobLayout) -> None:
        """Has parameters the values that they would have if what they have had come in the course of a step.

        Args:
            indices: Which.
            tensors: The worker's parameters.
            layout: What it knows of the job.
        """
        writer = FlatWriter(tensors, layout.parameters, narrowed=self.indices)
        for bucket in layout.buckets:
            encoding = self.encoding.of(bucket.dtype)
            if not encoding.is_exact:
                writer.round(bucket, [piece.parameter in indices for piece in bucket.slices], encoding)
        writer.flush()
