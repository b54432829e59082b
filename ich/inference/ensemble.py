"""Trained networks, alone or together: HU in, logits out, by nothing but their own metadata.

A model is named by the folder of its run, by its weights file, or by what MLflow calls it. What
turns a slice into its input stands in the weights file; no caller can get it wrong.

`load_ensemble` makes all of it: a `Network` computes, a `Member` is one with its name and its run,
an `Ensemble` averages their logits and holds the thresholds.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ich.base.config import TrackingConfig, UserError
from ich.base.memory import available_memory
from ich.base.metadata import Metadata
from ich.base.provenance import code_version
from ich.base.records import ComputeMode
from ich.base.results import RunPaths, SweepPaths
from ich.base.workers import available_cores
from ich.inference.graph import NO_AUGMENT, Graph, write_onnx
from ich.inference.session import (
    ConvertedNetwork,
    average_flips,
    of_slices,
    open_session,
    stack,
)
from ich.scoring.metrics import best_thresholds
from ich.scoring.predictions import Predictions, read_predictions
from ich.tracking.registry import fetch_run, is_mlflow_name
from ich.training.devices import configure_cudnn
from ich.training.mode import CHANNELS_LAST
from ich.training.model import Classifier, fold_batch_norms, load_trained
from ich.training.study.head import StudyHead
from ich.training.transforms import CTWindows, Resample

log = logging.getLogger(__name__)

_MEMORY_SHARE = 0.25  # of free memory for networks in all processes; onnxruntime packs them anew
_HALF = 0.5  # where validation had no positive to choose a threshold by


class Network:
    """One trained network on a device, in float32.

    Args:
        weights: its file.
        device: where it computes.
        converted: a folder of networks converted for onnxruntime, which on a processor is up to
            three times as fast; one that is not there yet is, in some seconds. None for torch.
    """

    def __init__(self, weights: Path, device: torch.device, converted: Path | None = None):
        model, self.metadata = load_trained(weights)
        # A batch normalization is a constant scale and shift by now, which the convolution before
        # it can hold: 1.7 times as fast on two cores (442 -> 738 images a second).
        fold_batch_norms(model)
        meta = self.metadata
        # Before the model moves and changes its layout: it is exported as it was loaded.
        self.converted = _convert(weights, model, meta, converted) if converted else None
        self.device, self.model = device, model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        configure_cudnn(device, ComputeMode("fp32", CHANNELS_LAST))
        # The same two steps as in training, with the sizes and windows of the weights file.
        self.resample = Resample(meta.image_size, NO_AUGMENT)
        self.windows = CTWindows(meta.windows, device, meta.mean, meta.std, slices=meta.slices)

    def planes(self, hu: torch.Tensor) -> torch.Tensor:
        """int16 HU [B, S, S], S the cache size of its metadata -> float32 HU [B, 1, size, size]; of
        a network that sees P slices at once, [B, P, S, S] -> [B, P, size, size]."""
        return self.resample(hu.to(self.device))

    def logits(self, hu: np.ndarray, tta: str = "none") -> np.ndarray:
        """int16 HU as `planes` takes it -> float32 [B, L]; with `flips` the mean over the four."""
        return self.outputs(hu, tta)[:, : len(self.metadata.labels)]

    @property
    def head(self) -> StudyHead | None:
        """What follows over the slices of a study."""
        study: StudyHead | None = self.model.study
        return study

    @property
    def features(self) -> int:
        """How many pooled features of a slice the head needs, 0 without one."""
        return self.head.features if self.head else 0

    def outputs(self, hu: np.ndarray, tta: str = "none") -> np.ndarray:
        """As `logits`; behind these, of a network with a head, the pooled features that it needs:
        float32 [B, L + F]."""
        return average_flips(self._outputs, hu, tta)

    @torch.inference_mode()
    def _outputs(self, hu: np.ndarray) -> np.ndarray:
        if self.converted is not None:
            return open_session(self.converted.path, available_cores())(hu)
        x = self.windows(self.planes(torch.from_numpy(hu)))
        if not self.features:
            outputs = self.model(x)
        else:
            outputs = torch.cat(self.model.pooled_and_logits(x)[::-1], 1)
        return np.asarray(outputs.cpu().numpy())


def _convert(
    weights: Path, model: Classifier, metadata: Metadata, folder: Path
) -> ConvertedNetwork | None:
    # With another torch, or other code of ours, the same weights may make another graph.
    made_by = f"{torch.__version__} {code_version()}".encode()
    path = folder / f"{hashlib.sha256(weights.read_bytes() + made_by).hexdigest()[:16]}.onnx"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            features = model.study is not None and model.study.features > 0
            write_onnx(Graph(model, metadata, features=features), path)
        return ConvertedNetwork(str(path.resolve()), metadata.cache_size, metadata.slices)
    # Speed is all that is lost: the same network predicts with torch.
    except UserError as error:
        log.warning("torch computes instead of onnxruntime: %s", error)
        return None


@dataclass(frozen=True)
class Member:
    """A network of an ensemble. name: unique in it. run: where it came from, None for a lone
    weights file."""

    name: str
    weights: Path
    run: RunPaths | None
    network: Network

    @property
    def metadata(self) -> Metadata:
        return self.network.metadata


@dataclass(frozen=True)
class Ensemble:
    """Networks of the same labels, whose logits are averaged.

    thresholds: per label, the probability from which it is positive. chosen_by: how, in a sentence.
    validation: what the members' average predicted on their validation rows, by which epochs and
    thresholds were chosen; None if these are not at hand, or not the same for all.
    """

    members: list[Member]
    labels: tuple[str, ...]
    thresholds: dict[str, float]
    chosen_by: str
    validation: Predictions | None

    @property
    def name(self) -> str:
        return " + ".join(m.name for m in self.members)

    @property
    def thresholds_text(self) -> str:
        """The thresholds, as a reader sees them."""
        return ", ".join(f"{k} {t:.3f}" for k, t in self.thresholds.items())

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sides, pixels, in which its members need a slice."""
        return tuple(sorted({m.metadata.cache_size for m in self.members}))

    @property
    def slices(self) -> int:
        """How many slices are to be given to it at once: those before and after one are of no use
        to a member that sees one alone."""
        return max(m.metadata.slices for m in self.members)

    def with_thresholds(self, given: str | None) -> Ensemble:
        """The same with other thresholds: one number for all labels, or `label=number,...`.

        Raises:
            UserError: no such label, or no probability.
        """
        if given is None:
            return self
        # From the right: a label may hold an equals sign, a number holds none.
        pairs = [part.rpartition("=") for part in given.split(",")]
        try:
            values = {label.strip(): float(number) for label, _, number in pairs}
        except ValueError:
            values = {}
        whole = len(values) == len(pairs)  # else no number, or a label twice
        if whole and "=" not in given:
            values = dict.fromkeys(self.labels, values[""])
        known = set(values) <= set(self.labels)
        if not (whole and known and all(0 <= t <= 1 for t in values.values())):
            raise UserError(
                f"--threshold is {given!r}, but must be a number from 0 to 1, or such numbers for "
                f"labels, as {self.labels[-1]}=0.3. The labels are {', '.join(self.labels)}."
            )
        others = f"; else {self.chosen_by}" if set(values) < set(self.labels) else ""
        return replace(self, thresholds=self.thresholds | values, chosen_by=f"as given{others}")

    def positives(self, probability: np.ndarray) -> str:
        """The labels whose probabilities [L] reach their thresholds, separated by `;`."""
        pairs = zip(self.labels, probability, strict=True)
        return ";".join(k for k, p in pairs if p >= self.thresholds[k])

    def converted_for(self, processes: int) -> tuple[ConvertedNetwork, ...]:
        """Its networks if each of so many processes can hold them; else, or if one of them is not
        converted, none."""
        networks = tuple(n for m in self.members if (n := m.network.converted))
        # Every process has its own copy, and half of the members would not do.
        needed = processes * sum(n.size for n in networks)
        complete = len(networks) == len(self.members)
        return networks if complete and needed < _MEMORY_SHARE * available_memory() else ()

    def logits(self, hu: dict[int, np.ndarray], tta: str = "none") -> np.ndarray:
        """int16 HU [B, P, S, S] of each side S, P as in `slices` -> float32 [B, M, L], one of each
        member; [B, S, S] will do where P is 1."""
        return self.outputs(hu, tta)[:, :, : len(self.labels)]

    def outputs(self, hu: dict[int, np.ndarray], tta: str = "none") -> np.ndarray:
        """As `logits`, and behind them what the members' heads need: float32 [B, M, W]."""
        return stack([m.network.outputs(self.seen_by(m, hu), tta) for m in self.members])

    @property
    def has_head(self) -> bool:
        """Whether a member predicts studies, and not slices alone."""
        return any(m.network.head for m in self.members)

    def seen_by(self, member: Member, hu: dict[int, np.ndarray]) -> np.ndarray:
        """What a member sees of the HU that `logits` takes."""
        return of_slices(hu[member.metadata.cache_size], member.metadata.slices)


def load_ensemble(
    names: Sequence[str],
    device: torch.device,
    tracking: TrackingConfig | None = None,
    converted: Path | None = None,
) -> Ensemble:
    """Loads what the names stand for.

    Args:
        names: of each, a run's folder, a `.safetensors` file, an MLflow run id, or `models:/...`;
            or a sweep's folder, which stands for its ensemble (`SweepPaths.ensemble_runs`).
        device: where they compute.
        tracking: the MLflow store that is meant; None for the database in this folder.
        converted: see `Network`.

    Raises:
        UserError: there is no such model, or they have different labels.
    """
    where = tracking or TrackingConfig(mlflow=True)
    files = [file for name in names for file in _locate(name, where)]
    titles = _numbered([_title(weights, run) for weights, run in files])
    members = [
        Member(title, weights, run, Network(weights, device, converted))
        for title, (weights, run) in zip(titles, files, strict=True)
    ]
    first = members[0]
    for member in members:
        _check_run(member)
        # In the same order, too: logits are averaged by position.
        if member.metadata.labels != first.metadata.labels:
            raise UserError(
                f"the models have different labels: {first.name} has "
                f"{', '.join(first.metadata.labels)}, and {member.name} "
                f"{', '.join(member.metadata.labels)}. Only networks of the same labels, in the "
                f"same order, can be averaged."
            )
    validation = _validation(members)
    thresholds, chosen_by = _thresholds(members, validation)
    return Ensemble(members, first.metadata.labels, thresholds, chosen_by, validation)


def _locate(name: str, tracking: TrackingConfig) -> list[tuple[Path, RunPaths | None]]:
    """The weights files of a name, and the folders of their runs."""
    path = Path(name)
    # What lies here comes first: a run id is also a possible name of a folder.
    if not path.exists() and is_mlflow_name(name):
        return [fetch_run(name, tracking)]
    if path.is_dir() and RunPaths(path).best.is_file():
        return [(RunPaths(path).best, RunPaths(path))]
    if path.is_file() and path.suffix == ".safetensors":
        # A run's own weights bring their run with them; a copy elsewhere stands for itself.
        beside = RunPaths(path.parent)
        return [(path, beside if beside.best == path else None)]
    if runs := SweepPaths(path).ensemble_runs():
        return [(run.best, run) for run in runs]
    raise UserError(
        f"the model is {name!r}, which is nothing to predict with. Give the folder of a finished "
        f"run (it holds {RunPaths(path).best.name}), a .safetensors file of ich, an MLflow run id, "
        f"or models:/ich@ALIAS. Other formats can carry code and are not read."
    )


def _title(weights: Path, run: RunPaths | None) -> str:
    """The name of a run's job, or of a lone file."""
    return str(config_value(run, "job") or weights.stem)


def config_value(run: RunPaths | None, key: str) -> object:
    """A setting of a run, of whatever version of ich; None if nothing tells."""
    return run.setting(key) if run else None


def _numbered(names: Sequence[str]) -> list[str]:
    """The names, numbered where one stands twice."""
    return [
        f"{name} ({names[: n + 1].count(name)})" if names.count(name) > 1 else name
        for n, name in enumerate(names)
    ]


def _check_run(member: Member) -> None:
    """A run's folder must hold the weights of its own network."""
    trained = config_value(member.run, "model.name")
    if trained is not None and trained != member.metadata.model:
        raise UserError(
            f"{member.weights} holds weights of {member.metadata.model}, but the run beside it "
            f"(config.yaml) trained {trained}. Put the run's own weights back, or give "
            f"the file alone, from another folder."
        )


def _validation(members: Sequence[Member]) -> Predictions | None:
    """Of an ensemble on the rows that all its members were validated on."""
    each = [read_predictions(m.run, "val") if m.run else None for m in members]
    known = [p for p in each if p is not None]
    # Rows that some of them were trained on would flatter the average.
    if len(known) < len(members) or len({p.fingerprint for p in known}) > 1:
        return None
    return Predictions.average(known)


def _thresholds(
    members: Sequence[Member], validation: Predictions | None
) -> tuple[dict[str, float], str]:
    labels = members[0].metadata.labels
    # From the weights file: a lone copy of it decides as its run does.
    if len(members) == 1:
        thresholds = members[0].metadata.thresholds
        on = (
            "rows it was recalibrated on"
            if members[0].metadata.recalibration
            else "run's validation rows"
        )
        text = f"the best F1 on the {on}"
    elif validation is not None:
        thresholds = best_thresholds(*validation.validation_rows, labels)
        text = "the best F1 of the average on the members' common validation rows"
    else:
        # The next best: no common rows are at hand to choose thresholds of the average by.
        each = {k: [m.metadata.thresholds[k] for m in members] for k in labels}
        thresholds = {
            k: None if None in v else float(np.mean([t for t in v if t is not None]))
            for k, v in each.items()
        }
        text = "the mean of the members' thresholds, for their validation rows differ or are gone"
    unknown = [k for k in labels if thresholds[k] is None]
    if unknown:
        text += f"; {_HALF} for {', '.join(unknown)}, which validation could not tell"
    return {k: _HALF if (t := thresholds[k]) is None else t for k in labels}, text
