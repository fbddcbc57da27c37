from optimd.v1 import param_group_pb2 as _param_group_pb2
from optimd.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OnExisting(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_EXISTING_UNSPECIFIED: _ClassVar[OnExisting]
    ON_EXISTING_RESUME: _ClassVar[OnExisting]
    ON_EXISTING_FAIL: _ClassVar[OnExisting]
    ON_EXISTING_REPLACE: _ClassVar[OnExisting]

class ApplyMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    APPLY_MODE_UNSPECIFIED: _ClassVar[ApplyMode]
    APPLY_MODE_AUTO: _ClassVar[ApplyMode]
    APPLY_MODE_STREAMING: _ClassVar[ApplyMode]
    APPLY_MODE_ATOMIC: _ClassVar[ApplyMode]

class Reduction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REDUCTION_UNSPECIFIED: _ClassVar[Reduction]
    REDUCTION_MEAN: _ClassVar[Reduction]
    REDUCTION_SUM: _ClassVar[Reduction]

class OnLoss(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_LOSS_UNSPECIFIED: _ClassVar[OnLoss]
    ON_LOSS_SHRINK: _ClassVar[OnLoss]
    ON_LOSS_WAIT: _ClassVar[OnLoss]

class NonFinite(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NON_FINITE_UNSPECIFIED: _ClassVar[NonFinite]
    NON_FINITE_ALLOW: _ClassVar[NonFinite]
    NON_FINITE_SKIP: _ClassVar[NonFinite]
    NON_FINITE_ERROR: _ClassVar[NonFinite]
ON_EXISTING_UNSPECIFIED: OnExisting
ON_EXISTING_RESUME: OnExisting
ON_EXISTING_FAIL: OnExisting
ON_EXISTING_REPLACE: OnExisting
APPLY_MODE_UNSPECIFIED: ApplyMode
APPLY_MODE_AUTO: ApplyMode
APPLY_MODE_STREAMING: ApplyMode
APPLY_MODE_ATOMIC: ApplyMode
REDUCTION_UNSPECIFIED: Reduction
REDUCTION_MEAN: Reduction
REDUCTION_SUM: Reduction
ON_LOSS_UNSPECIFIED: OnLoss
ON_LOSS_SHRINK: OnLoss
ON_LOSS_WAIT: OnLoss
NON_FINITE_UNSPECIFIED: NonFinite
NON_FINITE_ALLOW: NonFinite
NON_FINITE_SKIP: NonFinite
NON_FINITE_ERROR: NonFinite

class WorkerIdentity(_message.Message):
    __slots__ = ("worker_id", "rank", "incarnation")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    rank: int
    incarnation: int
    def __init__(self, worker_id: _Optional[str] = ..., rank: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class SyncAggregation(_message.Message):
    __slots__ = ("world_size", "reduction", "timeout_s", "join_timeout_s", "backup_workers", "deterministic", "on_loss")
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    JOIN_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    BACKUP_WORKERS_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    ON_LOSS_FIELD_NUMBER: _ClassVar[int]
    world_size: int
    reduction: Reduction
    timeout_s: float
    join_timeout_s: float
    backup_workers: int
    deterministic: bool
    on_loss: OnLoss
    def __init__(self, world_size: _Optional[int] = ..., reduction: _Optional[_Union[Reduction, str]] = ..., timeout_s: _Optional[float] = ..., join_timeout_s: _Optional[float] = ..., backup_workers: _Optional[int] = ..., deterministic: bool = ..., on_loss: _Optional[_Union[OnLoss, str]] = ...) -> None: ...

class AsyncAggregation(_message.Message):
    __slots__ = ("max_staleness", "timeout_s", "join_timeout_s")
    MAX_STALENESS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    JOIN_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    max_staleness: int
    timeout_s: float
    join_timeout_s: float
    def __init__(self, max_staleness: _Optional[int] = ..., timeout_s: _Optional[float] = ..., join_timeout_s: _Optional[float] = ...) -> None: ...

class Aggregation(_message.Message):
    __slots__ = ("sync", "asynchronous")
    SYNC_FIELD_NUMBER: _ClassVar[int]
    ASYNCHRONOUS_FIELD_NUMBER: _ClassVar[int]
    sync: SyncAggregation
    asynchronous: AsyncAggregation
    def __init__(self, sync: _Optional[_Union[SyncAggregation, _Mapping]] = ..., asynchronous: _Optional[_Union[AsyncAggregation, _Mapping]] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("name", "token", "up_bytes", "down_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    UP_BYTES_FIELD_NUMBER: _ClassVar[int]
    DOWN_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    token: bytes
    up_bytes: int
    down_bytes: int
    def __init__(self, name: _Optional[str] = ..., token: _Optional[bytes] = ..., up_bytes: _Optional[int] = ..., down_bytes: _Optional[int] = ...) -> None: ...

class OpenJob(_message.Message):
    __slots__ = ("job", "worker", "on_existing", "aggregation", "apply", "bucket_bytes", "private", "client_version", "max_grad_norm", "nonfinite", "returns_at_step", "returns_with_sequence", "follows_rewind", "gradients", "parameters", "takes_bundles", "shared_memory")
    JOB_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ON_EXISTING_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    BUCKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_FIELD_NUMBER: _ClassVar[int]
    RETURNS_AT_STEP_FIELD_NUMBER: _ClassVar[int]
    RETURNS_WITH_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    FOLLOWS_REWIND_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TAKES_BUNDLES_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    job: str
    worker: WorkerIdentity
    on_existing: OnExisting
    aggregation: Aggregation
    apply: ApplyMode
    bucket_bytes: int
    private: bool
    client_version: str
    max_grad_norm: float
    nonfinite: NonFinite
    returns_at_step: int
    returns_with_sequence: int
    follows_rewind: bool
    gradients: _tensor_pb2.PayloadEncoding
    parameters: _tensor_pb2.PayloadEncoding
    takes_bundles: bool
    shared_memory: SharedMemory
    def __init__(self, job: _Optional[str] = ..., worker: _Optional[_Union[WorkerIdentity, _Mapping]] = ..., on_existing: _Optional[_Union[OnExisting, str]] = ..., aggregation: _Optional[_Union[Aggregation, _Mapping]] = ..., apply: _Optional[_Union[ApplyMode, str]] = ..., bucket_bytes: _Optional[int] = ..., private: bool = ..., client_version: _Optional[str] = ..., max_grad_norm: _Optional[float] = ..., nonfinite: _Optional[_Union[NonFinite, str]] = ..., returns_at_step: _Optional[int] = ..., returns_with_sequence: _Optional[int] = ..., follows_rewind: bool = ..., gradients: _Optional[_Union[_tensor_pb2.PayloadEncoding, str]] = ..., parameters: _Optional[_Union[_tensor_pb2.PayloadEncoding, str]] = ..., takes_bundles: bool = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ...) -> None: ...

class CarriedState(_message.Message):
    __slots__ = ("parameter", "carried_from")
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    CARRIED_FROM_FIELD_NUMBER: _ClassVar[int]
    parameter: int
    carried_from: int
    def __init__(self, parameter: _Optional[int] = ..., carried_from: _Optional[int] = ...) -> None: ...

class LayoutPage(_message.Message):
    __slots__ = ("groups", "parameters", "last", "carried")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    CARRIED_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[_param_group_pb2.ParamGroup]
    parameters: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.ParameterSpec]
    last: bool
    carried: _containers.RepeatedCompositeFieldContainer[CarriedState]
    def __init__(self, groups: _Optional[_Iterable[_Union[_param_group_pb2.ParamGroup, _Mapping]]] = ..., parameters: _Optional[_Iterable[_Union[_tensor_pb2.ParameterSpec, _Mapping]]] = ..., last: bool = ..., carried: _Optional[_Iterable[_Union[CarriedState, _Mapping]]] = ...) -> None: ...

class LayoutAccepted(_message.Message):
    __slots__ = ("send_values", "resumed", "bucket_bytes", "bucket_count", "apply", "current", "gradients", "parameters", "takes_bundles", "shared_memory", "values", "takes_ahead")
    SEND_VALUES_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    BUCKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUCKET_COUNT_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TAKES_BUNDLES_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    TAKES_AHEAD_FIELD_NUMBER: _ClassVar[int]
    send_values: bool
    resumed: bool
    bucket_bytes: int
    bucket_count: int
    apply: ApplyMode
    current: bool
    gradients: _tensor_pb2.PayloadEncoding
    parameters: _tensor_pb2.PayloadEncoding
    takes_bundles: bool
    shared_memory: bool
    values: _containers.RepeatedCompositeFieldContainer[SharedValues]
    takes_ahead: bool
    def __init__(self, send_values: bool = ..., resumed: bool = ..., bucket_bytes: _Optional[int] = ..., bucket_count: _Optional[int] = ..., apply: _Optional[_Union[ApplyMode, str]] = ..., current: bool = ..., gradients: _Optional[_Union[_tensor_pb2.PayloadEncoding, str]] = ..., parameters: _Optional[_Union[_tensor_pb2.PayloadEncoding, str]] = ..., takes_bundles: bool = ..., shared_memory: bool = ..., values: _Optional[_Iterable[_Union[SharedValues, _Mapping]]] = ..., takes_ahead: bool = ...) -> None: ...

class SharedValues(_message.Message):
    __slots__ = ("name", "token", "first_parameter", "parameter_count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FIRST_PARAMETER_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    token: bytes
    first_parameter: int
    parameter_count: int
    def __init__(self, name: _Optional[str] = ..., token: _Optional[bytes] = ..., first_parameter: _Optional[int] = ..., parameter_count: _Optional[int] = ...) -> None: ...

class JobReady(_message.Message):
    __slots__ = ("job_step", "next_sequence", "load_count", "layout_count", "rank", "lease_s", "receipt_follows", "held_buckets", "rewound")
    JOB_STEP_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LOAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_COUNT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FOLLOWS_FIELD_NUMBER: _ClassVar[int]
    HELD_BUCKETS_FIELD_NUMBER: _ClassVar[int]
    REWOUND_FIELD_NUMBER: _ClassVar[int]
    job_step: int
    next_sequence: int
    load_count: int
    layout_count: int
    rank: int
    lease_s: float
    receipt_follows: bool
    held_buckets: bytes
    rewound: bool
    def __init__(self, job_step: _Optional[int] = ..., next_sequence: _Optional[int] = ..., load_count: _Optional[int] = ..., layout_count: _Optional[int] = ..., rank: _Optional[int] = ..., lease_s: _Optional[float] = ..., receipt_follows: bool = ..., held_buckets: _Optional[bytes] = ..., rewound: bool = ...) -> None: ...
