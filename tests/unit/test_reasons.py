"""The one table of error reasons: schema, statuses, the server's and the worker's exceptions agree."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Final

import grpc
import pytest

from optimd.client.exceptions import OptimdError
from optimd.client.translation import EXCEPTION_OF_REASON, exception_of
from optimd.server import errors
from optimd.v1 import errors_pb2
from optimd.wire.reasons import STATUS_OF_REASON, decode_reason, encode_reason

PREFIX: Final = "ERROR_REASON_"
SCHEMA: Final = Path(__file__).parents[2] / "proto" / "optimd" / "v1" / "errors.proto"

SERVER_EXCEPTIONS: Final = {
    name: member
    for name, member in inspect.getmembers(errors, inspect.isclass)
    if issubclass(member, errors.RequestError) and member is not errors.RequestError
}


def documented_statuses() -> dict[str, str]:
    """For each value of the schema's enum the status that its comment starts with."""
    pattern = re.compile(rf"// (?P<status>[A-Z_]+): (?:[^\n]*\n\s*// )*[^\n]*\n\s*{PREFIX}(?P<reason>\w+) = [1-9]")
    return {match["reason"]: match["status"] for match in pattern.finditer(SCHEMA.read_text())}


def test_the_table_has_exactly_the_reasons_of_the_schema() -> None:
    """A reason added to one must be added to the other."""
    reasons = {name.removeprefix(PREFIX) for name in errors_pb2.ErrorReason.keys()}  # noqa: SIM118 - no dict
    assert set(STATUS_OF_REASON) == reasons - {"UNSPECIFIED"}
    assert "UNSPECIFIED" in reasons


@pytest.mark.parametrize("reason", STATUS_OF_REASON)
def test_every_status_is_one_of_grpc(reason: str) -> None:
    """And says that something went wrong."""
    assert STATUS_OF_REASON[reason] in grpc.StatusCode.__members__
    assert STATUS_OF_REASON[reason] != "OK"


def test_the_schema_s_comments_name_the_statuses_of_the_table() -> None:
    """Who writes a client from the schema alone handles the right statuses."""
    assert documented_statuses() == STATUS_OF_REASON


@pytest.mark.parametrize("name", SERVER_EXCEPTIONS)
def test_every_server_exception_has_a_reason_of_the_table(name: str) -> None:
    """A reason of its own: none falls back to INTERNAL."""
    reason = SERVER_EXCEPTIONS[name].reason
    assert reason in STATUS_OF_REASON
    assert reason != "INTERNAL"


def test_every_reason_but_internal_has_exactly_one_server_exception() -> None:
    """Domain code can raise each of them; INTERNAL is what nobody raises on purpose."""
    raised = sorted(exception.reason for exception in SERVER_EXCEPTIONS.values())
    assert raised == sorted(set(STATUS_OF_REASON) - {"INTERNAL"})
    assert errors.RequestError.reason == "INTERNAL"


def test_every_reason_has_a_client_exception() -> None:
    """And the client knows no reason that the server does not have."""
    assert set(EXCEPTION_OF_REASON) == set(STATUS_OF_REASON)


@pytest.mark.parametrize("reason", STATUS_OF_REASON)
def test_a_reason_arrives_as_its_exception_with_the_message(reason: str) -> None:
    """From the detail in the trailer to what the worker's user sees."""
    detail = errors_pb2.ErrorDetail(reason=encode_reason(reason), message="what went wrong")
    error = exception_of(detail)
    assert type(error) is EXCEPTION_OF_REASON[reason]
    assert isinstance(error, OptimdError)
    assert str(error) == "what went wrong"


@pytest.mark.parametrize("reason", STATUS_OF_REASON)
def test_reasons_come_back_from_the_wire(reason: str) -> None:
    """By the schema's numbers."""
    assert decode_reason(encode_reason(reason)) == reason


@pytest.mark.parametrize("number", [errors_pb2.ERROR_REASON_UNSPECIFIED, 9999, -1])
def test_a_reason_that_is_not_known_is_internal(number: int) -> None:
    """A newer server's reason is still an error."""
    assert decode_reason(number) == "INTERNAL"


def test_a_reason_that_is_not_in_the_schema_cannot_be_sent() -> None:
    """A typo in the server is found at once."""
    with pytest.raises(ValueError, match="NO_SUCH_REASON"):
        encode_reason("NO_SUCH_REASON")


def test_a_request_error_carries_message_and_field() -> None:
    """The interceptor puts both into the detail."""
    plain = errors.LimitExceededError("too many jobs")
    assert (plain.message, plain.field, str(plain)) == ("too many jobs", "", "too many jobs")
    invalid = errors.InvalidFieldError("OpenJob.job", "must not be empty")
    assert (invalid.message, invalid.field) == ("OpenJob.job: must not be empty", "OpenJob.job")
