"""The contenders: optimd, what its users would pick instead, and what the line alone costs."""

from benchmarks.peers.daemon import Optimd
from benchmarks.peers.echo import MESSAGE_BYTES, Echo, OneWay, echo_over
from benchmarks.peers.gloo import Ddp, GlooServer
from benchmarks.peers.local import LOCAL, Local
from benchmarks.peers.naive import Naive
from benchmarks.peers.peer import Peer, Setting, Worker
from benchmarks.peers.torch_rpc import RpcServer

__all__ = [
    "LOCAL",
    "MESSAGE_BYTES",
    "Ddp",
    "Echo",
    "GlooServer",
    "Local",
    "Naive",
    "OneWay",
    "Optimd",
    "Peer",
    "RpcServer",
    "Setting",
    "Worker",
    "echo_over",
]
