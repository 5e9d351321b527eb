import pytest

from cliplab.benchmark import PROTOCOLS
from cliplab.data.captions import EVAL_JOINS
from cliplab.data.templates import CIFAR, CLASS_WORDINGS, IMAGENET, PLAIN


@pytest.mark.parametrize(("templates", "least"), [(IMAGENET, 30), (CIFAR, 15), (PLAIN, 1)])
def test_templates_are_many_different_and_hold_one_place_for_the_name(templates: tuple[str, ...], least: int) -> None:
    assert len({template.lower() for template in templates}) == len(templates) >= least
    for template in templates:
        assert template.count("{}") == 1 and template.replace("{}", "").count("{") == 0
        assert template == " ".join(template.split()) and template.endswith(".")


def test_the_plain_set_is_the_plain_protocol() -> None:
    protocol = PROTOCOLS["zero_shot_plain"]
    wordings = EVAL_JOINS[protocol.caption_join](["t-shirt"], "")
    assert (
        [protocol.prompt.format(text) for text in wordings] == [PLAIN[0].format("t-shirt")] == ["a photo of a t-shirt."]
    )


@pytest.mark.parametrize("join", CLASS_WORDINGS)
def test_a_join_words_the_name_in_each_template(join: str) -> None:
    found = EVAL_JOINS[join](["a {curly} hat"], "ignored")
    assert found == [template.replace("{}", "a {curly} hat") for template in CLASS_WORDINGS[join]]


def test_every_set_has_its_protocol() -> None:
    joins = {protocol.caption_join for protocol in PROTOCOLS.values() if protocol.hit == "class"}
    assert joins == CLASS_WORDINGS.keys()
