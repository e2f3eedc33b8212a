"""Splits that cannot leak: a pure function of the images' content, their groups and a seed, not of file order."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

PROTOCOLS = ("grouped", "official", "random")
FOLDS = 5
VALIDATION_FOLDS = 8  # validation is an eighth of what is not test: a tenth of all images where the test part is a fifth


def group_images(hashes: Sequence[str], groups: Sequence[str] | None) -> np.ndarray:
    """(N,) group numbers: images with equal pixels, or of one named group, share a number, and so do chains of both."""
    _, pixel = np.unique(hashes, return_inverse=True)
    named = np.arange(len(pixel)) if groups is None else np.unique(groups, return_inverse=True)[1]
    # Images that share pixels or a name are connected in a bipartite graph of pixel nodes and name nodes.
    size = pixel.max() + 1 + named.max() + 1
    edges = coo_array((np.ones(len(pixel)), (pixel, pixel.max() + 1 + named)), shape=(size, size))
    return connected_components(edges, directed=False)[1][pixel]


def split(
    labels: np.ndarray,
    hashes: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
    protocol: str = "grouped",
    fold: int = 0,
    fraction: float = 1.0,
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Indices of `train`, `val` and `test`.

    "grouped" (default): fold `fold` of five is the test part, stratified by class, and no group crosses. "official": the
    published test part. "random": folds by image, as most papers split, to measure what leakage is worth. Validation is always
    carved from what is not test, by the same rule as the folds ("official": by group).

    Args:
        labels, hashes, groups, parts: of length N; see `Source` and `decode`.
        fraction: of the training part, drawn by class; smaller fractions are subsets of larger ones.

    Raises:
        ValueError: unknown protocol, fold or fraction out of range, no published split, or too few images or groups in a class.
    """
    names = [str(c) for c in range(labels.max() + 1)] if classes is None else list(classes)
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)} (got {protocol!r})")
    if not 0 <= fold < FOLDS:
        raise ValueError(f"fold must be 0 to {FOLDS - 1} (got {fold})")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1 (got {fraction})")
    if protocol == "official" and parts is None:
        raise ValueError("this data set has no published split; take protocol='grouped'")

    # Sorted by content, so that neither file order nor file names decide.
    order = np.lexsort((labels, np.asarray(hashes)))
    number = np.arange(len(labels)) if protocol == "random" else group_images(np.asarray(hashes)[order], _take(groups, order))
    labels, position = labels[order], np.arange(len(order))

    for c, name in enumerate(names):
        count = len(np.unique(number[labels == c]))
        if count < FOLDS:
            raise ValueError(
                f"class {name!r} has {count} separate images (duplicates and images of one group count once); "
                f"a split in {FOLDS} folds needs at least {FOLDS} of every class"
            )

    if protocol == "official":
        is_test = np.asarray(parts)[order] == "test"
        rest, test = position[~is_test], position[is_test]
    else:
        rest, test = _folds(position, labels, number, FOLDS, seed)[fold]
    train, val = _folds(rest, labels, number, VALIDATION_FOLDS, seed)[0]
    if fraction < 1:
        shuffled = np.random.default_rng(seed).permutation(train)
        by_class = [shuffled[labels[shuffled] == c] for c in range(len(names))]
        train = np.concatenate([i[: max(1, round(fraction * len(i)))] for i in by_class])
    for part, index in (("train", train), ("val", val), ("test", test)):
        if absent := sorted(set(range(len(names))) - set(labels[index])):
            raise ValueError(
                f"no image of class {names[absent[0]]!r} is in the {part} part; the class has too few images to split"
            )
    return {part: np.sort(order[index]) for part, index in (("train", train), ("val", val), ("test", test))}


def _folds(
    index: np.ndarray, labels: np.ndarray, number: np.ndarray, count: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    count = min(count, min(len(np.unique(number[index][labels[index] == c])) for c in np.unique(labels[index])))
    folds = StratifiedGroupKFold(max(count, 2), shuffle=True, random_state=seed)
    return [(index[rest], index[held]) for rest, held in folds.split(index, labels[index], number[index])]


def _take(values: Sequence[str] | None, order: np.ndarray) -> np.ndarray | None:
    return None if values is None else np.asarray(values)[order]
