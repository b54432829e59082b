"""What `ich export` does: a network as one file, checked against ours, and its card.

`run` is the command and `export` its work; below them stand the writers and readers of the formats,
and the slices on which what was written is compared with the network itself.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ich.base.config import EXPORTS, TrackingConfig, UserError
from ich.base.files import replacing, write_text
from ich.base.metadata import Metadata
from ich.base.terminal import Terminal
from ich.base.workers import available_cores
from ich.data.decode import resize_area
from ich.data.dicom import HU_MAX, HU_MIN, MAX_SIDE
from ich.inference.card import model_card
from ich.inference.ensemble import Ensemble, Network, load_ensemble
from ich.inference.graph import (
    Graph,
    StudyGraph,
    batch_dimension,
    has_onnx,
    quiet,
    write_onnx,
)
from ich.inference.session import Session
from ich.inference.study import logits_of_series
from ich.scoring.metrics import sigmoid

CARD = "model_card.md"
_LARGEST_DIFFERENCE = 1e-3  # of a probability, above which an export is refused
_CHECKED = 8  # slices
# int16 HU [B, S, S], or [B, P, S, S] of several slices at once -> probabilities [B, L]
Predict = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ExportOptions:
    """The command's options, as its help has them. format: one of `EXPORTS`. size: side of the
    slices that the file takes, pixels. resamples: of the card's intervals, 0 for none."""

    model: str
    format: str
    out: Path | None
    size: int
    resamples: int
    tracking_uri: str | None


def run(options: ExportOptions) -> int:
    """Exports and says so; returns the exit status.

    Raises:
        UserError: see `export`; or a number is out of its range.
    """
    if options.resamples < 0:
        raise UserError(f"--resamples is {options.resamples}; it must be 0 or more.")
    tracking = TrackingConfig(mlflow=True, uri=options.tracking_uri)
    model = load_ensemble([options.model], torch.device("cpu"), tracking)
    if len(model.members) > 1:
        raise UserError(
            f"--model is {options.model!r}, which stands for {len(model.members)} networks, and an "
            f"exported file holds one. Give one of its runs: {model.name.replace(' + ', '; ')}."
        )
    check_size(options.size, model.members[0].metadata)
    folder = options.out or Path("exports") / re.sub(r"[^A-Za-z0-9_.,=+-]", "-", model.name)
    difference = export(model, options.format, folder, options.size, options.resamples)
    say = Terminal().say
    taken = input_text(options.format, options.size, model.members[0].metadata)
    say(f"{folder / EXPORTS[options.format]}: {taken}")
    say(f"Largest difference from ich's own probabilities: {difference:.2g}")
    say(f"Model card: {folder / CARD}")
    return 0


def export(model: Ensemble, kind: str, folder: Path, side: int, resamples: int) -> float:
    """Writes a model of one network and its card.

    Args:
        model: it.
        kind: one of `EXPORTS`.
        folder: gets both; what is there already is replaced, whole or not at all.
        side: of the slices that the graph takes, pixels.
        resamples: of the card's intervals.

    Returns:
        The largest difference of a probability from ours, on slices made up for it.

    Raises:
        UserError: the card cannot be made, a package is missing, or the difference is too large.
    """
    member = model.members[0]
    slices, taken = member.metadata.slices, input_text(kind, side, member.metadata)
    card = model_card(model, taken, resamples)  # first: it may be refused
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"-o is {str(folder)!r}, which cannot be made a folder ({error}). Choose another."
        ) from None
    # Elsewhere, for torch wants the name as it will be; and a killed export leaves nothing there.
    with TemporaryDirectory() as scratch:
        part = Path(scratch) / EXPORTS[kind]
        if kind == "safetensors":
            shutil.copyfile(member.weights, part)
        else:
            _write_graph(member.network, kind, part, side)
        hu = made_up_slices(side)
        if slices > 1:  # each with the one before and after it
            hu = np.stack([np.roll(hu, slices // 2 - n, 0) for n in range(slices)], 1)
        # Read back from the file, as its user would: what was written is what is compared.
        exported = _reader(kind, part, side)(hu)
        difference = float(np.abs(exported - predict(member.network, hu)).max())
        # Not `>`: of a NaN neither holds, and it must not pass.
        if not difference <= _LARGEST_DIFFERENCE:
            raise UserError(
                f"the exported {part.name} gives probabilities that differ by {difference:.2g} "
                f"from ours, more than {_LARGEST_DIFFERENCE}, so it was not kept. Try another "
                f"--format, and report it with the network's name."
            )
        with replacing(folder / part.name) as whole:
            shutil.copyfile(part, whole)
    write_text(folder / CARD, card)
    return difference


def input_text(kind: str, side: int, metadata: Metadata) -> str:
    """What an exported file takes and gives, in a sentence. side: of its slices, pixels."""
    if kind == "safetensors":
        return f"The file {EXPORTS[kind]} holds weights and metadata, for ich itself to read."
    first, what, slices = "batch", "square slices (pad with -1024)", metadata.slices
    shape = f"[batch, {side}, {side}]"
    if slices > 1:
        shape = f"[batch, {slices}, {side}, {side}]"
        what += ", each with the one before and the one after it in its series (at an end, itself)"
    if metadata.is_of_studies:
        first, shape = "slices", f"[slices, {side}, {side}]"
        what = f"all {what} of one series, at least 2, in their order along their plane's normal"
    return (
        f"The file {EXPORTS[kind]} takes `hu`, int16 {shape}, Hounsfield units of {what}, and "
        f"gives `probability`, float32 [{first}, labels]."
    )


def _write_graph(network: Network, kind: str, path: Path, side: int) -> None:
    # From slices as scanners give them to probabilities: its user needs no step of ours.
    model, of_weights = network.model, network.metadata
    graph: Graph | StudyGraph = Graph(model, of_weights, side, probabilities=True)
    if network.head:
        graph = StudyGraph(model, of_weights, side)
    graph.eval()
    metadata = {
        "ich": of_weights.to_json(),
        "input": input_text(kind, side, of_weights),
        "intended_use": "research and education only; not a medical device",
    }
    if kind == "onnx":
        if not has_onnx():
            raise UserError(
                "--format onnx needs the packages onnx, onnxscript and onnxruntime, which are not "
                "installed: pip install 'ich[onnx]'. --format torch_export needs none."
            )
        write_onnx(graph, path, metadata)
        return
    example, batch = graph.example(2), batch_dimension(graph)
    with quiet(), torch.no_grad():
        program = torch.export.export(graph, (example,), dynamic_shapes=({0: batch},))
        program.example_inputs = None  # it would be kept as a pickle
        torch.export.save(program, path, extra_files={"ich.json": json.dumps(metadata)})


def predict(network: Network, hu: np.ndarray) -> np.ndarray:
    """What `ich.predict` gives for square slices, int16 HU [..., S, S]: probabilities [B, L]; with
    a head over studies, as the slices of one series in their order."""
    # By the decoder, whose average the exported graph has as a matrix: so that is compared as well.
    size, *_, side = network.metadata.cache_size, *hu.shape
    small = np.stack([resize_area(one, size) for one in hu.reshape(-1, side, side)])
    small = small.reshape(*hu.shape[:-2], size, size)
    return sigmoid(logits_of_series(network, small) if network.head else network.logits(small))


def _reader(kind: str, path: Path, side: int) -> Predict:
    """Reads an exported file as its user would."""
    if kind == "onnx":
        return Session(path, available_cores())
    if kind == "safetensors":
        network = Network(path, torch.device("cpu"))
        return lambda hu: predict(network, hu)
    with quiet():
        module = torch.export.load(path).module()

    def run(hu: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(module(torch.from_numpy(hu)))

    return run


def made_up_slices(side: int) -> np.ndarray:
    """int16 HU [8, S, S]: blobs of every size and HU, and noise; the same each time."""
    rng = np.random.default_rng(0)
    slices = []
    for n in range(_CHECKED):
        # From two blobs a side to 33, constant over ever smaller squares.
        coarse = rng.normal(size=(2 ** (n % 6) + 1,) * 2)
        at = np.linspace(0, len(coarse) - 1e-6, side).astype(int)
        # Around the brain's 40 HU, with contrasts from 10 to 2,000: in every window and beyond.
        hu = 40 + 10 ** (1 + n / 3) * coarse[at][:, at] + rng.normal(0, 5, (side, side))
        slices.append(np.clip(hu, HU_MIN, HU_MAX))
    return np.rint(slices).astype(np.int16)


def check_size(size: int, metadata: Metadata) -> None:
    """Raises UserError if a network cannot take slices of `size` pixels a side."""
    # From smaller slices the network would see less than it was trained on.
    if not metadata.cache_size <= size <= MAX_SIDE:
        raise UserError(
            f"--size is {size}, but must be from {metadata.cache_size}, the size of the slices the "
            f"network was trained on, to {MAX_SIDE} pixels. 512 is what most scanners give."
        )
