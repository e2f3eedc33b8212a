"""Which images occur more than once, and what a split that ignores it is worth.

    python -m hdkd_lib.data.leakage FOLDER      # any image folder: prints a summary, writes the pairs as a table

Two images are *exact* duplicates if their decoded pixels are equal. They are *near* duplicates if, one aligned to the other,
they are much closer than unrelated images of the same set. The rule is OUR CHOICE and has four steps:

1. *Reference.* Images are compared by the low frequencies of a grey thumbnail (a DCT, as pHash does), without mean and
   contrast. An image's reference is its distance to the tenth nearest image of a sample, in any of eight orientations: upright,
   mirrored, turned by quarters. The images' hashes draw the sample, so that neither file order nor a random seed decides.
2. *Candidates.* Pairs that share one of their nearest images of the sample and are closer than both references, one of the two
   in any orientation or cropped by 5 or 10 %; in large sets closer still, so that each image has few unrelated candidates.
3. *Alignment.* Scale and shift in each direction, gain and offset are fitted on thumbnails of 16, 32 and 64 pixels
   (Gauss-Newton; Baker and Matthews 2004), from the crop that was found. The distance is sqrt(1 - correlation) where the two
   images overlap, without the 5 % of pixels that differ most: text may lie on them. References are scaled by what alignment
   makes of the distances of unrelated images.
4. *Decision.* The ratio of this distance to the smaller reference (Lowe 2004) is at most .245; at most 2e-4 unrelated images
   are expected within it by chance (a contrario; Desolneux, Moisan and Morel 2000). Their number grows with the size of the set
   and with ratio^d, where d is the dimension of the set, from how fast neighbours are found (as in Levina and Bickel 2004).

Photographs have many dimensions and are joined up to nearly a quarter of the usual distance; handwritten digits, which are all
alike, only if they are nearly equal. Precision and recall are in results/audits: near_duplicates.csv for generated copies in
every set at hand, known_duplicates.csv for CIFAR-10's published list (Barz and Denzler 2020). In sets of small images that are
all alike, such as digits, most copies that were resized, compressed or written on are missed. Neighbouring slices of a scan
and photographs of a lesion from nearly the same place are joined, too; other views of a scene or of a patient are not found.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.fft import dct
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from hdkd_lib.data.cache import Signatures, decode, remembered
from hdkd_lib.data.groups import with_groups
from hdkd_lib.data.sources import Source, open_source
from hdkd_lib.data.splits import RULE

LARGEST_RATIO = 0.245  # of a pair's distance to that of unrelated images
FALSE_ALARMS = 2e-4  # unrelated images that may be expected as near as a duplicate
CHAIN = 0.1  # a chain of near duplicates with more of a class is not joined (OUR CHOICE), if it is of more than ten images

_FREQUENCIES = 6  # in each direction, the constant one left out
_RANK = 10  # the neighbour in the sample that gives the reference
_FAR = 32  # the neighbour by which, with the one of half its rank, the dimension is measured
_LISTS, _LISTS_OF_CROPS = 5, 2  # nearest images of the sample by which candidates are found
_CANDIDATES = 50  # unrelated images that may be expected as near as a candidate, before alignment
_KEPT = 8  # nearest candidates of each image
_COARSE = 0.6  # of the reference: more distant pairs are not looked at more closely
_OTHER = 0.05  # of the pixels, those that differ most, do not count: text may lie on them
_FLAT = 0.5  # standard deviation, of 255, below which a thumbnail shows nothing
_BLOCK = 1024  # images or pairs at a time
_PAIRS = 1_000_000  # candidates at a time

# Transposed or not, then flipped vertically or not, then horizontally; PIL's names.
_ORIENTATIONS = np.array(
    ["", "flip_left_right", "flip_top_bottom", "rotate_180", "transpose", "rotate_270", "rotate_90", "transverse"]
)
# Scale, x and y of crops: 5 or 10 % of each side less, at the corners, in the middle of a side or of the image.
_CROPS = [(1 - share, share * x, share * y) for share in (0.05, 0.1) for y in (-1, 0, 1) for x in (-1, 0, 1)]
_INVERSE = torch.tensor([0, 1, 2, 3, 4, 6, 5, 7, *range(8, 8 + len(_CROPS))])


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
    views = _views(thumbnails)
    lists, reference, unrelated, crowd, dimension = _references(views)
    gate = min(1.0, (_CANDIDATES / crowd) ** (1 / dimension)) if crowd else 1.0
    pairs = _candidates(views, lists, gate * reference)
    distance = _aligned(thumbnails, *pairs, _COARSE * torch.minimum(*reference[pairs[:2]]) / 2**0.5)
    pairs, distance = pairs[:, distance.isfinite()], distance[distance.isfinite()]
    if unrelated.shape[1]:  # what alignment and high frequencies make of the distances of unrelated images
        reference *= (2**0.5 * _aligned(thumbnails, *unrelated) / torch.minimum(*reference[unrelated[:2]])).median()
    ratio = distance / (torch.minimum(*reference[pairs[:2]]) / 2**0.5)
    # Rounded, so that no machine's arithmetic decides.
    ratio, distance = (values.numpy().astype(float).round(3) for values in (ratio, distance))
    is_near = (ratio <= LARGEST_RATIO) & (crowd * ratio**dimension <= FALSE_ALARMS)
    (a, b), view = first[pairs[:2, is_near].numpy()], pairs[2, is_near]
    view = torch.where(view < 8, view, 0)  # crops are upright
    view = torch.where(torch.from_numpy(a < b), view, _INVERSE[view])
    columns = {"a": np.minimum(a, b), "b": np.maximum(a, b), "distance": distance[is_near], "ratio": ratio[is_near]}
    columns["orientation"] = _ORIENTATIONS[view.numpy()]
    order = np.lexsort((columns["b"], columns["a"]))
    return {name: column[order] for name, column in columns.items()}


def _views(thumbnails: Tensor) -> Tensor:
    """(V, N, D) low frequencies of the images in eight orientations, then of their crops, of length 1."""
    count, size = thumbnails.shape[:2]
    views = torch.empty(len(_INVERSE), count, _FREQUENCIES**2 - 1)
    sign = (-1) ** torch.arange(_FREQUENCIES).float()  # of a mirrored cosine
    for start in range(0, count, _BLOCK):
        images = thumbnails[start : start + _BLOCK].float()
        low = _low(images)
        turned = [low * y * x for low in (low, low.mT) for y in (1, sign[:, None]) for x in (1, sign)]
        block = torch.stack(turned + [_low(images, *crop) for crop in _CROPS]).flatten(2)[..., 1:]
        length = block.norm(dim=2, keepdim=True)
        views[:, start : start + _BLOCK] = block * (length > size * _FLAT) / length.clamp(min=1)  # nothing is like a flat image
    return views


def _low(images: Tensor, scale: float = 1.0, x: float = 0.0, y: float = 0.0) -> Tensor:
    """(N, F, F) low frequencies of the images at scale * place + (x, y)."""
    size = images.shape[-1]
    frequencies = torch.from_numpy(dct(np.eye(size), axis=0, norm="ortho")[:_FREQUENCIES]).float()
    across, down = (frequencies @ _interpolation(scale * _places(size) + shift, size) for shift in (x, y))
    return down @ images @ across.mT


def _references(views: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, float, float]:
    """What the sample, the first M of N images, tells of each.

    Returns:
        (N, L) numbers of the nearest images of the sample and the (L,) views in which an image is near them; (N,) references;
        (3, K) pairs at such a distance, as `_candidates` gives them; the crowd, how many of all images are expected within the
        reference; and the dimension of the set, with which this number falls: crowd * ratio^dimension.
    """
    count = views.shape[1]
    size = min(count, max(1024, int(4 * count**0.5)))
    sample = views[:8, :size].flatten(0, 1)
    listed, listed_of_crops = min(_LISTS, size), min(_LISTS_OF_CROPS, size)
    lists, nearest, unrelated = [], [], torch.empty(3, 0, dtype=torch.long)
    for start in range(0, count, _BLOCK):
        likeness = (views[0, start : start + _BLOCK] @ sample.T).unflatten(1, (8, size))
        cropped = views[8:, start : start + _BLOCK] @ views[0, :size].T
        found = likeness.topk(listed, dim=2), cropped.transpose(0, 1).topk(listed_of_crops, dim=2)
        lists.append(torch.cat([each.indices.int().flatten(1) for each in found], 1))
        own = torch.arange(min(start, size), min(start + _BLOCK, size))
        likeness[own - start, :, own] = -1
        likeness, view = likeness.max(1)
        near = likeness.topk(min(_FAR, size - 1), dim=1)
        nearest.append(near.values)
        if start == 0 and size > _RANK:
            unrelated = torch.stack([other := near.indices[own, _RANK - 1], own, view[own, other]])
    shown = torch.cat([_INVERSE[:8].repeat_interleave(listed), _INVERSE[8:].repeat_interleave(listed_of_crops)])
    lists = torch.cat(lists), shown
    distance = (2 - 2 * torch.cat(nearest)).clamp(min=1e-6).sqrt()
    if size <= _RANK:  # too few to know: unrelated images are taken for uncorrelated
        return lists, torch.full((count,), 2**0.5), unrelated, 0.0, 1.0
    if size <= _FAR:
        return lists, distance[:, _RANK - 1], unrelated, 0.0, 1.0
    # Twice the neighbours are 2^(1/d) times as far; the nearest, which may be duplicates, do not count.
    dimension = np.log(2) / max(float((distance[:, -1] / distance[:, _FAR // 2 - 1]).log().median()), 1e-2)
    return lists, distance[:, _RANK - 1], unrelated, count / size * _RANK, dimension


def _candidates(views: Tensor, lists: tuple[Tensor, Tensor], gate: Tensor) -> Tensor:
    """(3, P) pairs of images: the first, turned by the view, is near the second, or is near the view, a crop, of the second."""
    lists, shown = lists
    upright_lists, order, ends = lists[:, shown == 0], [], []
    for near in (upright_lists, lists):
        flat, index = near.flatten().sort(stable=True)
        order.append(index)
        ends.append(torch.searchsorted(flat, torch.arange(int(lists.max()) + 2, dtype=flat.dtype)).tolist())
    least = 1 - gate**2 / 2  # likeness
    found, count, kept = [], 0, 0
    for i in range(len(ends[0]) - 1):
        upright = order[0][ends[0][i] : ends[0][i + 1]] // upright_lists.shape[1]
        other = order[1][ends[1][i] : ends[1][i + 1]]
        image, view = other // len(shown), shown[other % len(shown)]
        likeness = views[view, image] @ views[0, upright].T
        is_near = likeness >= torch.maximum(least[image][:, None], least[upright])
        a, b = (is_near & (image[:, None] != upright)).nonzero(as_tuple=True)
        pair, view = torch.stack([image[a], upright[b]]), view[a]
        is_ordered = (pair[0] < pair[1]) & (view < 8)  # of a crop the whole image is second
        pair, view = torch.where(is_ordered, pair, pair.flip(0)), torch.where(is_ordered, view, _INVERSE[view])
        distance = (1e4 * (2 - 2 * likeness[a, b]).clamp(min=0).sqrt()).round().long()
        found.append(torch.cat([pair, torch.stack([view, distance])]).int())
        count += len(a)
        if count > 2 * kept + _PAIRS:  # few are kept; memory stays small
            found = [_nearest(torch.cat(found, 1))]
            count = kept = found[0].shape[1]
    return _nearest(torch.cat(found, 1))[:3].long()


def _nearest(pairs: Tensor) -> Tensor:
    """Of (4, P) pairs with view and distance each once, in its nearest view, if near enough to be kept for either image."""
    table = pd.DataFrame(pairs.T.numpy(), columns=["moving", "fixed", "view", "distance"])
    table = table.assign(a=table[["moving", "fixed"]].min(axis=1), b=table[["moving", "fixed"]].max(axis=1))
    table = table.sort_values(["distance", "a", "b", "view", "moving"]).drop_duplicates(["a", "b"])
    ranks = [table.groupby(side).cumcount() for side in "ab"]
    return torch.from_numpy(table[np.minimum(*ranks) < _KEPT].to_numpy()[:, :4].T.copy())


def _aligned(thumbnails: Tensor, moving: Tensor, fixed: Tensor, view: Tensor, limit: Tensor | None = None) -> Tensor:
    """(P,) distances of the first images, turned and aligned to the second, from those; infinite where not within (P,) limits.

    They are fitted at 16, at 32 and at 64 pixels, each time those only that were within their limit before.
    """
    crops = torch.tensor([(1.0, 0.0, 0.0)] * 8 + _CROPS)[view]
    scale, shift = 1 / crops[:, :1].expand(-1, 2), -crops[:, 1:] / crops[:, :1]  # of a whole image that becomes its crop
    limit = torch.full(view.shape, torch.inf) if limit is None else limit
    near, distance = torch.arange(len(view)), torch.full(view.shape, torch.inf)
    for factor, steps in ((4, 4), (2, 1), (1, 1)):
        used = torch.cat([moving[near], fixed[near]]).unique()  # an image is in many pairs
        if not len(used):
            return distance
        parts = used.split(_BLOCK)
        pooled = torch.cat([_blur(_blur(F.avg_pool2d(thumbnails[part].float(), factor))).half() for part in parts])
        found = []
        for chosen in near.split(_BLOCK):
            images, target = (pooled[torch.searchsorted(used, side[chosen])].float() for side in (moving, fixed))
            turn = torch.where(view[chosen] < 8, view[chosen], 0)[:, None, None]
            images = torch.where(turn >= 4, images.mT, images)
            images = torch.where(turn // 2 % 2 == 1, images.flip(1), images)
            images = torch.where(turn % 2 == 1, images.flip(2), images)
            found.append(_fitted(images, target, scale[chosen], shift[chosen], steps))
        fitted, scale[near], shift[near] = (torch.cat(each) for each in zip(*found, strict=True))
        near, fitted = near[fitted <= limit[near]], fitted[fitted <= limit[near]]
    distance[near] = fitted
    return distance


def _fitted(moving: Tensor, fixed: Tensor, scale: Tensor, shift: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(P,) sqrt(1 - correlation) of (P, S, S) images where they overlap, once scale and shift (P, 2) are fitted, and those.

    The pixels that differ most, 5 %, do not count: text may lie on one of the images.
    """
    place = _places(moving.shape[-1])
    for _ in range(steps):
        warped, inside = _warp(moving, scale, shift)
        slope_y, slope_x = torch.gradient(warped, spacing=2 / len(place), dim=(1, 2))
        slope_x, slope_y = slope_x / scale[:, 0, None, None], slope_y / scale[:, 1, None, None]
        terms = [slope_x * place, slope_y * place[:, None], slope_x, slope_y, warped, torch.ones_like(warped)]
        terms = (torch.stack(terms, 1) * inside[:, None]).flatten(2)
        square = terms @ terms.mT
        ridge = 1e-4 * square.diagonal(dim1=1, dim2=2).mean(1) + 1e-3
        square = square + ridge[:, None, None] * torch.eye(6)
        solved = torch.linalg.solve(square, terms @ fixed.flatten(1)[:, :, None])[:, :, 0]
        step = (solved[:, :4] / solved[:, 4:5].clamp(min=0.2)).clamp(-0.15, 0.15)
        scale, shift = (scale + step[:, :2]).clamp(0.75, 4 / 3), (shift + step[:, 2:]).clamp(-0.3, 0.3)
    warped, inside = _warp(moving, scale, shift)
    both, inside = torch.stack([warped, fixed]).flatten(2), inside.flatten(1)
    difference = _standardised(both, inside).diff(dim=0)[0].abs()
    largest = difference.kthvalue(int((1 - _OTHER) * difference.shape[1]), dim=1, keepdim=True).values
    correlation = _standardised(both, inside * (difference <= largest)).prod(0).sum(1)
    return (1 - correlation).clamp(min=0).sqrt(), scale, shift


def _standardised(images: Tensor, inside: Tensor) -> Tensor:
    """(2, P, S * S) images without their mean, of length 1, 0 outside."""
    images = (images - (images * inside).sum(2, keepdim=True) / inside.sum(1, keepdim=True)) * inside
    return images / images.norm(dim=2, keepdim=True).clamp(min=1)


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


def _interpolation(place: Tensor, size: int) -> Tensor:
    """(..., S) weights of S pixels at (...) places from -1 to 1, linear."""
    pixel = (place + 1) * size / 2 - 0.5
    return (1 - (pixel.clamp(0, size - 1)[..., None] - torch.arange(size)).abs()).clamp(min=0)


def _warp(images: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Each image at scale * place + shift, by linear interpolation, and (P, S, S) where that is inside of it."""
    size = images.shape[-1]
    place = scale[:, :, None] * _places(size) + shift[:, :, None]  # (P, 2, S)
    inside = (place.abs() < 1 + 0.02 / size).float()
    weights = _interpolation(place, size)
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

    pixels = F.adaptive_avg_pool2d(torch.from_numpy(signatures.thumbnails).float(), 16).flatten(1).numpy()
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
