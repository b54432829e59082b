"""New scans through a trained network: `python -m ich.predict --model RUN scans -o out.csv`.

RUN is a run's folder, an MLflow run id or `models:/ich@ALIAS`; scans are DICOM files, folders or
zip archives. Decoding, windows, sizes, labels and thresholds are those that the network was trained
with: they stand in its weights file. Research and education only; this is no diagnosis.
"""

from __future__ import annotations

import os

# Decoding processes and torch's threads share the cores: threads that spin would take theirs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from ich.base import entry
from ich.base.config import Device, TrackingConfig, UserError
from ich.base.terminal import Terminal
from ich.base.workers import keep_memory
from ich.data.inputs import Inputs
from ich.data.patients import Pseudonyms
from ich.inference.ensemble import Ensemble, Predicted, load_ensemble, predict_files
from ich.inference.explain import explain
from ich.inference.graph import has_onnx
from ich.inference.outputs import (
    check_outputs,
    check_submission,
    image_id_of,
    left_out_path,
    slice_table,
    studies_path,
    study_table,
    write_left_out,
    write_submission,
    write_table,
)
from ich.inference.session import TTA
from ich.training.devices import pick_device

LEFT_OUT = 3  # exit status: predictions are written, and some files had none
_WORTH_CONVERTING = 3000  # files: a conversion takes 2 to 8 s
_SHOWN = 20  # studies, and files left out, in the terminal


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m ich.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status: 0, all files predicted; 3, some left out (listed in "
        "OUT.left_out.csv); 1, a mistake, or a disk that is full.",
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="DICOM files, folders, zips, or ZIP/FOLDER")
    add("--model", action="append", required=True, help="several are averaged")
    add("-o", "--out", type=Path, required=True, help="a .csv or .parquet; studies go beside it")
    add("--threshold", help="0.5, or any=0.3,epidural=0.1; else the best F1 on validation")
    add("--tta", choices=TTA, default="none", help="average over the four flips of a slice")
    add("--explain", type=Path, metavar="DIR", help="Grad-CAM pages of studies with findings")
    add("--submission", type=Path, metavar="CSV", help="the RSNA 2019 competition's format")
    add("--names", choices=("file", "pseudonym"), default="file", help="how outputs name slices")
    add("--device", choices=[d.value for d in Device], default=Device.auto.value)
    add("--engine", choices=("auto", "torch", "onnx"), default="auto", help="auto: onnxruntime on "
        "a CPU, from some thousand files on")  # fmt: skip
    add("--batch-size", type=_positive, default=32)
    add("--workers", type=_positive, help="decoding processes; else one per core")
    add("--tracking-uri", help="MLflow's; else the database in this folder")
    add("--cache-dir", type=Path, default=Path(".ich-cache"), help="where the pseudonyms' key is")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Predicts, writes, prints; returns the exit status.

    Raises:
        UserError: before anything is decoded: no such model or input, or a file that cannot be
            written; after it: no file could be predicted.
    """
    check_outputs(args)
    terminal, keys = Terminal(), Pseudonyms.beside(args.cache_dir)
    inputs = Inputs.find(args.inputs)
    tracking = TrackingConfig(mlflow=True, uri=args.tracking_uri)
    device = pick_device(Device(args.device))
    model = load_ensemble(args.model, device, tracking, conversions(args, device, len(inputs)))
    model = model.deciding(args.threshold)
    if args.submission:
        check_submission(model)
    with terminal.preparing() as report:
        found = predict_files(
            model,
            inputs,
            keys.key,
            lambda done, total: report("predicting", done, total),
            args.tta,
            args.batch_size,
            args.workers,
        )
    called = partial(_pseudonym, keys) if args.names == "pseudonym" else str
    names = [called(inputs.name(n)) for n in range(len(inputs))]
    refused = [(called(name), reason) for name, reason in inputs.refused]
    left_out = write_left_out(args.out, found, names, refused)
    if len(found.reasons) == len(inputs):
        raise UserError(_nothing(found, names))
    slices = slice_table(model, found, names)
    studies = study_table(model, found, names)
    write_table(slices, args.out)
    write_table(studies, studies_path(args.out))
    if args.submission:
        good = [n for n in range(len(inputs)) if n not in found.reasons]
        write_submission(slices, [image_id_of(inputs.name(n)) for n in good], args.submission)
    _print(terminal, model, studies, found, left_out, args)
    if args.explain:
        with terminal.preparing() as report:
            pages = explain(model, inputs, found, names, args.explain,
                            lambda done, total: report("explaining", done, total))  # fmt: skip
        terminal.say(f"{len(pages)} studies with findings: {args.explain / 'index.html'}")
    return LEFT_OUT if len(left_out) else 0


def _pseudonym(keys: Pseudonyms, name: str) -> str:
    # Quoted, for a file's name may end in a space, and wherever it is named from.
    return keys.key("file", repr(os.path.abspath(name)))  # noqa: PTH100


def conversions(args: argparse.Namespace, device: torch.device, files: int) -> Path | None:
    """Where networks converted for onnxruntime are kept, if it is to compute.

    Raises:
        UserError: it is asked for and not installed, or there is a GPU to compute on.
    """
    engine, on_cpu = args.engine, device.type == "cpu"
    if engine == "onnx" and not (has_onnx() and on_cpu):
        raise UserError(
            "--engine is onnx, which computes on the CPU and needs three packages. Install them "
            "with pip install 'ich[onnx]' and give --device cpu, or leave --engine at auto."
        )
    wanted = engine == "onnx" or (engine == "auto" and files >= _WORTH_CONVERTING)
    return args.cache_dir / "onnx" if wanted and on_cpu and has_onnx() else None


def _nothing(found: Predicted, names: Sequence[str]) -> str:
    first = min(found.reasons)
    return (
        f"none of the {len(names):,} files is a CT slice that can be predicted. The first, "
        f"{names[first]}: {found.reasons[first]}. Give the folder or archive that holds the slices."
    )


def _print(
    terminal: Terminal,
    model: Ensemble,
    studies: pd.DataFrame,
    found: Predicted,
    left_out: pd.DataFrame,
    args: argparse.Namespace,
) -> None:
    rows = [
        [str(r["study"]), f"{r['slices']}", *(f"{r[k]:.3f}" for k in model.labels), r["positive"]]
        for _, r in studies.head(_SHOWN).iterrows()
    ]
    said = [f"Thresholds: {model.limits}: {model.chosen_by}."]
    alone = sum(not key for n, key in enumerate(found.study) if n not in found.reasons)
    if alone:
        said.append(f"{alone:,} slices name no study and are in none of these rows.")
    if len(studies) > _SHOWN:
        said.append(f"{len(studies) - _SHOWN:,} more studies are in {studies_path(args.out)}.")
    for file, reason in left_out.head(_SHOWN).itertuples(index=False):
        said.append(f"left out: {file}: {reason}")
    if len(left_out):
        said.append(f"{len(left_out):,} files left out, listed in {left_out_path(args.out).name}.")
        if args.submission:
            said.append("The submission lacks them, and the competition refuses one with gaps.")
    if args.tta != "none":
        said.append("Averaged over flips; the thresholds are of slices as they are.")
    said.append(f"{len(found.study) - len(found.reasons):,} slices: {args.out}. Research only.")
    title = f"{model.name}: highest probability of each study"
    headings = ["study", "slices", *model.labels, "positive"]
    terminal.tables(title, [(headings, rows)], said)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status as the help says; 130 or 143 after Ctrl-C or SIGTERM."""
    args = parse(argv)
    keep_memory()
    return entry.exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
