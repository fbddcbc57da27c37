"""The server: holds jobs, applies updates, speaks gRPC.

`run` serves with a `ServerConfig` until a signal; `Server` is the same without signals, for a program of its own.
"""

from optimd.server.app import Server
from optimd.server.config import ServerConfig
from optimd.server.errors import ConfigurationError
from optimd.server.run import run

__all__ = ["ConfigurationError", "Server", "ServerConfig", "run"]
