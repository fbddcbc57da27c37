"""A worker made of nothing but the schema: no optimd, no torch; grpcio, protobuf, and code generated from proto/.

    pip install grpcio-tools && mkdir generated
    python -m grpc_tools.protoc -I proto --python_out=generated --grpc_python_out=generated proto/optimd/v1/*.proto
    PYTHONPATH=generated python examples/plain_worker/worker.py --server 127.0.0.1:50551 --job plain

It fits a plane through points: a weight and a bias, by Adam on the server, one message after another, as
docs/protocol.md tells it. A worker in another language does the same with the code that its own protoc makes. Started
again, it goes on where the job stands.
"""

import argparse
import array
import queue
import random
import sys
import threading

import grpc

from optimd.v1 import job_pb2, param_group_pb2, reading_pb2, tensor_pb2, training_pb2
from optimd.v1.optimizer_service_pb2_grpc import OptimizerServiceStub

SHAPES = [[3], []]  # the weight of three inputs, and the bias
GRADIENT, PARAMETER = tensor_pb2.TENSOR_KIND_GRADIENT, tensor_pb2.TENSOR_KIND_PARAMETER


class Job:
    """One worker's stream to its job, and the job's parameters as this worker has them."""

    def __init__(self, stub, job, learning_rate):
        self.stub, self.job = stub, job
        self.identity = job_pb2.WorkerIdentity(worker_id="plain-0", rank=0, incarnation=random.getrandbits(63))
        self.parameters = [array.array("f", [0.0] * size(shape)) for shape in SHAPES]
        # gRPC sends what is put here, in order; None closes this side.
        self.outbox: queue.SimpleQueue[training_pb2.TrainRequest | None] = queue.SimpleQueue()
        self.answers = stub.Train(iter(self.outbox.get, None))
        self.open(learning_rate)
        self.stopped = threading.Event()
        threading.Thread(target=self.beat, daemon=True).start()

    def send(self, **fields):
        """One message, behind those that were sent before."""
        self.outbox.put(training_pb2.TrainRequest(**fields))

    def expect(self, *kinds):
        """The next answer, which has to be of one of these kinds."""
        answer = next(self.answers)
        kind = answer.WhichOneof("message")
        if kind not in kinds:
            raise RuntimeError(f"{kind} came where one of {kinds} was due: {answer}")
        return kind, answer

    def open(self, learning_rate):
        """Creates the job with this worker's values, or joins it and takes the job's."""
        policy = job_pb2.SyncAggregation(
            world_size=1, reduction=job_pb2.REDUCTION_MEAN, timeout_s=300, join_timeout_s=300
        )
        self.send(
            open=job_pb2.OpenJob(
                job=self.job,
                worker=self.identity,
                on_existing=job_pb2.ON_EXISTING_RESUME,
                aggregation=job_pb2.Aggregation(sync=policy),
                apply=job_pb2.APPLY_MODE_AUTO,
            )
        )
        adam = param_group_pb2.AdamOptions(
            lr=learning_rate, betas=param_group_pb2.Betas(beta1=0.9, beta2=0.999), eps=1e-8
        )
        self.send(
            layout=job_pb2.LayoutPage(
                groups=[param_group_pb2.ParamGroup(parameter_count=len(SHAPES), adam=adam)],
                parameters=[tensor_pb2.ParameterSpec(dtype=tensor_pb2.DTYPE_FLOAT32, shape=shape) for shape in SHAPES],
                last=True,
            )
        )
        _, answer = self.expect("layout_accepted")
        brings_values = answer.layout_accepted.send_values
        self.buckets = []
        last = False
        while not last:
            _, answer = self.expect("bucket_table")
            self.buckets += answer.bucket_table.buckets
            last = answer.bucket_table.last
        if brings_values:
            for bucket in self.buckets:
                self.send_bucket(bucket, PARAMETER, self.parameters)
        # A worker that joins a job that is there is told its layout and its values.
        kind = None
        while kind != "ready":
            kind, answer = self.expect("layout", "bucket", "ready")
            if kind == "bucket":
                self.take(answer)
        self.ready = answer.ready
        self.step, self.sequence = self.ready.job_step, self.ready.next_sequence

    def send_bucket(self, bucket, kind, tensors):
        """A bucket is some slices of parameters: their elements one after another, little-endian."""
        payload = b"".join(
            tensors[piece.parameter][piece.offset : piece.offset + piece.length].tobytes() for piece in bucket.slices
        )
        header = tensor_pb2.TensorBucket(bucket_id=bucket.bucket_id, kind=kind)
        self.send(bucket=header, payload=payload)

    def take(self, answer):
        """Writes a bucket of values that the server has sent into this worker's parameters."""
        received = array.array("f", answer.payload)
        bucket, present, start = self.buckets[answer.bucket.bucket_id], answer.bucket.present, 0
        for number, piece in enumerate(bucket.slices):
            # Bit i says whether slice i is there; no bits say that all are.
            if not present or present[number // 8] >> number % 8 & 1:
                self.parameters[piece.parameter][piece.offset : piece.offset + piece.length] = received[
                    start : start + piece.length
                ]
                start += piece.length

    def push(self, gradients):
        """One step: gradients there, one fused Adam update, parameters back. Gives the receipt."""
        self.send(
            step_begin=training_pb2.StepBegin(
                sequence=self.sequence,
                base_step=self.step,
                group_count=1,
                load_count=self.ready.load_count,
                layout_count=self.ready.layout_count,
            )
        )
        for bucket in self.buckets:
            self.send_bucket(bucket, GRADIENT, gradients)
        self.send(step_end=training_pb2.StepEnd(bucket_count=len(self.buckets)))
        kind = None
        while kind != "receipt":
            kind, answer = self.expect("bucket", "receipt", "refused")
            if kind == "refused":
                raise RuntimeError(answer.refused.message)
            if kind == "bucket":
                self.take(answer)
        self.sequence, self.step = answer.receipt.sequence + 1, answer.receipt.step
        return answer.receipt

    def beat(self):
        """Says that the worker is alive, also while it computes: else it is taken for dead when its lease ends."""
        request = reading_pb2.HeartbeatRequest(
            job=self.job, worker_id=self.identity.worker_id, incarnation=self.identity.incarnation
        )
        while not self.stopped.wait(self.ready.lease_s / 5):
            try:
                self.stub.Heartbeat(request, timeout=self.ready.lease_s)
            except grpc.RpcError as error:
                print(f"not heard: {error.details()}", file=sys.stderr)

    def leave(self):
        """In good order: nobody waits for this worker any more."""
        self.stopped.set()
        self.send(leave=training_pb2.Leave())
        self.outbox.put(None)
        for _ in self.answers:
            pass


def size(shape):
    count = 1
    for length in shape:
        count *= length
    return count


def loss_and_gradients(weight, bias, points):
    """Mean squared error, and its gradients by weight and bias."""
    loss, by_weight, by_bias = 0.0, [0.0] * len(weight), 0.0
    for inputs, target in points:
        error = sum(w * x for w, x in zip(weight, inputs, strict=True)) + bias[0] - target
        loss += error * error / len(points)
        by_bias += 2 * error / len(points)
        by_weight = [gradient + 2 * error * x / len(points) for gradient, x in zip(by_weight, inputs, strict=True)]
    return loss, [array.array("f", by_weight), array.array("f", [by_bias])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:50551")
    parser.add_argument("--job", default="plain")
    parser.add_argument("--steps", type=int, default=300, help="the job step to train to")
    args = parser.parse_args()
    dice = random.Random(0)  # noqa: S311  # points, no secrets
    inputs = [[dice.uniform(-1, 1) for _ in range(3)] for _ in range(64)]
    points = [(x, 2 * x[0] - x[1] + 0.5 * x[2] + 1) for x in inputs]
    with grpc.insecure_channel(args.server) as channel:
        job = Job(OptimizerServiceStub(channel), args.job, learning_rate=0.05)
        print(f"job {args.job} stands at step {job.step}")
        weight, bias = job.parameters  # written to in place
        loss, gradients = loss_and_gradients(weight, bias, points)
        while job.step < args.steps:
            job.push(gradients)
            loss, gradients = loss_and_gradients(weight, bias, points)
        job.leave()
    print(f"step {job.step}, loss {loss:.2e}: weight {[round(w, 3) for w in weight]}, bias {bias[0]:.3f}")


if __name__ == "__main__":
    main()
