"""Trained networks, alone or together: HU in, logits out, by nothing but their own metadata.

A model is named by the folder of its run, by its weights file, or by what MLflow calls it. What
turns a slice into its input stands in the weights file; no caller can get it wrong.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ich.base.config import TrackingConfig, UserError
from ich.base.metadata import Metadata
from ich.base.provenance import code_version
from ich.base.results import RunPaths
from ich.base.workers import available_cores, available_memory, run_parallel
from ich.data.decode import Asked, Read, read_chunk
from ich.data.inputs import Inputs
from ich.inference.graph import NO_AUGMENT, Graph, write_onnx
from ich.inference.session import Converted, Task, averaged, read_and_predict, session
from ich.scoring.metrics import best_thresholds
from ich.scoring.predictions import Predictions, read_predictions
from ich.tracking.registry import fetch_run, is_mlflow_name
from ich.training.model import Classifier, fold_batch_norms, load_trained
from ich.training.transforms import CTWindows, Resample

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]  # files done, of how many

_PER_WORKER = 200  # a process takes about as long to start as this many slices take to decode
_MEMORY_SHARE = 0.25  # of free memory for networks in all processes; onnxruntime packs them anew
_KILLED = (
    "not read: a decoding process was killed, for want of memory or by a file that crashes its "
    "decoder; --workers 1 shows which"
)
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
        fold_batch_norms(model)
        meta = self.metadata
        self.converted = _convert(weights, model, meta, converted) if converted else None
        self.device, self.model = device, model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.resample = Resample(meta.image_size, NO_AUGMENT)
        self.windows = CTWindows(meta.windows, device, meta.mean, meta.std)

    def planes(self, hu: torch.Tensor) -> torch.Tensor:
        """int16 HU [B, S, S], S the cache size of its metadata -> float32 HU [B, 1, size, size]."""
        return self.resample(hu.to(self.device))

    def logits(self, hu: np.ndarray, tta: str = "none") -> np.ndarray:
        """int16 HU [B, S, S] -> float32 [B, L]; with `flips` the mean over the four of a slice."""
        return averaged(self._logits, hu, tta)

    @torch.inference_mode()
    def _logits(self, hu: np.ndarray) -> np.ndarray:
        if self.converted is not None:
            return session(self.converted.path, available_cores())(hu)
        x = self.windows(self.planes(torch.from_numpy(hu)))
        logits: np.ndarray = self.model(x).cpu().numpy()
        return logits


def _convert(
    weights: Path, model: Classifier, metadata: Metadata, folder: Path
) -> Converted | None:
    made_by = f"{torch.__version__} {code_version()}".encode()
    path = folder / f"{hashlib.sha256(weights.read_bytes() + made_by).hexdigest()[:16]}.onnx"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_onnx(Graph(model, metadata), path)
        return Converted(str(path.resolve()), metadata.cache_size)
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
    def limits(self) -> str:
        """The thresholds as text."""
        return ", ".join(f"{k} {t:.3f}" for k, t in self.thresholds.items())

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sides, pixels, in which its members need a slice."""
        return tuple(sorted({m.metadata.cache_size for m in self.members}))

    def deciding(self, given: str | None) -> Ensemble:
        """The same with other thresholds: one number for all labels, or `label=number,...`.

        Raises:
            UserError: no such label, or no probability.
        """
        if given is None:
            return self
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

    def for_each_of(self, processes: int) -> tuple[Converted, ...]:
        """Its networks if each of so many processes can hold them; else, or if one of them is not
        converted, none."""
        found = [m.network.converted for m in self.members]
        networks = tuple(n for n in found if n)
        needed = processes * sum(n.size for n in networks)
        return networks if all(found) and needed < _MEMORY_SHARE * available_memory() else ()

    def logits(self, hu: dict[int, np.ndarray], tta: str = "none") -> np.ndarray:
        """int16 HU [B, S, S] of each side S -> float32 [B, M, L], one of each member."""
        found = [m.network.logits(hu[m.metadata.cache_size], tta) for m in self.members]
        return np.stack(found, 1)


def load_ensemble(
    names: Sequence[str],
    device: torch.device,
    tracking: TrackingConfig | None = None,
    converted: Path | None = None,
) -> Ensemble:
    """Loads what the names stand for.

    Args:
        names: of each, a run's folder, a `.safetensors` file, an MLflow run id, or `models:/...`.
        device: where they compute.
        tracking: the MLflow store that is meant; None for the database in this folder.
        converted: see `Network`.

    Raises:
        UserError: there is no such model, or they have different labels.
    """
    found = [_locate(name, tracking or TrackingConfig(mlflow=True)) for name in names]
    titles = _titles([_title(weights, run) for weights, run in found])
    members = [
        Member(title, weights, run, Network(weights, device, converted))
        for title, (weights, run) in zip(titles, found, strict=True)
    ]
    first = members[0]
    for member in members:
        _check_run(member)
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


def _locate(name: str, tracking: TrackingConfig) -> tuple[Path, RunPaths | None]:
    """The weights file of a name, and the folder of its run."""
    path = Path(name)
    if not path.exists() and is_mlflow_name(name):
        return fetch_run(name, tracking)
    if path.is_dir() and RunPaths(path).best.is_file():
        return RunPaths(path).best, RunPaths(path)
    if path.is_file() and path.suffix == ".safetensors":
        beside = RunPaths(path.parent)
        return path, beside if beside.best == path else None
    if done := sorted(p.parent.name for p in path.glob(f"*/{RunPaths(path).best.name}")):
        raise UserError(
            f"the model is {name!r}, which is a sweep. Give one of its runs, as "
            f"{path / done[0]}; it has {', '.join(done[:12])}."
        )
    raise UserError(
        f"the model is {name!r}, which is nothing to predict with. Give the folder of a finished "
        f"run (it holds {RunPaths(path).best.name}), a .safetensors file of ich, an MLflow run id, "
        f"or models:/ich@ALIAS. Other formats can carry code and are not read."
    )


def _title(weights: Path, run: RunPaths | None) -> str:
    """The name of a run's job, or of a lone file."""
    return str(said_in_config(run, "job") or weights.stem)


def said_in_config(run: RunPaths | None, key: str) -> object:
    """A setting of a run, of whatever version of ich; None if nothing tells."""
    try:
        return OmegaConf.select(OmegaConf.load(run.config), key) if run else None
    except (OSError, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError):
        return None


def _titles(names: Sequence[str]) -> list[str]:
    """The names, numbered where one stands twice."""
    counted = [names[: n + 1].count(name) for n, name in enumerate(names)]
    return [f"{name} ({c})" if names.count(name) > 1 else name
            for name, c in zip(names, counted, strict=True)]  # fmt: skip


def _check_run(member: Member) -> None:
    """A run's folder must hold the weights of its own network."""
    said = said_in_config(member.run, "model.name")
    if said is not None and said != member.metadata.model:
        raise UserError(
            f"{member.weights} holds weights of {member.metadata.model}, but the run beside it "
            f"(config.yaml) trained {said}. Put the run's own weights back, or give "
            f"the file alone, from another folder."
        )


def _validation(members: Sequence[Member]) -> Predictions | None:
    """Of an ensemble on the rows that all its members were validated on."""
    each = [read_predictions(m.run, "val") if m.run else None for m in members]
    known = [p for p in each if p is not None]
    if len(known) < len(members) or len({p.fingerprint for p in known}) > 1:
        return None
    return Predictions.average(known)


def _thresholds(
    members: Sequence[Member], validation: Predictions | None
) -> tuple[dict[str, float], str]:
    labels = members[0].metadata.labels
    if len(members) == 1:
        found = members[0].metadata.thresholds
        text = "the best F1 on the run's validation rows"
    elif validation is not None:
        found = best_thresholds(*validation.validation_rows, labels)
        text = "the best F1 of the average on the members' common validation rows"
    else:
        each = {k: [m.metadata.thresholds[k] for m in members] for k in labels}
        found = {
            k: None if None in v else float(np.mean([t for t in v if t is not None]))
            for k, v in each.items()
        }
        text = "the mean of the members' thresholds, for their validation rows differ or are gone"
    unknown = [k for k in labels if found[k] is None]
    if unknown:
        text += f"; {_HALF} for {', '.join(unknown)}, which validation could not tell"
    return {k: _HALF if (t := found[k]) is None else t for k in labels}, text


@dataclass(frozen=True)
class Predicted:
    """What became of N files.

    logits: float32 [N, M, L], of M members; NaN for a file that was refused. reasons: of those.
    study, series: keys, empty where a file names none. position: float64 [N], mm, NaN if unknown.
    """

    logits: np.ndarray
    reasons: dict[int, str]
    study: list[str]
    series: list[str]
    position: np.ndarray


def predict_files(
    ensemble: Ensemble,
    inputs: Inputs,
    key: Callable[[str, str], str],
    progress: Progress,
    tta: str = "none",
    batch_size: int = 32,
    workers: int | None = None,
) -> Predicted:
    """Decodes files by all cores and predicts them, batch by batch; holds a few batches at a time.

    A converted network computes where its files are decoded. Batches are made of neighbouring
    files, so that the result does not depend on who is faster.

    Args:
        ensemble: the networks.
        inputs: the N files.
        key: replaces an identifier: its kind ("study" or "series") and itself.
        progress: told of files.
        tta: one of `TTA`.
        batch_size: files in a batch.
        workers: decoding processes, this one included; None is up to one per core.

    Raises:
        UserError: the GPU's memory does not suffice.
    """
    count = len(inputs)
    shape = (count, len(ensemble.members), len(ensemble.labels))
    out = Predicted(np.full(shape, np.nan, np.float32), {}, [""] * count, [""] * count,
                    np.full(count, np.nan))  # fmt: skip
    crew = workers or min(available_cores(), -(-count // _PER_WORKER))
    left, done = set(range(count)), 0
    try:
        for read in _read(ensemble, inputs.batches(batch_size, ensemble.sizes), crew, tta):
            fill(out, read, ensemble, key, tta)
            left.difference_update(one.number for one in read)
            done += len(read)
            progress(done, count)
    except BrokenProcessPool:
        out.reasons.update(dict.fromkeys(left, _KILLED))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory at {batch_size} slices at a time: {str(error).splitlines()[0]} "
            f"Lower the batch size (--batch-size, or batch_size for ich.evaluate), or compute on "
            f"the CPU (--device cpu, device=cpu)."
        ) from None
    finally:
        session.cache_clear()
    return out


def _read(
    ensemble: Ensemble, batches: Iterator[Asked], crew: int, tta: str
) -> Iterator[list[Read]]:
    """Reads files by so many processes, which predict them, too, if each can hold the networks."""
    if not (networks := ensemble.for_each_of(crew)):
        return run_parallel(read_chunk, batches, crew)
    threads = max(1, available_cores() // crew)
    tasks = (Task(asked, networks, threads, tta) for asked in batches)
    return run_parallel(read_and_predict, tasks, crew)


def fill(
    out: Predicted, read: list[Read], ensemble: Ensemble, key: Callable[[str, str], str], tta: str
) -> None:
    """Puts one batch of files into its places, predicted if it is not yet."""
    for one in read:
        if one.reason:
            out.reasons[one.number] = one.reason
        else:
            out.study[one.number] = key("study", one.study)
            out.series[one.number] = key("series", one.series)
            out.position[one.number] = one.position
    good = [one for one in read if not one.reason]
    if not good:
        return
    found = [one.logits for one in good if one.logits is not None]
    if len(found) == len(good):
        logits = np.stack(found)
    else:
        hu = {size: np.stack([one.hu[size] for one in good]) for size in ensemble.sizes}
        logits = ensemble.logits(hu, tta)
    numbers = [one.number for one in good]
    out.logits[numbers] = logits
    for n in itertools.compress(numbers, ~np.isfinite(logits).all((1, 2))):
        out.logits[n] = np.nan
        out.reasons[n] = "its logits are not finite: the weights are damaged"
