"""Curves of the benchmarks, where matplotlib is installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = tuple[Sequence[float], Sequence[float]]  # x and y


def curves(
    path: Path,
    panels: Mapping[str, Mapping[str, Curve]],
    x_label: str,
    y_labels: Sequence[str],
    ours: Sequence[str],
    *,
    log_x: bool,
) -> bool:
    """A panel for each title, a line for each system, ours in full and others dashed; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.2 * len(panels), 4.6), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axis, (title, lines), y_label in zip(axes[0], panels.items(), y_labels, strict=True):
        for number, name in enumerate(names):
            if name in lines:
                _draw(axis, lines[name], name, pyplot.colormaps["tab20"](number % 20), "o-" if name in ours else "s--")
        axis.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log", xscale="log" if log_x else "linear")
        axis.grid(alpha=0.3, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    drawn = {text: line for axis in axes[0] for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend([drawn[name] for name in names], names, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _draw(axis: Any, curve: Curve, name: str, colour: Any, style: str) -> None:
    points = sorted(zip(*curve, strict=True))
    axis.plot(*zip(*points, strict=True), style, label=name, color=colour, markersize=4, linewidth=1.4)
