import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from spatialt2i.reward.scorer import SETTINGS, WEIGHTS, SpatialScore

WORDS = ("a red circle", "a blue square is left of a red circle",
         "On a lawn, a red circle is above a blue square. It is " * 3)


@pytest.fixture
def scorer(make_model):
    model = make_model()
    with torch.no_grad():
        for p in model.trainable().values():  # a fresh adapter changes nothing
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return SpatialScore(model, stats=(0.5, 2.0))


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    sizes = ((64, 64), (64, 64), (32, 128), (90, 70), (64, 64), (64, 64), (200, 150))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def texts(n):
    return [WORDS[i % 3] for i in range(n)]


def test_scores_do_not_depend_on_batch_or_order(scorer, pictures):
    one = []
    for image, text in zip(pictures, texts(7), strict=True):
        one.append(scorer.score(images=[image], prompts=[text]))
    for batch in (2, 7):
        scorer.batch = batch
        together = scorer.score(images=pictures, prompts=texts(7))
        np.testing.assert_allclose(together.mean, [s.mean[0] for s in one], atol=1e-5)
        np.testing.assert_allclose(together.std, [s.std[0] for s in one], atol=1e-5)
    back = scorer.score(images=pictures[::-1], prompts=texts(7)[::-1])
    np.testing.assert_allclose(back.mean[::-1], together.mean, atol=1e-5)


def test_any_form_of_image_scores_alike(scorer, pictures, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    data = io.BytesIO()
    pictures[0].save(data, "PNG")
    forms = [pictures[0], np.asarray(pictures[0]), data.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png")]
    means = scorer.score(images=forms, prompts=["a red circle"] * 5).mean
    np.testing.assert_allclose(means, means[0], atol=1e-6)


def test_normalized(scorer, pictures, pairs):
    raw = scorer.score(images=pictures[:1], prompts=[pairs[0].prompt])
    scaled = scorer.score(images=pictures[:1], prompts=[pairs[0].prompt], normalized=True)
    assert scaled.mean[0] == pytest.approx((raw.mean[0] - 0.5) / 2)
    assert scaled.std[0] == pytest.approx(raw.std[0] / 2)


def test_saved_and_read_scores_the_same(scorer, pictures, tmp_path):
    scorer.save_pretrained(tmp_path / "run" / "model")
    again = SpatialScore.from_pretrained(tmp_path / "run" / "model")
    assert again.stats == (0.5, 2.0)
    again.batch = scorer.batch
    np.testing.assert_array_equal(again.score(images=pictures, prompts=texts(7)).mean,
                                  scorer.score(images=pictures, prompts=texts(7)).mean)
    assert {p.name for p in (tmp_path / "run" / "model").iterdir()} == {WEIGHTS, SETTINGS}
    assert not json.loads((tmp_path / "run" / "model" / SETTINGS).read_text())["backbone_path"].startswith("/")


def test_nothing_to_score(scorer):
    assert scorer.score(images=[], prompts=[]).mean.shape == (0,)


def test_keyword_only(scorer, pictures):
    with pytest.raises(TypeError):
        scorer.score(pictures, texts(7))


def test_training_mode_is_left_as_it_was(scorer, pictures):
    scorer.model.train()
    scorer.score(images=pictures[:1], prompts=["a red circle"])
    assert scorer.model.training


@pytest.mark.parametrize(("image", "message"), [
    (b"\x89PNG\r\n\x1a\nnothing", "image 1: not a readable image"),
    ("missing.png", "image 1 .missing.png.: there is no such image file"),
    (np.zeros((4, 4), np.uint8), r"image 1: expected a uint8 array \[H, W, 3\], got uint8 \[4, 4\]"),
])
def test_bad_image(scorer, pictures, image, message):
    with pytest.raises(ValueError, match=message):
        scorer.score(images=[pictures[0], image], prompts=texts(2))


def test_bad_prompts(scorer, pictures, pairs):
    with pytest.raises(ValueError, match="1 images and 2 prompts"):
        scorer.score(images=pictures[:1], prompts=texts(2))
    with pytest.raises(ValueError, match="prompt 0: the prompt is empty"):
        scorer.score(images=pictures[:1], prompts=[""])
    with pytest.raises(ValueError, match=r"prompt 1: the prompt holds the special token <\|Reward\|>"):
        scorer.score(images=pictures[:2], prompts=["a red circle", "a <|Reward|>"])


def test_bad_folders(scorer, tmp_path, backbone):
    with pytest.raises(FileNotFoundError, match="not a SpatialScore"):
        SpatialScore.from_pretrained(backbone)
    folder = tmp_path / "model"
    scorer.save_pretrained(folder)
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(settings | {"fingerprint": "0"}))
    with pytest.raises(ValueError, match="trained on another body"):
        SpatialScore.from_pretrained(folder)
    (folder / SETTINGS).write_text(json.dumps(settings | {"backbone_path": "../gone"}))
    with pytest.raises(FileNotFoundError, match="its body is not at .* any more"):
        SpatialScore.from_pretrained(folder)
    assert SpatialScore.from_pretrained(folder, backbone=backbone).stats == (0.5, 2.0)
    (folder / SETTINGS).write_text(json.dumps(settings | {"config": settings["config"] | {"lora_rank": 8}}))
    with pytest.raises(ValueError, match="does not fit this model"):
        SpatialScore.from_pretrained(folder)
    (folder / SETTINGS).write_text(json.dumps(settings))
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:len(data) // 2])
    with pytest.raises(OSError, match="damaged"):
        SpatialScore.from_pretrained(folder)
