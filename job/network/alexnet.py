"""AlexNet, layer by layer as Krizhevsky et al. (NIPS 2012) and theano_alexnet (arXiv:1412.2302) define it; and with the
layer sizes of torchvision's `alexnet`, for weights that were published for it.

In: float images (N, 3, S, S), S at least 67. Out: class scores (N, classes). Plain PyTorch, readable against the paper.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from job.config import Config
from job.network.torchvision import PixelConv2d

LRN_SIZE = 5  # neighbouring channels that are summed
LRN_K = 2.0
LRN_ALPHA = 1e-4  # factor of that sum
LRN_BETA = 0.75


def lrn(x: Tensor) -> Tensor:
    """Local response normalisation over channels: x / (2 + 1e-4 * sum of 5 channels' x^2)^0.75. (N, C, H, W) -> same.

    Krizhevsky et al., section 3.3. PyTorch's alpha multiplies the mean of the channels, not their sum.
    """
    return F.local_response_norm(x, LRN_SIZE, alpha=LRN_ALPHA * LRN_SIZE, beta=LRN_BETA, k=LRN_K)


def pool(x: Tensor) -> Tensor:
    """Overlapping max-pooling: 3x3 windows, stride 2, no padding (floor mode). (N, C, H, W) -> (N, C, H', W')."""
    return F.max_pool2d(x, kernel_size=3, stride=2)


def feature_size(image_size: int) -> int:
    """Side of the last pool's output for square images of `image_size` pixels: 6 at 227, 1 at 67."""
    after_conv1 = (image_size - 11) // 4 + 1
    pooled = after_conv1
    for _ in range(3):  # pools after layers 1, 2 and 5; the other convolutions keep the size
        pooled = (pooled - 3) // 2 + 1
    return pooled


# Published channels of conv1 to conv5 and of fc6 and fc7, by `model.layout`.
CHANNELS = {"alexnet": (96, 256, 384, 384, 256, 4096), "torchvision": (64, 192, 384, 256, 256, 4096)}


class AlexNet(nn.Module):
    """AlexNet with its two column groups in layers 2, 4 and 5, or torchvision's.

    Args:
        classes: outputs of fc8.
        image_size: side of the input images in pixels; it sets the inputs of fc6.
        lrn_place: "after-pool" (theano_alexnet), "before-pool" (the article) or "none".
        dropout: probability with which an output of fc6 and fc7 is zeroed in training.
        width: factor on the channels of every hidden layer (1: the published network).
        batch_norm: AlexNet-BN. You, Gitman and Ginsburg (arXiv:1708.03888) put batch normalisation in the place of LRN;
            Jia et al. (arXiv:1807.11205) add one after the last pool, whose outputs they saw grow during training with
            large batches. Here: between each convolution and its ReLU, and after the last pool; none in fc6 and fc7,
            which keep their dropout. Convolutions have no biases then, since the normalisation would remove them.
        layout: "alexnet", or "torchvision": one column, 2 pixels of padding in conv1, no LRN and no batch
            normalisation, the last pool's output averaged to 6x6, dropout on the inputs of fc6 and fc7. Given the
            weights of `torchvision.models.alexnet` it computes the same; see job.network.torchvision.

    Attributes:
        frozen: the layers up to the last pool keep their weights and statistics; see `freeze_features`.
    """

    def __init__(
        self,
        classes: int = 1000,
        image_size: int = 227,
        lrn_place: str = "after-pool",
        dropout: float = 0.5,
        width: float = 1.0,
        batch_norm: bool = False,
        layout: str = "alexnet",
    ):
        super().__init__()
        assert layout == "alexnet" or lrn_place == "none" and not batch_norm, "torchvision's has neither"

        def channels(published: int) -> int:
            return max(2, 2 * round(published * width / 2))  # even: two groups

        c1, c2, c3, c4, c5, hidden = map(channels, CHANNELS[layout])
        norm, bias = (nn.BatchNorm2d, False) if batch_norm else (nn.Identity, True)
        groups, side = 2, feature_size(image_size)
        if layout == "torchvision":
            groups, side = 1, 6
            self.conv1 = PixelConv2d(3, c1, 11, stride=4, padding=2)  # 224 -> 55
        else:
            self.conv1 = nn.Conv2d(3, c1, 11, stride=4, bias=bias)  # 227 -> 55
        self.norm1 = norm(c1)
        self.conv2 = nn.Conv2d(c1, c2, 5, padding=2, groups=groups, bias=bias)  # 27 -> 27
        self.norm2 = norm(c2)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1, bias=bias)  # 13 -> 13
        self.norm3 = norm(c3)
        self.conv4 = nn.Conv2d(c3, c4, 3, padding=1, groups=groups, bias=bias)  # 13 -> 13
        self.norm4 = norm(c4)
        self.conv5 = nn.Conv2d(c4, c5, 3, padding=1, groups=groups, bias=bias)  # 13 -> 13
        self.norm5 = norm(c5)
        self.norm6 = norm(c5)
        self.fc6 = nn.Linear(c5 * side**2, hidden)  # 9216 -> 4096
        self.fc7 = nn.Linear(hidden, hidden)
        self.fc8 = nn.Linear(hidden, classes)
        self.image_size = image_size
        self.layout = layout
        self.frozen = False
        # The outputs that dropout acts on.
        self.dropped = ("features", "fc6") if layout == "torchvision" else ("fc6", "fc7")
        self.lrn_place = lrn_place
        self.dropout = dropout
        self.width = width
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Weights from N(0, 0.01), fc6 and fc7 from N(0, 0.005); biases 0.1 in conv 2, 4, fc 6, 7, else 0.

        In a network of another width, a unit with w times the published inputs gets weights of 1/sqrt(w) times the
        published spread, so that signals keep their size; narrow networks would not start to learn otherwise.
        Torchvision's layout keeps what PyTorch draws by default, as its authors do.
        """
        if self.layout == "torchvision":
            return
        for name, layer in self.named_children():
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            spread = 0.005 if name in ("fc6", "fc7") else 0.01
            layer.weight.normal_(0, spread if name == "conv1" else spread / math.sqrt(self.width))
            if layer.bias is not None:
                layer.bias.fill_(0.1 if name in ("conv2", "conv4", "fc6", "fc7") else 0.0)

    def freeze_features(self) -> None:
        """Keep conv1 to conv5, and their batch normalisation with its running statistics, as they are in training."""
        self.frozen = True
        for layer in self._feature_layers():
            layer.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "AlexNet":
        """As of torch.nn.Module; frozen batch normalisation keeps to its running statistics."""
        super().train(mode)
        if self.frozen:
            for layer in self._feature_layers():
                layer.eval()
        return self

    def _feature_layers(self) -> list[nn.Module]:
        return [layer for name, layer in self.named_children() if not name.startswith("fc")]

    def pool_and_normalise(self, x: Tensor) -> Tensor:
        """Pooling and LRN in the order of `lrn_place`. (N, C, H, W) -> (N, C, H', W')."""
        if self.lrn_place == "before-pool":
            return pool(lrn(x))
        return lrn(pool(x)) if self.lrn_place == "after-pool" else pool(x)

    def features(self, x: Tensor) -> Tensor:  # (N, 3, 227, 227)
        """The input of fc6, (N, 9216) at 227 pixels."""
        x = self.pool_and_normalise(F.relu(self.norm1(self.conv1(x))))  # (N, 96, 27, 27)
        x = self.pool_and_normalise(F.relu(self.norm2(self.conv2(x))))  # (N, 256, 13, 13)
        x = F.relu(self.norm3(self.conv3(x)))  # (N, 384, 13, 13)
        x = F.relu(self.norm4(self.conv4(x)))  # (N, 384, 13, 13)
        x = self.norm6(pool(F.relu(self.norm5(self.conv5(x)))))  # (N, 256, 6, 6)
        if self.layout == "torchvision" and x.shape[-1] != 6:  # at 224 pixels it is 6
            x = F.adaptive_avg_pool2d(x, 6)
        return x.flatten(1)  # (N, 9216)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 227, 227)
        """Class scores (N, classes). Dropout scales by 1 / (1 - p) in training; the article halves outputs in use."""
        x = self._drop("features", self.features(x))  # (N, 9216)
        x = self._drop("fc6", F.relu(self.fc6(x)))
        x = self._drop("fc7", F.relu(self.fc7(x)))
        return self.fc8(x)  # (N, classes)

    def _drop(self, name: str, x: Tensor) -> Tensor:
        """Dropout of an output, if the layout has it there."""
        return F.dropout(x, self.dropout, self.training) if name in self.dropped else x


def build(config: Config) -> AlexNet:
    """The network of a run's settings on the CPU, with initial weights drawn from its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return AlexNet(
            config.model.classes,
            config.image_size,
            config.model.lrn,
            config.model.dropout,
            config.model.width,
            config.model.batch_norm,
            config.model.layout,
        )
