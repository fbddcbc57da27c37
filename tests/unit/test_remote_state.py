"""`opt.state` over a server that is a dict: what is fetched when, what counts as an edit, and what stays here."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optimd.client.remotestate import ReadAhead, RemoteState, StateCache
from optimd.client.stateentry import StateEntry

OWN: Final = ("step", "exp_avg", "exp_avg_sq")


def content(step: float, numel: int = 3) -> dict[str, torch.Tensor]:
    """What torch would keep of a parameter after so many steps."""
    return {
        "step": torch.tensor(step),
        "exp_avg": torch.arange(numel, dtype=torch.float32) + step,
        "exp_avg_sq": torch.arange(numel, dtype=torch.float32) * step,
    }


class Remote:
    """A server with the state of three parameters, which counts its calls."""

    def __init__(self) -> None:
        self.parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
        self.held = {index: content(1.0 + index) for index in range(3)}
        self.calls: list[Any] = []
        self.cache = StateCache(OWN)
        self.cache.know(self.parameters)
        self.state = RemoteState(self.cache, self.fetch, self.fetch_one, self.list_indices)

    def fetch(self, indices: Sequence[int]) -> dict[int, dict[str, Any]]:
        self.calls.append(tuple(indices) or "all")
        return {index: copy.deepcopy(entry) for index, entry in self.held.items() if not indices or index in indices}

    def fetch_one(self, index: int) -> dict[str, Any]:
        self.calls.append(index)
        return copy.deepcopy(self.held.get(index, {}))

    def list_indices(self) -> list[int]:
        self.calls.append("list")
        return sorted(self.held)

    def step(self) -> None:
        """All edits are taken, and the server goes one step on."""
        for tensor, entry in self.cache.edits().items():
            index = self.cache.index(tensor)
            if index is not None:
                self.held.pop(index)
                if entry is not None:
                    self.held[index] = {key: entry[key].clone() for key in OWN if key in entry}
        for held in self.held.values():
            held["step"] += 1
        self.cache.settle(self.parameters, self.fetch_one)

    def edited(self) -> list[int]:
        """The parameters whose state counts as changed by hand."""
        return [index for index, tensor in enumerate(self.parameters) if tensor in self.cache.edits()]


@pytest.fixture
def remote() -> Remote:
    return Remote()


def fetched(value: dict[str, Any] | None = None) -> StateEntry:
    """An entry that holds what the server has."""
    entry = StateEntry(OWN, lambda: content(5.0) if value is None else value)
    entry.load()
    return entry


def plain(entry: Any) -> dict[str, Any]:
    """For comparisons: numbers and lists instead of tensors."""
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in entry.items()}


# --- an entry


LOOKS: Final[dict[str, Callable[[StateEntry], Any]]] = {
    "getitem": lambda entry: entry["step"],
    "get": lambda entry: entry.get("step"),
    "in": lambda entry: "step" in entry,
    "len": len,
    "bool": bool,
    "list": list,
    "keys": lambda entry: [*entry.keys()],
    "values": lambda entry: [*entry.values()],
    "items": lambda entry: [*entry.items()],
    "dict": dict,
    "unpacking": lambda entry: {**entry},
    "copy": lambda entry: entry.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "repr": repr,
    "equal": lambda entry: entry == {},
    "unequal": lambda entry: entry != {},
    "or": lambda entry: entry | {},
    "ror": lambda entry: {} | entry,
    "pop": lambda entry: entry.pop("step"),
    "popitem": lambda entry: entry.popitem(),
    "setdefault": lambda entry: entry.setdefault("step", 0),
    "update": lambda entry: entry.update(x=1),
    "setitem": lambda entry: entry.__setitem__("x", 1),
    "delitem": lambda entry: entry.__delitem__("step"),
    "clear": lambda entry: entry.clear(),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_an_entry_is_fetched_once_with_the_first_look(look: Callable[[StateEntry], Any]) -> None:
    """Whichever look it is, and not before; from then on it is here, and shows what was fetched."""
    calls: list[int] = []

    def fetch() -> dict[str, Any]:
        calls.append(1)
        return {"step": 4.0, "exp_avg": 2.0}

    entry = StateEntry(OWN, fetch)
    assert not entry.is_fresh
    assert not entry.is_edited
    assert calls == []
    reference = {"step": 4.0, "exp_avg": 2.0}
    expected, result = look(reference), look(entry)
    assert calls == [1]
    if look not in (copy.copy, copy.deepcopy, pickle.dumps):
        assert result == expected
    assert dict(entry) == reference
    assert calls == [1]
    assert entry.is_fresh


def test_an_entry_without_a_server_is_a_dict() -> None:
    """As one that a program makes by putting a state in; all its own keys are edits."""
    entry = StateEntry(OWN)
    assert dict(entry) == {}
    assert not entry.is_edited
    entry["note"] = "foreign"
    assert not entry.is_edited
    entry["step"] = torch.tensor(1.0)
    assert entry.is_edited


def by_key(entry: StateEntry) -> None:
    entry["exp_avg"] = torch.zeros(3)


def in_place(entry: StateEntry) -> None:
    entry["exp_avg"].mul_(2)


def through_data(entry: StateEntry) -> None:
    entry["exp_avg"].data[1] += 1


def through_a_view(entry: StateEntry) -> None:
    entry["exp_avg_sq"].view(-1)[:1].fill_(9)


def of_the_step(entry: StateEntry) -> None:
    entry["step"] += 1


def step_as_a_number(entry: StateEntry) -> None:
    entry["step"] = 5.0


def another_dtype(entry: StateEntry) -> None:
    entry["exp_avg"] = entry["exp_avg"].double()


def equal_bits_of_another_dtype(entry: StateEntry) -> None:
    entry["exp_avg"] = entry["exp_avg"].view(torch.int32)


def another_shape(entry: StateEntry) -> None:
    entry["exp_avg"] = entry["exp_avg"].view(1, 3)


def without_a_key(entry: StateEntry) -> None:
    del entry["exp_avg_sq"]


def without_any(entry: StateEntry) -> None:
    entry.clear()


def sign_of_zero(entry: StateEntry) -> None:
    entry["exp_avg_sq"][0] = -0.0


def permuted(entry: StateEntry) -> None:
    entry["exp_avg"] = entry["exp_avg"].flip(0)


def two_swapped(entry: StateEntry) -> None:
    entry["exp_avg"][[0, 1]] = entry["exp_avg"][[1, 0]]


def exchanged(entry: StateEntry) -> None:
    entry["exp_avg"], entry["exp_avg_sq"] = entry["exp_avg_sq"], entry["exp_avg"]


EDITS: Final = [
    *(by_key, in_place, through_data, through_a_view, of_the_step, step_as_a_number, another_dtype, another_shape),
    *(equal_bits_of_another_dtype, without_a_key, without_any, sign_of_zero, permuted, two_swapped, exchanged),
]


@pytest.mark.parametrize("edit", EDITS)
def test_what_is_changed_by_hand_is_an_edit(edit: Callable[[StateEntry], None]) -> None:
    """By key, in place, through .data, in bits, in order."""
    entry = fetched()
    assert not entry.is_edited
    edit(entry)
    assert entry.is_edited


def equal_copy(entry: StateEntry) -> None:
    for key in OWN:
        entry[key] = entry[key].clone()


def equal_strides(entry: StateEntry) -> None:
    entry["exp_avg"] = torch.stack([entry["exp_avg"]] * 2, dim=1)[:, 0]


def there_and_back(entry: StateEntry) -> None:
    before = entry["exp_avg"].clone()
    entry["exp_avg"].zero_()
    entry["exp_avg"].copy_(before)


def moved_out_and_in(entry: StateEntry) -> None:
    entry["step"] = entry.pop("step")


def foreign_key(entry: StateEntry) -> None:
    entry["note"] = [1, 2]


def many_looks(entry: StateEntry) -> None:
    for _ in range(3):
        repr(entry)


@pytest.mark.parametrize(
    "touch", [equal_copy, equal_strides, there_and_back, moved_out_and_in, foreign_key, many_looks]
)
def test_what_equals_what_the_server_has_is_no_edit(touch: Callable[[StateEntry], None]) -> None:
    """A program that moves a state to a device and back has changed nothing, nor has one with notes of its own."""
    entry = fetched()
    touch(entry)
    assert not entry.is_edited


def test_a_nan_in_a_state_is_no_edit() -> None:
    """It is not equal to itself; its bits are."""
    entry = fetched({"step": torch.tensor(1.0), "exp_avg": torch.tensor([math.nan, 1.0])})
    assert not entry.is_edited
    entry["exp_avg"] = entry["exp_avg"].clone()
    assert not entry.is_edited


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_single_element_or_a_pair_that_changes_places_is_an_edit(data: st.DataObject) -> None:
    """In each dtype that a state may have, wherever the elements are."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]))
    numel = data.draw(st.integers(2, 40))
    values = torch.arange(1, numel + 1).to(dtype)
    entry = fetched({"exp_avg": values.clone()})
    first = data.draw(st.integers(0, numel - 2))
    second = data.draw(st.integers(first + 1, numel - 1))
    tensor = entry["exp_avg"]
    if data.draw(st.booleans()):
        tensor[[first, second]] = tensor[[second, first]]
    else:
        tensor[first] = data.draw(st.sampled_from([0.0, -1.0, 0.5, math.inf, 100.0]))
    assert not torch.equal(tensor, values)
    assert entry.is_edited
    tensor.copy_(values)
    assert not entry.is_edited


def test_content_is_compared_in_parts_that_together_see_every_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large state is looked at piece by piece: its first, its last and those at the seams too."""
    monkeypatch.setattr("optimd.client.stateentry._PART", 16)
    for place in (0, 15, 16, 31, 32, 40):
        entry = fetched({"exp_avg": torch.arange(41.0)})
        assert not entry.is_edited
        entry["exp_avg"][place] += 0.5
        assert entry.is_edited, place
    entry = fetched({"exp_avg": torch.arange(41.0)})
    entry["exp_avg"][:32] = entry["exp_avg"][:32].view(2, 16).flip(0).reshape(-1)
    assert entry.is_edited


def test_a_state_of_complex_or_no_elements_can_be_looked_at() -> None:
    """Complex numbers change in either part."""
    for value in (torch.zeros(0, 3), torch.zeros(()), torch.zeros(2, dtype=torch.complex128)):
        entry = fetched({"exp_avg": value})
        assert not entry.is_edited
        if value.is_complex():
            value.imag[1] = 1
            assert entry.is_edited


def test_an_entry_that_is_forgotten_is_fetched_anew_and_one_that_is_detached_is_not() -> None:
    """After a step the server has something else; what was taken away keeps what it had."""
    entry = fetched()
    taken_out = entry["exp_avg"]
    entry.forget(lambda: content(6.0))
    assert not entry.is_fresh
    assert entry["step"].item() == 6.0
    assert taken_out.tolist() == content(5.0)["exp_avg"].tolist()
    entry.detach()
    assert entry["step"].item() == 6.0
    assert entry.is_edited
    entry.load()
    assert entry["step"].item() == 6.0


def test_an_edit_is_made_no_edit_by_filling_the_entry_with_what_the_server_has() -> None:
    """Marks follow the content."""
    entry = fetched()
    in_place(entry)
    entry.fill(content(9.0))
    assert entry["step"].item() == 9.0
    assert not entry.is_edited


# --- the mapping: what is fetched


def test_nothing_is_fetched_before_it_is_looked_at(remote: Remote) -> None:
    """Neither for the mapping nor for an entry of it."""
    entry = remote.state[remote.parameters[1]]
    assert remote.calls == []
    assert entry["step"].item() == 2.0
    assert remote.calls == [1]
    assert remote.state[remote.parameters[1]] is entry
    assert entry["exp_avg"].tolist() == [2.0, 3.0, 4.0]
    assert remote.calls == [1]


@pytest.mark.parametrize("look", ["items", "values"])
def test_all_entries_are_fetched_in_one_call(remote: Remote, look: str) -> None:
    """And each is the one that `state[p]` gives."""
    entries = list(getattr(remote.state, look)())
    assert [call for call in remote.calls if call != "list"] == ["all"]
    entries = [entry[1] for entry in entries] if look == "items" else entries
    assert [entry["step"].item() for entry in entries] == [1.0, 2.0, 3.0]
    assert all(entry is remote.state[tensor] for entry, tensor in zip(entries, remote.parameters, strict=True))
    assert [call for call in remote.calls if call != "list"] == ["all"]


def test_fetching_all_leaves_edits_alone(remote: Remote) -> None:
    """What a program has changed is not replaced by what the server has."""
    by_key(remote.state[remote.parameters[0]])
    del remote.state[remote.parameters[2]]
    entries = dict(remote.state.items())
    assert list(entries) == remote.parameters[:2]
    assert entries[remote.parameters[0]]["exp_avg"].tolist() == [0.0, 0.0, 0.0]
    assert remote.edited() == [0, 2]


def test_parameters_have_the_order_of_the_groups_and_those_without_state_are_left_out(remote: Remote) -> None:
    """As torch lists them; asked for once between two steps."""
    assert list(remote.state) == remote.parameters
    assert len(remote.state) == 3
    assert remote.calls == ["list"]
    del remote.held[1]
    remote.cache.settle(remote.parameters, remote.fetch_one)
    assert list(remote.state) == [remote.parameters[0], remote.parameters[2]]
    assert len(remote.state) == 2
    assert remote.parameters[0] in remote.state
    assert remote.parameters[1] not in remote.state
    assert all(call == "list" for call in remote.calls)


def test_a_missing_entry_is_an_empty_dict_by_brackets_and_a_default_by_get(remote: Remote) -> None:
    """As a defaultdict's; `get` adds none."""
    del remote.held[1]
    stranger = nn.Parameter(torch.zeros(2))
    for tensor in (remote.parameters[1], stranger):
        assert remote.state.get(tensor) is None
        assert remote.state.get(tensor, 7) == 7
        assert tensor not in remote.state
        assert remote.state[tensor] == {}
        assert tensor in remote.state
        assert remote.state.get(tensor, 7) == {}
    assert list(remote.state) == [*remote.parameters, stranger]
    assert remote.edited() == []
    assert list(remote.cache.edits()) == []


# --- the mapping: edits


def test_edits_are_named_with_their_entries_and_removals_with_none(remote: Remote) -> None:
    """What is looked at and left alone is not among them."""
    in_place(remote.state[remote.parameters[0]])
    del remote.state[remote.parameters[1]]
    assert remote.state[remote.parameters[2]]["step"].item() == 3.0
    assert remote.cache.edits() == {
        remote.parameters[0]: remote.state[remote.parameters[0]],
        remote.parameters[1]: None,
    }


def test_an_entry_that_is_put_in_is_an_edit_and_what_was_there_keeps_its_content(remote: Remote) -> None:
    """Whoever holds the old one reads on in it, and writes to nothing."""
    tensor = remote.parameters[0]
    before = remote.state[tensor]
    remote.state[tensor] = content(40.0)
    assert before["step"].item() == 1.0
    assert remote.state[tensor]["step"].item() == 40.0
    assert remote.edited() == [0]
    before["step"].fill_(7)
    remote.step()
    assert remote.state[tensor]["step"].item() == 41.0
    assert before["step"].item() == 7.0


def test_an_entry_that_is_put_in_its_own_place_is_no_edit(remote: Remote) -> None:
    """As `state[p] = state[p]` in a loop over everything."""
    tensor = remote.parameters[0]
    entry = remote.state[tensor]
    remote.state[tensor] = entry
    assert remote.state[tensor] is entry
    assert remote.edited() == []
    assert remote.calls == []


def test_state_that_is_taken_away_is_gone_for_good(remote: Remote) -> None:
    """For this process at once, for the server with the next step; who holds the entry keeps its content."""
    tensor = remote.parameters[1]
    entry = remote.state[tensor]
    del remote.state[tensor]
    assert entry["step"].item() == 2.0
    assert tensor not in remote.state
    assert list(remote.state) == [remote.parameters[0], remote.parameters[2]]
    assert tensor not in remote.state.snapshot()
    with pytest.raises(KeyError):
        del remote.state[tensor]
    remote.step()
    assert sorted(remote.held) == [0, 2]
    assert remote.edited() == []
    assert tensor not in remote.state
    assert remote.state[tensor] == {}


def test_an_empty_entry_takes_the_state_away_and_a_full_one_brings_it_back(remote: Remote) -> None:
    """`state[p] = {}` is how a program starts a parameter anew."""
    tensor = remote.parameters[1]
    remote.state[tensor] = {}
    assert remote.cache.edits() == {tensor: None}
    remote.state[tensor] = content(8.0)
    assert remote.cache.edits() == {tensor: remote.state[tensor]}
    remote.state[tensor] = {}
    remote.state[tensor].update(content(9.0))
    assert remote.cache.edits() == {tensor: remote.state[tensor]}
    remote.step()
    assert remote.state[tensor]["step"].item() == 10.0


def test_clear_takes_all_of_it_away(remote: Remote) -> None:
    """Own keys, foreign ones, and what is no parameter's."""
    held = remote.state[remote.parameters[0]]
    remote.state[remote.parameters[1]]["note"] = 1
    remote.state["epoch"] = {"n": 3}
    remote.state.clear()
    assert list(remote.state) == []
    assert remote.state.snapshot() == {}
    assert remote.cache.edits() == dict.fromkeys(remote.parameters)
    assert held["step"].item() == 1.0
    remote.step()
    assert remote.held == {}


def test_state_that_moves_to_another_parameter_is_the_same_object(remote: Remote) -> None:
    """As programs that replace a parameter do; what they do to it afterwards is the new one's."""
    old, new = remote.parameters[1], nn.Parameter(torch.zeros(3))
    entry = remote.state.pop(old)
    remote.state[new] = entry
    assert remote.state[new] is entry
    assert entry["step"].item() == 2.0
    entry["exp_avg"] = torch.full((3,), 6.0)
    assert remote.cache.edits() == {old: None, new: entry}
    remote.parameters[1] = new
    remote.cache.relocate(remote.parameters, remote.fetch_one)
    assert remote.cache.edits() == {new: entry}
    assert remote.state[new] is entry
    remote.step()
    assert remote.held[1]["exp_avg"].tolist() == [6.0, 6.0, 6.0]
    assert remote.state[new] is entry
    assert entry["step"].item() == 3.0


def test_state_that_is_given_to_two_parameters_is_copied(remote: Remote) -> None:
    """Two entries of one server cannot be one dict; the first stays as it is."""
    first, second = remote.parameters[:2]
    remote.state[second] = remote.state[first]
    assert remote.state[second] is not remote.state[first]
    assert plain(remote.state[second]) == plain(content(1.0))
    assert remote.edited() == [1]


# --- foreign keys


def test_foreign_keys_stay_here_and_are_no_edit(remote: Remote) -> None:
    """Through steps, through a look at everything, and for a parameter that the server has no state of."""
    first, second = remote.parameters[:2]
    del remote.held[1]
    remote.state[first]["note"] = "mine"
    remote.state[second]["note"] = "mine too"
    assert remote.edited() == []
    remote.step()
    remote.step()
    assert remote.state[first]["note"] == "mine"
    assert remote.state[first]["step"].item() == 3.0
    assert remote.state[second] == {"note": "mine too"}
    remote.step()
    assert second in remote.state
    assert {tensor: entry.get("note") for tensor, entry in remote.state.items()} == {
        first: "mine",
        second: "mine too",
        remote.parameters[2]: None,
    }
    assert remote.state.snapshot()[second] == {"note": "mine too"}


def test_foreign_keys_can_be_changed_and_taken_away(remote: Remote) -> None:
    """A step takes what is there then."""
    tensor = remote.parameters[0]
    remote.state[tensor]["note"] = 1
    remote.step()
    remote.state[tensor]["note"] += 1
    remote.step()
    assert remote.state[tensor]["note"] == 2
    del remote.state[tensor]["note"]
    remote.step()
    assert "note" not in remote.state[tensor]
    assert remote.cache.foreign == {}


def test_foreign_keys_go_with_the_entry_that_has_them(remote: Remote) -> None:
    """A deleted entry leaves none behind, one that is put in brings its own."""
    tensor = remote.parameters[0]
    remote.state[tensor]["note"] = 1
    remote.step()
    remote.state[tensor] = {**content(3.0), "other": 2}
    assert "note" not in remote.state[tensor]
    remote.step()
    assert sorted(remote.state[tensor]) == ["exp_avg", "exp_avg_sq", "other", "step"]
    del remote.state[tensor]
    assert remote.state[tensor] == {}


def test_keys_that_are_no_parameters_are_kept_as_they_are(remote: Remote) -> None:
    """torch allows any; they are this process's."""
    value = {"n": 3}
    remote.state["epoch"] = value
    assert remote.state["epoch"] is value
    assert "epoch" in remote.state
    assert "other" not in remote.state
    assert remote.state["fresh"] == {}
    assert list(remote.state) == [*remote.parameters, "epoch", "fresh"]
    assert remote.cache.edits() == {}
    remote.step()
    assert remote.state["epoch"] is value
    del remote.state["epoch"]
    with pytest.raises(KeyError):
        del remote.state["epoch"]


# --- steps, loads and other parameters


def test_an_entry_that_is_held_shows_each_step_and_an_edit_of_it_counts(remote: Remote) -> None:
    """torch's entry is one object through all of a training."""
    entry = remote.state[remote.parameters[0]]
    for step in range(1, 4):
        assert entry["step"].item() == step
        remote.step()
        assert remote.state[remote.parameters[0]] is entry
    assert remote.calls == [0, 0, 0]
    entry["exp_avg"].fill_(3)
    assert remote.edited() == [0]
    remote.step()
    assert remote.held[0]["exp_avg"].tolist() == [3.0, 3.0, 3.0]
    assert remote.edited() == []


def test_a_tensor_that_was_taken_out_shows_the_state_as_it_was(remote: Remote) -> None:
    """And writing to it after the next step is no edit."""
    tensor = remote.state[remote.parameters[0]]["exp_avg"]
    remote.step()
    tensor.fill_(8)
    assert remote.edited() == []
    assert remote.state[remote.parameters[0]]["exp_avg"].tolist() == [1.0, 2.0, 3.0]


def test_a_step_fetches_nothing(remote: Remote) -> None:
    """However much of the state was looked at before."""
    entries = list(remote.state.values())
    remote.calls.clear()
    remote.step()
    assert remote.calls == []
    assert all(not entry.is_fresh for entry in entries)


def test_entries_follow_their_parameters_where_these_change_places(remote: Remote) -> None:
    """The index is the server's, the tensor the program's."""
    entries = [remote.state[tensor] for tensor in remote.parameters]
    remote.parameters.reverse()
    remote.held = {2 - index: entry for index, entry in remote.held.items()}
    remote.cache.relocate(remote.parameters, remote.fetch_one)
    assert [entry["step"].item() for entry in entries] == [1.0, 2.0, 3.0]
    assert remote.calls == [2, 1, 0]


def test_edits_outlive_a_replacement_of_the_parameters_and_all_else_is_fetched_anew(remote: Remote) -> None:
    """They are still to be pushed then."""
    edited, looked_at = (remote.state[tensor] for tensor in remote.parameters[:2])
    in_place(edited)
    assert looked_at["step"].item() == 2.0
    remote.held[1]["step"].fill_(30)
    remote.cache.relocate(remote.parameters, remote.fetch_one)
    assert edited["exp_avg"].tolist() == [2.0, 4.0, 6.0]
    assert remote.edited() == [0]
    assert looked_at["step"].item() == 30.0


def test_the_entry_of_a_parameter_that_left_the_job_keeps_what_it_showed(remote: Remote) -> None:
    """It is the program's from then on, and stays in the mapping, as torch keeps it; nothing is sent of it."""
    gone = remote.parameters.pop()
    entry = remote.state[gone]
    assert entry["step"].item() == 3.0
    for _ in range(2):
        remote.cache.relocate(remote.parameters, remote.fetch_one)
        del remote.held[len(remote.held) - 1]
        remote.held[len(remote.held)] = content(50.0)
        assert remote.cache.index(gone) is None
        assert remote.state[gone] is entry
        assert entry["step"].item() == 3.0
        assert plain(remote.state.snapshot()[gone]) == plain(content(3.0))


def test_an_entry_of_a_parameter_that_left_the_job_is_not_fetched_by_its_old_index(remote: Remote) -> None:
    """Which is another parameter's, or nobody's."""
    gone = remote.parameters[0]
    assert remote.state[gone]["step"].item() == 1.0
    remote.step()
    remote.parameters.pop(0)
    remote.held = {index - 1: held for index, held in remote.held.items() if index}
    remote.calls.clear()
    remote.cache.relocate(remote.parameters, remote.fetch_one)
    assert remote.calls == []
    assert [remote.state[tensor]["step"].item() for tensor in remote.parameters] == [3.0, 4.0]


def test_the_state_of_a_parameter_that_is_about_to_leave_can_be_taken_over(remote: Remote) -> None:
    """While the server still has it; looked at before or not."""
    remote.cache.settle(remote.parameters, remote.fetch_one)
    looked_at, not_yet, kept = remote.parameters
    entry = remote.state[looked_at]
    for tensor in (looked_at, not_yet):
        remote.cache.take_over(tensor)
    remote.cache.take_over(nn.Parameter(torch.zeros(1)))
    assert remote.calls == [0, 1]
    remote.parameters = [kept]
    remote.held = {0: content(9.0)}
    remote.cache.settle(remote.parameters, remote.fetch_one)
    assert remote.calls == [0, 1]
    assert remote.state[looked_at] is entry
    assert (entry["step"].item(), remote.state[not_yet]["step"].item()) == (1.0, 2.0)
    assert remote.state[kept]["step"].item() == 9.0


def test_pop_takes_an_entry_away_and_gives_it_or_the_default(remote: Remote) -> None:
    """What is not there is not put there either."""
    first, second, _ = remote.parameters
    del remote.held[1]
    entry = remote.state[first]
    assert remote.state.pop(first) is entry
    assert entry["step"].item() == 1.0
    for missing in (first, second, nn.Parameter(torch.zeros(1)), "epoch"):
        assert remote.state.pop(missing, None) is None
        assert remote.state.pop(missing, 7) == 7
        with pytest.raises(KeyError):
            remote.state.pop(missing)
        assert missing not in remote.state
    remote.state["epoch"] = 4
    assert remote.state.pop("epoch", None) == 4
    assert remote.cache.edits() == {first: None}


# --- reading ahead


@pytest.fixture
def many() -> Remote:
    """A server with the states of ten parameters."""
    remote = Remote()
    remote.held = {index: content(float(index)) for index in range(10)}
    return remote


def test_entries_are_read_one_by_one_until_it_is_clear_that_those_that_follow_are_wanted(many: Remote) -> None:
    """Three calls, then one for the rest; each entry is its own."""
    ahead = ReadAhead()
    for index in range(10):
        assert ahead.read(index, many.fetch, lambda: [100] * 10)["step"].item() == index
    assert many.calls == [(0,), (1,), (2,), (3, 4, 5, 6, 7, 8, 9)]
    ahead.read(9, many.fetch, lambda: [100] * 10)
    assert many.calls[-1] == (9,)


def test_what_is_read_ahead_is_limited_in_bytes_and_in_order(many: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may have no room for more; what would not fit ends it, also where something small follows."""
    monkeypatch.setattr("optimd.client.remotestate._AHEAD_BYTES", 250)
    sizes = [100] * 7 + [1000, 1, 1]
    ahead = ReadAhead()
    for index in range(10):
        ahead.read(index, many.fetch, lambda: sizes)
    assert many.calls == [(0,), (1,), (2,), (3, 4, 5), (6,), (7, 8, 9)]


def test_what_was_read_ahead_does_not_outlive_a_step(many: Remote) -> None:
    """The server has something else then, and the program may want no more than one entry."""
    ahead = ReadAhead()
    for index in range(4):
        ahead.read(index, many.fetch, lambda: [100] * 10)
    ahead.clear()
    many.held[4]["step"].fill_(40)
    assert ahead.read(4, many.fetch, lambda: [100] * 10)["step"].item() == 40
    assert many.calls[-1] == (4,)


def test_a_parameter_without_state_is_read_ahead_as_one_without(many: Remote) -> None:
    """And not asked for again."""
    del many.held[0], many.held[5]
    ahead = ReadAhead()
    assert ahead.read(0, many.fetch, lambda: [100] * 10) == {}
    for index in range(1, 6):
        content_of = ahead.read(index, many.fetch, lambda: [100] * 10)
    assert content_of == {}
    assert many.calls == [(0,), (1,), (2,), (3, 4, 5, 6, 7, 8, 9)]


# --- loads


def test_a_load_replaces_edits_and_foreign_keys(remote: Remote) -> None:
    """All of the state is what was loaded; an entry that was looked at shows it."""
    edited, looked_at = (remote.state[tensor] for tensor in remote.parameters[:2])
    edited["note"] = looked_at["note"] = 1
    in_place(edited)
    remote.state["epoch"] = {}
    del remote.state[remote.parameters[2]]
    remote.held = {index: content(70.0 + index) for index in range(3)}
    loaded: dict[Any, Any] = {tensor: {**content(0.0), "loaded": True} for tensor in remote.parameters[:1]}
    remote.cache.replace({**loaded, "other": 5}, remote.fetch_one)
    assert remote.cache.edits() == {}
    assert looked_at["step"].item() == 71.0
    assert "note" not in looked_at
    first = remote.state[remote.parameters[0]]
    assert (first["step"].item(), first["loaded"], "note" in first) == (70.0, True, False)
    assert edited["exp_avg"].tolist() == [2.0, 4.0, 6.0]
    assert list(remote.state) == [*remote.parameters, "other"]


# --- snapshots, copies, lifetimes


def test_a_snapshot_has_everything_and_leaves_nothing_behind(remote: Remote) -> None:
    """Plain dicts, edits and foreign keys included, from one call; a state may be as large as two models."""
    first, second, third = remote.parameters
    remote.state[third]["note"] = 1
    in_place(remote.state[first])
    remote.state["epoch"] = 4
    remote.calls.clear()
    snapshot = remote.state.snapshot()
    assert remote.calls == ["all"]
    assert list(snapshot) == [first, second, third, "epoch"]
    assert all(type(entry) is dict for entry in (snapshot[first], snapshot[second], snapshot[third]))
    assert snapshot[first]["exp_avg"].tolist() == [2.0, 4.0, 6.0]
    assert plain(snapshot[third]) == {**plain(content(3.0)), "note": 1}
    assert second not in remote.cache.entries
    assert remote.edited() == [0]
    remote.step()
    assert remote.state.snapshot()[third]["note"] == 1


def test_a_snapshot_has_the_state_of_parameters_that_the_job_does_not_have_yet(remote: Remote) -> None:
    """Put in before their group is added; an empty one is none."""
    new, empty = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    remote.state[new] = content(5.0)
    assert remote.state[empty] == {}
    snapshot = remote.state.snapshot()
    assert type(snapshot[new]) is dict
    assert plain(snapshot[new]) == plain(content(5.0))
    assert empty not in snapshot


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_and_pickles_are_plain_dicts(remote: Remote, duplicate: Callable[[Any], Any]) -> None:
    """They do not depend on a server, nor on this package."""
    in_place(remote.state[remote.parameters[0]])
    entry = duplicate(remote.state[remote.parameters[1]])
    assert type(entry) is dict
    assert plain(entry) == plain(content(2.0))
    whole = duplicate(remote.state)
    assert type(whole) is dict
    assert [type(entry) for entry in whole.values()] == [dict, dict, dict]
    assert [entry["exp_avg"].tolist() for entry in whole.values()] == [
        [2.0, 4.0, 6.0],
        [2.0, 3.0, 4.0],
        [3.0, 4.0, 5.0],
    ]
    next(iter(whole.values()))["exp_avg"].zero_()
    assert remote.state[remote.parameters[0]]["exp_avg"].tolist() == [2.0, 4.0, 6.0]


def test_a_copy_of_the_mapping_holds_its_entries(remote: Remote) -> None:
    """As a defaultdict's does."""
    duplicate = remote.state.copy()
    assert type(duplicate) is dict
    assert all(duplicate[tensor] is remote.state[tensor] for tensor in remote.parameters)


def test_an_entry_keeps_neither_the_cache_nor_the_parameters_alive() -> None:
    """A forgotten optimizer is not held by what somebody took out of it, which can still be asked for its content."""
    remote = Remote()
    remote.state[remote.parameters[0]]["note"] = 1
    held = remote.held
    remote.cache.settle(remote.parameters, lambda index: dict(held[index]))
    entry = remote.state[remote.parameters[0]]
    gone = [weakref.ref(remote.cache), weakref.ref(remote.parameters[1])]
    del remote
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert plain(entry) == plain(content(1.0))


def test_an_entry_of_a_forgotten_optimizer_raises_what_fetching_it_raises() -> None:
    """It has no content of its own; what was fetched before is still there."""

    class GoneError(Exception):
        pass

    def fetch(_: int) -> dict[str, Any]:
        raise GoneError

    remote = Remote()
    looked_at, not_yet = (remote.state[tensor] for tensor in remote.parameters[:2])
    remote.cache.settle(remote.parameters, fetch)
    looked_at.fill(content(1.0))
    assert looked_at["step"].item() == 1.0
    for _ in range(2):
        with pytest.raises(GoneError):
            not_yet["step"]
    assert not not_yet.is_fresh


@pytest.mark.parametrize("numel", [2, 4, 100])
def test_a_float64_state_of_an_even_number_of_elements_that_changes_its_sign_is_an_edit(numel: int) -> None:
    """remotestate._digest: each sign bit weighs 2**63 in both sums modulo 2**64, so that an even number is lost."""
    entry = fetched({"exp_avg": torch.randn(numel, dtype=torch.float64)})
    entry["exp_avg"].neg_()
    assert entry.is_edited


def test_a_small_float32_state_that_changes_its_sign_is_an_edit() -> None:
    """As above: signs + - - + cancel in the sum and in the weighted sum (1 - 3 - 5 + 7); 2 of 16 sign patterns."""
    entry = fetched({"exp_avg": torch.tensor([1.0, -2.0, -3.0, 4.0])})
    entry["exp_avg"].neg_()
    assert entry.is_edited


def test_elements_that_change_places_between_two_parts_are_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Part 0 element 1 and part 2 element 0 have the same weight 3 (real _PART: elements 1 and 2**21)."""
    monkeypatch.setattr("optimd.client.stateentry._PART", 16)
    entry = fetched({"exp_avg": torch.arange(48.0)})
    entry["exp_avg"][[1, 32]] = entry["exp_avg"][[32, 1]]
    assert entry.is_edited


def test_pop_of_a_missing_state_gives_the_default(remote: Remote) -> None:
    """torch's defaultdict does; MutableMapping.pop relies on a KeyError that __getitem__ never raises."""
    del remote.held[1]
    assert remote.state.pop(remote.parameters[1], None) is None
    assert remote.state.pop(nn.Parameter(torch.zeros(1)), None) is None
    assert remote.state.pop("x", 5) == 5
    with pytest.raises(KeyError):
        remote.state.pop("x")


def test_setdefault_of_a_missing_state_puts_the_default_in(remote: Remote) -> None:
    """Likewise: it is ignored now."""
    del remote.held[1]
    assert plain(remote.state.setdefault(remote.parameters[1], content(3.0))) == plain(content(3.0))
    assert remote.state.setdefault("x", {"n": 1}) == {"n": 1}


def test_an_in_place_or_is_an_edit_and_reversed_is_a_look(remote: Remote) -> None:
    """__ior__ and __reversed__ are not among the methods that look first."""
    entry = StateEntry(OWN, lambda: content(5.0))
    assert list(reversed(entry)) == ["exp_avg_sq", "exp_avg", "step"]
    remote.state[remote.parameters[0]] |= {"step": torch.tensor(100.0)}
    assert remote.state[remote.parameters[0]]["step"].item() == 100.0
    assert remote.edited() == [0]


def test_an_entry_is_equal_to_another_that_was_not_looked_at() -> None:
    """Only the left one is fetched."""
    here = {"step": 1.0}
    assert StateEntry(OWN, lambda: here) == StateEntry(OWN, lambda: here)


def test_a_snapshot_is_one_call_however_much_was_looked_at_before(remote: Remote) -> None:
    """snapshot() asks `if entry and index is None`: bool(entry) fetches each entry that was looked at before the step.

    opt.state_dict() after a look at every entry makes one call a parameter and keeps all of the state here.
    """
    looked_at = list(remote.state.values())
    remote.step()
    remote.calls.clear()
    remote.state.snapshot()
    assert remote.calls == ["all"]
    assert not any(entry.is_fresh for entry in looked_at)


def test_contains_and_iteration_agree_on_a_state_that_was_taken_away(remote: Remote) -> None:
    """torch: an entry that was looked at, or put in empty, is there."""
    tensor = remote.parameters[0]
    remote.state[tensor] = {}
    assert (tensor in remote.state) == (tensor in list(remote.state))
