"""Who is let in by a file of tokens, and who is not any more."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from optimd.server.errors import ConfigurationError, PermissionDeniedError, UnauthenticatedError
from optimd.server.tokens import Gate, read_tokens

VISION = '[[token]]\nname = "vision"\nsecret = "vision-secret-0123"\njobs = ["resnet*", "vit"]\n'
OPERATOR = '[[token]]\nname = "operator"\nsecret = "operator-secret-01"\nadmin = true\n'


def told(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return told(tmp_path / "tokens.toml", VISION + OPERATOR)


def test_without_a_file_everybody_may_do_everything() -> None:
    """A server on one's own machine."""
    gate = Gate(None)
    caller = gate.admit(None)
    assert gate.is_open
    caller.check_job("anything")
    caller.check_admin()


def test_a_token_is_good_for_its_jobs_and_for_admin_calls_if_it_says_so(path: Path) -> None:
    """What it is not good for is refused in the same words whether there is such a job or not."""
    gate = Gate(path)
    vision, operator = gate.admit("vision-secret-0123"), gate.admit("operator-secret-01")
    for job in ("resnet50", "resnet", "vit"):
        vision.check_job(job)
    for job in ("vit/1", "ResNet50", "my-resnet", ""):
        with pytest.raises(PermissionDeniedError, match="'vision' is not good for job"):
            vision.check_job(job)
    with pytest.raises(PermissionDeniedError, match="admin = true"):
        vision.check_admin()
    operator.check_job("my-resnet")
    operator.check_admin()


@pytest.mark.parametrize("secret", ["", "vision-secret-012", "vision-secret-01234", "VISION-SECRET-0123", "ü" * 20])
def test_what_is_no_token_is_not_let_in(path: Path, secret: str) -> None:
    """Nor is who brings none, who is told what to do about it."""
    gate = Gate(path)
    with pytest.raises(UnauthenticatedError, match="does not know the token"):
        gate.admit(secret)
    with pytest.raises(UnauthenticatedError, match=r"asks for a token: set ProxyOptions\(token"):
        gate.admit(None)


def test_a_revoked_token_is_not_let_in_any_more_and_its_calls_end(path: Path) -> None:
    """Those of others go on; so do those of a token that is over before."""
    gate = Gate(path)
    ended: list[str] = []
    gate.stay(gate.admit("vision-secret-0123"), lambda: ended.append("vision"))
    gate.stay(gate.admit("vision-secret-0123"), lambda: ended.append("over"))()
    gate.stay(gate.admit("operator-secret-01"), lambda: ended.append("operator"))
    told(path, OPERATOR)
    gate.reload()
    assert ended == ["vision"]
    gate.admit("operator-secret-01").check_admin()
    with pytest.raises(UnauthenticatedError, match="may have been revoked"):
        gate.admit("vision-secret-0123")


@pytest.mark.parametrize(
    "now",
    [
        pytest.param(VISION.replace("-0123", "-4567"), id="another secret"),
        pytest.param(VISION.replace(', "vit"', ""), id="fewer jobs"),
        pytest.param(VISION.replace('"vision"', '"sight"'), id="another name"),
    ],
)
def test_a_token_that_is_another_one_now_ends_calls_too(path: Path, now: str) -> None:
    """What it was let in with does not hold any more."""
    gate = Gate(path)
    ended: list[str] = []
    gate.stay(gate.admit("vision-secret-0123"), lambda: ended.append("vision"))
    told(path, now + OPERATOR)
    gate.reload()
    assert ended == ["vision"]


def test_a_call_that_begins_while_its_token_is_revoked_ends(path: Path) -> None:
    """Between being let in and being counted."""
    gate = Gate(path)
    caller = gate.admit("vision-secret-0123")
    told(path, OPERATOR)
    gate.reload()
    ended: list[str] = []
    gate.stay(caller, lambda: ended.append("vision"))
    assert ended == ["vision"]


@pytest.mark.parametrize("content", ["", "[[token]]\nname = 'x'\n", "not toml ="])
def test_a_file_that_cannot_be_used_leaves_the_tokens_as_they_were(
    path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator who is in the middle of writing it locks nobody out."""
    gate = Gate(path)
    ended: list[str] = []
    gate.stay(gate.admit("vision-secret-0123"), lambda: ended.append("vision"))
    told(path, content)
    with caplog.at_level(logging.ERROR):
        gate.reload()
    assert "the tokens stay as they were" in caplog.text
    gate.admit("vision-secret-0123")
    assert ended == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "at least one"),
        ("token = []", "at least one"),
        ("token = [1]", "token 1 is no table"),
        ("tokens = 1\n" + VISION, r"\[\[token\]\] tables"),
        ("[[token]]\nsecret = 'vision-secret-0123'", "token 1 has no name"),
        (VISION + "[[token]]\nname = 'x'", "token 2 has no secret"),
        ("[[token]]\nname = 'x'\nsecret = 'short'", "fewer than 16 characters"),
        ("[[token]]\nname = 'x'\nsecret = 'with space 0123456789'", "printable ASCII without spaces"),
        ("[[token]]\nname = 'x'\nsecret = 'ünprintable-0123456'", "printable ASCII without spaces"),
        ("[[token]]\nname = 1\nsecret = 'vision-secret-0123'", "its name has to be a str"),
        (VISION + "admin = 'yes'", "its admin has to be a bool"),
        (VISION.replace('["resnet*", "vit"]', '"vit"'), "its jobs has to be a list"),
        (VISION.replace('["resnet*", "vit"]', "[1]"), "its jobs have to be strings"),
        (VISION + "role = 'x'", "'role', which is none of name, secret, jobs, admin"),
        (VISION + VISION.replace("0123", "4567"), "the same name"),
        (VISION + VISION.replace('"vision"', '"sight"'), "the same secret"),
    ],
)
def test_a_bad_file_is_named_and_no_secret_is_told_of(tmp_path: Path, content: str, problem: str) -> None:
    """The number of the token says which it is."""
    path = told(tmp_path / "tokens.toml", content)
    with pytest.raises(ConfigurationError, match=problem) as caught:
        read_tokens(path)
    assert str(path) in str(caught.value)
    assert "vision-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With what the system says."""
    with pytest.raises(ConfigurationError, match=r"none\.toml: no such file"):
        Gate(tmp_path / "none.toml")


def test_a_token_does_not_show_its_secret(path: Path) -> None:
    """Nor what could be compared with it."""
    assert "digest" not in repr(read_tokens(path))
    assert "secret" not in repr(read_tokens(path))
