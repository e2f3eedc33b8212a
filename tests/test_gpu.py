"""On a GPU: `fit` on a device that is not there (fake_cuda) mixes no devices, and a step waits for nothing."""

from dataclasses import dataclass, replace

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda, Wait
from packaging.version import Version
from torch import nn
from torch.testing import assert_close

from hdkd_lib import evaluation, training
from hdkd_lib.data.augment import AUGMENTATIONS, Augmentation
from hdkd_lib.data.batches import Part
from hdkd_lib.evaluation import predict
from hdkd_lib.inversion import Inversion, invert
from hdkd_lib.methods import CSKD, HDKD, NAMES, DearKD, DeiT, LocalityGuidance, Supervised
from hdkd_lib.recipes import Recipe

pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.15"), reason="fake tensors ask for a CUDA driver before torch 2.15"
)
WAITS_AN_EPOCH = 1  # for the totals of its terms


@dataclass(frozen=True)
class Epoch:
    """What the host waited for during `train_epoch`: in steps, and before the first or after the last of them."""

    in_steps: list[Wait]
    outside: list[Wait]


@pytest.fixture
def train(digits, tmp_path, monkeypatch):
    """`train(task, precision="bf16", **recipe)`: epochs of eight images by `fit` on the fake device, without evaluation."""
    parts = {name: getattr(digits, name) for name in ("train", "val", "test")}
    small = replace(
        digits, **{name: Part(of.images[:8], of.labels[:8], of.ids[:8], of.groups[:8]) for name, of in parts.items()}
    )
    train_epoch, gpu, epochs = training.train_epoch, FakeCuda(), []

    def watched(*args, **options) -> dict:
        begin, waits, copies = (len(of) for of in (gpu.operations, gpu.waits, gpu.blocking_copies))
        row = train_epoch(*args, **options)
        end = max(i for i in range(begin, len(gpu.operations)) if gpu.operations[i].name == "aten::_fused_adamw_")
        in_steps = [w for w in gpu.waits[waits:] + gpu.blocking_copies[copies:] if begin < w.launched <= end]
        epochs.append(Epoch(in_steps, [w for w in gpu.waits[waits:] if w not in in_steps]))
        return row

    monkeypatch.setattr(training, "train_epoch", watched)
    for module in (training, evaluation):
        monkeypatch.setattr(module, "predict", lambda task, part, **_: torch.full((len(part), 10), 0.1))

    def train(task, precision: str = "bf16", cache_on_device: bool = True, **recipe) -> list[Epoch]:
        recipe = Recipe(**({"epochs": 1, "batch_size": 4, "optimizer": "adamw", "lr": 1e-3, "augment": "none"} | recipe))
        execution = {"device": "cuda", "cache_on_device": cache_on_device, "force": True}  # an untrained teacher
        with gpu:
            training.fit(task, small, recipe, tmp_path / "run", precision=precision, **execution)
        return epochs

    train.gpu, train.validation = gpu, small.val
    return train


def vit(build, **arguments) -> nn.Module:
    return build("deit_tiny_distilled_patch16_224", img_size=16, patch_size=4, depth=2, embed_dim=64, num_heads=2, **arguments)


TASKS = {
    "HDKD": lambda build: HDKD(student=build(), teacher=build("hdkd_teacher_nano")),
    "CSKD": lambda build: CSKD(student=vit(build), teacher=build("resnet10t", output_stride=8)),
    "DearKD": lambda build: DearKD(
        student=build("dearkd_tiny_patch16_224", img_size=16, patch_size=4, depth=2, embed_dim=64, num_heads=2, conv_blocks=1),
        teacher=build("resnet10t"), taps={0: 4, 1: 8}, distill_until=0.5,
    ),
    "DeiT": lambda build: DeiT(student=vit(build), teacher=build("resnet10t")),
    "LocalityGuidance": lambda build: LocalityGuidance(student=vit(build), teacher=build("resnet10t"), taps={0: 4, 1: 8}),
    "Supervised": lambda build: Supervised(student=build("hdkd_teacher_nano")),
}  # fmt: skip
CASES = [  # every method, augmentation and precision, mixup with labels of both forms, and a second stage
    ("HDKD", {"augment": "hdkd", "ema": 0.9}),
    ("HDKD", {"precision": "float32", "augment": "deit"}),
    ("CSKD", {"augment": "deit", "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}),
    ("DearKD", {"augment": "flip_shift", "epochs": 2}),
    ("DeiT", {"precision": "float32", "augment": "hdkd", "mixup": 0.8}),
    ("LocalityGuidance", {"augment": "flip_shift", "imbalance": "class_weights"}),
    ("Supervised", {"augment": "deit", "imbalance": "balanced_sampler"}),
]


def test_every_method_and_augmentation_is_tried():
    assert {name for name, _ in CASES} == set(TASKS) == set(NAMES)
    assert {options["augment"] for _, options in CASES} | {"none"} == set(AUGMENTATIONS)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_step_waits_for_nothing(name, options, build, train):
    task = TASKS[name](build)
    epochs = train(task, **options)
    assert len(epochs) == options.get("epochs", 1)
    for epoch in epochs:
        assert not epoch.in_steps, "; ".join(map(str, epoch.in_steps))
        assert 1 <= len(epoch.outside) <= WAITS_AN_EPOCH
    before = len(train.gpu.waits)
    with train.gpu:
        probabilities = predict(task, train.validation, precision=options.get("precision", "bf16"), batch_size=4)
    assert probabilities.shape == (8, 10)
    assert len(train.gpu.waits) == before + 1  # for all batches


def test_images_outside_of_the_devices_memory_are_read_without_a_wait(build, train):
    [epoch] = train(Supervised(student=build("hdkd_teacher_nano")), cache_on_device=False)
    assert not epoch.in_steps


class Faulty(Supervised):
    """`fault(self, images, target)` is done in every forward pass."""

    fault = None

    def forward(self, images, target):
        self.fault(images, target)
        return super().forward(images, target)


WAITS = {
    "an index by a mask": lambda task, images, target: images[target > 2],
    "an assignment by a mask": lambda task, images, target: target.clone().__setitem__(target > 2, target),
    "masked_select": lambda task, images, target: images.masked_select(images > 0),
    "nonzero": lambda task, images, target: target.nonzero(),
    "where": lambda task, images, target: torch.where(target > 2),
    "item": lambda task, images, target: images.mean().item(),
    "tolist": lambda task, images, target: target.tolist(),
    "cpu": lambda task, images, target: images.cpu(),
    "to": lambda task, images, target: images.to("cpu"),
    "copy_": lambda task, images, target: torch.empty(target.shape, dtype=torch.long).copy_(target),
    "if": lambda task, images, target: 1 if (images > 0).all() else 0,
    "float": lambda task, images, target: float(images.sum()),
    "equal": lambda task, images, target: torch.equal(images, images),
    "a new tensor": lambda task, images, target: torch.tensor([1.0, 2.0], device=images.device),
    "a copy from the host": lambda task, images, target: torch.ones(3).to(images.device),
    "an index on the host": lambda task, images, target: images[torch.tensor([0, 1])],
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_in_a_step_is_found(name, build, train, monkeypatch):
    monkeypatch.setattr(Faulty, "fault", WAITS[name])
    [epoch] = train(Faulty(student=build("resnet10t")), batch_size=8)
    assert len(epoch.in_steps) >= 1
    assert {wait.line.split(":")[0] for wait in epoch.in_steps} == {"tests/test_gpu.py"}


MIXED = {
    "a tensor": lambda task, images, target: images + torch.ones(3, 1, 1),
    "a module": lambda task, images, target: nn.Linear(16, 16)(images),
    "a mask": lambda task, images, target: images.masked_fill(torch.ones(16, dtype=torch.bool), 0.0),
    "a table": lambda task, images, target: torch.ones(10)[target],
    "a target": lambda task, images, target: nn.functional.cross_entropy(task.student(images), target.cpu()),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_devices_are_refused(name, build, train, monkeypatch):
    monkeypatch.setattr(Faulty, "fault", MIXED[name])
    with pytest.raises(RuntimeError, match=r"mixes cuda and cpu at tests/test_gpu\.py"):
        train(Faulty(student=build("resnet10t")))


def test_a_number_on_the_host_may_meet_the_device(build, train, monkeypatch):
    monkeypatch.setattr(Faulty, "fault", lambda task, images, target: images.clone().__setitem__(images > torch.tensor(2), 0.0))
    [epoch] = train(Faulty(student=build("resnet10t")))
    assert not epoch.in_steps


def test_a_buffer_that_stays_on_the_host_is_refused(build, train):
    task = Supervised(student=build("resnet10t"))
    norm = next(module for module in task.modules() if isinstance(module, nn.BatchNorm2d))
    norm._buffers["running_mean"], kept = None, norm.running_mean
    norm.__dict__["running_mean"] = kept
    with pytest.raises(RuntimeError, match="mixes cuda and cpu"):
        train(task)


@pytest.mark.parametrize(
    ("apply", "found"),
    [
        (lambda images: images.float() * torch.ones(3, 1, 1), "mixes cuda and cpu"),
        (lambda images: images.float() / images.max().item(), "_local_scalar_dense"),
    ],
)
def test_a_fault_in_an_augmentation_is_found(apply, found, build, train, monkeypatch):
    faulty = type("Faulty", (Augmentation,), {"apply": lambda self, images, drawn: apply(images)})
    monkeypatch.setitem(AUGMENTATIONS, "none", faulty)
    try:
        [epoch] = train(Supervised(student=build("resnet10t")))
        report = "; ".join(map(str, epoch.in_steps))
    except RuntimeError as error:
        report = str(error)
    assert found in report
    assert "tests/test_gpu.py" in report


@pytest.mark.parametrize(
    ("precision", "changes"),
    [("float32", {"competition": 1.0}), ("bf16", {"grey": True, "flip": True, "jitter": 2, "l2": 1e-5})],
)
def test_an_iteration_of_inversion_waits_for_nothing(precision, changes, build):
    """As many waits and blocking copies whatever the number of iterations."""
    waits = []
    labels = torch.arange(2).repeat_interleave(4)
    for count in (1, 3):
        settings = Inversion(batch_size=8, lr=0.1, stages=((0.5, count), (1.0, count)), tv=1e-2, **changes)
        student = vit(build) if settings.competition else None
        with FakeCuda() as gpu:
            teacher = build("resnet10t").to("cuda")
            student = student and student.to("cuda")
            images, report = invert(teacher, labels, 16, settings, student=student, precision=precision)
        assert images.shape == (8, 3, 16, 16)
        assert "loss" in report
        waits.append((len(gpu.waits), len(gpu.blocking_copies)))
    assert waits[0] == waits[1]


def test_counts_of_a_product_are_those_by_hand():
    with FakeCuda() as gpu:
        a, b = torch.ones(64, 32, device="cuda"), torch.ones(32, 16, device="cuda")
        counts = gpu.count(lambda: (a @ b).relu_().t())
    product, relu = gpu.operations[-2:]
    assert (product.flops, product.bytes) == (2 * 64 * 32 * 16, 4 * (64 * 32 + 32 * 16 + 64 * 16))
    assert (relu.flops, relu.bytes) == (0, 4 * 2 * 64 * 16)
    assert (counts.kernels, counts.flops, counts.bytes) == (2, product.flops, product.bytes + relu.bytes)
    assert counts.seconds == pytest.approx((product.bytes + relu.bytes) / 3.35e12)
    assert product.line.startswith("tests/test_gpu.py:")


def test_a_backward_pass_of_a_grouped_convolution_counts_twice_its_forward_pass():
    with FakeCuda() as gpu:
        x = torch.ones(2, 8, 6, 6, device="cuda", requires_grad=True)
        out = nn.Conv2d(8, 8, 3, groups=4, bias=False, device="cuda")(x)
        forward, backward = gpu.operations[-1], gpu.count(out.sum().backward)
    assert forward.flops == 2 * (2 * 8 * 4 * 4) * (2 * 3 * 3)  # outputs times what each is a sum of
    assert backward.flops == 2 * forward.flops


def test_gradients_are_passed_on_as_by_torch(build, batch):
    """The backward pass of the fake device, which torch's engine cannot run, with real values."""
    images, labels = batch
    task = TASKS["DearKD"](build).eval()
    loss = task(images, labels)["loss"]
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    given = fake_cuda.run_backward([loss], [torch.ones(())], False, False, parameters, accumulate_grad=False)
    for ours, theirs in zip(given, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, theirs)


def test_a_teacher_that_stops_leaves_the_device_with_a_wait_for_each_type_of_number(build, train):
    task = TASKS["DearKD"](build)
    train(task, epochs=2)
    tensors = [*task.teacher.parameters(), *task.teacher.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    moving = [wait for wait in train.gpu.waits if "teacher.py" in str(wait)]
    assert len(moving) == len({tensor.dtype for tensor in tensors}) == 2
