"""Splits that cannot leak: a pure function of the images' content, their groups and a seed, not of file order."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

PROTOCOLS = ("grouped", "official", "random")
FOLDS = 5
RULE = 3  # raise when a split or the rule for near duplicates changes: both are remembered beside the decoded images
VALIDATION_FOLDS = 8  # validation is an eighth of what is not test: a tenth of all images where the test part is a fifth


def group_images(duplicate_groups: Sequence, groups: Sequence[str] | None) -> np.ndarray:
    """(N,) group numbers, counted in order of appearance: duplicates and images of one named group share a number, and so do
    chains of both."""
    _, duplicates = np.unique(duplicate_groups, return_inverse=True)
    named = np.arange(len(duplicates)) if groups is None else np.unique(groups, return_inverse=True)[1]
    # Duplicates and images of one name are connected in a bipartite graph of duplicate groups and names.
    size = duplicates.max() + 1 + named.max() + 1
    edges = coo_array((np.ones(len(duplicates)), (duplicates, duplicates.max() + 1 + named)), shape=(size, size))
    component = connected_components(edges, directed=False)[1][duplicates]
    _, first, number = np.unique(component, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]


def split(
    labels: np.ndarray,
    hashes: Sequence[str],
    *,
    duplicate_groups: Sequence | None = None,
    groups: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
    protocol: str = "grouped",
    fold: int = 0,
    fraction: float = 1.0,
    draws: int = 0,
    draw: int = 0,
    val_per_class: int = 50,
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Indices of `train`, `val` and `test`.

    "grouped" (default): fold `fold` of five is the test part, stratified by class, and no duplicate and no group crosses.
    "official": the published test part, and the published validation part if there is one. "random": folds by image, as most
    papers split, to measure what leakage is worth. Validation is otherwise carved from what is not test, by the same rule as
    the folds ("official": by group).

    Args:
        labels, hashes, groups, parts: of length N; see `Source` and `cache.Signatures`.
        duplicate_groups: numbers shared by duplicates, as of `leakage.duplicate_groups`; by default images of equal hashes.
        fraction: of the training part, drawn by class; smaller fractions are subsets of larger ones.
        draws: if above 0, `val_per_class` images of each class are the validation part (unless one is published), the same for
            every draw, and what remains is cut into so many disjoint training sets, whole groups, by class.
        draw: which of them is the training part.

    Raises:
        ValueError: unknown protocol, fold, fraction or draw out of range, no published split, or too few images or groups in a
            class.
    """
    names = [str(c) for c in range(labels.max() + 1)] if classes is None else list(classes)
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)} (got {protocol!r})")
    if not 0 <= fold < FOLDS:
        raise ValueError(f"fold must be 0 to {FOLDS - 1} (got {fold})")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1 (got {fraction})")
    if not 0 <= draw < max(draws, 1):
        raise ValueError(f"there is no draw {draw}: " + (f"{draws} draws are 0 to {draws - 1}" if draws else "pass draws, too"))
    if draws and fraction < 1:
        raise ValueError("draws and fraction both cut the training part; pass one of them")
    if protocol == "official" and parts is None:
        raise ValueError("this data set has no published split; take protocol='grouped'")

    # Sorted by content, so that neither file order nor file names decide.
    order = np.lexsort((labels, np.asarray(hashes)))
    number = np.arange(len(labels))
    if protocol != "random":
        number = group_images(np.asarray(hashes if duplicate_groups is None else duplicate_groups)[order], _take(groups, order))
    labels, position = labels[order], np.arange(len(order))

    is_published = protocol == "official" and "val" in parts  # nothing is folded
    for c, name in enumerate(() if is_published else names):
        count = len(np.unique(number[labels == c]))
        if count < FOLDS:
            raise ValueError(
                f"class {name!r} has {count} separate images (duplicates and images of one group count once); "
                f"a split in {FOLDS} folds needs at least {FOLDS} of every class"
            )

    if protocol == "official":
        side = np.asarray(parts)[order]
        rest, test = position[side != "test"], position[side == "test"]
    else:
        rest, test = _folds(position, labels, number, FOLDS, seed)[fold]
    if is_published:
        train, val = position[side == "train"], position[side == "val"]
    elif draws:
        train, val = _take_by_class(rest, labels, number, val_per_class, seed)
    else:
        train, val = _folds(rest, labels, number, VALIDATION_FOLDS, seed)[0]
    if draws:
        train = _cut(train, labels, number, draws, seed, names)[draw]
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


def _take_by_class(
    index: np.ndarray, labels: np.ndarray, number: np.ndarray, per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """What is left, and `per_class` images of each class or, where no group fits any more, a little less."""
    room, held = np.full(labels.max() + 1, per_class), np.zeros(len(labels), bool)
    for group, counts in _groups(index, labels, number, np.random.default_rng(seed)):
        if (counts <= room).all():
            room -= counts
            held[group] = True
    return index[~held[index]], index[held[index]]


def _cut(
    index: np.ndarray, labels: np.ndarray, number: np.ndarray, draws: int, seed: int, names: Sequence[str]
) -> list[np.ndarray]:
    """`draws` disjoint sets of whole groups, as equal in every class as the groups allow."""
    groups = _groups(index, labels, number, np.random.default_rng((seed, draws)))
    separate = sum(((counts > 0).astype(int) for _, counts in groups), np.zeros(len(names), int))
    if separate.min() < draws:
        raise ValueError(
            f"class {names[separate.argmin()]!r} has {separate.min()} separate images to train on; draws must be at most that "
            f"(got {draws})"
        )
    total, cut = np.zeros((draws, labels.max() + 1), int), [[] for _ in range(draws)]
    for group, counts in sorted(groups, key=lambda group: -len(group[0])):  # the large first, so that the small even them out
        smallest = np.lexsort((total.sum(1), total @ counts))[0]
        total[smallest] += counts
        cut[smallest].append(group)
    return [np.sort(np.concatenate(groups)) for groups in cut]


def _groups(
    index: np.ndarray, labels: np.ndarray, number: np.ndarray, random: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The images of each group and their counts by class, in random order."""
    by_group = index[np.argsort(number[index], kind="stable")]
    groups = np.split(by_group, np.flatnonzero(np.diff(number[by_group])) + 1)
    return [(groups[i], np.bincount(labels[groups[i]], minlength=labels.max() + 1)) for i in random.permutation(len(groups))]


def _folds(
    index: np.ndarray, labels: np.ndarray, number: np.ndarray, count: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    count = min(count, min(len(np.unique(number[index][labels[index] == c])) for c in np.unique(labels[index])))
    from sklearn.model_selection import StratifiedGroupKFold  # takes seconds

    folds = StratifiedGroupKFold(max(count, 2), shuffle=True, random_state=seed)
    return [(index[rest], index[held]) for rest, held in folds.split(index, labels[index], number[index])]


def _take(values: Sequence[str] | None, order: np.ndarray) -> np.ndarray | None:
    return None if values is None else np.asarray(values)[order]
