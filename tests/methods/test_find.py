"""Methods by name, from here and from elsewhere, and what their constructors say of them."""

import inspect
import json
import sys
from collections.abc import Mapping, Sequence

import pytest
from torch import nn

from hdkd_lib import experiment, methods
from hdkd_lib.methods import CSKD, HDKD, DearKD, DeiT, LocalityGuidance, Supervised
from hdkd_lib.methods.base import Distillation, Method

ALL = [CSKD, DearKD, DeiT, HDKD, LocalityGuidance, Supervised]
ELSEWHERE = """
from hdkd_lib.methods import Supervised
from hdkd_lib.methods.base import Distillation

class Mine(Supervised):
    def __init__(self, *, student, half: float = 0.5):
        super().__init__(student=student)
        self.half = half

class Base:
    pass

function = len
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A package that is not the library's."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "mine.py").write_text(ELSEWHERE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_package.mine"
    for name in ("my_package", "my_package.mine"):
        sys.modules.pop(name, None)


def test_every_method_is_known_by_its_name():
    assert [method.__name__ for method in ALL] == methods.NAMES
    for method in ALL:
        assert methods.find(method.__name__) is methods.find(method) is method


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("HDKT", "^unknown method 'HDKT'; did you mean 'HDKD'\\?$"),
        ("hdkd_lib", "^unknown method 'hdkd_lib'; known: CSKD, DearKD, DeiT, HDKD, LocalityGuidance, Supervised$"),
        ("Method", "^unknown method 'Method'; "),
        ("Distillation", "^unknown method 'Distillation'; "),
        ("find", "^unknown method 'find'; "),
        (
            "absent.module:Mine",
            "^the method 'absent.module:Mine' cannot be imported .*No module named 'absent'.*install its package",
        ),
        ("my_package.mine:Mien", "^the method 'my_package.mine:Mien' cannot be imported .*Mien.*or set PYTHONPATH$"),
        ("my_package.mine:Base", "^'my_package.mine:Base' is no method: derive its class from hdkd_lib.methods.base.Method or"),
        ("my_package.mine:function", "^'my_package.mine:function' is no method"),
        (nn.Linear, "^<class 'torch.nn.modules.linear.Linear'> is no method"),
        (3, "^3 is no method"),
    ],
)
def test_what_is_no_method_is_refused_in_one_sentence(name, message, elsewhere):
    with pytest.raises(ValueError, match=message):
        methods.find(name)


def test_a_method_of_another_package_is_found_and_described_by_its_address(elsewhere, digits, recipe):
    address = f"{elsewhere}:Mine"
    method = methods.find(address)
    assert method is sys.modules[elsewhere].Mine
    built = experiment.build(digits, "hdkd_student_nano", recipe, method=address, options={"half": 0.25})
    description = built.task.describe()
    assert description == {
        "name": address,
        "half": 0.25,
        "student": {"name": "hdkd_student_nano", "num_classes": 10, "img_size": 16},
    }
    assert methods.find(description["name"]) is method
    with pytest.raises(ValueError, match="Mine has no option 'hlaf'; did you mean 'half'"):
        experiment.check(address, {"hlaf": 1}, has_teacher=False)


def test_a_notebooks_own_class_has_its_name_alone(elsewhere, build, monkeypatch):
    method = methods.find(f"{elsewhere}:Mine")
    monkeypatch.setattr(method, "__module__", "__main__")
    assert method(student=build()).describe()["name"] == "Mine"
    assert Supervised(student=build()).describe()["name"] == "Supervised"


def test_options_are_the_constructors_arguments_but_the_networks():
    for method in ALL:
        arguments = [
            name
            for name in inspect.signature(method.__init__).parameters
            if name not in ("self", "student", "teacher", "total_steps")
        ]
        assert method.options() == arguments
    assert Supervised.options() == ["probe"]
    assert (Method.options(), Distillation.options()) == ([], ["distill_until"])


@pytest.mark.parametrize("method", ALL)
def test_settings_are_the_options_with_their_defaults_and_make_the_task_again(method, build):
    is_tapped = method in (DearKD, LocalityGuidance)
    networks = {"student": build("dearkd_tiny_patch16_224", img_size=16, patch_size=4, depth=4) if is_tapped else build()}
    if issubclass(method, Distillation):
        networks["teacher"] = build("hdkd_teacher_nano")
    own = {"taps": {0: 2}} if method is LocalityGuidance else {}  # its default is for another teacher
    task = method(**networks, **own)
    settings = task.settings()
    parameters = inspect.signature(method).parameters
    expected = {name: parameters[name].default for name in method.options()} | own
    assert settings == json.loads(json.dumps(expected)) == json.loads(json.dumps(settings))
    assert task.describe().items() >= settings.items()
    assert method(**networks, **settings).settings() == settings


def test_settings_are_as_json_has_them(build):
    class Own(Distillation):
        def __init__(
            self,
            *,
            student,
            teacher,
            table: Mapping = {1: 4},
            order: Sequence = (3, 1),
            word: str = "x",
            distill_until: float = 1.0,
        ):
            super().__init__(student=student, teacher=teacher, distill_until=distill_until)
            self.table, self.order, self.word = table, order, word

    task = Own(student=build(), teacher=build("hdkd_teacher_nano"), word="y")
    assert task.settings() == {"table": {"1": 4}, "order": [3, 1], "word": "y", "distill_until": 1.0}
    assert list(task.settings()) == ["table", "order", "word", "distill_until"]


def test_an_option_that_is_not_kept_is_missed_by_name(build):
    class Forgetful(Method):
        def __init__(self, *, student, weight: float = 0.5):
            super().__init__(student=student)

    with pytest.raises(AttributeError, match="weight"):
        Forgetful(student=build()).describe()
