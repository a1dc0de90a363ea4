"""Entry of a role's process: role name, run directory, socket directory, supervisor's pid."""

import contextlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from embodied.core.errors import (
    DeviceLostError,
    EmbodiedError,
    LinkError,
    MissingDependencyError,
    StorageFullError,
)
from embodied.core.processes import die_with_parent
from embodied.core.rundir import RunDir
from embodied.run.context import FAILED, STOPPED, Context, Stop, kind_of

ROLES = {
    "buffer": "embodied.run.roles.buffer:buffer_role",
    "actor": "embodied.run.roles.actor:actor_role",
    "learner": "embodied.run.roles.learner:learner_role",
    "evaluator": "embodied.run.roles.evaluator:evaluator_role",
    "gateway": "embodied.run.roles.gateway:gateway_role",
    "policy": "embodied.run.roles.policy:policy_role",
    "link": "embodied.run.roles.link:link_role",
}
"""Kind of role → 'module:function'; a robot host need not have what the others import."""


def main() -> int:
    """Run one role; its exit status says whether a restart would help."""
    role, path, socket_dir, supervisor_pid = sys.argv[1:5]
    die_with_parent(int(supervisor_pid))
    context = Context(role, RunDir(Path(path)), socket_dir, int(supervisor_pid))
    try:
        _find(role)(context)
    except Stop:
        return STOPPED
    except (LinkError, DeviceLostError) as error:
        sys.stderr.write(f"{role}: {error}\n")
        return 1
    except EmbodiedError as error:
        return _failed(context, error)
    except ModuleNotFoundError as error:
        return _failed(
            context,
            MissingDependencyError(
                f"the package '{error.name}' is not installed; "
                "pip install 'embodied-stack[all]' brings everything"
            ),
        )
    finally:
        context.pulse.close()
    return 0


def _failed(context: Context, error: EmbodiedError) -> int:
    sys.stderr.write(f"{context.role}: {type(error).__name__}: {error}\n")
    with contextlib.suppress(StorageFullError):
        context.run.event("role failed", role=context.role, error=str(error))
    return FAILED


def _find(role: str) -> Callable[[Context], None]:
    module, _, name = ROLES[kind_of(role)].partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    raise SystemExit(main())
