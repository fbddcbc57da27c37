"""A job's tensors, stepped bucket by bucket, against torch.optim.Adam stepping whole parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import pytest
import torch

from optimd.server.store import Store
from optimd.wire.kinds import PARAMETER
from optimd.wire.layout import Bucket, Parameter, cut_buckets
from optimd.wire.limits import DEFAULT_BUCKET_BYTES, MIN_BUCKET_BYTES
from optimd.wire.sharedvalues import ValuesFile
from optimd.wire.tensors import address_of, bytes_of

SHAPES: Final = ((67, 61), (), (5,), (0, 3), (64,), (1, 1025), (129,), (3000,))
BUCKET_BYTES: Final = (MIN_BUCKET_BYTES, 5000, DEFAULT_BUCKET_BYTES)
STEPS: Final = 4

FUSED: Final[dict[str, Any]] = {"fused": True}
FOREACH: Final[dict[str, Any]] = {"foreach": True}
LOOP: Final[dict[str, Any]] = {"foreach": False, "fused": False}
KERNELS: Final = [
    pytest.param(FUSED, torch.float32, id="fused-float32"),
    pytest.param(FUSED, torch.float64, id="fused-float64"),
    pytest.param(FUSED, torch.bfloat16, id="fused-bfloat16"),
    pytest.param(FUSED, torch.float16, id="fused-float16"),
    pytest.param(FOREACH, torch.float32, id="foreach-float32"),
    pytest.param(FOREACH, torch.float64, id="foreach-float64"),
    pytest.param(LOOP, torch.float32, id="loop-float32"),
    pytest.param(LOOP, torch.float64, id="loop-float64"),
    pytest.param(LOOP, torch.complex64, id="loop-complex64"),
    pytest.param(LOOP, torch.complex128, id="loop-complex128"),
]
OPTIONS: Final[list[dict[str, Any]]] = [
    {},
    {"amsgrad": True},
    {"maximize": True},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"lr": 0.5, "betas": (0.5, 0.75), "eps": 1e-3},
    {"amsgrad": True, "maximize": True, "weight_decay": 0.01, "decoupled_weight_decay": True},
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Lets small updates not wait for a second thread, which on a busy machine takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_tensors(seed: int, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.Tensor]:
    """Normally distributed tensors, always the same for a seed."""
    dice = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=dtype, generator=dice) for shape in shapes]


def cut_of(
    tensors: Sequence[torch.Tensor], store: Store, bucket_bytes: int, group: int = 0
) -> tuple[list[Parameter], list[Bucket]]:
    """Parameters like `tensors`, whose indices go on from the store's, and their buckets."""
    parameters = [Parameter("", item.dtype, tuple(item.shape), tuple(range(item.dim()))) for item in tensors]
    members = enumerate(parameters, len(store.parameters))
    return parameters, cut_buckets(members, group=group, first_id=len(store.buckets), bucket_bytes=bucket_bytes)


def pieces_of(bucket: Bucket, present: Sequence[bool], tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """The present slices of a bucket, cut out of whole tensors, in memory of their own."""
    pieces = []
    for piece, here in zip(bucket.slices, present, strict=True):
        tensor = tensors[piece.parameter]
        if here:
            assert tensor is not None
            pieces.append(tensor.reshape(-1)[piece.offset : piece.end].clone())
    return pieces


def payload_of(bucket: Bucket, present: Sequence[bool], tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The elements of the present slices, one after another."""
    return torch.cat(pieces_of(bucket, present, tensors))


def everywhere(bucket: Bucket) -> list[bool]:
    """All slices of a bucket."""
    return [True] * len(bucket.slices)


def store_of(tensors: Sequence[torch.Tensor], bucket_bytes: int = MIN_BUCKET_BYTES) -> Store:
    """A store that holds the values of `tensors` in one group."""
    store = Store(torch.device("cpu"))
    store.add(*cut_of(tensors, store, bucket_bytes))
    for bucket in store.buckets:
        store.write_values(bucket, payload_of(bucket, everywhere(bucket), tensors))
    return store


def adam_of(tensors: Sequence[torch.Tensor], **options: Any) -> torch.optim.Adam:
    """torch's own optimizer over copies of `tensors`."""
    # In float16 torch's default eps is 0, and much would be 0 / 0.
    eps = 1e-4 if tensors[0].dtype == torch.float16 else 1e-8
    return torch.optim.Adam([torch.nn.Parameter(item.clone()) for item in tensors], **{"eps": eps, **options})


def values_of(adam: torch.optim.Adam) -> list[torch.Tensor]:
    """The parameters of all groups, in order of index."""
    return [parameter for group in adam.param_groups for parameter in group["params"]]


def some_grads(step: int, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """A step's gradients, of which another third is missing in each step, but none in the first."""
    grads = random_tensors(100 + step, dtype)
    return [grad if step == 0 or (index + step) % 3 else None for index, grad in enumerate(grads)]


def step_torch(adam: torch.optim.Adam, grads: Sequence[torch.Tensor | None]) -> None:
    """One step of torch's."""
    for parameter, grad in zip(values_of(adam), grads, strict=True):
        parameter.grad = None if grad is None else grad.clone()
    adam.step()


def step_store(store: Store, grads: Sequence[torch.Tensor | None], groups: Sequence[dict[str, Any]]) -> None:
    """The same step, bucket by bucket, with the options of the buckets' groups."""
    for bucket in store.buckets:
        present = [grads[piece.parameter] is not None for piece in bucket.slices]
        if any(present):
            store.apply(bucket, present, pieces_of(bucket, present, grads), groups[bucket.group])


def content_of(store: Store, kind: str, index: int) -> bytes:
    """All bytes of one tensor of a parameter, as a reader gets them."""
    parts: list[memoryview] = []
    for bucket in store.buckets:
        parts += store.read(kind, bucket, [piece.parameter == index for piece in bucket.slices])
    return b"".join(parts)


def content_of_torch(tensor: torch.Tensor) -> bytes:
    """All bytes of a tensor of torch's."""
    return bytes(bytes_of(tensor.detach().reshape(-1)))


def assert_equal_to_the_last_bit(store: Store, adam: torch.optim.Adam) -> None:
    """The same values, the same step counters, the same state tensors under the same names."""
    for index, parameter in enumerate(values_of(adam)):
        assert content_of(store, PARAMETER, index) == content_of_torch(parameter), f"value of {index}"
        state = dict(adam.state[parameter])
        step = float(state.pop("step", 0.0))
        assert set(store.steps_of(index)) == {step}
        assert store.step_of(index) == step
        assert set(store.state_names_of(index)) == set(state)
        for name, tensor in state.items():
            assert content_of(store, name, index) == content_of_torch(tensor), f"{name} of {index}"


@pytest.fixture(params=BUCKET_BYTES)
def bucket_bytes(request: pytest.FixtureRequest) -> int:
    """From one alignment a bucket to everything in one."""
    return int(request.param)


# --- stepping


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_buckets_step_like_whole_parameters(kernel: dict[str, Any], dtype: torch.dtype, bucket_bytes: int) -> None:
    """However parameters are cut, with gradients that come and go, the bits are torch's."""
    start = random_tensors(0, dtype)
    store, adam = store_of(start, bucket_bytes), adam_of(start, **kernel)
    for step in range(STEPS):
        grads = some_grads(step, dtype)
        step_torch(adam, grads)
        step_store(store, grads, adam.param_groups)
    assert_equal_to_the_last_bit(store, adam)


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_a_parameter_that_torch_splits_between_threads_steps_the_same(
    kernel: dict[str, Any], dtype: torch.dtype
) -> None:
    """Its buckets end elsewhere than the threads' shares do."""
    torch.set_num_threads(2)
    start = random_tensors(24, dtype, [(150_001,)])
    store, adam = store_of(start, 100_000), adam_of(start, **kernel)
    for step in range(2):
        grads = random_tensors(400 + step, dtype, [(150_001,)])
        step_torch(adam, grads)
        step_store(store, grads, adam.param_groups)
    assert_equal_to_the_last_bit(store, adam)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(FUSED, torch.float32, id="fused-float32"),
        pytest.param(FUSED, torch.bfloat16, id="fused-bfloat16"),
        pytest.param(FOREACH, torch.float64, id="foreach-float64"),
        pytest.param(LOOP, torch.float32, id="loop-float32"),
    ],
)
def test_every_option_means_what_it_means_to_torch(
    kernel: dict[str, Any], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Values and state after several steps are torch's, bit for bit."""
    start = random_tensors(1, dtype)
    store, adam = store_of(start), adam_of(start, **kernel, **options)
    for step in range(STEPS):
        grads = some_grads(step, dtype)
        step_torch(adam, grads)
        step_store(store, grads, adam.param_groups)
    assert_equal_to_the_last_bit(store, adam)


def test_a_schedule_changes_the_steps_that_follow_it() -> None:
    """The options of each call count, not those of the first."""
    start = random_tensors(2, torch.float32)
    store, adam = store_of(start), adam_of(start, fused=True)
    for step in range(STEPS):
        adam.param_groups[0].update(lr=0.1 / (step + 1), betas=(0.9 - step / 10, 0.99), weight_decay=step / 10)
        grads = some_grads(step, torch.float32)
        step_torch(adam, grads)
        step_store(store, grads, adam.param_groups)
    assert_equal_to_the_last_bit(store, adam)


def test_a_change_of_kernel_goes_on_with_the_same_state() -> None:
    """Fused, foreach and loop share the state, as in torch."""
    start = random_tensors(3, torch.float32)
    store, adam = store_of(start), adam_of(start)
    for step, kernel in enumerate(({"fused": True, "foreach": False}, {"fused": False, "foreach": True}, LOOP)):
        adam.param_groups[0].update(kernel)
        grads = some_grads(step, torch.float32)
        step_torch(adam, grads)
        step_store(store, grads, adam.param_groups)
    assert_equal_to_the_last_bit(store, adam)


def test_dtypes_of_one_group_do_not_mix() -> None:
    """A model with parameters of several dtypes steps as torch steps it."""
    start = [
        item.to(dtype)
        for item, dtype in zip(
            random_tensors(4, torch.float32),
            [torch.float32, torch.bfloat16, torch.float64, torch.float16] * 2,
            strict=True,
        )
    ]
    store, adam = store_of(start), adam_of(start, fused=True)
    for step in range(STEPS):
        grads = [
            None if grad is None else grad.to(item.dtype)
            for item, grad in zip(start, some_grads(step, torch.float32), strict=True)
        ]
        step_torch(adam, grads)
        step_store(store, grads, adam.param_groups)
    assert_equal_to_the_last_bit(store, adam)


def test_a_group_that_is_added_later_has_options_and_steps_of_its_own() -> None:
    """Indices and bucket ids go on from the last, and what was there is not disturbed."""
    first, second = random_tensors(5, torch.float32), random_tensors(6, torch.float32, SHAPES[:3])
    store, adam = store_of(first), adam_of(first, fused=True)
    grads = some_grads(0, torch.float32)
    step_torch(adam, grads)
    step_store(store, grads, adam.param_groups)

    known = len(store.buckets)
    store.add(*cut_of(second, store, MIN_BUCKET_BYTES, group=1))
    added = [torch.empty(0)] * len(first) + second
    for bucket in store.buckets[known:]:
        store.write_values(bucket, payload_of(bucket, everywhere(bucket), added))
    adam.add_param_group({"params": [torch.nn.Parameter(item.clone()) for item in second], "lr": 0.5, "amsgrad": True})
    assert [bucket.bucket_id for bucket in store.buckets] == list(range(len(store.buckets)))
    for step in (1, 2):
        grads = [*some_grads(step, torch.float32), *random_tensors(200 + step, torch.float32, SHAPES[:3])]
        step_torch(adam, grads)
        step_store(store, grads, adam.param_groups)
    assert_equal_to_the_last_bit(store, adam)


def test_gradients_are_only_read() -> None:
    """A received message is not written to, whatever the options."""
    start = random_tensors(7, torch.float32)
    for kernel in (FUSED, FOREACH, LOOP):
        store = store_of(start)
        options = adam_of(start, **kernel, weight_decay=0.1, maximize=True, amsgrad=True).param_groups[0]
        for bucket in store.buckets:
            grads = pieces_of(bucket, everywhere(bucket), start)
            store.apply(bucket, everywhere(bucket), grads, options)
            assert torch.equal(torch.cat(grads), payload_of(bucket, everywhere(bucket), start))


def test_a_bucket_without_present_slices_changes_nothing() -> None:
    """Nobody had a gradient for it."""
    start = random_tensors(8, torch.float32)
    store, adam = store_of(start), adam_of(start)
    for bucket in store.buckets:
        store.apply(bucket, [False] * len(bucket.slices), [], adam.param_groups[0])
    assert_equal_to_the_last_bit(store, adam)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [LOOP, FOREACH], ids=["loop", "foreach"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_whole_parameters_step_like_torch_where_the_split_would_show(
    kernel: dict[str, Any], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """The gradients of all slices, in order of offset, make one update of the parameter they were cut from."""
    start = random_tensors(9, dtype)
    store, adam = store_of(start, 5000), adam_of(start, **kernel, **options)
    for step in range(STEPS):
        grads = some_grads(step, dtype)
        step_torch(adam, grads)
        for index, grad in enumerate(grads):
            if grad is not None:
                slices = [store.buckets[bucket].slices[place] for bucket, place in store.places(index)]
                pieces = [grad.reshape(-1)[piece.offset : piece.end] for piece in slices]
                store.apply_whole(index, pieces, adam.param_groups[0])
    assert_equal_to_the_last_bit(store, adam)


def test_slices_go_on_where_whole_parameters_stopped_and_back() -> None:
    """Both ways of stepping work on one state."""
    start = random_tensors(10, torch.bfloat16, [(3000,)])
    store, adam = store_of(start), adam_of(start)
    for step, kernel in enumerate((LOOP, {"fused": True, "foreach": False}, LOOP)):
        adam.param_groups[0].update(kernel)
        grads = random_tensors(300 + step, torch.bfloat16, [(3000,)])
        step_torch(adam, grads)
        if kernel["fused"]:
            step_store(store, grads, adam.param_groups)
        else:
            store.apply_whole(0, grads, adam.param_groups[0])
    assert_equal_to_the_last_bit(store, adam)


def test_the_places_of_a_parameter_are_its_slices_in_order() -> None:
    """From the first element to the last, over as many buckets as it takes."""
    store = store_of(random_tensors(11, torch.float32))
    for index, parameter in enumerate(store.parameters):
        slices = [store.buckets[bucket].slices[place] for bucket, place in store.places(index)]
        assert {piece.parameter for piece in slices} == {index}
        assert [piece.offset for piece in slices] == [0, *[piece.end for piece in slices[:-1]]]
        assert slices[-1].end == parameter.numel


def test_an_update_that_torch_refuses_changes_nothing() -> None:
    """There is no fused kernel for complex numbers: values, state and step counters stay as they were."""
    start = random_tensors(12, torch.complex64, [(100,)])
    store, adam = store_of(start), adam_of(start)
    (bucket,) = store.buckets
    grads = random_tensors(13, torch.complex64, [(100,)])
    with pytest.raises(RuntimeError, match="real floating-point"):
        store.apply(bucket, [True], grads, {**adam.param_groups[0], "fused": True})
    assert_equal_to_the_last_bit(store, adam)


# --- state


def test_state_appears_with_a_parameter_s_first_update() -> None:
    """Parameters that are frozen cost no state, on the server as in torch."""
    start = random_tensors(14, torch.float32, [(300,), (200,)])
    store, options = store_of(start), adam_of(start).param_groups[0]
    assert store.value_bytes == 2000
    assert store.state_bytes == 0
    assert store.state_names_of(0) == ()
    step_store(store, [None, start[1]], [options])
    assert store.state_names_of(0) == ()
    assert store.state_names_of(1) == ("exp_avg", "exp_avg_sq")
    assert store.state_bytes == 1600
    step_store(store, [start[0], None], [{**options, "amsgrad": True}])
    assert store.state_names_of(0) == ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert store.state_bytes == 1600 + 3600


def test_values_that_are_written_are_read(bucket_bytes: int) -> None:
    """Every element of every parameter, and only of the slices asked for."""
    start = random_tensors(15, torch.bfloat16)
    store = store_of(start, bucket_bytes)
    for index, tensor in enumerate(start):
        assert content_of(store, PARAMETER, index) == content_of_torch(tensor)
    for bucket in store.buckets:
        whole = b"".join(store.read(PARAMETER, bucket, everywhere(bucket)))
        assert whole == content_of_torch(payload_of(bucket, everywhere(bucket), start))
        assert store.read(PARAMETER, bucket, [False] * len(bucket.slices)) == []


def test_what_is_read_on_a_cpu_shows_the_present_values() -> None:
    """Nothing is copied before it is sent."""
    start = random_tensors(16, torch.float32, [(100,)])
    store = store_of(start)
    (bucket,) = store.buckets
    (view,) = store.read(PARAMETER, bucket, [True])
    store.write_values(bucket, torch.full((100,), 2.0))
    assert bytes(view) == content_of_torch(torch.full((100,), 2.0))


def test_partly_stepped_parameters_are_brought_to_their_highest_step() -> None:
    """They are named; those of which all slices or none were stepped are left alone."""
    start = random_tensors(17, torch.float32, [(100,), (600,), (50,), (600,)])
    store, options = store_of(start), adam_of(start).param_groups[0]
    step_store(store, start, [options])
    first = store.buckets[0]
    store.apply(first, everywhere(first), pieces_of(first, everywhere(first), start), options)
    assert [piece.parameter for piece in first.slices] == [0, 1]
    assert store.steps_of(1)[0] == 2.0
    assert set(store.steps_of(1)[1:]) == {1.0}
    assert store.settle_partial_steps() == [1]
    assert [set(store.steps_of(index)) for index in range(4)] == [{2.0}, {2.0}, {1.0}, {1.0}]
    assert store.settle_partial_steps() == []


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_staged_state_goes_on_like_the_one_it_was_taken_from(amsgrad: bool, bucket_bytes: int) -> None:
    """What torch would do after load_state_dict, bit for bit, also where the store had a state before."""
    start = random_tensors(18, torch.float32)
    adam = adam_of(start, fused=True, amsgrad=amsgrad)
    for step in (1, 2):
        step_torch(adam, some_grads(step, torch.float32))
    values = [item.detach().clone() for item in values_of(adam)]
    store = store_of(values, bucket_bytes)
    step_store(store, random_tensors(19, torch.float32), adam.param_groups)

    states = [dict(adam.state[parameter]) for parameter in values_of(adam)]
    steps = [float(state.pop("step", 0.0)) for state in states]
    staged = store.stage((i, steps[i], tuple(state)) for i, state in enumerate(states) if state)
    for kind in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]:
        for bucket in store.buckets:
            present = staged.expects(kind, bucket)
            assert present == [kind in states[piece.parameter] for piece in bucket.slices]
            staged.write(kind, bucket, present, payload_of(bucket, present, [state.get(kind) for state in states]))
    store.replace_state(staged)
    for bucket in store.buckets:
        store.write_values(bucket, payload_of(bucket, everywhere(bucket), values))
    assert_equal_to_the_last_bit(store, adam)
    for step in (3, 4):
        grads = some_grads(step, torch.float32)
        step_torch(adam, grads)
        step_store(store, grads, adam.param_groups)
    assert_equal_to_the_last_bit(store, adam)


def test_a_staged_state_is_not_seen_before_it_is_complete() -> None:
    """A load that breaks off leaves the job as it was."""
    start = random_tensors(20, torch.float32, [(100,)])
    store, adam = store_of(start), adam_of(start, fused=True)
    grads = random_tensors(21, torch.float32, [(100,)])
    step_torch(adam, grads)
    step_store(store, grads, adam.param_groups)
    staged = store.stage([(0, 7.0, ("exp_avg", "exp_avg_sq"))])
    staged.write("exp_avg", store.buckets[0], [True], torch.ones(100))
    assert_equal_to_the_last_bit(store, adam)
    step_torch(adam, grads)
    step_store(store, grads, adam.param_groups)
    assert_equal_to_the_last_bit(store, adam)


def test_parameters_that_a_staged_state_does_not_name_lose_theirs() -> None:
    """A loaded state_dict replaces the whole."""
    start = random_tensors(22, torch.float32, [(100,), (200,)])
    store, options = store_of(start), adam_of(start).param_groups[0]
    step_store(store, start, [options])
    store.replace_state(store.stage([(1, 5.0, ("exp_avg", "exp_avg_sq"))]))
    assert store.state_names_of(0) == ()
    assert store.step_of(0) == 0.0
    assert store.state_names_of(1) == ("exp_avg", "exp_avg_sq")
    assert store.step_of(1) == 5.0
    assert content_of(store, "exp_avg", 1) == bytes(800)
    assert store.state_bytes == 1600


def test_a_staged_state_expects_only_what_it_has_room_for() -> None:
    """By parameter and by kind of tensor."""
    start = random_tensors(23, torch.float32, [(10,), (20,), (30,)])
    store = store_of(start)
    staged = store.stage([(0, 1.0, ("exp_avg", "exp_avg_sq")), (2, 1.0, ("exp_avg",))])
    (bucket,) = store.buckets
    assert staged.expects("exp_avg", bucket) == [True, False, True]
    assert staged.expects("exp_avg_sq", bucket) == [True, False, False]
    assert staged.expects("max_exp_avg_sq", bucket) == [False, False, False]


MASTERED: Final = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)]


def mastered_store(elements: torch.Tensor, master_dtype: torch.dtype) -> Store:
    """A store with one parameter, kept in `master_dtype`, in several buckets."""
    store = Store(torch.device("cpu"))
    parameter = Parameter("", elements.dtype, tuple(elements.shape), (0,), master_dtype)
    buckets = cut_buckets([(0, parameter)], group=0, first_id=0, bucket_bytes=MIN_BUCKET_BYTES)
    store.add([parameter], buckets)
    for bucket in buckets:
        store.write_values(bucket, payload_of(bucket, everywhere(bucket), [elements]))
    return store


@pytest.mark.parametrize(("dtype", "master_dtype"), MASTERED)
def test_masters_step_like_torchs_wide_parameters_and_are_read_rounded(
    dtype: torch.dtype, master_dtype: torch.dtype
) -> None:
    """State is read as wide as it is kept, and counts as such."""
    start = random_tensors(0, dtype, [(1000,)])[0]
    adam = adam_of([start.to(master_dtype)], fused=True)
    store = mastered_store(start, master_dtype)
    assert store.value_bytes == 1000 * master_dtype.itemsize
    for step in range(STEPS):
        grad = random_tensors(100 + step, dtype, [(1000,)])[0]
        step_torch(adam, [grad.to(master_dtype)])
        step_store(store, [grad], adam.param_groups)
    (value,) = values_of(adam)
    assert content_of(store, PARAMETER, 0) == content_of_torch(value.detach().to(dtype))
    for name in ("exp_avg", "exp_avg_sq"):
        assert content_of(store, name, 0) == content_of_torch(adam.state[value][name])


@pytest.mark.parametrize(("dtype", "master_dtype"), MASTERED)
def test_a_pushed_value_that_has_not_changed_keeps_the_masters_low_bits(
    dtype: torch.dtype, master_dtype: torch.dtype
) -> None:
    """And one that has is taken over. What comes of it in the next step shows which it was."""
    start = random_tensors(0, dtype, [(1000,)])[0]
    adam = adam_of([start.to(master_dtype)], fused=True)
    store = mastered_store(start, master_dtype)
    grads = [random_tensors(100 + step, dtype, [(1000,)])[0] for step in range(2)]
    step_torch(adam, [grads[0].to(master_dtype)])
    step_store(store, [grads[0]], adam.param_groups)
    (value,) = values_of(adam)
    pushed = value.detach().to(dtype)
    assert not torch.equal(pushed.to(master_dtype), value)
    pushed[::7] = 3.0
    with torch.no_grad():
        value[::7] = 3.0
    store.install_value(0, pushed)
    step_torch(adam, [grads[1].to(master_dtype)])
    step_store(store, [grads[1]], adam.param_groups)
    assert store._values[0].equal(value.detach())


def test_pushed_values_are_compared_by_their_bits() -> None:
    """A NaN that is still one is no change; a zero that changed its sign, or is no longer tiny, is."""
    low = 1e-9
    kept = torch.tensor([float("nan"), -0.0, 0.0, 1.0 + low, 1.0 + low], dtype=torch.float64)
    store = mastered_store(torch.zeros(5), torch.float64)
    store._values[0].copy_(kept)
    store.install_value(0, torch.tensor([float("nan"), 0.0, 0.0, 1.0, 2.0]))
    assert content_of_torch(store._values[0]) == content_of_torch(
        torch.tensor([float("nan"), 0.0, 0.0, 1.0 + low, 2.0], dtype=torch.float64)
    )


def test_a_pushed_value_without_a_master_is_taken_as_it_is() -> None:
    """Nothing is kept of what was there."""
    start, pushed = random_tensors(0, torch.float32, [(100,), (100,)])
    store = store_of([start])
    store.install_value(0, pushed)
    assert content_of(store, PARAMETER, 0) == content_of_torch(pushed)


def test_values_that_are_written_anew_keep_nothing_of_the_memory_they_are_written_to() -> None:
    """It is not initialised: what rounds to zero there must not pass for a master's low bits."""
    store = mastered_store(torch.ones(64, dtype=torch.bfloat16), torch.float32)
    store._values[0].fill_(1e-44)
    store.write_values(store.buckets[0], torch.zeros(64, dtype=torch.bfloat16))
    assert not store._values[0].any()


# --- where workers can read values


def read_all(store: Store) -> list[bytes]:
    """All values, as a reader comes by them."""
    return [bytes(part) for bucket in store.buckets for part in store.read(PARAMETER, bucket, everywhere(bucket))]


def places_of(store: Store) -> list[int]:
    """Where they lie."""
    return [address_of(part) for bucket in store.buckets for part in store.read(PARAMETER, bucket, everywhere(bucket))]


class Watched(Sequence[torch.Tensor]):
    """Tensors, of which each calls back when it is asked for."""

    def __init__(self, tensors: Sequence[torch.Tensor], on_look: Callable[[], object]) -> None:
        self._tensors = tensors
        self._on_look = on_look

    def __getitem__(self, number: Any) -> Any:
        # Who looks may be what is called back.
        on_look, self._on_look = self._on_look, lambda: None
        on_look()
        self._on_look = on_look
        return self._tensors[number]

    def __len__(self) -> int:
        return len(self._tensors)


def test_values_may_be_read_while_they_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the old place or of the new one, which are the same: never memory that has not been filled yet."""
    store = store_of(random_tensors(1, torch.float32))
    values, version = read_all(store), store.version
    looks: list[bool] = []
    real = ValuesFile.create

    def watched(parameters: Sequence[Parameter]) -> ValuesFile:
        file = real(parameters)

        def look() -> None:
            is_found = any(store.is_shared(bucket) for bucket in store.buckets)
            looks.append(read_all(store) == values and not is_found)

        file.flats = Watched(file.flats, look)  # type: ignore[assignment]
        return file

    monkeypatch.setattr(ValuesFile, "create", watched)
    store.share()
    # While they are filled, and while buckets come to be read there.
    assert len(looks) > 2 * len(SHAPES)
    assert all(looks)
    assert all(store.is_shared(bucket) for bucket in store.buckets)
    assert read_all(store) == values
    assert store.version == version
    store.hide()


def test_without_memory_for_that_values_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one that asks may have more luck."""
    store = store_of(random_tensors(1, torch.float32))
    places = places_of(store)

    def full(_: Sequence[Parameter]) -> ValuesFile:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ValuesFile, "create", full)
        store.share()
        assert not store.shares
        assert places_of(store) == places
    store.share()
    assert store.shares
    assert all(store.is_shared(bucket) for bucket in store.buckets)
    assert places_of(store) != places
    store.hide()


def test_values_that_are_new_change_nobodys() -> None:
    """Who reads those that were there before finds that they are as they were."""
    store = store_of(random_tensors(1, torch.float32))
    version, known = store.version, len(store.buckets)
    store.add(*cut_of([torch.ones(300)], store, MIN_BUCKET_BYTES))
    assert len(store.buckets) > known
    for bucket in store.buckets[known:]:
        store.write_values(bucket, torch.ones(sum(piece.length for piece in bucket.slices)))
    assert store.version == version
