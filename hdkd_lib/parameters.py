"""What a user may set, in a notebook, a plan or a call: checked before anything trains, and refused in one sentence."""

import functools
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_origin

WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    list: "a list",
    Sequence: "a list",
    dict: "a dict",
    Mapping: "a dict",
}
ALSO = {float: (int, float), list: (list, tuple), Sequence: (list, tuple)}


def check_type(name: str, value: Any, annotation: Any) -> None:
    """Whether a value is of the annotated type; an annotation that is not in `WORDS` allows all.

    Raises:
        ValueError: it is not.
    """
    expected = get_origin(annotation) or annotation
    if expected not in WORDS:
        return
    is_bool = isinstance(value, bool)  # which Python takes for a number
    if not isinstance(value, ALSO.get(expected, expected)) or (is_bool and expected is not bool):
        raise ValueError(f"{name} must be {WORDS[expected]} (got {value!r})")


def one_sentence(function: Callable) -> Callable:
    """In a notebook, what this library refuses is shown as its sentence, without the calls that led to it.

    Other errors, and those raised in other packages, are shown whole.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError, MemoryError) as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if frame.f_globals.get("__name__", "").split(".")[0] == "hdkd_lib":
                sentence = f"{type(error).__name__}: {error}"
                error._render_traceback_ = lambda: [sentence]  # IPython's protocol
            raise

    return call


@one_sentence
def check(notebook: Mapping[str, Any]) -> None:
    """Whether a notebook's parameters have the types of their cell; `notebook` is its `globals()`.

    Raises:
        ValueError: one has not.
    """
    annotations = notebook.get("__annotations__") or notebook["__annotate__"](1)  # Python 3.14 keeps them so
    for name, annotation in annotations.items():
        check_type(name, notebook[name], annotation)


def check_call(function: Callable, arguments: Mapping[str, Any]) -> None:
    """Whether the arguments that are given have the types of a function's signature.

    Raises:
        ValueError: one has not.
    """
    parameters = inspect.signature(function).parameters
    for name, value in arguments.items():
        check_type(name, value, parameters[name].annotation)
