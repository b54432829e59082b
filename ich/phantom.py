"""Writes synthetic head CT, whole studies in the layout of the RSNA 2019 hemorrhage data set.

None of it is patient data, and nothing learned from it says anything about a patient. What is
simulated, and where in ich/data/phantom, says the head of ich/data/phantom/spec.py.

Run:  ich phantom OUT --patients 96 --seed 0 --figure phantom.png
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ich.base.config import UserError
from ich.base.entry import Parser, Status, end_on_signals, exit_status, shell_command
from ich.base.memory import leave
from ich.data.phantom.spec import LABELS, PhantomSpec


def parser() -> Parser:
    """The command's options."""
    default = PhantomSpec()
    parser = Parser("phantom", "Write synthetic head CT in the RSNA layout.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--patients", type=int, default=default.patients, metavar="N")
    parser.add_argument("--seed", type=int, default=default.seed, metavar="S")
    parser.add_argument("--size", type=int, default=default.size, help="rows and columns")
    bleeds = "probability that a patient bleeds"
    parser.add_argument("--prevalence", type=float, default=default.prevalence, help=bleeds)
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="also draw examples")
    return parser


def _summarize(out: Path) -> list[str]:
    """Slices and label rates, read back from the CSV."""
    lines = (out / "stage_2_train.csv").read_text(encoding="ascii").split()[1:]
    positive = {k: sum(line.endswith(f"_{k},1") for line in lines) for k in LABELS}
    slices = len(lines) // len(LABELS)
    rates = ", ".join(f"{k} {100 * n / slices:.1f} %" for k, n in positive.items())
    return [f"{slices} slices in {out}", f"positive: {rates}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a phantom; the exit status, see `ich.base.entry.Status`."""
    end_on_signals()
    args = parser().parse_args(argv)
    return exit_status(lambda: _write(args))


def _write(args: Namespace) -> int:
    # Imported here: a picture takes matplotlib, for which help and a mistake need not wait.
    from ich.base.progress import stage
    from ich.base.terminal import Terminal
    from ich.data.phantom.figure import draw_figure
    from ich.data.phantom.files import write_phantom

    try:
        spec = PhantomSpec(args.patients, args.seed, args.size, args.prevalence)
        with Terminal().preparing() as report:
            write_phantom(args.out, spec, args.workers, stage(report, "simulating patients"))
        if args.figure is not None:
            draw_figure(spec, args.figure)
    except ValueError as error:  # its text is of one line, and for the user
        raise UserError(str(error)) from None
    terminal = Terminal()
    for line in _summarize(args.out):
        terminal.say(line)
    if args.figure is not None:
        terminal.say(f"figure: {args.figure}")
    from ich.launch.command import mend_word  # with Hydra, for which nothing else need wait

    root = mend_word(f"data.root={args.out}")
    command = shell_command("ich", "sweep", "experiment=demo", root)
    terminal.say(f"next: {command}")
    return Status.DONE


if __name__ == "__main__":
    leave(main())
