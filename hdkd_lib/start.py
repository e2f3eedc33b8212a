"""For 00_start_here: a small set of images, the report of one comparison of three runs, and the plan to run next."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from hdkd_lib import statistics, tables
from hdkd_lib.data import Data
from hdkd_lib.data.splits import FOLDS
from hdkd_lib.export import accuracy_interval
from hdkd_lib.runs import Run

PATTERNS = {
    "checks": lambda u, v: np.sin(u) * np.sin(v),
    "dots": lambda u, v: np.cos(u) + np.cos(v) - 0.8,
    "stripes": lambda u, v: np.sin(u),
}


def make_textures(folder: str | Path, per_class: int = 150, size: int = 64, seed: int = 0) -> Path:
    """Writes an image folder of three classes, checks, dots and stripes, as PNG files of `size` pixels.

    Colours, period, angle, place and bend are drawn at random, and noise lies over all. Two images of each class are there
    twice, so that the audit has something to find. The same arguments give the same pixels; files of these names are replaced.
    """
    folder, random = Path(folder), np.random.default_rng(seed)
    for name, pattern in PATTERNS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        images = [_texture(pattern, size, random) for _ in range(per_class - 2)]
        for i, pixels in enumerate([*images, *images[:2]]):
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
    return folder


def _texture(pattern: Callable, size: int, random: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    angle, period, (at_u, at_v) = random.uniform(0, math.pi), random.uniform(size / 6, size / 3), random.uniform(0, 9, 2)
    waves = random.uniform(-2 * math.pi, 2 * math.pi, (2, 2)) / size
    bend = 1.5 * np.sin(np.tensordot(waves, np.stack([x, y]), 1) + random.uniform(0, 2 * math.pi, (2, 1, 1)))
    u = 2 * math.pi / period * (x * math.cos(angle) + y * math.sin(angle)) + at_u + bend[0]
    v = 2 * math.pi / period * (y * math.cos(angle) - x * math.sin(angle)) + at_v + bend[1]
    colours = np.stack([random.uniform(20, 90, 3), random.uniform(140, 235, 3)])  # light on dark
    pixels = colours[(pattern(u, v) > 0).astype(int)] + random.normal(0, 45, (size, size, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def plan(runs: Mapping[str, Run], data: Data, root: str | Path, *, epochs: int, smallest: float) -> str:
    """The YAML text of the plan that decides what `report` leaves open: five folds with a seed each, and a longer training.

    Args:
        runs: "teacher", "student" and the distilled student, in this order; the last by its method's name.
        root: the image folder.
        epochs: of teacher, student and distilled student; `student_long` has as many as take the time of teacher and method.
        smallest: the smallest difference that matters, as a fraction.
    """
    method = list(runs)[-1]
    arm = method.lower()
    networks = {name: dict(run.config["method"]["student"]) for name, run in runs.items()}
    groups = f"  groups: {json.dumps(data.config['groups'])}\n" if data.config["groups"] else ""  # of a groups.csv nothing
    arms = []
    for name in ("teacher", "student"):
        options = {key: of for key, of in networks[name].items() if key not in ("name", "num_classes", "img_size")}
        arms.append(f"  {name}: {{network: {networks[name]['name']}, network_options: {json.dumps(options)}}}")
    return f"""# Does {method} help the student on the images of {data.card["title"]}? Written by 00_start_here.
questions:
  distillation:
    ask: Does {method} help the student on these images?
    contrasts:
      than no teacher: [{arm}, student]
      than training the student for the time of teacher and {method}: [{arm}, student_long]
metric: balanced_accuracy
epoch: last
smallest_difference: {smallest}
parameters:
  dataset: folder
  root: {json.dumps(str(Path(root).expanduser().resolve()))}
  image_size: {data.config["image_size"]}
{groups}  precision: float32
  recipe: {{name: nano, epochs: {epochs}}}
replicates:
{chr(10).join(f"  - {{fold: {i}, seed: {i}}}" for i in range(FOLDS))}
threads: 1
runs:
{chr(10).join(arms)}
  student_long: {{like: student, recipe: {{epochs: {_long(runs, epochs)}}}}}
  {arm}: {{like: student, method: {method}, teacher: teacher}}
"""


def _long(runs: Mapping[str, Run], epochs: int) -> int:
    """Epochs of the student without a teacher that take the time of teacher and distilled student."""
    teacher, student, distilled = (run.metrics["seconds"] for run in runs.values())
    return round(epochs * (teacher + distilled) / student)


def hours(runs: Mapping[str, Run], epochs: int) -> float:
    """Hours of one replicate of `plan` on this machine, one run at a time, by the seconds that these runs took."""
    teacher, student, distilled = (run.metrics["seconds"] / run.config["recipe"]["epochs"] for run in runs.values())
    return epochs * (2 * teacher + student + 2 * distilled) / 3600


def difference(a: Run, b: Run, epoch: str = "best") -> tuple[float, float, float]:
    """Accuracy of a - b on their common test images, and its 95 % interval for other test images: low, it, high.

    Half an image is added to each of the four counts (Agresti and Min 2005). It holds for these two trained networks.

    Raises:
        ValueError: they were tested on different images.
    """
    by_id = [of[np.argsort(of.ids)] for of in (a.predictions(epoch), b.predictions(epoch))]
    if not np.array_equal(by_id[0].ids, by_id[1].ids):
        raise ValueError(f"{a.shown_path} and {b.shown_path} were tested on different images; train both on one split")
    right = [of.predicted == of.labels for of in by_id]
    only_a, only_b, n = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum()), len(right[0]) + 2
    middle = (only_a - only_b) / n
    half = 1.959964 * math.sqrt((only_a + only_b + 1) / n - middle**2) / math.sqrt(n)
    return middle - half, (only_a - only_b) / (n - 2), middle + half


def report(runs: Mapping[str, Run], data: Data, *, epochs: int, smallest: float, sd: float) -> str:
    """One page (Markdown): what was compared, what this can and cannot say, and what it would take to decide.

    Args:
        runs, epochs, smallest: as of `plan`.
        sd: assumed standard deviation of the paired differences between replicates, as a fraction.
    """
    method, (low, by, high) = list(runs)[-1], difference(*list(runs.values())[:0:-1])
    trained, tested = len(data.train), len(data.test)
    rows = [
        "| network | accuracy on test images (95 % interval) | accuracy on its training images | seconds |",
        "|---|---|---|---|",
    ]
    weak = []
    for name, run in runs.items():
        below, accuracy, above = accuracy_interval(run)
        learned = run.metrics["last"]["train"]["accuracy"]
        scores = f"{100 * accuracy:.1f} % ({100 * below:.1f} to {100 * above:.1f}) | {100 * learned:.1f} %"
        rows.append(f"| {name}: `{run.config['method']['student']['name']}` | {scores} | {run.metrics['seconds']:.0f} |")
        weak += [name] * (learned < tables.LEARNED)
    count = statistics.replicates(sd, smallest, contrasts=2)
    found = statistics.detectable(sd * math.sqrt(1 + FOLDS * tested / trained), FOLDS, contrasts=2)
    each = hours(runs, epochs)
    unlearned = (
        f"- These networks classify fewer than {tables.LEARNED:.0%} of their own training images correctly, and have to be "
        f"trained for longer first: {', '.join(weak)}."
    )
    many = "more than 10,000" if count is None else f"{count}"
    return f"""
### What was compared

The {data.card["title"]} at {data.config["image_size"]} px: {len(data.classes)} classes, {trained} training, \
{len(data.val)} validation and {tested} test images, of which {data.card["test_images_in_train"]} have a duplicate among the \
training images. One seed, one split; validation chose the epoch.

{chr(10).join(rows)}

{method} - student without a teacher: **{100 * by:+.1f} points** of accuracy ({100 * low:+.1f} to {100 * high:+.1f} for other \
test images, with these two trained networks).

### What one run can say, and what it cannot

- It can say that images, networks and method work together here, how well these trained networks do on other images of the \
same source, and what they cost.
- It cannot say whether {method} helps. Another seed or other training images give another difference, and one run does not \
show how different; the interval above knows these two networks only. There is no verdict from one run.
{unlearned if weak else ""}

### What it would take to decide

- **Assumed**: paired differences between replicates have a standard deviation of {100 * sd:g} points. The plan's result will \
show the real one.
- **Five folds** (the plan below) then find a difference of {100 * found:.1f} points or more with 80 % power. Their training \
images overlap, which is allowed for. On this machine they take about {_time(FOLDS * each)} at {epochs} epochs, one run \
at a time.
- **A difference of {100 * smallest:g} points** needs {many} replicates whose training sets do not overlap (`draws` cuts them \
from a set that is as many times larger){"" if count is None else f", and about {_time(count * each)}"}.
"""


def _time(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
