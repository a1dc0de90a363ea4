"""The `embodied` command."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from embodied.core.errors import EmbodiedError

_COMMANDS = {
    "train": ("train", "run a training configuration: robots, buffer, learner, evaluation, report"),
    "collect": ("collect", "record demonstrations by a scripted expert, or import a data set"),
    "eval": ("evaluate", "success of a checkpoint or run on fresh start states"),
    "serve": ("serve", "decide for robots that are too small for a policy"),
    "compose": (
        "compose",
        "choose the weights of a composed policy, and report it beside its parts",
    ),
    "imagine": (
        "imagine",
        "what a world model predicts of recorded episodes, beside what was seen",
    ),
    "devices": ("devices", "list robots, cameras and GPUs, like nvidia-smi"),
    "agent": ("agent", "own this host's robots and offer them to be leased"),
    "site": ("site", "act with this host's robots for a run elsewhere"),
    "status": ("status", "hosts of a run: links, weights, what is still to deliver"),
    "deploy": ("deploy", "put the agent onto a robot's host over ssh, and keep it running there"),
    "doctor": ("doctor", "check this host: software, clock, devices, identity; say what to do"),
    "estop": ("estop", "halt this host's robots at once, until a person clears it"),
    "teleop": ("teleop", "move a robot by keyboard, gamepad or leader arm"),
    "record": ("record", "record demonstrations by a person on a robot"),
    "buffer": ("buffer", "look into replay buffers; check, join, divide, export and import them"),
    "reward": ("reward", "learn a success classifier from labelled episodes; test one"),
    "calibrate": ("calibrate", "calibrate an SO-101 arm, follower or leader"),
    "pki": ("pki", "make, renew and revoke the certificates of gateways and robots' hosts"),
    "weights": ("weights", "list a run's weights; pin, roll back, show one; try it on some hosts"),
    "report": ("report", "write report.html of a run directory"),
}

# Of TLS 1.2 this leaves gRPC one suite that the certificates of `embodied pki`, being of elliptic
# curves, cannot be used with: only 1.3 is left. gRPC reads the variable when it is imported.
_NO_TLS12 = ("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES128-GCM-SHA256")

_EPILOG = """\
train, collect, eval, serve, compose, imagine and site take Hydra overrides:
key=value, group=choice.
Examples:
  embodied train task=metaworld/drawer-open policy=diffusion algorithm=bc
  embodied train experiment=pusht learner.minutes=5
  embodied eval checkpoint=runs/my-run episodes=50
  embodied serve checkpoint=runs/my-run follow=true
  embodied compose policies=[runs/a,runs/b] search=bandit output=runs/a-and-b
  embodied train --show task=metaworld/assembly       (print the composed configuration)
"""


def parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The command line's parser; of the commands, only the one that is given has its options."""
    root = argparse.ArgumentParser(
        prog="embodied", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, text) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in arguments[:1]:
            importlib.import_module(f"embodied.cli.{module}").add_arguments(command)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a user's error ends in one paragraph on stderr and status 2."""
    os.environ.setdefault(*_NO_TLS12)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser(given).parse_args(given)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for number in (signal.SIGINT, signal.SIGTERM):  # a background job starts with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    command, (module, _) = options.command, _COMMANDS[options.command]
    try:
        return importlib.import_module(f"embodied.cli.{module}").run(options)
    except EmbodiedError as error:
        _complain(f"embodied {command}: {error}")
        return 2
    except ModuleNotFoundError as error:
        _complain(
            f"embodied {command}: the package '{error.name}' is not installed; "
            "pip install 'embodied-stack[all]' brings everything"
        )
        return 2
    except KeyboardInterrupt:
        _complain(f"embodied {command}: stopped.", style="bold")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _complain(f"embodied {command}: {error.strerror or error}{where}")
        return 2


def _complain(text: str, style: str = "bold red") -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, style=style, markup=False)


if __name__ == "__main__":
    raise SystemExit(main())
