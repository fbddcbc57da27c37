from optimd.v1 import errors_pb2 as _errors_pb2
from optimd.v1 import job_pb2 as _job_pb2
from optimd.v1 import param_group_pb2 as _param_group_pb2
from optimd.v1 import state_dict_pb2 as _state_dict_pb2
from optimd.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_OUTCOME_UNSPECIFIED: _ClassVar[StepOutcome]
    STEP_OUTCOME_APPLIED: _ClassVar[StepOutcome]
    STEP_OUTCOME_SKIPPED_NONFINITE: _ClassVar[StepOutcome]
    STEP_OUTCOME_MERGED: _ClassVar[StepOutcome]
    STEP_OUTCOME_DROPPED_LATE: _ClassVar[StepOutcome]
STEP_OUTCOME_UNSPECIFIED: StepOutcome
STEP_OUTCOME_APPLIED: StepOutcome
STEP_OUTCOME_SKIPPED_NONFINITE: StepOutcome
STEP_OUTCOME_MERGED: StepOutcome
STEP_OUTCOME_DROPPED_LATE: StepOutcome

class StepBegin(_message.Message):
    __slots__ = ("sequence", "base_step", "group_count", "load_count", "param_group_pages", "layout_count", "pushed_pages", "micro", "grad_scale", "skipped", "without_gradients", "resumed", "maps_values", "ahead")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    BASE_STEP_FIELD_NUMBER: _ClassVar[int]
    GROUP_COUNT_FIELD_NUMBER: _ClassVar[int]
    LOAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    PARAM_GROUP_PAGES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_COUNT_FIELD_NUMBER: _ClassVar[int]
    PUSHED_PAGES_FIELD_NUMBER: _ClassVar[int]
    MICRO_FIELD_NUMBER: _ClassVar[int]
    GRAD_SCALE_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    MAPS_VALUES_FIELD_NUMBER: _ClassVar[int]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    base_step: int
    group_count: int
    load_count: int
    param_group_pages: int
    layout_count: int
    pushed_pages: int
    micro: int
    grad_scale: float
    skipped: bool
    without_gradients: bool
    resumed: bool
    maps_values: bool
    ahead: bool
    def __init__(self, sequence: _Optional[int] = ..., base_step: _Optional[int] = ..., group_count: _Optional[int] = ..., load_count: _Optional[int] = ..., param_group_pages: _Optional[int] = ..., layout_count: _Optional[int] = ..., pushed_pages: _Optional[int] = ..., micro: _Optional[int] = ..., grad_scale: _Optional[float] = ..., skipped: bool = ..., without_gradients: bool = ..., resumed: bool = ..., maps_values: bool = ..., ahead: bool = ...) -> None: ...

class StepEnd(_message.Message):
    __slots__ = ("bucket_count",)
    BUCKET_COUNT_FIELD_NUMBER: _ClassVar[int]
    bucket_count: int
    def __init__(self, bucket_count: _Optional[int] = ...) -> None: ...

class StepReceipt(_message.Message):
    __slots__ = ("sequence", "step", "outcome", "contributors", "partial_contributors", "hyperparameters_disagreed", "grad_norm", "pushed_differently", "wants_buffers", "staleness", "lag", "values_version")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_DISAGREED_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    PUSHED_DIFFERENTLY_FIELD_NUMBER: _ClassVar[int]
    WANTS_BUFFERS_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    VALUES_VERSION_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    step: int
    outcome: StepOutcome
    contributors: _containers.RepeatedScalarFieldContainer[int]
    partial_contributors: _containers.RepeatedScalarFieldContainer[int]
    hyperparameters_disagreed: bool
    grad_norm: float
    pushed_differently: _containers.RepeatedScalarFieldContainer[int]
    wants_buffers: bool
    staleness: int
    lag: int
    values_version: int
    def __init__(self, sequence: _Optional[int] = ..., step: _Optional[int] = ..., outcome: _Optional[_Union[StepOutcome, str]] = ..., contributors: _Optional[_Iterable[int]] = ..., partial_contributors: _Optional[_Iterable[int]] = ..., hyperparameters_disagreed: bool = ..., grad_norm: _Optional[float] = ..., pushed_differently: _Optional[_Iterable[int]] = ..., wants_buffers: bool = ..., staleness: _Optional[int] = ..., lag: _Optional[int] = ..., values_version: _Optional[int] = ...) -> None: ...

class PushAgain(_message.Message):
    __slots__ = ("buckets",)
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    buckets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, buckets: _Optional[_Iterable[int]] = ...) -> None: ...

class Accumulate(_message.Message):
    __slots__ = ("sequence", "micro", "group_count", "layout_count")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MICRO_FIELD_NUMBER: _ClassVar[int]
    GROUP_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_COUNT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    micro: int
    group_count: int
    layout_count: int
    def __init__(self, sequence: _Optional[int] = ..., micro: _Optional[int] = ..., group_count: _Optional[int] = ..., layout_count: _Optional[int] = ...) -> None: ...

class PushAhead(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class PushAheadEnd(_message.Message):
    __slots__ = ("bucket_count", "complete")
    BUCKET_COUNT_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    bucket_count: int
    complete: bool
    def __init__(self, bucket_count: _Optional[int] = ..., complete: bool = ...) -> None: ...

class AccumulateEnd(_message.Message):
    __slots__ = ("bucket_count",)
    BUCKET_COUNT_FIELD_NUMBER: _ClassVar[int]
    bucket_count: int
    def __init__(self, bucket_count: _Optional[int] = ...) -> None: ...

class DiscardAccumulated(_message.Message):
    __slots__ = ("sequence", "micro")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MICRO_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    micro: int
    def __init__(self, sequence: _Optional[int] = ..., micro: _Optional[int] = ...) -> None: ...

class Accumulated(_message.Message):
    __slots__ = ("micro",)
    MICRO_FIELD_NUMBER: _ClassVar[int]
    micro: int
    def __init__(self, micro: _Optional[int] = ...) -> None: ...

class ReplaceLayout(_message.Message):
    __slots__ = ("layout_count",)
    LAYOUT_COUNT_FIELD_NUMBER: _ClassVar[int]
    layout_count: int
    def __init__(self, layout_count: _Optional[int] = ...) -> None: ...

class AttachBuffers(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BuffersPage(_message.Message):
    __slots__ = ("buffers", "last")
    BUFFERS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    buffers: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.BufferSpec]
    last: bool
    def __init__(self, buffers: _Optional[_Iterable[_Union[_tensor_pb2.BufferSpec, _Mapping]]] = ..., last: bool = ...) -> None: ...

class BuffersAccepted(_message.Message):
    __slots__ = ("send_values",)
    SEND_VALUES_FIELD_NUMBER: _ClassVar[int]
    send_values: bool
    def __init__(self, send_values: bool = ...) -> None: ...

class PushBuffers(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BuffersHeld(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AddParamGroup(_message.Message):
    __slots__ = ("group",)
    GROUP_FIELD_NUMBER: _ClassVar[int]
    group: int
    def __init__(self, group: _Optional[int] = ...) -> None: ...

class LoadState(_message.Message):
    __slots__ = ("digest", "load_count", "force")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LOAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    load_count: int
    force: bool
    def __init__(self, digest: _Optional[bytes] = ..., load_count: _Optional[int] = ..., force: bool = ...) -> None: ...

class LoadStateAccepted(_message.Message):
    __slots__ = ("send_state",)
    SEND_STATE_FIELD_NUMBER: _ClassVar[int]
    send_state: bool
    def __init__(self, send_state: bool = ...) -> None: ...

class LoadStateEnd(_message.Message):
    __slots__ = ("bucket_count",)
    BUCKET_COUNT_FIELD_NUMBER: _ClassVar[int]
    bucket_count: int
    def __init__(self, bucket_count: _Optional[int] = ...) -> None: ...

class StateLoaded(_message.Message):
    __slots__ = ("load_count",)
    LOAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    load_count: int
    def __init__(self, load_count: _Optional[int] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TrainRequest(_message.Message):
    __slots__ = ("open", "layout", "step_begin", "param_groups", "bucket", "step_end", "add_param_group", "load_state", "state_dict", "load_state_end", "leave", "buffer_chunk", "accumulate", "accumulate_end", "discard_accumulated", "pushed", "replace_layout", "attach_buffers", "buffers", "push_buffers", "push_ahead", "push_ahead_end", "payload", "bundled")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    STEP_BEGIN_FIELD_NUMBER: _ClassVar[int]
    PARAM_GROUPS_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    STEP_END_FIELD_NUMBER: _ClassVar[int]
    ADD_PARAM_GROUP_FIELD_NUMBER: _ClassVar[int]
    LOAD_STATE_FIELD_NUMBER: _ClassVar[int]
    STATE_DICT_FIELD_NUMBER: _ClassVar[int]
    LOAD_STATE_END_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    BUFFER_CHUNK_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATE_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATE_END_FIELD_NUMBER: _ClassVar[int]
    DISCARD_ACCUMULATED_FIELD_NUMBER: _ClassVar[int]
    PUSHED_FIELD_NUMBER: _ClassVar[int]
    REPLACE_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ATTACH_BUFFERS_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_FIELD_NUMBER: _ClassVar[int]
    PUSH_BUFFERS_FIELD_NUMBER: _ClassVar[int]
    PUSH_AHEAD_FIELD_NUMBER: _ClassVar[int]
    PUSH_AHEAD_END_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    BUNDLED_FIELD_NUMBER: _ClassVar[int]
    open: _job_pb2.OpenJob
    layout: _job_pb2.LayoutPage
    step_begin: StepBegin
    param_groups: _param_group_pb2.ParamGroupsPage
    bucket: _tensor_pb2.TensorBucket
    step_end: StepEnd
    add_param_group: AddParamGroup
    load_state: LoadState
    state_dict: _state_dict_pb2.StateDictPage
    load_state_end: LoadStateEnd
    leave: Leave
    buffer_chunk: _tensor_pb2.BufferChunk
    accumulate: Accumulate
    accumulate_end: AccumulateEnd
    discard_accumulated: DiscardAccumulated
    pushed: _state_dict_pb2.PushedPage
    replace_layout: ReplaceLayout
    attach_buffers: AttachBuffers
    buffers: BuffersPage
    push_buffers: PushBuffers
    push_ahead: PushAhead
    push_ahead_end: PushAheadEnd
    payload: bytes
    bundled: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, open: _Optional[_Union[_job_pb2.OpenJob, _Mapping]] = ..., layout: _Optional[_Union[_job_pb2.LayoutPage, _Mapping]] = ..., step_begin: _Optional[_Union[StepBegin, _Mapping]] = ..., param_groups: _Optional[_Union[_param_group_pb2.ParamGroupsPage, _Mapping]] = ..., bucket: _Optional[_Union[_tensor_pb2.TensorBucket, _Mapping]] = ..., step_end: _Optional[_Union[StepEnd, _Mapping]] = ..., add_param_group: _Optional[_Union[AddParamGroup, _Mapping]] = ..., load_state: _Optional[_Union[LoadState, _Mapping]] = ..., state_dict: _Optional[_Union[_state_dict_pb2.StateDictPage, _Mapping]] = ..., load_state_end: _Optional[_Union[LoadStateEnd, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., buffer_chunk: _Optional[_Union[_tensor_pb2.BufferChunk, _Mapping]] = ..., accumulate: _Optional[_Union[Accumulate, _Mapping]] = ..., accumulate_end: _Optional[_Union[AccumulateEnd, _Mapping]] = ..., discard_accumulated: _Optional[_Union[DiscardAccumulated, _Mapping]] = ..., pushed: _Optional[_Union[_state_dict_pb2.PushedPage, _Mapping]] = ..., replace_layout: _Optional[_Union[ReplaceLayout, _Mapping]] = ..., attach_buffers: _Optional[_Union[AttachBuffers, _Mapping]] = ..., buffers: _Optional[_Union[BuffersPage, _Mapping]] = ..., push_buffers: _Optional[_Union[PushBuffers, _Mapping]] = ..., push_ahead: _Optional[_Union[PushAhead, _Mapping]] = ..., push_ahead_end: _Optional[_Union[PushAheadEnd, _Mapping]] = ..., payload: _Optional[bytes] = ..., bundled: _Optional[_Iterable[bytes]] = ...) -> None: ...

class TrainResponse(_message.Message):
    __slots__ = ("layout_accepted", "bucket_table", "layout", "bucket", "ready", "receipt", "load_state_accepted", "state_loaded", "refused", "accumulated", "buffer_chunk", "buffers_accepted", "buffers_held", "push_again", "payload", "bundled")
    LAYOUT_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    BUCKET_TABLE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    LOAD_STATE_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    STATE_LOADED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATED_FIELD_NUMBER: _ClassVar[int]
    BUFFER_CHUNK_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_HELD_FIELD_NUMBER: _ClassVar[int]
    PUSH_AGAIN_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    BUNDLED_FIELD_NUMBER: _ClassVar[int]
    layout_accepted: _job_pb2.LayoutAccepted
    bucket_table: _tensor_pb2.BucketTablePage
    layout: _job_pb2.LayoutPage
    bucket: _tensor_pb2.TensorBucket
    ready: _job_pb2.JobReady
    receipt: StepReceipt
    load_state_accepted: LoadStateAccepted
    state_loaded: StateLoaded
    refused: _errors_pb2.ErrorDetail
    accumulated: Accumulated
    buffer_chunk: _tensor_pb2.BufferChunk
    buffers_accepted: BuffersAccepted
    buffers_held: BuffersHeld
    push_again: PushAgain
    payload: bytes
    bundled: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, layout_accepted: _Optional[_Union[_job_pb2.LayoutAccepted, _Mapping]] = ..., bucket_table: _Optional[_Union[_tensor_pb2.BucketTablePage, _Mapping]] = ..., layout: _Optional[_Union[_job_pb2.LayoutPage, _Mapping]] = ..., bucket: _Optional[_Union[_tensor_pb2.TensorBucket, _Mapping]] = ..., ready: _Optional[_Union[_job_pb2.JobReady, _Mapping]] = ..., receipt: _Optional[_Union[StepReceipt, _Mapping]] = ..., load_state_accepted: _Optional[_Union[LoadStateAccepted, _Mapping]] = ..., state_loaded: _Optional[_Union[StateLoaded, _Mapping]] = ..., refused: _Optional[_Union[_errors_pb2.ErrorDetail, _Mapping]] = ..., accumulated: _Optional[_Union[Accumulated, _Mapping]] = ..., buffer_chunk: _Optional[_Union[_tensor_pb2.BufferChunk, _Mapping]] = ..., buffers_accepted: _Optional[_Union[BuffersAccepted, _Mapping]] = ..., buffers_held: _Optional[_Union[BuffersHeld, _Mapping]] = ..., push_again: _Optional[_Union[PushAgain, _Mapping]] = ..., payload: _Optional[bytes] = ..., bundled: _Optional[_Iterable[bytes]] = ...) -> None: ...
