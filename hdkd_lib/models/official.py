"""Weights of the official HDKD code (omarsherif200/HDKD) in our networks."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hdkd_lib import models

# Official parameter name -> ours, in the order in which they are tried.
_OFFICIAL_NAMES = [
    (r"^stage1\.(\d+)\.(\d)\.", r"stages.0.\1.\2."),
    (r"^stage2\.", "stages.1."),
    (r"^stage3\.", "stages.2."),
    (r"\.proj\.", ".shortcut.1."),
    (r"\.conv\.norm\.", ".norm."),
    (r"\.conv\.fn\.0\.", ".expand."),
    (r"\.conv\.fn\.1\.", ".expand_norm."),
    (r"\.conv\.fn\.3\.", ".depthwise."),
    (r"\.conv\.fn\.4\.", ".depthwise_norm."),
    (r"\.conv\.fn\.6\.spatial_attention\.conv1\.", ".gate.spatial.conv."),
    (r"\.conv\.fn\.6\.channel_attention\.fc\.", ".gate.channel.mlp."),
    (r"\.conv\.fn\.7\.", ".project."),
    (r"\.conv\.fn\.8\.", ".project_norm."),
    (r"^fn1\.", "fc."),
    (r"^classifier\.", "head."),
    (r"^head_cls\.", "head."),
    (r"^head_distill\.", "head_dist."),
    (r"^DFLT_module\.to_patch_embedding\.1\.", "patch_embed.norm_in."),
    (r"^DFLT_module\.to_patch_embedding\.2\.", "patch_embed.proj."),
    (r"^DFLT_module\.to_patch_embedding\.3\.", "patch_embed.norm_out."),
    (r"^DFLT_module\.pos_embedding", "pos_embed"),
    (r"^DFLT_module\.cls_token", "cls_token"),
    (r"^DFLT_module\.distill_token", "dist_token"),
    (r"^DFLT_module\.transformer\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.attn.norm."),
    (r"^DFLT_module\.transformer\.layers\.(\d+)\.0\.to_qkv\.", r"blocks.\1.attn.qkv."),
    (r"^DFLT_module\.transformer\.layers\.(\d+)\.0\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"^DFLT_module\.transformer\.layers\.(\d+)\.1\.net\.0\.", r"blocks.\1.mlp.0."),
    (r"^DFLT_module\.transformer\.layers\.(\d+)\.1\.net\.3\.", r"blocks.\1.mlp.2."),
    (r"^DFLT_module\.transformer\.norm\.", "norm."),
]


def convert_official_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the entries of an official checkpoint of the teacher or of either student to ours; the tensors are not copied.

    Raises:
        ValueError: the entries are not those of an official HDKD network.
    """
    converted = {}
    for official in state_dict:
        name = official.removeprefix("module.")  # left by nn.DataParallel
        if not re.match(r"(stage[123]|fn1|classifier|head_cls|head_distill|DFLT_module)\.", name):
            raise ValueError(f"not a checkpoint of the official HDKD code: it has no network part for the entry {official!r}")
        for pattern, ours in _OFFICIAL_NAMES:
            name = re.sub(pattern, ours, name)
        converted[name] = state_dict[official]
    return converted


def load_official(path: str | Path) -> nn.Module:
    """The network of an official `.pth` file in eval mode: teacher or student, with its classes and (square) image size.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds more than tensors (nothing of it is executed), or another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no checkpoint fails in many ways
        raise ValueError(
            f"{path} is not a file of tensors, as torch.save(model.state_dict(), path) writes it ({type(error).__name__})"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{path} holds no state dict; save it by torch.save(model.state_dict(), path)")
    weights = convert_official_state_dict(state)
    if "head.weight" not in weights or not weights.keys() & {"fc.weight", "pos_embed"}:
        raise ValueError(f"{path} holds only a part of an official network ({len(weights)} entries)")
    if "fc.weight" in weights:
        model = models.create("hdkd_teacher", num_classes=len(weights["head.weight"]))
    else:
        distilled = "dist_token" in weights
        grid = math.isqrt(weights["pos_embed"].shape[1] - 1 - distilled)  # one token per 16 pixels
        name = "hdkd_student_distilled" if distilled else "hdkd_student"
        model = models.create(name, num_classes=len(weights["head.weight"]), img_size=16 * grid)
    return models.load_weights(model, weights).eval()
