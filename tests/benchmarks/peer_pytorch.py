"""The recipe `classic` in PyTorch, optimized for one GPU; needs no TensorFlow.

    python -m tests.benchmarks.peer_pytorch --data-dir data --epochs 50 --precision bfloat16

Inductor compiles augmentation, network and gradients; Adam is the fused version. A CUDA graph
contains several steps and is replayed until the epoch is complete. Without CUDA everything runs
eagerly.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name in PyTorch code
from torch import nn

from tests.benchmarks import peer
from tests.benchmarks.peer import BATCH_SIZE, IMAGE_SIZE, PIXELS

COMPILE_MODES = {
    "default": "default",
    # Plain "max-autotune" uses its own CUDA graphs, which cannot be captured into another graph.
    "max-autotune": "max-autotune-no-cudagraphs",
}


class Network(nn.Module):  # type: ignore[misc]
    """Network of `job/recipes/classic.py`: from images [batch, 32, 32, 3] to logits [batch, 10]."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.convolutions = nn.ModuleList(
            nn.Conv2d(*channels, 3) for channels in ((3, 32), (32, 64), (64, 128))
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(channels, eps=peer.NORM_EPSILON, momentum=1 - peer.NORM_MOMENTUM)
            for channels in (32, 64, 128)
        )
        self.dense1, self.dense2 = nn.Linear(512, 512), nn.Linear(512, 128)
        self.head = nn.Linear(128, peer.CLASSES)
        for layer in (*self.convolutions, self.dense1, self.dense2, self.head):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for norm in self.norms:
            # A counter of steps that is not used with a fixed momentum.
            norm.num_batches_tracked = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        device_type = images.device.type
        mixed = self.dtype != torch.float32
        # Cached casts of weights become invalid outside of a CUDA graph.
        with torch.autocast(device_type, self.dtype, enabled=mixed, cache_enabled=False):
            # Channels last in memory, as the tensor cores require.
            x = images.permute(0, 3, 1, 2)
            for convolution, norm in zip(self.convolutions, self.norms, strict=True):
                # ReLU commutes with the pooling; after it, there are only a quarter of the values.
                x = norm(F.relu(F.max_pool2d(convolution(x), 2)))
            x = F.relu(self.dense1(x.permute(0, 2, 3, 1).flatten(1)))
            x = F.dropout(x, peer.DROPOUT, self.training)
            x = F.relu(self.dense2(x))
        with torch.autocast(device_type, enabled=False):
            return self.head(x.float())


def draw_transforms(count: int, device: torch.device) -> torch.Tensor:
    """Draw affine maps [count, 6]."""
    return torch.stack(peer.affine_maps(torch.rand(7, count, device=device), torch), dim=-1)


def augment(
    pixels: torch.Tensor, rows: torch.Tensor, transforms: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Sample rows of the data set through affine maps, directly from the bytes on the device.

    Args:
        pixels: [examples * 1024, 3] uint8.
        rows: [batch] int64.
        transforms: [batch, 6] float32.
        dtype: Dtype of the result.

    Returns:
        [batch, 32, 32, 3], 0 to 1: bilinear, with the nearest pixel beyond the edges.
    """
    a, b, c, d, e, f = (column[:, None, None] for column in transforms.unbind(-1))
    line = torch.arange(IMAGE_SIZE, device=pixels.device, dtype=torch.float32)
    x, y = line[None, None, :], line[None, :, None]
    source_x = (a * x + b * y + c).clamp(0, IMAGE_SIZE - 1)
    source_y = (d * x + e * y + f).clamp(0, IMAGE_SIZE - 1)
    left, top = source_x.floor(), source_y.floor()
    weight_x, weight_y = (source_x - left)[..., None], (source_y - top)[..., None]
    left, top = left.long(), top.long()
    right, bottom = (left + 1).clamp(max=IMAGE_SIZE - 1), (top + 1).clamp(max=IMAGE_SIZE - 1)
    first = rows[:, None, None] * PIXELS

    def at(line: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return pixels[first + line * IMAGE_SIZE + column].float()

    above = (1 - weight_x) * at(top, left) + weight_x * at(top, right)
    below = (1 - weight_x) * at(bottom, left) + weight_x * at(bottom, right)
    return (((1 - weight_y) * above + weight_y * below) * (1 / 255)).to(dtype)


def loss_of(model: Network, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the mean cross entropy of a batch."""
    return F.cross_entropy(model(images), labels)


def count_correct(model: Network, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count the correct predictions for images [batch, 32, 32, 3] uint8."""
    decoded = (images.float() * (1 / 255)).to(model.dtype)
    return (model(decoded).argmax(-1) == labels).sum()


class Trainer:
    """The training loop: an epoch is divided into executions of a fixed number of steps.

    Args:
        data: The data set; its images are copied to the device.
        device: Device to train on.
        dtype: Dtype to compute in; parameters and statistics are float32.
        steps_per_execution: Number of steps in one execution.
        compiled: Compiles a function.
    """

    def __init__(
        self,
        data: peer.Cifar10,
        device: torch.device,
        dtype: torch.dtype,
        steps_per_execution: int,
        compiled: Callable[[Any], Any],
    ) -> None:
        self.model = Network(dtype).to(device, memory_format=torch.channels_last)
        on_gpu = device.type == "cuda"
        self._device, self._dtype = device, dtype
        self._optimizer = torch.optim.Adam(
            self.model.parameters(),
            lr=peer.LEARNING_RATE,
            betas=(peer.BETA_1, peer.BETA_2),
            eps=peer.ADAM_EPSILON,
            fused=True,
            capturable=on_gpu,
        )
        self._pixels = torch.from_numpy(data.train_images).reshape(-1, 3).to(device)
        self._labels = _labels(data.train_labels, device)
        self._test_images = torch.from_numpy(data.test_images).to(device)
        self._test_labels = _labels(data.test_labels, device)
        self._draw, self._augment = compiled(draw_transforms), compiled(augment)
        self._loss, self._count_correct = compiled(loss_of), compiled(count_correct)

        # A CUDA graph reads and writes the same memory on each replay.
        self._steps_per_execution = steps_per_execution
        self._steps = data.steps_per_epoch
        self._rows = torch.zeros(steps_per_execution * BATCH_SIZE, dtype=torch.int64, device=device)
        self._transforms = torch.zeros(steps_per_execution * BATCH_SIZE, 6, device=device)
        self._loss_sum = torch.zeros((), device=device)
        self._stream = torch.cuda.Stream() if on_gpu else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def train_epoch(self, epoch: int) -> float:
        """Train an epoch and return its mean loss."""
        del epoch
        self.model.train()
        self._loss_sum.zero_()
        size = self._steps_per_execution * BATCH_SIZE
        order = torch.randperm(len(self._labels), device=self._device)[: self._steps * BATCH_SIZE]
        transforms = self._draw(len(order), self._device)
        for rows, maps in zip(order.split(size), transforms.split(size), strict=True):
            self._rows.copy_(rows)
            self._transforms.copy_(maps)
            self._execute()
        self._synchronize()
        return float(self._loss_sum) / self._steps

    def validate(self) -> float:
        """Compute the accuracy on the test images."""
        self.model.eval()
        with torch.no_grad():
            correct = self._count_correct(self.model, self._test_images, self._test_labels)
        self._synchronize()
        return int(correct) / len(self._test_labels)

    def _execute(self) -> None:
        """Run one execution: the first without the graph, which compiles; later ones with it."""
        if self._stream is None:
            self._train_steps()
        elif not self._warm:
            # PyTorch requires warm-up runs on the same stream as the capture.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._train_steps()
            torch.cuda.current_stream().wait_stream(self._stream)
            self._warm = True
        else:
            if self._graph is None:
                self._optimizer.zero_grad(set_to_none=True)
                self._graph = torch.cuda.CUDAGraph()
                # Records the steps without running them.
                with torch.cuda.graph(self._graph, stream=self._stream):
                    self._train_steps()
            self._graph.replay()

    def _train_steps(self) -> None:
        # One kernel creates the images of all steps.
        images = self._augment(self._pixels, self._rows, self._transforms, self._dtype)
        labels = self._labels[self._rows].split(BATCH_SIZE)
        for batch, batch_labels in zip(images.split(BATCH_SIZE), labels, strict=True):
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._loss(self.model, batch, batch_labels)
            loss.backward()
            self._optimizer.step()
            self._loss_sum += loss.detach()

    def _synchronize(self) -> None:
        if self._stream is not None:
            torch.cuda.synchronize()


def _labels(labels: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(labels).to(device, torch.int64)


def main() -> None:
    """Train and print the results."""
    parser = peer.option_parser(__doc__)
    parser.add_argument(
        "--compile",
        choices=(*COMPILE_MODES, "off"),
        help="mode of torch.compile; by default 'default' on a GPU, 'off' on a CPU",
    )
    parser.add_argument("--graph-steps", type=int, default=15, help="steps in one CUDA graph")
    options = parser.parse_args()
    data = peer.load(options.data_dir, options.limit)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if data.steps_per_epoch % options.graph_steps:
        raise SystemExit(
            f"received --graph-steps {options.graph_steps}, expected a divisor of the "
            f"{data.steps_per_epoch} steps per epoch"
        )
    mode = options.compile or ("default" if on_gpu else "off")

    def compiled(function: Any) -> Any:
        if mode == "off":
            return function
        return torch.compile(function, mode=COMPILE_MODES[mode], fullgraph=True, dynamic=False)

    torch.manual_seed(options.seed)
    torch.backends.cudnn.benchmark = True
    # Allows TF32 in float32, which is the default in TensorFlow and JAX.
    torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    trainer = Trainer(data, device, dtype, options.graph_steps, compiled)
    about = {
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "numpy": np.__version__,
        },
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "precision": options.precision,
        "compile": mode,
        "graph_steps": options.graph_steps if on_gpu else None,
    }
    peer.train(options.epochs, trainer.train_epoch, trainer.validate, about)


if __name__ == "__main__":
    main()
