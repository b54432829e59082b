"""The command `ich`: `ich sweep ...` is `python -m ich.sweep ...`.

Light: a command's own module is imported once it is known which.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

from ich import __version__
from ich.base.entry import Status, nearest
from ich.base.memory import leave


class Command(NamedTuple):
    """What `ich --help` says of a command."""

    about: str
    example: str


COMMANDS = {
    "sweep": Command(
        "train networks, one job for each combination of settings, and compare them",
        "-m model=resnet50,vgg16 seed=0,1",
    ),
    "prepare": Command(
        "decode a data set and report on it, without training",
        "data=rsna data.root=/data/rsna.zip",
    ),
    "predict": Command(
        "new scans through trained networks",
        "--model multirun_reports/demo/resnet50 scans -o out.csv",
    ),
    "evaluate": Command(
        "a trained network on other labelled scans",
        "models=models:/ich@best data=folder data.root=scans data.labels=labels.csv",
    ),
    "export": Command(
        "a trained network as one file for other programs, with its model card",
        "--model multirun_reports/demo/resnet50 --format onnx",
    ),
    "report": Command("write a sweep's tables and pages again", "multirun_reports/demo"),
    "rerun": Command(
        "repeat a finished run from its record, and compare", "multirun_reports/demo/resnet50"
    ),
    "phantom": Command("write synthetic head CT", "phantom --patients 96 --figure phantom.png"),
    "bench": Command(
        "measure how fast this machine decodes, trains and predicts", "--parts step --image-size 96"
    ),
    "train": Command(
        "one job of a sweep, as the sweep starts it", "multirun_reports/demo/resnet50"
    ),
    "completion": Command("tab completion for bash, zsh and fish", "bash"),
}


HYDRA = ("sweep", "prepare", "evaluate")  # whose settings Hydra composes: KEY=VALUE


def help_text() -> str:
    """What `ich` alone prints."""
    lines = [
        f"ich {__version__}: trains, tracks and compares classifiers of intracranial hemorrhage on "
        f"head CT.\nFor research and education; no diagnosis.\n",
        "Usage: ich COMMAND ...    the same as python -m ich.COMMAND ...\n",
    ]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<11}{command.about}\n  {'':<11}ich {name} {command.example}")
    return "\n".join(
        [
            *lines,
            "\nich COMMAND --help says more; ich --version gives the version.",
            "Tab completion: ich completion --help.",
            "Exit status: 0 done, 1 a job failed or a rerun differs, 2 a mistake, 3 some files\n"
            "left out, 130 and 143 after Ctrl-C and SIGTERM.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status, or 2 if there is no such command."""
    name, *words = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(help_text())
        return Status.DONE
    if name in ("-V", "--version"):
        print(f"ich {__version__}")
        return Status.DONE
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS)
        print(f"ich: there is no command {name!r}.{hint} See ich --help.", file=sys.stderr)
        return Status.MISTAKE
    status: int = import_module(f"ich.{name}").main(words)
    return status


def run() -> NoReturn:
    """`ich` as a process of its own."""
    leave(main())
