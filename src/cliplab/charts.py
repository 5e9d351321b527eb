"""The PNGs of a run that are no pictures of retrievals: its curves and its modality audit. Colours: Okabe and Ito's.

Charts are drawn when results.json is written: one that can't be drawn is a warning, and loses nothing.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from cliplab.evaluation.audit import SHARES, Audit
from cliplab.training.loggers import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"),
    "#8C8C8C",
)
_SHARE_COLOURS = dict(zip(SHARES, (SKY, ORANGE, BLUE, GREEN, VERMILION, GREY), strict=True))
_DASHES, _MARKERS = ((4, 1.5), (1, 1.2), (5, 1.5, 1, 1.5), (8, 2)), "s^Dv"
# What a plotting package, its fonts or a full disk may raise; interrupts and assertions pass.
_FAILURES = (ImportError, AttributeError, OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)


def save_chart(draw: Callable[[], Figure], path: Path) -> None:
    """Draw and write a PNG, whole or not at all; log a warning that says why where it fails."""
    try:
        png = io.BytesIO()
        draw().savefig(png, format="png", dpi=130)
        path.write_bytes(png.getvalue())
    except _FAILURES as error:
        log.warning("no chart %s: %s: %s. The results are complete without it", path, type(error).__name__, error)


def audit_figure(audit: Audit, title: str = "") -> Figure:
    """One panel per K with the benchmarks side by side; of one benchmark, one panel with the Ks side by side."""
    from matplotlib.figure import Figure

    names = [name for name in audit if name != "mean" or len(audit) > 2]
    kinds = list(audit[names[0]])
    panels = {f"solved at {k.removeprefix('R@')}": {name: audit[name][k] for name in names} for k in kinds}
    if len(names) == 1:
        panels = {names[0]: {f"at {k.removeprefix('R@')}": audit[names[0]][k] for k in kinds}}
    groups = max(len(panel) for panel in panels.values())
    figure = Figure(figsize=(max(9.0, 1.2 + 3.0 * groups), 1.5 + 2.7 * len(panels)), layout="constrained")
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for (name, panel), axes in zip(panels.items(), grid, strict=True):
        _share_bars(axes, panel)
        axes.set_title(name, loc="left", fontsize=10)
    handles, _ = grid[0].get_legend_handles_labels()
    figure.legend(handles, SHARES.values(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _share_bars(axes: Axes, panel: Mapping[str, Mapping[str, float]]) -> None:
    """A group of bars per benchmark or K."""
    width = 0.86 / len(SHARES)
    for place, (share, colour) in enumerate(_SHARE_COLOURS.items()):
        x = [group + (place - (len(SHARES) - 1) / 2) * width for group in range(len(panel))]
        hatch = {"lost": "//", "unsolved": ".."}.get(share)
        heights = [shares[share] for shares in panel.values()]
        bars = axes.bar(x, heights, 0.92 * width, color=colour, hatch=hatch, edgecolor="white", label=share)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    axes.set_xticks(range(len(panel)), list(panel))
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 25))
    axes.set_ylabel("queries, %")
    _plain(axes)


def curves_figure(curves: Curves, title: str = "") -> Figure:
    """Two panels: the training loss over steps, and the recalls of the validations over epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    left, right = figure.subplots(1, 2)
    _loss(left, curves.loss)
    _recalls(right, curves.recalls)
    if curves.recalls:
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _loss(axes: Axes, loss: Mapping[int, float]) -> None:
    steps, values = list(loss), list(loss.values())
    window = max(len(values) // 20, 1)
    marks = {"marker": "o", "markersize": 4} if len(steps) < 30 else {}
    axes.plot(steps, values, color=SKY if window > 1 else BLUE, linewidth=1.2, **marks)
    if window > 1:  # a noisy curve with its running mean
        means = [sum(values[max(0, end - window) : end]) / min(end, window) for end in range(1, len(values) + 1)]
        axes.plot(steps, means, color=BLUE, linewidth=2)
        axes.text(0.98, 0.96, f"dark: mean of the last {window} values", transform=axes.transAxes, **_NOTE)
    axes.set(xlabel="step", ylabel="training loss")
    _plain(axes)
    if not steps:
        _say(axes, "no training loss was logged:\nthe run is shorter than trainer.log_every_n_steps")


def _recalls(axes: Axes, recalls: Mapping[str, Mapping[int, float]]) -> None:
    """Colours are the Ks; the mean is the thick line, benchmarks are dashed."""
    keys = sorted((name != "mean", name, int(k)) for name, k in (key.split("/R@") for key in recalls))
    kinds, others = sorted({k for *_, k in keys}), list(dict.fromkeys(name for is_other, name, _ in keys if is_other))
    colours = dict(zip(kinds, cycle((BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)), strict=False))
    styles = dict(zip(others, cycle(zip(_DASHES, _MARKERS, strict=True)), strict=False))
    for is_other, name, k in keys:
        points = recalls[f"{name}/R@{k}"]
        if is_other:
            dashes, marker = styles[name]
            style = {"dashes": dashes, "marker": marker, "markersize": 4, "linewidth": 1.1, "alpha": 0.8}
        elif len(others) > 1:
            style = {"marker": "o", "markersize": 5, "linewidth": 2.6, "zorder": 3}
        else:
            continue
        axes.plot(list(points), list(points.values()), color=colours[k], label=f"{name}/R@{k}", **style)
    axes.set(xlabel="epochs trained", ylabel="validation recall, %", ylim=(0, 102))
    _plain(axes)
    if not recalls:
        _say(axes, "no validation was reached")


_NOTE = {"ha": "right", "va": "top", "fontsize": 8, "color": "#444444"}


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#444444")
    axes.set(xticks=[], yticks=[])


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
