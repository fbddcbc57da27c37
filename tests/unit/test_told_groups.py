"""What a server has been told of param_groups: a push brings what it may know otherwise."""

from __future__ import annotations

from typing import Any

import torch

from optimd.client.toldgroups import ToldGroups
from optimd.wire.param_groups import encode_group


def groups(*rates: float) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in group.items() if key != "params"}
        for rate in rates
        for group in torch.optim.Adam([torch.zeros(1)], lr=rate).param_groups
    ]


def told(*rates: float) -> ToldGroups:
    """A server knows two groups, of two and three parameters, with these rates."""
    known = ToldGroups("adam")
    messages = [
        encode_group(index, "adam", group, parameter_count=2 + index) for index, group in enumerate(groups(*rates))
    ]
    known.bring(messages, replaces=False)
    return known


def sent(known: ToldGroups, *rates: float) -> dict[int, float]:
    return {message.index: message.adam.lr for message in known.tell(groups(*rates))}


def rates_of(known: ToldGroups) -> list[float]:
    return [message.adam.lr for message in known.opening()]


def test_only_what_has_changed_is_told_and_once_that_is_answered_it_is_known() -> None:
    """As long as it stays so."""
    known = told(0.1, 0.2)
    assert sent(known, 0.1, 0.2) == {}
    known.answered()
    assert sent(known, 0.1, 0.3) == {1: 0.3}
    known.answered()
    assert sent(known, 0.1, 0.3) == {}
    assert rates_of(known) == [0.1, 0.3]


def test_what_a_push_without_an_answer_has_told_is_told_again_whatever_it_is_by_then() -> None:
    """Also where it is what it was before: the server may have heard of the other."""
    known = told(0.1, 0.2)
    assert sent(known, 0.5, 0.2) == {0: 0.5}
    assert rates_of(known) == [0.1, 0.2]
    assert sent(known, 0.1, 0.2) == {0: 0.1}
    assert sent(known, 0.1, 0.7) == {0: 0.1, 1: 0.7}
    known.answered()
    assert sent(known, 0.1, 0.7) == {}


def test_a_process_that_returns_says_its_groups_with_their_sizes() -> None:
    """As the schema has a layout's."""
    known = told(0.1, 0.2)
    assert [(message.index, message.parameter_count) for message in known.opening()] == [(0, 2), (1, 3)]
    assert list(known.sizes) == [2, 3]
    assert len(known) == 2


def test_groups_that_are_brought_or_acknowledged_are_known() -> None:
    """What was in doubt is not any more."""
    known = told(0.1, 0.2)
    sent(known, 0.5, 0.5)
    known.acknowledge(known.encoded(groups(0.3, 0.4)))
    assert sent(known, 0.3, 0.4) == {}
    sent(known, 0.5, 0.5)
    known.bring([encode_group(0, "adam", groups(0.6)[0], parameter_count=7)], replaces=True)
    assert sent(known, 0.6) == {}
    assert list(known.sizes) == [7]
