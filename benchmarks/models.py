"""The models that are trained: named, seeded, and cheap to get gradients for.

What is measured is the optimizer, so a model here is a list of parameters of realistic shapes and a loss whose
backward gives each of them a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import torch
from torch import nn


class Model(Protocol):
    """What a benchmark needs of a model."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters, fp32, on the CPU."""

    def loss(self, step: int) -> torch.Tensor:
        """A loss that depends on every parameter, the same for equal parameters and equal `step`."""


class Perceptron(nn.Module):
    """Two linear layers over a fixed batch of 32 rows, with a forward and a backward of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 133), nn.ReLU(), nn.Linear(133, 10))
        self.register_buffer("inputs", torch.randn(32, 64))

    def loss(self, step: int) -> torch.Tensor:
        """Cross-entropy against classes that change with `step`."""
        classes = (torch.arange(32) + step) % 10
        return nn.functional.cross_entropy(self.layers(self.inputs), classes)


class ParameterSet(nn.Module):
    """Parameters of given shapes without the network around them.

    Forward and backward of a real network would dominate a run. Here the loss is a weighted sum of all elements: its
    backward takes no memory but for the gradients, and every gradient is a tensor of its own.
    """

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.empty(shape).normal_(std=0.02)) for shape in shapes)

    def loss(self, step: int) -> torch.Tensor:
        """Each parameter's sum times a factor of its own that changes with `step`."""
        terms = [p.sum() * math.sin(1.0 + step + index) for index, p in enumerate(self.parameters())]
        return torch.stack(terms).sum()


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


_MODELS: Final[dict[str, Callable[[], Model]]] = {
    "perceptron-10k": Perceptron,
    "resnet50-26m": lambda: ParameterSet(_resnet50_shapes()),
    "decoder-10m": lambda: ParameterSet(_decoder_shapes(320, 8)),
    "decoder-100m": lambda: ParameterSet(_decoder_shapes(1024, 8)),
}

NAMES: Final = tuple(_MODELS)
"""The models' names."""


def build(name: str) -> Model:
    """A new model; two of one name have equal values.

    Args:
        name: One of `NAMES`.
    """
    torch.manual_seed(0)
    return _MODELS[name]()


def compute_gradients(model: Model, step: int) -> None:
    """A backward from the loss of `step`: adds to the gradients that are there."""
    torch.autograd.backward(model.loss(step))


def parameter_count(model: Model) -> int:
    """The number of elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def bit_equal(one: Model, other: Model) -> bool:
    """Whether two models have the same parameters, to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
