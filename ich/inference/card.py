"""A model card for an exported model: what it is, what it was made from, and what it does not show.

The headings are those of Mitchell et al. 2019, Model Cards for Model Reporting (arXiv 1810.03993).
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from ich.base.config import Config, Source, UserError, load_config
from ich.base.files import DamagedError
from ich.base.records import CohortSummary, FitResult
from ich.base.results import RunPaths
from ich.inference.ensemble import Ensemble, Member
from ich.pages.description import cohort_text, scoring_text
from ich.pages.evaluation_page import OVERALL, PER_LABEL, shown_table
from ich.pages.page import Block, Bullets, Section, Table, Text, to_markdown
from ich.scoring.evaluation import VALIDATION, Evaluation, metrics_table
from ich.scoring.predictions import Predictions, read_predictions
from ich.scoring.uncertainty import MIN_GROUPS
from ich.training.model import count_parameters

# Under which terms the data came, by where they came from: a model inherits them.
_LICENCES = {
    Source.rsna: "RSNA 2019 Brain CT Hemorrhage data, copyright RSNA 2019 (A. E. Flanders et al., "
    "doi 10.1148/ryai.2020190211): non-commercial research and education only, and no attempt to "
    "identify anyone. Treat a model trained on them the same.",
    Source.phantom: "Synthetic slices, made by ich.phantom: no patient's data, under the licence "
    "of ich (MIT).",
    Source.folder: "Scans of whoever trained the model, whose terms ich does not know: write them "
    "here before you pass the model on.",
}


def model_card(model: Ensemble, exported: str, resamples: int) -> str:
    """The card of a model that came from one finished run, in Markdown.

    Args:
        model: of one member.
        exported: what the exported file takes and gives, in a sentence.
        resamples: of the bootstrap.

    Raises:
        UserError: the run's result or predictions are not at hand.
    """
    # Of a single one: an average of several has no run, and so no cohort and no metrics.
    (member,) = model.members
    run, config, fit = _read_run(member)
    scored, validation = read_predictions(run), read_predictions(run, "val")
    if scored is None or validation is None:
        raise UserError(
            f"{run.predictions} cannot be read, so the model card would have no metric. Give the "
            f"run's folder as it was left, or its MLflow run id."
        )
    recalibration = member.metadata.recalibration
    title = f"Model card: {config.model.name}"
    facts = {"run": f"{config.name}/{config.job}", "labels": ", ".join(model.labels)}
    sections: list[Section] = [
        ("Model details", [Bullets(list(_details(member, config, run, exported)))]),
        ("Intended use", [Bullets(_INTENDED)]),
        ("Training and evaluation data", [Bullets(list(_data(config, fit.cohort)))]),
        ("Metrics", list(_metrics(model, scored, validation, resamples))),
        ("Thresholds", list(_thresholds(model))),
        ("Limits", [Bullets(list(_limits(config, fit.cohort, scored, recalibration)))]),
        ("Licence", [Bullets(_licence(config))]),
    ]
    return to_markdown(title, facts, sections)


_INTENDED = [
    "Research and education: comparing networks, reproducing a report, finding failure cases.",
    "Not a medical device. Nothing it prints is a diagnosis, and it must not decide, or help to "
    "decide, what is done for a patient.",
    "Input: axial non-contrast CT slices of the head in Hounsfield units. Other body parts, "
    "contrast agent, other modalities and pictures taken from a screen are out of its scope; it "
    "gives a number for them too.",
]


def _read_run(member: Member) -> tuple[RunPaths, Config, FitResult]:
    run = member.run
    # The weights say how their input is made; what they were trained on stands in their run alone.
    fit = run.read_result().fit if run else None
    if run is None or fit is None or not run.config.exists():
        raise UserError(
            f"{member.weights} has no finished run beside it, so nothing is known of its data and "
            f"metrics for the model card. Give the folder of its run, its MLflow run id, or "
            f"models:/ich@ALIAS."
        )
    try:
        return run, load_config(run.config), fit
    except DamagedError as error:
        raise UserError(
            f"{error}, so nothing is known for the model card. Put a whole copy back, or export "
            f"with the version that trained the run."
        ) from None


def _details(member: Member, config: Config, run: RunPaths, exported: str) -> Iterator[str]:
    meta, cfg = member.metadata, config.model
    params, _ = count_parameters(cfg, len(meta.labels))
    yield (
        f"{cfg.name} (timm {cfg.timm}): convolutional base, global average pooling, one linear "
        f"layer with {len(meta.labels)} outputs; {params / 1e6:.2f} million parameters."
    )
    windows = ", ".join(f"{w.name} ({w.center:g}/{w.width:g})" for w in meta.windows)
    yield (
        f"Input: slices averaged to {meta.cache_size} and resampled to {meta.image_size} pixels, "
        f"in these CT windows as channels (center/width, HU): {windows}."
    )
    if meta.slices > 1:
        yield (
            "It sees the slices before, at and after one, in this order along the normal of their "
            "plane, each in these windows; at an end of its series a slice stands for its "
            "neighbour."
        )
    if meta.is_of_studies:
        taken = "their pooled features and logits" if meta.head == "features" else "their logits"
        yield (
            f"A head sees {taken} over all slices of a series in their order along the normal of "
            f"their plane, and gives the probability of each. A slice that is alone, or of which "
            f"nothing tells where it lies, has that of the slice network."
        )
    yield exported
    # A given file takes the place of the ImageNet weights.
    start = "a local file's" if cfg.weights else "ImageNet" if cfg.pretrained else "random"
    t = config.train
    optimizer = config.optimizer._target_.rsplit(".", 1)[-1]
    yield (
        f"Trained from {start} weights: {t.epochs} epochs, batch {t.batch_size}, {optimizer} "
        f"{config.optimizer.lr:g}, loss {config.loss.name.value}, seed {config.seed}; the epoch "
        f"with the best validation {t.monitor.value} was kept."
    )
    # Of the training, not of this export, which may be of later code.
    provenance = run.read_provenance()
    commit = provenance.commit or "unknown"
    versions = ", ".join(f"{k} {v}" for k, v in provenance.versions.items())
    yield f"Made with commit {commit}" + (f"; {versions}." if versions else ".")


def _data(config: Config, cohort: CohortSummary) -> Iterator[str]:
    yield f"data={config.data.source.value}, protocol={config.protocol.name.value}, cohort " + (
        f"{cohort.cohort or 'unknown'}: {cohort_text(cohort)}."
    )
    yield scoring_text(cohort)


def _metrics(
    model: Ensemble, scored: Predictions, validation: Predictions, resamples: int
) -> Iterator[Block]:
    tested = scored.fingerprint != validation.fingerprint
    # Without a test set the scored rows are those of validation: a second column would repeat them.
    other = validation if tested else None
    left_out = pd.DataFrame(columns=["image_id", "reason"])
    evaluation = Evaluation(model.name, scored, other, model.thresholds, [], left_out)
    table = metrics_table(evaluation, resamples)
    count = scored.scored.group_count
    where = "the test rows" if tested else "the validation rows, by which the epoch was chosen"
    intervals = (
        f"with 95 % intervals from {resamples:,} bootstrap resamples of {count:,} {scored.unit}"
        # Resamples of so few are too much alike: the interval would look narrower than it is.
        if resamples and count >= MIN_GROUPS
        else f"without intervals ({count:,} {scored.unit})"
    )
    yield Text(f"Per slice, on {where}, {intervals}. Accuracy is at probability 0.5.")
    decided = [f"{m}_{k}" for k in model.labels for m in ("sensitivity", "specificity")]
    for heading, names, level in (
        ("All labels, per slice", OVERALL, "slice"),
        *((f"{k}, per slice", [f"{m}_{k}" for m in PER_LABEL], "slice") for k in model.labels),
        ("Per study, positive where any of its slices is", decided, "study"),
    ):
        shown = shown_table(table, names, level).drop(columns=["difference"])
        if not len(shown):  # studies are unknown
            continue
        if not tested:
            shown = shown.drop(columns=[VALIDATION])
        yield Table(heading, shown.rename(columns={"here": "test" if tested else VALIDATION}))


def _thresholds(model: Ensemble) -> Iterator[Block]:
    yield Text(f"A label is positive from these probabilities on: {model.chosen_by}.")
    lines = [{"label": k, "threshold": f"{v:.4f}"} for k, v in model.thresholds.items()]
    yield Table("Thresholds", pd.DataFrame(lines))


def _limits(
    config: Config, cohort: CohortSummary, scored: Predictions, recalibration: str
) -> Iterator[str]:
    # What is unknown is told with the data, by `scoring_text`.
    leak = {k: v for k, v in cohort.leak.items() if v}
    if cohort.scored == "val":
        yield "There is no test set: the same rows chose the epoch and the thresholds, and scored."
    if leak:
        shares = ", ".join(f"{v:.1%} of the scored rows the {k}" for k, v in leak.items())
        yield (
            f"The split leaks: {shares} with the training rows. On new patients expect less than "
            f"these metrics."
        )
    if config.data.source is Source.phantom:
        yield "Trained on synthetic slices: its metrics say nothing about a patient."
    yield (
        f"One training with one seed, scored on {scored.scored.group_count:,} "
        f"{scored.unit} of one data set. How it does elsewhere is unknown until it has been "
        f"measured there: ich evaluate."
    )
    if recalibration:
        yield (
            f"{recalibration} For scans of that kind its probabilities and thresholds are meant, "
            f"which on the rows above, of the training's own data, may do worse than before."
        )
    else:
        yield (
            "Probabilities are not calibrated for another prevalence: oversampling and the data "
            "set's own selection shift them, and thresholds with them."
        )
    alone = "alone" if config.context.is_slice else f"with context={config.context.name.value}"
    yield f"Each slice is judged {alone}; a study's score is the highest of its slices."


def _licence(config: Config) -> list[str]:
    # Weights carry terms of their own, whatever they were trained on afterwards.
    weights = (
        f"ImageNet weights of timm's {config.model.timm} are under that model's own licence."
        if config.model.pretrained and not config.model.weights
        else "The initial weights came from a local file, under its own licence."
        if config.model.weights
        else "The initial weights were random."
    )
    return [f"Data: {_LICENCES[config.data.source]}", weights, "Code: ich, MIT."]
