"""A trained network for use elsewhere: a folder that timm loads in one line, with ONNX and a model card beside.

    config.json, model.safetensors   timm.create_model("local-dir:FOLDER", pretrained=True), after `import hdkd_lib.models`
    model.onnx                       `images` (N, 3, S, S) float32, normalised -> `logits` (N, C), for any N
    README.md                        the model card
"""  # fmt: skip

import importlib.util
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from hdkd_lib import models, statistics, tables
from hdkd_lib.data import Data
from hdkd_lib.data.batches import Preprocess
from hdkd_lib.evaluation import evaluate
from hdkd_lib.parameters import one_sentence
from hdkd_lib.runs import Run, write_atomically

CALLS = 50  # of one image, of which the median is the latency
ONNX = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of logits: float32 sums in another order


@one_sentence
def export(run: Run, data: Data, folder: str | Path, epoch: str = "best") -> pd.DataFrame:
    """Writes the run's student to `folder`, and checks ONNX against PyTorch on test images.

    Args:
        data: what the run was trained on.
        epoch: the weights of the "best" validation epoch, of the "last", or their moving average ("ema").

    Returns:
        One row for PyTorch and one for onnxruntime: file, its size (kB), the largest difference of a logit from PyTorch's, and
        the median time of one image (ms), both with as many threads as PyTorch has here.

    Raises:
        ValueError: the data are not the run's, the extra `export` is not installed, or the logits differ.
        FileNotFoundError: the run has no weights.
    """
    if any(data.config.get(key) != of for key, of in run.config["data"].items()):
        raise ValueError(f"{run.shown_path} was trained on another data set or split; load the one in its config.json")
    if missing := [name for name in ONNX if not importlib.util.find_spec(name)]:
        raise ValueError(f"ONNX needs {', '.join(missing)}, not installed here: pip install -c constraints.txt -e '.[export]'")
    folder = Path(folder).expanduser()
    model = save(run, data, folder, epoch, onnx=True)
    images = Preprocess(model)(data.test.images[:64]).contiguous()
    to_onnx(model, folder / "model.onnx", images[:2])
    call = onnx_call(folder / "model.onnx")
    with torch.no_grad():
        expected = model(images)
        difference = (call(images) - expected).abs().max().item()
        if difference > TOLERANCE * max(1.0, expected.abs().max().item()):
            raise ValueError(f"the ONNX file gives other logits than PyTorch, by up to {difference:.2g}; do not use it")
        rows = {
            "PyTorch": ("model.safetensors", 0.0, latency(model, images[:1])),
            "onnxruntime": ("model.onnx", difference, latency(call, images[:1])),
        }
    sizes = [(folder / file).stat().st_size / 1000 for file, *_ in rows.values()]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["file", "largest difference of a logit", "ms per image"])
    table.insert(1, "kB", np.round(sizes).astype(int))
    return table


def save(run: Run, data: Data, folder: Path, epoch: str = "best", *, onnx: bool = False) -> nn.Module:
    """Writes the run's student as timm loads it, with its model card, to `folder`, and returns it in eval mode.

    Args:
        onnx: whether the card shall say how to load model.onnx, which the caller writes.

    Raises:
        FileNotFoundError: the run has no weights.
    """
    model = run.student(epoch)
    text = card(run, data, model, epoch, onnx=onnx)
    to_timm(model, folder, data.classes)
    write_atomically(folder / "README.md", lambda aside: aside.write_text(text))
    return model


def to_timm(model: nn.Module, folder: str | Path, classes: list[str]) -> None:
    """Writes config.json and model.safetensors; `classes` are the names of the outputs, in order."""
    made = models.describe(model)
    cfg = {"architecture": made.pop("name"), "tag": "", "license": "other"}
    made.pop("init", None)  # its weights come from the file
    content = {"label_names": classes, "pretrained_cfg": cfg, "model_args": made}
    save_for_hf(model, folder, model_config=content, safe_serialization=True)


def to_onnx(model: nn.Module, file: str | Path, images: Tensor) -> None:
    """Writes the network as ONNX for any number of images; `images` (2, 3, S, S) are an example."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        torch.onnx.export(
            model.eval(), (images,), str(file), dynamo=True, external_data=False, verbose=False,
            input_names=["images"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip


def onnx_call(file: str | Path) -> Callable[[Tensor], Tensor]:
    """The ONNX file as a function of images, on the CPU with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def latency(call: Callable[[Tensor], Tensor], image: Tensor) -> float:
    """Median milliseconds of one call with one image (1, 3, S, S)."""
    seconds = []
    for _ in range(CALLS + 5):
        start = time.perf_counter()
        call(image)
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds[5:]))  # the first calls allocate


def accuracy_interval(run: Run, epoch: str = "best") -> tuple[float, float, float]:
    """Accuracy on the run's test images, and its 95 % interval for other test images (Wilson 1927): low, accuracy, high.

    Images of one group (duplicates, one patient) count as one. It holds for this trained network, not for training it again.
    """
    of, split = run.predictions(epoch), run.split.set_index("id")
    accuracy = (of.predicted == of.labels).mean().item()
    low, high = statistics.wilson(accuracy, split.group.reindex(of.ids).nunique() if "group" in split else len(of.ids))
    return low, accuracy, high


def card(run: Run, data: Data, network: nn.Module, epoch: str = "best", *, onnx: bool = False) -> str:
    """The model card (Markdown): network, data, protocol, scores with an interval, licence, and what it is not for.

    The scores are of `network` alone, the run's student, as others load it: a method may predict by more than that (CSKD by its
    patch tokens, too).
    """
    method, recipe, of = run.config["method"], run.config["recipe"], data.card
    size, scores = data.config["image_size"], evaluate(network, data)
    network.cpu()
    accuracy = 100 * scores["accuracy"]
    low, high = (100 * end for end in statistics.wilson(scores["accuracy"], len(set(data.test.groups))))
    cfg, teacher = network.pretrained_cfg, method.get("teacher", {}).get("name")
    names = ", ".join(f"{name} ({count} images)" for name, count in of["classes"].items())
    counts = ", ".join(f"{run.metrics['images'][part]} {part}" for part in ("train", "val", "test"))
    drawn = data.config.get("draws")
    part = f"draw {data.config['draw']} of {drawn} disjoint training sets" if drawn else f"fold {data.config['fold']}"
    others = "; ".join(f"{words} {100 * scores[key]:.1f} %" for key, words in tables.METRICS.items() if key != "accuracy")
    chosen = f"the epoch with the best balanced accuracy on validation ({run.metrics['best']['epoch'] + 1})"
    return f"""# {method["student"]["name"]} on {of["title"]}

- **Network**: `{method["student"]["name"]}`, {run.metrics["parameters"]:,} parameters, trained by {method["name"]}\
{f" with the teacher `{teacher}`" if teacher else ""} for {recipe["epochs"]} epochs, seed {run.config["seed"]}; weights of \
{chosen if epoch == "best" else f"the {epoch} epoch"}.
- **Input**: RGB images of {size}x{size} pixels, resized without keeping their aspect, scaled to [0, 1], less the mean \
{tuple(cfg["mean"])}, over the deviation {tuple(cfg["std"])}.
- **Output**: logits of {len(data.classes)} classes, in this order: {names}.
- **Load it**: `import hdkd_lib.models, timm; timm.create_model("local-dir:FOLDER", pretrained=True)`\
{", or `model.onnx` with any ONNX runtime (input `images`, output `logits`)" if onnx else ""}.

## Data and protocol

{of["title"]}. {counts} images, protocol "{of["protocol"]}" ({part}); test images with a duplicate among \
the training images: {of["test_images_in_train"]}. Known faults: {of["known_faults"]}. Source: {of["citation"]}.

## Scores on the test images

Accuracy {accuracy:.1f} % (95 % interval for other test images of the same source: {low:.1f} to {high:.1f} %); {others}. This \
is one trained network: another seed or other training images give another score.

## Licence

Data: {of["licence"]}. Code (hdkd_lib): MIT. Whether the weights may be passed on depends on the licence of the data.

## Not for

Decisions about people, medical ones above all. Images of another source, another camera or other classes than above: the \
network answers with one of its classes for any image, and nobody has measured how well.
"""
