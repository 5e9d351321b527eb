import json
from dataclasses import asdict, fields, replace

import pytest
from datasets import Dataset

from cliplab.benchmark import PROTOCOLS, Benchmark, Protocol, make_protocol, metric_names
from cliplab.data.captions import EVAL_JOINS, training_samples
from cliplab.errors import UserError

# gallery, exclude_reference, caption_join, query_unit, prompt, recall_at: as the methods' released code has them
TABLE = {
    "clip4cir": ("original_split", False, "and_cap", "record", "{}", (10, 50)),
    "bi_blip4cir": ("original_split", False, "and_cap", "record", "{}", (10, 50)),
    "candidate_reranking": ("original_split", False, "and_cap", "record", "{}", (10, 50)),
    "sprc": ("original_split", False, "and_cap", "record", "{}", (10, 50)),
    "searle": ("original_split", False, "both_orders_mean", "record", "a photo of $ that {}", (10, 50)),
    "lincir": ("original_split", False, "both_orders_mean", "record", "a photo of $ that {}", (10, 50)),
    "pic2word": ("original_split", False, "star_reversed", "record", "{}", (10, 50)),
    "bge_vl": ("original_split", False, "comma_and", "record", "{}", (10, 50)),
    "covr": ("original_split", True, "and_precaption", "record", "{}", (10, 50)),
    "artemis": ("original_split", True, "both_orders_separate", "order", "{}", (10, 50)),
    "val": ("val_split", True, "each_caption", "caption", "{}", (1, 10, 50)),
    "composeae": ("all", False, "category_it", "record", "{}", (10, 50)),
    "clip_benchmark": ("original_split", False, "each_caption", "caption", "{}", (1, 5, 10)),
    "zero_shot_imagenet": ("original_split", False, "imagenet_templates", "record", "{}", (1, 5)),
    "zero_shot_cifar": ("original_split", False, "cifar_templates", "record", "{}", (1, 5)),
    "zero_shot_plain": ("original_split", False, "class_name", "record", "a photo of a {}.", (1, 5)),
}
CLASSES = {"zero_shot_imagenet", "zero_shot_cifar", "zero_shot_plain"}
TRAIN_JOINS = dict.fromkeys(CLASSES, "random1") | {
    "clip4cir": "random4_cap",
    "bi_blip4cir": "random4_cap",
    "candidate_reranking": "random4_cap",
    "sprc": "random4_cap",
    "covr": "and_precaption",
    "artemis": "both_orders_separate",
    "val": "each_caption",
    "composeae": "category_it",
    "clip_benchmark": "random1",
}


@pytest.mark.parametrize("name", sorted(TABLE.keys() | PROTOCOLS.keys()))
def test_each_protocol_is_as_released(name: str) -> None:
    found = PROTOCOLS[name]
    own = (found.gallery, found.exclude_reference, found.caption_join, found.query_unit, found.prompt, found.recall_at)
    assert own == TABLE[name]
    hits = {"clip_benchmark": "any_positive"} | dict.fromkeys(TABLE.keys() & CLASSES, "class")
    assert found.hit == hits.get(name, "single_target")
    assert (found.ties, found.missing_images) == ("pessimistic", "error")
    assert found.train_join == TRAIN_JOINS.get(name, found.train_join)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_each_protocol_names_joins_that_exist(name: str) -> None:
    protocol = PROTOCOLS[name]
    assert protocol.caption_join in EVAL_JOINS
    assert training_samples(protocol.train_join, ["a", "b"], "dress")


def test_a_named_protocol_is_its_row_under_its_name() -> None:
    for name, row in PROTOCOLS.items():
        assert make_protocol({"name": name}) == replace(row, name=name)


def test_changed_fields_are_in_the_name() -> None:
    changed = make_protocol({"name": "clip4cir", "recall_at": [1, 5], "gallery": "val_split"})
    assert changed == replace(
        PROTOCOLS["clip4cir"],
        gallery="val_split",
        recall_at=(1, 5),
        name="clip4cir (gallery=val_split, recall_at=(1, 5))",
    )


def test_a_field_set_to_what_it_is_changes_no_name() -> None:
    part = {"name": "val", "gallery": "val_split", "exclude_reference": True, "recall_at": [1, 10, 50]}
    assert make_protocol(part) == make_protocol({"name": "val"})
    assert make_protocol({**part, "ties": "mean"}).name == "val (ties=mean)"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"name": "clip4cr"}, "unknown protocol 'clip4cr': did you mean 'clip4cir'?"),
        ({}, "unknown protocol 'None'"),
        ({"name": "zero_shot_imagnet"}, "did you mean 'zero_shot_imagenet'?"),
        ({"name": "val", "galery": "all"}, "protocol 'val' has no option 'galery': did you mean 'gallery'?"),
        ({"name": "val", "gallery": "everything"}, "protocol 'val': option 'gallery' must be .*'original_split'"),
        ({"name": "val", "exclude_reference": 1}, "option 'exclude_reference' must be bool, got 1"),
        ({"name": "val", "recall_at": 10}, "option 'recall_at' must be .*, got 10"),
        ({"name": "val", "recall_at": [10, 0.5]}, "option 'recall_at' must be "),
        ({"name": "val", "ties": "random"}, "option 'ties' must be .*'pessimistic'"),
        ({"name": "val", "missing_images": "skip"}, "option 'missing_images' must be .*'report'"),
    ],
)
def test_a_wrong_protocol_teaches(part: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        make_protocol(part)


@pytest.mark.parametrize(
    ("name", "join", "owners"),
    [
        ("clip4cir", "imagenet_templates", "zero_shot_imagenet"),
        ("clip_benchmark", "class_name", "zero_shot_plain"),
        ("zero_shot_plain", "category_it", "composeae"),
    ],
)
def test_wordings_of_classes_are_for_classes(name: str, join: str, owners: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' can't have caption_join={join}; it belongs to: {owners}"):
        make_protocol({"name": name, "caption_join": join})
    changed = make_protocol({"name": "zero_shot_plain", "caption_join": "cifar_templates", "prompt": "{}"})
    assert changed.name == "zero_shot_plain (caption_join=cifar_templates, prompt={})"


@pytest.mark.parametrize("recall_at", [[], [0], [-1, 10]])
def test_recalls_are_at_one_or_more(recall_at: list[int]) -> None:
    with pytest.raises(UserError, match="recall_at"):
        make_protocol({"name": "val", "recall_at": recall_at})


@pytest.mark.parametrize("option", ["map_at", "subset_at"])
def test_map_and_subset_recall_are_at_one_or_more_or_not_at_all(option: str) -> None:
    assert getattr(make_protocol({"name": "val", option: [5, 10]}), option) == (5, 10)
    assert make_protocol({"name": "val", option: []}) == make_protocol({"name": "val"})
    with pytest.raises(UserError, match=f"{option} must name ranks from 1 to 2147483647, got \\[0\\]"):
        make_protocol({"name": "val", option: [0]})


@pytest.mark.parametrize("prompt", ["a photo of", "a photo of {thing}", "a {} and {}", "{"])
def test_a_prompt_has_one_place_for_the_text(prompt: str) -> None:
    with pytest.raises(UserError, match="prompt"):
        make_protocol({"name": "val", "prompt": prompt})


def test_as_dict_is_plain_builtins() -> None:
    protocol = make_protocol({"name": "val"})
    plain = protocol.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert set(plain) == {item.name for item in fields(Protocol)}
    assert Protocol(**{key: tuple(v) if isinstance(v, list) else v for key, v in plain.items()}) == protocol
    assert asdict(protocol)["recall_at"] == (1, 10, 50)


def benchmark(query_ids: list[int], references: list[int], count: int) -> Benchmark:
    rows = len(query_ids)
    queries = {"query_id": query_ids, "reference_id": references, "image": [None] * rows, "text": ["t"] * rows}
    gallery = {"id": ["a", "b", "c"], "image": ["a", "b", "c"], "text": [None] * 3}
    positives, names = [[0]] * count, [str(number) for number in range(count)]
    return Benchmark(
        "dress", Protocol(), Dataset.from_dict(queries), Dataset.from_dict(gallery), positives, names, excluded={}
    )


def test_references_are_by_query_not_by_row() -> None:
    assert benchmark([0, 1, 2], [2, -1, 0], 3).references() == [2, -1, 0]
    assert benchmark([1, 1, 0, 0, 2, 2], [2, 2, 1, 1, -1, -1], 3).references() == [1, 2, -1]
    assert benchmark([], [], 0).references() == []


def test_directions_are_the_benchmark_and_its_transpose() -> None:
    one, other = benchmark([0], [0], 1), benchmark([0], [-1], 1)
    assert one.directions == (one,)
    both = replace(one, transpose=other)
    assert both.directions == (both, other)


@pytest.mark.parametrize("option", ["recall_at", "map_at", "subset_at"])
def test_ranks_that_no_tensor_holds(option: str) -> None:
    assert getattr(make_protocol({"name": "clip4cir", option: [2**31 - 1]}), option) == (2**31 - 1,)
    with pytest.raises(UserError, match=f"{option} must name ranks from 1 to 2147483647, got .99999999999999999999"):
        make_protocol({"name": "clip4cir", option: [99999999999999999999]})
    with pytest.raises(UserError, match="captions_per_image must be from 1 to 2147483647, got 2147483648"):
        make_protocol({"name": "clip_benchmark", "captions_per_image": 2**31})


def test_captions_per_image_are_one_or_more() -> None:
    found = make_protocol({"name": "clip_benchmark", "captions_per_image": 5})
    assert (found.captions_per_image, found.name) == (5, "clip_benchmark (captions_per_image=5)")
    assert make_protocol({"name": "clip_benchmark", "captions_per_image": None}).name == "clip_benchmark"
    with pytest.raises(UserError, match="'clip_benchmark': captions_per_image must be from 1 to 2147483647, got 0"):
        make_protocol({"name": "clip_benchmark", "captions_per_image": 0})


def test_a_change_without_effect_is_refused() -> None:
    part = {"name": "clip4cir", "prompt": "a {}", "captions_per_image": 5}
    message = "'clip4cir': captions_per_image=5 changes nothing on the data set shoes; fields that do: prompt, ties$"
    with pytest.raises(UserError, match=message):
        make_protocol(part, effective=("prompt", "ties"), dataset="shoes")
    part["captions_per_image"] = None  # as it is
    assert make_protocol(part, effective=("prompt",)).name == "clip4cir (prompt=a {})"


def test_names_of_what_a_protocol_reports():
    assert metric_names((1, 5)) == ["R@1", "R@5"]
    assert metric_names((1,), (1, 2), (5,)) == ["R@1", "Rsubset@1", "Rsubset@2", "mAP@5"]
