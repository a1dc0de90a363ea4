"""How a trial stands, for people to read."""

from typing import Annotated

import msgspec

from embodied.weights.manifests import Version
from embodied.weights.noninferiority import Count, Verdict, difference_interval, judge
from embodied.weights.trial import TrialEvent, TrialState

_Rate = Annotated[float, msgspec.Meta(ge=-1, le=1)]


class TrialProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A rule and what it has come to. champion, challenger, counts, decided: as in TrialState.

    next_look: episodes of the challenger at which it is judged next, once the champion has
    baseline_episodes. interval: of the success rates' difference, challenger − champion; verdict:
    what the rule would say now. Both None before either has an episode.
    """

    canaries: tuple[str, ...]
    margin: float
    baseline_episodes: int
    max_episodes: int
    champion: Version | None
    champion_count: Count
    challenger: Version | None
    challenger_count: Count
    next_look: int | None
    interval: tuple[_Rate, _Rate] | None
    verdict: Verdict | None
    decided: TrialEvent | None


def progress(state: TrialState) -> TrialProgress | None:
    """How the trial stands; None if there is no rule."""
    rule = state.rule
    if rule is None:
        return None
    interval = verdict = None
    tried, others = state.challenger_count, state.champion_count
    if state.challenger is not None and tried.episodes and others.episodes:
        interval = difference_interval(tried, others, level=rule.error / rule.looks)
        verdict = judge(
            tried, others, margin=rule.margin, error=rule.error, looks=rule.looks, last=False
        )
    return TrialProgress(
        canaries=rule.canaries,
        margin=rule.margin,
        baseline_episodes=rule.baseline_episodes,
        max_episodes=rule.max_episodes,
        champion=state.champion,
        champion_count=others,
        challenger=state.challenger,
        challenger_count=tried,
        next_look=None if state.challenger is None else rule.look_at(state.looked),
        interval=interval,
        verdict=verdict,
        decided=state.decided,
    )
