"""The networks: a timm convolutional base, global average pooling, and Linear(6), all trainable.

In this order: the network of a config, what it costs and whether it takes its input, where its
initial weights come from, trained weights as files, and batch normalizations folded into
convolutions, for prediction.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

from ich.base.config import ModelConfig, UserError
from ich.base.entry import nearest, one_line
from ich.base.files import write_bytes
from ich.base.metadata import METADATA_KEY, Metadata, read_metadata
from ich.training.study.head import StudyHead

log = logging.getLogger(__name__)
# Layers that a file of weights may have and `Classifier` does not, by how their names begin.
_HEAD = ("pre_logits.", "head.", "fc.", "classifier.", "AuxLogits.", "aux_logits.")


class Classifier(nn.Module):
    """`base` -> global average pool -> `head` (report, section 3.5, "Network modifications").

    study: what follows over the slices of a study, once it is trained; None for slices alone.
    """

    def __init__(self, base: nn.Module, features: int, outputs: int):
        super().__init__()
        self.base = base
        self.head = nn.Linear(features, outputs)
        self.study: StudyHead | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float [B, C, H, W] -> float32 logits [B, outputs] of slices by themselves."""
        return self.pooled_and_logits(x)[1]

    def pooled_and_logits(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float [B, C, H, W] -> float32 pooled features [B, F] and logits [B, outputs], whatever
        autocast makes of the base.

        Logits in bfloat16 would have 8 bits, and most slices the same few values: no ROC curve.
        """
        features = self.base.forward_features(x).mean((2, 3), dtype=torch.float32)  # type: ignore[operator]
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
            logits: torch.Tensor = self.head(features)
        return features, logits


@dataclass(frozen=True)
class InputSpec:
    """What the pretrained network was trained on: per-channel mean and std of 0..1 images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def input_spec(cfg: ModelConfig) -> InputSpec:
    """The model's own normalization, from its timm tag.

    Raises:
        UserError: timm has no such network, or no such tag of it.
    """
    pretrained = _pretrained_cfg(cfg)
    return InputSpec(pretrained.mean, pretrained.std)


def _pretrained_cfg(cfg: ModelConfig) -> timm.models.PretrainedCfg:
    """What timm has by a name, as `resnet50.tv_in1k`: a network, and a tag of its weights."""
    name = cfg.timm
    network, _, tag = name.partition(".")
    # timm would fetch a name such as hf-hub:somebody/net from elsewhere.
    if timm.is_model(network):
        # An unknown tag is a RuntimeError.
        with contextlib.suppress(RuntimeError):
            if (found := timm.get_pretrained_cfg(name)) is not None:
                return found
    if new := timm.models.get_deprecated_models().get(name):
        raise UserError(f"model.timm is {name!r}, which timm calls {new} now. Write that.")
    if tags := [n.partition(".")[2] for n in timm.models.get_arch_pretrained_cfgs(network)]:
        raise UserError(
            f"model.timm is {name!r}, but timm has no tag {tag!r} of {network}.{nearest(tag, tags)}"
            f" It has {', '.join(sorted(t for t in tags if t))}."
        )
    raise UserError(
        f"model.timm is {name!r}, which timm does not have.{nearest(network, timm.list_models())} "
        f"Find a name with python -c \"import timm; print(timm.list_pretrained('*resnet*'))\"."
    )


def build_model(cfg: ModelConfig, channels: int = 3, outputs: int = 6) -> Classifier:
    """The network of a config, with ImageNet weights, a local file's, or random ones.

    Args:
        cfg: the timm name and where weights come from.
        channels: input channels; other than 3 adapts the first convolution's weights (timm).
        outputs: labels.

    Raises:
        UserError: the weights do not fit or cannot be had.
    """
    overlay = {"file": cfg.weights} if cfg.weights else None
    if cfg.weights:
        check_weights_file(cfg)
    try:
        # Without timm's classifier (num_classes=0), which is of ImageNet's classes.
        base = timm.create_model(
            cfg.timm,
            pretrained=bool(cfg.weights) or cfg.pretrained,
            num_classes=0,
            in_chans=channels,
            pretrained_cfg_overlay=overlay,
        )
    except OSError as error:
        raise _no_weights(cfg, f"{type(error).__name__}: {error}") from None
    return _classifier(base, outputs)


def _classifier(base: nn.Module, outputs: int) -> Classifier:
    if hasattr(base, "pre_logits"):
        # VGG: what timm keeps of the two 4096-wide layers is no part of the convolutional base.
        base.pre_logits = nn.Identity()
    features: int = base.num_features  # type: ignore[assignment]
    return Classifier(base, features, outputs)


def count_parameters(cfg: ModelConfig, outputs: int = 6) -> tuple[int, int]:
    """(trained parameters, parameters of the 1000-class ImageNet network), without memory."""
    with torch.device("meta"):
        ours = _classifier(timm.create_model(cfg.timm, num_classes=0), outputs)
        imagenet = timm.create_model(cfg.timm)
    return _count(ours), _count(imagenet)


@dataclass(frozen=True)
class Cost:
    """What a network takes.

    params: trained ones. macs: multiply-adds of one image, forward. activations: bytes kept for
    the backward pass of one batch, in float32. features: numbers of an image after pooling.
    """

    params: int
    macs: int
    activations: int
    features: int


def model_cost(cfg: ModelConfig, channels: int, size: int, batch: int, outputs: int = 6) -> Cost:
    """Counted on torch's meta device: shapes alone, no memory.

    Args:
        cfg: the network.
        channels: input channels.
        size: side of its input, pixels.
        batch: images of a training step.
        outputs: labels.
    """
    saved: dict[int, torch.Tensor] = {}  # by storage: two views of one keep it once

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.device("meta"):
        net = timm.create_model(cfg.timm, num_classes=0, in_chans=channels)
        model = _classifier(net, outputs)
        # What autograd keeps for the backward pass goes through `pack`, from networks of any kind;
        # a sum over layers' outputs would count what is never kept.
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            # Two at least: batch normalization in training takes no variance of one value.
            out = model(torch.zeros(max(2, batch), channels, size, size))
        # Weights are kept for it too, and are counted with the parameters.
        own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model.eval()(torch.zeros(1, channels, size, size))
    del out
    activations = sum(t.untyped_storage().nbytes() for k, t in saved.items() if k not in own)
    # The counter has two operations for each multiply-add.
    return Cost(_count(model), flops.get_total_flops() // 2, activations, net.num_features)


def initial_weights_source(cfg: ModelConfig) -> str:
    """Where a job's initial weights would come from, in two or three words; asks no network."""
    if cfg.weights:
        return "local file" if Path(cfg.weights).is_file() else "no such file"
    if not cfg.pretrained:
        return "random"
    return "at hand" if _is_cached(_pretrained_cfg(cfg)) else "to download"


def check_architecture(cfg: ModelConfig, channels: int, size: int, outputs: int = 6) -> None:
    """Takes one step on torch's meta device, where shapes are computed and nothing is stored.

    Raises:
        UserError: the network does not take this input, or has parameters no gradient reaches
            (its convolutional base is not what timm's `forward_features` returns).
    """
    input_spec(cfg)
    with torch.device("meta"):
        try:
            model = _classifier(
                timm.create_model(cfg.timm, num_classes=0, in_chans=channels), outputs
            )
            model(torch.zeros(2, channels, size, size)).sum().backward()
        # What networks raise at an input that they do not take: they agree on no type.
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
            AttributeError,
            AssertionError,
        ) as e:
            raise UserError(
                f"{cfg.name} ({cfg.timm}) cannot be trained on {channels} channels of {size} "
                f"pixels as a convolutional base with one linear layer: {one_line(e)}. Change "
                f"data.image_size, or choose a convolutional network."
            ) from None
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    if unused:
        raise UserError(
            f"{cfg.name} ({cfg.timm}) has {len(unused)} tensors behind its convolutional base that "
            f"would never be trained, the first is {unused[0]}. Choose a network whose features "
            f"go straight into its classifier."
        )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def ensure_weights(cfg: ModelConfig) -> None:
    """Makes sure, before any job starts, that the weights a job will ask for are at hand.

    A local file is checked against the architecture; pretrained weights are downloaded into the
    cache that timm reads.

    Raises:
        UserError: with the three ways out.
    """
    pretrained = _pretrained_cfg(cfg)
    if cfg.weights:
        check_weights_file(cfg)
    elif cfg.pretrained:
        if not pretrained.has_weights:
            raise _no_weights(cfg, "timm has none of that name, not even to download")
        _require_reachable(cfg)
        # Built and thrown away: that fills the cache from which the jobs read, without a network.
        build_model(cfg)


def _require_reachable(cfg: ModelConfig) -> None:
    """Without a network the hub client retries for a minute; one connection tells in seconds."""
    pretrained = _pretrained_cfg(cfg)
    # Behind a proxy the host itself may be out of reach, and a download still work.
    if _is_cached(pretrained) or os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _no_weights(cfg, "HF_HUB_OFFLINE is set and the cache does not hold them")
    # The hub's weights, or those of a plain URL, as of the original Xception.
    url = urlparse(constants.ENDPOINT if pretrained.hf_hub_id else pretrained.url)
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        raise _no_weights(cfg, f"{host} cannot be reached ({error})") from None


def _is_cached(pretrained: timm.models.PretrainedCfg) -> bool:
    if pretrained.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        return any(
            isinstance(try_to_load_from_cache(pretrained.hf_hub_id, name), str)
            for name in ("model.safetensors", "pytorch_model.bin")
        )
    # torch.hub keeps a file by the last part of its URL.
    name = Path(urlparse(pretrained.url).path).name
    return (Path(torch.hub.get_dir()) / "checkpoints" / name).is_file()


def _no_weights(cfg: ModelConfig, why: str) -> UserError:
    return UserError(
        f"the ImageNet weights of {cfg.name} ({cfg.timm}) are not at hand: {why}. Three ways out: "
        f"give a local safetensors file with model.weights=FILE; fill the cache on a machine with "
        f"a network (python -c \"import timm; timm.create_model('{cfg.timm}', pretrained=True)\") "
        f"and copy it; or train from scratch with model.pretrained=false."
    )


def check_weights_file(cfg: ModelConfig) -> None:
    """Compares a safetensors file's names and shapes with the convolutional base it is for.

    Only its header is read. The classifier's own tensors may be there or not.

    Raises:
        UserError: no such file, no safetensors file, or another architecture's.
    """
    path = Path(str(cfg.weights))
    if not path.is_file():
        raise UserError(
            f"model.weights is {cfg.weights!r}, which is no file. Give a safetensors file in "
            f"timm's names for {cfg.timm}, leave it null for the pretrained weights, or set "
            f"model.pretrained=false."
        )
    try:
        have = {name: tensor.shape for name, tensor in _tensors(path).items()}
    except SafetensorError as error:
        raise UserError(
            f"model.weights is {cfg.weights!r}, which is no safetensors file ({error}). Other "
            f"formats can carry code and are not read; convert it with safetensors.torch.save_file."
        ) from None
    with torch.device("meta"):
        # Neither layers that a `Classifier` lacks nor counts of batches, which batch normalization
        # with a fixed momentum does not use.
        want = {
            k: tuple(v.shape)
            for k, v in timm.create_model(cfg.timm).state_dict().items()
            if not k.startswith(_HEAD) and not k.endswith("num_batches_tracked")
        }
    wrong = [k for k, shape in want.items() if have.get(k) != shape]
    if wrong:
        raise UserError(
            f"model.weights is {cfg.weights!r}, which does not fit {cfg.name} ({cfg.timm}): "
            f"{len(wrong)} of its {len(want)} tensors are missing or have another shape, the first "
            f"is {wrong[0]} ({have.get(wrong[0], 'missing')}, wanted {want[wrong[0]]}). Choose the "
            f"model these weights belong to."
        )


class _Tensor(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    shape: tuple[int, ...]
    dtype: str


_DTYPES = {torch.float32: "F32", torch.int64: "I64"}  # as safetensors calls those of our networks


def _tensors(path: Path) -> dict[str, _Tensor]:
    """The tensors of a safetensors file by its header: none is read."""
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {k: _Tensor(tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}


def save_weights(model: nn.Module, path: Path, metadata: Metadata) -> None:
    """Writes all parameters and buffers as safetensors, complete or not at all."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    # One entry: safetensors writes several in no fixed order, and equal runs have equal files.
    # As bytes: of a full disk its own writing raises no OSError.
    write_bytes(path, save(state, {METADATA_KEY: metadata.to_json()}))


def load_weights(model: nn.Module, path: Path) -> None:
    """Reads what `save_weights` wrote into a model of the same architecture."""
    model.load_state_dict(load_file(path))


def load_trained(path: Path) -> tuple[Classifier, Metadata]:
    """The network of a weights file, by its own metadata.

    Raises:
        UserError: see `read_metadata`; or its tensors are another network's.
    """
    metadata = read_metadata(path)
    cfg = ModelConfig(metadata.model, metadata.timm, metadata.image_size, pretrained=False)
    channels, outputs = metadata.channels, len(metadata.labels)
    try:
        input_spec(cfg)
        # Without memory: a network by its name alone may have gigabytes.
        with torch.device("meta"):
            net = timm.create_model(cfg.timm, num_classes=0, in_chans=channels)
            shapes = _with_study(_classifier(net, outputs), metadata).state_dict()
    # What networks raise that take no such number of channels, or have no features for a head.
    except (UserError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError):
        raise UserError(
            f"the weights {path} are of {metadata.model} ({metadata.timm}), a network that timm "
            f"{timm.__version__} does not have. Install the timm they were trained with."
        ) from None
    # Compared here: load_state_dict would name every tensor that does not fit, over pages.
    want = {k: _Tensor(tuple(v.shape), _DTYPES.get(v.dtype, "")) for k, v in shapes.items()}
    have = _tensors(path)
    if want != have:
        first = next(k for k in [*want, *have] if want.get(k) != have.get(k))
        both = have.get(first), want.get(first)
        told = [f"{t.shape} {t.dtype}" if t else "missing" for t in both]
        raise UserError(
            f"the weights {path} say they are of {metadata.model} ({metadata.timm}), but their "
            f"tensors are another network's: {first} is {told[0]} in the file and {told[1]} in "
            f"{metadata.model}. Give the file of that network."
        )
    model = _with_study(build_model(cfg, channels, outputs), metadata)
    model.load_state_dict(load_file(path))
    return model.eval(), metadata


def _with_study(model: Classifier, metadata: Metadata) -> Classifier:
    if metadata.is_of_studies:
        features = model.head.in_features if metadata.head == "features" else 0
        model.study = StudyHead(features, len(metadata.labels))
    return model


class _Tracer(fx.Tracer):
    """Looks into everything but convolutions and batch normalizations, timm's own kinds too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Conv2d | nn.BatchNorm2d):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def fold_batch_norms(model: Classifier) -> int:
    """Multiplies batch normalizations, which are constant in eval mode, into the convolutions that
    they follow: the same function, up to rounding, with a third to half of the layers gone.

    Returns:
        How many were folded; 0 for a network that cannot be traced.
    """
    try:
        nodes = list(_Tracer().trace(model.base).nodes)
    except Exception as error:  # whatever a network's own code raises when its input is a symbol
        log.info("batch normalizations are not folded: %s", type(error).__name__)
        return 0
    modules = dict(model.base.named_modules())
    called = [modules[str(n.target)] for n in nodes if n.op == "call_module"]
    folded = 0
    for node in nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        # With another user of the convolution's output, that one would get it normalized, too.
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, norm = modules[str(before.target)], modules[str(node.target)]
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
            continue
        if called.count(conv) + called.count(norm) > 2:  # used twice: one weight, two scales
            continue
        _replace(model.base, str(before.target), fuse_conv_bn_eval(conv, norm))
        # timm's BatchNormAct2d is normalization, dropout and activation in one: two of them stay.
        rest = [m for m in (getattr(norm, "drop", None), getattr(norm, "act", None)) if m]
        _replace(model.base, str(node.target), nn.Sequential(*rest))
        folded += 1
    return folded


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)
