import torch

from cliplab.models.composers.baselines import ImageOnly, TextOnly


def test_they_are_one_input_normalized() -> None:
    torch.manual_seed(0)
    reference = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    text = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for composer, used, other in ((ImageOnly(), reference, text), (TextOnly(), text, reference)):
        query, cotangent = composer.compose(reference, text), torch.randn(4, 6, dtype=torch.float64)
        expected = used / used.pow(2).sum(-1, keepdim=True).sqrt()
        torch.testing.assert_close(query, expected)
        gradients = torch.autograd.grad((query * cotangent).sum(), (used, other), allow_unused=True)
        (wanted,) = torch.autograd.grad((expected * cotangent).sum(), used)
        torch.testing.assert_close(gradients[0], wanted)
        assert gradients[1] is None
        assert not list(composer.parameters()) and composer.output == "vector"
