"""Training methods, one file per paper; each is a `timm.task.TrainingTask`. A line here registers one by its name."""

import difflib
import importlib

from hdkd_lib.methods.base import Distillation, Method
from hdkd_lib.methods.cskd import CSKD as CSKD
from hdkd_lib.methods.dearkd import DearKD as DearKD
from hdkd_lib.methods.deit import DeiT as DeiT
from hdkd_lib.methods.hdkd import HDKD as HDKD
from hdkd_lib.methods.locality import LocalityGuidance as LocalityGuidance
from hdkd_lib.methods.supervised import Supervised as Supervised

NAMES = [
    name
    for name, value in sorted(vars().items())
    if isinstance(value, type) and issubclass(value, Method) and value not in (Method, Distillation)
]


def find(method: str | type[Method]) -> type[Method]:
    """The method of that name; one of another package is found by its address, "package.module:Class".

    Raises:
        ValueError: there is none of that name (the nearest is suggested), or it is no `Method`.
    """
    if not isinstance(method, str):
        found = method
    elif ":" in method:
        module, name = method.split(":", 1)
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"the method {method!r} cannot be imported ({error}); install its package, or set PYTHONPATH"
            ) from error
    elif method in NAMES:
        found = globals()[method]
    else:
        near = difflib.get_close_matches(method, NAMES, n=1)
        raise ValueError(
            f"unknown method {method!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NAMES)}")
        )
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"{method!r} is no method: derive its class from hdkd_lib.methods.base.Method or Distillation")
    return found
