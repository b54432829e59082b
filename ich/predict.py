"""New scans through a trained network: `ich predict --model RUN scans -o out.csv`.

RUN is a run's folder, an MLflow run id or `models:/ich@ALIAS`; scans are DICOM files, folders or
zip archives. Decoding, windows, sizes, labels and thresholds are those that the network was trained
with: they stand in its weights file. Research and education only; this is no diagnosis.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ich.base.config import ENGINES, NAMES, Device
from ich.base.entry import Parser, end_on_signals, exit_status
from ich.base.memory import importing, keep_memory, leave
from ich.inference.session import TTA

if TYPE_CHECKING:
    from ich.inference.predict import PredictOptions


def parser() -> Parser:
    """The command's options."""
    parser = Parser(
        "predict",
        __doc__,
        "Exit status: 0, all files predicted; 3, some left out, listed in OUT.left_out.csv; 2,\n"
        "a mistake, or a disk that is full.",
    )
    add = parser.add_argument
    several = "several are averaged"
    engine = "auto: onnxruntime on a CPU, from some thousand files on"
    add("inputs", nargs="+", metavar="INPUT", help="DICOM files, folders, zips, or ZIP/FOLDER")
    add("--model", dest="models", metavar="MODEL", action="append", required=True, help=several)
    add("-o", "--out", type=Path, required=True, help="a .csv or .parquet; studies go beside it")
    add("--threshold", help="0.5, or any=0.3,epidural=0.1; else the best F1 on validation")
    add("--tta", choices=TTA, default="none", help="average over the four flips of a slice")
    add("--explain", type=Path, metavar="DIR", help="Grad-CAM pages of studies with findings")
    add("--submission", type=Path, metavar="CSV", help="the RSNA 2019 competition's format")
    add("--names", choices=NAMES, default="file", help="how outputs name slices")
    add("--device", choices=[d.value for d in Device], default=Device.auto.value)
    add("--engine", choices=ENGINES, default="auto", help=engine)
    add("--batch-size", type=_positive, default=32)
    add("--workers", type=_positive, help="decoding processes; else one per core")
    add("--tracking-uri", help="MLflow's; else MLFLOW_TRACKING_URI, or mlflow.db here")
    add("--cache-dir", type=Path, default=Path(".ich-cache"), help="where the pseudonyms' key is")
    return parser


def parse(argv: Sequence[str] | None = None) -> PredictOptions:
    """The command line as options; exits as argparse does after a mistake."""
    given = vars(parser().parse_args(argv))
    with importing():  # torch: help and a mistake do not wait for it
        from ich.inference.predict import PredictOptions

    return PredictOptions(**given | {"device": Device(given["device"])})


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Predicts and writes; the exit status, see `ich.base.entry.Status`."""
    end_on_signals()
    keep_memory()
    return exit_status(lambda: _predict(parse(argv)))


def _predict(options: PredictOptions) -> int:
    from ich.inference.predict import predict

    return predict(options)


if __name__ == "__main__":
    leave(main())
