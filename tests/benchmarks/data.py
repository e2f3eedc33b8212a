"""Images per second of the data pipeline, beside the chain of HDKD's official code, on photographs of 600x450 made here.

    python tests/benchmarks/data.py [--device cuda] [--images 512] [--size 224] [--out results/benchmarks/data-cpu.json]

Prints one JSON line. `epoch` is a whole epoch without the model: order, images, augmentation, normalisation, on the device.
`official` is torchvision's ImageFolder, HDKD's transforms in its order and a DataLoader with two workers, warm from the second
epoch on. `share_of_step` compares batch and augmentation with a training step of the full HDKD pair, batch 16.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import timing
import torch
from PIL import Image
from torchvision import datasets
from torchvision import transforms as T

from hdkd_lib import data, models
from hdkd_lib.data.augment import AUGMENTATIONS
from hdkd_lib.data.batches import Part, Preprocess, batches
from hdkd_lib.data.cache import decode
from hdkd_lib.data.sources import open_source
from hdkd_lib.device import autocast, resolve_device, resolve_precision
from hdkd_lib.methods import HDKD


def photographs(folder: Path, count: int) -> None:
    """JPEGs of 600x450 in two classes: smooth colours and some noise, about as large as dermatoscopic photographs."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((600, 450), Image.Resampling.BICUBIC)) + rng.normal(0, 8, (450, 600, 1))
        path = folder / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def official_chain(size: int) -> T.Compose:
    """HDKD's training transforms [spec: omarsherif200/HDKD at f7c7dae], by torchvision."""
    return T.Compose(
        [
            T.Resize((size, size)),
            T.RandomRotation(180),
            T.RandomHorizontalFlip(),
            T.RandomVerticalFlip(),
            T.ColorJitter(brightness=0.3, contrast=0.3),
            T.RandomAdjustSharpness(2),
            T.GaussianBlur(3),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def seconds(function, device: torch.device, repeats: int = 3) -> float:
    """The best of `repeats` calls after one to warm up."""
    best = float("inf")
    for i in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i:
            best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--augment", default="hdkd", choices=AUGMENTATIONS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, size, count = resolve_device(options.device), options.size, options.images

    with tempfile.TemporaryDirectory() as folder:
        os.environ["HDKD_CACHE"] = f"{folder}/cache"
        root = Path(folder) / "photographs"
        root.mkdir()
        photographs(root, count)
        start = time.perf_counter()
        decode(open_source("folder", root), size)
        build = time.perf_counter() - start
        whole = data.load("folder", root, image_size=size)
        part = Part(whole.train.images.store[:].clone(), torch.arange(count) % 2, [], np.arange(count)).on_device(device)

        student = models.create("hdkd_student_distilled", num_classes=2, img_size=size)
        task = HDKD(student=student, teacher=models.create("hdkd_teacher", num_classes=2))
        task.to(device, memory_format=torch.channels_last).train()
        prepare = Preprocess(student, AUGMENTATIONS[options.augment]()).to(device)

        def epoch() -> None:
            for images, _ in batches(part, 16, shuffle=True, device=device):
                prepare(images)

        loader = torch.utils.data.DataLoader(
            datasets.ImageFolder(root, official_chain(size)), 16, shuffle=True, num_workers=2, persistent_workers=True,
            pin_memory=device.type == "cuda",
        )  # fmt: skip

        def official() -> None:
            for images, _ in loader:
                images.to(device, non_blocking=True)

        precision = resolve_precision("auto", device)
        optimizer = torch.optim.AdamW(student.parameters(), fused=True)
        images, labels = next(iter(batches(part, 16, device=device)))
        ready = prepare(images)

        def step() -> None:
            with autocast(device, precision):
                loss = task(ready, labels)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        ours, theirs = seconds(epoch, device), seconds(official, device, repeats=2)
        prepared, stepped = seconds(lambda: prepare(images), device, 10), seconds(step, device)
    rounded = {
        "decode_and_cache_images_per_second": count / build,
        "augmentation_images_per_second": 16 / prepared,
        "epoch_images_per_second": count / ours,
        "official_epoch_images_per_second": count / theirs,
        "speedup": theirs / ours,
        "share_of_step": ours / count * 16 / stepped,
    }
    result = {"benchmark": "data", "size": size, "augment": options.augment, "images": count, "precision": precision}
    result |= {name: float(f"{value:.4g}") for name, value in rounded.items()}
    result |= {"threads": torch.get_num_threads()}
    timing.report(result, device, options.out)


if __name__ == "__main__":
    main()
