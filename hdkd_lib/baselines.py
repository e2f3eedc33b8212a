"""Classifiers that train no network, to compare networks with: chance, nearest neighbours, features of a pretrained network."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.base import ClassifierMixin
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from hdkd_lib import data, models, tables
from hdkd_lib.metrics import Predictions, weighted
from hdkd_lib.runs import Run

METRICS = ("accuracy", "balanced_accuracy", "macro_auroc")


def measure(
    frame: pd.DataFrame, root: str | Path | None = None, *, network: str = "efficientnet_lite0", image_size: int = 128
) -> pd.DataFrame:
    """What such classifiers reach on every replicate: they learn from its training part, and its test part measures them.

    Chance (the largest class); the nearest neighbour on 16x16 grey pixels; nearest neighbour (by cosine) and logistic
    regression on the features of a network with ImageNet weights.

    Args:
        frame: of `runs.load`.
        root: where the images lie; None: HDKD_DATA.
        network: a timm name whose pretrained weights are at hand; "": chance and pixels only.
        image_size: pixels at which this network sees the images.

    Returns:
        Columns replicate, classifier, accuracy, balanced_accuracy, macro_auroc; test images that are in the training part do
        not count.

    Raises:
        FileNotFoundError: the images are not there.
    """
    embedding = models.create(network, pretrained=True, num_classes=0).eval() if network else None
    rows, seen = [], {}
    for name, path in frame.drop_duplicates("replicate").set_index("replicate").path.items():
        run = Run(path)
        config = run.config["data"]
        dataset = data.load_as(config, root, run.split)
        kept = torch.tensor(~np.isin(dataset.test.ids, list(tables.excluded(config))))
        images = dataset.train.images[:], dataset.test.images[:][kept]
        labels = dataset.train.labels.numpy(), dataset.test.labels[kept].numpy()
        classifiers: dict[str, tuple[ClassifierMixin, tuple]] = {
            "chance": (DummyClassifier(), images),
            "nearest neighbour on pixels": (KNeighborsClassifier(1), tuple(map(_pixels, images))),
        }
        if embedding is not None:
            features = []
            for part in images:
                key = hashlib.sha256(part.numpy().tobytes()).hexdigest()  # replicates may share their test part
                if key not in seen:
                    seen[key] = _features(embedding, part, image_size)
                features.append(seen[key])
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
            classifiers["nearest neighbour on ImageNet features"] = KNeighborsClassifier(1, metric="cosine"), features
            classifiers["linear probe on ImageNet features"] = probe, features
        for words, (classifier, (train, test)) in classifiers.items():
            classifier.fit(train, labels[0])
            probabilities = np.zeros((len(labels[1]), len(config["classes"])))
            probabilities[:, classifier.classes_] = classifier.predict_proba(test)
            told = Predictions.of(np.array(dataset.test.ids)[kept.numpy()], labels[1], probabilities)
            rows.append([name, words, *(weighted(metric, told)[0].round(6) for metric in METRICS)])
    return pd.DataFrame(rows, columns=["replicate", "classifier", *METRICS])


def _pixels(images: Tensor) -> np.ndarray:
    return F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 16).flatten(1).numpy()


@torch.no_grad()
def _features(network: nn.Module, images: Tensor, image_size: int) -> np.ndarray:
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    found = []
    for batch in images.split(128):
        shown = F.interpolate(batch.float() / 255, size=(image_size, image_size), mode="bicubic", antialias=True)
        found.append(network((shown.clamp(0, 1) - mean) / std))
    return torch.cat(found).numpy()
