"""What the tests share: temporary folders in place of the user's, small images, nano networks, the official code's values."""

import os

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
os.environ["MPLBACKEND"] = "Agg"

import json
import zlib
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import settings
from torch import nn

from hdkd_lib import data, models
from hdkd_lib.data.batches import Part
from hdkd_lib.methods import HDKD
from hdkd_lib.models.official import convert_official_state_dict
from hdkd_lib.recipes import Recipe
from hdkd_lib.training import fit

torch.set_num_threads(1)  # results do not depend on the machine, and xdist runs one worker per core
settings.register_profile("hdkd", deadline=None, database=None, max_examples=50)
settings.load_profile("hdkd")


@pytest.fixture(scope="session", autouse=True)
def temporary_folders(tmp_path_factory):
    """No test reads or writes the user's cache, results or data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HDKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HDKD_RESULTS", str(tmp_path_factory.mktemp("results")))
        patch.delenv("HDKD_DATA", raising=False)
        yield


def first(part: Part, count: int) -> Part:
    return Part(part.images[:count], part.labels[:count], part.ids[:count], part.groups[:count])


@pytest.fixture(scope="session")
def digits(temporary_folders) -> data.Data:
    """120 training, 60 validation and 60 test images of 16 px, ten classes in each."""
    full = data.load("digits", image_size=16)
    return replace(full, train=first(full.train, 120), val=first(full.val, 60), test=first(full.test, 60))


@pytest.fixture(scope="session")
def build():
    """`build(name, seed=0, **arguments)`: a network for digits of 16 px; the same seed gives the same weights."""

    def build(name: str = "hdkd_student_distilled_nano", seed: int = 0, **arguments) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {"img_size": 16} if name.startswith("hdkd") else {}
        return models.create(name, **({"num_classes": 10} | sizes | arguments))

    return build


@pytest.fixture(scope="session")
def batch():
    """Eight normalised images of 16 px and their labels."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 16, 16, generator=random), torch.randint(10, (8,), generator=random)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Three epochs of eight steps; augmentation on, since it draws random numbers."""
    return Recipe(epochs=3, batch_size=16, optimizer="adamw", lr=2e-3, weight_decay=0.05, schedule="cosine", min_lr=1e-5)


@pytest.fixture(scope="session")
def make_task(build):
    """`make_task(seed)`: HDKD on nano networks; the teacher is always the same."""
    return lambda seed=0: HDKD(student=build(seed=seed), teacher=build("hdkd_teacher_nano", seed=7))


@pytest.fixture(scope="session")
def finished_run(make_task, digits, recipe, tmp_path_factory):
    """HDKD trained on digits without an interruption."""
    run_dir = tmp_path_factory.mktemp("runs") / "hdkd-seed0"
    return fit(make_task(), digits, recipe, run_dir, device="cpu", precision="float32", force=True)  # an untrained teacher


@pytest.fixture(scope="session")
def golden() -> dict:
    """Outputs, losses and gradient norms of the official networks (omarsherif200/HDKD at f7c7dae), shapes of their entries."""
    return json.loads((Path(__file__).parent / "golden" / "hdkd.json").read_text())


@pytest.fixture(scope="session")
def official_weights(golden):
    """`official_weights(net)`: the state dict that the golden values belong to, each entry a function of its name."""

    def entry(net: str, name: str, shape: list[int]) -> torch.Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.tensor(0)
        random = torch.Generator().manual_seed(zlib.crc32(f"{net}/{name}".encode()))
        r = torch.randn(shape, generator=random, dtype=torch.float64)
        if name.endswith("running_var"):
            return 1 + 0.2 * r.abs()
        if len(shape) == 1:
            return 1 + 0.1 * r if name.endswith("weight") else 0.1 * r
        return r / r[0].numel() ** 0.5 if name.endswith("weight") else 0.5 * r

    return lambda net: {name: entry(net, name, shape) for name, shape in golden["shapes"][net].items()}


@pytest.fixture(scope="session")
def golden_network(official_weights):
    """`golden_network(net)`: ours with the official weights, in float64."""
    names = {"teacher": "hdkd_teacher", "student": "hdkd_student", "distilled": "hdkd_student_distilled"}

    def golden_network(net: str) -> nn.Module:
        network = models.create(names[net], num_classes=7).double()
        network.load_state_dict(convert_official_state_dict(official_weights(net)))
        return network

    return golden_network


@pytest.fixture(scope="session")
def golden_images() -> torch.Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(zlib.crc32(b"images")), dtype=torch.float64)


@pytest.fixture
def frame() -> pd.DataFrame:
    """What `runs.load` gives of a plan, by hand: a teacher once, student and HDKD on three seeds in other orders."""
    table = pd.DataFrame(
        {
            "run": ["teacher", *["student"] * 3, *["hdkd"] * 3],
            "method": [*["Supervised"] * 4, *["HDKD"] * 3],
            "seed": [0, 0, 1, 2, 2, 0, 1],
            "balanced_accuracy": [0.95, 0.70, 0.80, 0.90, 0.91, 0.72, 0.83],
        }
    )
    same = {"dataset": "digits", "image_size": 16, "protocol": "grouped", "fold": 0, "fraction": 1.0, "epochs": 3, "epoch": 2}
    same |= {
        "parameters": 1234567,
        "seconds": 1.0,
        "images_per_second": 360.0,
        "precision": "float32",
        "device": "a CPU",
        "selection": "validation",
    }
    scores = dict.fromkeys(("accuracy", "macro_f1", "macro_auroc"), table.balanced_accuracy)
    own = {
        "arm": table.run,
        "replicate": "seed " + table.seed.astype(str),
        "path": "/results/" + table.run,
        "student": "hdkd_" + table.run,
    }
    last = {
        f"last_{metric}": table.balanced_accuracy for metric in ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc")
    }
    return table.assign(**own, **same, **scores, **last, ece=0.125, nll=1.0, last_ece=0.125)
