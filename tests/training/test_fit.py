"""The real training loop on the phantom, with a tiny input and few steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sweeps import TINY

from ich.base.config import Config, Device, Monitor, UserError, to_yaml
from ich.base.entry import Status
from ich.base.records import ComputeMode, FitResult
from ich.base.results import RunPaths
from ich.data.dataset import load_dataset
from ich.data.phantom.spec import LABELS
from ich.scoring.metrics import multilabel_metrics
from ich.tracking.journal import Journal
from ich.train import main
from ich.training.devices import pick_device
from ich.training.fit import Terminated, fit, is_better
from ich.training.model import build_model, input_spec, load_trained, load_weights
from ich.training.trainer import Trainer
from ich.training.transforms import CTWindows, Resample

Compose = Callable[..., Config]

CPU, FP32 = torch.device("cpu"), ComputeMode("fp32", "channels_last")


def quiet(*_: object) -> None:
    pass


@pytest.fixture
def config(composed: Compose, phantom: Path) -> Config:
    own = ("train.precision=fp32", "train.epochs=3", "optimizer.lr=3e-3", "tracking=none")
    return composed("model=mobilenet_v2", *TINY, f'data.root="{phantom}"', *own)


def train(config: Config, folder: Path) -> tuple[FitResult, RunPaths]:
    run = RunPaths(folder)
    run.root.mkdir(parents=True)
    load_dataset(config)  # as the sweep does before its jobs
    return fit(config, run, Journal(run.metrics), quiet), run


def test_a_training_learns_and_leaves_what_the_table_needs(config: Config, tmp_path: Path) -> None:
    result, run = train(config, tmp_path / "run")
    journal = run.read_metrics()
    assert [line.step for line in journal] == [1, 2, 3]
    assert journal[-1].metrics["train/loss"] < journal[0].metrics["train/loss"]
    accuracies = [line.metrics["val/accuracy"] for line in journal]
    assert result.best_epoch == 1 + int(np.argmax(accuracies))
    assert result.scores["accuracy"] == max(accuracies)
    assert result.auc_top == max(line.metrics["val/auc"] for line in journal)
    assert result.params == 2_231_558


def test_the_kept_weights_and_predictions_are_the_best_epochs(
    config: Config, tmp_path: Path
) -> None:
    result, run = train(config, tmp_path / "run")
    saved = np.load(run.predictions)
    scores = multilabel_metrics(saved["val_logits"], saved["val_target"], LABELS)
    assert scores["accuracy"] == result.scores["accuracy"] == result.val_scores["accuracy"]
    dataset = load_dataset(config)
    assert (saved["val_image_id"] == dataset.val.image_id).all()
    trainer = Trainer.build(config, dataset, CPU, FP32)
    load_weights(trainer.model, run.best)
    again = trainer.evaluate(dataset.val, 1, quiet)
    np.testing.assert_allclose(again, saved["val_logits"], atol=1e-4)
    with safe_open(run.best, "pt") as file:
        assert json.loads(file.metadata()["ich"])["timm"] == "mobilenetv2_100.ra_in1k"


@pytest.mark.parametrize("windows", ["first", "all"])
def test_a_network_of_neighbours_trains(
    composed: Compose, phantom: Path, tmp_path: Path, windows: str
) -> None:
    context = ("context=neighbours", f"context.windows={windows}", "protocol=sound")
    of = ("model=mobilenet_v2", f'data.root="{phantom}"', "train.precision=fp32", "tracking=none")
    config = composed(*of, *TINY, *context, "train.epochs=1")
    _, run = train(config, tmp_path / "run")
    model, metadata = load_trained(run.best)
    assert metadata.context == "neighbours"
    assert metadata.channels == {"first": 3, "all": 9}[windows]
    saved, dataset = np.load(run.predictions), load_dataset(config)
    assert dataset.test is not None
    assert dataset.sequences is not None
    around = dataset.sequences.neighbours(dataset.test.row)
    assert (around == dataset.test.around).all()
    # By hand: the three slices of each row, each in all windows.
    hu = torch.from_numpy(dataset.hu[around])
    size, spec = metadata.image_size, input_spec(config.model)
    planes = Resample(size, config.augment)(hu)
    x = CTWindows(metadata.windows, "cpu", spec.mean, spec.std, slices=3)(planes)
    with torch.inference_mode():
        np.testing.assert_allclose(model(x).numpy(), saved["test_logits"], atol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    config: Config, composed: Compose, tmp_path: Path
) -> None:
    config.train.epochs = 1
    paths = [train(config, tmp_path / name)[1] for name in ("a", "b")]
    config.seed = 1
    paths.append(train(config, tmp_path / "c")[1])
    first, second, other = (p.best.read_bytes() for p in paths)
    assert first == second != other


def test_a_loss_that_is_not_finite_stops_the_training_by_name(
    config: Config, tmp_path: Path
) -> None:
    config.optimizer.lr = 1e30
    with pytest.raises(UserError, match=r"the loss is not finite in epoch 1, step \d+"):
        train(config, tmp_path / "run")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(Device.auto) == pick_device(Device.cpu) == torch.device("cpu")
    with pytest.raises(UserError, match="the device is cuda, but .* Set it to auto or cpu"):
        pick_device(Device.cuda)


@pytest.mark.parametrize(
    ("monitor", "new", "old", "better"),
    [
        (Monitor.accuracy, 0.9, 0.9, False),
        (Monitor.accuracy, 0.91, 0.9, True),
        (Monitor.log_loss, 0.1, 0.2, True),
        (Monitor.auc, math.nan, 0.5, False),
        (Monitor.auc, 0.5, math.nan, True),
    ],
)
def test_the_first_of_equal_epochs_is_kept(
    monitor: Monitor, new: float, old: float, better: bool
) -> None:
    assert is_better({monitor.value: new}, {monitor.value: old}, monitor) is better


def test_the_head_learns_a_separable_label_with_the_real_weights(shared: Path) -> None:
    from ich.base.config import ModelConfig

    path = shared.parent / "weights" / "tf_efficientnet_lite0.safetensors"
    cfg = ModelConfig("efficientnet_lite0", "tf_efficientnet_lite0.in1k", 64, weights=str(path))
    model = build_model(cfg).eval()
    x = torch.zeros(4, 3, 64, 64)
    x[2:, :, 20:44, 20:44] = 1
    with torch.inference_mode():
        features = model.base.forward_features(x).mean((2, 3))
    assert torch.linalg.vector_norm(features[0] - features[2]) > 1


# The end of a training


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (SystemExit(0), "failed", "called sys.exit(0)"),
        (SystemExit(3), "failed", "called sys.exit(3)"),
        (Terminated(), "killed", "ended by SIGTERM"),
        (RuntimeError("out of\nmemory"), "failed", "RuntimeError: out of memory"),
        (UserError("Lower it."), "failed", "Lower it."),
    ],
)
def test_however_a_training_ends_its_result_says_so(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: str,
    reason: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    run = RunPaths(tmp_path)
    run.config.write_text(to_yaml(config))
    monkeypatch.setattr("ich.training.run.fit", fail)
    assert main([str(tmp_path)]) == (Status.TERMINATED if status == "killed" else Status.FAILED)
    assert run.read_result().status == status
    assert run.read_result().reason.startswith(reason)


def test_logits_that_are_not_finite_are_never_scored(config: Config) -> None:
    dataset = load_dataset(config)
    trainer = Trainer.build(config, dataset, CPU, FP32)
    torch.nn.init.constant_(trainer.model.head.bias, math.nan)
    with pytest.raises(UserError, match="logits are not finite while validating after epoch 3"):
        trainer.evaluate(dataset.val, 3, quiet)


def test_a_failing_training_writes_its_reason(config: Config, tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    run.root.mkdir()
    config.data.root = "/no/such/place"
    run.config.write_text(to_yaml(config))
    assert main([str(run.root)]) == 1
    assert "data.root is '/no/such/place', which does not exist" in run.read_result().reason
