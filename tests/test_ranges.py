import pytest
from datasets import Dataset

from cliplab.benchmark import Benchmark, Protocol
from cliplab.config import Config, merge_config, read_overrides
from cliplab.errors import UserError
from cliplab.ranges import check_ranges, metric_keys


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
        "optim.schedule=linear",
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


def test_the_metrics_of_a_test_are_named_as_results_json_names_them():
    benchmark = Benchmark("dress", Protocol(), Dataset.from_dict({}), Dataset.from_dict({}), [], [])
    assert metric_keys("test", [benchmark], Protocol()) == [
        "test/dress/R@10",
        "test/dress/R@50",
        "test/mean/R@10",
        "test/mean/R@50",
        "test/mean/Avg",
    ]
