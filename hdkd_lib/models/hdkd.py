"""HDKD's networks: a convolutional teacher, and a hybrid student that shares its three stages and ends in a transformer.

EL-Assiouti et al., "HDKD: Hybrid Data-Efficient Knowledge Distillation Network for Medical Image Classification", 2024
(arXiv 2407.07516). Widths, depths and initialisation (PyTorch's defaults; tokens and positions of unit variance) are those of
the official code (omarsherif200/HDKD at f7c7dae). The `_nano` networks, for CPUs and tests, are OUR CHOICE.

All are timm models: `timm.create_model("hdkd_student_distilled", num_classes=7, img_size=64)`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from hdkd_lib.models.mbcsa import conv_stage


def _check_size(network: str, img_size: int | tuple[int, int], stem_stride: int) -> tuple[int, int]:
    if stem_stride not in (1, 2, 4):
        raise ValueError(f"stem_stride must be 1, 2 or 4 (got {stem_stride})")
    multiple = 8 * stem_stride
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise ValueError(f"{network} takes image sizes divisible by {multiple} (got {height}x{width}); change img_size")
    return height, width


class _ThreeStages(nn.Module):
    """What both networks share: a stem stage and two of blocks, at strides 2, 4 and 8 in the paper.

    `stem_stride` 4 is HDKD's ablation; 1 is OUR CHOICE for images of 32 pixels or so (strides 1, 2 and 4).
    """

    def __init__(self, widths: Sequence[int], units: Sequence[int], in_chans: int, stem_stride: int, gate: str):
        super().__init__()
        self.stages = nn.ModuleList(
            conv_stage(before, width, depth, stride=stem_stride if i == 0 else 2, block=gate if i else None)
            for i, (before, width, depth) in enumerate(zip((in_chans, *widths), widths, units, strict=False))
        )
        self.feature_info = [
            {"num_chs": width, "reduction": stem_stride * 2**i, "module": f"stages.{i}"} for i, width in enumerate(widths)
        ]
        self.grad_checkpointing = False

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training:
            return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
        return module(x)


class HDKDTeacher(_ThreeStages):
    """Convolutional teacher: stages of 6, 6 and 9 units, average pool, two linear layers with nothing between them.

    `forward_features` gives (B, 192, H/8, W/8); `forward_head(..., pre_logits=True)` gives the 128 inputs of the classifier.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        widths: Sequence[int] = (64, 96, 192),
        units: Sequence[int] = (6, 6, 9),
        head_hidden_size: int = 128,
        stem_stride: int = 2,
        gate: str = "cbam",
        drop_rate: float = 0.0,
    ):
        _check_size("hdkd_teacher", img_size, stem_stride)
        super().__init__(widths, units, in_chans, stem_stride, gate)
        self.num_classes = num_classes
        self.num_features = widths[-1]
        self.head_hidden_size = head_hidden_size
        self.fc = nn.Linear(widths[-1], head_hidden_size)
        self.drop_rate = drop_rate
        self.head = nn.Linear(head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head = nn.Linear(self.head_hidden_size, num_classes).to(self.fc.weight) if num_classes > 0 else nn.Identity()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs by index (0, 1, 2; None: all) and the final features, from one pass; arguments as in timm."""
        if output_fmt != "NCHW":
            raise ValueError(f"hdkd_teacher gives NCHW maps only (asked for {output_fmt})")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for i, stage in enumerate(self.stages):
            if stop_early and i > last:
                break
            x = self._run(stage, x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_intermediates(x, [len(self.stages) - 1])[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.fc(x.mean((2, 3)))
        return x if pre_logits else self.head(F.dropout(x, self.drop_rate, self.training))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, H*W/4, dim): 2x2 patches in order (row, column, channel), LayerNorm, Linear, LayerNorm."""

    def __init__(self, in_chans: int, dim: int, grid_size: tuple[int, int], stride: int):
        super().__init__()
        self.grid_size, self.stride = grid_size, stride
        self.norm_in = nn.LayerNorm(4 * in_chans)
        self.proj = nn.Linear(4 * in_chans, dim)
        self.norm_out = nn.LayerNorm(dim)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Token grid (rows, columns) of an image size."""
        return img_size[0] // self.stride, img_size[1] // self.stride

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        x = x.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(B, H * W // 4, 4 * C)
        return self.norm_out(self.proj(self.norm_in(x)))


class Attention(nn.Module):
    """Multi-head self-attention with its own LayerNorm before qkv; heads of 32 channels; (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, head_dim: int = 32):
        super().__init__()
        self.num_heads, self.head_dim = dim // head_dim, head_dim
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class TransformerBlock(nn.Module):
    """x + attention, x + MLP; the MLP has no LayerNorm in front of it, as in the official code."""

    def __init__(self, dim: int):
        super().__init__()
        self.attn = Attention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class HDKDStudent(_ThreeStages):
    """Hybrid student: stages of 2, 2 and 3 units, 2x2 patches of the last map as tokens, three transformer blocks.

    `forward_features` gives normalised tokens (B, prefix + N, 256): class token, distillation token if there is one, patches.
    `forward_head` gives the mean of both heads' logits; in training with `set_distilled_training()` it gives both,
    (class logits, distillation logits), as timm's distilled DeiT does.

    Intermediates 0, 1, 2 are the stages; 3 and up the patch tokens after each transformer block, as maps.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        widths: Sequence[int] = (64, 96, 192),
        units: Sequence[int] = (2, 2, 3),
        embed_dim: int = 256,
        depth: int = 3,
        distilled: bool = False,
        stem_stride: int = 2,
        gate: str = "cbam",
        drop_rate: float = 0.0,
    ):
        name = "hdkd_student_distilled" if distilled else "hdkd_student"
        height, width = _check_size(name, img_size, stem_stride)
        stride = 8 * stem_stride
        super().__init__(widths, units, in_chans, stem_stride, gate)
        self.img_size = (height, width)
        self.num_classes = num_classes
        self.num_features = self.embed_dim = self.head_hidden_size = embed_dim
        self.num_prefix_tokens = 2 if distilled else 1
        self.distilled_training = False
        self.feature_info += [{"num_chs": embed_dim, "reduction": stride, "module": f"blocks.{i}"} for i in range(depth)]

        self.patch_embed = PatchEmbed(widths[-1], embed_dim, (height // stride, width // stride), stride)
        tokens = self.num_prefix_tokens + self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1]
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.randn(1, 1, embed_dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, embed_dim))
        self.blocks = nn.ModuleList(TransformerBlock(embed_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.drop_rate = drop_rate
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        if distilled:
            self.head_dist = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
            self.set_distilled_training = self._set_distilled_training  # absent without the token, as in timm

    def _set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Empty: the official recipe decays tokens and positions too (one-dimensional parameters never)."""
        return set()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        return self.head if self.dist_token is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        for name in ["head"] if self.dist_token is None else ["head", "head_dist"]:
            head = nn.Linear(self.embed_dim, num_classes).to(self.cls_token) if num_classes > 0 else nn.Identity()
            setattr(self, name, head)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage maps and token maps by index, and the final normalised tokens, from one pass; timm's meaning of every argument.

        `norm` applies the final LayerNorm to the token maps.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"hdkd_student gives NCHW maps only (asked for {output_fmt})")
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"this student was made for {self.img_size[0]}x{self.img_size[1]} images "
                f"(got {x.shape[-2]}x{x.shape[-1]}); create it with img_size={x.shape[-2]}"
            )
        take, last = feature_take_indices(len(self.stages) + len(self.blocks), indices)
        intermediates = []
        for i, stage in enumerate(self.stages):
            x = self._run(stage, x)
            if i in take:
                intermediates.append(x)
            if stop_early and i >= last:
                return intermediates if intermediates_only else (x, intermediates)
        x = self._tokens(x)
        for i, block in enumerate(self.blocks, start=len(self.stages)):
            x = self._run(block, x)
            if i in take:
                y = (self.norm(x) if norm else x)[:, self.num_prefix_tokens :]
                intermediates.append(y.transpose(1, 2).unflatten(2, self.patch_embed.grid_size))
            if stop_early and i >= last:
                break
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def _tokens(self, x: Tensor) -> Tensor:
        prefix = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        return torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), self.patch_embed(x)], 1) + self.pos_embed

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_intermediates(x, [0])[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if pre_logits:
            return x[:, : self.num_prefix_tokens].mean(1)
        class_logits, distillation_logits = self.both_heads(x)
        if self.dist_token is None:
            return class_logits
        is_apart = self.distilled_training and self.training
        return (class_logits, distillation_logits) if is_apart else (class_logits + distillation_logits) / 2

    def both_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class and distillation logits (B, C) of `forward_features`; the same where there is one token."""
        x = F.dropout(x[:, : self.num_prefix_tokens], self.drop_rate, self.training)
        class_logits = self.head(x[:, 0])
        return class_logits, class_logits if self.dist_token is None else self.head_dist(x[:, 1])

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "first_conv": "stages.0.0.0",
        "classifier": "head",
        "license": "mit",
        **kwargs,
    }


_NANO = {"widths": (16, 24, 48)}
_STUDENT = _cfg(fixed_input_size=True)
_DISTILLED = _cfg(fixed_input_size=True, classifier=("head", "head_dist"))
default_cfgs = generate_default_cfgs(
    {
        "hdkd_teacher": _cfg(),
        "hdkd_teacher_nano": _cfg(),
        "hdkd_student": _STUDENT,
        "hdkd_student_nano": _STUDENT,
        "hdkd_student_distilled": _DISTILLED,
        "hdkd_student_distilled_nano": _DISTILLED,
    }
)


def _create(network: type[nn.Module], variant: str, pretrained: bool, **kwargs) -> nn.Module:
    return build_model_with_cfg(network, variant, pretrained, **kwargs)


@register_model
def hdkd_teacher(pretrained: bool = False, **kwargs) -> HDKDTeacher:
    """3,947,774 + 129 * num_classes parameters; 11.40 GFLOPs at 224 px (2 per multiply-add)."""
    return _create(HDKDTeacher, "hdkd_teacher", pretrained, **kwargs)


@register_model
def hdkd_teacher_nano(pretrained: bool = False, **kwargs) -> HDKDTeacher:
    """Units 2, 2, 3 of widths 16, 24, 48."""
    return _create(
        HDKDTeacher, "hdkd_teacher_nano", pretrained, **(_NANO | {"units": (2, 2, 3), "head_hidden_size": 32} | kwargs)
    )


@register_model
def hdkd_student(pretrained: bool = False, **kwargs) -> HDKDStudent:
    """3,723,178 + 257 * num_classes parameters; 4.04 GFLOPs at 224 px."""
    return _create(HDKDStudent, "hdkd_student", pretrained, **kwargs)


@register_model
def hdkd_student_nano(pretrained: bool = False, **kwargs) -> HDKDStudent:
    """Units 1, 1, 2 of widths 16, 24, 48 and two transformer blocks of width 64."""
    return _create(
        HDKDStudent, "hdkd_student_nano", pretrained, **(_NANO | {"units": (1, 1, 2), "embed_dim": 64, "depth": 2} | kwargs)
    )


@register_model
def hdkd_student_distilled(pretrained: bool = False, **kwargs) -> HDKDStudent:
    """`hdkd_student` with a distillation token and head: 3,723,690 + 514 * num_classes parameters; 4.05 GFLOPs at 224 px."""
    return _create(HDKDStudent, "hdkd_student_distilled", pretrained, **({"distilled": True} | kwargs))


@register_model
def hdkd_student_distilled_nano(pretrained: bool = False, **kwargs) -> HDKDStudent:
    """`hdkd_student_nano` with a distillation token and head."""
    nano = _NANO | {"units": (1, 1, 2), "embed_dim": 64, "depth": 2, "distilled": True}
    return _create(HDKDStudent, "hdkd_student_distilled_nano", pretrained, **(nano | kwargs))
