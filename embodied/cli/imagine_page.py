"""What a world model predicts, as pictures, films, plots and one HTML page."""

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embodied.cli.pictures import column, data_url, strip
from embodied.core.files import write_atomic
from embodied.core.protocols import WorldModel
from embodied.run.imagination.errors import centre
from embodied.run.imagination.imagine import Imagination, Imagined

_FPS = 10.0
_ELEMENTS = 6
"""Elements of a state that are plotted."""


def keep(imagination: Imagination, episodes: list[Imagined]) -> tuple[dict[str, Any], Path]:
    """Write errors, inferred actions, pictures, films and the page into the output folder; returns
    the errors and where the page is."""
    output = Path(imagination.config.output)
    output.mkdir(parents=True, exist_ok=True)
    summary = imagination.summarise(episodes)
    write_atomic(output / "imagination.json", msgspec.json.encode(summary))
    for episode in episodes:
        data = io.BytesIO()
        np.savez(data, ticks=episode.ticks, inverse=episode.inverse, policy=episode.policy)
        write_atomic(output / f"{file_name(episode)}-actions.npz", data.getvalue())
    page = write_page(output, episodes, imagination.keys, imagination.model, summary)
    return summary, page


def write_page(
    output: Path,
    episodes: list[Imagined],
    keys: tuple[str, ...],
    model: WorldModel,
    summary: dict[str, Any],
) -> Path:
    """Write index.html, and beside it of every picture key STREAM-NUMBER-KEY.png and .mp4."""
    import jinja2

    offset = model.predicted_ticks[-1]
    sections: list[dict[str, Any]] = []
    for episode in episodes:
        plots: list[tuple[str, str]] = []
        films: list[tuple[str, str, str]] = []
        for key in keys:
            if model.spec.observation[key].dtype == "uint8":
                name = f"{file_name(episode)}-{key}"
                picture = _write_pictures(output, name, episode, key, offset)
                films.append((key, picture, f"{name}.mp4"))
            else:
                plots.append((key, _state_plot(episode, key, offset)))
        sections.append({"name": episode.recorded.name, "plots": plots, "films": films})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("embodied.cli", "templates"), autoescape=True
    )
    page = environment.get_template("imagine.html.j2").render(
        summary=summary,
        sections=sections,
        curves=[
            (key, _error_plot(summary, key)) for key in keys if "errors" in summary["open_loop"]
        ],
        ahead=offset,
        rows=("seen", f"predicted {offset} ticks ahead", "of predictions"),
    )
    path = output / "index.html"
    write_atomic(path, page.encode())
    return path


def file_name(episode: Imagined) -> str:
    """What the names of an episode's files begin with."""
    return episode.recorded.name.replace("/", "-")


def frames(episode: Imagined, key: str, offset: int) -> list[np.ndarray]:
    """For each window what was seen `offset` ticks later, the last that is predicted, what was
    predicted of it, and, if there is one, the newest prediction of predictions, one below the
    other: [H, W, 3], uint8."""
    found: list[np.ndarray] = []
    seen, rolled = episode.recorded.observation[key], episode.rolled.get(key)
    for predicted, tick in zip(episode.ahead[key][:, -1], episode.ticks + offset, strict=True):
        rows = [centre(seen[tick], predicted), predicted]
        if rolled is not None:
            before = int(np.searchsorted(episode.rolled_ticks, tick, side="right"))
            rows.append(rolled[before - 1] if before else np.full_like(predicted, 255))
        found.append(column(rows))
    return found


def _write_pictures(output: Path, name: str, episode: Imagined, key: str, offset: int) -> str:
    """Write the film and the strip; returns the latter as a data URL."""
    from embodied.run.video import write_film

    pictures = frames(episode, key, offset)
    png = strip(pictures)
    write_atomic(output / f"{name}.png", png)
    write_film(output / f"{name}.mp4", pictures, _FPS)
    return data_url(png)


def _state_plot(episode: Imagined, key: str, offset: int) -> str:
    from embodied.cli.report import new_figure, svg

    figure, axes = new_figure()
    true = _elements(episode.recorded.observation[key])
    ahead = _elements(episode.ahead[key][:, -1])
    for element in range(true.shape[1]):
        (line,) = axes.plot(true[:, element], linewidth=1)
        style = {"linestyle": "none", "color": line.get_color()}
        axes.plot(episode.ticks + offset, ahead[:, element], marker=".", markersize=3, **style)
        if key in episode.rolled:
            rolled = _elements(episode.rolled[key])[:, element]
            axes.plot(episode.rolled_ticks, rolled, marker="x", markersize=5, **style)
    axes.set(xlabel="tick", ylabel=key)
    return svg(figure)


def _error_plot(summary: dict[str, Any], key: str) -> str:
    from embodied.cli.report import new_figure, svg

    figure, axes = new_figure()
    rows = [row for row in summary["open_loop"]["errors"] if row["key"] == key]
    ticks = [row["ticks"] for row in rows]
    axes.plot(ticks, [row["forward_rmse"] for row in rows], marker="o", label="predicted")
    axes.plot(ticks, [row["unchanged_rmse"] for row in rows], marker="s", label="nothing changes")
    axes.set(xlabel="ticks after the start", ylabel="error (rms)")
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def _elements(states: np.ndarray) -> np.ndarray:
    """[W, …] → the first elements [W, n]."""
    return states.reshape(len(states), -1)[:, :_ELEMENTS]
