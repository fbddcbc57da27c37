"""Gradients that workers have held for their next push."""

from __future__ import annotations

import torch

from optimd.server.errors import AccumulationLostError
from optimd.server.member import Member
from optimd.server.parts import JobParts
from optimd.wire.layout import Bucket


class Accumulating:
    """Adds up what workers have held. Thread-safe: all of it happens under the job's lock. Nothing here waits.

    Args:
        parts: The job's.
    """

    def __init__(self, parts: JobParts) -> None:
        self._job = parts
        self._changed = parts.changed

    def begin(self, member: Member, *, sequence: int, micro: int, group_count: int, layout_count: int) -> bool:
        """A worker brings gradients to be held for its next push. Does not wait.

        Returns:
            Whether they are new: False where they have been added already.

        Raises:
            OutOfOrderError: the sequence or the micro number is not one that is due, or the worker's line is down.
            JobMismatchError: the worker has missed a param group or a replacement.
            LimitExceededError: the job would take too much.
            AccumulationLostError: those before them are not held.
            JobDeletedError: the job went away.
        """
        with self._changed:
            self._job.company.check_alive(member)
            self._job.company.check_sequence(member, "Accumulate", sequence)
            self._job.content.check_counts(member.worker.rank, group_count=group_count, layout_count=layout_count)
            if micro > member.held.micro:
                held = member.held.micro
                self._job.journal.accumulation_ended(member.worker, 0, discards=True)
                member.held.forget()
                raise AccumulationLostError(
                    f"rank {member.worker.rank} has accumulated {micro} times for its next step, the server holds "
                    f"{held}: compute the gradients again"
                )
            new = micro == member.held.micro
            if new and not member.held.nbytes:
                # All of it at once: a sum that is held in part would be of no use.
                self._job.check_room(
                    sum(parameter.nbytes for parameter in self._job.content.store.parameters),
                    "the gradients that are to be held",
                )
            member.occupied = True
            return new

    def add(self, member: Member, bucket: Bucket, present: list[bool], payload: torch.Tensor) -> None:
        """Adds the gradients of one bucket to what is held of the worker's. Only read, and not kept.

        Raises:
            RequestError: what `Company.check_alive` raises.
        """
        with self._changed:
            self._job.company.check_alive(member)
            if not member.held.has_added(bucket.bucket_id):
                self._job.journal.gradients_held(
                    member.worker,
                    sequence=self._job.company.record(member.worker.worker_id).next_sequence,
                    micro=member.held.micro,
                    bucket=bucket,
                    present=present,
                    payload=payload,
                )
                member.held.add(bucket, present, payload, self._job.content.store.device)

    def end(self, member: Member) -> None:
        """A worker has brought all gradients of one accumulation.

        Raises:
            RequestError: what `Company.check_alive` raises.
        """
        with self._changed:
            self._job.company.check_alive(member)
            self._job.journal.accumulation_ended(member.worker, member.held.micro + 1)
            member.held.end_accumulation()

    def discard(self, member: Member, *, sequence: int, micro: int) -> int:
        """Forgets what is held of a worker's gradients. Does not wait.

        Returns:
            The next `micro`.

        Raises:
            OutOfOrderError: the sequence number is not the one that is due, or the worker's line is down.
        """
        with self._changed:
            self._job.company.check_alive(member)
            self._job.company.check_sequence(member, "DiscardAccumulated", sequence)
            if micro > member.held.micro:
                # What was held has gone with a line that broke: nothing is held, which is what was asked for.
                self._job.journal.accumulation_ended(member.worker, 0, discards=True)
                member.held.forget()
                return 0
            if micro == member.held.micro:
                self._job.journal.accumulation_ended(member.worker, micro + 1, discards=True)
                member.held.discard()
                member.held.micro += 1
            return micro + 1
