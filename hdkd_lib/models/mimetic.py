"""Mimetic initialisation: attention starts as pretrained attention looks.

Trockman, Kolter, "Mimetic Initialization of Self-Attention Layers", ICML 2023 (arXiv 2305.09828). In pretrained ViTs the
products of query and key weights are near a multiple of the identity, those of value and output weights near a negative one.
With Z of independent N(0, 1/d) entries, and every head's W_Q, W_K of rank d / heads:

    W_Q W_K^T = alpha_1 Z + beta_1 I        W_V W_out = alpha_2 Z - beta_2 I        alpha_1 = beta_1 = .7, alpha_2 = beta_2 = .4

each split into its factors by a singular value decomposition, and position embeddings are sinusoidal [paper, second-hand: its
code was not at hand]. OUR CHOICE: timm's two-dimensional sines and cosines; prefix tokens have no position; biases are 0.
"""

import torch
from timm.layers import Attention, build_sincos2d_pos_embed
from torch import Tensor, nn


def _factors(alpha: float, beta: float, width: int, rank: int) -> tuple[Tensor, Tensor]:
    """A (width, rank) and B (width, rank) whose product A B^T is the best of that rank for alpha Z + beta I."""
    U, S, Vh = torch.linalg.svd(alpha * torch.randn(width, width) / width**0.5 + beta * torch.eye(width))
    root = S[:rank].sqrt()
    return U[:, :rank] * root, Vh[:rank].T * root


@torch.no_grad()
def mimetic_init(
    vit: nn.Module, *, alpha_1: float = 0.7, beta_1: float = 0.7, alpha_2: float = 0.4, beta_2: float = 0.4
) -> nn.Module:
    """Initialises the attention and position embeddings of a timm vision transformer, in place, and returns it.

    The random numbers are torch's.

    Raises:
        ValueError: the network has no blocks of timm's plain attention, or no position embeddings on a grid.
    """
    attentions = [getattr(block, "attn", None) for block in getattr(vit, "blocks", ())]
    if not attentions or not all(type(attention) is Attention for attention in attentions) or vit.pos_embed is None:
        raise ValueError(f"mimetic initialisation is for timm's plain vision transformers (got {type(vit).__name__})")
    for attention in attentions:
        width, heads = attention.qkv.in_features, attention.num_heads
        query, key, value = attention.qkv.weight.chunk(3)  # each (width, width), rows by head; x W^T
        for rows in torch.arange(width).chunk(heads):
            A, B = _factors(alpha_1, beta_1, width, len(rows))
            query[rows], key[rows] = A.T, B.T
        A, B = _factors(alpha_2, -beta_2, width, width)
        value.copy_(A.T)
        attention.proj.weight.copy_(B)
        for layer in (attention.qkv, attention.proj):
            if layer.bias is not None:
                layer.bias.zero_()
    positions = build_sincos2d_pos_embed(list(vit.patch_embed.grid_size), vit.embed_dim, interleave_sin_cos=True)
    vit.pos_embed.zero_()
    vit.pos_embed[0, -len(positions) :] = positions
    return vit
