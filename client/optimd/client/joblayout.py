"""The job's parameters and bucket table, as a worker has been told them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from optimd.v1 import tensor_pb2
from optimd.wire.layout import Bucket, Parameter, decode_bucket


@dataclass(slots=True)
class JobLayout:
    """Parameters and buckets, by index and id."""

    parameters: list[Parameter] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)

    def grow(
        self, parameters: Sequence[Parameter], table: Sequence[tensor_pb2.BucketSpec], *, count: int
    ) -> list[Bucket]:
        """Adds parameters and the buckets that they were cut into.

        Raises:
            ValueError: the table does not cover the new parameters, each in order and once. Following it would write
                past a tensor.
        """
        buckets = [decode_bucket(spec) for spec in table]
        first = len(self.buckets)
        if [bucket.bucket_id for bucket in buckets] != list(range(first, first + count)):
            raise ValueError("its ids do not go on from the last table's")
        start = len(self.parameters)
        ends = [0] * len(parameters)
        for bucket in buckets:
            for piece in bucket.slices:
                place = piece.parameter - start
                if not 0 <= place < len(parameters) or piece.offset != ends[place]:
                    raise ValueError(f"bucket {bucket.bucket_id} does not fit the parameters")
                if (parameters[place].dtype, parameters[place].master_dtype) != (bucket.dtype, bucket.master_dtype):
                    raise ValueError(f"bucket {bucket.bucket_id} has another dtype than its parameters")
                ends[place] = piece.end
        if ends != [parameter.numel for parameter in parameters]:
            raise ValueError("it does not cover the parameters")
        self.parameters += parameters
        self.buckets += buckets
        return buckets

    def bucket(self, bucket_id: int) -> Bucket:
        """The bucket of that id.

        Raises:
            ValueError: there is none.
        """
        if bucket_id >= len(self.buckets):
            raise ValueError(f"there is no bucket {bucket_id}")
        return self.buckets[bucket_id]
