from optimd.v1 import param_group_pb2 as _param_group_pb2
from optimd.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ParameterState(_message.Message):
    __slots__ = ("parameter", "step", "tensors")
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    parameter: int
    step: float
    tensors: _containers.RepeatedScalarFieldContainer[_tensor_pb2.TensorKind]
    def __init__(self, parameter: _Optional[int] = ..., step: _Optional[float] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorKind, str]]] = ...) -> None: ...

class StateDictPage(_message.Message):
    __slots__ = ("param_groups", "state", "last")
    PARAM_GROUPS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    param_groups: _containers.RepeatedCompositeFieldContainer[_param_group_pb2.ParamGroup]
    state: _containers.RepeatedCompositeFieldContainer[ParameterState]
    last: bool
    def __init__(self, param_groups: _Optional[_Iterable[_Union[_param_group_pb2.ParamGroup, _Mapping]]] = ..., state: _Optional[_Iterable[_Union[ParameterState, _Mapping]]] = ..., last: bool = ...) -> None: ...

class PushedEntry(_message.Message):
    __slots__ = ("parameter", "has_value", "state", "received_as")
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    HAS_VALUE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_AS_FIELD_NUMBER: _ClassVar[int]
    parameter: int
    has_value: bool
    state: ParameterState
    received_as: _tensor_pb2.PayloadEncoding
    def __init__(self, parameter: _Optional[int] = ..., has_value: bool = ..., state: _Optional[_Union[ParameterState, _Mapping]] = ..., received_as: _Optional[_Union[_tensor_pb2.PayloadEncoding, str]] = ...) -> None: ...

class PushedPage(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[PushedEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[PushedEntry, _Mapping]]] = ...) -> None: ...
