"""DearKD's convolutional attention, and distilled vision transformers with it.

Chen et al., "DearKD: Data-Efficient Early Knowledge Distillation for Vision Transformers", CVPR 2022 (arXiv 2204.12997).
No code of it is public, and what follows is re-implemented from descriptions. Known of multi-head convolutional attention
(MHCA) [second-hand summary]: it replaces self-attention in early blocks, imitates a convolution by relative positions without
constraining attention to content, has dropout inside and costs little. All else is OUR CHOICE, in the form of Cordonnier et al.
2020 (arXiv 1911.03584) and d'Ascoli et al. 2021 (arXiv 2103.10697): head h scores the offset d = key - query on the grid by

    p_h(d) = v_h . (|d|^2, d_y, d_x)            v_h = a (-1, 2 D_y, 2 D_x) has its peak, of strength a, at the offset D

    gate:  A = (1 - s_h) softmax(q k^T / sqrt(c)) + s_h softmax(p_h)       s_h = sigmoid(g_h)
    add:   A = softmax(q k^T / sqrt(c) + p_h)

p_h is a sum over rows and columns, so softmax(p_h) is a product of one matrix per side: it is applied to rows, then to columns,
and the n x n matrix is never made. The heads start at the offsets nearest to (0, 0). Prefix tokens (class, distillation) know
content alone, as queries and as keys.
"""

import functools

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import deit, load_pretrained, register_model
from torch import Tensor, nn

MODES = ("gate", "add")


def nearest_offsets(count: int) -> Tensor:
    """The `count` integer offsets (y, x) nearest to (0, 0), ties by y, then x: (count, 2)."""
    reach = range(-count, count + 1)
    offsets = sorted(((y, x) for y in reach for x in reach), key=lambda d: (d[0] ** 2 + d[1] ** 2, d))
    return torch.tensor(offsets[:count], dtype=torch.float32)


class ConvAttention(nn.Module):
    """MHCA in place of timm's `Attention`, whose projections and norms it takes over under their names: (B, N, C) -> (B, N, C).

    `position_weight` (heads, 3) is v in the order (|d|^2, d_y, d_x), and `gate` (heads) is g, in mode "gate".

    Args:
        attention: whose modules are taken over.
        grid: rows and columns of the patch tokens; `grid` may be set anew, as `convert_attention` does for every batch.
        prefix: tokens before the patches.
        mode: "gate" or "add".
        strength: a, of the peaks at the start.
        gate: g at the start.
        pos_drop: probability that a query of a head goes without position in training (a row of the attention, whole).

    Raises:
        ValueError: unknown mode, or an attention with timm's elementwise gate.
    """

    def __init__(
        self,
        attention: Attention,
        grid: tuple[int, int],
        prefix: int,
        *,
        mode: str = "gate",
        strength: float = 1.0,
        gate: float = 1.0,
        pos_drop: float = 0.1,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"conv_mode must be one of {', '.join(MODES)} (got {mode!r})")
        if not isinstance(attention, Attention) or attention.gate is not None:
            raise ValueError(f"convolutional attention can take the place of timm's plain Attention (got {attention})")
        self.num_heads, self.head_dim, self.attn_dim = attention.num_heads, attention.head_dim, attention.attn_dim
        self.grid, self.prefix, self.mode, self.pos_drop = tuple(grid), prefix, mode, pos_drop
        for name in ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop"):
            setattr(self, name, getattr(attention, name))
        centres = nearest_offsets(self.num_heads)
        peaks = strength * torch.cat([-torch.ones(self.num_heads, 1), 2 * centres], 1)
        self.position_weight = nn.Parameter(peaks.to(self.qkv.weight))
        self.gate = nn.Parameter(torch.full((self.num_heads,), gate).to(self.qkv.weight)) if mode == "gate" else None

    def position_scores(self) -> tuple[Tensor, Tensor]:
        """p_h along rows (heads, h, h) and columns (heads, w, w): queries, keys; p_h is their outer sum. At least float32."""
        dtype = torch.promote_types(self.position_weight.dtype, torch.float32)
        bend, *slopes = self.position_weight.to(dtype).unbind(1)
        scores = []
        for length, slope in zip(self.grid, slopes, strict=True):
            place = torch.arange(length, dtype=dtype, device=bend.device)
            d = place - place[:, None]  # key - query
            scores.append(bend[:, None, None] * d**2 + slope[:, None, None] * d)
        return scores[0], scores[1]

    def position_attention(self) -> Tensor:
        """softmax(p_h) over the patch grid: (heads, h * w, h * w)."""
        rows, columns = (scores.softmax(-1) for scores in self.position_scores())
        return torch.einsum("hqk,hrs->hqrks", rows, columns).flatten(3).flatten(1, 2)

    def mix(self, attention: Tensor) -> Tensor:
        """What a query attends to in all (B, heads, N, N), from what the fused attention attended to."""
        if self.mode == "add":
            return attention
        s, mixed = self.gate.sigmoid()[:, None, None], attention.clone()
        mixed[:, :, self.prefix :] *= 1 - s
        mixed[:, :, self.prefix :, self.prefix :] += s * self.position_attention()
        return mixed

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        B, N, _ = x.shape
        h, w = self.grid
        if attn_mask is not None or is_causal or self.prefix + h * w != N:
            raise ValueError(
                f"convolutional attention takes all {self.prefix} + {h} x {w} tokens and no mask (got {N} tokens); "
                "create the network without patch dropout"
            )
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        if self.mode == "add":
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(B).to(q.dtype), dropout_p=dropout)
        else:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            content, strength = x[:, :, self.prefix :], self._kept(B, self.gate.sigmoid()[:, None, None]).to(x.dtype)
            patches = content + strength * (self._gather(v[:, :, self.prefix :]) - content)
            x = torch.cat([x[:, :, : self.prefix], patches], 2)
        x = self.norm(x.transpose(1, 2).reshape(B, N, self.attn_dim))
        return self.proj_drop(self.proj(x))

    def _gather(self, values: Tensor) -> Tensor:
        """softmax(p_h) times the values (B, heads, h * w, c), side by side."""
        rows, columns = (scores.softmax(-1).to(values.dtype) for scores in self.position_scores())
        maps = values.unflatten(2, self.grid)
        return torch.einsum("hrs,bhqsc->bhqrc", columns, torch.einsum("hqk,bhksc->bhqsc", rows, maps)).flatten(2, 3)

    def _bias(self, batch: int) -> Tensor:
        rows, columns = self.position_scores()
        scores = (rows[:, :, None, :, None] + columns[:, None, :, None, :]).flatten(3).flatten(1, 2)
        return F.pad(self._kept(batch, scores), (self.prefix, 0, self.prefix, 0))

    def _kept(self, batch: int, positions: Tensor) -> Tensor:
        """`positions` (heads, queries or 1, ...) for each image, without the rows that dropout takes: (1 or B, heads, ...)."""
        if not self.training or self.pos_drop == 0:
            return positions[None]
        queries = (batch, self.num_heads, self.grid[0] * self.grid[1], 1)
        return positions * (torch.rand(queries, device=positions.device) >= self.pos_drop)


def convert_attention(vit: nn.Module, blocks: int = 4, mode: str = "gate", **options) -> nn.Module:
    """Gives the first blocks of a timm vision transformer convolutional attention, in place, and returns it.

    Its weights stay; with mode "gate" and `gate` very low, or mode "add" and strength 0, it computes what it did before. The
    new weights are named by its `no_weight_decay`. With gradient checkpointing, images of one size come between two steps.

    Args:
        blocks: how many, from the first on.
        options: of `ConvAttention`.

    Raises:
        ValueError: the network has no such blocks, or its attention is of another kind.
    """
    own = getattr(vit, "blocks", ())
    if not 0 <= blocks <= len(own) or not hasattr(getattr(vit, "patch_embed", None), "dynamic_feat_size"):
        raise ValueError(
            f"{type(vit).__name__} has {len(own)} transformer blocks on a grid of patches; {blocks} cannot be converted"
        )
    grid = tuple(vit.patch_embed.grid_size)
    attentions = [ConvAttention(block.attn, grid, vit.num_prefix_tokens, mode=mode, **options) for block in own[:blocks]]
    for block, attention in zip(own, attentions, strict=False):
        block.attn = attention
    vit.patch_embed.register_forward_hook(functools.partial(_set_grid, attentions))
    vit.no_weight_decay = functools.partial(_no_weight_decay, vit, type(vit).no_weight_decay)
    return vit


def _set_grid(attentions: list[ConvAttention], patch_embed: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
    for attention in attentions:
        attention.grid = patch_embed.dynamic_feat_size(tuple(inputs[0].shape[-2:]))


def _no_weight_decay(vit: nn.Module, own) -> set[str]:
    names = {name for name, _ in vit.named_parameters() if name.endswith(("attn.position_weight", "attn.gate"))}
    return set(own(vit)) | names


def _create(base, pretrained: bool, conv_blocks: int = 4, conv_mode: str = "gate", conv_options: dict | None = None, **kwargs):
    is_exported = pretrained and isinstance(kwargs.get("pretrained_cfg"), dict)  # timm's, of a folder or of its hub
    vit = base(pretrained=pretrained and not is_exported, **kwargs)
    vit = convert_attention(vit, conv_blocks, conv_mode, **(conv_options or {}))
    if is_exported:  # these weights know the positions
        load_pretrained(vit, num_classes=vit.num_classes)
    return vit


@register_model
def dearkd_tiny_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """DeiT-Ti with a distillation token and MHCA in its first `conv_blocks` (4) blocks, of `conv_mode` "gate" or "add" and
    `conv_options` (of `ConvAttention`); `pretrained` loads DeiT's weights, which know no position weights.
    """
    return _create(deit.deit_tiny_distilled_patch16_224, pretrained, **kwargs)


@register_model
def dearkd_small_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """`dearkd_tiny_patch16_224` of DeiT-S."""
    return _create(deit.deit_small_distilled_patch16_224, pretrained, **kwargs)


@register_model
def dearkd_base_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """`dearkd_tiny_patch16_224` of DeiT-B."""
    return _create(deit.deit_base_distilled_patch16_224, pretrained, **kwargs)
