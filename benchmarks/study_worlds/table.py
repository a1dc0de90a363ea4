"""What the study found, in Markdown."""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.study_worlds.tracking import MODES, Tracked
from embodied.core.intervals import bootstrap_mean, paired_bootstrap

BySeed = list[list[float]]
"""Scores of the start states, for each training seed. Intervals are over start states, each with
the mean of its seeds: they hold for these trainings, and say nothing of others."""


def said(found: BySeed) -> str:
    """All seeds together with their 95 % interval, then each."""
    scores = np.mean(found, axis=0).tolist()
    low, high = bootstrap_mean(scores)
    each = ", ".join(f"{np.mean(one):.3f}" for one in found)
    return f"{np.mean(scores):.3f} ({low:.3f}–{high:.3f}) [{each}]"


def difference(a: BySeed, b: BySeed) -> str:
    """Of the first from the second, over the same start states and seeds; then by seed."""
    first, second = (np.mean(found, axis=0).tolist() for found in (a, b))
    each = ", ".join(f"{np.mean(x) - np.mean(y):+.3f}" for x, y in zip(a, b, strict=True))
    mean, low, high = paired_bootstrap(first, second)
    return f"{mean:+.3f} (95 % {low:+.3f} to {high:+.3f}) [{each}]"


def scores(
    part: str,
    found: Mapping[tuple[str, str], BySeed],
    steps: Mapping[tuple[str, str], Sequence[int]],
    compared: Sequence[tuple[str, str]],
) -> list[str]:
    """By task and contender, with gradient steps; then the differences."""
    lines = [f"\n{part}:", "", "| task | contender | score (95 %) [by seed] | steps |"]
    lines.append("|---|---|---|---|")
    for (task, contender), one in found.items():
        reached = ", ".join(f"{n:,}" for n in steps[task, contender])
        lines.append(f"| {task} | {contender} | {said(one)} | {reached} |")
    for task in dict.fromkeys(task for task, _ in found):
        for a, b in compared:
            lines.append(f"{task}: {a} − {b}: {difference(found[task, a], found[task, b])}")
    return lines


def ranking(found: Mapping[str, BySeed]) -> list[str]:
    """By who chose, beside the first proposal."""
    lines = [
        "\nranking:",
        "",
        "| chosen by | mean max coverage (95 %) [by seed] | − first (95 %) |",
    ]
    lines.append("|---|---|---|")
    first = next(iter(found.values()))
    for chooser, one in found.items():
        lines.append(f"| {chooser} | {said(one)} | {difference(one, first)} |")
    return lines


def tracking(found: Mapping[tuple[str, str], Sequence[Tracked]]) -> list[str]:
    """Predictions, inferred actions, and what became of both when executed."""
    lines = [
        "\ntracking:",
        "",
        "| task | model | key, ticks | error (rms) | beside | difference of squares |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for (task, model), seeds in found.items():
        for tracked in seeds:
            imagined = tracked.imagined
            rows = [
                (f"{row['key']}, {row['ticks']}", row, "forward", "unchanged")
                for row in imagined["one_chunk"]
            ]
            inverse = imagined["inverse"]
            rows.append((f"actions, {inverse['steps']}", inverse, "inverse", "policy"))
            for what, row, ours, other in rows:
                interval = (
                    ""
                    if row["interval"] is None
                    else "({:+.3g} to {:+.3g})".format(*row["interval"])
                )
                lines.append(
                    f"| {task} | {model} | {what} | {row[f'{ours}_rmse']:.4g} | "
                    f"{row[f'{other}_rmse']:.4g} ({other}) | {row['difference']:+.3g} {interval} |"
                )
    for (task, model), seeds in found.items():
        modes = {mode: [one.followed[mode] for one in seeds] for mode in MODES if seeds[0].followed}
        lines += [f"{task}, {model}, {mode}: {said(one)}" for mode, one in modes.items()]
        if modes:
            gain = difference(modes["inverse"], modes["policy"])
            lines.append(f"{task}, {model}: inverse − policy: {gain}")
    return lines
