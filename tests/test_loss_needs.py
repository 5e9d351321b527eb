import pytest

from cliplab import build
from cliplab.config import load_config
from cliplab.errors import UserError
from cliplab.loss_needs import check_loss, taken_by
from cliplab.losses import LOSS_INPUTS, LOSSES

CAPTIONS = ["model.composer=null", "data.name=wardrobe_captions"]


def test_what_a_loss_takes() -> None:
    assert taken_by("info_nce") == {"query", "target", "scale", "score", "symmetric", "target_id"}
    for name in LOSSES:
        assert {"query", "target"} <= taken_by(name)
        assert (taken_by(name) & set(LOSS_INPUTS)) < set(LOSS_INPUTS)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("reference_negative", "distillation")])
@pytest.mark.parametrize("given", [[], CAPTIONS])
def test_most_losses_serve_both_tasks(tiny_config, name, given) -> None:
    build.check_parts(load_config(tiny_config, [f"loss={name}", *given]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["loss=reference_negative", *CAPTIONS], "'reference_negative' needs reference images and model.composer is"),
        (["loss=soft_triplet", "model.composer=artemis"], "'soft_triplet' compares vectors, and the composer artemis"),
        (["loss=distillation"], "'distillation' needs a teacher: set teacher.arch"),
        (["teacher.arch=ViT-B-32"], "teacher.arch=ViT-B-32: the loss info_nce has no teacher; use distillation"),
        (["data.hard_negatives=2"], "data.hard_negatives=2: the loss info_nce takes none; use reference_negative"),
        (["loss=hard_negative_nce", "data.same_image=positives"], "the loss hard_negative_nce has one positive"),
        (["loss={name: sigmoid, bias: 1}"], "loss 'sigmoid' has no option 'bias'"),
        (["loss={name: soft_triplet, negatives: 1}"], "loss 'soft_triplet' has no option 'negatives'"),
    ],
)
def test_mistakes_name_the_loss(tiny_config, given, said) -> None:
    with pytest.raises(UserError, match=said):
        build.check_parts(load_config(tiny_config, given))


def test_a_loss_of_vectors_refuses_a_composer_that_scores(tiny_config) -> None:
    for loss in ("mse", "soft_triplet"):
        with pytest.raises(UserError, match=f"loss '{loss}' compares vectors, and the composer artemis scores jointly"):
            check_loss(load_config(tiny_config, ["model.composer=artemis", f"loss={loss}"]))


def test_a_composer_without_references_gives_none(tiny_config, monkeypatch) -> None:
    from cliplab.models.composers import COMPOSERS

    monkeypatch.setitem(COMPOSERS, "words", type("Words", (COMPOSERS["sum"],), {"learns_from": "texts"}))
    config = load_config(tiny_config, ["loss=reference_negative", "model.composer=words"])
    with pytest.raises(UserError, match="'reference_negative' needs reference images and words learns without them"):
        check_loss(config)


def test_hard_negatives_need_a_data_set_that_names_them(tiny_config) -> None:
    config = load_config(tiny_config, ["loss=reference_negative", "data.hard_negatives=2"])
    with pytest.raises(UserError, match=r"data\.hard_negatives: data\.name=wardrobe names none; data\.name=triplets"):
        build.check(config)
    build.check(config, train=False)
