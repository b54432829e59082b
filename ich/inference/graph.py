"""A trained network as one graph, from Hounsfield units to logits: for export, and for speed.

Every step that `ich.inference.ensemble` takes one by one (averaging to the cache's size,
resampling, windows, normalization) is a product with a constant matrix or one operation per
channel, so the graph needs nothing from its caller but a square slice in HU.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ich.base.config import AugmentConfig, UserError
from ich.base.entry import one_line
from ich.base.files import replacing
from ich.base.metadata import Metadata
from ich.data.decode import area_weights
from ich.data.dicom import HU_MAX, HU_MIN
from ich.training.model import Classifier
from ich.training.transforms import CTWindows, Resample

# Outside training a slice is resized whole, by the transform that training uses.
NO_AUGMENT = AugmentConfig(hflip=0.0, vflip=0.0, crop=0.0, crop_min=1.0)


class Graph(nn.Module):
    """int16 HU [B, S, S] -> float32 [B, L]; of a network that sees P slices at once, [B, P, S, S].

    Args:
        model: the network, in eval mode.
        metadata: of its weights.
        side: S, pixels; None is the cache size of the metadata, to which others are averaged first.
        probabilities: give these instead of logits.
        features: give the pooled features too, behind the logits: float32 [B, L + F].
    """

    average: torch.Tensor
    resample: torch.Tensor
    slope: torch.Tensor
    shift: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def __init__(
        self,
        model: Classifier,
        metadata: Metadata,
        side: int | None = None,
        probabilities: bool = False,
        features: bool = False,
    ):
        super().__init__()
        self.model, self.probabilities, self.features = model, probabilities, features
        cached, size = metadata.cache_size, metadata.image_size
        self.side = side or cached
        self.averages = self.side != cached
        if self.averages:
            weights = area_weights(self.side, cached)
            # A copy: `area_weights` keeps its array, and hands the same one to the decoder.
            self.register_buffer("average", torch.from_numpy(weights.copy()))
        self.register_buffer("resample", Resample(size, NO_AUGMENT).matrix(cached))
        # Normalization is in these, too: one product and one sum for each channel.
        self.slices = metadata.slices
        windows = CTWindows(
            metadata.windows, "cpu", metadata.mean, metadata.std, slices=self.slices
        )
        names = ("slope", "shift", "low", "high")
        for name, values in zip(names, windows.coefficients(), strict=True):
            self.register_buffer(name, values.view(-1, 1, 1))

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        # Our decoder clips; who else hands over slices may not.
        x = hu.to(torch.float32).clamp(HU_MIN, HU_MAX)
        if self.averages:
            x = torch.round(self.average @ x @ self.average.T)  # the cache holds whole HU
        x = self.resample @ x @ self.resample.T
        if self.slices == 1:
            x = x.unsqueeze(1)
        else:  # each slice once for each window
            x = x.repeat_interleave(len(self.slope) // self.slices, 1)
        x = x * self.slope + self.shift
        x = torch.maximum(torch.minimum(x, self.high), self.low)
        if self.features:
            features, logits = self.model.pooled_and_logits(x)
            return torch.cat([logits, features], 1)
        logits = self.model(x)
        return torch.sigmoid(logits) if self.probabilities else logits

    def example(self, count: int) -> torch.Tensor:
        """Its input for so many images, int16, all 0."""
        planes = () if self.slices == 1 else (self.slices,)
        return torch.zeros(count, *planes, self.side, self.side, dtype=torch.int16)


class StudyGraph(nn.Module):
    """int16 HU of the slices of a series in their order, [T, S, S], T at least 2 -> probabilities
    with the study in view, float32 [T, L].

    Args:
        model: the network and its head, in eval mode.
        metadata: of its weights.
        side: as for `Graph`.
    """

    probabilities = True

    def __init__(self, model: Classifier, metadata: Metadata, side: int | None = None):
        super().__init__()
        assert model.study is not None
        self.head, has_features = model.study, model.study.features > 0
        self.slices = Graph(model, metadata, side, features=has_features)
        self.side, self.labels = self.slices.side, len(metadata.labels)

    def forward(self, hu: torch.Tensor) -> torch.Tensor:
        outputs = self.slices(hu)[None]
        place = torch.arange(hu.shape[0], device=hu.device)[None]
        logits = self.head(outputs[..., self.labels :], outputs[..., : self.labels], place)
        return torch.sigmoid(logits[0])

    def example(self, count: int) -> torch.Tensor:
        """Its input for so many slices, int16, all 0."""
        return self.slices.example(count)


def write_onnx(
    graph: Graph | StudyGraph, path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes the graph for batches of any size, from `hu` to `probability` or `logits`.

    Args:
        graph: on the CPU.
        path: whole or not at all.
        metadata: embedded in the file.

    Raises:
        UserError: the network cannot be converted.
    """
    # Two images: of an example of one, the exporter takes the 1 for a constant.
    example = graph.example(2)
    try:
        with quiet():
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                input_names=["hu"],
                output_names=["probability" if graph.probabilities else "logits"],
                dynamic_shapes=({0: batch_dimension(graph)},),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"the network cannot be converted to ONNX ({one_line(error)}). Use "
            f"--format torch_export or safetensors, and --engine torch."
        ) from None
    # Of the type alone: None is what the older exporter returns.
    assert program is not None
    program.model.metadata_props.update(metadata or {})
    # Two predictions may convert the same network at once.
    with replacing(path) as part:
        program.save(part)


def batch_dimension(graph: Graph | StudyGraph) -> Any:
    """How many slices a graph takes at once, as torch's exporters are told."""
    if isinstance(graph, StudyGraph):  # a slice that is alone has no study
        return torch.export.Dim("slices", min=2, max=4096)
    return torch.export.Dim("batch", min=1, max=4096)


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters tell much of themselves that is no news to the person at the screen."""
    loud = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)
    # Some of it is logged, some warned, and some printed.
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        yield
    for logger, level in zip(loud, levels, strict=True):
        logger.setLevel(level)


def has_onnx() -> bool:
    """Whether the extra `onnx` is installed."""
    return all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
