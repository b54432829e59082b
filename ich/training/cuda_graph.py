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
State = Callable[[], dict[str, torch.Tensor]]
_WARM_UP_STEPS = 3  # before a CUDA graph is captured, as torch asks for


class CaptureError(RuntimeError):
    """A step could not be recorded; the state is as it was before."""


class GraphedStep:
    """A training step as one CUDA graph: launched as a whole, where an eager step launches hundreds
    of kernels one by one, and the GPU waits for the host.

    Batches of another size than `batch_size`, as the last of an epoch, are taken eagerly.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, batch_size: int):
        self._optimizer, self._batch_size = optimizer, batch_size
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._loss = torch.zeros(())

    def __call__(self, batch: Batch, eager_step: TrainingStep, state: State) -> torch.Tensor:
        """One step.

        Args:
            batch: on the device, with draws.
            eager_step: what is captured, and is taken by batches of another size.
            state: everything that a step changes, no copies.
        """
        # A graph's shapes are fixed. Only the tail of an epoch has others, and a training may be
        # taken up just before it.
        if len(batch.target) != self._batch_size:
            return eager_step(batch)
        if self._graph is None:
            before = {k: v.clone() for k, v in state().items()}
            try:
                self._graph = self._capture(batch, eager_step)
            except RuntimeError as error:
                first = (str(error) or "no reason given").splitlines()[0]  # of what may be pages
                raise CaptureError(f"{type(error).__name__}: {first}") from error
            finally:
                self._put_back(before, state())
        self._fill(batch)
        self._graph.replay()
        # Cloned, for the next replay writes into the same tensor.
        return self._loss.clone()

    def _fill(self, batch: Batch) -> None:
        assert self._batch is not None
        # Into the memory of the recorded batch, which is all that a replay reads.
        for name in ("hu", "target", "draws"):
            getattr(self._batch, name).copy_(getattr(batch, name), non_blocking=True)

    def _capture(self, batch: Batch, eager_step: TrainingStep) -> torch.cuda.CUDAGraph:
        """Records a step; the steps that warm up, and the recording, move the state."""
        assert batch.draws is not None
        self._batch = Batch(batch.hu.clone(), batch.target.clone(), batch.draws.clone())
        # Warming up does what must not fall into a recording, since it allocates or waits: cuDNN
        # tries its algorithms, cuBLAS makes its workspace, the optimizer its moments. On a side
        # stream, as torch asks for.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                eager_step(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        # Without gradients, the recorded backward pass makes them in the graph's own pool of
        # memory, where every replay finds them.
        self._optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # This thread's calls alone: the thread that reads ahead may lock pages meanwhile, which by
        # default would end the recording.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._loss = eager_step(self._batch)
        return graph

    def _put_back(self, before: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
        """Undoes what warming up and recording did, in place, since a graph has these addresses."""
        # Moments that did not exist before begin at 0, which is what SGD's momentum begins at too:
        # its first is the gradient itself. Of generators the state has copies, to write into which
        # would set nothing.
        for name, tensor in state.items():
            if not name.startswith("random/"):
                tensor.copy_(before[name]) if name in before else tensor.zero_()
