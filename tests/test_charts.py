import io
import logging
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from cliplab.charts import audit_figure, curves_figure, save_chart
from cliplab.evaluation.audit import SHARES, Audit
from cliplab.training.loggers import Curves


def audit(names: tuple[str, ...], kinds: tuple[str, ...] = ("R@10", "R@50")) -> Audit:
    """Every share of every benchmark and K has a height of its own."""
    rows = [(name, kind, share) for name in (*names, "mean") for kind in kinds for share in SHARES]
    height = {row: float(number) for number, row in enumerate(rows)}
    return {name: {k: {s: height[name, k, s] for s in SHARES} for k in kinds} for name in (*names, "mean")}


def full(names: tuple[str, ...]) -> Audit:
    """The widest labels, all side by side."""
    return {name: {"R@10": dict.fromkeys(SHARES, 100.0)} for name in (*names, "mean")}


def bars(axes: Axes) -> dict[str, dict[str, float]]:
    """Group -> share -> height, read from where the bars stand."""
    groups = [label.get_text() for label in axes.figure.axes[-1].get_xticklabels()]
    found: dict[str, dict[str, float]] = {group: {} for group in groups}
    for container in axes.containers:
        for bar in container.patches:
            group = groups[round(bar.get_x() + bar.get_width() / 2)]
            found[group][str(container.get_label())] = bar.get_height()
    return found


def texts(figure: Figure) -> list[tuple[str, Bbox]]:
    """What can be read, and where it stands."""
    figure.savefig(io.BytesIO(), format="png")
    found = [one for one in figure.findobj(Text) if isinstance(one, Text) and one.get_visible() and one.get_text()]
    beyond: set[int] = set()  # ticks that matplotlib keeps beyond the ends of an axis, and draws nowhere
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        beyond |= {id(tick.label1) for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    return [(text.get_text(), text.get_window_extent()) for text in found if id(text) not in beyond]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that are drawn over each other, legends and ticks included."""
    shown = [(text, box.shrunk(0.96, 0.9)) for text, box in texts(figure)]
    return [(a, b) for n, (a, one) in enumerate(shown) for b, other in shown[n + 1 :] if one.overlaps(other)]


def outside(figure: Figure) -> list[str]:
    """Texts that are cut off at the edge."""
    width, height = figure.bbox.size
    return [
        text for text, box in texts(figure) if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]


def test_one_panel_per_k_with_the_benchmarks_side_by_side() -> None:
    shares = audit(("dress", "shirt"))
    figure = audit_figure(shares, "fashioniq")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["solved at 10", "solved at 50"]
    for axes, kind in zip(figure.axes, ("R@10", "R@50"), strict=True):
        assert bars(axes) == {name: shares[name][kind] for name in ("dress", "shirt", "mean")}
        assert axes.get_ylabel() == "queries, %"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(SHARES.values())


def test_one_benchmark_has_one_panel_and_no_mean() -> None:
    shares = audit(("cirr",), ("R@1", "R@5"))
    (axes,) = audit_figure(shares).axes
    assert axes.get_title(loc="left") == "cirr"
    assert bars(axes) == {"at 1": shares["cirr"]["R@1"], "at 5": shares["cirr"]["R@5"]}


RECALLS = {
    f"{name}/R@{k}": {1: 5.0 * k**0.5, 2: 8.0 * k**0.5 + number}
    for number, name in enumerate(("dress", "shirt", "toptee", "mean"))
    for k in (10, 50)
}


def lines(axes: Axes) -> dict[str, dict[int, float]]:
    return {str(one.get_label()): dict(zip(*one.get_data(), strict=True)) for one in axes.lines}  # type: ignore[misc]


def test_curves_show_the_points_of_the_run() -> None:
    figure = curves_figure(Curves({9: 4.0, 19: 3.5}, RECALLS), "baseline")
    left, right = figure.axes
    assert (left.get_xlabel(), left.get_ylabel()) == ("step", "training loss")
    assert (right.get_xlabel(), right.get_ylabel()) == ("epochs trained", "validation recall, %")
    assert list(lines(left).values()) == [{9: 4.0, 19: 3.5}]
    assert lines(right) == RECALLS
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(RECALLS)
    mean, dress = ({str(one.get_label()): one for one in right.lines}[key] for key in ("mean/R@10", "dress/R@10"))
    assert mean.get_color() == dress.get_color() and mean.get_linewidth() > 2 * dress.get_linewidth()
    looks = [(line.get_color(), str(line.get_marker())) for line in right.lines]
    assert len(set(looks)) == len(looks), "every line can be told from the others"


def test_a_long_noisy_loss_has_its_running_mean() -> None:
    left, _ = curves_figure(Curves({step: float(step % 2) for step in range(100)}, RECALLS)).axes
    raw, mean = left.lines
    assert len(raw.get_xdata()) == len(mean.get_xdata()) == 100  # type: ignore[arg-type]
    assert list(mean.get_ydata())[:3] == [0.0, 0.5, 1 / 3]  # type: ignore[arg-type]
    assert set(list(mean.get_ydata())[10:]) == {0.4, 0.6}  # type: ignore[arg-type] # of five values each


def test_the_mean_over_one_benchmark_is_not_drawn() -> None:
    one = {"cirr/R@1": {1: 2.0}, "mean/R@1": {1: 2.0}}
    assert list(lines(curves_figure(Curves({}, one)).axes[1])) == ["cirr/R@1"]


def test_panels_without_values_say_why() -> None:
    left, right = curves_figure(Curves()).axes
    assert "log_every_n_steps" in left.texts[0].get_text()
    assert "no validation" in right.texts[0].get_text()


@pytest.mark.parametrize(
    "figure",
    [
        audit_figure(audit(("dress", "shirt", "toptee")), "fashioniq, split val, protocol clip4cir (queries in %)"),
        audit_figure(audit(("cirr",), ("R@1", "R@5", "R@10", "R@50")), "cirr, split val (queries in %)"),
        audit_figure(audit(("cirr",), ("R@1",)), "cirr, split val, protocol cirr (modality audit: queries in %)"),
        audit_figure(full(("dress", "shirt", "toptee"))),
        audit_figure(full(("a", "b"))),
        curves_figure(Curves({step: 1000.0 - step for step in range(0, 99999, 100)}, RECALLS), "baseline"),
        curves_figure(Curves()),
    ],
    ids=["audit of three", "audit of one", "audit of one K", "full bars", "fewer full bars", "curves", "empty curves"],
)
def test_no_text_lies_over_another_or_is_cut_off(figure: Figure) -> None:
    assert overlaps(figure) == []
    assert outside(figure) == []


def test_a_chart_is_a_png(tmp_path: Path) -> None:
    save_chart(lambda: curves_figure(Curves({1: 2.0}, RECALLS)), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.size[0] >= 1200


@pytest.mark.parametrize("error", [ValueError("no font"), OSError("disk full"), ImportError("no matplotlib")])
def test_a_chart_that_cant_be_drawn_is_a_warning_that_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def draw() -> Any:
        raise error

    (tmp_path / "audit.png").write_bytes(b"an earlier one")
    with caplog.at_level(logging.WARNING, logger="cliplab.charts"):
        logging.getLogger("cliplab").propagate = True
        save_chart(draw, tmp_path / "audit.png")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert all(part in record.getMessage() for part in ("audit.png", type(error).__name__, str(error)))
    assert (tmp_path / "audit.png").read_bytes() == b"an earlier one"


def test_an_interrupt_is_none(tmp_path: Path) -> None:
    def draw() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_chart(draw, tmp_path / "audit.png")
