"""A training step recorded once as a CUDA graph, and launched as a whole from then on.

A replay runs the recorded kernels on the recorded addresses. So each batch is copied into the first
one's memory, the loss is read where the recording left it, and every number of the step, the
learning rate and the count of steps among them, has to lie on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ich.training.loader import Batch

TrainingStep = Callable[[Batch], torch.Tensor]  # moves the weights; the batch's mean loss
_WARM_UP_STEPS = 3  # before a CUDA graph is captured, as torch asks for


class GraphedStep:
    """A training step as one CUDA graph: launched as a whole, where an eager step launches hundreds
    of kernels one by one, and the GPU waits for the host.

    Batches of another size than the first, as the last of an epoch, are taken eagerly.
    """

    def __init__(
        self,
        eager_step: TrainingStep,
        optimizer: torch.optim.Optimizer,
        state: Callable[[], dict[str, torch.Tensor]],
    ):
        self._eager_step, self._optimizer, self._state = eager_step, optimizer, state
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._loss = torch.zeros(())

    def __call__(self, batch: Batch) -> torch.Tensor:
        if self._graph is None:
            self._capture(batch)
        assert self._batch is not None
        assert self._graph is not None
        # A graph's shapes are fixed. Only the tail of an epoch has others.
        if batch.hu.shape != self._batch.hu.shape:
            return self._eager_step(batch)
        self._fill(batch)
        self._graph.replay()
        # Cloned, for the next replay writes into the same tensor.
        return self._loss.clone()

    def _fill(self, batch: Batch) -> None:
        assert self._batch is not None
        # Into the memory of the recorded batch, which is all that a replay reads.
        for name in ("hu", "target", "draws"):
            getattr(self._batch, name).copy_(getattr(batch, name), non_blocking=True)

    def _capture(self, batch: Batch) -> None:
        """Records a step. The steps that warm up and the recording leave no trace in the state."""
        assert batch.draws is not None
        self._batch = Batch(batch.hu.clone(), batch.target.clone(), batch.draws.clone())
        # Cloned: `_state` hands out the tensors themselves, and warming up moves them.
        before = {k: v.clone() for k, v in self._state().items()}
        # Warming up does what must not fall into a recording, since it allocates or waits: cuDNN
        # tries its algorithms, cuBLAS makes its workspace, the optimizer its moments. On a side
        # stream, as torch asks for.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self._eager_step(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        # Without gradients, the recorded backward pass makes them in the graph's own pool of
        # memory, where every replay finds them.
        self._optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._eager_step(self._batch)
        # In place, since the graph has these addresses. Zero is what SGD's momentum begins at too:
        # its first is the gradient itself. Of generators the state has copies, to write into which
        # would set nothing.
        for name, tensor in self._state().items():
            if not name.startswith("random/"):  # moments that did not exist before begin at 0
                tensor.copy_(before[name]) if name in before else tensor.zero_()
