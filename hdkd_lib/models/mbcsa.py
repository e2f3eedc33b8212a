"""Convolutional blocks of HDKD: inverted bottlenecks with channel and spatial attention.

EL-Assiouti et al., "HDKD: Hybrid Data-Efficient Knowledge Distillation Network for Medical Image Classification", 2024
(arXiv 2407.07516). Facts marked [code] were read in the official code (omarsherif200/HDKD at f7c7dae).
"""

import math

import torch
from torch import Tensor, nn

from hdkd_lib.models import fused


class ConvUnit(nn.Sequential):
    """3x3 convolution, batch norm, GELU: one unit of the stem stage [code]. (B, in, H, W) -> (B, out, H/stride, W/stride)."""

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1):
        super().__init__(nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out_chans), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, gelu = self
        return fused.norm_gelu(norm, gelu, conv(x))


def _mean(x: Tensor, *dims: int) -> Tensor:
    """`x.mean(dims, keepdim=True)`, which in bf16 on a CPU would first copy all of x to float32: a fifth of HDKD's step."""
    return x.sum(dims, keepdim=True) / math.prod([x.shape[dim] for dim in dims])


class ChannelAttention(nn.Module):
    """sigmoid(M(avgpool x) + M(maxpool x)) * x, with one bottleneck M shared by both poolings [code]."""

    def __init__(self, chans: int, reduction: int = 16):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(chans, chans // reduction, 1, bias=False),
            nn.GELU(),
            nn.Conv2d(chans // reduction, chans, 1, bias=False),
        )

    def gate(self, mean: Tensor, maximum: Tensor) -> Tensor:
        """Of the pooled maps, (B, C, 1, 1) all three."""
        return torch.sigmoid(self.mlp(mean) + self.mlp(maximum))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(_mean(x, 2, 3), x.amax((2, 3), keepdim=True)) * x


class SpatialAttention(nn.Module):
    """sigmoid(conv7x7[mean over channels, max over channels]) * x; no normalisation after the convolution [code]."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def gate(self, pooled: Tensor) -> Tensor:
        """(B, 1, H, W) of mean and maximum, (B, 2, H, W)."""
        return torch.sigmoid(self.conv(pooled))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(torch.cat([_mean(x, 1), x.amax(1, keepdim=True)], 1)) * x


class CBAM(nn.Module):
    """Channel gate, then spatial gate, and a residual around both (the original CBAM has no residual) [code]."""

    def __init__(self, chans: int):
        super().__init__()
        self.channel = ChannelAttention(chans)
        self.spatial = SpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        if not fused.is_for(x):
            return self.spatial(self.channel(x)) + x
        x, mean, maximum = fused.pool_positions(x)
        a = self.channel.gate(mean, maximum)
        x, pooled = fused.pool_channels(x, a)
        return fused.gate(x, a, self.spatial.gate(pooled))


class SqueezeExcite(nn.Module):
    """Channel gate of MBConv: average pool, Linear(chans -> reduced), GELU, Linear(reduced -> chans), sigmoid [code]."""

    def __init__(self, chans: int, reduced: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(chans, reduced, bias=False), nn.GELU(), nn.Linear(reduced, chans, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(_mean(x, 2, 3).flatten(1))[:, :, None, None] * x


class MBCSA(nn.Module):
    """Inverted bottleneck with a gate before its last projection; (B, in, H, W) -> (B, out, H/stride, W/stride).

    The hidden width is four times the *input* width, also where the unit downsamples; the shortcut of a downsampling unit is a
    3x3 max pool and a 1x1 convolution without batch norm; nothing follows the addition [code].

    Args:
        gate: "cbam" is the paper's MBCSA, "se" its MBConv ablation, "none" has neither.
    """

    def __init__(self, in_chans: int, out_chans: int, *, downsample: bool = False, gate: str = "cbam"):
        super().__init__()
        hidden = 4 * in_chans
        gates = {
            "cbam": lambda: CBAM(hidden),
            "se": lambda: SqueezeExcite(hidden, in_chans // 4),
            "none": nn.Identity,
        }
        if gate not in gates:
            raise ValueError(f"gate must be one of {', '.join(gates)} (got {gate!r})")
        self.norm = nn.BatchNorm2d(in_chans)
        # A constant per channel passes the 1x1 convolution and is removed by the next batch norm: this bias has no gradient but
        # rounding noise, which Adam would scale up to full steps.
        self.norm.bias.requires_grad_(False)
        self.expand = nn.Conv2d(in_chans, hidden, 1, stride=2 if downsample else 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(hidden)
        self.act = nn.GELU()
        self.gate = gates[gate]()
        self.project = nn.Conv2d(hidden, out_chans, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(out_chans)
        self.shortcut = (
            nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(in_chans, out_chans, 1, bias=False)) if downsample else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = fused.norm_gelu(self.expand_norm, self.act, self.expand(self.norm(x)))
        y = fused.norm_gelu(self.depthwise_norm, self.act, self.depthwise(y))
        return self.project_norm(self.project(self.gate(y))) + self.shortcut(x)


def conv_stage(in_chans: int, out_chans: int, units: int, *, stride: int = 2, block: str | None = "cbam") -> nn.Sequential:
    """`units` units of which the first has the stride; `block=None` makes a stem stage, else MBCSA units with that gate."""
    if block is None:
        return nn.Sequential(*(ConvUnit(out_chans if i else in_chans, out_chans, 1 if i else stride) for i in range(units)))
    return nn.Sequential(*(MBCSA(out_chans if i else in_chans, out_chans, downsample=i == 0, gate=block) for i in range(units)))
