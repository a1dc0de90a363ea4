"""The role that learns."""

import os
import time
from contextlib import ExitStack, closing
from typing import Any

from embodied.core.errors import ConfigError
from embodied.learn.proposers import Proposers
from embodied.run import build
from embodied.run.algorithm import make_algorithm
from embodied.run.context import Context, Stop
from embodied.run.feedback import PublishFeedback
from embodied.run.loader import RunLoader
from embodied.weights.governor import PublishGovernor

_REPORT_S = 2.0
_IDLE_S = 0.05


def learner_role(context: Context) -> None:
    """Gradient steps until the budget is used up; publishes weights and checkpoints."""
    run, config = context.run, context.config
    loader = proposers = None
    with ExitStack() as started:
        if config.buffer.loader:
            loader = started.enter_context(closing(RunLoader(run)))
        if make_algorithm(config.algorithm).proposers:
            from embodied.run.proposer import start_proposers

            proposers = started.enter_context(closing(start_proposers(run, config)))
        _train(context, loader, proposers)


def _train(context: Context, loader: RunLoader | None, proposers: Proposers | None) -> None:
    import torch

    run, config = context.run, context.config
    torch.set_num_threads(config.learner.threads)
    if config.learner.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"learner.device=cuda: torch {torch.__version__} cannot use a GPU here "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}); install a torch "
            "built for this host's CUDA driver, or use learner.device=cpu"
        )
    rows: list[dict[str, Any]] = []

    def on_metrics(row: dict[str, Any]) -> None:
        rows.append(row)
        run.metrics("learner", row)

    governor = PublishGovernor(config.learner.governor)
    trainer = build.make_trainer(run, config, on_metrics, loader, governor, proposers)
    wanted = build.demonstrations_wanted(config)
    while (found := trainer.demonstrations()) < wanted:
        context.check(state="waiting", demonstrations=found)
        time.sleep(_IDLE_S)
    trainer.start()
    try:
        _learn(context, trainer, rows, PublishFeedback(run, governor))
    except Stop:
        trainer.save()
        raise
    finally:
        trainer.close()
    trainer.save()
    trainer.publish(final=True)


def _learn(
    context: Context, trainer: Any, rows: list[dict[str, Any]], feedback: PublishFeedback
) -> None:
    started_s, steps, cpu_s, waited_s = time.monotonic(), trainer.step, time.process_time(), 0.0
    data_s = trainer.waited_s
    begun = False
    while not trainer.done:
        if not trainer.update():
            waited_s += _IDLE_S
            context.check(state="limited by the data")
            time.sleep(_IDLE_S)
        elif not begun:
            begun = True
            context.run.event("learning", step=trainer.step)
        if trainer.publish_due():
            trainer.publish(final=False)
        if trainer.checkpoint_due():
            trainer.save()
        elapsed_s = time.monotonic() - started_s
        if elapsed_s >= _REPORT_S:
            feedback.poll()
            rate, decisions = (trainer.step - steps) / elapsed_s, trainer.publishing()
            context.run.timings(
                "learner",
                {
                    "step": trainer.step,
                    "steps_per_s": rate,
                    "cpu_share": (time.process_time() - cpu_s) / elapsed_s,
                    "waited_s": waited_s,
                    "data_share": (trainer.waited_s - data_s) / elapsed_s,
                    **decisions,
                },
            )
            data_s = trainer.waited_s
            started_s, steps, cpu_s = time.monotonic(), trainer.step, time.process_time()
            waited_s = 0.0
            context.check(steps_per_s=rate, **decisions)
        context.check(
            state="training",
            step=trainer.step,
            progress=trainer.learner.progress,
            seconds=trainer.learner.seconds,
            loss=rows[-1]["loss"] if rows else None,
        )
