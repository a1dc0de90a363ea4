"""Progress of a training run on a terminal, or one line every few seconds in a log."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_S = 10.0


class Dashboard:
    """Lines: demonstrations, training, robots, who takes over, evaluation, trouble."""

    def __init__(self, console: Console, config: Any) -> None:
        self._console = console
        self._config = config
        self._line_s = 0.0
        self._seen_evaluation: Any = None
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<15}"),
            BarColumn(30),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Dashboard":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, roles: dict[str, dict[str, Any]]) -> None:
        """Show the roles' latest numbers."""
        learner = roles.get("learner", {})
        actors = [values for name, values in roles.items() if name.startswith("actor")]
        details: dict[str, tuple[float, str]] = {}
        wanted = len(self._config.tasks) * (self._config.demonstrations.episodes or 0)
        if self._config.demonstrations.source == "expert" and wanted:
            found = wanted if learner.get("step") else int(learner.get("demonstrations") or 0)
            details["demonstrations"] = (found / wanted, f"{found} of {wanted} episodes")
        if learner.get("step"):
            rate, loss = learner.get("steps_per_s"), learner.get("loss")
            speed = f"  {rate:.0f} steps/s" if rate else ""
            shown = "" if loss is None else f"  loss {loss:.4f}"
            details["training"] = (
                float(learner.get("progress") or 0),
                f"step {learner['step']}{speed}{shown}",
            )
        if actors:
            rate = sum(float(a.get("steps_per_s") or 0) for a in actors)
            episodes = sum(int(a.get("episodes") or 0) for a in actors)
            versions = [int(a.get("version") or 0) for a in actors]
            details["robots"] = (
                1.0,
                f"{rate:.0f} steps/s  {episodes} episodes  weights v{max(versions, default=0)}",
            )
        if people := [f"{name}: {v['person']}" for name, v in roles.items() if v.get("person")]:
            details["person"] = (1.0, "  ".join(people))
        self._evaluation(roles.get("evaluator", {}), details)
        faults = {str(values["fault"]) for values in roles.values() if values.get("fault")}
        if faults:
            details["trouble"] = (0.0, "; ".join(sorted(faults)))
        self._show(details)

    def lockstep(self, role: str, values: dict[str, Any]) -> None:
        """Show a notice of the deterministic engine."""
        if role == "evaluation":
            notice = {
                "success": values["success_rate"],
                "reward": values["max_reward"],
                "evaluated_step": values["step"],
            }
            self.update({"evaluator": notice})
        elif "step" in values:
            steps = self._config.learner.steps
            self.update({"learner": {**values, "progress": values["step"] / steps}})

    def _evaluation(self, values: dict[str, Any], details: dict[str, tuple[float, str]]) -> None:
        step = values.get("evaluated_step")
        if step is None:
            return
        text = f"step {step}: success {100 * values['success']:.0f} %"
        text += f", max reward {values['reward']:.2f}"
        details["evaluation"] = (float(values["success"]), text)
        if step != self._seen_evaluation:
            self._seen_evaluation = step
            if self._live:
                self._progress.console.print(f"evaluation at {text}")

    def _show(self, details: dict[str, tuple[float, str]]) -> None:
        for name, (share, text) in details.items():
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=1.0, detail="")
            self._progress.update(self._tasks[name], completed=share, detail=text)
        if not self._live and time.monotonic() - self._line_s > _LINE_S and details:
            self._line_s = time.monotonic()
            line = " | ".join(f"{name}: {text}" for name, (_, text) in details.items())
            self._console.print(line, markup=False, soft_wrap=True)
