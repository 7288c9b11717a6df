"""A random tiny backbone and a few painted pairs."""

from __future__ import annotations

import dataclasses
import io

import pytest
from spatialt2i.core.config import RewardConfig
from spatialt2i.core.run import seed_of
from spatialt2i.core.types import Drawn, Preference, Verdict
from spatialt2i.reward.model import SpatialScoreModel
from spatialt2i.tiny.grammar import TinyWriter
from spatialt2i.tiny.painter import TinyPainter
from spatialt2i.tiny.qwen import make_tiny_qwen
from spatialt2i.tiny.tokenizer import make_tokenizer

SMALL = RewardConfig(dtype="float32", lora_rank=4, lora_alpha=8, head_width=16, head_hidden=8, max_pixels=4096,
                     max_text_tokens=64, batch=4, micro_batch=2, steps=4, lr=1e-2, lr_head=1e-2, lr_token=1e-2,
                     eval_every=2, eval_pairs=4, save_every=2, score_batch=4, head_dropout=0.3)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """Folder of a random Qwen2.5-VL of width 32."""
    folder = tmp_path_factory.mktemp("backbone")
    make_tiny_qwen(folder, tokenizer=make_tokenizer(max_length=128), seed=0, width=32, layers=2, heads=2, merge=2,
                   vision_width=32, vision_layers=2)
    return folder


def png(image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def make_pairs(n: int) -> list[Preference]:
    writer, painter, found = TinyWriter(), TinyPainter(wrong_layout=0), []
    verdict = Verdict(None, (), (), None, "nobody")
    while len(found) < n:
        i = len(found)
        prompt = writer.write(id=f"p{i}", n_relations=2 + i % 4, seed=seed_of("test", i))
        pair = writer.perturb(prompt=prompt, n_edits=1 + i % 3 if i % 4 else 1, seed=i)
        pair = pair or writer.perturb(prompt=prompt, n_edits=1, seed=i + 1000)
        chosen, rejected = painter.generate(prompts=[pair.perfect, pair.perturbed], seeds=[i, i])
        found.append(Preference(pair, png(chosen), png(rejected), (Drawn("tiny-painter", i),) * 2, (verdict, verdict)))
    return found


@pytest.fixture(scope="session")
def pairs():
    return make_pairs(12)


@pytest.fixture
def make_model(backbone):
    """A fresh model with `SMALL` settings, some of them changed."""
    def make(seed: int = 0, **changes) -> SpatialScoreModel:
        return SpatialScoreModel.from_backbone(backbone, config=dataclasses.replace(SMALL, **changes), seed=seed)
    return make
