import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, SiglipModel

from cliplab import Encoder, UserError
from tests.hugging_face import clip_ids, make_model, saved


@pytest.fixture(scope="module")
def theirs():
    return make_model(CLIPModel)


@pytest.fixture(scope="module")
def encoder(theirs, tmp_path_factory) -> Encoder:
    return Encoder.from_pretrained(saved(theirs, tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """Twelve noisy files of odd sizes, some in a sub-folder, and one that is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    paths = []
    for number in range(12):
        noise = torch.randint(0, 256, (33 + number, 50 - number, 3), generator=torch.Generator().manual_seed(number))
        path = folder / ("more" if number % 3 == 0 else ".") / f"{number:02}.png"
        Image.fromarray(noise.to(torch.uint8).numpy()).save(path)
        paths.append(str(path))
    (folder / "notes.txt").write_text("no picture")
    return paths


class TestEncode:
    def test_chooses_by_what_is_given(self, encoder, pictures):
        texts = ["a red dress", "a hat"]
        images, words = encoder.encode(images=pictures[:2]), encoder.encode(text=texts)
        both = encoder.encode(images=pictures[:2], text=texts)
        assert images.shape == words.shape == both.shape == (2, 24)
        for vectors in (images, words, both):
            assert not vectors.requires_grad and vectors.dtype == torch.float32
            torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
        torch.testing.assert_close(images, encoder.encode_image(pictures[:2]).detach())
        torch.testing.assert_close(words, encoder.encode_text(texts).detach())
        torch.testing.assert_close(both, encoder.encode_multimodal(pictures[:2], texts).detach())

    def test_composed_queries_sum_features_that_are_not_normalised(self, encoder, theirs, pictures):
        texts = ["is blue", "has longer sleeves"]
        pixels, tokens, kind = encoder.data_process(pictures[:2], texts)
        assert kind == "multimodal"
        image = theirs.get_image_features(pixels).pooler_output
        text = theirs.get_text_features(tokens["input_ids"]).pooler_output
        expected = F.normalize(image + text, dim=-1)
        wrong = F.normalize(F.normalize(image, dim=-1) + F.normalize(text, dim=-1), dim=-1)
        found = encoder.encode(pictures[:2], texts)
        assert (found - expected).abs().max() <= 1e-5 < (found - wrong).abs().max()

    def test_one_input_of_every_kind(self, encoder, pictures):
        with Image.open(pictures[1]) as picture:
            opened = picture.copy()
        for one in (pictures[1], Path(pictures[1]), opened):
            torch.testing.assert_close(encoder.encode(images=one), encoder.encode(images=[pictures[1]]))
        assert encoder.encode(text="a hat").shape == encoder.encode(opened, "a hat").shape == (1, 24)

    def test_batches_change_nothing(self, encoder, pictures):
        whole = encoder.encode(pictures, [f"number {n}" for n in range(12)])
        parts = encoder.encode(pictures, [f"number {n}" for n in range(12)], batch_size=5)
        torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)

    def test_texts_are_sorted_by_length_and_given_back_in_order(self, encoder, monkeypatch):
        texts = ["a b c d e f g h", "a", "a b c d e", "a b", "a b c d e f", "a b c"]
        batches, tokenize = [], encoder._ids
        monkeypatch.setattr(encoder, "_ids", lambda part, cut: batches.append(part) or tokenize(part, cut))
        found = encoder.encode(text=texts, batch_size=2)
        assert batches == [["a", "a b"], ["a b c", "a b c d e"], ["a b c d e f", "a b c d e f g h"]]
        monkeypatch.undo()
        one_by_one = torch.cat([encoder.encode(text=text) for text in texts])
        torch.testing.assert_close(found, one_by_one, rtol=0, atol=1e-6)

    def test_long_texts_are_cut_with_one_warning(self, encoder):
        long = "very " * 100 + "long"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            vectors = encoder.encode(text=["short", *[long] * 9], batch_size=2)
        assert vectors.shape == (10, 24)
        assert [str(w.message).split(":")[0] for w in caught] == ["9 text(s) longer than 77 tokens were cut"]

    def test_a_text_that_just_fits_is_not_warned_of(self, encoder):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encoder.encode(text="a " * 75)
        with pytest.warns(UserWarning, match="longer than 77"):
            encoder.encode(text="a " * 76)

    def test_evaluates_and_leaves_the_mode_as_it_was(self, encoder, pictures):
        encoder.train()
        encoder.encode(pictures[0])
        assert encoder.training and encoder.model.visual.training
        encoder.eval()

    @pytest.mark.parametrize(
        ("images", "text", "message"),
        [
            (None, None, "nothing to encode"),
            ([], None, "the list is empty"),
            (None, [1], "text must be a str or a list of str, got int"),
            (3.5, None, "images must be a path, a picture or a list of them, got float"),
            (["a.png", None], None, "got NoneType"),
            (["a.png"], "one", "both be one or both be lists"),
            ("a.png", ["one"], "both be one or both be lists"),
            (["a.png", "b.png"], ["one"], "2 images and 1 texts"),
            ("nowhere.png", None, "no image file nowhere.png"),
        ],
    )
    def test_mismatched_input_is_one_clear_error(self, encoder, images, text, message):
        with pytest.raises(UserError, match=message):
            encoder.encode(images, text)

    def test_a_damaged_picture_is_named(self, encoder, tmp_path):
        (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
        with pytest.raises(UserError, match="broken.jpg"):
            encoder.encode([str(tmp_path / "broken.jpg")])

    def test_a_batch_is_one_or_more(self, encoder):
        with pytest.raises(UserError, match="batch_size"):
            encoder.encode(text="a", batch_size=-1)

    def test_composed_inputs_of_other_lengths(self, encoder):
        with pytest.raises(UserError, match="3 images and 1 texts"):
            encoder.encode_multimodal(torch.randn(3, 3, 32, 32), ["red"])


class TestForward:
    @pytest.mark.parametrize("kind", [CLIPModel, SiglipModel])
    @pytest.mark.parametrize("mask", ["none", "right", "left"])
    def test_equals_transformers(self, kind, mask, tmp_path):
        theirs = make_model(kind, seed=4)
        ours = Encoder.from_pretrained(saved(theirs, tmp_path))
        pixels = torch.randn(4, 3, 32, 32)
        ids = clip_ids(4) if kind is CLIPModel else torch.randint(0, 300, (4, 64))
        given = {"input_ids": ids, "pixel_values": pixels, "return_loss": True}
        if mask != "none":
            attention_mask = torch.ones_like(ids)
            attention_mask[:, 40:] = 0 if mask == "right" else 1
            attention_mask[:, :2] = 0 if mask == "left" else 1
            given["attention_mask"] = attention_mask
        found, expected = ours(**given), theirs(**given)
        for key in ("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
            assert found[key].shape == expected[key].shape
            assert (found[key] - expected[key]).abs().max() <= 1e-5, key

    def test_gradients_of_the_loss(self, encoder, theirs):
        given = {"input_ids": clip_ids(4), "pixel_values": torch.randn(4, 3, 32, 32), "return_loss": True}
        theirs.zero_grad()
        encoder.zero_grad()
        theirs(**given).loss.backward()
        encoder(**given).loss.backward()
        packed = encoder.model.visual.transformer.resblocks[0].attn.in_proj_weight.grad
        layer = theirs.vision_model.encoder.layers[0].self_attn
        apart = torch.cat([layer.q_proj.weight.grad, layer.k_proj.weight.grad, layer.v_proj.weight.grad])
        assert (packed - apart).norm() <= 1e-4 * apart.norm()
        ours = encoder.model.logit_scale.grad
        assert (ours - theirs.logit_scale.grad).abs() <= 1e-4 * theirs.logit_scale.grad.abs()

    def test_position_ids(self, encoder, theirs):
        ids, positions = clip_ids(2), torch.arange(77).flip(0).expand(2, -1)
        found = encoder.get_text_features(ids, position_ids=positions)
        expected = theirs.get_text_features(ids, position_ids=positions).pooler_output
        assert (found - expected).abs().max() <= 1e-5 < (found - encoder.get_text_features(ids)).abs().max()

    def test_no_loss_unless_asked(self, encoder):
        assert encoder(clip_ids(1), torch.randn(3, 3, 32, 32)).loss is None

    def test_checkpointing_recomputes_both_towers(self, encoder):
        calls: list[str] = []
        towers = {"image": encoder.model.visual.transformer, "text": encoder.model.transformer}
        hooks = [
            tower.resblocks[0].register_forward_pre_hook(lambda *_, name=name: calls.append(name))
            for name, tower in towers.items()
        ]
        for enable, expected in (("enable", 2), ("disable", 1)):
            getattr(encoder, f"gradient_checkpointing_{enable}")()
            calls.clear()
            encoder(clip_ids(2), torch.randn(2, 3, 32, 32), return_loss=True).loss.backward()
            assert calls.count("image") == calls.count("text") == expected
        for hook in hooks:
            hook.remove()


class TestSearch:
    def test_finds_a_picture_by_itself_and_sorts_by_cosine(self, encoder, pictures):
        assert encoder.index(Path(pictures[1]).parent) == 12
        best = encoder.search(images=pictures[4], k=12)
        assert best.paths[0] == pictures[4] and best.scores[0] == pytest.approx(1, abs=1e-5)
        assert sorted(best.paths) == sorted(pictures) and best.scores == sorted(best.scores, reverse=True)
        cosines = encoder.encode(images=pictures) @ encoder.encode(images=pictures[4])[0]
        assert best.scores == pytest.approx(cosines.sort(descending=True).values.tolist(), abs=1e-5)

    def test_lists_of_queries_give_lists_of_results(self, encoder, pictures):
        encoder.index(Path(pictures[1]).parent)
        results = encoder.search(text=["one", "two"], k=3)
        assert isinstance(results, list) and [len(r.paths) for r in results] == [3, 3]
        assert encoder.search(text="one", k=3).paths == results[0].paths
        assert len(encoder.search(pictures[:2], ["a", "b"], k=100)[0].paths) == 12

    def test_says_what_is_missing(self, theirs, encoder, tmp_path):
        fresh = Encoder(encoder.model, encoder.preprocess, encoder.tokenizer)
        with pytest.raises(UserError, match="call index"):
            fresh.search(text="a")
        with pytest.raises(UserError, match="no folder"):
            fresh.index(tmp_path / "nowhere")
        with pytest.raises(UserError, match="holds no pictures"):
            fresh.index(tmp_path)
        with pytest.raises(UserError, match="k must be 1 or more"):
            encoder.search(text="a", k=0)


def test_set_processor_takes_what_another_folder_says(encoder, tmp_path):
    saved(make_model(CLIPModel), tmp_path)
    half = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2}'
    (tmp_path / "preprocessor_config.json").write_text(half)
    other = Encoder(encoder.model, encoder.preprocess, encoder.tokenizer)
    other.set_processor(tmp_path)
    assert other.preprocess.config.mean == (0.5, 0.5, 0.5) and other.preprocess.config.interpolation == "bilinear"
    assert encoder.preprocess.config.mean != (0.5, 0.5, 0.5)


def test_a_repository_may_be_named_plainly():
    with pytest.raises(UserError, match="Hugging Face repository 'BAAI/BGE-VL-nowhere'"):
        Encoder.from_pretrained("BAAI/BGE-VL-nowhere")


def test_openais_names_are_no_repositories():
    assert Encoder.from_pretrained("ViT-B/32", device="meta").model.embed_dim == 512
