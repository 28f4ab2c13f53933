"""Charts of the benchmarks, where matplotlib is installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cda4rec_jax.timing import Spread

Curve = tuple[Sequence[float], Sequence[float]]  # x and y


def pyplot_if_installed() -> Any:
    """``matplotlib.pyplot`` for files; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def bar_chart(path: Path, title: str, unit: str, rates: Mapping[str, Spread], ours: Sequence[str], *, log: bool = False) -> bool:
    """One bar for each system, the 10th to 90th percentile on it; False where matplotlib is not installed."""
    pyplot = pyplot_if_installed()
    if pyplot is None:
        return False
    names = list(rates)
    medians = [rates[name].median for name in names]
    errors = [
        [max(0.0, rates[name].median - rates[name].p10) for name in names],
        [max(0.0, rates[name].p90 - rates[name].median) for name in names],
    ]
    figure, axes = pyplot.subplots(figsize=(9.0, 1.2 + 0.42 * len(names)), layout="constrained")
    colours = ["tab:blue" if name in ours else "tab:grey" for name in names]
    bars = axes.barh(names, medians, xerr=errors, color=colours, ecolor="black", capsize=3)
    axes.bar_label(bars, labels=[f"{median:,.0f}" if median >= 100.0 else f"{median:.3g}" for median in medians], padding=6)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xscale("log" if log else "linear")
    axes.set_xlabel(unit)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


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
    pyplot = pyplot_if_installed()
    if pyplot is None:
        return False
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
