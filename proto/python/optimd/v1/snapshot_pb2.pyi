from optimd.v1 import job_pb2 as _job_pb2
from optimd.v1 import journal_pb2 as _journal_pb2
from optimd.v1 import param_group_pb2 as _param_group_pb2
from optimd.v1 import tensor_pb2 as _tensor_pb2
from optimd.v1 import training_pb2 as _training_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KeptBucket(_message.Message):
    __slots__ = ("position", "steps", "present", "checksum")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    position: int
    steps: _containers.RepeatedScalarFieldContainer[float]
    present: _containers.RepeatedScalarFieldContainer[bytes]
    checksum: int
    def __init__(self, position: _Optional[int] = ..., steps: _Optional[_Iterable[float]] = ..., present: _Optional[_Iterable[bytes]] = ..., checksum: _Optional[int] = ...) -> None: ...

class KeptWorker(_message.Message):
    __slots__ = ("worker_id", "rank", "next_sequence", "pushes", "dropped", "receipt", "incarnation")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    rank: int
    next_sequence: int
    pushes: int
    dropped: int
    receipt: _training_pb2.StepReceipt
    incarnation: int
    def __init__(self, worker_id: _Optional[str] = ..., rank: _Optional[int] = ..., next_sequence: _Optional[int] = ..., pushes: _Optional[int] = ..., dropped: _Optional[int] = ..., receipt: _Optional[_Union[_training_pb2.StepReceipt, _Mapping]] = ..., incarnation: _Optional[int] = ...) -> None: ...

class KeptMember(_message.Message):
    __slots__ = ("number", "worker", "speaks", "absent", "clock", "own_steps", "buffers_attached")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SPEAKS_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    OWN_STEPS_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_ATTACHED_FIELD_NUMBER: _ClassVar[int]
    number: int
    worker: _job_pb2.WorkerIdentity
    speaks: bool
    absent: bool
    clock: int
    own_steps: int
    buffers_attached: bool
    def __init__(self, number: _Optional[int] = ..., worker: _Optional[_Union[_job_pb2.WorkerIdentity, _Mapping]] = ..., speaks: bool = ..., absent: bool = ..., clock: _Optional[int] = ..., own_steps: _Optional[int] = ..., buffers_attached: bool = ...) -> None: ...

class KeptRound(_message.Message):
    __slots__ = ("settled", "applied")
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    settled: _journal_pb2.RoundSettled
    applied: _containers.RepeatedCompositeFieldContainer[_journal_pb2.BucketApplied]
    def __init__(self, settled: _Optional[_Union[_journal_pb2.RoundSettled, _Mapping]] = ..., applied: _Optional[_Iterable[_Union[_journal_pb2.BucketApplied, _Mapping]]] = ...) -> None: ...

class KeptNumber(_message.Message):
    __slots__ = ("number", "rank", "worker_id")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    number: int
    rank: int
    worker_id: str
    def __init__(self, number: _Optional[int] = ..., rank: _Optional[int] = ..., worker_id: _Optional[str] = ...) -> None: ...

class KeptContribution(_message.Message):
    __slots__ = ("rank", "worker_id", "sequence")
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    worker_id: str
    sequence: int
    def __init__(self, rank: _Optional[int] = ..., worker_id: _Optional[str] = ..., sequence: _Optional[int] = ...) -> None: ...

class KeptStep(_message.Message):
    __slots__ = ("step", "contributors", "partial_contributors", "hyperparameters_disagreed", "grad_norm", "pushed_differently")
    STEP_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_DISAGREED_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    PUSHED_DIFFERENTLY_FIELD_NUMBER: _ClassVar[int]
    step: int
    contributors: _containers.RepeatedCompositeFieldContainer[KeptContribution]
    partial_contributors: _containers.RepeatedScalarFieldContainer[int]
    hyperparameters_disagreed: bool
    grad_norm: float
    pushed_differently: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., contributors: _Optional[_Iterable[_Union[KeptContribution, _Mapping]]] = ..., partial_contributors: _Optional[_Iterable[int]] = ..., hyperparameters_disagreed: bool = ..., grad_norm: _Optional[float] = ..., pushed_differently: _Optional[_Iterable[int]] = ...) -> None: ...

class SnapshotManifest(_message.Message):
    __slots__ = ("format_version", "job", "environment", "position", "replay_from", "step", "load_count", "load_digest", "layout_count", "groups", "parameters", "buckets", "kinds", "contents", "buffers", "buffers_checksum", "workers", "members", "formed", "floor", "rounds", "last_round", "history", "numbers")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    REPLAY_FROM_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    LOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_COUNT_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    CONTENTS_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    FORMED_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    LAST_ROUND_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    job: _journal_pb2.KeptJob
    environment: _journal_pb2.Environment
    position: int
    replay_from: int
    step: int
    load_count: int
    load_digest: bytes
    layout_count: int
    groups: _containers.RepeatedCompositeFieldContainer[_param_group_pb2.ParamGroup]
    parameters: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.ParameterSpec]
    buckets: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.BucketSpec]
    kinds: _containers.RepeatedScalarFieldContainer[_tensor_pb2.TensorKind]
    contents: _containers.RepeatedCompositeFieldContainer[KeptBucket]
    buffers: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.BufferSpec]
    buffers_checksum: int
    workers: _containers.RepeatedCompositeFieldContainer[KeptWorker]
    members: _containers.RepeatedCompositeFieldContainer[KeptMember]
    formed: bool
    floor: int
    rounds: _containers.RepeatedCompositeFieldContainer[KeptRound]
    last_round: int
    history: _containers.RepeatedCompositeFieldContainer[KeptStep]
    numbers: _containers.RepeatedCompositeFieldContainer[KeptNumber]
    def __init__(self, format_version: _Optional[int] = ..., job: _Optional[_Union[_journal_pb2.KeptJob, _Mapping]] = ..., environment: _Optional[_Union[_journal_pb2.Environment, _Mapping]] = ..., position: _Optional[int] = ..., replay_from: _Optional[int] = ..., step: _Optional[int] = ..., load_count: _Optional[int] = ..., load_digest: _Optional[bytes] = ..., layout_count: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[_param_group_pb2.ParamGroup, _Mapping]]] = ..., parameters: _Optional[_Iterable[_Union[_tensor_pb2.ParameterSpec, _Mapping]]] = ..., buckets: _Optional[_Iterable[_Union[_tensor_pb2.BucketSpec, _Mapping]]] = ..., kinds: _Optional[_Iterable[_Union[_tensor_pb2.TensorKind, str]]] = ..., contents: _Optional[_Iterable[_Union[KeptBucket, _Mapping]]] = ..., buffers: _Optional[_Iterable[_Union[_tensor_pb2.BufferSpec, _Mapping]]] = ..., buffers_checksum: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[KeptWorker, _Mapping]]] = ..., members: _Optional[_Iterable[_Union[KeptMember, _Mapping]]] = ..., formed: bool = ..., floor: _Optional[int] = ..., rounds: _Optional[_Iterable[_Union[KeptRound, _Mapping]]] = ..., last_round: _Optional[int] = ..., history: _Optional[_Iterable[_Union[KeptStep, _Mapping]]] = ..., numbers: _Optional[_Iterable[_Union[KeptNumber, _Mapping]]] = ...) -> None: ...
