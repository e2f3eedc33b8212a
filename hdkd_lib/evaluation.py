"""What a network says of images, and how good that is."""

import torch
from torch import Tensor, nn

from hdkd_lib import metrics
from hdkd_lib.data import Data
from hdkd_lib.data.batches import Part, Preprocess, batches
from hdkd_lib.device import autocast, resolve_device, resolve_precision
from hdkd_lib.methods import Supervised
from hdkd_lib.methods.base import Method


def check_classes(network: nn.Module, data: Data) -> None:
    """Whether network and data have equally many classes.

    Raises:
        ValueError: they do not.
    """
    if network.num_classes != len(data.classes):
        raise ValueError(
            f"the network has {network.num_classes} classes and {data.config['dataset']} has {len(data.classes)}; "
            f"create it with num_classes={len(data.classes)}"
        )


def evaluate(network: nn.Module, data: Data, part: str = "test", *, device: str = "auto", precision: str = "auto") -> dict:
    """`metrics.classification` of a network that comes from elsewhere, on the part "train", "val" or "test" of the data.

    Raises:
        ValueError: the classes of network and data differ in number.
    """
    check_classes(network, data)
    device, chosen = resolve_device(device), getattr(data, part)
    task = Supervised(student=network).to(device).train(network.training)  # `predict` leaves the mode as it was
    return metrics.classification(predict(task, chosen, precision=resolve_precision(precision, device)), chosen.labels)


@torch.inference_mode()
def predict(task: Method, part: Part, *, precision: str = "float32", batch_size: int = 256) -> Tensor:
    """Probabilities (N, C), float32 on the CPU, by the task's own prediction in eval mode, on the device the student is on."""
    device = next(task.student.parameters()).device
    prepare = Preprocess(task.student).to(device)
    was_training = task.training
    task.eval()
    with autocast(device, precision):
        logits = [task.predict(prepare(images)).float() for images, _ in batches(part, batch_size, device=device)]
    task.train(was_training)
    return torch.cat(logits).softmax(1).cpu()
