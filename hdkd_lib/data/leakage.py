"""Which images occur more than once, and what a split that ignores it is worth.

    python -m hdkd_lib.data.leakage FOLDER      # any image folder: prints a summary, writes the pairs as a table

Two images are *exact* duplicates if their decoded pixels are equal. They are *near* duplicates if, one aligned to the other,
they are much closer than unrelated images of the same set. The rule is OUR CHOICE and has four steps:

1. *Reference.* Images are compared by the low frequencies of a grey thumbnail (a DCT, as pHash does), without mean and
   contrast. An image's reference is its distance to the tenth nearest image of a sample, in any of eight orientations: upright,
   mirrored, turned by quarters. The images' hashes draw the sample, so that neither file order nor a random seed decides.
2. *Candidates.* Pairs that share one of their nearest images of the sample, in any orientation, and are closer than 4/5 of both
   references.
3. *Alignment.* Scale and shift in each direction, gain and offset are fitted on 32x32 thumbnails (Gauss-Newton; Baker and
   Matthews 2004). The distance is sqrt(1 - correlation) where the two images overlap.
4. *Decision.* The ratio of this distance to the smaller reference (Lowe 2004) is at most 1/3, and at most 1e-3 unrelated images
   are expected within it by chance (a contrario; Desolneux, Moisan and Morel 2000). Their number grows with the size of the set
   and with ratio^d, where d is the dimension of the set, from how fast neighbours are found (as in Levina and Bickel 2004).

Photographs have many dimensions and are joined up to a third of the usual distance; handwritten digits, which are all alike,
only if they are nearly equal. Precision and recall are in results/audits: near_duplicates.csv for generated copies in every set
at hand, known_duplicates.csv for CIFAR-10's published list (Barz and Denzler 2020). In sets of images that are all alike, such
as scans of one organ or digits, most cropped copies and copies with text on them are missed. Other views of one scene and other
images of one patient are not found.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from hdkd_lib.data.cache import Signatures, decode, remembered
from hdkd_lib.data.groups import with_groups
from hdkd_lib.data.sources import Source, open_source
from hdkd_lib.data.splits import RULE

LARGEST_RATIO = 1 / 3  # of a pair's distance to that of unrelated images
FALSE_ALARMS = 1e-3  # unrelated images that may be expected as near as a duplicate
CHAIN = 0.1  # a chain of near duplicates with more of a class is not joined (OUR CHOICE), if it is of more than ten images

_FREQUENCIES = 6  # in each direction, the constant one left out
_RANK = 10  # the neighbour in the sample that gives the reference
_FAR = 32  # the neighbour by which, with the one of half its rank, the dimension is measured
_LISTS = 5  # nearest images of the sample by which candidates are found
_GATE = 0.8  # of the reference, before alignment
_KEPT = 8  # nearest candidates of each image
_FLAT = 0.5  # standard deviation, of 255, below which a thumbnail shows nothing
_BLOCK = 1024  # images or pairs at a time

# Transposed or not, then flipped vertically or not, then horizontally; PIL's names.
_ORIENTATIONS = np.array(
    ["", "flip_left_right", "flip_top_bottom", "rotate_180", "transpose", "rotate_270", "rotate_90", "transverse"]
)
_INVERSE = torch.tensor([0, 1, 2, 3, 4, 6, 5, 7])


@dataclass(frozen=True)
class Audit:
    """What `audit` found.

    Attributes:
        pairs: one row per pair of duplicates: a, b (ids), match ("exact" or "near"), distance (0 to 1), ratio (of the distance
            to that of unrelated images), orientation (what turns a so that it matches b, in PIL's words), label_a, label_b,
            part_a, part_b, is_conflict (labels differ), is_crossing (parts differ), is_joined (false in chains that are too
            long). Of k equal images k - 1 pairs are listed, each with the first, training images first.
        duplicate_groups: (N,) group numbers: images joined by a chain of pairs share a number.
        summary: counts by name.
    """

    pairs: pd.DataFrame
    duplicate_groups: np.ndarray
    summary: dict[str, int]


def near_duplicates(signatures: Signatures) -> pd.DataFrame:
    """Pairs a < b of image numbers with unequal pixels, one of each set of equals, with distance, ratio and orientation.

    `orientation` turns a so that it matches b. The cache remembers what was found.
    """
    return pd.DataFrame(remembered(signatures.folder, f"near-{RULE}", lambda: _near_duplicates(signatures)))


def _near_duplicates(signatures: Signatures) -> dict[str, np.ndarray]:
    _, first = np.unique(signatures.hashes, return_index=True)  # in the order of the hashes: a random one, the same everywhere
    thumbnails = torch.from_numpy(signatures.thumbnails[first])
    views = _views(signatures.thumbnails[first])
    lists, reference, chance = _references(views)
    pairs = _candidates(views, lists, reference)
    distance = _aligned(thumbnails, *pairs)
    ratio = distance / (torch.minimum(*reference[pairs[:2]]) / 2**0.5)
    # Rounded, so that no machine's arithmetic decides.
    ratio, distance = (values.numpy().astype(float).round(3) for values in (ratio, distance))
    is_near = (ratio <= LARGEST_RATIO) & (chance(ratio) <= FALSE_ALARMS)
    (a, b), view = first[pairs[:2, is_near].numpy()], pairs[2, is_near]
    view = torch.where(torch.from_numpy(a < b), view, _INVERSE[view])
    columns = {"a": np.minimum(a, b), "b": np.maximum(a, b), "distance": distance[is_near], "ratio": ratio[is_near]}
    columns["orientation"] = _ORIENTATIONS[view.numpy()]
    order = np.lexsort((columns["b"], columns["a"]))
    return {name: column[order] for name, column in columns.items()}


def _views(thumbnails: np.ndarray) -> Tensor:
    """(8, N, D) low frequencies of the images in eight orientations, of length 1."""
    low = np.empty((len(thumbnails), _FREQUENCIES, _FREQUENCIES), np.float32)
    for start in range(0, len(low), _BLOCK):
        block = thumbnails[start : start + _BLOCK].astype(np.float32)
        low[start : start + _BLOCK] = dctn(block, axes=(1, 2), norm="ortho")[:, :_FREQUENCIES, :_FREQUENCIES]
    low[:, 0, 0] = 0
    length = np.sqrt((low**2).sum((1, 2), keepdims=True))
    low *= (length > 32 * _FLAT) / np.maximum(length, 1)  # nothing is like a flat image
    sign = (-1) ** np.arange(_FREQUENCIES, dtype=np.float32)  # of a mirrored cosine
    turned = [low * y * x for low in (low, low.transpose(0, 2, 1)) for y in (1, sign[:, None]) for x in (1, sign)]
    return torch.from_numpy(np.stack(turned).reshape(8, len(low), -1)[:, :, 1:])


def _references(views: Tensor) -> tuple[Tensor, Tensor, Callable[[np.ndarray], np.ndarray]]:
    """What the sample, the first M of N images, tells of each.

    Returns:
        (N, 8, L) numbers of the nearest images of the sample, by the orientation in which they are near; (N,) references; and
        how many unrelated images are expected within a ratio.
    """
    count = views.shape[1]
    size = min(count, max(1024, int(4 * count**0.5)))
    sample = views[:, :size].flatten(0, 1)
    lists, nearest = [], []
    for start in range(0, count, _BLOCK):
        likeness = (views[0, start : start + _BLOCK] @ sample.T).unflatten(1, (8, size))
        lists.append(likeness.topk(min(_LISTS, size), dim=2).indices.int())
        own = torch.arange(min(start, size), min(start + _BLOCK, size))
        likeness[own - start, :, own] = -1
        nearest.append(likeness.amax(1).topk(min(_FAR, size - 1), dim=1).values)
    distance = (2 - 2 * torch.cat(nearest)).clamp(min=1e-6).sqrt()
    if size <= _RANK:  # too few to know: unrelated images are taken for uncorrelated
        return torch.cat(lists), torch.full((count,), 2**0.5), np.zeros_like
    if size <= _FAR:
        return torch.cat(lists), distance[:, _RANK - 1], np.zeros_like
    # Twice the neighbours are 2^(1/d) times as far; the nearest, which may be duplicates, do not count.
    dimension = np.log(2) / max(float((distance[:, -1] / distance[:, _FAR // 2 - 1]).log().median()), 1e-2)
    return torch.cat(lists), distance[:, _RANK - 1], lambda ratio: count / size * _RANK * ratio**dimension


def _candidates(views: Tensor, lists: Tensor, reference: Tensor) -> Tensor:
    """(3, P) pairs a < b, and the orientation in which a is near b."""
    length = lists.shape[2]
    order, ends = [], []
    for near in (lists[:, :1], lists):
        flat, index = near.flatten().sort(stable=True)
        order.append(index)
        ends.append(torch.searchsorted(flat, torch.arange(int(lists.max()) + 2, dtype=flat.dtype)).tolist())
    found = []
    for i in range(len(ends[0]) - 1):
        upright = order[0][ends[0][i] : ends[0][i + 1]] // length
        turned = order[1][ends[1][i] : ends[1][i + 1]] // length
        image, view = turned // 8, _INVERSE[turned % 8]
        distance = (2 - 2 * views[view, image] @ views[0, upright].T).clamp(min=0).sqrt()
        limit = _GATE * torch.minimum(reference[image][:, None], reference[upright])
        a, b = ((distance <= limit) & (image[:, None] != upright)).nonzero(as_tuple=True)
        pair, view = torch.stack([image[a], upright[b]]), view[a]
        view = torch.where(pair[0] < pair[1], view, _INVERSE[view])
        found.append(torch.cat([pair.sort(0).values, torch.stack([view, (1e4 * distance[a, b]).round().long()])]))
    table = pd.DataFrame(torch.cat(found, 1).T.numpy(), columns=["a", "b", "view", "distance"])
    table = table.sort_values(["distance", "a", "b", "view"]).drop_duplicates(["a", "b"])
    ranks = [table.groupby(side).cumcount() for side in "ab"]
    return torch.from_numpy(table[np.minimum(*ranks) < _KEPT][["a", "b", "view"]].to_numpy().T.copy())


def _aligned(thumbnails: Tensor, a: Tensor, b: Tensor, view: Tensor) -> Tensor:
    """(P,) distances of images a, turned and aligned to b, from b."""
    found = [torch.empty(0)]
    for start in range(0, len(a), _BLOCK):
        block = slice(start, start + _BLOCK)
        moving, turn = thumbnails[a[block]].float(), view[block, None, None]
        moving = torch.where(turn >= 4, moving.mT, moving)
        moving = torch.where(turn // 2 % 2 == 1, moving.flip(1), moving)
        found.append(_distance(torch.where(turn % 2 == 1, moving.flip(2), moving), thumbnails[b[block]].float()))
    return torch.cat(found)


def _distance(moving: Tensor, fixed: Tensor) -> Tensor:
    """sqrt(1 - correlation) of (P, 32, 32) images, where they overlap once scale and shift are fitted."""
    scale, shift = torch.ones(len(fixed), 2), torch.zeros(len(fixed), 2)  # in x and y; the image is from -1 to 1
    moving, fixed = _blur(moving), _blur(fixed)
    halves = [_blur(F.avg_pool2d(images, 2)) for images in (moving, fixed)]
    for source, target, steps in ((*halves, 4), (moving, fixed, 1)):
        place = _places(source.shape[-1])
        for _ in range(steps):
            warped, inside = _warp(source, scale, shift)
            slope_y, slope_x = torch.gradient(warped, spacing=2 / len(place), dim=(1, 2))
            slope_x, slope_y = slope_x / scale[:, 0, None, None], slope_y / scale[:, 1, None, None]
            terms = [slope_x * place, slope_y * place[:, None], slope_x, slope_y, warped, torch.ones_like(warped)]
            terms = (torch.stack(terms, 1) * inside[:, None]).flatten(2)
            square = terms @ terms.mT
            ridge = 1e-4 * square.diagonal(dim1=1, dim2=2).mean(1) + 1e-3
            square = square + ridge[:, None, None] * torch.eye(6)
            solved = torch.linalg.solve(square, terms @ target.flatten(1)[:, :, None])[:, :, 0]
            step = (solved[:, :4] / solved[:, 4:5].clamp(min=0.2)).clamp(-0.15, 0.15)
            scale, shift = (scale + step[:, :2]).clamp(0.75, 4 / 3), (shift + step[:, 2:]).clamp(-0.3, 0.3)
    warped, inside = _warp(moving, scale, shift)
    both = torch.stack([warped, fixed]).flatten(2)
    inside = inside.flatten(1)
    both = (both - (both * inside).sum(2, keepdim=True) / inside.sum(1, keepdim=True)) * inside
    norms = both.norm(dim=2)
    correlation = both.prod(0).sum(1) / norms.prod(0).clamp(min=1)
    return (1 - correlation).clamp(min=0).sqrt()


def _blur(images: Tensor) -> Tensor:
    """Weights 1, 2, 1 in both directions."""
    for dim in (1, 2):
        edges = images.narrow(dim, 0, 1), images, images.narrow(dim, -1, 1)
        padded, size = torch.cat(edges, dim), images.shape[dim]
        images = (padded.narrow(dim, 0, size) + 2 * images + padded.narrow(dim, 2, size)) / 4
    return images


def _places(size: int) -> Tensor:
    """(S,) centres of pixels, from -1 to 1."""
    return (torch.arange(size) + 0.5) * 2 / size - 1


def _warp(images: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Each image at scale * place + shift, by linear interpolation, and (P, S, S) where that is inside of it."""
    size = images.shape[-1]
    pixel = ((scale[:, :, None] * _places(size) + shift[:, :, None]) + 1) * size / 2 - 0.5  # (P, 2, S)
    weights = (1 - (pixel.clamp(0, size - 1)[..., None] - torch.arange(size)).abs()).clamp(min=0)
    inside = ((pixel > -0.51) & (pixel < size - 0.49)).float()
    return weights[:, 1] @ images @ weights[:, 0].mT, inside[:, 1, :, None] * inside[:, 0, None]


def duplicate_groups(
    signatures: Signatures, near: pd.DataFrame, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) group numbers, equal for exact and near duplicates and for chains of them, and (P,) whether a near pair is joined.

    Args:
        labels: (N,) classes; a chain of near duplicates with more than `CHAIN` of a class's images is then not joined.
    """
    _, exact = np.unique(signatures.hashes, return_inverse=True)
    group = _components(exact, near)
    is_joined = np.ones(len(near), bool)
    if labels is not None:
        share = np.zeros(group.max() + 1)
        for c in np.unique(labels):
            share = np.maximum(share, np.bincount(group[labels == c], minlength=len(share)) / (labels == c).sum())
        different = np.bincount(group[np.unique(exact, return_index=True)[1]])
        is_joined = ~((share > CHAIN) & (different > 10))[group[near.a]]
        group = _components(exact, near[is_joined])
    return group, is_joined


def _components(exact: np.ndarray, near: pd.DataFrame) -> np.ndarray:
    size = exact.max() + 1
    edges = coo_array((np.ones(len(near)), (exact[near.a], exact[near.b])), shape=(size, size))
    return connected_components(edges, directed=False)[1][exact]


def audit(
    signatures: Signatures,
    ids: Sequence[str],
    labels: np.ndarray,
    classes: Sequence[str],
    parts: Sequence[str] | None = None,
    *,
    join_chains: bool = False,
) -> Audit:
    """Duplicates within a set of N images and, with `parts` (a name for each image), across them.

    Args:
        join_chains: keep also the images of a chain of near duplicates in one group that holds more than `CHAIN` of a class.
    """
    near, labels = near_duplicates(signatures), np.asarray(labels)
    group, is_joined = duplicate_groups(signatures, near, None if join_chains else labels)
    side = np.full(len(ids), "") if parts is None else np.asarray(parts)
    # Training images first, so that a pair with a test image shows where that image was seen.
    order = np.lexsort((np.arange(len(ids)), ["train val test".find(part) for part in side]))
    representative = pd.Series(order, index=signatures.hashes[order]).groupby(level=0).first()
    twin = representative[signatures.hashes].to_numpy()
    copies = np.flatnonzero(twin != np.arange(len(ids)))
    exact = pd.DataFrame({"a": twin[copies], "b": copies, "match": "exact", "distance": 0.0, "ratio": 0.0, "orientation": ""})
    exact["is_joined"] = True
    near_pairs = near.assign(a=twin[near.a], b=twin[near.b], match="near", is_joined=is_joined)
    pairs = pd.concat([exact, near_pairs], ignore_index=True)
    a, b = pairs.a.to_numpy(int), pairs.b.to_numpy(int)
    names = np.asarray(classes)
    pairs = pairs.assign(
        a=np.asarray(ids)[a],
        b=np.asarray(ids)[b],
        label_a=names[labels[a]],
        label_b=names[labels[b]],
        part_a=side[a],
        part_b=side[b],
        is_conflict=labels[a] != labels[b],
        is_crossing=side[a] != side[b],
    )
    columns = ["a", "b", "match", "distance", "ratio", "orientation"]
    columns += ["label_a", "label_b", "part_a", "part_b", "is_conflict", "is_crossing", "is_joined"]

    _, exact_group = np.unique(signatures.hashes, return_inverse=True)
    summary = {
        "images": len(ids),
        "exact_copies": len(ids) - len(representative),
        "near_duplicate_pairs": len(near),
        "distinct_images": len(np.unique(group)),
        "duplicates_with_two_labels": _with_two(group, labels),
    }
    if not is_joined.all():
        chained = np.unique(twin[near[~is_joined][["a", "b"]]])
        summary["images_in_chains_not_joined"] = int(np.isin(twin, chained).sum())
        warnings.warn(
            f"{summary['images_in_chains_not_joined']} images form chains of near duplicates with more than {CHAIN:.0%} of a "
            "class, which are not kept in one split; look at the audit's pairs and, if they are right, pass join_chains=True",
            stacklevel=2,
        )
    for x, y in _pairs_of_parts(side):
        summary[f"{x}_images"] = int((side == x).sum())
        for match, g in (("exact", exact_group), ("exact_or_near", group)):
            summary[f"{x}_images_with_{match}_duplicate_in_{y}"] = int(np.isin(g[side == x], g[side == y]).sum())
    return Audit(pairs[columns], group, summary)


def _pairs_of_parts(side: np.ndarray) -> list[tuple[str, str]]:
    """Which parts are compared, of those that there are."""
    every = ("val", "train"), ("test", "train"), ("test", "val")
    return [(x, y) for x, y in every if (side == x).any() and (side == y).any()]


def leakage_gain(signatures: Signatures, labels: np.ndarray, splits: dict[str, list[dict[str, np.ndarray]]]) -> pd.DataFrame:
    """How well simple classifiers on small pixels do under each protocol: what a leak alone is worth.

    The nearest neighbour and a logistic regression on 16x16 grey pixels learn from `train` and `val`; `test` measures them.

    Args:
        splits: for each protocol's name its folds, each as `splits.split` gives it.

    Returns:
        One row per protocol, fold and classifier, with `balanced_accuracy`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pixels = signatures.thumbnails.reshape(len(signatures), 16, 2, 16, 2).mean((2, 4)).reshape(len(signatures), -1)
    classifiers = {
        "nearest neighbour": KNeighborsClassifier(1),
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)),
    }
    rows = []
    for protocol, folds in splits.items():
        for fold, parts in enumerate(folds):
            learn = np.concatenate([parts["train"], parts["val"]])
            for name, classifier in classifiers.items():
                predicted = classifier.fit(pixels[learn], labels[learn]).predict(pixels[parts["test"]])
                score = balanced_accuracy_score(labels[parts["test"]], predicted)
                rows.append({"protocol": protocol, "fold": fold, "classifier": name, "balanced_accuracy": score})
    return pd.DataFrame(rows)


def _with_two(group: np.ndarray, labels: np.ndarray) -> int:
    """How many groups hold more than one label."""
    distinct = np.unique(np.stack([group, labels]), axis=1)[0]
    return int((np.unique(distinct, return_counts=True)[1] > 1).sum())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 where duplicates or groups cross the folder's splits, 2 where it cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m hdkd_lib.data.leakage", description="Duplicates in an image folder.")
    parser.add_argument("folder", type=Path, help="CLASS/*, or train/CLASS/* and test/CLASS/*; or an archive of it")
    parser.add_argument("--dataset", default="folder", help="read it as this data set, e.g. ham10000 (default: folder)")
    parser.add_argument("--out", type=Path, default=Path("duplicates.csv"), help="the table of pairs (default: %(default)s)")
    parser.add_argument("--groups", default="", help="a pattern in an image's path whose parenthesised part names its patient")
    parser.add_argument("--join-chains", action="store_true", help="keep long chains of near duplicates in one group, too")
    options = parser.parse_args(arguments)
    try:
        source: Source = with_groups(open_source(options.dataset, options.folder), options.groups)
        source, _, signatures = decode(source, 32, on_corrupt="skip")
        found = audit(signatures, source.ids, source.labels, source.classes, source.parts, join_chains=options.join_chains)
        found.pairs.to_csv(options.out, index=False)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    counts = found.summary | {"corrupt_files": source.card.get("corrupt_files", 0)}
    is_shared = False
    print(f"patients or other groups: {source.card['patients']}")
    if source.groups:
        named, side = np.asarray(source.groups), np.asarray(source.parts or [""] * len(source.groups))
        counts["groups"] = len(set(source.groups))
        for x, y in _pairs_of_parts(side):
            count = counts[f"{x}_images_with_group_in_{y}"] = int(np.isin(named[side == x], named[side == y]).sum())
            is_shared |= count > 0
    for name, count in counts.items():
        print(f"{name.replace('_', ' ')}: {count:,}")
    print(f"{len(found.pairs):,} pairs in {options.out}")
    return int(found.pairs.is_crossing.any() or is_shared)


if __name__ == "__main__":
    sys.exit(main())
