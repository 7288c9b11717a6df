"""The shipped models load and run with the stock classes, and say where they come from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from spatialt2i.build.parts import SHIPPED, WEIGHTS
from spatialt2i.tiny.grammar import TinyWriter
from spatialt2i.tiny.oracle import TinyOracle
from spatialt2i.tiny.painter import TinyPainter

pytestmark = pytest.mark.skipif(not all((WEIGHTS / name / "manifest.json").exists() for name in SHIPPED),
                                reason="the tiny weights are not installed: make tiny-weights")


def test_flux_draws_with_the_stock_pipeline():
    pipeline = FluxPipeline.from_pretrained(WEIGHTS / "tiny-flux", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompt = TinyWriter().write(id="stock", n_relations=2, seed=5)
    pictures = [np.asarray(pipeline(prompt.text, height=64, width=64, num_inference_steps=4, max_sequence_length=40,
                                    generator=torch.Generator().manual_seed(0)).images[0]) for _ in range(2)]
    assert pictures[0].shape == (64, 64, 3) and np.ptp(pictures[0]) > 30
    assert (pictures[0] == pictures[1]).all()


def test_flux_draws_what_is_named():
    pipeline = FluxPipeline.from_pretrained(WEIGHTS / "tiny-flux", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [TinyWriter().write(id=f"named-{i}", n_relations=2 + i % 2, seed=400 + i) for i in range(24)]
    images = pipeline([p.text for p in prompts], height=64, width=64, num_inference_steps=12, max_sequence_length=40,
                      generator=torch.Generator().manual_seed(0)).images
    verdicts = TinyOracle().verify(images=images, prompts=prompts)
    assert np.mean([there for v in verdicts for there in v.present]) > 0.8


def test_a_picture_that_went_through_the_autoencoder_is_still_clean():
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "tiny-flux" / "vae")
    prompts = [TinyWriter().write(id=f"vae-{i}", n_relations=1 + i % 5, seed=70 + i) for i in range(24)]
    images = TinyPainter(wrong_layout=0).generate(prompts=prompts, seeds=range(len(prompts)))
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    redrawn = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    verdicts = TinyOracle().verify(images=[Image.fromarray(p) for p in redrawn], prompts=prompts)
    assert sum(v.clean for v in verdicts) >= 22
    assert sum(v.evidence["litter_pixels"] <= 2 for v in verdicts) >= 22, "ringing is not litter"


def test_every_word_of_a_prompt_is_in_the_vocabulary():
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "tiny-qwen2.5-vl")
    writer = TinyWriter()
    for i in range(60):
        text = writer.write(id=f"words-{i}", n_relations=1 + i % 12, seed=i).text
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids, text


def test_qwen_loads_with_the_stock_class():
    folder = WEIGHTS / "tiny-qwen2.5-vl"
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert Qwen2VLImageProcessorPil.from_pretrained(folder).patch_size == model.config.vision_config.patch_size


def test_all_weights_together_are_small_and_have_a_manifest():
    size = sum(path.stat().st_size for name in SHIPPED for path in (WEIGHTS / name).rglob("*") if path.is_file())
    assert size <= 30 * 2**20
    for name in SHIPPED:
        manifest = json.loads((WEIGHTS / name / "manifest.json").read_text())
        assert "seed" in manifest and "versions" in manifest and ("command" in manifest or "commands" in manifest)
