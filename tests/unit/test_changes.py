"""Writes to parameters that torch does not announce: what the watch names, and what it leaves alone."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optimd.client.changes import SUMMED_UP_TO, WHOLE_UP_TO, ValueWatch

MIDDLE: Final = 10 * WHOLE_UP_TO
LARGE: Final = 2 * SUMMED_UP_TO
RUNS: Final = 256
BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def watch_of(*tensors: torch.Tensor) -> ValueWatch:
    watch = ValueWatch()
    watch.remember(tensors)
    return watch


def three(*numels: int) -> list[torch.Tensor]:
    """Parameters of these sizes, or three small ones."""
    return [nn.Parameter(torch.arange(numel, dtype=torch.float32)) for numel in numels or (5, 6, 7)]


# --- nothing, and writes that torch counts


def test_nothing_is_named_when_nothing_was_written() -> None:
    """However often one looks, and though everything was read."""
    tensors = three(5, LARGE, MIDDLE)
    watch = watch_of(*tensors)
    for _ in range(3):
        torch.cat([tensor.detach() for tensor in tensors]).sum()
        (tensors[0] * 2).sum().backward()
        assert watch.changed(tensors) == set()


def test_without_tensors_nothing_is_named() -> None:
    """As for a worker whose groups are empty."""
    watch = watch_of()
    assert watch.changed([]) == set()


@pytest.mark.parametrize("numel", [6, MIDDLE, LARGE])
def test_a_write_under_no_grad_names_its_tensor_only(numel: int) -> None:
    """Wherever in the tensor it was: a version has no sample."""
    tensors = three(numel, numel, numel)
    for place in (0, 1, numel // 2 + 1, numel - 1):
        watch = watch_of(*tensors)
        with torch.no_grad():
            tensors[1][place] += 1
        assert watch.changed(tensors) == {1}


def test_a_write_that_leaves_the_content_as_it_was_may_be_named() -> None:
    """The version moves, which is reason enough; a later look says the same."""
    tensors = three()
    watch = watch_of(*tensors)
    with torch.no_grad():
        tensors[2].mul_(1)
    assert watch.changed(tensors) == {2}
    assert watch.changed(tensors) == {2}


def test_what_is_remembered_anew_is_in_order_again() -> None:
    """After a write of each kind."""
    tensors = three(5, LARGE, 7)
    watch = watch_of(*tensors)
    writes: list[Callable[[], Any]] = [
        tensors[0].data.zero_,
        lambda: setattr(tensors[1], "data", torch.ones(LARGE)),
        lambda: nn.init.ones_(tensors[2]),
    ]
    for write in writes:
        write()
        assert watch.changed(tensors)
        watch.remember(tensors)
        assert watch.changed(tensors) == set()


def test_data_that_is_assigned_names_its_tensor_only() -> None:
    """Its pointer is another, though the content is equal."""
    tensors = three()
    watch = watch_of(*tensors)
    tensors[0].data = tensors[0].detach().clone()
    assert watch.changed(tensors) == {0}


def test_a_tensor_in_another_s_place_is_named() -> None:
    """Of equal content."""
    tensors = three()
    watch = watch_of(*tensors)
    tensors[1] = nn.Parameter(tensors[1].detach().clone())
    assert watch.changed(tensors) == {1}


def test_tensors_that_change_places_are_named() -> None:
    """Both of them."""
    tensors = three(4, 4, 4)
    watch = watch_of(*tensors)
    assert watch.changed([tensors[1], tensors[0], tensors[2]]) == {0, 1}


def test_a_view_of_the_same_memory_further_on_is_another_tensor() -> None:
    """The pointer counts, not the storage."""
    memory = torch.zeros(10)
    tensor = nn.Parameter(memory[:5])
    watch = watch_of(tensor)
    tensor.data = memory[5:]
    assert watch.changed([tensor]) == {0}


# --- writes that only the content shows


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_write_that_only_the_content_shows_names_its_tensor(which: int) -> None:
    """Over all of it, whatever its size, and no other beside it."""
    tensors = three(5, MIDDLE, LARGE)
    watch = watch_of(*tensors)
    tensors[which].data.add_(1)
    assert watch.changed(tensors) == {which}


def test_a_hidden_write_beside_a_counted_one_is_seen() -> None:
    """Each of the tensors is looked at for itself."""
    tensors = three()
    watch = watch_of(*tensors)
    with torch.no_grad():
        tensors[0].zero_()
    tensors[2].data[6] = -1
    assert watch.changed(tensors) == {0, 2}


def test_a_look_between_two_writes_does_not_take_the_first_for_in_order() -> None:
    """Only `remember` does; undone, it is none."""
    tensors = three()
    watch = watch_of(*tensors)
    before = tensors[1].data.clone()
    tensors[1].data.zero_()
    assert watch.changed(tensors) == {1}
    with torch.no_grad():
        tensors[0].add_(1)
    assert watch.changed(tensors) == {0, 1}
    tensors[1].data.copy_(before)
    assert watch.changed(tensors) == {0}


def test_content_is_remembered_anew_where_the_memory_is_the_same() -> None:
    """As after a step, which writes every value in place."""
    tensors = three(5, MIDDLE, LARGE)
    watch = watch_of(*tensors)
    for step in range(3):
        for tensor in tensors:
            tensor.data.add_(step)
        watch.remember(tensors)
        assert watch.changed(tensors) == set()
        tensors[step].data[0] += 1
        assert watch.changed(tensors) == {step}
        watch.remember(tensors)


DTYPES: Final = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
LAYOUTS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor,
    "strided": lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
    "offset": lambda tensor: torch.stack([tensor, tensor])[1],
}


def patterns(dtype: torch.dtype) -> st.SearchStrategy[int]:
    """Bit patterns of a real element, those of NaNs, zeros and infinities among them."""
    size = 8 * dtype.itemsize // (2 if dtype.is_complex else 1)
    special = {
        16: [0x7FC0, 0x7FC1, 0x8000, 0, 0x7F80, 0x7E00],
        32: [0x7FC00000, 0x7FC00001, 0x80000000, 0, 0x7F800000],
        64: [0x7FF8 << 48, (0x7FF8 << 48) + 1, 1 << 63, 0, 0x7FF0 << 48],
    }[size]
    return st.one_of(st.sampled_from(special), st.integers(0, 2**size - 1))


def element_of(pattern: int, dtype: torch.dtype) -> torch.Tensor:
    """The 0-dim tensor with these bits; of a complex one, in both of its parts."""
    size = dtype.itemsize // (2 if dtype.is_complex else 1)
    data = bytearray(pattern.to_bytes(size, "little") * (dtype.itemsize // size))
    return torch.frombuffer(data, dtype=dtype)[0]


def write_bits(tensor: torch.Tensor, place: tuple[int, ...], element: torch.Tensor) -> bool:
    """Puts an element in place through `.data`. Whether its bits are others than before."""
    target = torch.view_as_real(tensor.data[place]) if tensor.is_complex() else tensor.data[place]
    source = torch.view_as_real(element) if element.is_complex() else element
    bits = BITS[target.element_size()]
    differs = not torch.equal(target.view(bits), source.view(bits))
    target.view(bits).copy_(source.view(bits))
    return differs


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_each_element_of_a_small_tensor_counts_by_its_bits(data: st.DataObject) -> None:
    """Whatever the dtype and the strides: named where the bits are others, and not where they are the same."""
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3)))
    layout = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    fill = element_of(data.draw(patterns(dtype)), dtype)
    tensor = layout(fill.expand(shape).clone())
    others = three()
    tensors = [others[0], tensor, others[1]]
    place = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    watch = watch_of(*tensors)
    version = tensor._version
    differs = write_bits(tensor, place, element_of(data.draw(patterns(dtype)), dtype))
    assert tensor._version == version
    assert watch.changed(tensors) == ({1} if differs else set())


@pytest.mark.parametrize("numel", [1, WHOLE_UP_TO - 1, WHOLE_UP_TO])
def test_a_tensor_that_is_small_enough_is_compared_whole(numel: int) -> None:
    """Up to and including the limit, to its last element."""
    tensor = nn.Parameter(torch.zeros(numel))
    for place in {0, numel // 3, numel // 2 + 1, numel - 2, numel - 1} & set(range(numel)):
        watch = watch_of(tensor)
        tensor.data[place] = 1
        assert watch.changed([tensor]) == {0}, place


def test_elements_of_a_small_tensor_that_change_places_are_seen() -> None:
    """Also two that lie side by side in halves of words, whose sum stays the same."""
    tensor = nn.Parameter(torch.arange(WHOLE_UP_TO, dtype=torch.float32))
    watch = watch_of(tensor)
    for place in (0, WHOLE_UP_TO // 2, WHOLE_UP_TO - 3):
        tensor.data[[place, place + 2]] = tensor.data[[place + 2, place]]
        assert watch.changed([tensor]) == {0}, place
        watch.remember([tensor])


def test_a_nan_that_stays_is_no_change_and_a_zero_of_another_sign_is_one() -> None:
    """Bits are compared, not numbers; a NaN of other bits is another NaN."""
    tensor = nn.Parameter(torch.tensor([math.nan, 0.0, 1.0]))
    watch = watch_of(tensor)
    assert watch.changed([tensor]) == set()
    tensor.data[1] = -0.0
    assert watch.changed([tensor]) == {0}
    watch.remember([tensor])
    (other,) = struct.unpack("<f", struct.pack("<I", 0x7FC00123))
    tensor.data.view(torch.int32)[0] = struct.unpack("<i", struct.pack("<I", 0x7FC00123))[0]
    assert math.isnan(other)
    assert tensor[0].isnan()
    assert watch.changed([tensor]) == {0}


# --- sums of larger ones, and samples of the largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("numel", [WHOLE_UP_TO + 1, WHOLE_UP_TO + 257, SUMMED_UP_TO - 1, SUMMED_UP_TO])
def test_each_element_of_a_tensor_that_is_summed_counts(numel: int, dtype: torch.dtype) -> None:
    """Wherever it is: in the first block, in the last, or in what is left behind it."""
    tensor = nn.Parameter(torch.arange(numel).to(dtype))
    watch = watch_of(tensor)
    for place in (0, 1, 255, 256, 2047, 2048, numel // 2 + 1, numel - 257, numel - 2, numel - 1):
        before = tensor.data[place].clone()
        tensor.data[place] = -7
        assert watch.changed([tensor]) == {0}, place
        tensor.data[place] = before
        assert watch.changed([tensor]) == set(), place


def test_elements_that_change_places_between_blocks_are_seen() -> None:
    """Each block has a sum of its own."""
    tensor = nn.Parameter(torch.arange(MIDDLE, dtype=torch.float32))
    watch = watch_of(tensor)
    tensor.data[[0, MIDDLE // 2]] = tensor.data[[MIDDLE // 2, 0]]
    assert watch.changed([tensor]) == {0}


def test_a_summed_tensor_that_begins_between_two_words_is_seen_as_any_other() -> None:
    """Four bytes into memory that is read by eight."""
    memory = torch.zeros(MIDDLE + 1)
    tensor = nn.Parameter(memory[1:])
    watch = watch_of(tensor)
    memory.data[0] = 1
    assert watch.changed([tensor]) == set()
    for place in (1, MIDDLE // 2, MIDDLE):
        memory.data[place] += 1
        assert watch.changed([tensor]) == {0}, place
        watch.remember([tensor])


@pytest.mark.parametrize("numel", [SUMMED_UP_TO + 1, SUMMED_UP_TO + 255, LARGE, LARGE + 1])
def test_a_large_tensor_is_sampled_from_its_first_element_to_its_end(numel: int) -> None:
    """A write to a 255th of it is seen wherever it is, at both ends too."""
    tensor = nn.Parameter(torch.zeros(numel))
    length = math.ceil(numel / (RUNS - 1))
    for start in (0, 1, 17, numel // 2, numel // 3, numel - length):
        watch = watch_of(tensor)
        tensor.data[start : start + length] += 1
        assert watch.changed([tensor]) == {0}, start
    watch = watch_of(tensor)
    tensor.data[0] += 1
    assert watch.changed([tensor]) == {0}


@pytest.mark.parametrize("rows", [256, 1000])
def test_a_write_to_one_row_of_a_large_table_is_seen(rows: int) -> None:
    """As to one embedding: each row of at least 1 KiB is met."""
    tensor = nn.Parameter(torch.zeros(rows, max(256, LARGE // rows)))
    assert tensor.numel() > SUMMED_UP_TO
    watch = watch_of(tensor)
    for row in (0, 1, rows // 2 + 1, rows - 1):
        tensor.data[row] += 1
        assert watch.changed([tensor]) == {0}, row
        watch.remember([tensor])


def test_a_write_between_the_samples_is_missed() -> None:
    """What is looked at of the largest tensors is a part of them: such a write has to be announced."""
    tensors = three(LARGE, 5)
    watch = watch_of(*tensors)
    stride = (LARGE - 16) // (RUNS - 1)
    tensors[0].data[stride - 1] += 1
    assert watch.changed(tensors) == set()
    tensors[0].data[stride] += 1
    assert watch.changed(tensors) == {0}


LARGE_ONES: Final[dict[str, Callable[[int], torch.Tensor]]] = {
    "transposed": lambda n: torch.zeros(200 * n, 100).t(),
    "channels_last": lambda n: torch.zeros(8 * n, 16, 9, 9).to(memory_format=torch.channels_last),
    "permuted": lambda n: torch.zeros(20 * n, 30, 40).permute(2, 0, 1),
    "strided": lambda n: torch.zeros(20_000 * n, 3)[:, 1],
    "sliced": lambda n: torch.zeros(100 * n, 300)[::2, 5:205],
    "expanded": lambda n: torch.zeros(100, 1).expand(100, 200 * n),
    "of_one_element": lambda n: torch.zeros(()).expand(20_000 * n),
    "offset": lambda n: torch.zeros(20_000 * n + 8)[7:-1],
    "with_ones": lambda n: torch.zeros(1, 100, 1, 200 * n, 1),
    "complex": lambda n: torch.zeros(100 * n, 200, dtype=torch.complex64),
    "conjugate": lambda n: torch.zeros(100 * n, 200, dtype=torch.complex64).conj(),
    "bfloat16": lambda n: torch.zeros(100 * n, 200, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("times", [1, 20], ids=["summed", "sampled"])
@pytest.mark.parametrize("make", LARGE_ONES.values(), ids=LARGE_ONES)
def test_large_tensors_of_any_strides_are_watched(make: Callable[[int], torch.Tensor], times: int) -> None:
    """A write over all of one is seen, what lies beside it in memory is not its business, and reading is no write."""
    tensor = make(times)
    assert (WHOLE_UP_TO if times == 1 else SUMMED_UP_TO) < tensor.numel()
    assert (tensor.numel() > SUMMED_UP_TO) == (times > 1)
    watch = watch_of(tensor)
    assert watch.changed([tensor]) == set()
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    inside = torch.zeros(whole.numel(), dtype=torch.bool)
    inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    whole[~inside] = 5
    assert watch.changed([tensor]) == set()
    whole[inside] = 5
    assert watch.changed([tensor]) == {0}


def test_what_is_sampled_of_a_large_tensor_is_small() -> None:
    """What is remembered costs no more than a tensor at the limit, or a sixteenth of a large one."""
    for times in (1, 20, 40):
        for name, make in LARGE_ONES.items():
            tensor = make(times)
            (mark,) = watch_of(tensor)._marks
            assert mark is not None
            kept = (
                sum(part.nbytes for part in mark.content)
                if isinstance(mark.content, tuple)
                else sys.getsizeof(mark.content)
            )
            assert kept <= max(WHOLE_UP_TO * 8, tensor.nbytes / 16), (name, times)


# --- what else there may be


def test_tensors_without_elements_are_never_named() -> None:
    """They have nothing to be written to, and no memory."""
    tensors = [torch.zeros(0, 3), torch.zeros(4), torch.zeros(2, 0, dtype=torch.bfloat16)]
    watch = watch_of(*tensors)
    assert watch.changed(tensors) == set()
    tensors[1].data.add_(1)
    assert watch.changed(tensors) == {1}


def test_tensors_of_several_dtypes_are_watched_at_once() -> None:
    """A write to one of any of them is seen beside one that torch counts in another."""
    tensors = [torch.zeros(3, dtype=dtype) for dtype in DTYPES for _ in range(2)]
    for index, tensor in enumerate(tensors):
        watch = watch_of(*tensors)
        tensors[0].add_(1)
        assert watch.changed(tensors) == {0}
        tensor.data[2] = 1 + index
        assert watch.changed(tensors) == {0, index}


def test_what_no_server_holds_is_never_named() -> None:
    """Integers of a quantized model, parameters without memory: no value of theirs is anywhere else."""
    integers, meta = torch.zeros(3, dtype=torch.int64), torch.zeros(3, device="meta")
    tensors = [integers, meta, nn.UninitializedParameter(), torch.zeros(3)]
    watch = watch_of(*tensors)
    integers.add_(1)
    assert watch.changed(tensors) == set()
    tensors[3].add_(1)
    assert watch.changed(tensors) == {3}


def test_a_tensor_that_comes_to_be_held_or_ceases_to_be_is_not_taken_for_the_same() -> None:
    """Once it has memory it is remembered like any other; one that was taken to the meta device is another."""
    tensor = nn.Parameter(torch.zeros(3))
    watch = watch_of(tensor)
    assert watch.changed([nn.Parameter(torch.zeros(3, device="meta"))]) == {0}
    watch.remember([nn.Parameter(torch.zeros(3, device="meta"))])
    watch.remember([tensor])
    tensor.data[0] = 1
    assert watch.changed([tensor]) == {0}


def test_tensors_made_in_inference_mode_are_watched_by_their_content() -> None:
    """They keep no version to look at."""
    with torch.inference_mode():
        tensors = [torch.zeros(3), torch.zeros(4)]
    watch = watch_of(*tensors)
    assert watch.changed(tensors) == set()
    with torch.inference_mode():
        tensors[0].add_(1)
    assert watch.changed(tensors) == {0}


def test_a_watch_goes_on_outside_of_inference_mode_and_in_it() -> None:
    """Whichever it was in when it remembered."""
    tensors = three(5, MIDDLE, LARGE)
    for first, then in ((True, False), (False, True)):
        with torch.inference_mode(first):
            watch = watch_of(*tensors)
        with torch.inference_mode(then):
            assert watch.changed(tensors) == set()
            tensors[0].data[0] += 1
            assert watch.changed(tensors) == {0}
            watch.remember(tensors)
            assert watch.changed(tensors) == set()


def test_shared_memory_is_watched_through_each_of_its_tensors() -> None:
    """Tied values that are different Parameters: views share a version, Parameters over `.data` do not."""
    memory = torch.zeros(8)
    tensors = [nn.Parameter(memory), nn.Parameter(memory[2:6])]
    watch = watch_of(*tensors)
    assert watch.changed(tensors) == set()
    tensors[0].data[3] = 1
    assert watch.changed(tensors) == {0, 1}


def test_the_memory_of_a_tensor_that_has_moved_may_be_gone() -> None:
    """It is not looked at any more, while its neighbours are."""
    tensors = three(5, LARGE, 7)
    watch = watch_of(*tensors)
    left = tensors[1].untyped_storage()
    tensors[1].data = torch.ones(LARGE)
    left.resize_(0)
    assert watch.changed(tensors) == {1}
    tensors[2].data[0] += 1
    assert watch.changed(tensors) == {1, 2}
    watch.remember(tensors)
    assert watch.changed(tensors) == set()


def test_a_tensor_of_another_shape_in_the_same_memory_is_sampled_anew() -> None:
    """Once it is remembered; the old sample would not look at what it has grown by."""
    memory = torch.zeros(2, 300)
    tensor = nn.Parameter(memory[0])
    watch = watch_of(tensor)
    tensor.data = memory
    watch.remember([tensor])
    assert watch.changed([tensor]) == set()
    tensor.data[1, 200] = 1
    assert watch.changed([tensor]) == {0}


def test_more_tensors_or_fewer_can_be_remembered() -> None:
    """As parameters are added and taken away."""
    tensors = three(4, MIDDLE, LARGE)
    watch = watch_of(*tensors[:1])
    for count in (3, 2):
        watch.remember(tensors[:count])
        assert watch.changed(tensors[:count]) == set()
        tensors[count - 1].data[0] += 1
        assert watch.changed(tensors[:count]) == {count - 1}
        watch.remember(tensors[:count])


def test_as_many_tensors_as_are_remembered_are_compared() -> None:
    """Another number of them cannot be told apart."""
    tensors = three()
    watch = watch_of(*tensors)
    with pytest.raises(ValueError, match="longer"):
        watch.changed(tensors[:2])


def test_watching_leaves_tensors_as_they_are() -> None:
    """Neither written to, nor made to keep a graph."""
    tensors = three(5, MIDDLE, LARGE)
    versions = [tensor._version for tensor in tensors]
    watch = watch_of(*tensors)
    watch.changed(tensors)
    watch.remember(tensors)
    assert [tensor._version for tensor in tensors] == versions
    assert all(tensor.requires_grad and tensor.grad_fn is None for tensor in tensors)
    kept = [part for mark in watch._marks if isinstance(mark.content, tuple) for part in mark.content]
    assert kept
    assert not any(part.requires_grad for part in kept)


@pytest.mark.parametrize("numel", [8192, 40_960, 131_072])
def test_float64_values_that_change_their_sign_are_seen(numel: int) -> None:
    """A block sums 256 int64 words: 256 sign bits of 2**63 are 0 modulo 2**64. numel: a multiple of 256."""
    tensor = nn.Parameter(torch.randn(numel, dtype=torch.float64))
    watch = ValueWatch()
    watch.remember([tensor])
    tensor.data.neg_()
    assert watch.changed([tensor]) == {0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_of_one_block_that_change_their_sign_alike_are_seen(dtype: torch.dtype) -> None:
    """An even number of sign bits must not drop out of the sums."""
    tensor = nn.Parameter(torch.rand(8192).to(dtype) + 1)
    watch = ValueWatch()
    watch.remember([tensor])
    tensor.data[5] *= -1
    tensor.data[99] *= -1
    assert watch.changed([tensor]) == {0}


def test_memory_that_is_given_out_again_is_not_taken_for_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is assigned later may lie at the same address, with the same version, and look the same where it is sampled.

    Which sizes come back at once is the allocator's business; small ones nearly always do.
    """
    monkeypatch.setattr("optimd.client.changes.SUMMED_UP_TO", 4096)
    tensor, mask = nn.Parameter(torch.ones(30_000)), torch.ones(30_000)
    mask[(30_000 - 16) // 255 - 1] = 0
    watch = ValueWatch()
    watch.remember([tensor])
    for _ in range(100):
        tensor.data = tensor.data * mask
        assert watch.changed([tensor]) == {0}


# --- looked at before all are in order


def test_a_tensor_that_was_looked_at_is_remembered_as_it_was_then() -> None:
    """So a write that nothing but the content shows, after that, counts."""
    tensors = [torch.randn(50), torch.randn(300_000)]
    watch = ValueWatch()
    for index, tensor in enumerate(tensors):
        watch.look_at(index, tensor)
    tensors[0].data[3] += 1
    watch.remember(tensors)
    assert watch.changed(tensors) == {0}
    watch.remember(tensors)
    assert watch.changed(tensors) == set()


@pytest.mark.parametrize("change", ["counted", "assigned", "replaced"])
def test_a_look_at_what_has_become_another_does_not_count(change: str) -> None:
    tensors = [torch.randn(50)]
    watch = ValueWatch()
    watch.look_at(0, tensors[0])
    if change == "counted":
        tensors[0].add_(1)
    elif change == "assigned":
        tensors[0].data = torch.randn(50)
    else:
        tensors[0] = torch.randn(50)
    watch.remember(tensors)
    assert watch.changed(tensors) == set()
    tensors[0].data[3] += 1
    assert watch.changed(tensors) == {0}
