"""What a user may set: types, and refusals in one sentence."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from hdkd_lib import parameters, recipes
from hdkd_lib.parameters import check, check_call, check_type, one_sentence

VALUES = {"text": "a", "whole": 1, "number": 0.5, "truth": True, "list": [1], "tuple": (1,), "dict": {"a": 1}, "none": None}


@pytest.mark.parametrize(
    ("annotation", "allowed", "words"),
    [
        (str, {"text"}, "text"),
        (int, {"whole"}, "a whole number"),
        (float, {"whole", "number"}, "a number"),
        (bool, {"truth"}, "True or False"),
        (list, {"list", "tuple"}, "a list"),
        (list[int], {"list", "tuple"}, "a list"),
        (Sequence, {"list", "tuple"}, "a list"),
        (Sequence[int], {"list", "tuple"}, "a list"),
        (dict, {"dict"}, "a dict"),
        (dict[str, int], {"dict"}, "a dict"),
        (Mapping, {"dict"}, "a dict"),
        (Mapping[int, int], {"dict"}, "a dict"),
    ],
)
def test_a_value_must_be_of_its_annotated_type(annotation, allowed, words):
    for name, value in VALUES.items():
        if name in allowed:
            check_type("x", value, annotation)
        else:
            with pytest.raises(ValueError) as refused:  # noqa: PT011
                check_type("x", value, annotation)
            assert str(refused.value) == f"x must be {words} (got {value!r})"


@pytest.mark.parametrize("annotation", [int | None, str | bool, Any, None, "int", object, Exception])
def test_an_unknown_annotation_allows_all(annotation):
    for value in VALUES.values():
        check_type("x", value, annotation)


def test_a_notebooks_parameters_have_the_types_of_their_cell():
    notebook = {
        "__annotations__": {"epochs": int, "recipe": dict, "lr": float},
        "epochs": 3,
        "recipe": {},
        "lr": 1,
        "other": "x",
    }
    check(notebook)
    with pytest.raises(ValueError, match=r"^epochs must be a whole number \(got '3'\)$"):
        check(notebook | {"epochs": "3"})
    with pytest.raises(ValueError, match=r"^recipe must be a dict \(got 'nano'\)$"):
        check(notebook | {"recipe": "nano"})


def test_annotations_may_be_kept_as_a_function():
    annotate = {1: {"epochs": int}}.__getitem__
    for empty in ({}, {"__annotations__": {}}):
        check(empty | {"__annotate__": annotate, "epochs": 3})
        with pytest.raises(ValueError, match="epochs must be a whole number"):
            check(empty | {"__annotate__": annotate, "epochs": 3.5})


def test_a_cells_annotations_are_found_in_its_globals():
    cell: dict = {}
    exec("epochs: int = 3\nname: str = 'x'\nfree = 1", cell)
    check(cell)
    with pytest.raises(ValueError, match=r"name must be text \(got 1\)"):
        check(cell | {"name": 1})


def test_what_is_given_in_a_call_has_the_types_of_the_signature():
    def function(a: int, b: Sequence[int] = (), *, c: float = 0.5, d=None):
        raise AssertionError("called")

    check_call(function, {})
    check_call(function, {"a": 1, "b": [1], "c": 2, "d": object()})
    for wrong, message in (
        ({"a": True}, "a must be a whole number (got True)"),
        ({"b": "12"}, "b must be a list (got '12')"),
        ({"a": 1, "c": "1"}, "c must be a number (got '1')"),
    ):
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            check_call(function, wrong)
        assert str(refused.value) == message


# In a notebook


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, OSError, FloatingPointError, json.JSONDecodeError])
def test_what_the_library_refuses_is_shown_as_its_sentence(error):
    arguments = ("so much is wrong", "{", 0) if error is json.JSONDecodeError else ("so much is wrong",)
    raised = error(*arguments)
    library = {"__name__": "hdkd_lib.somewhere", "raised": raised}
    exec("def refuse():\n    raise raised", library)
    with pytest.raises(error) as refused:
        one_sentence(lambda: library["refuse"]())()
    assert refused.value is raised
    assert raised._render_traceback_() == [f"{error.__name__}: {raised}"]


@pytest.mark.parametrize("module", ["torch.somewhere", "hdkd_lib_of_mine", "my.hdkd_lib", "__main__"])
def test_errors_of_other_packages_are_shown_whole(module):
    elsewhere = {"__name__": module, "raised": ValueError("x")}
    exec("def refuse():\n    raise raised", elsewhere)
    with pytest.raises(ValueError, match="x") as refused:
        one_sentence(lambda: elsewhere["refuse"]())()
    assert not hasattr(refused.value, "_render_traceback_")


@pytest.mark.parametrize("error", [TypeError, KeyError, RuntimeError, AssertionError, KeyboardInterrupt])
def test_errors_that_are_no_refusals_are_shown_whole(error):
    library = {"__name__": "hdkd_lib.somewhere", "error": error}
    exec("def fail():\n    raise error('x')", library)
    with pytest.raises(error) as failed:
        one_sentence(library["fail"])()
    assert not hasattr(failed.value, "_render_traceback_")


def test_what_is_not_refused_is_returned_under_the_functions_own_name():
    @one_sentence
    def double(x: int, *, more: int = 0) -> int:
        """Twice."""
        return 2 * x + more

    assert double(2, more=1) == 5
    assert (double.__name__, double.__doc__) == ("double", "Twice.")
    check_call(double, {"x": 1})
    with pytest.raises(ValueError, match="more must be a whole number"):
        check_call(double, {"more": "1"})


def test_ipython_prints_the_sentence_and_no_calls(capsys):
    shell = InteractiveShell()
    shell.run_cell("from hdkd_lib import recipes\nrecipes.get('nano', epochs='6')")
    shown = capsys.readouterr()
    assert (shown.out + shown.err).strip() == "ValueError: epochs must be a whole number (got '6')"
    shell.run_cell("int('x')")
    assert "Traceback" in capsys.readouterr().out


def test_the_doors_of_the_library_refuse_in_one_sentence():
    for refusal in (lambda: recipes.get("nanu"), lambda: parameters.check({"__annotations__": {"a": int}, "a": "1"})):
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            refusal()
        assert refused.value._render_traceback_() == [f"ValueError: {refused.value}"]
