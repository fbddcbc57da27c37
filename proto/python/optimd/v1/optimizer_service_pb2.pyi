from optimd.v1 import reading_pb2 as _reading_pb2
from optimd.v1 import training_pb2 as _training_pb2
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor
