"""What a sweep's record answers of a reporting guideline, in sentences; a paper's methods too."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ich.base.config import select_value
from ich.base.records import CohortSummary, Hardware
from ich.pages.answers.subgroups import recorded_subgroups
from ich.pages.description import (
    cohort_text,
    describe_intervals,
    describe_verdicts,
    either,
    initial_weights,
    interval_text,
    optimizer_text,
    pixels_text,
    scoring_text,
)
from ich.scoring.comparison import RANKING_METRIC, Comparison, SettingResult
from ich.scoring.ensembles import GREEDY

_SOURCES = {
    "phantom": "a synthetic phantom of head CT, made by ich, which shows no patient",
    "rsna": "the RSNA 2019 Brain CT Hemorrhage Challenge (doi 10.1148/ryai.2020190211)",
    "folder": "scans of the author's own",
}
_LISTED = 12  # settings named one by one; of more, the table has them
# What a methods section says, in its order.
_METHODS = (
    *("data", "flow", "partition", "leak", "imbalance", "preprocessing", "augmentation"),
    *("model", "training", "selection", "metrics", "uncertainty", "software"),
)


def methods(comparison: Comparison) -> str:
    """A paragraph for a paper's methods; empty if no job has finished."""
    known = answers(comparison)
    return " ".join(known[key] for key in _METHODS if known.get(key))


def answers(comparison: Comparison) -> dict[str, str]:
    """What the record says, by the keys of `checklist`; what it does not say is left out."""
    if not comparison.finished:
        return {}
    texts = _of_data(comparison) | _of_training(comparison) | _of_results(comparison)
    return {key: text for key, text in texts.items() if text}


def _setting(comparison: Comparison) -> Callable[[str], str]:
    """A setting by its key, of all runs: `a or b` where they differ."""
    configs = [run.config for run in comparison.finished if run.config]
    return lambda key: either(select_value(config, key) for config in configs)


def _cohorts(comparison: Comparison) -> list[CohortSummary]:
    found: list[CohortSummary] = []
    for run in comparison.finished:
        if run.fit.cohort not in found:
            found.append(run.fit.cohort)
    return found


def _of_data(comparison: Comparison) -> dict[str, str]:
    setting, cohorts = _setting(comparison), _cohorts(comparison)
    sources = setting("data.source").split(" or ")
    labels = dict.fromkeys(label for run in comparison.finished for label in run.fit.labels)
    lost = sum(c.quarantined for c in cohorts)
    kinds = " and ".join(_SOURCES.get(source, source) for source in sources)
    prints = ", ".join(c.cohort for c in cohorts if c.cohort)
    return {
        "data": f"The images are of {kinds} (fingerprint of the cohort: {prints or 'unknown'}).",
        "flow": " ".join(f"Included were {cohort_text(c)}." for c in cohorts),
        "labels": f"Each image has {len(labels)} labels: {', '.join(labels)}.",
        "missing": f"Images that could not be decoded: {lost:,}, left out. Nothing was imputed.",
        "partition": f"{_partition(comparison)} The seed of the split was "
        f"{setting('protocol.seed')}.",
        "leak": " ".join(map(scoring_text, cohorts)),
        "imbalance": _imbalance(comparison),
        "events": " ".join(map(events_text, cohorts)),
        "sample": _sample(comparison),
    }


def _partition(comparison: Comparison) -> str:
    setting = _setting(comparison)
    how = {
        "report": "Rows were split at random, without regard to patients",
        "sound": "Patients were kept whole, and labels balanced between the sets",
    }
    name = setting("protocol.name")
    return (
        f"{how.get(name, f'The protocols were {name}')}; the share of validation was "
        f"{setting('protocol.val_fraction')}, that of testing {setting('protocol.test_fraction')}."
    )


def _imbalance(comparison: Comparison) -> str:
    setting = _setting(comparison)
    texts = [f"The loss was {setting('loss.name')}."]
    if (label := setting("protocol.oversample")) != "None":
        times = setting("protocol.oversample_times")
        texts += [f"Every row with {label} stands {times} times."]
    if (ratio := setting("protocol.negatives_per_positive")) != "None":
        texts += [f"Negative rows were drawn, {ratio} per positive one."]
    return " ".join(texts)


def events_text(cohort: CohortSummary) -> str:
    """Rows of each split, and how many have each label."""
    parts = []
    for split, rates in cohort.rates.items():
        rows = cohort.steps.get(split, 0)
        counts = ", ".join(f"{label} {round(rate * rows):,}" for label, rate in rates.items())
        parts.append(f"{split}: {rows:,} rows ({counts})")
    return f"Rows, and those with each label: {'; '.join(parts)}." if parts else ""


def _sample(comparison: Comparison) -> str:
    counts = [
        f"{rows.predictions.scored.group_count:,} {rows.predictions.unit} "
        f"({len(rows.predictions.image_id):,} rows)"
        for rows in comparison.evaluation_sets
    ]
    if not counts:
        return ""
    return (
        f"No size was calculated beforehand; scored were {' and '.join(counts)}. How many more "
        f"would tell the settings apart stands in report.html."
    )


def _of_training(comparison: Comparison) -> dict[str, str]:
    setting = _setting(comparison)
    configs = [run.config for run in comparison.finished if run.config]
    crop, context = setting("augment.crop_min"), setting("context.name")
    models = dict.fromkeys(
        f"{run.model} ({select_value(run.config, 'model.timm')} of timm, "
        f"{run.fit.params / 1e6:.1f} million trained parameters)"
        for run in comparison.finished
    )
    return {
        "preprocessing": f"Pixels were converted to Hounsfield units, resized to "
        f"{either(map(pixels_text, configs))}, clipped to CT windows, one per channel "
        f"({either(map(_windows, configs))}), scaled to 0 to 1 and normalized."
        + (f" The context was {context}." if context not in ("slice", "None") else ""),
        "augmentation": f"In training, images were flipped horizontally (probability "
        f"{setting('augment.hflip')}) and vertically ({setting('augment.vflip')}), and cropped "
        f"({setting('augment.crop')}) to a side of at least {crop} of the whole.",
        "model": f"The networks were {', '.join(models)}, with one output per label, of which the "
        f"sigmoid is its probability; {either(map(initial_weights, configs))}.",
        "training": f"They were trained for {setting('train.epochs')} epochs with "
        f"{either(map(optimizer_text, configs))} (learning rate), batches of "
        f"{setting('train.batch_size')}, scheduler {setting('scheduler.name')}, seed "
        f"{setting('seed')}; {len(comparison.finished)} trainings finished.",
        "selection": f"Of each, the epoch with the best validation {setting('train.monitor')} was "
        f"kept.",
        "initial": f"{either(map(initial_weights, configs))}; seed {setting('seed')}.",
        "varied": _varied(comparison),
        "software": _software(comparison),
        "code": _code(comparison),
        "output": "A probability for each label and slice; of a study, the highest of its slices. "
        "Thresholds were chosen on the validation rows.",
        "weights": "best.safetensors of each job, whose header has windows, size, labels and "
        "thresholds; ich predict --model FOLDER computes predictions of new scans.",
    }


def _windows(config: Mapping[str, object]) -> str:
    channels = select_value(config, "windows.channels")
    if not isinstance(channels, list):
        return "unknown"
    return ", ".join(
        f"{c.get('name')}: center {c.get('center')}, width {c.get('width')}"
        for c in channels
        if isinstance(c, dict)
    )


def _varied(comparison: Comparison) -> str:
    factors = comparison.factors().items()
    parts = [f"{k} ({', '.join(dict.fromkeys(v.values()))})" for k, v in factors]
    return f"Varied were {'; '.join(parts)}." if parts else ""


def _software(comparison: Comparison) -> str:
    texts = []
    for record in comparison.records:
        made, hardware = record.provenance, record.provenance.hardware or Hardware()
        named = [f"{k} {made.versions[k]}" for k in _NAMED if k in made.versions]
        if named:
            gpus = f" and {', '.join(hardware.gpus)}" if hardware.gpus else ""
            texts.append(f"Software: {', '.join(named)}; on {hardware.processor}{gpus}.")
    return " ".join(dict.fromkeys(texts))


_NAMED = ("ich", "python", "torch", "timm", "pydicom", "numpy", "scipy")


def _code(comparison: Comparison) -> str:
    commits = {
        f"commit {git.commit}{', changed since' if git.changed else ''}"
        for git in (record.provenance.git for record in comparison.records)
        if git
    }
    return f"ich, MIT licence, {' and '.join(sorted(commits)) or 'commit unknown'}."


def _of_results(comparison: Comparison) -> dict[str, str]:
    missing = [run.name for run in comparison.runs if not run.is_finished]
    failed = f" Jobs that did not finish: {', '.join(missing)}." if missing else ""
    best = [rows.best for rows in comparison.evaluation_sets if rows.best]
    verdict = f" {describe_verdicts(comparison.margin)}" if comparison.resamples else ""
    scored = either("validation" if c.scored == "val" else "test" for c in _cohorts(comparison))
    return {
        "metrics": "Measured were the AUC (micro- and macro-averaged and per label), average "
        "precision, accuracy, exact match, log loss, Brier score, calibration error, sensitivity "
        "at fixed specificity and specificity at fixed sensitivity, per slice and, where studies "
        "are known, per study.",
        "uncertainty": " ".join(describe_intervals(comparison)) + verdict,
        "internal": f"All numbers are of the {scored} rows of the same data.",
        "performance": _performance(comparison.settings),
        "diagnostic": " ".join(map(_diagnostic, best)),
        "calibration": " ".join(map(_calibration, best)),
        "ensembling": _ensembling(comparison),
        "subgroups": _subgroups(comparison),
        "failures": f"The most confident mistakes of the best run are shown in report.html.{failed}"
        if best
        else failed.strip(),
    }


def _performance(settings: list[SettingResult]) -> str:
    ranked = sorted(settings, key=lambda s: -s.mean(RANKING_METRIC))
    parts = []
    for setting in ranked[:_LISTED]:
        interval = interval_text(setting.interval(RANKING_METRIC))
        between = f" ({interval})" if interval else ""
        parts.append(f"{setting.name} {setting.mean(RANKING_METRIC):.3f}{between}")
    more = f" And {len(ranked) - _LISTED} more, in comparison.csv." if ranked[_LISTED:] else ""
    return f"AUC: {'; '.join(parts)}.{more}" if parts else ""


def _ensembling(comparison: Comparison) -> str:
    parts = []
    for ensemble in (e for rows in comparison.evaluation_sets for e in rows.ensembles):
        interval = interval_text(ensemble.interval(RANKING_METRIC))
        between = f" ({interval})" if interval else ""
        value = ensemble.predictions.metrics[RANKING_METRIC]
        chosen = ", chosen on validation" if ensemble.name == GREEDY else ""
        parts.append(
            f"{ensemble.name}, of {len(ensemble.members)} networks{chosen}: {value:.3f}{between}"
        )
    return f"By the mean of logits, AUC: {'; '.join(parts)}." if parts else ""


def _subgroups(comparison: Comparison) -> str:
    names = recorded_subgroups(comparison.records)
    if not (names and comparison.settings):
        return ""
    return f"By {', '.join(names)}, the best setting has every metric in subgroups.csv."


def _diagnostic(best: SettingResult) -> str:
    labels = best.predictions.scored.labels
    values = {label: best.mean(f"sensitivity_at_90_{label}") for label in labels}
    parts = [f"{label} {value:.3f}" for label, value in values.items() if not np.isnan(value)]
    return f"Sensitivity of {best.name} at 90 % specificity: {', '.join(parts)}." if parts else ""


def _calibration(best: SettingResult) -> str:
    names = {"ece": "calibration error", "brier": "Brier score", "log_loss": "log loss"}
    parts = []
    for metric, name in names.items():
        interval = interval_text(best.interval(metric))
        between = f" ({interval})" if interval else ""
        parts.append(f"{name} {best.mean(metric):.3f}{between}")
    return f"{best.name}: {', '.join(parts)}."
