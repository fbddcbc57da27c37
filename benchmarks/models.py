"""The models that are trained: named, seeded, and cheap to get gradients for.

What is measured is the optimizer, so a model here is a list of parameters of realistic shapes and a loss whose
backward gives each of them a gradient.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import nn

_FACTOR_STEPS: Final = 128
"""Gradients are multiples of 1/128 between -1 and 1."""
_PACE: Final = 128
"""The rows and columns of what a paced model multiplies."""


class Model(nn.Module):
    """Parameters of given shapes without the network around them, fp32, on the CPU.

    Forward and backward of a real network would dominate a run. Here the loss is a weighted sum of all elements: its
    backward takes no memory but for the gradients, and every gradient is a tensor of its own. The weights are such that
    sums and means of up to four workers' gradients are exact: in whatever order they are added up, the result has the
    same bits, so that every way to train can be held against every other.

    Args:
        shapes: Of the parameters.
        multiplications: How many of 128 x 128 stand between the parameters, in proportion to their elements: gradients
            become ready evenly over a backward that takes as long as that.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], multiplications: int = 0) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.empty(shape).normal_(std=0.02)) for shape in shapes)
        self._multiplications = multiplications

    def forward(self, step: int, ranks: Sequence[int] = (0,)) -> torch.Tensor:
        """The loss, which depends on every parameter: equal for equal parameters, steps and ranks.

        Args:
            step: Which step's.
            ranks: Whose: of several, the gradient is the mean of theirs.
        """
        if self._multiplications:
            return self._paced(step, ranks)
        terms = [p.sum() * _factor(step, index, ranks) for index, p in enumerate(self.parameters())]
        return torch.stack(terms).sum()

    def _paced(self, step: int, ranks: Sequence[int]) -> torch.Tensor:
        # Multiplying by a permutation costs what any product costs, and leaves every bit of the gradients as it was.
        permutation = torch.eye(_PACE).roll(1, 0)
        total = parameter_count(self)
        value = torch.zeros(_PACE, _PACE)
        elements = made = 0
        for index, parameter in enumerate(self.parameters()):
            value = value + parameter.sum() * (_factor(step, index, ranks) / _PACE**2)
            elements += parameter.numel()
            due = self._multiplications * elements // total
            for _ in range(due - made):
                value = value @ permutation
            made = due
        return value.sum()


def _factor(step: int, index: int, ranks: Sequence[int]) -> float:
    """The gradient of each element of one parameter."""
    factors = [round(math.sin(1.0 + step + index + 2.0 * rank) * _FACTOR_STEPS) for rank in ranks]
    return sum(factors) / len(factors) / _FACTOR_STEPS


def _resnet50_shapes() -> list[tuple[int, ...]]:
    """ResNet-50 (He et al., https://arxiv.org/abs/1512.03385): 161 tensors, most of them of 64 to 2048 elements."""
    shapes: list[tuple[int, ...]] = []

    def convolution(into: int, out_of: int, kernel: int) -> None:
        shapes.extend([(into, out_of, kernel, kernel), (into,), (into,)])

    convolution(64, 3, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(width, channels, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def _decoder_shapes(width: int, layers: int) -> list[tuple[int, ...]]:
    """A stack of pre-norm transformer layers without embeddings: about 12 width^2 elements each."""
    norm: list[tuple[int, ...]] = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    feed_forward = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*norm, *attention, *norm, *feed_forward] * layers


_SHAPES: Final[dict[str, Callable[[], list[tuple[int, ...]]]]] = {
    # Two linear layers. Four tensors: this one is about round trips.
    "perceptron-10k": lambda: [(133, 64), (133,), (10, 133), (10,)],
    "resnet50-26m": _resnet50_shapes,
    "decoder-10m": lambda: _decoder_shapes(256, 13),
    "decoder-100m": lambda: _decoder_shapes(800, 13),
}

NAMES: Final = tuple(_SHAPES)
"""The models' names."""


def build(name: str, multiplications: int = 0) -> Model:
    """A new model; two of one name have equal values.

    Args:
        name: One of `NAMES`.
        multiplications: What its backward computes besides, see `Model`.
    """
    torch.manual_seed(0)
    return Model(_SHAPES[name](), multiplications)


def compute_gradients(model: Model, step: int, ranks: Sequence[int] = (0,)) -> None:
    """A backward from the loss of `step`: adds to the gradients that are there."""
    torch.autograd.backward(model(step, ranks))


def parameter_count(model: Model) -> int:
    """The number of elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def bit_equal(one: Model, other: Model) -> bool:
    """Whether two models have the same parameters, to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def digest(model: Model) -> str:
    """A checksum of all parameters' bits, which two processes can compare."""
    checksum = hashlib.sha256()
    for parameter in model.parameters():
        checksum.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return checksum.hexdigest()
