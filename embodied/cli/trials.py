"""A trial of weights in words, for `embodied status` and `embodied weights`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

if TYPE_CHECKING:
    from embodied.weights.noninferiority import Count
    from embodied.weights.progress import TrialProgress

_VERDICTS = {
    "promote": "[green]no worse so far[/]",
    "reject": "[red]worse so far[/]",
    "undecided": "undecided so far",
}


def trial_lines(trial: TrialProgress) -> list[str]:
    """What is on trial where, each arm's episodes, the verdict so far, and how the last ended."""
    hosts = escape(", ".join(trial.canaries))
    if trial.challenger is None:
        lines = [
            f"trial: the next newer weights act on {hosts} first, once v{trial.champion} has "
            f"{trial.baseline_episodes} episodes: {_rate(trial.champion_count)}"
        ]
    else:
        lines = [
            f"trial: [cyan]v{trial.challenger}[/] on {hosts}, v{trial.champion} on all others",
            f"  v{trial.challenger}: {_rate(trial.challenger_count)}, judged at {trial.next_look} "
            f"of {trial.max_episodes} episodes",
            f"  v{trial.champion}: {_rate(trial.champion_count)}, at least "
            f"{trial.baseline_episodes} are needed",
        ]
    if trial.interval is not None and trial.verdict is not None:
        low, high = trial.interval
        lines.append(
            f"  {_VERDICTS[trial.verdict]}: success rates differ by {low:+.2f} to {high:+.2f}; "
            f"above {-trial.margin:+.2f} is no worse"
        )
    if trial.decided is not None:
        again = trial.decided.replacement
        copy = "" if again is None else f"; what acted before acts as v{again}"
        lines.append(f"last trial: v{trial.decided.version} {trial.decided.what}{copy}")
    return lines


def _rate(count: Count) -> str:
    if not count.episodes:
        return "no episodes yet"
    share = count.successes / count.episodes
    return f"{count.successes} of {count.episodes} episodes succeeded ({share:.0%})"
