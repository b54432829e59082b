"""Whether a captured or compiled training step does what an eager one does: asked before `auto`
takes it.

Two eager steps on other batches at other learning rates are taken twice from one state, which shows
how far steps differ by themselves (cuDNN adds in no fixed order), and once more captured.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import torch

from ich.base.config import Config
from ich.base.records import ComputeMode
from ich.data.dataset import Dataset
from ich.training.trainer import Trainer, TrainingState

# Of the norm of what the eager steps changed; beside three times what they differ by themselves.
_TOLERANCE = 1e-3
_LOSS_TOLERANCE = {"bf16": 2e-2}  # else 1e-3, relative
Tensors = dict[str, torch.Tensor]


def why_not_graphed(
    config: Config, dataset: Dataset, device: torch.device, mode: ComputeMode
) -> str:
    """Empty if captured steps do what eager ones do in this mode, else in what they differ.

    Args:
        config: the job.
        dataset: two whole batches at least.
        device: a GPU.
        mode: a graphed one.
    """
    eager = Trainer.build(config, dataset, device, replace(mode, graph=False))
    before, schedule = {k: v.clone() for k, v in eager.tensors().items()}, eager.schedule()
    losses, change = _two_steps(eager)
    eager.restore(before, schedule)
    again_losses, again = _two_steps(eager)
    del eager, before
    graphed = Trainer.build(config, dataset, device, mode)
    graph_losses, graph_change = _two_steps(graphed)
    if graphed.not_graphed:
        return graphed.not_graphed
    tolerance = _LOSS_TOLERANCE.get(mode.precision, 1e-3)
    for one, other, noise in zip(losses, graph_losses, again_losses, strict=True):
        if not math.isclose(one, other, rel_tol=tolerance, abs_tol=3 * abs(one - noise)):
            return f"a captured step differs: a loss of {other:.4g}, and {one:.4g} eagerly"
    for kind in ("weights", "moments", "statistics", "counts"):
        size, noise = _norm(change, kind), _distance(change, again, kind)
        distance = _distance(change, graph_change, kind)
        # Not `>`, which NaN passes.
        if not distance <= 3 * noise + (_TOLERANCE * size if kind != "counts" else 0):
            share = f" {distance / size:.1%}" if size else ""
            return f"a captured step differs: {kind}{share}"
    return "" if _rate_is_read(graphed) else "a captured step keeps its first learning rate"


def why_not_compiled(
    config: Config, dataset: Dataset, device: torch.device, mode: ComputeMode
) -> str:
    """Empty if compiled steps have the losses of eager ones in this mode, else in what they differ.
    The second step's is of weights that the first one's gradients moved. Arguments as above."""
    plain = replace(mode, compiled=False, graph=False)
    losses, _ = _two_steps(Trainer.build(config, dataset, device, plain))
    compiled = replace(mode, graph=False)
    compiled_losses, _ = _two_steps(Trainer.build(config, dataset, device, compiled))
    for one, other in zip(losses, compiled_losses, strict=True):
        # Its operations are other ones, in another order: rounding alone makes a difference.
        if not math.isclose(one, other, rel_tol=_LOSS_TOLERANCE["bf16"]):
            return f"a compiled step differs: a loss of {other:.4g}, and {one:.4g} eagerly"
    return why_not_graphed(config, dataset, device, mode) if mode.graph else ""


def _two_steps(trainer: Trainer) -> tuple[list[float], Tensors]:
    """Losses, and what two steps changed, on the device."""
    before = {k: v.clone() for k, v in trainer.tensors().items()}
    losses = []
    trainer.model.train()
    for number, batch in enumerate(islice(trainer.batches(TrainingState()), 2), start=1):
        trainer.set_rate(trainer.cfg.optimizer.lr / number)
        losses.append(trainer.train_step(batch))
    change = {
        name: (value - before[name] if name in before else value).double()
        for name, value in trainer.tensors().items()
        if not name.startswith("random/")
    }
    return [float(loss) for loss in losses], change


def _rate_is_read(trainer: Trainer) -> bool:
    """Whether a step at rate 0 leaves the weights alone: a rate that was recorded moves them."""
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.model.train()
    trainer.set_rate(0.0)
    trainer.train_step(next(trainer.batches(TrainingState())))
    after = trainer.model.parameters()
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _kind(name: str) -> str:
    owner, _, rest = name.partition("/")
    if name.endswith(("num_batches_tracked", "/step")):
        return "counts"
    if owner == "optimizer":
        return "moments"
    return "statistics" if rest.endswith(("running_mean", "running_var")) else "weights"


def _norm(change: Tensors, kind: str) -> float:
    return math.sqrt(sum(float(v.square().sum()) for k, v in change.items() if _kind(k) == kind))


def _distance(a: Tensors, b: Tensors, kind: str) -> float:
    if a.keys() != b.keys():
        return math.inf
    return _norm({name: a[name] - b[name] for name in a}, kind)
