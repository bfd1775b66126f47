"""A convolutional network that classifies digits, its training step and its accuracy."""

import torch
from torch import Tensor, nn

CLASSES = 10


class Learner:
    """The network and its optimizer.

    Args:
        seed: Of the initial weights.
        device: Where the weights are, and where batches must be.
    """

    def __init__(self, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self._network = nn.Sequential(
            *_convolution(1, 16),
            nn.MaxPool2d(2),
            *_convolution(16, 32),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, CLASSES),
        ).to(device)
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=3e-3)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Train on one batch: float32 [B, 1, 8, 8] in 0..1 and int64 [B].

        Returns:
            The loss. Reading it waits for the device, so that the time of a step includes its work.
        """
        loss = nn.functional.cross_entropy(self._network(images), labels)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss.item())

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the fraction of the images, shaped as in `step`, that is classified correctly."""
        self._network.eval()
        hits = self._network(images).argmax(dim=1) == labels
        self._network.train()
        return float(hits.float().mean().item())


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()]
