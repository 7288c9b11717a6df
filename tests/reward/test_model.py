import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from spatialt2i.core.config import RewardConfig
from spatialt2i.reward.model import REWARD_TOKEN, RewardHead, SpatialScoreModel
from spatialt2i.reward.pixels import PixelReader, decode
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil


def inputs_of(model, pairs):
    pictures = [decode(data, "x") for p in pairs for data in (p.chosen, p.rejected)]
    texts = [t for t in model.tokenize([p.prompt.text for p in pairs]) for _ in range(2)]
    return model.collate(pictures, texts)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (80, 50), (200, 120)])
def test_patches_equal_the_processors(backbone, size):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(3)]
    reader = PixelReader(Qwen2VLImageProcessorPil.from_pretrained(backbone), max_pixels=4096)
    expected = reader.processor(images=[Image.fromarray(i) for i in images], return_tensors="pt")
    patches, grids = reader(images)
    assert torch.equal(patches, expected["pixel_values"])
    assert torch.equal(grids, expected["image_grid_thw"])


@pytest.mark.parametrize(("size", "budget", "expected"), [
    ((64, 64), 4096, (64, 64)), ((128, 128), 4096, (64, 64)), ((32, 32), 4096, (64, 64)), ((64, 16), 4096, (128, 32)),
    ((256, 256), 200_704, (448, 448)), ((512, 256), 200_704, (644, 336)), ((1024, 1024), 200_704, (448, 448))])
def test_every_picture_is_resized_to_the_budget_and_keeps_its_aspect(backbone, size, budget, expected):
    processor = Qwen2VLImageProcessorPil.from_pretrained(backbone)
    if budget > 4096:
        processor.patch_size, processor.merge_size = 14, 2
    patches, grids = PixelReader(processor, max_pixels=budget)([np.zeros((*size, 3), np.uint8)])
    assert tuple(processor.patch_size * n for n in grids[0, 1:].tolist()) == expected
    assert len(patches) == grids.prod()


def test_mixed_sizes_keep_their_order(backbone):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((64, 64), (128, 32), (64, 64), (90, 70))]
    reader = PixelReader(Qwen2VLImageProcessorPil.from_pretrained(backbone), max_pixels=4096)
    patches, grids = reader(images)
    expected = reader.processor(images=[Image.fromarray(i) for i in images], return_tensors="pt")
    assert torch.equal(patches, expected["pixel_values"]) and torch.equal(grids, expected["image_grid_thw"])


def test_hidden_state_equals_the_stock_forward(make_model, pairs):
    """Ragged texts, pictures of two sizes: one row of ours is what the stock class computes for that row alone."""
    model = make_model(lora_rank=0)
    pictures = [decode(pairs[0].chosen, "x"), np.zeros((32, 128, 3), np.uint8)]
    texts = model.tokenize([pairs[0].prompt.text, "a red circle"])
    inputs = model.collate(pictures, texts)
    body = model.backbone.model
    seen = []
    model.head.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(inputs)
    table = body.get_input_embeddings().weight
    reward = model.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
    table.data[reward] = model.token.data
    at = 0
    for i, n in enumerate(inputs.grids.prod(-1).tolist()):
        ids = inputs.input_ids[i:i + 1, :inputs.reward_at[i] + 1]
        types = (ids == model.backbone.config.image_token_id).int()
        stock = body(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types,
                     pixel_values=inputs.patches[at:at + n], image_grid_thw=inputs.grids[i:i + 1]).last_hidden_state
        at += n
        torch.testing.assert_close(seen[0][i], stock[0, -1], atol=1e-5, rtol=1e-4)


def test_every_trainable_parameter_moves_and_no_frozen_one_does(make_model, pairs):
    model = make_model(train_vision=True, train_merger=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2)
    for _ in range(3):  # lora_A has no gradient before lora_B has moved
        mu, log_sigma = model(inputs_of(model, pairs[:2]))
        (torch.nn.functional.softplus(mu[1::2] - mu[::2]).sum() + log_sigma.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    names = set(model.trainable())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in names), name
    assert any("lora_A" in n for n in names) and any("visual" in n for n in names) and "token" in names


@pytest.mark.parametrize(("vision", "merger"), [(False, False), (False, True), (True, False)])
def test_only_what_was_asked_for_trains(make_model, vision, merger):
    names = set(make_model(train_vision=vision, train_merger=merger).trainable())
    assert any(".visual.blocks" in n for n in names) == vision
    assert any(".visual.merger" in n for n in names) == merger
    assert not any("embed_tokens" in n or "lm_head" in n for n in names)


def test_only_the_reward_row_feels_the_token(make_model, pairs):
    """The table is frozen even where embeddings are tied, and the spliced row changes the score."""
    model = make_model()
    assert model.backbone.config.tie_word_embeddings
    inputs = inputs_of(model, pairs[:1])
    mu, _ = model(inputs)
    mu.sum().backward()
    assert model.backbone.model.get_input_embeddings().weight.grad is None
    assert model.token.grad.abs().sum() > 0
    with torch.no_grad():
        model.token.add_(torch.randn_like(model.token))
    assert not torch.allclose(model(inputs)[0], mu)


def test_the_token_is_added_where_it_is_missing(backbone, make_model, tmp_path):
    folder = tmp_path / "without"
    shutil.copytree(backbone, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            (folder / name).write_text((folder / name).read_text().replace(REWARD_TOKEN, "<|other|>"))
    model = SpatialScoreModel.from_backbone(folder, config=make_model().config, seed=0)
    row = model.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
    assert row >= model.backbone.config.text_config.vocab_size  # beyond the table, which need not grow
    mu, _ = model(model.collate([np.zeros((64, 64, 3), np.uint8)], model.tokenize(["a red circle"])))
    assert torch.isfinite(mu).all()
    with pytest.raises(ValueError, match="special token"):
        model.tokenize([f"a {REWARD_TOKEN}"])


@pytest.mark.parametrize("part", ["language_model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.qkv"])
def test_the_fingerprint_sees_both_towers_and_no_precision(make_model, backbone, tmp_path, part):
    known = make_model().fingerprint
    assert make_model(dtype="bfloat16").fingerprint == make_model(seed=1, lora_rank=0).fingerprint == known
    body = Qwen2_5_VLForConditionalGeneration.from_pretrained(backbone)
    with torch.no_grad():
        body.model.get_submodule(part).weight[0, 0] += 1
    shutil.copytree(backbone, tmp_path / "other")
    body.save_pretrained(tmp_path / "other")
    config = make_model().config
    assert SpatialScoreModel.from_backbone(tmp_path / "other", config=config, seed=0).fingerprint != known


def test_head_ignores_autocast_and_scales_dropout():
    config = RewardConfig(head_width=2000, head_hidden=8, head_dropout=0.5)
    torch.manual_seed(0)
    head, x = RewardHead(16, config), torch.randn(4, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mu, log_sigma = head(x)
    assert mu.dtype == log_sigma.dtype == torch.float32
    assert torch.equal(mu, head(x.float())[0])
    doubled = RewardHead(16, config)
    doubled.load_state_dict({n: 2 * w if n.startswith("first") else w for n, w in head.state_dict().items()})
    kept = head(x, torch.ones(4, 2000, dtype=torch.bool))[0]  # what is kept grows by 1 / (1 - dropout)
    torch.testing.assert_close(kept, doubled(x)[0])
    dropped = head(x, torch.zeros(4, 2000, dtype=torch.bool))[0]
    torch.testing.assert_close(dropped, dropped[:1].expand(4))


def test_no_vocabulary_logits(make_model, pairs):
    model = make_model()
    model.backbone.lm_head.register_forward_hook(lambda *_: pytest.fail("lm_head was called"))
    model(inputs_of(model, pairs[:1]))


@pytest.mark.parametrize("train_vision", [False, True])
def test_half_precision_body_keeps_trained_weights_in_float32(make_model, pairs, train_vision):
    model = make_model(dtype="bfloat16", train_vision=train_vision)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    vision = model.backbone.model.visual.blocks[0].mlp.gate_proj.weight
    assert vision.dtype == (torch.float32 if train_vision else torch.bfloat16)
    assert model.backbone.model.language_model.layers[0].mlp.gate_proj.base_layer.weight.dtype == torch.bfloat16
    mu, _ = model(inputs_of(model, pairs[:2]))
    mu.sum().backward()
    assert torch.isfinite(mu).all() and all(p.grad is not None for p in model.trainable().values())


def test_stock_class_loads_the_backbone(backbone):
    assert Qwen2_5_VLForConditionalGeneration.from_pretrained(backbone).config.tie_word_embeddings


@pytest.mark.parametrize("text", ["", "   "])
def test_empty_prompt(make_model, text):
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        make_model().tokenize(["a red circle", text])


def test_special_tokens_in_a_prompt(make_model):
    model = make_model()
    for token in ("<|image_pad|>", REWARD_TOKEN, "<|im_start|>"):
        with pytest.raises(ValueError, match=f"q1: the prompt holds the special token {re.escape(token)}, .*leave it"):
            model.tokenize(["a red circle", f"a red {token} circle"], ["q0", "q1"])
    assert len(model.tokenize(["a red unicorn, <b>bold</b> & <|image pad|>"])) == 1  # unknown words are none


def test_long_prompt(make_model):
    with pytest.raises(ValueError, match=r"q7: 100 tokens, but reward.max_text_tokens is 64"):
        make_model().tokenize(["red circle " * 100], ["q7"])
