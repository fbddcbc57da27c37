"""A server that is started again from what it had on disk, faked: a job is put back by hand, with its lines down."""

from __future__ import annotations

from optimd.server.job import Job
from optimd.server.member import HeldGradients
from optimd.server.sight import Sight
from tests.relay import Relay
from tests.support import eventually


class Disk:
    """What a job is now, for a server that is started again from that later.

    Args:
        job: The job.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        content, store = job._content, job._content.store
        with job._changed:
            self.step = job.step
            self._groups = [dict(group) for group in content.groups]
            self._counts = content.load_count, content.load_digest, content.layout_count
            self._values = [value.clone() for value in store._values]
            self._states = [
                (store.step_of(index), {name: tensor.clone() for name, tensor in store._state[index].tensors.items()})
                for index in range(len(store.parameters))
            ]
            self._records = {
                name: (record.next_sequence, record.receipt) for name, record in job._company._records.items()
            }

    def restart(self, relay: Relay) -> None:
        """Breaks all lines that go over the relay, which are all that there are, and puts the job back."""
        with lines_down(relay, self.job):
            self._restore()

    def _restore(self) -> None:
        job, content, store = self.job, self.job._content, self.job._content.store
        with job._changed:
            for worker in job._company.members:
                job._aggregator.forget_push(worker)
            job._aggregator.forget_step(self.step)
            job.pushing._steppers.clear()
            content.groups = [dict(group) for group in self._groups]
            content.load_count, content.load_digest, content.layout_count = self._counts
            for index, (value, (step, tensors)) in enumerate(zip(self._values, self._states, strict=True)):
                store._values[index].copy_(value)
                store.install_state(index, step, {name: tensor.clone() for name, tensor in tensors.items()})
            for name, record in job._company._records.items():
                record.next_sequence, record.receipt = self._records[name]
            with job.history._changed:
                while job.history._steps and job.history._steps[-1].step > self.step:
                    job.history._steps.pop()
            for member in job._company.members.values():
                member.held = HeldGradients()
            _forget_what_workers_know(job)


class lines_down:  # noqa: N801  # reads as a sentence
    """Within the block all lines that go over a relay are broken, and no new ones come up.

    Args:
        relay: The relay.
        job: The job whose workers have these lines, and no others.
    """

    def __init__(self, relay: Relay, job: Job) -> None:
        self._relay, self._job = relay, job

    def __enter__(self) -> None:
        self._relay.hold()
        self._relay.cut()
        assert eventually(lambda: not any(member.alive for member in self._job.members()))

    def __exit__(self, *_: object) -> None:
        self._relay.pass_on()


def restart_where_it_was(relay: Relay, job: Job) -> None:
    """As if a job's server had been started again with all that was done: an open step stays as it is."""
    with lines_down(relay, job), job._changed:
        _forget_what_workers_know(job)


def _forget_what_workers_know(job: Job) -> None:
    """What is not on disk: what workers have seen, and what options they have told."""
    for member in job._company.members.values():
        member.sight, member.recovered = Sight(), True
        member.groups = [dict(group) for group in job.groups]
