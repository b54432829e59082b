"""The networks: their size, their weights, and the errors when weights are not to be had."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from made_up import Bomb
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from ich.base.config import CONF_DIR, ModelConfig, UserError, WindowConfig
from ich.base.metadata import Metadata
from ich.training.model import (
    Classifier,
    build_model,
    check_architecture,
    count_parameters,
    ensure_weights,
    fold_batch_norms,
    initial_weights_source,
    input_spec,
    load_trained,
    load_weights,
)
from ich.training.model import save_weights as save

# Trained parameters in millions: convolutional base + Linear(6).
TRAINED = {
    "vgg16": 14.72,
    "resnet50": 23.52,
    "inception_v3": 21.80,
    "mobilenet_v2": 2.23,
    "xception": 20.82,
    "efficientnet_b0": 4.02,
    "efficientnet_b2": 7.71,
    "efficientnet_b3": 10.71,
}
# The report's Table 1, millions.
IMAGENET = {
    "vgg16": 138,
    "resnet50": 26,
    "inception_v3": 24,
    "mobilenet_v2": 3.5,
    "xception": 23,
    "efficientnet_b0": 5.3,
    "efficientnet_b2": 9.2,
    "efficientnet_b3": 12,
}


def config(name: str, **changes: object) -> ModelConfig:
    values = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "model" / f"{name}.yaml"))
    return ModelConfig(**{"pretrained": False, **values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TRAINED)
def test_parameter_counts(name: str) -> None:
    trained, imagenet = count_parameters(config(name))
    assert round(trained / 1e6, 2) == TRAINED[name]
    assert imagenet / 1e6 == pytest.approx(IMAGENET[name], rel=0.03)
    network = build_model(config(name))
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == trained


@pytest.mark.parametrize("name", TRAINED)
def test_the_head_is_global_average_pooling_and_one_linear_layer(name: str) -> None:
    network = build_model(config(name)).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        features = network.base.forward_features(x)
        expected = features.mean((2, 3)) @ network.head.weight.T + network.head.bias
        torch.testing.assert_close(network(x), expected)


def test_normalization_is_the_models_own() -> None:
    assert input_spec(config("xception")).mean == (0.5, 0.5, 0.5)
    assert input_spec(config("vgg16")).std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_other_numbers_of_windows(channels: int) -> None:
    network = build_model(config("mobilenet_v2"), channels).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, channels, 64, 64)).shape == (1, 6)


def test_weights_from_a_local_file_are_the_files(tmp_path: Path) -> None:
    import timm

    source = timm.create_model("mobilenetv2_100.ra_in1k")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    cfg = config("mobilenet_v2", weights=str(tmp_path / "w.safetensors"))
    ensure_weights(cfg)
    network = build_model(cfg)
    for name, value in network.base.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[name])


def test_weights_without_the_classifier_are_accepted(tmp_path: Path) -> None:
    import timm

    state = timm.create_model("mobilenetv2_100.ra_in1k", num_classes=0).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    network = build_model(config("mobilenet_v2", weights=str(tmp_path / "w.safetensors")))
    assert torch.equal(network.base.conv_stem.weight, state["conv_stem.weight"])


def test_another_architectures_weights_are_refused_by_name(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors")
    cfg = config("vgg16", weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match=r"does not fit vgg16 \(vgg16.tv_in1k\): 26 of its 26"):
        ensure_weights(cfg)


def save_weights(path: Path) -> None:
    save_file({"conv.weight": torch.zeros(3)}, path)


def test_a_missing_weights_file_is_refused() -> None:
    with pytest.raises(UserError, match="model.weights is 'no/such.safetensors', which is no file"):
        ensure_weights(config("vgg16", weights="no/such.safetensors"))


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="is no safetensors file"):
        ensure_weights(config("vgg16", weights=str(tmp_path / "w.pt")))


@pytest.mark.parametrize("name", ["resnet50", "xception"])
def test_pretrained_weights_that_cannot_be_had_name_three_ways_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    ways = r"model.weights=FILE; fill the cache .*; or train .* with model.pretrained=false"
    with pytest.raises(UserError, match=f"{name} .* are not at hand: HF_HUB_OFFLINE .*{ways}"):
        ensure_weights(config(name, pretrained=True))


@pytest.mark.parametrize(
    ("timm", "size", "message"),
    [
        ("mobilenetv3_large_100.ra_in1k", 64, "tensors behind its convolutional base that would"),
        ("vit_tiny_patch16_224.augreg_in21k", 224, "cannot be trained on 3 channels of 224 pixels"),
        ("inception_v3.tv_in1k", 40, "cannot be trained on 3 channels of 40 pixels"),
    ],
)
def test_networks_that_do_not_fit_are_refused(timm: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_architecture(ModelConfig(name="x", timm=timm, image_size=size), 3, size)


@pytest.mark.parametrize("name", [*TRAINED, "efficientnet_lite0"])
def test_the_shipped_networks_fit(name: str) -> None:
    check_architecture(config(name), 3, config(name).image_size)


def test_unknown_timm_name() -> None:
    with pytest.raises(UserError, match="model.timm is 'resnet5.x', which timm does not have"):
        ensure_weights(ModelConfig(name="x", timm="resnet5.x", image_size=64))


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("resnet50.foo_in1k", r"timm has no tag 'foo_in1k' of resnet50.* It has .*tv_in1k"),
        ("resnet50.tv_in1kk", r"no tag 'tv_in1kk' of resnet50. Did you mean tv_in1k\?"),
        ("efficientnet_b5.in12k", r"no tag 'in12k' of efficientnet_b5.* It has .*sw_in12k"),
        ("tf_efficientnet_b0_ns", r"which timm calls tf_efficientnet_b0.ns_jft_in1k now"),
        ("resnet5", r"which timm does not have. Did you mean resnet"),
        ("hf-hub:timm/resnet50.a1_in1k", "which timm does not have"),
        ("local-dir:/etc", "which timm does not have"),
        ("", "which timm does not have"),
    ],
)
@pytest.mark.parametrize(
    "ask",
    [
        input_spec,
        ensure_weights,
        initial_weights_source,
        lambda cfg: check_architecture(cfg, 3, cfg.image_size),
    ],
)
def test_what_timm_does_not_have_is_said_with_what_it_has(
    tag: str, message: str, ask: Callable[[ModelConfig], object]
) -> None:
    with pytest.raises(UserError, match=message):
        ask(ModelConfig(name="x", timm=tag, image_size=64))


def test_a_network_of_which_timm_has_no_weights() -> None:
    name = next(
        n for n in timm.list_models("resnet*") if not timm.get_pretrained_cfg(n).has_weights
    )
    with pytest.raises(UserError, match="timm has none of that name.*model.pretrained=false"):
        ensure_weights(ModelConfig(name="x", timm=name, image_size=64))


METADATA = Metadata(
    model="mobilenet_v2",
    timm="mobilenetv2_100.ra_in1k",
    labels=("a", "b", "c", "d", "e", "any"),
    windows=tuple(WindowConfig(str(n), 40, 80 + n) for n in range(3)),
    cache_size=128,
    image_size=96,
    mean=(0.5, 0.4, 0.3),
    std=(0.1, 0.2, 0.3),
    thresholds={"a": 0.25, "b": None, "c": 0.5, "d": 0.5, "e": 0.5, "any": 0.1},
)


@pytest.mark.parametrize("windows", [1, 3])
def test_weights_of_several_slices_say_so(tmp_path: Path, windows: int) -> None:
    one = METADATA.windows[0]
    metadata = replace(METADATA, windows=(one,) * windows, context="neighbours")
    path = tmp_path / "w.safetensors"
    assert "context" not in METADATA.to_json()  # files of single slices stay as they were
    save(build_model(config("mobilenet_v2"), 3 * windows), path, metadata)
    read, found = load_trained(path)
    assert found == metadata
    assert (found.slices, found.channels) == (3, 3 * windows)
    assert read(torch.zeros(1, 3 * windows, 32, 32)).shape == (1, len(METADATA.labels))
    with pytest.raises(ValueError, match="out of range"):
        Metadata.from_json(metadata.to_json().replace("neighbours", "elsewhere"))


def test_saved_weights_read_back(tmp_path: Path) -> None:
    first, second = build_model(config("mobilenet_v2")), build_model(config("mobilenet_v2"))
    save(first, tmp_path / "best.safetensors", METADATA)
    load_weights(second, tmp_path / "best.safetensors")
    third, found = load_trained(tmp_path / "best.safetensors")
    assert found == METADATA
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(first.eval()(x), second.eval()(x))
        torch.testing.assert_close(first(x), third(x))
    assert not list(tmp_path.glob("*.part"))


def test_the_real_weights_fit_their_model(shared: Path) -> None:
    path = shared.parent / "weights" / "tf_efficientnet_lite0.safetensors"
    cfg = config("efficientnet_lite0", weights=str(path))
    ensure_weights(cfg)
    stem = load_file(path)["conv_stem.weight"]
    assert torch.equal(build_model(cfg).base.conv_stem.weight.detach(), stem)
    with pytest.raises(UserError, match=re.escape("does not fit resnet50")):
        ensure_weights(config("resnet50", weights=str(path)))


@pytest.mark.parametrize("name", [*TRAINED, "efficientnet_lite0"])
def test_folded_batch_norms_are_the_same_function(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(config(name)).eval()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.8, 1.2)
        norm.weight.data.uniform_(0.8, 1.2)
    x = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        before = model(x)
        assert fold_batch_norms(model) == len(norms)
        after = model(x)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def test_a_convolution_used_twice_is_not_folded() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 1)
            self.one, self.two = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.conv(self.one(self.conv(x))))

    assert fold_batch_norms(Classifier(Twice(), 3, 6)) == 0


# What a weights file may be (FAULTS 34)


def test_a_file_that_carries_code_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="no safetensors file .* can carry code and are not read"):
        load_trained(tmp_path / "best.safetensors")
    torch.save({"a": Bomb()}, tmp_path / "best.safetensors")
    with pytest.raises(UserError, match="no safetensors file"):
        load_trained(tmp_path / "best.safetensors")
    assert not (tmp_path / "executed").exists()


def test_weights_of_another_architecture_are_refused_with_both_names(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    claims = replace(METADATA, model="resnet50", timm="resnet50.tv_in1k")
    save(build_model(config("mobilenet_v2")), path, claims)
    both = r"say they are of resnet50 \(resnet50.tv_in1k\), .* in the file and .* in resnet50"
    with pytest.raises(UserError, match=both):
        load_trained(path)


def test_a_network_that_a_file_only_claims_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of some bytes whose metadata name a network of gigabytes."""
    monkeypatch.setattr("ich.training.model.build_model", None)
    monkeypatch.setattr("ich.training.model.load_file", None)
    for tag in ("resnet50.tv_in1k", "convnext_xxlarge.clip_laion2b_soup", "eva_giant_patch14_224"):
        claims = {"ich": replace(METADATA, timm=tag).to_json()}
        save_file({"head.bias": torch.zeros(6)}, tmp_path / "w.safetensors", claims)
        with pytest.raises(UserError, match=r"another network's|that timm .* does not have"):
            load_trained(tmp_path / "w.safetensors")


def test_tensors_of_another_type_are_refused(tmp_path: Path) -> None:
    state = build_model(config("mobilenet_v2")).state_dict()
    state["head.bias"] = state["head.bias"].to(torch.int64)
    save_file(state, tmp_path / "w.safetensors", {"ich": METADATA.to_json()})
    with pytest.raises(UserError, match=r"head.bias is \(6,\) I64 in the file and \(6,\) F32 in"):
        load_trained(tmp_path / "w.safetensors")


def test_weights_of_a_network_that_timm_does_not_have(tmp_path: Path) -> None:
    for tag in ("mobilenetv2_100.none", "nothing", "hf-hub:somebody/net"):
        claims = replace(METADATA, timm=tag)
        save(build_model(config("mobilenet_v2")), tmp_path / "w.safetensors", claims)
        with pytest.raises(UserError, match=r"a network that timm .* does not have"):
            load_trained(tmp_path / "w.safetensors")


STRANGE_WINDOWS = [(1e300, 80), (40, 1e300), (40, 1e-300), (40, float("nan")), (40, True)]


@pytest.mark.parametrize(
    "entries",
    [
        None,
        {"ich": '{"model": "vgg16", "labels": []}'},  # as earlier versions wrote it
        {"ich": "[1"},
        {"ich": METADATA.to_json().replace('"format": 1', '"format": 99')},
        {"other": "x"},
        {"ich": "3"},
        {"ich": "[" * 100_000},
        *(
            {"ich": replace(METADATA, **change).to_json()}
            for change in (
                *({"cache_size": value} for value in ("128", 0)),
                {"image_size": 10**6},
                *({"windows": value} for value in ((), (WindowConfig("w", 40, 0),))),
                *({"windows": (WindowConfig("w", c, w),)} for c, w in STRANGE_WINDOWS),
                {"windows": (WindowConfig(5, 40, 80),)},  # type: ignore[arg-type]
                {"windows": (WindowConfig("w", 40, 80),) * 65, "mean": (0,) * 65, "std": (1,) * 65},
                *({"std": (value,) * 3} for value in (1e-30, 1e30, True)),
                *({"mean": (value,) * 3} for value in (-1e30, "0.5", None)),
                {"image_size": True},
                *({"thresholds": v} for v in ({}, [0.5], METADATA.thresholds | {"a": 7.0})),
                {"labels": ("a", "a")},
                {"labels": ("a;b",), "thresholds": {"a;b": 0.5}},
                {"mean": (float("nan"),) * 3},
                {"std": (0.0,) * 3},
                {"mean": (0.5,), "std": (0.5,)},
                {"timm": 5},
            )
        ),
    ],
)
def test_weights_that_do_not_say_how_they_are_used(
    tmp_path: Path, entries: dict[str, str] | None
) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", entries)
    with pytest.raises(UserError, match=r"do not say how .* ich rerun"):
        load_trained(tmp_path / "w.safetensors")
