from optimd.v1 import job_pb2 as _job_pb2
from optimd.v1 import param_group_pb2 as _param_group_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "pushes", "bytes_received", "bytes_sent", "connected", "silent_s", "dropped", "lag", "waited_s", "staleness", "lost")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    worker: _job_pb2.WorkerIdentity
    pushes: int
    bytes_received: int
    bytes_sent: int
    connected: bool
    silent_s: float
    dropped: int
    lag: int
    waited_s: float
    staleness: int
    lost: bool
    def __init__(self, worker: _Optional[_Union[_job_pb2.WorkerIdentity, _Mapping]] = ..., pushes: _Optional[int] = ..., bytes_received: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., connected: bool = ..., silent_s: _Optional[float] = ..., dropped: _Optional[int] = ..., lag: _Optional[int] = ..., waited_s: _Optional[float] = ..., staleness: _Optional[int] = ..., lost: bool = ...) -> None: ...

class JobSummary(_message.Message):
    __slots__ = ("job", "step", "worker_count", "parameter_count", "element_count", "value_bytes", "state_bytes", "device", "private", "bytes_received", "bytes_sent", "replay_bytes")
    JOB_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORKER_COUNT_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_COUNT_FIELD_NUMBER: _ClassVar[int]
    VALUE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    REPLAY_BYTES_FIELD_NUMBER: _ClassVar[int]
    job: str
    step: int
    worker_count: int
    parameter_count: int
    element_count: int
    value_bytes: int
    state_bytes: int
    device: str
    private: bool
    bytes_received: int
    bytes_sent: int
    replay_bytes: int
    def __init__(self, job: _Optional[str] = ..., step: _Optional[int] = ..., worker_count: _Optional[int] = ..., parameter_count: _Optional[int] = ..., element_count: _Optional[int] = ..., value_bytes: _Optional[int] = ..., state_bytes: _Optional[int] = ..., device: _Optional[str] = ..., private: bool = ..., bytes_received: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., replay_bytes: _Optional[int] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs", "next_page_token")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[JobSummary]
    next_page_token: str
    def __init__(self, jobs: _Optional[_Iterable[_Union[JobSummary, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("summary", "aggregation", "apply", "bucket_bytes", "bucket_count", "workers", "param_groups")
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    BUCKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUCKET_COUNT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    PARAM_GROUPS_FIELD_NUMBER: _ClassVar[int]
    summary: JobSummary
    aggregation: _job_pb2.Aggregation
    apply: _job_pb2.ApplyMode
    bucket_bytes: int
    bucket_count: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    param_groups: _containers.RepeatedCompositeFieldContainer[_param_group_pb2.ParamGroup]
    def __init__(self, summary: _Optional[_Union[JobSummary, _Mapping]] = ..., aggregation: _Optional[_Union[_job_pb2.Aggregation, _Mapping]] = ..., apply: _Optional[_Union[_job_pb2.ApplyMode, str]] = ..., bucket_bytes: _Optional[int] = ..., bucket_count: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., param_groups: _Optional[_Iterable[_Union[_param_group_pb2.ParamGroup, _Mapping]]] = ...) -> None: ...

class DeleteJobRequest(_message.Message):
    __slots__ = ("job", "force")
    JOB_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    job: str
    force: bool
    def __init__(self, job: _Optional[str] = ..., force: bool = ...) -> None: ...

class DeleteJobResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EvictWorkerRequest(_message.Message):
    __slots__ = ("job", "worker_id")
    JOB_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    job: str
    worker_id: str
    def __init__(self, job: _Optional[str] = ..., worker_id: _Optional[str] = ...) -> None: ...

class EvictWorkerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("server_version", "torch_version", "device", "uptime_s", "job_count", "worker_count", "max_workers", "max_jobs", "resident_bytes", "cpu_s", "keeps_jobs", "draining")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    JOB_COUNT_FIELD_NUMBER: _ClassVar[int]
    WORKER_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_WORKERS_FIELD_NUMBER: _ClassVar[int]
    MAX_JOBS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_S_FIELD_NUMBER: _ClassVar[int]
    KEEPS_JOBS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    torch_version: str
    device: str
    uptime_s: float
    job_count: int
    worker_count: int
    max_workers: int
    max_jobs: int
    resident_bytes: int
    cpu_s: float
    keeps_jobs: bool
    draining: bool
    def __init__(self, server_version: _Optional[str] = ..., torch_version: _Optional[str] = ..., device: _Optional[str] = ..., uptime_s: _Optional[float] = ..., job_count: _Optional[int] = ..., worker_count: _Optional[int] = ..., max_workers: _Optional[int] = ..., max_jobs: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., cpu_s: _Optional[float] = ..., keeps_jobs: bool = ..., draining: bool = ...) -> None: ...
