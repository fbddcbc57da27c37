from optimd.v1 import job_pb2 as _job_pb2
from optimd.v1 import state_dict_pb2 as _state_dict_pb2
from optimd.v1 import tensor_pb2 as _tensor_pb2
from optimd.v1 import training_pb2 as _training_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ("shared_memory",)
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    shared_memory: _job_pb2.SharedMemory
    def __init__(self, shared_memory: _Optional[_Union[_job_pb2.SharedMemory, _Mapping]] = ...) -> None: ...

class GetCapabilitiesResponse(_message.Message):
    __slots__ = ("server_version", "torch_version", "device", "max_message_bytes", "max_bucket_bytes", "max_workers", "max_jobs", "max_job_bytes", "rules", "shares_memory", "not_shared_because")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BUCKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_WORKERS_FIELD_NUMBER: _ClassVar[int]
    MAX_JOBS_FIELD_NUMBER: _ClassVar[int]
    MAX_JOB_BYTES_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    SHARES_MEMORY_FIELD_NUMBER: _ClassVar[int]
    NOT_SHARED_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    torch_version: str
    device: str
    max_message_bytes: int
    max_bucket_bytes: int
    max_workers: int
    max_jobs: int
    max_job_bytes: int
    rules: _containers.RepeatedScalarFieldContainer[str]
    shares_memory: bool
    not_shared_because: str
    def __init__(self, server_version: _Optional[str] = ..., torch_version: _Optional[str] = ..., device: _Optional[str] = ..., max_message_bytes: _Optional[int] = ..., max_bucket_bytes: _Optional[int] = ..., max_workers: _Optional[int] = ..., max_jobs: _Optional[int] = ..., max_job_bytes: _Optional[int] = ..., rules: _Optional[_Iterable[str]] = ..., shares_memory: bool = ..., not_shared_because: _Optional[str] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("job", "worker_id", "incarnation")
    JOB_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    job: str
    worker_id: str
    incarnation: int
    def __init__(self, job: _Optional[str] = ..., worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("in_job",)
    IN_JOB_FIELD_NUMBER: _ClassVar[int]
    in_job: bool
    def __init__(self, in_job: bool = ...) -> None: ...

class ReadStateRequest(_message.Message):
    __slots__ = ("job", "parameters", "tensors", "description", "buffers")
    JOB_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_FIELD_NUMBER: _ClassVar[int]
    job: str
    parameters: _containers.RepeatedScalarFieldContainer[int]
    tensors: _containers.RepeatedScalarFieldContainer[_tensor_pb2.TensorKind]
    description: bool
    buffers: bool
    def __init__(self, job: _Optional[str] = ..., parameters: _Optional[_Iterable[int]] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorKind, str]]] = ..., description: bool = ..., buffers: bool = ...) -> None: ...

class JobDescription(_message.Message):
    __slots__ = ("step", "aggregation", "apply", "bucket_bytes", "max_grad_norm", "nonfinite")
    STEP_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    BUCKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_FIELD_NUMBER: _ClassVar[int]
    step: int
    aggregation: _job_pb2.Aggregation
    apply: _job_pb2.ApplyMode
    bucket_bytes: int
    max_grad_norm: float
    nonfinite: _job_pb2.NonFinite
    def __init__(self, step: _Optional[int] = ..., aggregation: _Optional[_Union[_job_pb2.Aggregation, _Mapping]] = ..., apply: _Optional[_Union[_job_pb2.ApplyMode, str]] = ..., bucket_bytes: _Optional[int] = ..., max_grad_norm: _Optional[float] = ..., nonfinite: _Optional[_Union[_job_pb2.NonFinite, str]] = ...) -> None: ...

class ReadStateResponse(_message.Message):
    __slots__ = ("state_dict", "bucket", "description", "layout", "bucket_table", "buffers", "buffer_chunk", "payload")
    STATE_DICT_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BUCKET_TABLE_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_FIELD_NUMBER: _ClassVar[int]
    BUFFER_CHUNK_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    state_dict: _state_dict_pb2.StateDictPage
    bucket: _tensor_pb2.TensorBucket
    description: JobDescription
    layout: _job_pb2.LayoutPage
    bucket_table: _tensor_pb2.BucketTablePage
    buffers: _training_pb2.BuffersPage
    buffer_chunk: _tensor_pb2.BufferChunk
    payload: bytes
    def __init__(self, state_dict: _Optional[_Union[_state_dict_pb2.StateDictPage, _Mapping]] = ..., bucket: _Optional[_Union[_tensor_pb2.TensorBucket, _Mapping]] = ..., description: _Optional[_Union[JobDescription, _Mapping]] = ..., layout: _Optional[_Union[_job_pb2.LayoutPage, _Mapping]] = ..., bucket_table: _Optional[_Union[_tensor_pb2.BucketTablePage, _Mapping]] = ..., buffers: _Optional[_Union[_training_pb2.BuffersPage, _Mapping]] = ..., buffer_chunk: _Optional[_Union[_tensor_pb2.BufferChunk, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class SnapshotResponse(_message.Message):
    __slots__ = ("step", "path", "nbytes")
    STEP_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    step: int
    path: str
    nbytes: int
    def __init__(self, step: _Optional[int] = ..., path: _Optional[str] = ..., nbytes: _Optional[int] = ...) -> None: ...

class WatchStepsRequest(_message.Message):
    __slots__ = ("job", "worker_id", "after_step")
    JOB_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_STEP_FIELD_NUMBER: _ClassVar[int]
    job: str
    worker_id: str
    after_step: int
    def __init__(self, job: _Optional[str] = ..., worker_id: _Optional[str] = ..., after_step: _Optional[int] = ...) -> None: ...

class WatchStepsResponse(_message.Message):
    __slots__ = ("receipt", "contributed")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTED_FIELD_NUMBER: _ClassVar[int]
    receipt: _training_pb2.StepReceipt
    contributed: bool
    def __init__(self, receipt: _Optional[_Union[_training_pb2.StepReceipt, _Mapping]] = ..., contributed: bool = ...) -> None: ...
