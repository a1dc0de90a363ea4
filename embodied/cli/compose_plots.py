"""A search over weights as a picture: a curve for two members, a triangle for three."""

from pathlib import Path
from typing import Any

import numpy as np

from embodied.core.files import write_atomic
from embodied.core.intervals import bootstrap_mean, wilson

_HEIGHT = 3**0.5 / 2


def write_plot(folder: Path, results: dict[str, Any]) -> Path | None:
    """weights.svg in the folder; None where there is nothing to draw: not two or three members."""
    count = len(results["members"])
    if not results["tried"] or count not in (2, 3):
        return None
    from embodied.cli.report import new_figure, svg

    figure, axes = new_figure()
    draw = _curve if count == 2 else _triangle
    draw(figure, axes, results)
    path = folder / "weights.svg"
    write_atomic(path, svg(figure).encode())
    return path


def interval(scores: list[float]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's for successes, else the bootstrap's."""
    if set(scores) <= {0.0, 1.0}:
        return wilson(int(sum(scores)), len(scores))
    return bootstrap_mean(scores)


def _curve(figure: Any, axes: Any, results: dict[str, Any]) -> None:
    rows = sorted(results["tried"], key=lambda row: row["weights"][0])
    x = [row["weights"][0] for row in rows]
    means = np.array([row["mean"] for row in rows])
    bounds = np.array([interval(row["scores"]) for row in rows])
    errors = np.abs(bounds.T - means)
    sizes = [row["episodes"] for row in rows]
    axes.errorbar(x, means, yerr=errors, fmt="none", alpha=0.4)
    axes.plot(x, means, linewidth=1)
    axes.scatter(x, means, s=[12 + size for size in sizes], label="search seeds, size: episodes")
    fresh = results["contenders"]
    axes.plot(
        [1.0, 0.0, results["weights"][0]],
        [fresh[name]["mean"] for name in (*results["members"], "composed")],
        linestyle="none",
        marker="x",
        color="black",
        label="fresh seeds: parents and the choice",
    )
    axes.set(xlabel=f"weight of {results['members'][0]}", ylabel=f"mean {results['metric']}")
    axes.legend(frameon=False, fontsize=7)


def _triangle(figure: Any, axes: Any, results: dict[str, Any]) -> None:
    weights = np.array([row["weights"] for row in results["tried"]])
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, _HEIGHT]])
    at = weights @ corners
    means = [row["mean"] for row in results["tried"]]
    axes.plot(*np.vstack([corners, corners[:1]]).T, color="grey", linewidth=0.8)
    dots = axes.scatter(*at.T, c=means, s=[20 + r["episodes"] for r in results["tried"]])
    axes.scatter(*(np.array(results["weights"]) @ corners), marker="x", color="red", label="choice")
    for name, (x, y), away in zip(results["members"], corners, (-0.06, -0.06, 0.06), strict=True):
        axes.text(x, y + away, name, ha="center", va="center", fontsize=8)
    figure.colorbar(dots, label=f"mean {results['metric']} on search seeds")
    axes.set(aspect="equal", xlim=(-0.15, 1.15), ylim=(-0.15, _HEIGHT + 0.15))
    axes.axis("off")
    axes.legend(frameon=False, fontsize=7, loc="upper right")
