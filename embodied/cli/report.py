"""embodied report: one HTML file with curves, evaluation table and films of a run."""

import argparse
import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from embodied.cli.pictures import data_url
from embodied.core.errors import ConfigError
from embodied.core.files import write_atomic
from embodied.core.rundir import RunDir

_FILMS = 6
_MAX_FILM_BYTES = 4 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run_dir", help="directory of the run")


def run(options: argparse.Namespace) -> int:
    """Write report.html into the run directory."""
    found = RunDir(Path(options.run_dir))
    if not found.exists():
        raise ConfigError(f"{found.path} holds no run: config.json is missing")
    write_report(found)
    Console(highlight=False).print(str(found.report), markup=False, soft_wrap=True)
    return 0


def write_report(run: RunDir) -> None:
    """Write report.html: self-contained, opens without a server."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("embodied.cli", "templates"), autoescape=True
    )
    page = environment.get_template("report.html.j2").render(**_contents(run))
    write_atomic(run.report, page.encode())


def _contents(run: RunDir) -> dict[str, Any]:
    config = run.read_config()
    evaluations = [row for row in run.read("metrics", "evaluation") if row["episodes"]]
    learner = _latest_by_step(run.read("metrics", "learner"))
    actors = {s: run.read("metrics", s) for s in run.streams("metrics") if s.startswith("actor")}
    return {
        "title": f"{_tasks(config)} · {config['algorithm']['name']} · {config['policy']['name']}",
        "config": config,
        "evaluations": evaluations,
        "events": run.events(),
        "success": _success_plot(evaluations),
        "loss": _line_plot(learner, "loss", "loss", log=True),
        "interventions": _intervention_plot(actors),
        "psnr": _line_plot([r for r in learner if "psnr" in r], "psnr", "PSNR (dB)", log=False),
        "figures": control_figures(run),
        "pictures": _pictures(run),
        "imagined": _imagined(run),
        "films": _films(run),
        "metric": "max_coverage"
        if evaluations and "max_coverage" in evaluations[0]
        else "max_reward",
    }


def _tasks(config: dict[str, Any]) -> str:
    task: str | list[str] = config["task"]
    return task if isinstance(task, str) else ", ".join(task)


def control_figures(run: RunDir) -> list[tuple[str, str]]:
    """Latencies, weight age and rates of the run, as (name, value with unit)."""
    latencies: list[float] = []
    ages: list[float] = []
    rates: dict[str, list[float]] = {}
    cpu: list[float] = []
    for stream in run.streams("timings"):
        for row in run.read("timings", stream):
            latencies += row.get("latency_ms", [])
            ages += row.get("weight_age_s", [])
            if row.get("steps_per_s"):
                rates.setdefault(stream, []).append(row["steps_per_s"])
            cpu += [row["cpu_share"]] if "cpu_share" in row else []
    figures: list[tuple[str, str]] = []
    if latencies:
        figures.append(("policy latency p50 / p99", _quantiles(latencies, "ms")))
    if ages:
        figures.append(("age of the weights that act p50 / p99", _quantiles(ages, "s")))
    if "learner" in rates:
        figures.append(("gradient steps per second", f"{np.mean(rates['learner']):.1f}"))
    if cpu:
        figures.append(("learner's share of its core", f"{100 * np.mean(cpu):.0f} %"))
    actors = [np.mean(values) for stream, values in rates.items() if stream.startswith("actor")]
    if actors:
        figures.append(("environment steps per second, all robots", f"{sum(actors):.0f}"))
    return figures


def _quantiles(values: list[float], unit: str) -> str:
    p50, p99 = np.quantile(values, (0.5, 0.99))
    return f"{p50:.1f} / {p99:.1f} {unit}"


def _latest_by_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A resumed run repeats the steps after its checkpoint: the last row of a step counts."""
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


def new_figure() -> tuple[Any, Any]:
    """An empty figure and its axes, in the house's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def svg(figure: Any) -> str:
    """The figure as text that starts with <svg."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _success_plot(evaluations: list[dict[str, Any]]) -> str:
    if not evaluations:
        return ""
    figure, axes = new_figure()
    steps = [row["step"] for row in evaluations]
    rates = [row["success_rate"] for row in evaluations]
    intervals = np.array([row["success_interval"] for row in evaluations])
    axes.fill_between(steps, intervals[:, 0], intervals[:, 1], alpha=0.2, label="95 % interval")
    axes.plot(steps, rates, marker="o", label="success on fresh seeds")
    if "max_coverage" in evaluations[0]:
        coverage = [row["max_coverage"] for row in evaluations]
        axes.plot(steps, coverage, marker="s", label="mean max coverage")
    axes.set(xlabel="gradient steps", ylim=(-0.03, 1.03))
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def _line_plot(rows: list[dict[str, Any]], key: str, label: str, *, log: bool) -> str:
    if not rows:
        return ""
    figure, axes = new_figure()
    axes.plot([row["step"] for row in rows], [row[key] for row in rows], linewidth=1)
    axes.set(xlabel="gradient steps", ylabel=label, yscale="log" if log else "linear")
    return svg(figure)


def _intervention_plot(actors: dict[str, list[dict[str, Any]]]) -> str:
    """Share of each robot's episodes that ended in success before the supervisor took over."""
    if not any(not row["demonstration"] for rows in actors.values() for row in rows):
        return ""
    figure, axes = new_figure()
    for name, rows in actors.items():
        alone = [float(row["success"] and not row["interventions"]) for row in rows]
        window = 10
        smooth = [np.mean(alone[max(0, i - window + 1) : i + 1]) for i in range(len(alone))]
        axes.plot(smooth, label=name)
    axes.set(xlabel="training episodes", ylabel="ended without help", ylim=(-0.03, 1.03))
    axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def _pictures(run: RunDir) -> list[tuple[str, str]]:
    """Strips of held-out pictures that an autoencoder gave back, as (caption, data URL)."""
    newest = {row["key"]: row for row in run.read("metrics", "reconstruction")}
    return [
        (
            f"{key}, true above reconstructed: {row['psnr_db']:.1f} dB over {row['pictures']} "
            "pictures of held-out episodes",
            data_url((run.path / "pictures" / f"{key}.png").read_bytes()),
        )
        for key, row in newest.items()
    ]


def _imagined(run: RunDir) -> str:
    """The page of what a world model predicts, its films found from the run's folder; empty if
    there is none."""
    page = run.path / "imagined" / "index.html"
    if not page.exists():
        return ""
    return page.read_text().replace("<head>", '<head><base href="imagined/">', 1)


def _films(run: RunDir) -> list[tuple[str, str]]:
    """Newest films as (name, data URL); files too large for a page are left in the folder."""
    paths = sorted((run.path / "videos").glob("[!.]*.mp4"), key=lambda path: path.stat().st_mtime)
    small = [path for path in paths if path.stat().st_size <= _MAX_FILM_BYTES]
    chosen = small if len(small) <= _FILMS else [small[0], *small[-(_FILMS - 1) :]]
    return [
        (path.stem, "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode())
        for path in chosen
    ]
