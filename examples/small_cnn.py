"""A network of one's own: a plain nn.Module that takes `num_classes` and returns N x num_classes logits.

Train it on the embedded digits, from the folder that holds this one:

    python jobs/train.py googlenet-digits --model.kind examples.small_cnn:SmallCNN --model.args '{"width": 16}'
"""

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Two convolutions, one hidden layer with dropout, and a classifier, for images of any size."""

    def __init__(self, num_classes: int, width: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(4),
        )  # fmt: skip
        self.hidden = nn.Linear(2 * width * 16, 4 * width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return N x num_classes logits of N x 3 x S x S images."""
        x = self.features(images).view(len(images), -1)
        logits: Tensor = self.classifier(self.dropout(self.hidden(x).relu()))
        return logits
