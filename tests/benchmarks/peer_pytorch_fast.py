"""The recipe `fast` in PyTorch; needs no TensorFlow.

    python -m tests.benchmarks.peer_pytorch_fast --data-dir data --epochs 8 --precision bfloat16

Memory format is channels last, and the network runs under autocast. On a GPU, Inductor compiles
network and gradients.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name in PyTorch code
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import peer

BATCH_SIZE = 2000
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
WIDTHS = (64, 256, 256)
LEARNING_RATE, BIAS_RATE, HEAD_RATE = 0.24, 0.053, 0.67
DECAY = 2e-6 * BATCH_SIZE
MOMENTUM, SGD_MOMENTUM = 0.6, 0.85
LABEL_SMOOTHING = 0.2
SHIFT = 2
WHITENED_IMAGES, WHITENING_EPSILON = 5_000, 5e-4


class Network(nn.Module):  # type: ignore[misc]
    """Network of `job/recipes/fast.py`: from images [batch, 3, 32, 32] to logits [batch, 10]."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.trains_whitening_bias = True
        self.whitening = nn.Conv2d(3, 24, 2)
        self.whitening.weight.requires_grad = False
        nn.init.zeros_(self.whitening.bias)
        convolutions, norms, inputs = [], [], 24
        for width in WIDTHS:
            for _ in range(2):
                convolution = nn.Conv2d(inputs, width, 3, padding="same", bias=False)
                nn.init.dirac_(convolution.weight.data[:inputs])
                convolutions.append(convolution)
                norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
                norm.weight.requires_grad = False
                norms.append(norm)
                inputs = width
        self.convolutions, self.norms = nn.ModuleList(convolutions), nn.ModuleList(norms)
        self.head = nn.Linear(inputs, peer.CLASSES, bias=False)
        self.head.weight.data /= self.head.weight.data.std()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        device, mixed = images.device.type, self.dtype != torch.float32
        with torch.autocast(device, self.dtype, enabled=mixed, cache_enabled=False):
            bias = self.whitening.bias
            bias = bias if self.trains_whitening_bias else bias.detach()
            x = F.gelu(F.conv2d(images, self.whitening.weight, bias))
            layers = zip(self.convolutions, self.norms, strict=True)
            for number, (convolution, norm) in enumerate(layers):
                x = convolution(x)
                if number % 2 == 0:
                    x = F.max_pool2d(x, 2)
                x = F.gelu(norm(x))
            x = F.max_pool2d(x, 3).flatten(1)
        with torch.autocast(device, enabled=False):
            return self.head(x.float()) / x.shape[1]

    def whiten(self, images: torch.Tensor) -> None:
        """Compute the fixed filters from normalized images [examples, 3, 32, 32]."""
        patches = F.unfold(images[:WHITENED_IMAGES].double(), 2).transpose(1, 2).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / torch.sqrt(values + WHITENING_EPSILON)).T.reshape(12, 3, 2, 2)
        self.whitening.weight.data.copy_(torch.cat([filters, -filters]))


class Muon:
    """`job.recipes.fast.Muon`, for convolution filters only."""

    def __init__(self, kernels: list[torch.Tensor]) -> None:
        self._kernels = kernels
        self._momentums = [torch.zeros_like(kernel) for kernel in kernels]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the kernels with their gradients."""
        for kernel, momentum in zip(self._kernels, self._momentums, strict=True):
            momentum.mul_(MOMENTUM).add_(kernel.grad)
            step = kernel.grad.add(momentum, alpha=MOMENTUM)
            kernel.mul_(math.sqrt(len(kernel)) / kernel.norm())
            step = orthogonalize(step.reshape(len(step), -1)).view(kernel.shape)
            kernel.add_(step, alpha=-learning_rate)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Orthogonalize a matrix with three Newton-Schulz iterations in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrix / (matrix.norm() + 1e-7)).bfloat16()
    if tall := len(x) > x.shape[1]:
        x = x.T
    for _ in range(3):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


def loss_of(model: Network, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the summed cross entropy of a batch."""
    logits = model(images)
    return F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING, reduction="sum")


class Trainer:
    """The training loop.

    Args:
        data: The data set; it is copied to the device.
        device: Device to train on.
        dtype: Dtype to compute in; parameters and statistics are float32.
        epochs: Number of epochs of the run.
        compiled: Compiles a function.

    Attributes:
        model: The network.
        steps: Number of steps per epoch.
    """

    def __init__(
        self,
        data: peer.Cifar10,
        device: torch.device,
        dtype: torch.dtype,
        epochs: int,
        compiled: Callable[[Any], Any],
    ) -> None:
        self._device = device
        self._images, self._labels = self._load(data.train_images, data.train_labels)
        self._test_images, self._test_labels = self._load(data.test_images, data.test_labels)
        flip = torch.rand(len(self._images), device=device) < 0.5
        self._flips = flip[:, None, None, None]
        self.model = Network(dtype).to(device, memory_format=torch.channels_last)
        self.model.whiten(self._images)
        self._loss = compiled(loss_of)
        model = self.model
        biases = [norm.bias for norm in model.norms]
        self._sgd = torch.optim.SGD(
            [
                {"params": group, "lr": rate, "weight_decay": DECAY / rate, "initial_lr": rate}
                for group, rate in (
                    ([model.whitening.bias], BIAS_RATE),
                    (biases, BIAS_RATE),
                    ([model.head.weight], HEAD_RATE),
                )
            ],
            momentum=SGD_MOMENTUM,
            nesterov=True,
        )
        self._muon = Muon([convolution.weight for convolution in model.convolutions])
        self.steps = len(data.train_images) // BATCH_SIZE
        self._total, self._done = self.steps * epochs, 0
        self._bias_steps = math.ceil(3 / 8 * self._total)

    def train_epoch(self, epoch: int) -> float:
        """Train an epoch and return its mean loss."""
        self.model.train()
        images = torch.where(self._flips ^ (epoch % 2 == 1), self._images.flip(-1), self._images)
        images = self._shift(images)
        order = torch.randperm(len(images), device=self._device)[: self.steps * BATCH_SIZE]
        loss_sum = torch.zeros((), device=self._device)
        for rows in order.split(BATCH_SIZE):
            batch = images[rows].contiguous(memory_format=torch.channels_last)
            loss_sum += self._train_batch(batch, self._labels[rows])
        self._synchronize()
        return float(loss_sum) / len(order)

    def train_step(self, *, late: bool = False) -> None:
        """Train one step on the first images, with `late` one after the whitening bias is fixed."""
        self._done = self._bias_steps if late else 0
        images = self._images[:BATCH_SIZE].contiguous(memory_format=torch.channels_last)
        self._train_batch(images, self._labels[:BATCH_SIZE])

    def _train_batch(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.model.trains_whitening_bias = self._done < self._bias_steps
        loss = self._loss(self.model, images, labels)
        loss.backward()
        self._step()
        return loss.detach()

    def validate(self) -> float:
        """Compute the accuracy on the unmodified test images."""
        self.model.eval()
        with torch.no_grad():
            parts = zip(self._test_images.split(500), self._test_labels.split(500), strict=True)
            correct = sum(
                (self.model(images).argmax(-1) == labels).sum() for images, labels in parts
            )
        self._synchronize()
        return int(correct) / len(self._test_labels)

    def validate_views(self) -> float:
        """Compute the accuracy with the mean logits over mirrored and shifted test images."""
        self.model.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in zip(
                self._test_images.split(500), self._test_labels.split(500), strict=True
            ):
                padded = F.pad(images, (1,) * 4, "reflect")
                views = [images, padded[..., :-2, :-2], padded[..., 2:, 2:]]
                logits = [self.model(view) + self.model(view.flip(-1)) for view in views]
                mean = logits[0] / 2 + (logits[1] + logits[2]) / 4
                correct += int((mean.argmax(-1) == labels).sum())
        return correct / len(self._test_labels)

    def _load(self, images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalized images [examples, 3, 32, 32] and labels on the device."""
        scaled = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2).float() / 255
        mean, deviation = (
            torch.tensor(one, device=self._device)[:, None, None] for one in (MEAN, DEVIATION)
        )
        return (scaled - mean) / deviation, torch.from_numpy(labels).to(self._device, torch.int64)

    def _shift(self, images: torch.Tensor) -> torch.Tensor:
        """Shift each image by up to two pixels, reflecting the edges."""
        padded = F.pad(images, (SHIFT,) * 4, "reflect")
        shifts = torch.randint(2 * SHIFT + 1, (2, len(images)), device=self._device)
        shifted = torch.empty_like(images)
        for y in range(2 * SHIFT + 1):
            for x in range(2 * SHIFT + 1):
                rows = (shifts[0] == y) & (shifts[1] == x)
                shifted[rows] = padded[rows, :, y : y + 32, x : x + 32]
        return shifted

    def _step(self) -> None:
        rest = 1 - self._done / self._total
        whitening, *others = self._sgd.param_groups
        whitening["lr"] = BIAS_RATE * max(1 - self._done / self._bias_steps, 0.0)
        for group in others:
            group["lr"] = group["initial_lr"] * rest
        self._sgd.step()
        self._muon.step(LEARNING_RATE * rest)
        self.model.zero_grad(set_to_none=True)
        self._done += 1

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def count_multiply_adds(trainer: Trainer, epochs: int) -> dict[str, int]:
    """Count the multiply-adds of a run from single steps, one validation and one evaluation."""

    def count(function: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return int(counter.get_total_flops()) // 2

    early = round(3 / 8 * epochs)
    counts = {
        "training": early * count(trainer.train_step)
        + (epochs - early) * count(lambda: trainer.train_step(late=True)),
        "validations": epochs * count(trainer.validate),
        "evaluation": count(trainer.validate_views),
    }
    counts["training"] *= trainer.steps
    return {**counts, "total": sum(counts.values())}


def main() -> None:
    """Train and print the results."""
    parser = peer.option_parser(__doc__, epochs=8)
    parser.add_argument(
        "--count", action="store_true", help="count multiply-adds instead of training"
    )
    options = parser.parse_args()
    data = peer.load(options.data_dir, options.limit, BATCH_SIZE)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(options.seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32

    def compiled(function: Any) -> Any:
        return torch.compile(function, dynamic=False) if on_gpu else function

    trainer = Trainer(data, device, dtype, options.epochs, compiled)
    if options.count:
        print(json.dumps(count_multiply_adds(trainer, options.epochs)))
        return
    about = {
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "numpy": np.__version__,
        },
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "precision": options.precision,
    }
    peer.train(options.epochs, trainer.train_epoch, trainer.validate, about)


if __name__ == "__main__":
    main()
