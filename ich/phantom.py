"""Synthetic head CT: whole studies in the layout of the RSNA 2019 hemorrhage data set.

The sweep of eight CNNs needs labelled slices; this module makes them from nothing, so that the
demo, the tests and a laptop without the real download run the same code as the real set.

What is simulated. Each patient is a set of closed-form solids in millimetres (head frame: x to
the patient's left, y to the back, z up, origin near the foramina of Monro): vault with two
tables and diploe, skull base as a height map of the three fossae, scalp, face, orbits and
sinuses; sulci as the zero level set of a random field on the brain's surface, cortical ribbon,
deep nuclei, ventricles, cisterns, Sylvian fissures, falx, tentorium, cerebellum; and what
imitates blood (calcified choroid plexus and pineal, basal ganglia calcification, dense falx and
venous sinuses). Bleeds are solids too, placed and shaped as Figure 1 of the report says: epidural
lentiform, subdural crescent, subarachnoid along sulci and cisterns, intraventricular in the
ventricles with a level, intraparenchymal rounded with a dark rim; they push the brain aside. A
slice averages two planes inside its thickness, then gets cupping, blur and correlated noise.

HU: air -1000, fat -100..-50, CSF 0..15, white matter 25..32, grey matter 35..42, muscle 45..60,
acute blood 50..80, diploe 300..900, cortical bone 1000..1900: textbook ranges (Bushberg et al.,
The Essential Physics of Medical Imaging, 3rd ed. 2012, ch. 10; Osborn's Brain, 2nd ed. 2017).
The noise, 3..6 HU in the brain, is that of a routine 5 mm head protocol.

The files follow the RSNA set: both encodings (16-bit signed with padding -2000, Explicit VR;
12-bit unsigned, Implicit VR), pseudonymous ids, no names, no dates. None of it is patient data,
and nothing learned from it says anything about a patient.

Run:  python -m ich.phantom OUT --patients 96 --seed 0 --figure phantom.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ich.data.phantom.figure import draw_figure
from ich.data.phantom.files import write_phantom
from ich.data.phantom.spec import LABELS, PhantomSpec


def _parser() -> argparse.ArgumentParser:
    default = PhantomSpec()
    parser = argparse.ArgumentParser(
        prog="python -m ich.phantom", description="Write synthetic head CT in the RSNA layout."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--patients", type=int, default=default.patients, metavar="N")
    parser.add_argument("--seed", type=int, default=default.seed, metavar="S")
    parser.add_argument("--size", type=int, default=default.size, help="rows and columns")
    parser.add_argument("--prevalence", type=float, default=default.prevalence,
                        help="probability that a patient bleeds")  # fmt: skip
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="also draw examples")
    return parser


def _summarize(out: Path) -> str:
    """Slices and label rates, read back from the CSV."""
    lines = (out / "stage_2_train.csv").read_text(encoding="ascii").split()[1:]
    positive = {k: sum(line.endswith(f"_{k},1") for line in lines) for k in LABELS}
    slices = len(lines) // len(LABELS)
    rates = ", ".join(f"{k} {100 * n / slices:.1f} %" for k, n in positive.items())
    return f"{slices} slices in {out}\npositive: {rates}"


def _show_progress(done: int, patients: int) -> None:
    end = "\n" if done == patients else ""
    print(f"\rpatients {done}/{patients}", end=end, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Write a phantom from the command line; 0, or 2 after a user's mistake."""
    args = _parser().parse_args(argv)
    try:
        spec = PhantomSpec(args.patients, args.seed, args.size, args.prevalence)
        write_phantom(args.out, spec, args.workers, _show_progress)
        if args.figure is not None:
            draw_figure(spec, args.figure)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_summarize(args.out))
    if args.figure is not None:
        print(f"figure: {args.figure}")
    print(f"next: python -m ich.sweep experiment=demo data.root={args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
