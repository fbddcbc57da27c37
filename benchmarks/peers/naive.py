"""The parameter server that one writes first: a unary call, the whole model in one message, tensors as its fields."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import grpc
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from benchmarks import models
from benchmarks.peers.peer import ModelWorker, Setting
from benchmarks.venues import Transport

_METHOD: Final = "/benchmarks.Naive/Step"
# Without these a model does not fit into a message.
_OPTIONS: Final = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
_TIMEOUT_S: Final = 120.0


def _messages() -> Any:
    """The class of `message Tensors { repeated Tensor tensors = 1; }`.

    Where `message Tensor { repeated int64 shape = 1; bytes data = 2; }`.
    """
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="benchmarks/naive.proto", package="benchmarks", syntax="proto3")
    outer = file.message_type.add(name="Tensors")
    inner = outer.nested_type.add(name="Tensor")
    inner.field.add(name="shape", number=1, type=field.TYPE_INT64, label=field.LABEL_REPEATED)
    inner.field.add(name="data", number=2, type=field.TYPE_BYTES, label=field.LABEL_OPTIONAL)
    outer.field.add(
        name="tensors",
        number=1,
        type=field.TYPE_MESSAGE,
        label=field.LABEL_REPEATED,
        type_name=".benchmarks.Tensors.Tensor",
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("benchmarks.Tensors"))


_Tensors: Final = _messages()


@dataclass(frozen=True)
class Naive:
    """A `grpc.server` whose handlers wait for each other, and one fused Adam step for all of them."""

    listens: ClassVar[Transport] = "tcp"
    name: str = "naive unary protobuf server"
    bits: bool = True
    has_server: bool = True
    size: int | None = None

    def serve(self, setting: Setting, ready: Callable[[], None]) -> None:
        """Serves until the process is killed."""
        server = grpc.server(ThreadPoolExecutor(setting.workers), options=_OPTIONS)
        handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
            _Parameters(setting).step,
            request_deserializer=_Tensors.FromString,
            response_serializer=_Tensors.SerializeToString,
        )
        service, method = _METHOD[1:].split("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        server.add_insecure_port(setting.address)
        server.start()
        ready()
        server.wait_for_termination()

    def work(self, setting: Setting, rank: int) -> _NaiveWorker:
        """A worker."""
        return _NaiveWorker(setting, rank)


class _NaiveWorker(ModelWorker):
    def __init__(self, setting: Setting, rank: int) -> None:
        super().__init__(setting, rank)
        channel = grpc.insecure_channel(setting.address, options=_OPTIONS)
        self._call: grpc.UnaryUnaryMultiCallable[Any, Any] = channel.unary_unary(
            _METHOD, request_serializer=_Tensors.SerializeToString, response_deserializer=_Tensors.FromString
        )

    def exchange(self) -> None:
        answer = self._call(_encode(self.gradients()), timeout=_TIMEOUT_S, wait_for_ready=True)
        with torch.no_grad():
            torch._foreach_copy_([*self.parameters], _decode(answer))


class _Parameters:
    """What the server has."""

    def __init__(self, setting: Setting) -> None:
        self._parameters = list(models.build(setting.model).parameters())
        self._optimizer = torch.optim.Adam(self._parameters, fused=True)
        self._workers = setting.workers
        self._pushed: list[list[torch.Tensor]] = []  # guarded by the barrier: one handler clears it, the others wait
        self._answer: Any = None
        self._all_here = threading.Barrier(setting.workers, action=self._update, timeout=_TIMEOUT_S)

    def step(self, request: Any, _context: grpc.ServicerContext) -> Any:
        """Adds one worker's gradients, waits for the others', and gives the new parameters."""
        self._pushed.append(_decode(request))
        self._all_here.wait()
        return self._answer

    def _update(self) -> None:
        total, *others = self._pushed
        self._pushed = []
        for gradients in others:
            torch._foreach_add_(total, gradients)
        if self._workers > 1:
            torch._foreach_div_(total, self._workers)
        for parameter, gradient in zip(self._parameters, total, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self._answer = _encode(self._parameters)


def _encode(tensors: Sequence[torch.Tensor]) -> Any:
    message = _Tensors()
    for tensor in tensors:
        message.tensors.add(shape=tensor.shape, data=tensor.detach().numpy().tobytes())
    return message


def _decode(message: Any) -> list[torch.Tensor]:
    # bytearray: torch warns of memory that it must not write, and the sum is written into the first worker's.
    return [
        torch.frombuffer(bytearray(tensor.data), dtype=torch.float32).view(tuple(tensor.shape))
        for tensor in message.tensors
    ]
