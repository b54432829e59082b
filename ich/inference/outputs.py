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
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ich import entry
from ich.config import Device, TrackingConfig, UserError
from ich.explain import check_folder, explain
from ich.graph import has_onnx
from ich.inputs import Inputs
from ich.metrics import sigmoid
from ich.patients import Pseudonyms
from ich.pool import keep_memory
from ich.predictor import Ensemble, Predicted, load_ensemble, predict_files
from ich.session import TTA
from ich.terminal import Terminal
from ich.train import pick_device

LEFT_OUT = 3  # exit status: predictions are written, and some files had none
_WRITERS = {".csv": "to_csv", ".parquet": "to_parquet"}
_WORTH_CONVERTING = 3000  # files: a conversion takes 2 to 8 s
_TOP = 3  # slices of a study whose mean is its second score
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
        write_submission(slices, [_image_id(inputs.name(n)) for n in good], args.submission)
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


def studies_path(out: Path) -> Path:
    """`out.csv` -> `out.studies.csv`."""
    return out.with_name(f"{out.stem}.studies{out.suffix}")


def left_out_path(out: Path) -> Path:
    """`out.csv` -> `out.left_out.csv`."""
    return out.with_name(f"{out.stem}.left_out.csv")


def check_outputs(args: argparse.Namespace) -> None:
    """Refuses, before anything is spent, what cannot be written.

    Raises:
        UserError: an ending, a place, or two outputs in one file.
    """
    for path in (args.out, studies_path(args.out), left_out_path(args.out)):
        check_writable("-o", path, tuple(_WRITERS))
        if path.resolve() in [Path(name).resolve() for name in args.inputs]:
            raise UserError(
                f"-o {args.out} would write over the input {path}. Choose another file."
            )
    if args.explain:
        check_folder(args.explain)
    if not args.submission:
        return
    check_writable("--submission", args.submission, (".csv",))
    others = (args.out, studies_path(args.out), left_out_path(args.out))
    if args.submission.resolve() in [p.resolve() for p in others]:
        raise UserError(
            f"--submission is {str(args.submission)!r}, which is also where -o {args.out} writes. "
            f"Choose another file."
        )
    if args.names == "pseudonym":
        raise UserError(
            "--submission names images by their files, as the competition does, so it does not go "
            "with --names pseudonym. Leave one of them out."
        )


def check_writable(option: str, path: Path, endings: Sequence[str]) -> None:
    """Raises UserError if an option's file has another ending or cannot be written."""
    if path.suffix not in endings:
        raise UserError(
            f"{option} is {str(path)!r}, but must end with {' or '.join(endings)}. Choose another "
            f"name."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.part")
        probe.touch()
        probe.unlink()
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
    except OSError as error:
        raise UserError(
            f"{option} is {str(path)!r}, which cannot be written ({error}). Choose another place."
        ) from None


def write_table(table: pd.DataFrame, path: Path) -> None:
    """CSV or Parquet, by the name's ending; whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        getattr(table, _WRITERS[path.suffix])(part, index=False)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def write_left_out(
    out: Path, found: Predicted, names: Sequence[str], archives: Sequence[tuple[str, str]]
) -> pd.DataFrame:
    """Writes `out.left_out.csv`, `file` and `reason`, if there is any; returns it."""
    rows = [(names[n], reason) for n, reason in sorted(found.reasons.items())]
    table = pd.DataFrame([*archives, *rows], columns=["file", "reason"])
    path = left_out_path(out)
    if len(table):
        write_table(table, path)
    else:
        path.unlink(missing_ok=True)  # of an earlier time
    return table


def _nothing(found: Predicted, names: Sequence[str]) -> str:
    first = min(found.reasons)
    return (
        f"none of the {len(names):,} files is a CT slice that can be predicted. The first, "
        f"{names[first]}: {found.reasons[first]}. Give the folder or archive that holds the slices."
    )


def slice_table(model: Ensemble, found: Predicted, names: Sequence[str]) -> pd.DataFrame:
    """One row per predicted slice: `file`, a probability per label, `study` (a key that names
    nobody, empty if unknown), `positive` (labels that reach their threshold, separated by `;`),
    and of several models `<label>@<model>`."""
    good = [n for n in range(len(names)) if n not in found.reasons]
    logits = found.logits[good]
    mean = sigmoid(logits.mean(1))
    table = pd.DataFrame({"file": [names[n] for n in good]})
    table[list(model.labels)] = mean
    table["study"] = [found.study[n] for n in good]
    table["positive"] = [model.positives(p) for p in mean]
    if len(model.members) > 1:
        each = sigmoid(logits)
        for m, member in enumerate(model.members):
            table[[f"{k}@{member.name}" for k in model.labels]] = each[:, m]
    return table


def study_table(model: Ensemble, found: Predicted, names: Sequence[str]) -> pd.DataFrame:
    """One row per study, in order of appearance: `study`, `slices`, per label the highest
    probability, as `<label>_top3` the mean of the highest three, as `<label>_slice` the file with
    the highest, and `positive`, the labels whose highest reaches its threshold.

    Slices whose file names no study are in none.
    """
    of_study: dict[str, list[int]] = {}
    for n, key in enumerate(found.study):
        if key and n not in found.reasons:
            of_study.setdefault(key, []).append(n)
    rows = []
    for key, members in of_study.items():
        probability = sigmoid(found.logits[members].mean(1))
        ranked = np.sort(probability, axis=0)[::-1]
        decides = probability.argmax(0)
        row: dict[str, object] = {"study": key, "slices": len(members)}
        row |= dict(zip(model.labels, ranked[0], strict=True))
        for i, k in enumerate(model.labels):
            row[f"{k}_top3"] = ranked[:_TOP, i].mean()
            row[f"{k}_slice"] = names[members[decides[i]]]
        row["positive"] = model.positives(ranked[0])
        rows.append(row)
    columns = ["study", "slices", *model.labels]
    columns += [f"{k}_{what}" for k in model.labels for what in ("top3", "slice")] + ["positive"]
    return pd.DataFrame(rows, columns=columns)


def _image_id(name: str) -> str:
    """A file's name without a DICOM ending; other dots belong to it."""
    path = Path(name)
    return path.stem if path.suffix.lower() in (".dcm", ".dicom", ".ima") else path.name


def check_submission(model: Ensemble) -> None:
    """Raises UserError if the labels are not the competition's."""
    if not set(RSNA_LABELS) <= set(model.labels):
        raise UserError(
            f"--submission needs the competition's labels {', '.join(RSNA_LABELS)}, but the model "
            f"has {', '.join(model.labels)}. Leave it out, or take a model of the RSNA set."
        )


def write_submission(slices: pd.DataFrame, stems: Sequence[str], path: Path) -> None:
    """The competition's long format: `ID,Label`, six rows per image, `ID_<image>_<label>`.

    Args:
        slices: of `slice_table`, N rows.
        stems: the N names of the images, as the competition gives them to its files.
        path: a CSV.
    """
    twice = sorted({stem for stem, count in Counter(stems).items() if count > 1})
    if twice:
        raise UserError(
            f"{len(twice):,} images have several files (the first: {twice[0]}), so {path.name} "
            f"would name them twice and was not written; the other tables are there. Give each "
            f"image once."
        )
    ids = [f"{stem}_{k}" for stem in stems for k in RSNA_LABELS]
    values = slices[list(RSNA_LABELS)].to_numpy().ravel()
    write_table(pd.DataFrame({"ID": ids, "Label": values}), path)


# In the order of the competition's sample submission.
RSNA_LABELS = (
    "epidural",
    "intraparenchymal",
    "intraventricular",
    "subarachnoid",
    "subdural",
    "any",
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
    return entry.status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
