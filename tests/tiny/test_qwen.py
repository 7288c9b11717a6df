import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from spatialt2i.core.types import Prompt
from spatialt2i.tiny.oracle import TinyOracle
from spatialt2i.tiny.painter import paint
from spatialt2i.tiny.qwen import make_tiny_qwen
from spatialt2i.tiny.tokenizer import make_tokenizer
from spatialt2i.tiny.world import MARGIN, OBJECTS, PREDICATES, margin

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import tiny_qwen_tasks as lessons  # noqa: E402
from tiny_qwen_spoil import spoil  # noqa: E402


@pytest.fixture(scope="module")
def scenes():
    return lessons.layouts(12, seed=0, split="test")


@pytest.fixture(scope="module")
def tasks(scenes):
    return lessons.Tasks(scenes, tokenizer=make_tokenizer(max_length=512), grid=8, seed=0, split="test")


def test_stock_classes_read_the_folder_and_generate(tmp_path):
    made = make_tiny_qwen(tmp_path, tokenizer=make_tokenizer(max_length=64), seed=0, width=32, layers=2, heads=2,
                          vision_width=32, vision_layers=1)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer, processor = AutoTokenizer.from_pretrained(tmp_path), Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    for name, weight in made.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    pixels = processor(images=[np.zeros((64, 64, 3), np.uint8)], return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 8, 8]]
    text = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 64 + "<|vision_end|>describe<|im_end|>"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, **pixels,
                         mm_token_type_ids=(ids == model.config.image_token_id).int())
    assert out.shape[1] <= ids.shape[1] + 3


def test_width_must_fit_the_heads(tmp_path):
    with pytest.raises(ValueError, match="width 40 must be a multiple of 16 x 2 heads"):
        make_tiny_qwen(tmp_path, tokenizer=make_tokenizer(max_length=64), seed=0, width=40, heads=2)


def test_truths_are_the_worlds(scenes):
    for scene in scenes:
        names = list(scene.boxes)
        for predicate, (holds, fails) in lessons.truths(scene).items():
            for rows, sign in ((holds, 1), (fails, -1)):
                for index in rows.tolist():
                    relation = lessons.Relation(predicate, names[index[0]], tuple(names[i] for i in index[1:]))
                    assert sign * margin(relation, scene.boxes) >= MARGIN


def test_statements_are_what_they_say(scenes):
    rng = np.random.default_rng(0)
    found = [(scene, *s) for scene in scenes for s in lessons.statements(scene, 150, rng)]
    share = np.mean([true for _, _, true in found])
    assert 0.4 < share < 0.6
    for scene, relation, true in found:
        if all(name in scene.boxes for name in relation.names):
            assert (margin(relation, scene.boxes) >= MARGIN) == true
        else:
            assert not true
    assert {r.predicate for _, r, _ in found} == set(PREDICATES)


def test_batches_repeat_and_point_at_what_they_mean(tasks):
    batch, again = tasks.batch(3, 10), tasks.batch(3, 10)
    assert np.array_equal(batch.images, again.images) and np.array_equal(batch.input_ids, again.input_ids)
    named = tasks.objects[batch.input_ids[batch.mentions[:, 0], batch.mentions[:, 1]]]
    assert (named >= 0).all() and batch.mentions[:, 2:4].max() < lessons.BINS
    assert set(batch.mentions[:, 4]) <= {0, 1, 2}
    for r, c in zip(batch.seen[:40, 0], batch.seen[:40, 1] - tasks.picture_at, strict=True):
        assert set(batch.map[r, c]) - {0}  # an object's centre is there, so something is to be seen
    row, cell = batch.seen[:, 0], batch.seen[:, 1] - tasks.picture_at
    assert (batch.cells[row, cell].sum(1) == 1).all()
    assert np.array_equal(cell % 8, batch.seen[:, 2] // 2) and np.array_equal(cell // 8, batch.seen[:, 3] // 2)
    answers = batch.spoken[batch.spoken[:, 0] == 0]
    words = tasks.tokenizer.convert_ids_to_tokens(answers[:, 2].tolist())
    assert set(words) & set(OBJECTS) and {"yes", "no"} & set(words) and words[-1] == "<|im_end|>"
    told = batch.input_ids[answers[:, 0], answers[:, 1] + 1]
    assert np.array_equal(told, answers[:, 2])


def test_the_tally_of_false_clauses_ends_in_what_is_answered(tasks):
    rows = 0
    for step in range(4):
        batch = tasks.batch(step, 12)
        for row in set(batch.tallied[:, 0].tolist()):
            tally = batch.tallied[batch.tallied[:, 0] == row, 2]
            false = 1 - batch.judged[batch.judged[:, 0] == row, 2]
            assert np.array_equal(np.diff(tally), false[1:]) and tally[0] - false[0] in (0, 1)  # 1 for litter
            answer = batch.spoken[batch.spoken[:, 0] == row][0, 2]
            assert tasks.tokenizer.convert_ids_to_tokens(int(answer)) == str(tally[-1])
            rows += 1
    assert rows > 8


def test_depths_are_the_worlds(scenes):
    for scene in scenes:
        depth = {name: d for name, (_, _, d) in lessons.whereabouts(scene).items()}
        for a in scene.boxes:
            in_front = [b for b in scene.boxes if b != a and
                        margin(lessons.Relation("in front of", a, (b,)), scene.boxes) > 0]
            assert (depth[a] == 1) == bool(in_front)
            assert all(depth[b] == 2 for b in in_front)


def test_what_is_broken_is_not_to_be_seen_and_the_rest_is(scenes):
    rng, whole, broken, clean = np.random.default_rng(0), [], [], {True: [], False: []}
    for scene in [lessons.varied(s, rng) for s in scenes] * 12:
        picture = spoil(scene, rng)
        assert picture.touched.any() == bool(picture.broken or picture.litter)
        names = tuple(scene.boxes)
        asked = Prompt("x", "x", scene.place, tuple(lessons.Relation("in the centre", n) for n in names))
        verdict = TinyOracle().verify(images=[Image.fromarray(picture.pixels)], prompts=[asked])[0]
        for name, present in zip(asked.objects, verdict.present, strict=True):
            (broken if name in picture.broken else whole).append(present)
        if not picture.broken:
            clean[picture.litter].append(verdict.clean)
    assert np.mean(whole) > 0.95 and np.mean(broken) < 1 / 3
    assert np.mean(clean[False]) > 0.95 and np.mean(clean[True]) < 0.3


def test_statements_about_broken_objects_are_false(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes:
        name = next(iter(scene.boxes))
        found = lessons.statements(scene, 60, rng, broken=frozenset([name]))
        assert not any(true for relation, true in found if name in relation.names)
        assert any(true for _, true in found) or len(scene.boxes) < 3


def test_a_picture_without_faults_is_the_painters(scenes, monkeypatch):
    import tiny_qwen_spoil
    monkeypatch.setattr(tiny_qwen_spoil, "SPOILT", 0)
    monkeypatch.setattr(tiny_qwen_spoil, "LITTERED", 0)
    picture = spoil(scenes[0], np.random.default_rng(3))
    light = int(np.random.default_rng(3).integers(2**62))
    assert np.array_equal(picture.pixels, paint(scenes[0], np.random.default_rng(light)))
    assert not picture.broken and not picture.litter and not picture.touched.any()
