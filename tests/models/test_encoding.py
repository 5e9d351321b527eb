import pytest
import torch
from torch import nn

from cliplab.models.encoding import evaluating, progress


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_whatever_happens(training: bool) -> None:
    module = nn.Sequential(nn.Dropout(0.5)).train(training)
    with pytest.raises(KeyError), evaluating(module):
        assert not module.training and not module[0].training and not torch.is_grad_enabled()
        raise KeyError
    assert module.training == module[0].training == training and torch.is_grad_enabled()


@pytest.mark.parametrize("shown", [True, False])
def test_all_steps_come_and_the_bar_is_no_output(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([3, 1, 2], "encoding", shown)) == [3, 1, 2]
    assert capsys.readouterr().out == ""
