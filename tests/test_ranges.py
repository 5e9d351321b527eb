import pytest
from datasets import Dataset

from cliplab.benchmark import Benchmark, Protocol
from cliplab.build import build_protocol
from cliplab.config import Config, merge_config, read_overrides
from cliplab.errors import UserError
from cliplab.models.composers import COMPOSERS
from cliplab.ranges import check_lesson, check_ranges, metric_keys


def test_the_defaults_are_inside():
    check_ranges(Config())


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        "model.fixed_scale=0",
        "model.fixed_scale=101",
        "data.batch_size=0",
        "data.num_workers=-1",
        "data.feature_cache=''",
        "data.same_image=together",
        "data.categories=[dress,dress]",
        "zero_shot.split=validation",
        "zero_shot.every_n_epochs=-1",
        "optim.lr=0",
        "optim.lr=-1",
        "optim.lr=.nan",
        "optim.lr=.inf",
        "optim.weight_decay=-0.1",
        "optim.betas=[0.9]",
        "optim.betas=[0.9,1.5]",
        "optim.eps=-1",
        "optim.warmup=1.0",
        "optim.warmup=-0.1",
        "optim.schedule=square",
        "optim.lr_multipliers={composer: -1}",
        "optim.lr_multipliers={composer: .nan}",
        "trainer.max_epochs=0",
        "trainer.max_steps=0",
        "trainer.devices=-1",
        "trainer.matmul_precision=low",
        "trainer.gradient_clip_val=-1",
        "trainer.check_val_every_n_epoch=0",
    ],
)
def test_what_lies_outside_is_named(override):
    config = merge_config([("command line", read_overrides([override]))])
    with pytest.raises(UserError, match=f"^{override.split('=')[0]} must be "):
        check_ranges(config)


def test_zero_shot_happens_in_a_validation():
    given = ["trainer.check_val_every_n_epoch=2", "zero_shot.every_n_epochs=3"]
    with pytest.raises(UserError, match="zero_shot.every_n_epochs must be a multiple of .*epoch=2, got 3"):
        check_ranges(merge_config([("command line", read_overrides(given))]))
    check_ranges(merge_config([("command line", read_overrides([given[0], "zero_shot.every_n_epochs=4"]))]))


def lesson_of(*overrides: str) -> None:
    config = merge_config([("command line", read_overrides(overrides))])
    check_lesson(config, build_protocol(config), COMPOSERS)


FROZEN = "model.freeze=[temperature,image_encoder,text_encoder]"


def test_composers_that_learn_from_images_or_texts_need_frozen_towers():
    wanted = r"pic2word learns from images alone .*model.freeze=\[text_encoder,image_encoder\]"
    with pytest.raises(UserError, match=wanted):
        lesson_of("model.composer.name=pic2word", "model.freeze=[text_encoder]")
    lesson_of("model.composer.name=pic2word", FROZEN)
    lesson_of("model.composer.name=combiner")


def test_a_composer_whose_pairs_are_not_unit_vectors_names_its_loss():
    with pytest.raises(UserError, match="lincir is trained with loss.name=mse, not info_nce"):
        lesson_of("model.composer.name=lincir", FROZEN)
    lesson_of("model.composer.name=lincir", "loss.name=mse", FROZEN)
    lesson_of("model.composer.name=combiner", "loss.name=mse")


def test_a_validation_that_never_changes_stops_nothing():
    stopping, captions = "trainer.early_stopping_patience=2", "data.name=wardrobe_captions"
    with pytest.raises(UserError, match="early_stopping_patience.*set it to null"):
        lesson_of("model.composer.name=pic2word", FROZEN, captions, stopping)
    lesson_of("model.composer.name=pic2word", FROZEN, stopping)
    lesson_of(captions, stopping, "model.freeze=[image_encoder]")


def test_the_metrics_of_a_test_are_named_as_results_json_names_them():
    benchmark = Benchmark("dress", Protocol(), Dataset.from_dict({}), Dataset.from_dict({}), [], [])
    assert metric_keys("test", [benchmark], Protocol()) == [
        "test/dress/R@10",
        "test/dress/R@50",
        "test/mean/R@10",
        "test/mean/R@50",
        "test/mean/Avg",
    ]
