"""The examples, run as scripts: what the wire narrows does not show in what they learn."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from typing import Final

import pytest

from tests.support import ROOT

EXAMPLES: Final = ROOT / "examples"


@functools.cache
def run(script: str, *arguments: str) -> str:
    """What a script prints, once for all tests. It trains with a server of its own."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def number_behind(word: str, output: str) -> float:
    """The last number behind a word."""
    return float(re.findall(rf"{word} +(\d+\.\d+)", output)[-1])


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_a_small_language_model_comes_as_far_as_with_all_bits(wire: str) -> None:
    """On text that it has not seen, from the same start and the same batches: within 0.02 nats a character.

    Guessing from how often each one comes takes 3.2.
    """
    plain = number_behind("held-out loss", run("train_chars.py", "--steps", "150"))
    narrow = number_behind("held-out loss", run("train_chars.py", "--steps", "150", "--wire-dtype", wire))
    assert plain < 2.5
    assert narrow == pytest.approx(plain, abs=0.02)


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_digits_are_told_apart_as_well_as_with_all_bits(wire: str) -> None:
    """On images that it has not seen, within a hundredth; and the training's loss is as low."""
    plain = run("train_digits.py", "--epochs", "8")
    narrow = run("train_digits.py", "--epochs", "8", "--wire-dtype", wire)
    assert number_behind("accuracy", plain) > 95
    assert number_behind("accuracy", narrow) == pytest.approx(number_behind("accuracy", plain), abs=1.0)
    assert number_behind("loss", narrow) == pytest.approx(number_behind("loss", plain), abs=0.03)
