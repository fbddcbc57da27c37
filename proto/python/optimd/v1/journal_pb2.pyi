from optimd.v1 import job_pb2 as _job_pb2
from optimd.v1 import param_group_pb2 as _param_group_pb2
from optimd.v1 import state_dict_pb2 as _state_dict_pb2
from optimd.v1 import tensor_pb2 as _tensor_pb2
from optimd.v1 import training_pb2 as _training_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Environment(_message.Message):
    __slots__ = ("torch_version", "cpu_capability", "device", "threads")
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    CPU_CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    torch_version: str
    cpu_capability: str
    device: str
    threads: int
    def __init__(self, torch_version: _Optional[str] = ..., cpu_capability: _Optional[str] = ..., device: _Optional[str] = ..., threads: _Optional[int] = ...) -> None: ...

class KeptJob(_message.Message):
    __slots__ = ("job", "uid", "aggregation", "apply", "bucket_bytes", "private", "max_grad_norm", "nonfinite")
    JOB_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    BUCKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_FIELD_NUMBER: _ClassVar[int]
    job: str
    uid: str
    aggregation: _job_pb2.Aggregation
    apply: _job_pb2.ApplyMode
    bucket_bytes: int
    private: bool
    max_grad_norm: float
    nonfinite: _job_pb2.NonFinite
    def __init__(self, job: _Optional[str] = ..., uid: _Optional[str] = ..., aggregation: _Optional[_Union[_job_pb2.Aggregation, _Mapping]] = ..., apply: _Optional[_Union[_job_pb2.ApplyMode, str]] = ..., bucket_bytes: _Optional[int] = ..., private: bool = ..., max_grad_norm: _Optional[float] = ..., nonfinite: _Optional[_Union[_job_pb2.NonFinite, str]] = ...) -> None: ...

class SegmentStarted(_message.Message):
    __slots__ = ("format_version", "position", "job", "environment")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    position: int
    job: KeptJob
    environment: Environment
    def __init__(self, format_version: _Optional[int] = ..., position: _Optional[int] = ..., job: _Optional[_Union[KeptJob, _Mapping]] = ..., environment: _Optional[_Union[Environment, _Mapping]] = ...) -> None: ...

class LayoutBrought(_message.Message):
    __slots__ = ("replaces", "groups", "parameters", "buckets", "carried", "tensor_count")
    REPLACES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    CARRIED_FIELD_NUMBER: _ClassVar[int]
    TENSOR_COUNT_FIELD_NUMBER: _ClassVar[int]
    replaces: bool
    groups: _containers.RepeatedCompositeFieldContainer[_param_group_pb2.ParamGroup]
    parameters: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.ParameterSpec]
    buckets: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.BucketSpec]
    carried: _containers.RepeatedCompositeFieldContainer[_job_pb2.CarriedState]
    tensor_count: int
    def __init__(self, replaces: bool = ..., groups: _Optional[_Iterable[_Union[_param_group_pb2.ParamGroup, _Mapping]]] = ..., parameters: _Optional[_Iterable[_Union[_tensor_pb2.ParameterSpec, _Mapping]]] = ..., buckets: _Optional[_Iterable[_Union[_tensor_pb2.BucketSpec, _Mapping]]] = ..., carried: _Optional[_Iterable[_Union[_job_pb2.CarriedState, _Mapping]]] = ..., tensor_count: _Optional[int] = ...) -> None: ...

class StateBrought(_message.Message):
    __slots__ = ("groups", "entries", "digest", "tensor_count")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TENSOR_COUNT_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[_param_group_pb2.ParamGroup]
    entries: _containers.RepeatedCompositeFieldContainer[_state_dict_pb2.ParameterState]
    digest: bytes
    tensor_count: int
    def __init__(self, groups: _Optional[_Iterable[_Union[_param_group_pb2.ParamGroup, _Mapping]]] = ..., entries: _Optional[_Iterable[_Union[_state_dict_pb2.ParameterState, _Mapping]]] = ..., digest: _Optional[bytes] = ..., tensor_count: _Optional[int] = ...) -> None: ...

class ContentBrought(_message.Message):
    __slots__ = ("round", "entries", "tensor_count")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    TENSOR_COUNT_FIELD_NUMBER: _ClassVar[int]
    round: int
    entries: _containers.RepeatedCompositeFieldContainer[_state_dict_pb2.PushedEntry]
    tensor_count: int
    def __init__(self, round: _Optional[int] = ..., entries: _Optional[_Iterable[_Union[_state_dict_pb2.PushedEntry, _Mapping]]] = ..., tensor_count: _Optional[int] = ...) -> None: ...

class PutTensors(_message.Message):
    __slots__ = ("bucket_id", "kind", "present")
    BUCKET_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    bucket_id: int
    kind: _tensor_pb2.TensorKind
    present: bytes
    def __init__(self, bucket_id: _Optional[int] = ..., kind: _Optional[_Union[_tensor_pb2.TensorKind, str]] = ..., present: _Optional[bytes] = ...) -> None: ...

class BuffersBrought(_message.Message):
    __slots__ = ("buffers", "chunk_count")
    BUFFERS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    buffers: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.BufferSpec]
    chunk_count: int
    def __init__(self, buffers: _Optional[_Iterable[_Union[_tensor_pb2.BufferSpec, _Mapping]]] = ..., chunk_count: _Optional[int] = ...) -> None: ...

class BuffersAttached(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class PutBuffers(_message.Message):
    __slots__ = ("offset",)
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    def __init__(self, offset: _Optional[int] = ...) -> None: ...

class WorkerJoined(_message.Message):
    __slots__ = ("number", "worker", "speaks")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SPEAKS_FIELD_NUMBER: _ClassVar[int]
    number: int
    worker: _job_pb2.WorkerIdentity
    speaks: bool
    def __init__(self, number: _Optional[int] = ..., worker: _Optional[_Union[_job_pb2.WorkerIdentity, _Mapping]] = ..., speaks: bool = ...) -> None: ...

class WorkerLeft(_message.Message):
    __slots__ = ("number", "lost")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    number: int
    lost: bool
    def __init__(self, number: _Optional[int] = ..., lost: bool = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("number", "sequence", "staleness", "speaks")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    SPEAKS_FIELD_NUMBER: _ClassVar[int]
    number: int
    sequence: int
    staleness: int
    speaks: bool
    def __init__(self, number: _Optional[int] = ..., sequence: _Optional[int] = ..., staleness: _Optional[int] = ..., speaks: bool = ...) -> None: ...

class RoundSettled(_message.Message):
    __slots__ = ("round", "atomic", "owner", "groups", "spoken")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATOMIC_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SPOKEN_FIELD_NUMBER: _ClassVar[int]
    round: int
    atomic: bool
    owner: int
    groups: _containers.RepeatedCompositeFieldContainer[_param_group_pb2.ParamGroup]
    spoken: bool
    def __init__(self, round: _Optional[int] = ..., atomic: bool = ..., owner: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[_param_group_pb2.ParamGroup, _Mapping]]] = ..., spoken: bool = ...) -> None: ...

class BucketApplied(_message.Message):
    __slots__ = ("round", "bucket_id", "present", "contributors", "grad_scale", "in_server_dtype")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BUCKET_ID_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    GRAD_SCALE_FIELD_NUMBER: _ClassVar[int]
    IN_SERVER_DTYPE_FIELD_NUMBER: _ClassVar[int]
    round: int
    bucket_id: int
    present: bytes
    contributors: _containers.RepeatedCompositeFieldContainer[Contribution]
    grad_scale: float
    in_server_dtype: bool
    def __init__(self, round: _Optional[int] = ..., bucket_id: _Optional[int] = ..., present: _Optional[bytes] = ..., contributors: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., grad_scale: _Optional[float] = ..., in_server_dtype: bool = ...) -> None: ...

class RoundCommitted(_message.Message):
    __slots__ = ("round", "step", "contributors", "partial_contributors", "skipped", "hyperparameters_disagreed", "grad_norm", "pushed_differently")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_DISAGREED_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    PUSHED_DIFFERENTLY_FIELD_NUMBER: _ClassVar[int]
    round: int
    step: int
    contributors: _containers.RepeatedCompositeFieldContainer[Contribution]
    partial_contributors: _containers.RepeatedScalarFieldContainer[int]
    skipped: _containers.RepeatedCompositeFieldContainer[Contribution]
    hyperparameters_disagreed: bool
    grad_norm: float
    pushed_differently: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, round: _Optional[int] = ..., step: _Optional[int] = ..., contributors: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., partial_contributors: _Optional[_Iterable[int]] = ..., skipped: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., hyperparameters_disagreed: bool = ..., grad_norm: _Optional[float] = ..., pushed_differently: _Optional[_Iterable[int]] = ...) -> None: ...

class RoundSkipped(_message.Message):
    __slots__ = ("round", "step", "pushes", "hyperparameters_disagreed", "pushed_differently")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_DISAGREED_FIELD_NUMBER: _ClassVar[int]
    PUSHED_DIFFERENTLY_FIELD_NUMBER: _ClassVar[int]
    round: int
    step: int
    pushes: _containers.RepeatedCompositeFieldContainer[Contribution]
    hyperparameters_disagreed: bool
    pushed_differently: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, round: _Optional[int] = ..., step: _Optional[int] = ..., pushes: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., hyperparameters_disagreed: bool = ..., pushed_differently: _Optional[_Iterable[int]] = ...) -> None: ...

class RoundEnded(_message.Message):
    __slots__ = ("round", "unapplied")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    UNAPPLIED_FIELD_NUMBER: _ClassVar[int]
    round: int
    unapplied: int
    def __init__(self, round: _Optional[int] = ..., unapplied: _Optional[int] = ...) -> None: ...

class RoundTakenBack(_message.Message):
    __slots__ = ("round",)
    ROUND_FIELD_NUMBER: _ClassVar[int]
    round: int
    def __init__(self, round: _Optional[int] = ...) -> None: ...

class StepsLevelled(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PushAnswered(_message.Message):
    __slots__ = ("number", "receipt")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    number: int
    receipt: _training_pb2.StepReceipt
    def __init__(self, number: _Optional[int] = ..., receipt: _Optional[_Union[_training_pb2.StepReceipt, _Mapping]] = ...) -> None: ...

class GradientsHeld(_message.Message):
    __slots__ = ("number", "sequence", "micro", "bucket_id", "present")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MICRO_FIELD_NUMBER: _ClassVar[int]
    BUCKET_ID_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    number: int
    sequence: int
    micro: int
    bucket_id: int
    present: bytes
    def __init__(self, number: _Optional[int] = ..., sequence: _Optional[int] = ..., micro: _Optional[int] = ..., bucket_id: _Optional[int] = ..., present: _Optional[bytes] = ...) -> None: ...

class AccumulationEnded(_message.Message):
    __slots__ = ("number", "micro", "discards")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    MICRO_FIELD_NUMBER: _ClassVar[int]
    DISCARDS_FIELD_NUMBER: _ClassVar[int]
    number: int
    micro: int
    discards: bool
    def __init__(self, number: _Optional[int] = ..., micro: _Optional[int] = ..., discards: bool = ...) -> None: ...

class JournalClosed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class JournalRecord(_message.Message):
    __slots__ = ("segment_started", "layout_brought", "state_brought", "content_brought", "put_tensors", "buffers_brought", "put_buffers", "worker_joined", "worker_left", "round_settled", "bucket_applied", "round_committed", "round_skipped", "round_ended", "round_taken_back", "steps_levelled", "push_answered", "gradients_held", "accumulation_ended", "journal_closed", "buffers_attached")
    SEGMENT_STARTED_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_BROUGHT_FIELD_NUMBER: _ClassVar[int]
    STATE_BROUGHT_FIELD_NUMBER: _ClassVar[int]
    CONTENT_BROUGHT_FIELD_NUMBER: _ClassVar[int]
    PUT_TENSORS_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_BROUGHT_FIELD_NUMBER: _ClassVar[int]
    PUT_BUFFERS_FIELD_NUMBER: _ClassVar[int]
    WORKER_JOINED_FIELD_NUMBER: _ClassVar[int]
    WORKER_LEFT_FIELD_NUMBER: _ClassVar[int]
    ROUND_SETTLED_FIELD_NUMBER: _ClassVar[int]
    BUCKET_APPLIED_FIELD_NUMBER: _ClassVar[int]
    ROUND_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ROUND_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    ROUND_ENDED_FIELD_NUMBER: _ClassVar[int]
    ROUND_TAKEN_BACK_FIELD_NUMBER: _ClassVar[int]
    STEPS_LEVELLED_FIELD_NUMBER: _ClassVar[int]
    PUSH_ANSWERED_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_HELD_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATION_ENDED_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_CLOSED_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_ATTACHED_FIELD_NUMBER: _ClassVar[int]
    segment_started: SegmentStarted
    layout_brought: LayoutBrought
    state_brought: StateBrought
    content_brought: ContentBrought
    put_tensors: PutTensors
    buffers_brought: BuffersBrought
    put_buffers: PutBuffers
    worker_joined: WorkerJoined
    worker_left: WorkerLeft
    round_settled: RoundSettled
    bucket_applied: BucketApplied
    round_committed: RoundCommitted
    round_skipped: RoundSkipped
    round_ended: RoundEnded
    round_taken_back: RoundTakenBack
    steps_levelled: StepsLevelled
    push_answered: PushAnswered
    gradients_held: GradientsHeld
    accumulation_ended: AccumulationEnded
    journal_closed: JournalClosed
    buffers_attached: BuffersAttached
    def __init__(self, segment_started: _Optional[_Union[SegmentStarted, _Mapping]] = ..., layout_brought: _Optional[_Union[LayoutBrought, _Mapping]] = ..., state_brought: _Optional[_Union[StateBrought, _Mapping]] = ..., content_brought: _Optional[_Union[ContentBrought, _Mapping]] = ..., put_tensors: _Optional[_Union[PutTensors, _Mapping]] = ..., buffers_brought: _Optional[_Union[BuffersBrought, _Mapping]] = ..., put_buffers: _Optional[_Union[PutBuffers, _Mapping]] = ..., worker_joined: _Optional[_Union[WorkerJoined, _Mapping]] = ..., worker_left: _Optional[_Union[WorkerLeft, _Mapping]] = ..., round_settled: _Optional[_Union[RoundSettled, _Mapping]] = ..., bucket_applied: _Optional[_Union[BucketApplied, _Mapping]] = ..., round_committed: _Optional[_Union[RoundCommitted, _Mapping]] = ..., round_skipped: _Optional[_Union[RoundSkipped, _Mapping]] = ..., round_ended: _Optional[_Union[RoundEnded, _Mapping]] = ..., round_taken_back: _Optional[_Union[RoundTakenBack, _Mapping]] = ..., steps_levelled: _Optional[_Union[StepsLevelled, _Mapping]] = ..., push_answered: _Optional[_Union[PushAnswered, _Mapping]] = ..., gradients_held: _Optional[_Union[GradientsHeld, _Mapping]] = ..., accumulation_ended: _Optional[_Union[AccumulationEnded, _Mapping]] = ..., journal_closed: _Optional[_Union[JournalClosed, _Mapping]] = ..., buffers_attached: _Optional[_Union[BuffersAttached, _Mapping]] = ...) -> None: ...
