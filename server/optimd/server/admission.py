"""Which calls get as far as their handlers: those of callers who may call, once they have said what they want."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NoReturn

import grpc

from optimd.server.callers import secret_in
from optimd.server.errors import InvalidFieldError, RequestError
from optimd.server.interceptor import translated
from optimd.server.patience import Patience
from optimd.server.tokens import Gate

_HEALTH: Final = "/grpc.health."
_REFLECTION: Final = "/grpc.reflection."

_SILENCE_S: Final = 10.0
"""How long the message of a call that has one may take to come, in seconds."""

_REFLECTION_S: Final = 60.0
"""How long a reflection stream may last, in seconds. A client asks some questions and goes."""

_HEALTH_THREADS: Final = 8
_REFLECTION_THREADS: Final = 4


class Admission(grpc.ServerInterceptor):
    """Refuses calls without a token that is known before anything of them is waited for.

    gRPC's threaded server gives a call with one request a thread before the request has come. A caller that never sends
    it would keep that thread, and some hundred of them all threads that there are. Such calls are taken as streams
    here, which have to bring their message in time, and of one connection only so many may be without. Health and
    reflection, which callers without a token may reach, have threads of their own.

    Args:
        gate: Who may call.
        patience: Ends calls that take too long.
        threads: How many threads the server has for calls.
    """

    def __init__(self, gate: Gate, patience: Patience, threads: int) -> None:
        # No connection can have more than a small share of them wait for what it does not say.
        self._most_silent = max(4, threads // 12)
        self._gate = gate
        self._patience = patience
        self._health_pool = ThreadPoolExecutor(_HEALTH_THREADS, thread_name_prefix="optimd-checks")
        self._reflection_pool = ThreadPoolExecutor(_REFLECTION_THREADS, thread_name_prefix="optimd-reflection")

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of the called method, or one that refuses."""
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return None
        if not method.startswith(_HEALTH):
            # Health of the server is for everybody, and that of a job asks for a token itself.
            try:
                self._gate.admit(secret_in(handler_call_details.invocation_metadata))
            except RequestError as error:
                return grpc.stream_stream_rpc_method_handler(_refusing(error))
        forms = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._unary(method, handler.unary_unary), *forms)
        if handler.unary_stream is not None:
            return grpc.stream_stream_rpc_method_handler(self._stream(handler.unary_stream), *forms)
        if handler.stream_stream is not None and method.startswith(_REFLECTION):
            return grpc.stream_stream_rpc_method_handler(self._reflection(handler.stream_stream), *forms)
        return handler

    def _unary(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        @translated
        @functools.wraps(behaviour)
        def taken(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            return behaviour(self._only(requests, context, most), context)

        most = self._most_silent
        if method.startswith(_HEALTH):
            most = _HEALTH_THREADS // 4
            taken.experimental_thread_pool = self._health_pool  # type: ignore[attr-defined]  # gRPC's name for it
        return taken

    def _stream(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        # With what is written on the handler: health's watchers have a pool of their own already.
        @translated
        @functools.wraps(behaviour)
        def taken(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            yield from behaviour(self._only(requests, context, self._most_silent), context)

        return taken

    def _reflection(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(behaviour)
        def limited(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            release = self._patience.hold(_REFLECTION_S, context.cancel)
            try:
                yield from behaviour(requests, context)
            finally:
                release()

        limited.experimental_thread_pool = self._reflection_pool  # type: ignore[attr-defined]  # gRPC's name for it
        return limited

    def _only(self, requests: Iterator[Any], context: grpc.ServicerContext, most: int) -> Any:
        """A call's message. At most so many of a connection may wait for theirs.

        Raises:
            LimitExceededError: too many calls of its connection are without theirs.
            InvalidFieldError: there is none.
        """
        with self._patience.silent(context.peer(), _SILENCE_S, context.cancel, most=most):
            for request in requests:
                return request
        raise InvalidFieldError("request", "the call ended without one")


def _refusing(error: RequestError) -> Callable[..., Iterator[Any]]:
    @translated
    def refuse(_requests: Iterator[Any], _context: grpc.ServicerContext) -> NoReturn:
        raise error

    return refuse
