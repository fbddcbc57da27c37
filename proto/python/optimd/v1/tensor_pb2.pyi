from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FLOAT64: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]
    DTYPE_COMPLEX64: _ClassVar[Dtype]
    DTYPE_COMPLEX128: _ClassVar[Dtype]
    DTYPE_INT64: _ClassVar[Dtype]
    DTYPE_INT32: _ClassVar[Dtype]
    DTYPE_INT16: _ClassVar[Dtype]
    DTYPE_INT8: _ClassVar[Dtype]
    DTYPE_UINT8: _ClassVar[Dtype]
    DTYPE_BOOL: _ClassVar[Dtype]

class TensorKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TENSOR_KIND_UNSPECIFIED: _ClassVar[TensorKind]
    TENSOR_KIND_PARAMETER: _ClassVar[TensorKind]
    TENSOR_KIND_GRADIENT: _ClassVar[TensorKind]
    TENSOR_KIND_EXP_AVG: _ClassVar[TensorKind]
    TENSOR_KIND_EXP_AVG_SQ: _ClassVar[TensorKind]
    TENSOR_KIND_MAX_EXP_AVG_SQ: _ClassVar[TensorKind]

class PayloadEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PAYLOAD_ENCODING_UNSPECIFIED: _ClassVar[PayloadEncoding]
    PAYLOAD_ENCODING_BFLOAT16: _ClassVar[PayloadEncoding]
    PAYLOAD_ENCODING_FLOAT16: _ClassVar[PayloadEncoding]
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT64: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_BFLOAT16: Dtype
DTYPE_FLOAT16: Dtype
DTYPE_COMPLEX64: Dtype
DTYPE_COMPLEX128: Dtype
DTYPE_INT64: Dtype
DTYPE_INT32: Dtype
DTYPE_INT16: Dtype
DTYPE_INT8: Dtype
DTYPE_UINT8: Dtype
DTYPE_BOOL: Dtype
TENSOR_KIND_UNSPECIFIED: TensorKind
TENSOR_KIND_PARAMETER: TensorKind
TENSOR_KIND_GRADIENT: TensorKind
TENSOR_KIND_EXP_AVG: TensorKind
TENSOR_KIND_EXP_AVG_SQ: TensorKind
TENSOR_KIND_MAX_EXP_AVG_SQ: TensorKind
PAYLOAD_ENCODING_UNSPECIFIED: PayloadEncoding
PAYLOAD_ENCODING_BFLOAT16: PayloadEncoding
PAYLOAD_ENCODING_FLOAT16: PayloadEncoding

class ParameterSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape", "memory_order", "master_dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_ORDER_FIELD_NUMBER: _ClassVar[int]
    MASTER_DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: Dtype
    shape: _containers.RepeatedScalarFieldContainer[int]
    memory_order: _containers.RepeatedScalarFieldContainer[int]
    master_dtype: Dtype
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., shape: _Optional[_Iterable[int]] = ..., memory_order: _Optional[_Iterable[int]] = ..., master_dtype: _Optional[_Union[Dtype, str]] = ...) -> None: ...

class BucketSlice(_message.Message):
    __slots__ = ("parameter", "offset", "length")
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    parameter: int
    offset: int
    length: int
    def __init__(self, parameter: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class BucketSpec(_message.Message):
    __slots__ = ("bucket_id", "group", "dtype", "slices", "master_dtype")
    BUCKET_ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    MASTER_DTYPE_FIELD_NUMBER: _ClassVar[int]
    bucket_id: int
    group: int
    dtype: Dtype
    slices: _containers.RepeatedCompositeFieldContainer[BucketSlice]
    master_dtype: Dtype
    def __init__(self, bucket_id: _Optional[int] = ..., group: _Optional[int] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., slices: _Optional[_Iterable[_Union[BucketSlice, _Mapping]]] = ..., master_dtype: _Optional[_Union[Dtype, str]] = ...) -> None: ...

class BucketTablePage(_message.Message):
    __slots__ = ("buckets", "last")
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    buckets: _containers.RepeatedCompositeFieldContainer[BucketSpec]
    last: bool
    def __init__(self, buckets: _Optional[_Iterable[_Union[BucketSpec, _Mapping]]] = ..., last: bool = ...) -> None: ...

class TensorBucket(_message.Message):
    __slots__ = ("bucket_id", "kind", "present", "encoding", "placement", "in_place")
    BUCKET_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    IN_PLACE_FIELD_NUMBER: _ClassVar[int]
    bucket_id: int
    kind: TensorKind
    present: bytes
    encoding: PayloadEncoding
    placement: Placement
    in_place: bool
    def __init__(self, bucket_id: _Optional[int] = ..., kind: _Optional[_Union[TensorKind, str]] = ..., present: _Optional[bytes] = ..., encoding: _Optional[_Union[PayloadEncoding, str]] = ..., placement: _Optional[_Union[Placement, _Mapping]] = ..., in_place: bool = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("position", "nbytes")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    position: int
    nbytes: int
    def __init__(self, position: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class BufferSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: Dtype
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class BufferChunk(_message.Message):
    __slots__ = ("offset",)
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    def __init__(self, offset: _Optional[int] = ...) -> None: ...
