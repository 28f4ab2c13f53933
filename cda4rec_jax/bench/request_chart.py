"""The waterfall of requests as a chart, where matplotlib is installed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cda4rec_jax.bench.charts import pyplot_if_installed
from cda4rec_jax.bench.request_systems import Waterfall

COLOURS = {"device": "tab:blue", "device_cache": "tab:cyan", "cloud": "tab:orange", "link": "tab:grey"}
WORDS = {"device_cache": "device's cache"}


def waterfall_chart(path: Path, title: str, waterfalls: Sequence[Waterfall]) -> bool:
    """A panel for each request, a bar for each part from its start to its end; False where matplotlib is not installed."""
    pyplot = pyplot_if_installed()
    if pyplot is None:
        return False
    heights = [len(one.parts) + 1.5 for one in waterfalls]
    size = (9.5, 0.9 + 0.34 * sum(heights))
    figure, axes = pyplot.subplots(len(waterfalls), 1, figsize=size, layout="constrained", squeeze=False, height_ratios=heights)
    for axis, waterfall in zip(axes[:, 0], waterfalls, strict=True):
        _draw(axis, waterfall)
    axes[-1, 0].set_xlabel("ms since the request began")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _draw(axis: Any, waterfall: Waterfall) -> None:
    end_ms, places = waterfall.latency_ms, range(len(waterfall.parts))
    for place, part in zip(places, waterfall.parts, strict=True):
        taken_ms = part.end_ms - part.start_ms
        axis.barh(place, taken_ms, left=part.start_ms, height=0.7, color=COLOURS[part.where], edgecolor=COLOURS[part.where])
        text = f"{taken_ms:.2f} ms, {part.start_ms:.2f} to {part.end_ms:.2f}"
        axis.text(1.01, place, text, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    axis.axvline(end_ms, color="black", linewidth=1, linestyle=":", clip_on=False)
    axis.set_yticks(places, [f"{part.name}, {WORDS.get(part.where, part.where)}" for part in waterfall.parts], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0.0, end_ms)
    axis.set_title(f"{waterfall.title}: {waterfall.plan}, slate after {end_ms:.2f} ms", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
