"""What a network says of images, and how good that is."""

import pytest
import torch
from torch.testing import assert_close

from hdkd_lib import metrics
from hdkd_lib.evaluation import evaluate, predict
from hdkd_lib.methods import Supervised


def test_predict_gives_probabilities_in_eval_mode_and_restores_the_mode(make_task, digits):
    task = make_task().train()
    before = {name: value.clone() for name, value in task.student.state_dict().items()}
    whole = predict(task, digits.test)
    assert_close(whole.sum(1), torch.ones(60))
    assert_close(predict(task, digits.test, batch_size=7), whole)
    assert task.training
    assert_close(task.student.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["hdkd_student_nano", "test_resnet"])
def test_evaluate_measures_a_network_from_elsewhere_on_the_part_asked_for(name, build, digits):
    measured = []
    for part in ("train", "val", "test"):
        measured.append(evaluate(build(name), digits, part, device="cpu", precision="float32"))
        chosen = getattr(digits, part)
        probabilities = predict(Supervised(student=build(name)), chosen)
        assert measured[-1] == metrics.classification(probabilities, chosen.labels)
    assert evaluate(build(name), digits, device="cpu", precision="float32") == measured[-1]
    assert len({scores["nll"] for scores in measured}) == 3


def test_evaluate_refuses_a_network_for_other_classes(build, digits):
    with pytest.raises(ValueError, match="the network has 7 classes and digits has 10; create it with num_classes=10"):
        evaluate(build(num_classes=7), digits, device="cpu", precision="float32")
