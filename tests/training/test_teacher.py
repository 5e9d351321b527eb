import copy

import pytest
import torch

from cliplab.errors import UserError
from cliplab.losses.distillation import distillation
from cliplab.training.teacher import Teacher
from tests.training.test_module import Toy, make_module


def batch() -> dict:
    return next(iter(Toy(batches=1).train_dataloader()))


def test_outputs_are_the_teachers_own_without_gradients() -> None:
    model = make_module("sum").model
    with torch.no_grad():
        model.clip.logit_scale.fill_(1.25)
    teacher, given = Teacher(model), batch()
    (found,) = teacher.outputs(given, 1)
    torch.testing.assert_close(found["teacher_query"], model.encode_query(given["query"]))
    torch.testing.assert_close(found["teacher_target"], model.encode_target(given["target"]))
    assert found["teacher_scale"].item() == pytest.approx(torch.tensor(1.25).exp().item())
    assert not any(each.requires_grad for each in found.values())
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_other_numbers_of_pairs_are_refused() -> None:
    with pytest.raises(UserError, match=r"teacher: its composer compares 1 pair\(s\) a sample and model\.composer 2"):
        Teacher(make_module("sum").model).outputs(batch(), 2)


def test_a_module_learns_from_it_and_does_not_hold_it() -> None:
    module, plain = make_module("sum"), make_module("sum")
    teacher_model = make_module("sum").model
    with torch.no_grad():
        for parameter in teacher_model.parameters():
            parameter.add_(0.1)
    module.teacher = Teacher(teacher_model)
    module.loss, module.loss_inputs = distillation, frozenset(("scale", "score", "teacher_query", "teacher_target"))
    module.loss_inputs |= {"teacher_scale"}
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert len(list(module.parameters())) == len(list(plain.parameters()))
    assert module.train().teacher is not None and not teacher_model.training
    assert copy.deepcopy(module).teacher is module.teacher
    given = batch()
    pairs = module.model.training_pairs(given["query"], given["target"])
    found = module._loss_of(pairs[0], module._given(pairs, given)[0])
    (outputs,) = module.teacher.outputs(given, 1)
    torch.testing.assert_close(found, distillation(pairs[0].query, pairs[0].target, module.model.scale, **outputs))
