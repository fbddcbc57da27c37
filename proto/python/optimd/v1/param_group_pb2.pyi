from optimd.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Betas(_message.Message):
    __slots__ = ("beta1", "beta2")
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    beta1: float
    beta2: float
    def __init__(self, beta1: _Optional[float] = ..., beta2: _Optional[float] = ...) -> None: ...

class AdamOptions(_message.Message):
    __slots__ = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
    LR_FIELD_NUMBER: _ClassVar[int]
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    AMSGRAD_FIELD_NUMBER: _ClassVar[int]
    MAXIMIZE_FIELD_NUMBER: _ClassVar[int]
    FOREACH_FIELD_NUMBER: _ClassVar[int]
    CAPTURABLE_FIELD_NUMBER: _ClassVar[int]
    DIFFERENTIABLE_FIELD_NUMBER: _ClassVar[int]
    FUSED_FIELD_NUMBER: _ClassVar[int]
    DECOUPLED_WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    lr: float
    betas: Betas
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    foreach: bool
    capturable: bool
    differentiable: bool
    fused: bool
    decoupled_weight_decay: bool
    def __init__(self, lr: _Optional[float] = ..., betas: _Optional[_Union[Betas, _Mapping]] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ..., amsgrad: bool = ..., maximize: bool = ..., foreach: bool = ..., capturable: bool = ..., differentiable: bool = ..., fused: bool = ..., decoupled_weight_decay: bool = ...) -> None: ...

class ExtraList(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ExtraValue]
    def __init__(self, items: _Optional[_Iterable[_Union[ExtraValue, _Mapping]]] = ...) -> None: ...

class ExtraValue(_message.Message):
    __slots__ = ("bool_value", "int_value", "double_value", "string_value", "list_value")
    BOOL_VALUE_FIELD_NUMBER: _ClassVar[int]
    INT_VALUE_FIELD_NUMBER: _ClassVar[int]
    DOUBLE_VALUE_FIELD_NUMBER: _ClassVar[int]
    STRING_VALUE_FIELD_NUMBER: _ClassVar[int]
    LIST_VALUE_FIELD_NUMBER: _ClassVar[int]
    bool_value: bool
    int_value: int
    double_value: float
    string_value: str
    list_value: ExtraList
    def __init__(self, bool_value: bool = ..., int_value: _Optional[int] = ..., double_value: _Optional[float] = ..., string_value: _Optional[str] = ..., list_value: _Optional[_Union[ExtraList, _Mapping]] = ...) -> None: ...

class ParamGroup(_message.Message):
    __slots__ = ("index", "parameter_count", "adam", "extra", "tensors")
    class ExtraEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: ExtraValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[ExtraValue, _Mapping]] = ...) -> None: ...
    class TensorsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Dtype
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Dtype, str]] = ...) -> None: ...
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    ADAM_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    index: int
    parameter_count: int
    adam: AdamOptions
    extra: _containers.MessageMap[str, ExtraValue]
    tensors: _containers.ScalarMap[str, _tensor_pb2.Dtype]
    def __init__(self, index: _Optional[int] = ..., parameter_count: _Optional[int] = ..., adam: _Optional[_Union[AdamOptions, _Mapping]] = ..., extra: _Optional[_Mapping[str, ExtraValue]] = ..., tensors: _Optional[_Mapping[str, _tensor_pb2.Dtype]] = ...) -> None: ...

class ParamGroupsPage(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[ParamGroup]
    def __init__(self, groups: _Optional[_Iterable[_Union[ParamGroup, _Mapping]]] = ...) -> None: ...
