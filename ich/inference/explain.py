"""Where a network looked: Grad-CAM of every finding, and a page per study to scroll through.

Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) weights the last feature maps by the gradient of
a label's logit and keeps what is positive; Captum computes it. It shows what moved the number, on a
grid as coarse as these maps, and not where the blood is.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam
from PIL import Image
from torch import nn

from ich.base.config import UserError
from ich.base.files import write_text
from ich.data.decode import Read, read_chunk
from ich.data.inputs import Inputs
from ich.inference.ensemble import Ensemble, Network, Predicted
from ich.pages.data_page import compose
from ich.pages.page import Cell, Curve, Frame, Line, Link, Ranking, Section, Stack, Text, to_html
from ich.scoring.metrics import sigmoid
from ich.training.model import Classifier

_SHOWN_SIZE = 384  # pixels of a picture's side
_OPACITY = 0.55  # of the map where it is highest
_JPEG_QUALITY = 88
_AT_ONCE = 16  # slices in memory with their pictures not yet made
_NO_STUDY, _MOST_WITHOUT = "no-study", 200  # slices of one page that name no study
_INDEX = "index.html"
_WARNING = (
    "Red to yellow: what moved the label's logit up (Grad-CAM), scaled to its own maximum in each "
    "picture. It is as coarse as the network's last feature maps, and it is no outline of a bleed. "
    "Research and education only; this is no diagnosis."
)


class _Head(nn.Module):
    """What follows a network's last feature maps, these as a layer that Captum can find."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.maps, self.head = nn.Identity(), model.head

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.maps(maps).mean((2, 3)))
        return logits


def grad_cams(network: Network, hu: np.ndarray, labels: Sequence[int], size: int) -> np.ndarray:
    """The Grad-CAM maps of some labels.

    Args:
        network: the network.
        hu: int16 [B, S, S], HU, S the cache size of its metadata.
        labels: places of K labels.
        size: side of the maps, pixels.

    Returns:
        float32 [K, B, size, size], each 0..1 with its own maximum at 1; all 0 where nothing moved
        the logit up.
    """
    with torch.no_grad():  # gradients are needed from the maps on: one pass serves all labels
        x = network.windows(network.planes(torch.from_numpy(hu)))
        maps = network.model.base.forward_features(x).float()
    head = _Head(network.model)
    cam = LayerGradCam(head, head.maps)
    found = [cam.attribute(maps, k, relu_attributions=True).detach() for k in labels]
    each = [LayerAttribution.interpolate(f, (size, size), "bilinear")[:, 0] for f in found]
    cams = torch.stack(each)
    highest = cams.amax((2, 3), keepdim=True)
    scaled = torch.where(highest > 0, cams / highest.clamp(min=1e-12), 0)
    return scaled.float().cpu().numpy()


def ensemble_cams(
    model: Ensemble, hu: dict[int, np.ndarray], labels: Sequence[int], size: int = _SHOWN_SIZE
) -> np.ndarray:
    """The mean of the members' maps, float32 [K, B, size, size]; see `grad_cams`."""
    each = [grad_cams(m.network, hu[m.metadata.cache_size], labels, size) for m in model.members]
    return np.asarray(np.mean(each, axis=0))


def check_folder(folder: Path) -> None:
    """Makes the folder, before anything is spent.

    Raises:
        UserError: it cannot be made or written to, or holds what is not ours.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".part").touch()
        (folder / ".part").unlink()
        there = any(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"--explain is {str(folder)!r}, which cannot be made a folder ({error}). Choose "
            f"another."
        ) from None
    if there and not (folder / _INDEX).is_file():
        raise UserError(
            f"--explain is {str(folder)!r}, which holds something else than explanations. Choose "
            f"an empty or a new folder."
        )


def _clear(folder: Path) -> None:
    """Removes what was written here before: another time has other findings, and other names."""
    for page in folder.glob("*.html"):
        for picture in (folder / page.stem).glob("[0-9]*-*.png"):
            picture.unlink()
        page.unlink()


def explain(
    model: Ensemble,
    inputs: Inputs,
    found: Predicted,
    names: Sequence[str],
    folder: Path,
    progress: Callable[[int, int], None],
) -> list[Path]:
    """Writes a page per study with a positive slice, `index.html`, and a PNG per finding.

    Args:
        model: the networks.
        inputs: the files; each of the studies' is read again.
        found: what was predicted for them.
        names: how each file is called.
        folder: of `check_folder`; gets `<study>.html` and `<study>/<slice>-<label>.png`.
        progress: told of slices.

    Returns:
        The pages, in order of the studies.
    """
    probability = sigmoid(found.logits.mean(1))
    limits = np.array([model.thresholds[k] for k in model.labels])
    positive = probability >= limits  # NaN is not
    studies = [_Study(key, members, probability[members], positive[members])
               for key, members in _by_study(found, positive).items()]  # fmt: skip
    total, done = sum(len(s.members) for s in studies), 0
    _clear(folder)
    write_text(folder / _INDEX, _index(model, studies))  # first: by it the folder is known as ours
    pages = []
    for study in studies:
        frames = []
        for frame in _frames(model, inputs, names, study, folder / study.key):
            frames.append(frame)
            done += 1
            progress(done, total)
        page = folder / f"{study.key}.html"
        write_text(page, _page(model, study, frames))
        pages.append(page)
    return pages


@dataclass(frozen=True)
class _Study:
    """members: numbers of its files, in the order in which they lie. The others: [N, L]."""

    key: str
    members: list[int]
    probability: np.ndarray
    positive: np.ndarray


def _by_study(found: Predicted, positive: np.ndarray) -> dict[str, list[int]]:
    """The files of each study that has a finding, in the order of its series and their slices."""
    studies: dict[str, list[int]] = {}
    for n, key in enumerate(found.study):
        if n not in found.reasons:
            studies.setdefault(key, []).append(n)
    lone = studies.pop("", [])
    for start in range(0, len(lone), _MOST_WITHOUT):
        number = f"-{start // _MOST_WITHOUT + 1}" if len(lone) > _MOST_WITHOUT else ""
        studies[_NO_STUDY + number] = lone[start : start + _MOST_WITHOUT]
    place = np.nan_to_num(found.position, nan=np.inf)  # an unknown one comes last
    return {
        key: sorted(members, key=lambda n: (found.series[n], place[n], n))
        for key, members in studies.items()
        if positive[members].any()
    }


def _frames(
    model: Ensemble, inputs: Inputs, names: Sequence[str], study: _Study, folder: Path
) -> Iterator[Frame]:
    sizes = (*model.sizes, _SHOWN_SIZE)
    for start in range(0, len(study.members), _AT_ONCE):
        part = study.members[start : start + _AT_ONCE]
        read = {r.number: r for asked in inputs.ask(part, sizes) for r in read_chunk(asked)}
        there = [n for n in part if not read[n].reason]
        labels = np.flatnonzero(study.positive[start : start + _AT_ONCE].any(0)).tolist()
        maps: dict[tuple[int, int], np.ndarray] = {}
        if labels and there:
            hu = {size: np.stack([read[n].hu[size] for n in there]) for size in model.sizes}
            cams = ensemble_cams(model, hu, labels)
            maps = {(n, k): cams[i, b] for i, k in enumerate(labels) for b, n in enumerate(there)}
        for at, number in enumerate(part, start=start):
            of_slice = {k: maps[number, k] for k in labels if (number, k) in maps}
            yield _frame(model, study, at, read[number], names[number], of_slice, folder)


def _frame(
    model: Ensemble,
    study: _Study,
    n: int,
    read: Read,
    name: str,
    maps: dict[int, np.ndarray],
    folder: Path,
) -> Frame:
    """One slice: its windows, an overlay per finding, and a PNG of each of these."""
    title = f"{n + 1} of {len(study.members)}: {name}"
    if read.reason:  # the file was taken away since
        return Frame(title, [], [(read.reason, True)])
    windows = model.members[0].metadata.windows
    shown = read.hu[_SHOWN_SIZE]
    shares = compose(shown, windows)[: len(windows)]  # without the picture of all together
    grey = [(255 * share).round().astype(np.uint8) for share in shares]
    pictures = [(w.name, _encoded(g)) for w, g in zip(windows, grey, strict=True)]
    said = []
    for i, label in enumerate(model.labels):
        said.append((f"{label} {study.probability[n, i]:.3f}", bool(study.positive[n, i])))
        if study.positive[n, i]:
            overlay = _overlay(grey[0], maps[i])
            pictures.append((f"Grad-CAM of {label}", _encoded(overlay)))
            folder.mkdir(exist_ok=True)
            strip = np.concatenate([*(np.stack([g] * 3, -1) for g in grey), overlay], 1)
            place = folder / f"{n + 1:03d}-{_safe(label)}.png"
            Image.fromarray(strip).save(place, compress_level=2)
    return Frame(title, pictures, said)


def _overlay(grey: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """uint8 [S, S] with a map [S, S] of 0..1 over it: uint8 [S, S, 3]."""
    from matplotlib import colormaps

    color = colormaps["autumn"](cam)[..., :3] * 255
    share = _OPACITY * cam[..., None]
    mixed = grey[..., None] * (1 - share) + color * share
    return np.asarray(mixed.round(), np.uint8)


def _encoded(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "jpeg", quality=_JPEG_QUALITY)
    return out.getvalue()


def _safe(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", label)


def _page(model: Ensemble, study: _Study, frames: list[Frame]) -> str:
    strongest = study.probability - np.array([model.thresholds[k] for k in model.labels])
    stack = Stack(
        "Scroll with the wheel, the arrow keys or the slider; a curve leads to its slice. Dotted: "
        "thresholds.",
        [
            Curve(k, study.probability[:, i].tolist(), model.thresholds[k])
            for i, k in enumerate(model.labels)
        ],
        frames,
        int(strongest.max(1).argmax()),
    )
    back = Link("All studies", _INDEX)
    sections: list[Section] = [("Slices", [Text(_WARNING), stack, back])]
    return to_html(f"Study {study.key}", _facts(model, len(frames)), sections)


def _index(model: Ensemble, studies: Sequence[_Study]) -> str:
    if not studies:
        nothing = Text("No slice reaches the threshold of any label.")
        return to_html("Findings", _facts(model, 0), [("Studies", [nothing])])
    lines = []
    for study in studies:
        highest = study.probability.max(0)
        cells = [
            Cell(f"{p:.3f}", float(p), is_best=bool(out))
            for p, out in zip(
                highest.tolist(), np.any(study.positive, axis=0).tolist(), strict=True
            )
        ]
        slices = Cell(f"{len(study.members)}", float(len(study.members)))
        lines.append(Line(study.key, [slices, *cells]))
    ranking = Ranking(
        "The highest probability of each label; bold from its threshold.",
        ["study", "slices", *model.labels],
        lines,
    )
    links = [Link(f"Study {s.key}", f"{s.key}.html") for s in studies]
    sections: list[Section] = [("Studies", [Text(_WARNING), ranking, *links])]
    return to_html("Findings", _facts(model, sum(len(s.members) for s in studies)), sections)


def _facts(model: Ensemble, slices: int) -> dict[str, str]:
    return {"model": model.name, "slices": f"{slices:,}", "thresholds": model.limits}
