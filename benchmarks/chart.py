"""The step times as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.peers import LOCAL
from benchmarks.step_time import StepTimes

_OURS: Final = "#1f77b4"
_LINE: Final = "#bbbbbb"
_PEERS: Final = "#ff7f0e"


def draw(path: Path, measured: Sequence[StepTimes]) -> None:
    """Writes a PNG: for each suite, what a step takes in steps of the local Adam, on a logarithmic scale.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'optimd[bench]'`).
    """
    # Needed by nothing else, and not by a run without a picture.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    heights = [1 + len(times.times) for times in measured]
    figure = Figure(figsize=(10, 0.28 * sum(heights) + 0.8 * len(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(measured), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, times in zip(panels, measured, strict=True):
        ratios = {name: times.ratio(name, LOCAL) or 0.0 for name in times.times}
        bars = panel.barh([*ratios], [*ratios.values()], color=[_colour(name) for name in ratios])
        panel.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        panel.set_xscale("log")
        panel.invert_yaxis()
        workers = "1 worker" if times.workers == 1 else f"{times.workers} workers"
        panel.set_title(f"{times.model}, {workers}: step / local fused Adam step", fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
    figure.savefig(path, format="png", dpi=120)


def _colour(name: str) -> str:
    if name.startswith("optimd"):
        return _OURS
    return _LINE if name.startswith("raw") or name == LOCAL else _PEERS
