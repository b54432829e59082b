"""A page per study with a finding: its slices to scroll through, and where the network looked.

Files are read again, study by study, for no slice was kept when they were predicted; the maps come
from `ich.inference.gradcam`. The folder gets an index, a page per study and, in a folder of the
study's name, a picture of each finding.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from PIL import Image

from ich.base.config import UserError
from ich.base.files import write_json, write_text
from ich.base.progress import ProgressCallback
from ich.data.decode import ReadResult
from ich.data.inputs import Inputs
from ich.inference.ensemble import Ensemble
from ich.inference.gradcam import ensemble_cams, overlay
from ich.inference.predicted_files import PredictedFiles
from ich.inference.session import ShownFiles, ShownSlices, read_shown, see
from ich.inference.study import slices_that_moved
from ich.pages.data.slices import apply_windows
from ich.pages.page import Cell, Curve, Frame, Link, Ranking, Row, Section, Stack, Text, to_html
from ich.scoring.metrics import sigmoid

_SHOWN_SIZE = 384  # pixels of a picture's side
_JPEG_QUALITY = 88
_AT_ONCE = 16  # slices in memory with their pictures not yet made
_STEM_LENGTH = 100  # of a file's name, of the 255 bytes that it may have
_NO_STUDY, _MOST_WITHOUT = "no-study", 200  # slices of one page that name no study
_INDEX, _MANIFEST = "index.html", "explained.json"  # the latter lists all that a call wrote
_WARNING = (
    "Red to yellow: what moved the label's logit up (Grad-CAM), scaled to its own maximum in each "
    "picture. It is as coarse as the network's last feature maps, and it is no outline of a bleed. "
    "Research and education only; this is no diagnosis."
)
_MOVED = (
    " Below them, of each label that was found: which slices moved the head to its highest logit, "
    "by how much that falls when a slice is replaced by the mean of its series; scaled to the most."
)
_LEAST_MOVED = 1e-3  # of a logit


def check_folder(folder: Path) -> None:
    """Makes the folder, before anything is spent.

    Raises:
        UserError: it cannot be made or written to, or holds what no manifest of ours lists.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Of a name that nobody else has: a probe writes over nothing.
        with NamedTemporaryFile(dir=folder, prefix=".", suffix=".part"):
            pass
        foreign = _foreign(folder)
    except OSError as error:
        raise UserError(
            f"--explain is {str(folder)!r}, which cannot be made a folder ({error}). Choose "
            f"another."
        ) from None
    if foreign:
        raise UserError(
            f"--explain is {str(folder)!r}, which holds something else than explanations: "
            f"{str(foreign)!r}. An earlier call's pages are written over, and nothing else is. "
            f"Choose an empty or a new folder."
        )


def _foreign(folder: Path) -> Path | None:
    """Something in the folder that no earlier call wrote, relative to it; None if all is ours."""
    listed = _listed(folder)
    ours = {_MANIFEST, *listed} | {f"{name}.part" for name in (_MANIFEST, *listed)}
    folders = {str(Path(name).parent) for name in listed}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        # A link leads out of the folder, whatever it is called: we make none.
        known = name in folders if path.is_dir() else name in ours and path.is_file()
        if path.is_symlink() or not known:
            return path.relative_to(folder)
    return None


def _listed(folder: Path) -> list[str]:
    """What the manifest lists: names of the two forms that are written here, and no others."""
    try:
        names = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return [n for n in names if re.fullmatch(r"[\w-]+\.html|[\w-]+/\d+-[^/\0]+\.png", n)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def _clear(folder: Path) -> None:
    """Removes what an earlier call wrote: it had other findings, and so files of other names.

    Raises:
        UserError: something else has come into the folder since `check_folder`.
    """
    check_folder(folder)
    listed = _listed(folder)
    for name in (*listed, *(f"{name}.part" for name in listed)):
        (folder / name).unlink(missing_ok=True)
    for study in {Path(name).parent for name in listed} - {Path()}:
        with contextlib.suppress(FileNotFoundError):
            (folder / study).rmdir()


def explain(
    model: Ensemble,
    inputs: Inputs,
    predicted: PredictedFiles,
    names: Sequence[str],
    folder: Path,
    progress: ProgressCallback,
) -> list[Path]:
    """Writes a page per study with a positive slice, `index.html`, and a PNG per finding.

    Args:
        model: the networks.
        inputs: the files; each of the studies' is read again.
        predicted: what was predicted for them.
        names: how each file is called.
        folder: of `check_folder`; gets `<study>.html`, `<study>/<slice>-<label>.png`, and a
            manifest of these.
        progress: told of slices.

    Returns:
        The pages, in order of the studies.
    """
    probability = sigmoid(predicted.logits.mean(1))
    positive = probability >= _thresholds(model)  # NaN is not
    studies = [
        _Study(key, members, probability[members], positive[members])
        for key, members in _by_study(predicted, positive).items()
    ]
    total, done = sum(len(s.members) for s in studies), 0
    if total:
        progress(done, total)
    stems = _file_stems(model.labels)
    _clear(folder)
    # First: by it what follows is known as ours, wherever this call is cut short.
    write_json(folder / _MANIFEST, {"files": list(_planned(studies, stems))})
    write_text(folder / _INDEX, _index(model, studies))
    pages = []
    for study in studies:
        frames: list[Frame] = []
        outputs: dict[int, np.ndarray] = {}
        for frame in _frames(model, inputs, predicted, names, study, stems, folder, outputs):
            frames.append(frame)
            done += 1
            progress(done, total)
        page = folder / f"{study.key}.html"
        moved = _moved(model, predicted, study, outputs)
        write_text(page, _page(model, study, frames, moved))
        pages.append(page)
    return pages


def _thresholds(model: Ensemble) -> np.ndarray:
    """float64 [L], in the order of the labels."""
    return np.array([model.thresholds[k] for k in model.labels])


@dataclass(frozen=True)
class _Study:
    """members: numbers of its files, in the order in which they lie. The others: [N, L]."""

    key: str
    members: list[int]
    probability: np.ndarray
    positive: np.ndarray


def _planned(studies: Sequence[_Study], stems: Sequence[str]) -> Iterator[str]:
    """Every file that is to be written, relative to the folder."""
    yield _INDEX
    for study in studies:
        yield f"{study.key}.html"
        for n, label in np.argwhere(study.positive):
            yield _picture_name(study, n, stems[label])


def _picture_name(study: _Study, n: int, stem: str) -> str:
    return f"{study.key}/{n + 1:03d}-{stem}.png"


def _by_study(predicted: PredictedFiles, positive: np.ndarray) -> dict[str, list[int]]:
    """The files of each study that has a finding, in the order of its series and their slices."""
    studies: dict[str, list[int]] = {}
    for n, key in enumerate(predicted.study):
        if n not in predicted.reasons:
            studies.setdefault(key, []).append(n)
    # They may be of one patient or of a thousand: their pages are cut by number.
    lone = studies.pop("", [])
    for start in range(0, len(lone), _MOST_WITHOUT):
        number = f"-{start // _MOST_WITHOUT + 1}" if len(lone) > _MOST_WITHOUT else ""
        studies[_NO_STUDY + number] = lone[start : start + _MOST_WITHOUT]
    position = np.nan_to_num(predicted.position, nan=np.inf)  # an unknown one comes last
    return {
        key: sorted(members, key=lambda n: (predicted.series[n], position[n], n))
        for key, members in studies.items()
        if positive[members].any()
    }


def _frames(
    model: Ensemble,
    inputs: Inputs,
    predicted: PredictedFiles,
    names: Sequence[str],
    study: _Study,
    stems: Sequence[str],
    folder: Path,
    outputs: dict[int, np.ndarray],
) -> Iterator[Frame]:
    """Frame by frame; what heads need of a slice, float32 [M, W], goes to `outputs`."""
    sizes = (*model.sizes, _SHOWN_SIZE)
    for start in range(0, len(study.members), _AT_ONCE):
        part = study.members[start : start + _AT_ONCE]
        around = predicted.around[part]
        requests = list(inputs.requests(np.unique(around).tolist(), sizes))
        shown = read_shown(ShownFiles(requests, [tuple(row) for row in around.tolist()]))
        slices = {r.number: r for r in shown.files}
        if model.has_head:
            readable, hu = see(shown)
            of_slices = model.outputs(hu) if readable else ()
            outputs |= {r.number: o for r, o in zip(readable, of_slices, strict=True)}
        # Each label costs a map of every slice: only those that one of these slices has.
        positive = study.positive[start : start + _AT_ONCE].any(0)
        maps = _maps(model, shown, np.flatnonzero(positive).tolist())
        for n, number in enumerate(part, start=start):
            paths = [folder / _picture_name(study, n, stem) for stem in stems]
            of_slice = maps.get(number, {})
            yield _frame(model, study, n, slices[number], names[number], of_slice, paths)


def _maps(
    model: Ensemble, shown: ShownSlices, labels: Sequence[int]
) -> dict[int, dict[int, np.ndarray]]:
    """Of each slice that can be read, by its number: the map of each label, [S, S]."""
    readable, hu = see(shown)
    if not labels or not readable:
        return {}
    cams = ensemble_cams(model, hu, labels, _SHOWN_SIZE)
    return {r.number: dict(zip(labels, cams[:, i], strict=True)) for i, r in enumerate(readable)}


def _frame(
    model: Ensemble,
    study: _Study,
    n: int,
    read: ReadResult,
    name: str,
    maps: dict[int, np.ndarray],
    paths: Sequence[Path],
) -> Frame:
    """One slice: its windows, an overlay per finding, and a PNG of each of these, at the label's
    path."""
    title = f"{n + 1} of {len(study.members)}: {name}"
    if read.reason:  # the file was taken away since
        return Frame(title, [], [(read.reason, True)])
    # A person sees the first member's windows; the maps are of all of them.
    windows = model.members[0].metadata.windows
    shown = read.hu[_SHOWN_SIZE]
    shares = apply_windows(shown, windows)[: len(windows)]  # without the picture of all together
    grey = [(255 * share).round().astype(np.uint8) for share in shares]
    pictures = [(w.name, _encoded(g)) for w, g in zip(windows, grey, strict=True)]
    labels = []
    for i, label in enumerate(model.labels):
        labels.append((f"{label} {study.probability[n, i]:.3f}", bool(study.positive[n, i])))
        if study.positive[n, i]:
            shown_map = overlay(grey[0], maps[i])
            pictures.append((f"Grad-CAM of {label}", _encoded(shown_map)))
            paths[i].parent.mkdir(exist_ok=True)
            # All windows and the map side by side: a file that can be passed on alone.
            strip = np.concatenate([*(np.stack([g] * 3, -1) for g in grey), shown_map], 1)
            # A third of the time of the default level, for half as many bytes again.
            Image.fromarray(strip).save(paths[i], compress_level=2)
    return Frame(title, pictures, labels)


def _moved(
    model: Ensemble, predicted: PredictedFiles, study: _Study, outputs: dict[int, np.ndarray]
) -> np.ndarray:
    """How much each slice moved the heads' highest answer in its series, float64 [N, L]: the mean
    of the members with a head, without what spoke against a finding, by the study's most. NaN for a
    slice that no head saw."""
    labels = len(model.labels)
    moved = np.full((len(study.members), labels), np.nan)
    series: dict[str, list[int]] = {}
    for n, number in enumerate(study.members):  # in their order
        if predicted.in_study[number] and number in outputs:
            series.setdefault(predicted.series[number], []).append(n)
    for members in series.values():
        given = np.stack([outputs[study.members[n]] for n in members])
        position = predicted.position[[study.members[n] for n in members]]
        place = np.unique(position, return_inverse=True)[1]
        moved[members] = np.mean(
            [
                slices_that_moved(
                    head, own[:, labels : labels + head.features], own[:, :labels], place
                )
                for m, own in enumerate(given.transpose(1, 0, 2))
                if (head := model.members[m].network.head)
            ],
            axis=0,
        )
    # A fraction of a thousandth is no reason, and would be drawn as tall as one.
    most = np.nanmax(moved, axis=0, initial=_LEAST_MOVED)
    return np.asarray(np.maximum(moved, 0) / most)


def _encoded(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "jpeg", quality=_JPEG_QUALITY)
    return out.getvalue()


def _file_stems(labels: Sequence[str]) -> list[str]:
    """Of each label a name for files, which no other label has, in whatever case."""
    stems: list[str] = []
    for label in labels:
        # A label is whatever a CSV has as its heading, of any length.
        plain = re.sub(r"[^A-Za-z0-9_.+-]", "_", label)[:_STEM_LENGTH]
        choices = chain([plain], (f"{plain}-{n}" for n in count(2)))
        taken = {stem.lower() for stem in stems}
        stems.append(next(stem for stem in choices if stem.lower() not in taken))
    return stems


def _page(model: Ensemble, study: _Study, frames: list[Frame], moved: np.ndarray) -> str:
    margin = study.probability - _thresholds(model)
    stack = Stack(
        "Scroll with the wheel, the arrow keys or the slider; a curve leads to its slice. Dotted: "
        "thresholds." + (_MOVED if model.has_head else ""),
        [
            Curve(k, study.probability[:, i].tolist(), model.thresholds[k])
            for i, k in enumerate(model.labels)
        ]
        + [
            Curve(f"moved {k}", moved[:, i].tolist(), 1.0)
            for i, k in enumerate(model.labels)
            if study.positive[:, i].any() and not np.isnan(moved[:, i]).all()
        ],
        frames,
        # Opens at the slice that exceeds a threshold by most; NaN would count as the highest.
        int(np.nan_to_num(margin, nan=-1.0).max(1).argmax()),
    )
    back = Link("All studies", _INDEX)
    sections: list[Section] = [("Slices", [Text(_WARNING), stack, back])]
    return to_html(f"Study {study.key}", _facts(model, len(frames)), sections)


def _index(model: Ensemble, studies: Sequence[_Study]) -> str:
    if not studies:
        nothing = Text("No slice reaches the threshold of any label.")
        return to_html("Findings", _facts(model, 0), [("Studies", [nothing])])
    rows = []
    for study in studies:
        highest, positive = study.probability.max(0), np.any(study.positive, axis=0)
        cells = [
            Cell(f"{p:.3f}", p, is_best=is_positive)
            for p, is_positive in zip(highest.tolist(), positive.tolist(), strict=True)
        ]
        slices = Cell(f"{len(study.members)}", float(len(study.members)))
        rows.append(Row(study.key, [slices, *cells]))
    ranking = Ranking(
        "The highest probability of each label; bold from its threshold.",
        ["study", "slices", *model.labels],
        rows,
    )
    links = [Link(f"Study {s.key}", f"{s.key}.html") for s in studies]
    sections: list[Section] = [("Studies", [Text(_WARNING), ranking, *links])]
    return to_html("Findings", _facts(model, sum(len(s.members) for s in studies)), sections)


def _facts(model: Ensemble, slices: int) -> dict[str, str]:
    facts = {"model": model.name, "slices": f"{slices:,}", "thresholds": model.thresholds_text}
    if model.has_head:
        facts["maps"] = "of the slice network; probabilities have the study in view"
    return facts
