"""The benchmark's contenders do the same work, and leave nothing behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.crew import PeerError, crews
from benchmarks.namespaces import PREFIX, LinkUnavailableError, slow_link
from benchmarks.peers import LOCAL, Ddp, Echo, GlooServer, Local, Naive, OneWay, Optimd, Peer, RpcServer
from benchmarks.step_time import SMALL, Suite, measure
from benchmarks.venues import one_host
from tests.support import ROOT

OPTIMD = (Optimd(transport="shm"), Optimd(transport="unix"), Optimd(transport="tcp"))
SERVERS = (GlooServer(), RpcServer(), Naive())


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith(PREFIX)}


@pytest.fixture
def may_make_links() -> None:
    try:
        with slow_link():
            pass
    except LinkUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("workers", "peers"),
    [
        (1, (*OPTIMD, *SERVERS, Echo("unix", 4096), Echo("tcp", 4096), OneWay())),
        (2, (*OPTIMD, *SERVERS, Ddp())),
    ],
    ids=["1 worker", "2 workers"],
)
def test_every_contender_ends_with_the_bits_of_a_local_fused_adam(workers: int, peers: tuple[Peer, ...]) -> None:
    """Two steps of each, with gradients that differ between workers."""
    suite = Suite(model=SMALL, workers=workers, warmups=0, rounds=2, peers=(Local(), *peers))
    with one_host() as venue:
        measured = measure(suite, venue)
    assert measured.differing == []
    assert [*measured.times] == [LOCAL, *(peer.name for peer in peers)]


def test_parameters_tell_who_has_not_stepped() -> None:
    """The comparison can fail: a contender that is a step behind has another checksum."""
    with one_host() as venue, crews([Local(), GlooServer()], SMALL, 1, venue) as (local, gloo):
        assert local.digests() == gloo.digests()
        for crew in (local, gloo):
            crew.prepare(0)
        local.step()
        assert local.digests() != gloo.digests()


def test_a_contender_that_fails_is_reported_with_its_traceback() -> None:
    """Rather than waited for."""
    with (
        one_host() as venue,
        pytest.raises(PeerError, match=r"KeyError: 'no such model'"),
        crews([Local()], "no such model", 1, venue),
    ):
        pass


@pytest.mark.usefixtures("may_make_links")
def test_namespaces_are_gone_after_a_failure() -> None:
    with pytest.raises(ZeroDivisionError), slow_link() as (one, other):
        assert {one.namespace, other.namespace} <= namespaces()
        raise ZeroDivisionError
    assert not {one.namespace, other.namespace} & namespaces()


@pytest.mark.usefixtures("may_make_links")
def test_namespaces_are_gone_after_a_kill() -> None:
    """Nothing of the benchmark runs any more: the keeper's pipe has ended."""
    program = (
        "import sys, time\n"
        "from benchmarks.namespaces import slow_link\n"
        "with slow_link() as (one, other):\n"
        "    print(one.namespace, other.namespace, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout is not None
    assert killed.stdin is not None
    made = set(killed.stdout.readline().split())
    assert len(made) == 2
    assert made <= namespaces()
    keepers = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    ends = [os.pidfd_open(int(keeper)) for keeper in keepers]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for end in ends:
        # Readable once that process has ended.
        assert select.select([end], [], [], 30)[0]
        os.close(end)
    killed.stdout.close()
    killed.stdin.close()
    assert not made & namespaces()
