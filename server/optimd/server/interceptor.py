"""Exceptions become gRPC statuses here and nowhere else."""

from __future__ import annotations

import functools
import logging
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

import grpc

from optimd.server import logcontext
from optimd.server.callers import describe
from optimd.server.errors import RequestError
from optimd.v1 import errors_pb2
from optimd.wire.reasons import ERROR_TRAILER, STATUS_OF_REASON, encode_reason

_log = logging.getLogger(__name__)

_OURS: Final = "/optimd."
# Trailing metadata carries a message twice, and gRPC's limit on it is 8 KiB.
_MAX_TEXT: Final = 1024


def translated(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    """Marks what raises `RequestError`s though it is no method of ours."""
    behaviour.is_translated = True  # type: ignore[attr-defined]
    return behaviour


class ErrorTranslation(grpc.ServerInterceptor):
    """Ends a call whose handler raises with the status and the `ErrorDetail` of the exception's reason.

    A `RequestError` is the caller's business and is logged in one line. Anything else is a defect: INTERNAL with an
    incident id, under which the log has the traceback.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures: Counter[str] = Counter(dict.fromkeys(STATUS_OF_REASON, 0))  # guarded by self._lock

    @property
    def failures(self) -> dict[str, int]:
        """How many calls have ended with each reason."""
        with self._lock:
            return dict(self._failures)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the behaviour of the called method."""
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        # `Admission` has made all of them take streams.
        behaviour = None if handler is None else handler.stream_unary or handler.stream_stream
        if handler is None or behaviour is None:
            return handler
        if not method.startswith(_OURS) and not getattr(behaviour, "is_translated", False):
            # Reflection handles its own errors.
            return handler
        forms = (handler.request_deserializer, handler.response_serializer)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(_guard(method, behaviour, self._count), *forms)
        return grpc.stream_stream_rpc_method_handler(_guard_stream(method, behaviour, self._count), *forms)

    def _count(self, reason: str) -> None:
        with self._lock:
            self._failures[reason] += 1


def _guard(method: str, behaviour: Callable[..., Any], count: Callable[[str], None]) -> Callable[..., Any]:
    # With what is written on the handler: which threads it is for.
    @functools.wraps(behaviour)
    def guarded(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return behaviour(request, context)
        except Exception as error:  # noqa: BLE001  # the last line of defence
            _abort(method, context, error, count)
        finally:
            # The thread serves somebody else next.
            logcontext.clear()

    return guarded


def _guard_stream(
    method: str, behaviour: Callable[..., Iterator[Any]], count: Callable[[str], None]
) -> Callable[..., Iterator[Any]]:
    @functools.wraps(behaviour)
    def guarded(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from behaviour(request, context)
        except Exception as error:  # noqa: BLE001  # the last line of defence
            _abort(method, context, error, count)
        finally:
            # The thread serves somebody else next.
            logcontext.clear()

    return guarded


def _abort(method: str, context: grpc.ServicerContext, error: Exception, count: Callable[[str], None]) -> NoReturn:
    if not context.is_active():
        # The other end is gone: nobody is there to be told, and what was raised followed from that.
        _log.debug("%s: ended by the other end (%s)", method, error)
        context.abort(grpc.StatusCode.CANCELLED, "ended by the other end")
    if isinstance(error, RequestError):
        detail = errors_pb2.ErrorDetail(
            reason=encode_reason(error.reason), message=_shortened(error.message), field=_shortened(error.field)
        )
        status = STATUS_OF_REASON[error.reason]
        _log.info("%s: %s: %s (%s)", method, error.reason, error.message, describe(context))
    else:
        incident = secrets.token_hex(4)
        detail = errors_pb2.ErrorDetail(
            reason=encode_reason("INTERNAL"),
            message=f"internal error; the server's log has it as incident {incident}",
            incident_id=incident,
        )
        status = STATUS_OF_REASON["INTERNAL"]
        _log.error("%s: incident %s", method, incident, exc_info=error)
    count(error.reason if isinstance(error, RequestError) else "INTERNAL")
    context.set_trailing_metadata(((ERROR_TRAILER, detail.SerializeToString()),))
    context.abort(getattr(grpc.StatusCode, status), detail.message)


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
