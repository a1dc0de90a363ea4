"""Success classifiers from a buffer's episodes: trained, given a threshold, tested."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from embodied.buffer.read.replay import ReplayReader
from embodied.buffer.sample.statistics import feature_stats
from embodied.core.config import options_of
from embodied.core.errors import ConfigError
from embodied.core.rundir import RunDir
from embodied.core.seeds import derive_seed, make_rng
from embodied.core.specs import ArraySpec, PolicySpec
from embodied.learn.success.labels import (
    Labelled,
    balanced,
    divide,
    label_episodes,
    read_hand_labels,
)
from embodied.learn.success.scores import (
    Confusion,
    Verdicts,
    choose_threshold,
    confusion,
    verdicts,
)
from embodied.run.observing import matching_keys
from policies.success.configs import (
    FORMAT,
    StoredClassifier,
    SuccessConfig,
    read_classifier,
    write_classifier,
)

Count = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(gt=0, lt=0.5)]


class RewardTrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a success classifier learns from, and how.

    buffer: a buffer's folder or a run's. task: of which to take the episodes; null for all.
    observations: what it reads: keys, or patterns that end in "*"; null for all. positives: how
    many of a successful episode's last observations show success. labels: a file of labels by hand
    that say otherwise of some episodes (HandLabel). patience: observations in a row that must look
    like success for an episode to be one. false_positives: share of the negative ones that may.
    calibration, test: shares of the episodes by which the threshold is chosen, and that nothing but
    the report sees. classifier: see SuccessConfig. output: folder for the classifier.
    """

    buffer: str
    output: str
    task: str | None
    observations: tuple[str, ...] | None
    positives: Count
    labels: str | None
    patience: Count
    false_positives: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    calibration: Share
    test: Share
    classifier: SuccessConfig
    steps: Count
    batch_size: Annotated[int, msgspec.Meta(ge=2)]
    learning_rate: Annotated[float, msgspec.Meta(gt=0)]
    weight_decay: Annotated[float, msgspec.Meta(ge=0)]
    threads: Count
    seed: int


@dataclass(frozen=True, slots=True)
class Report:
    """What was found on episodes that nothing was learned from or chosen by.

    episodes: successful and failed. trained_on: likewise, of those that the network learned from.
    negatives: negative observations by which the threshold was chosen. The last three are None
    where nothing was trained.
    """

    threshold: float
    patience: int
    confusion: Confusion
    verdicts: Verdicts
    episodes: tuple[int, int]
    trained_on: tuple[int, int] | None = None
    negatives: int | None = None
    loss: float | None = None


def train(config: RewardTrainConfig, on_step: Callable[[], None] = lambda: None) -> Report:
    """Train, choose the threshold, write the classifier; how it does on the held-out episodes.

    ConfigError for too few labelled episodes or a false-positive bound that cannot be kept.
    """
    import torch

    from embodied.learn.success.fit import fit, score
    from policies.success.classifier import arrays_of, build_classifier

    options_of("encoders", config.classifier.images.encoder, "classifier.images.encoder")
    with ReplayReader(_folder(config.buffer)) as reader:
        reader.refresh()
        episodes = _labelled(reader, config.buffer, config.task, config.positives, config.labels)
        spec = _spec(reader, config)
        learned, chosen, held_out = divide(episodes, (config.calibration, config.test), config.seed)
        torch.set_num_threads(config.threads)
        rows = np.concatenate([episode.rows for episode in learned])
        statistics = {
            key: feature_stats(lambda at, key=key: reader.take(key, at), rows)
            for key, array in spec.observation.items()
            if array.dtype != "uint8"
        }
        seed = derive_seed(config.seed, "initial weights")
        classifier = build_classifier(spec, config.classifier, statistics, seed=seed)
        steps = spec.n_obs_steps

        def observe(rows_BT: np.ndarray) -> Mapping[str, np.ndarray]:
            return reader.gather(tuple(spec.observation), rows_BT)

        loss = fit(
            classifier.train(),
            balanced(learned, steps, config.batch_size, make_rng(config.seed, "batches")),
            observe,
            steps=config.steps,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            seed=config.seed,
            on_step=on_step,
        )
        classifier.eval()
        calibration = score(classifier, chosen, observe, steps)
        threshold = choose_threshold(calibration, config.false_positives)
        tested = score(classifier, held_out, observe, steps)
    header = StoredClassifier(
        format=FORMAT,
        spec=spec,
        options=config.classifier,
        threshold=threshold,
        patience=config.patience,
        positives=config.positives,
    )
    write_classifier(Path(config.output), header, arrays_of(classifier))
    return Report(
        threshold,
        config.patience,
        confusion(tested, threshold),
        verdicts(tested, threshold, config.patience),
        _count(held_out),
        _count(learned),
        sum(int((~episode.positive).sum()) for episode in chosen),
        loss,
    )


def evaluate(directory: Path, buffer: str, task: str | None, labels: str | None) -> Report:
    """How a classifier does on a buffer's episodes, labelled as those that it learned from.

    SpecError if they were recorded with other observations or actions than it knows.
    """
    from embodied.learn.success.fit import score
    from policies.success.classifier import restore_classifier

    header, arrays = read_classifier(directory)
    with ReplayReader(_folder(buffer)) as reader:
        reader.refresh()
        episodes = _labelled(reader, buffer, task, header.positives, labels)
        header.check(*_recorded(reader), buffer)
        keys = tuple(header.spec.observation)
        scored = score(
            restore_classifier(header, arrays),
            episodes,
            lambda rows_BT: reader.gather(keys, rows_BT),
            header.spec.n_obs_steps,
        )
    return Report(
        header.threshold,
        header.patience,
        confusion(scored, header.threshold),
        verdicts(scored, header.threshold, header.patience),
        _count(episodes),
    )


def _folder(buffer: str) -> Path:
    """A buffer's folder, or the one of a run's directory."""
    path = Path(buffer)
    run = RunDir(path)
    found = run.buffer if run.exists() else path
    if not found.is_dir():
        raise ConfigError(f"{buffer} is neither a buffer's folder nor a run's")
    return found


def _labelled(
    reader: ReplayReader, buffer: str, task: str | None, positives: int, labels: str | None
) -> list[Labelled]:
    episodes = [e for e in reader.finished() if task in (None, e.task)]
    if not episodes:
        of = "" if task is None else f" of task '{task}'"
        raise ConfigError(f"{buffer} holds no finished episode{of}")
    by_hand = {} if labels is None else read_hand_labels(Path(labels))
    return label_episodes(episodes, positives, by_hand)


def _recorded(reader: ReplayReader) -> tuple[dict[str, ArraySpec], ArraySpec]:
    """Observations that all recordings have, and their action."""
    names = set.intersection(*({f.name for f in s.observation} for s in reader.schemas))
    features = {name: reader.feature(name) for name in sorted(names)}
    action = reader.feature("action")
    observation = {name: ArraySpec(f.shape, f.dtype) for name, f in features.items()}
    return observation, ArraySpec(action.shape, action.dtype)


def _spec(reader: ReplayReader, config: RewardTrainConfig) -> PolicySpec:
    observation, action = _recorded(reader)
    keys = matching_keys(observation, config.observations)
    read = {key: observation[key] for key in keys}
    return PolicySpec(read, action, config.classifier.n_obs_steps, 1, 1)


def _count(episodes: list[Any]) -> tuple[int, int]:
    successful = sum(episode.successful for episode in episodes)
    return successful, len(episodes) - successful
