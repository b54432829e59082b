"""A page for authors, `checklist.html`: what guidelines ask, and what the record answers of it.

The numbers are those of the published lists, their topics in our words: TRIPOD+AI (Collins et al.,
BMJ 2024, doi 10.1136/bmj-2023-078378), CLAIM 2024 (Tejani et al., Radiol Artif Intell 2024,
doi 10.1148/ryai.240300).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from ich.base.files import write_text
from ich.base.results import SweepPaths
from ich.pages.page import Section, Table, Text, to_html
from ich.pages.writing.answers import answers, methods
from ich.scoring.comparison import Comparison

Item = tuple[str, str, str]  # number, topic, and keys of `answers`; a last `+`: the author adds

TRIPOD_AI: Sequence[Item] = (
    ("1", "Title", ""),
    ("2", "Abstract", ""),
    ("3a", "Healthcare context, rationale, existing models", ""),
    ("3b", "Target population, purpose, intended users", ""),
    ("3c", "Known health inequalities", ""),
    ("4", "Objectives", ""),
    ("5a", "Sources of data, their rationale and representativeness", "data +"),
    ("5b", "Dates of the data", ""),
    ("6a", "Setting and centres", ""),
    ("6b", "Eligibility", ""),
    ("6c", "Treatments received", ""),
    ("7", "Preparation and quality checks of data", "preprocessing missing +"),
    ("8a", "Outcome: its definition and assessment", "labels +"),
    ("8b", "Outcome: who assessed it", ""),
    ("8c", "Outcome: blinding", ""),
    ("9a", "Predictors: their choice", "preprocessing"),
    ("9b", "Predictors: their definition and measurement", "preprocessing +"),
    ("9c", "Predictors: who assessed them", ""),
    ("10", "Sample size", "sample +"),
    ("11", "Missing data", "missing +"),
    ("12a", "How data were used and partitioned", "partition leak"),
    ("12b", "How predictors were handled", "preprocessing augmentation"),
    ("12c", "Type of model, building, tuning, internal validation", "model training selection"),
    ("12d", "Heterogeneity across clusters", ""),
    ("12e", "Measures of performance, comparison of models", "metrics uncertainty"),
    ("12f", "Updating of the model", ""),
    ("12g", "How predictions were calculated", "output weights"),
    ("13", "Class imbalance", "imbalance"),
    ("14", "Fairness", ""),
    ("15", "Output of the model, thresholds", "output"),
    ("16", "Differences between development and evaluation data", "internal partition"),
    ("17", "Ethical approval", ""),
    ("18a", "Funding", ""),
    ("18b", "Conflicts of interest", ""),
    ("18c", "Protocol of the study", ""),
    ("18d", "Registration", ""),
    ("18e", "Sharing of data", "data +"),
    ("18f", "Sharing of code", "code +"),
    ("19", "Involvement of patients and public", ""),
    ("20a", "Flow of participants", "flow events +"),
    ("20b", "Characteristics of participants", "events +"),
    ("20c", "Evaluation data beside development data", "events +"),
    ("21", "Participants and outcome events of each analysis", "events sample"),
    ("22", "The full model", "model weights"),
    (
        "23a",
        "Performance with confidence intervals, subgroups too",
        "performance calibration subgroups +",
    ),
    ("23b", "Heterogeneity in performance", ""),
    ("24", "Results of updating", ""),
    ("25", "Interpretation", ""),
    ("26", "Limitations", "leak +"),
    ("27a", "Poor or missing input in use", ""),
    ("27b", "What users have to do and to know", ""),
    ("27c", "Next steps", ""),
)

CLAIM_2024: Sequence[Item] = (
    ("1", "Title or abstract names the methodology", ""),
    ("2", "Summary of design, methods, results, conclusions", ""),
    ("3", "Background, intended use and role", ""),
    ("4", "Aims, objectives, hypotheses", ""),
    ("5", "Prospective or retrospective", ""),
    ("6", "Goal of the study", ""),
    ("7", "Sources of data", "data +"),
    ("8", "Inclusion and exclusion criteria", "missing +"),
    ("9", "Preprocessing", "preprocessing augmentation"),
    ("10", "Selection of subsets", "flow"),
    ("11", "De-identification", ""),
    ("12", "Missing data", "missing +"),
    ("13", "Image acquisition", ""),
    ("14", "Reference standard: its definition", "labels +"),
    ("15", "Reference standard: its rationale", ""),
    ("16", "Reference standard: source of annotations", ""),
    ("17", "Annotation of the test set", ""),
    ("18", "Variability between and within raters", ""),
    ("19", "Assignment to partitions", "partition"),
    ("20", "Level at which partitions are disjoint", "leak"),
    ("21", "Intended sample size", "sample +"),
    ("22", "Description of the model", "model output"),
    ("23", "Software", "software"),
    ("24", "Initialization", "initial"),
    ("25", "Training", "training imbalance augmentation"),
    ("26", "Selection of the final model", "selection"),
    ("27", "Ensembling", "ensembling"),
    ("28", "Metrics", "metrics"),
    ("29", "Significance and uncertainty", "uncertainty"),
    ("30", "Robustness or sensitivity analysis", "varied +"),
    ("31", "Explainability", ""),
    ("32", "Evaluation on internal data", "internal"),
    ("33", "Testing on external data", ""),
    ("34", "Registration of a trial", ""),
    ("35", "Patients or examinations included and excluded", "flow sample +"),
    ("36", "Characteristics of cases in each partition", "events +"),
    ("37", "Performance with its uncertainty", "performance calibration subgroups"),
    ("38", "Diagnostic performance and its precision", "diagnostic +"),
    ("39", "Failure analysis", "failures +"),
    ("40", "Limitations", "leak +"),
    ("41", "Implications for practice", ""),
    ("42", "Full protocol or technical details", "code +"),
    ("43", "Availability of software, model, data", "code weights +"),
    ("44", "Funding and its role", ""),
)
_LISTS = {"TRIPOD+AI": TRIPOD_AI, "CLAIM 2024": CLAIM_2024}
_NOTE = (
    "Two lists of what a paper on such a comparison should report: TRIPOD+AI, 27 items (Collins et "
    "al., BMJ 2024, doi 10.1136/bmj-2023-078378), and the CLAIM 2024 update, 44 items (Tejani et "
    "al., Radiology: Artificial Intelligence 2024, doi 10.1148/ryai.240300). Numbers are theirs, "
    "topics are shortened: hand in the journal's own form. What the sweep's record says is "
    "answered from it; it knows nothing of patients but their number, of consent, or of who "
    "labelled the images."
)
_AUTHOR = "The author's to write."


def write_checklist(comparison: Comparison, paths: SweepPaths) -> None:
    """Writes `checklist.html` into the folder of the sweep, or of the report on several."""
    known = answers(comparison)
    sections: list[Section] = [("What this is", [Text(_NOTE)])]
    if text := methods(comparison):
        sections.append(("A methods paragraph", [Text(text)]))
    for name, items in _LISTS.items():
        lines = [checklist_row(item, known) for item in items]
        answered = sum(line["by"] != "author" for line in lines)
        caption = f"{name}: {answered} of {len(lines)} entries have an answer in the record."
        sections.append((name, [Table(caption, pd.DataFrame(lines))]))
    facts = {"sweep": comparison.name}
    write_text(paths.checklist, to_html("Reporting checklist", facts, sections))


def checklist_row(item: Item, known: Mapping[str, str]) -> dict[str, str]:
    """An item beside its answer, and by whom that is: record, record and author, or author."""
    number, topic, keys = item
    wanted = keys.removesuffix("+").split()
    found = [known[key] for key in wanted if key in known]
    if not found:
        return {"item": number, "topic": topic, "by": "author", "answer": _AUTHOR}
    text = " ".join(found)
    if keys.endswith("+"):
        return {
            "item": number,
            "topic": topic,
            "by": "record and author",
            "answer": f"{text} The rest is the author's to write.",
        }
    return {"item": number, "topic": topic, "by": "record", "answer": text}
