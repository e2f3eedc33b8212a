"""What to do about rare classes: nothing, weights in the loss, a balanced sampler, or synthetic images."""

import numpy as np
import torch
from torch import Tensor

from hdkd_lib.data.batches import Part

IMBALANCE = ("none", "class_weights", "balanced_sampler", "smote")


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """(C,) N / (C N_c): inverse frequencies whose mean over the images is one ("balanced" in scikit-learn)."""
    return len(labels) / (classes * labels.bincount(minlength=classes).clamp(min=1).float())


def smote(part: Part, *, seed: int = 0, neighbours: int = 5) -> Part:
    """The part with synthetic images, at its end, that make every class as large as the largest.

    SMOTE (Chawla et al. 2002, arXiv 1106.1813) on raw pixels as in HDKD's code, by imbalanced-learn: a synthetic image lies
    between one of its class and one of that image's nearest neighbours. Computed in float32 and rounded: the official code
    computes in uint8, which wraps around.

    Raises:
        ValueError: a class has a single image.
        ImportError: the package imbalanced-learn is not installed.
    """
    try:
        from imblearn.over_sampling import SMOTE
    except ImportError as error:
        raise ImportError("SMOTE needs the package imbalanced-learn: pip install imbalanced-learn") from error
    images, counts = part.images[:], part.labels.bincount()
    added, labels = [images], [part.labels]
    for c, count in enumerate(counts.tolist()):
        missing = int(counts.max()) - count
        if not missing or not count:
            continue
        if count == 1:
            raise ValueError(
                f"class {c} has a single training image and SMOTE needs two; choose another treatment of imbalance"
            )
        # One class at a time, against one blank image of no class: neighbours are sought within the class alone, and the
        # float copy of a large set never exists as a whole.
        own = images[part.labels == c].flatten(1).numpy().astype(np.float32)
        sampler = SMOTE(sampling_strategy={1: count + missing}, k_neighbors=min(neighbours, count - 1), random_state=seed + c)
        drawn, _ = sampler.fit_resample(np.concatenate([own, 0 * own[:1]]), [1] * count + [0])
        synthetic = torch.from_numpy(drawn[count + 1 :].round().clip(0, 255).astype(np.uint8))
        added.append(synthetic.view(missing, *images.shape[1:]))
        labels.append(torch.full((missing,), c))
    labels = torch.cat(labels)
    count = len(labels) - len(part)
    return Part(
        torch.cat(added),
        labels,
        [*part.ids, *(f"smote-{i:06d}" for i in range(count))],
        np.append(part.groups, np.full(count, -1)),
    )
