"""One logit: positive or not, by a threshold on its probability."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clead.errors import UserError
from clead.settings import setting, settings
from clead.tasks import TASKS
from clead.tasks.classification import Classification


@TASKS.register("binary")
@settings
class Binary(Classification):
    """Outputs are one logit z, (B,) or (B, 1), or two, [a, b] with z = b − a; the target is 1 (positive, the second class) or 0.

    The answer is 1 where sigmoid(z) > threshold. Training minimises the binary cross-entropy of z, whatever the threshold.
    """

    threshold: float = setting(
        0.5,
        "an image is positive, of the second class, if its probability is above this",
        gt=0,
        lt=1,
        unit="probability",
    )

    @property
    def shift(self) -> float:
        """The logit of the threshold: an image is positive if z is above it."""
        return math.log(self.threshold / (1 - self.threshold))

    def pair(self, outputs: Tensor) -> Tensor:
        """Return two logits, (B, 2), the larger of which is the answer: [shift, z], or [a + shift, b].

        >>> Binary().pair(torch.tensor([3.0, -1.0]))
        tensor([[ 0.,  3.],
                [ 0., -1.]])
        """
        if outputs.dim() == 1 or outputs.shape[1] == 1:
            z = outputs.reshape(-1, 1)
            outputs = torch.cat([torch.zeros_like(z), z], 1)
        return outputs if self.threshold == 0.5 else outputs + outputs.new_tensor([self.shift, 0.0])

    def outputs(self, num_classes: int) -> int:
        """Return 1: one logit."""
        return 1

    def check_data(self, labels: Tensor, classes: Sequence[str]) -> None:
        """Raise UserError unless the data has two classes and each image one of them."""
        super().check_data(labels, classes)
        if len(classes) != 2:
            raise UserError(
                f"task.name: binary needs two classes, the negative and then the positive one, got {len(classes)}: "
                f"{', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}; give --task classification, or data of two classes"
            )

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """−log p(target) of each image, (B,) float32: the binary cross-entropy of z."""
        return super().loss(Binary().pair(outputs), target)

    def margin(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return how far z is on the wrong side of the threshold, (B,); above 0 iff wrong."""
        return super().margin(self.pair(outputs), target)

    def correct(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return where z is on its side of the threshold, and finite, (B,) bool; at the threshold the answer is 0."""
        return super().correct(self.pair(outputs), target)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return [1 − p, p] with p = sigmoid(z), (B, 2) float32."""
        return super().probabilities(Binary().pair(outputs))

    def decide(self, probabilities: Tensor) -> Tensor:
        """Return 1 where the second probability is above the threshold, (B,) int64."""
        return (probabilities[:, 1] > self.threshold).long()

    def predict(self, outputs: Tensor) -> Tensor:
        """Return 1 where z is above the threshold, (B,) int64."""
        return super().predict(self.pair(outputs))

    def rival(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the other class, (B,) int64."""
        return 1 - target

    def check(self, outputs: Tensor, target: Tensor) -> None:
        """Raise UserError unless ``outputs`` are one logit per image, or two, and ``target`` is 0 or 1."""
        columns = outputs.shape[1] if outputs.dim() == 2 else 1
        if not outputs.is_floating_point() or outputs.dim() not in (1, 2) or columns > 2:
            raise UserError(
                f"task.name: binary needs one logit per image, float (B,) or (B, 1), got {outputs.dtype} {tuple(outputs.shape)}; "
                "give --task classification"
            )
        self.check_target(target, len(target), 2)

    def describe(self) -> str:
        """Return in one line what is right."""
        return f"an image is right if the sigmoid of its one logit is above {self.threshold:g} if, and only if, it is positive"
