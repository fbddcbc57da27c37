"""torch's param_groups on the wire."""

from __future__ import annotations

import math
from typing import Any, Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimd.v1 import param_group_pb2
from optimd.wire.param_groups import RULES, decode_group, encode_group, rule_of

several = settings(max_examples=80, deadline=None)

finite: Final = st.floats(allow_nan=False)


def group_of(optimizer_type: type[torch.optim.Adam] = torch.optim.Adam, **options: Any) -> dict[str, Any]:
    """What torch's constructor makes of `options`."""
    return optimizer_type([torch.zeros(2)], **options).param_groups[0]


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """The options in a param group."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def over_the_wire(group: dict[str, Any]) -> dict[str, Any]:
    """What arrives of `group`."""
    data = encode_group(0, "adam", group).SerializeToString()
    return decode_group(param_group_pb2.ParamGroup.FromString(data))


@pytest.mark.parametrize("optimizer_type", [torch.optim.Adam, torch.optim.AdamW])
def test_the_schema_has_exactly_the_options_of_torch(optimizer_type: type[torch.optim.Adam]) -> None:
    """A key that a new torch adds must not be missed."""
    fields = {field.name for field in param_group_pb2.AdamOptions.DESCRIPTOR.fields}
    assert fields == set(optimizer_type([torch.zeros(2)]).defaults)


def test_the_rules_are_those_that_the_schema_has_options_for() -> None:
    """Adam is the only one."""
    assert RULES == ("adam",)


@pytest.mark.parametrize("optimizer_type", [torch.optim.Adam, torch.optim.AdamW])
def test_torch_defaults_come_back(optimizer_type: type[torch.optim.Adam]) -> None:
    """None stays None, the rest keeps its value and type."""
    group = group_of(optimizer_type)
    arrived = over_the_wire(group)
    assert arrived == options_of(group)
    assert {key: type(value) for key, value in arrived.items() if key != "weight_decay"} == {
        key: type(value) for key, value in options_of(group).items() if key != "weight_decay"
    }


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.25},
        {"betas": (0.5, 0.75)},
        {"eps": 1e-12},
        {"weight_decay": 0.125},
        {"amsgrad": True},
        {"maximize": True},
        {"foreach": True},
        {"foreach": False},
        {"capturable": True},
        {"differentiable": True},
        {"fused": False},
        {"decoupled_weight_decay": True},
        {"foreach": False, "fused": False},
    ],
    ids=str,
)
def test_each_option_comes_back(options: dict[str, Any]) -> None:
    """An option that is set is not mistaken for its default, nor False for None."""
    group = group_of(**options)
    arrived = over_the_wire(group)
    assert arrived == options_of(group)
    assert {key: arrived[key] for key in options} == options


def test_the_fused_kernel_stays_asked_for() -> None:
    """True is not None, which would leave the choice to the server."""
    assert over_the_wire({**group_of(), "fused": True})["fused"] is True


@several
@given(
    lr=finite,
    betas=st.tuples(finite, finite),
    eps=finite,
    weight_decay=finite,
    flags=st.tuples(*[st.booleans()] * 5),
    kernels=st.tuples(*[st.sampled_from([None, False, True])] * 2),
)
def test_any_values_come_back_to_the_last_bit(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    flags: tuple[bool, ...],
    kernels: tuple[bool | None, bool | None],
) -> None:
    """Doubles travel as doubles, and nothing is validated: a scheduler may set odd values."""
    amsgrad, maximize, capturable, differentiable, decoupled = flags
    foreach, fused = kernels
    group = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "amsgrad": amsgrad,
        "maximize": maximize,
        "foreach": foreach,
        "capturable": capturable,
        "differentiable": differentiable,
        "fused": fused,
        "decoupled_weight_decay": decoupled,
    }
    assert over_the_wire({**group, "params": [torch.zeros(1)]}) == group


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learning_rate_that_is_a_tensor_arrives_as_one(dtype: torch.dtype) -> None:
    """torch's kernels compute with it in its own dtype, and the bits differ from a double's."""
    arrived = over_the_wire({**group_of(), "lr": torch.tensor([0.1], dtype=dtype)})
    assert torch.equal(arrived["lr"], torch.tensor(0.1, dtype=dtype))
    assert arrived["lr"].dtype == dtype


def test_betas_that_are_tensors_arrive_as_tensors() -> None:
    """Each of them, in its own dtype."""
    arrived = over_the_wire({**group_of(), "betas": (torch.tensor(0.9), torch.tensor(0.999, dtype=torch.float64))})
    assert [beta.dtype for beta in arrived["betas"]] == [torch.float32, torch.float64]
    assert arrived["betas"] == (torch.tensor(0.9), torch.tensor(0.999, dtype=torch.float64))


def test_integers_arrive_as_floats() -> None:
    """`lr=1` is legal."""
    arrived = over_the_wire({**group_of(), "lr": 1, "weight_decay": 2, "eps": 0, "betas": (0, 0)})
    assert arrived["lr"] == 1.0
    assert {type(arrived[key]) for key in ("lr", "weight_decay", "eps")} == {float}
    assert arrived["betas"] == (0.0, 0.0)


def test_index_and_parameter_count_are_the_group_s() -> None:
    """They frame the group in its list; neither parameters nor their names travel in it."""
    message = encode_group(3, "adam", {**group_of(), "param_names": ["w"]}, parameter_count=17)
    assert (message.index, message.parameter_count) == (3, 17)
    assert not message.extra
    assert encode_group(0, "adam", group_of()).parameter_count == 0


def test_an_option_that_is_missing_is_an_error() -> None:
    """A group is complete for its rule, else the other side would step with zeros."""
    group = group_of()
    del group["eps"]
    with pytest.raises(KeyError, match="eps"):
        encode_group(0, "adam", group)


def test_a_group_without_options_is_refused() -> None:
    """It belongs to no rule."""
    message = param_group_pb2.ParamGroup(index=1)
    assert rule_of(message) is None
    with pytest.raises(ValueError, match="without options"):
        decode_group(message)


def test_a_group_names_its_rule() -> None:
    """The oneof's field is the rule."""
    assert rule_of(encode_group(0, "adam", group_of())) == "adam"


def extra_of(value: Any) -> dict[str, Any]:
    """What arrives of a key that a user added."""
    arrived = over_the_wire({**group_of(), "mine": value})
    return {key: value for key, value in arrived.items() if key not in group_of()}


def as_lists(value: Any) -> Any:
    """`value` with its tuples as lists."""
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value


printable: Final = st.text(max_size=10).filter(str.isprintable)
expressible: Final = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | finite | printable,
    lambda items: st.lists(items, max_size=3) | st.lists(items, max_size=3).map(tuple),
    max_leaves=10,
)


@several
@given(value=expressible)
def test_extras_come_back(value: Any) -> None:
    """What a scheduler or a user added arrives, tuples as lists."""
    assert extra_of(value) == {"mine": as_lists(value)}


@pytest.mark.parametrize(
    "value", [None, True, False, 0, 1, -1, 2**63 - 1, -(2**63), 0.0, 1.0, math.inf, "", "linear", [], [[]], [None]]
)
def test_extras_keep_their_types(value: Any) -> None:
    """True is not 1, 1 is not 1.0, an empty list is not None."""
    arrived = extra_of(value)["mine"]
    assert arrived == value
    assert type(arrived) is type(value)


def test_an_extra_that_is_not_a_number_stays_one() -> None:
    """NaN is a float like any other."""
    assert math.isnan(extra_of(math.nan)["mine"])


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.tensor([[0.5]], dtype=torch.float64)])
def test_an_extra_that_is_a_one_element_tensor_arrives_as_its_value(value: torch.Tensor) -> None:
    """As schedulers keep `initial_lr` where lr is a tensor."""
    assert extra_of(value) == {"mine": 0.5}


def test_a_scheduler_s_initial_lr_arrives() -> None:
    """The extra that nearly every training script has."""
    optimizer = torch.optim.Adam([torch.zeros(2)], lr=0.5)
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5)
    assert over_the_wire(optimizer.param_groups[0]) == options_of(optimizer.param_groups[0])
    assert optimizer.param_groups[0]["initial_lr"] == 0.5


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {"a": 1},
        {1, 2},
        b"bytes",
        2**63,
        -(2**63) - 1,
        1j,
        "two\nlines",
        torch.zeros(2),
        torch.tensor(1),
        torch.float32,
        len,
        [1, object()],
        [1, [2, 2**63]],
        ("a", ({},)),
    ],
    # Not their repr: an object's has its address, and every run would have other names.
    ids=lambda value: type(value).__name__,
)
def test_extras_that_cannot_be_expressed_are_left_out(value: Any) -> None:
    """They stay with the worker, and lists that hold one stay as a whole; the others still arrive."""
    assert extra_of(value) == {}
    assert over_the_wire({**group_of(), "mine": value, "other": 1})["other"] == 1


def test_keys_that_are_not_strings_are_left_out() -> None:
    """The schema's keys are strings."""
    group: dict[Any, Any] = {**group_of(), 7: 1}
    assert over_the_wire(group) == options_of(group_of())


def test_a_key_that_is_no_unicode_is_left_out() -> None:
    """A lone surrogate cannot be written as UTF-8."""
    assert over_the_wire({**group_of(), "lone \ud800": 1}) == options_of(group_of())


def test_lists_nested_deeper_than_protobuf_parses_are_left_out() -> None:
    """What is written can be read at the other end: protobuf stops at a hundred levels."""
    value: list[Any] = []
    for _ in range(60):
        value = [value]
    assert extra_of(value) == {}
