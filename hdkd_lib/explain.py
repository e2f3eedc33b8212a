"""What trained networks look at: attention of transformer tokens, Grad-CAM of convolutional stages."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hdkd_lib.models.dearkd import ConvAttention


class _RecordAttention(TorchFunctionMode):
    """Computes softmax(q k^T / sqrt(d)) beside every fused attention, which does not keep it."""

    def __init__(self):
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            query, key = args[:2]
            mask = (kwargs or {}).get("attn_mask")
            scores = query.float() @ key.float().transpose(-2, -1) * query.shape[-1] ** -0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
            self.maps.append(scores.softmax(-1))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards for every module the mode it had."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, is_training in modes.items():
            module.training = is_training


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Attention (B, heads, N, N) of every block of a transformer with fused attention: rows are queries and sum to 1.

    In blocks of DearKD's `ConvAttention`, content and position together.

    Args:
        images: (B, C, H, W) in the model's normalisation.

    Raises:
        ValueError: the model has no fused attention (`torch.nn.functional.scaled_dot_product_attention`).
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        record = stack.enter_context(_RecordAttention())

        def add_position(attention: ConvAttention, *_) -> None:
            record.maps[-1] = attention.mix(record.maps[-1])

        for module in model.modules():
            if isinstance(module, ConvAttention):
                stack.callback(module.register_forward_hook(add_position).remove)
        model(images)
    if not record.maps:
        raise ValueError(f"{type(model).__name__} has no fused attention to look at; take a vision transformer of timm's")
    return record.maps


def token_attention(model: nn.Module, images: Tensor, token: int = 0, block: int = -1) -> Tensor:
    """Where a prefix token looks, mean over heads: (B, h, w) over the patch grid, each summing to 1.

    Args:
        token: 0 is the class token, 1 the distillation token of networks that have one.

    Raises:
        ValueError: the model has no such prefix token.
    """
    prefix = getattr(model, "num_prefix_tokens", 0)
    if not 0 <= token < prefix:
        raise ValueError(f"{type(model).__name__} has {prefix} prefix tokens (asked for token {token}, counted from 0)")
    attention = attention_maps(model, images)[block][:, :, token, prefix:].mean(1)
    attention = attention / attention.sum(1, keepdim=True)
    return attention.unflatten(1, model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:])))


@torch.no_grad()
def position_kernels(model: nn.Module) -> list[Tensor]:
    """What every DearKD `ConvAttention` attends to by position alone, from the middle of its grid: (heads, h, w) per block."""
    kernels = []
    for attention in (module for module in model.modules() if isinstance(module, ConvAttention)):
        h, w = attention.grid
        kernels.append(attention.position_attention()[:, h // 2 * w + w // 2].unflatten(1, (h, w)))
    return kernels


def attention_distance(model: nn.Module, images: Tensor) -> Tensor:
    """Mean distance in pixels between a patch and what it looks at, per block and head: (blocks, heads).

    Raghu et al. 2021 (arXiv 2108.08810): the attention among patch tokens, each query's summing to 1, times the distance of
    the patches' centres, mean over queries and images.
    """
    height, width = images.shape[-2:]
    rows, columns = model.patch_embed.dynamic_feat_size((height, width))
    y, x = torch.meshgrid(torch.arange(rows) * height / rows, torch.arange(columns) * width / columns, indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], 1).to(images.device)
    distance, prefix = torch.cdist(places, places), model.num_prefix_tokens
    means = []
    for attention in attention_maps(model, images):
        among = attention[..., prefix:, prefix:]
        means.append((among / among.sum(-1, keepdim=True) * distance).sum(-1).mean((0, 2)))
    return torch.stack(means).cpu()


def grad_cam(model: nn.Module, images: Tensor, layer: str, classes: Tensor | None = None) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) at the size of the images: (B, H, W) in [0, 1], on the CPU.

    Args:
        images: (B, C, H, W) in the model's normalisation.
        layer: name of a submodule that gives maps (B, C', h, w), such as "stages.2".
        classes: (B,) the classes to explain; None: those that the model predicts.

    Raises:
        ValueError: the model has no such class.
        AttributeError: the model has no such layer.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    target_layer = model.get_submodule(layer)
    if classes is not None and not 0 <= int(classes.min()) <= int(classes.max()) < model.num_classes:
        raise ValueError(f"the model has {model.num_classes} classes (asked for {sorted(set(classes.tolist()))})")
    targets = None if classes is None else [ClassifierOutputTarget(int(label)) for label in classes]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    try:
        model.requires_grad_(True)  # a frozen teacher has no gradients to look at
        with _evaluating(model), GradCAM(model, [target_layer]) as cam:
            return torch.from_numpy(cam(images, targets))
    finally:
        model.zero_grad()
        for parameter, requires_grad in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(requires_grad)
