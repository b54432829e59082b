"""How long the report's sweep would take, beside what others publish of its networks."""

from __future__ import annotations

from collections.abc import Sequence

from ich.base.records import ComputeMode
from ich.benchmarks.measure import REPORT, Table
from ich.benchmarks.settings import MODELS

_TIMM = dict(
    zip(MODELS, (546.06, 1218.01, 782.35, 2313.1, 497.64, 1751.72, 978.68, 572.18), strict=True)
)
"""Training, images per second on an RTX 3090 with AMP and channels_last, batches of 128 to 512, at
the networks' own sizes (224 px; InceptionV3 and Xception 299, EfficientNet-B2 256, B3 288): timm's
repository, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv, column train_samples_per_sec
(vgg16, resnet50, inception_v3, mobilenetv2_100, xception, efficientnet_b0, _b2, _b3)."""

_NVIDIA = {"resnet50": "2,700 to 2,800"}
"""Training, images per second on one H100 with AMP and large batches, as issue 20 quotes NVIDIA of
its ResNet-50 v1.5 at 224 px; this project has not looked it up."""

# Network, its mode, images per second of a training, hours of the report's.
Projected = tuple[str, ComputeMode, float, float]


def projection(hours: float, models: Sequence[str], size: int, what: str) -> str:
    """A note on how long the report's sweep would take at the rates of a part."""
    time = f"{hours:.1f} hours" if hours >= 2 else f"{60 * hours:.0f} minutes"
    networks = "eight networks" if len(models) == len(MODELS) else ", ".join(models)
    return (
        f"The report's sweep ({networks}, {REPORT['epochs']} epochs, {REPORT['train']:,} "
        f"training and {REPORT['val']:,} validation rows) at {size} px would take {time} "
        f"at these rates, {what}."
    )


def beside_published(lines: Sequence[Projected]) -> Table:
    """Each network's projection beside the published rates, of other cards, sizes and batches."""
    headings = ["network", "in", "images per s", "the report's, minutes"]
    headings += ["timm, RTX 3090, images per s", "NVIDIA, H100, images per s"]
    return [
        headings,
        *(
            [
                *(model, str(mode), f"{rate:,.1f}", f"{60 * hours:,.1f}"),
                *(f"{_TIMM[model]:,.0f}", _NVIDIA.get(model, "")),
            ]
            for model, mode, rate, hours in lines
        ),
    ]
