"""From files to probabilities, and the intervals of a comparison."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from ich.base.config import RESAMPLES, Config, image_size
from ich.base.metadata import Metadata
from ich.base.workers import available_cores
from ich.benchmarks import peers
from ich.benchmarks.measure import (
    REPORT,
    InTurn,
    PartResult,
    RatioRow,
    compare,
    compose_job,
    geometric_mean,
)
from ich.benchmarks.peers import Rate, rate_of
from ich.benchmarks.settings import Settings
from ich.data.inputs import Inputs
from ich.inference.ensemble import Ensemble, load_ensemble
from ich.inference.predicted_files import predict_files
from ich.scoring.uncertainty import ScoredRows, bootstrap, draw_counts, group_rows
from ich.training.devices import pick_device
from ich.training.model import build_model, input_spec, save_weights

# Intervals


def bench_intervals(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """Bootstrap resamples per second of a run of the report's size (11,623 rows, six labels, some
    7,000 patients): ours, all metrics, against drawing rows and scikit-learn's AUCs alone. Also the
    seconds that eight such runs take."""
    rng = np.random.default_rng(0)
    # The report's shares after oversampling: epidural, intraparenchymal, intraventricular,
    # subarachnoid, subdural, any.
    rates_of_labels = [0.033, 0.054, 0.037, 0.053, 0.069, 0.17]
    target = (rng.random((REPORT["val"], 6)) < rates_of_labels).astype(np.float32)
    # Positives three deviations above negatives: AUCs of 0.98, as a good network has.
    logits = (rng.normal(size=target.shape) + 3 * target).astype(np.float32)
    group, _ = group_rows(rng.integers(0, 7_000, len(target)), target[:, 0])
    scored = ScoredRows((*"abcde", "any"), target, logits, group)
    counts = draw_counts(scored.group_count, RESAMPLES)

    ours = rate_of(lambda: bootstrap(scored, counts), RESAMPLES)
    compared = compare(ours, peers.plain_bootstrap(scored), settings.rounds)
    begin = time.perf_counter()
    with ThreadPoolExecutor(available_cores()) as threads:
        list(threads.map(lambda _: bootstrap(scored, counts), range(8)))
    seconds = time.perf_counter() - begin
    note = (
        f"{RESAMPLES:,} resamples of eight runs of {REPORT['val']:,} rows and six labels took "
        f"{seconds:.1f} s."
    )
    yield PartResult({"intervals, resamples per s: ours / scikit-learn": compared}, [note])


# Predict


def bench_predict(settings: Settings, folder: Path) -> Iterator[PartResult]:
    """Slices predicted per second from DICOM files, process start included: `ich.predict` against a
    plain loop that decodes, windows and predicts one by one, with the same network."""
    files = phantom_slices(folder)
    note = (
        f"Predictions were of {len(files):,} files of 512 x 512 in a folder, one by one of "
        f"{len(files[: settings.images]):,} of them; on a CPU by --engine onnx, already converted."
    )
    for size in settings.image_size:
        networks, rows = InTurn("predict", settings.models, settings), dict[str, RatioRow]()
        for row in networks.measure(partial(_compare_predictions, size, folder, settings)):
            rows |= row
            yield PartResult(row)
        yield networks.remarks
        if rows:
            mean = geometric_mean([*rows.values()])
            yield PartResult({f"predict, {size} px: geometric mean": mean}, [note])


def phantom_slices(folder: Path) -> list[Path]:
    """The files of the phantom in a folder."""
    return sorted((folder / "phantom" / "stage_2_train").glob("*.dcm"))


def _compare_predictions(
    size: int, folder: Path, settings: Settings, model: str
) -> dict[str, RatioRow]:
    files = phantom_slices(folder)
    # Of few: a rate per slice needs no more, and one by one they take long.
    ours, plain = _prediction_sides(model, size, folder, files, files[: settings.images])
    row = compare(ours, plain, settings.rounds)
    return {f"predict, {model}, {size} px: ours / one by one": row}


def _prediction_sides(
    model: str, size: int, folder: Path, files: list[Path], few: list[Path]
) -> tuple[Rate, Rate]:
    """Ours over all files of their folder, and the plain loop over few of them."""
    config = compose_job(model, size, folder)
    weights = folder / f"{model}-{size}.safetensors"
    write_random_weights(config, weights)
    device = pick_device(config.train.device)
    cpu = device.type == "cpu"
    # Converted before anything is timed: that is done once for a model, whatever it then predicts.
    ensemble = load_ensemble([str(weights)], device, None, folder / "onnx" if cpu else None)
    network = build_model(config.model).to(device)
    ours = _prediction_rate(ensemble, files[0].parent, len(files))
    return ours, peers.plain_predictions(few, size, network, device)


def write_random_weights(config: Config, path: Path, labels: Sequence[str] = "abcdef") -> None:
    """Of a network that nobody trained, which predicts as fast as one that somebody did."""
    spec = input_spec(config.model)
    labels = tuple(labels)
    metadata = Metadata(
        config.model.name,
        config.model.timm,
        labels,
        tuple(config.windows.channels),
        config.data.cache_size,
        image_size(config),
        spec.mean,
        spec.std,
        dict.fromkeys(labels, 0.5),
    )
    save_weights(build_model(config.model), path, metadata)


def _prediction_rate(ensemble: Ensemble, folder: Path, files: int) -> Rate:
    def predict() -> None:
        inputs = Inputs.find([str(folder)])
        predict_files(ensemble, inputs, lambda _, identifier: identifier, lambda *_: None)
        assert len(inputs) == files

    return rate_of(predict, files)
