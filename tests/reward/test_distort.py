import numpy as np
import pytest
from PIL import Image

from spatialt2i.reward.distort import RADIUS, distort
from spatialt2i.tiny.grammar import TinyWriter
from spatialt2i.tiny.oracle import TinyOracle
from spatialt2i.tiny.painter import TinyPainter


def paintings(n):
    prompts = [TinyWriter().write(id=f"distort-{i}", n_relations=1 + i % 3, seed=i) for i in range(n)]
    return prompts, TinyPainter(wrong_layout=0).generate(prompts=prompts, seeds=range(n))


def test_one_place_is_broken_and_the_rest_is_as_it_was():
    prompts, images = paintings(60)
    broken = [distort(np.asarray(image), np.random.default_rng(i)) for i, image in enumerate(images)]
    for image, found in zip(images, broken, strict=True):
        changed = (found != np.asarray(image)).any(-1)
        rows, columns = changed.nonzero()
        reach = 2 * (2 * RADIUS[1] + 0.03) * 64 + 1
        assert found.dtype == np.uint8 and found.shape == (64, 64, 3) and changed.any()
        assert max(np.ptp(rows), np.ptp(columns)) <= reach
    before, after = (np.mean([v.clean and all(v.present) for v in TinyOracle().verify(images=i, prompts=prompts)])
                     for i in (images, [Image.fromarray(b) for b in broken]))
    assert before > 0.95 and after < 0.4


def test_the_same_seed_breaks_the_same_and_another_otherwise():
    image = np.asarray(paintings(1)[1][0])
    found = {distort(image, np.random.default_rng(i)).tobytes() for i in range(40)}
    assert len(found) == 40
    assert distort(image, np.random.default_rng(7)).tobytes() == distort(image, np.random.default_rng(7)).tobytes()


@pytest.mark.parametrize("shape", [(40, 90, 3), (200, 64, 3)])
def test_any_size_and_an_empty_image(shape):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, shape).astype(np.uint8)
    flat = np.full(shape, 128, dtype=np.uint8)
    for i in range(12):
        assert distort(image, np.random.default_rng(i)).shape == shape
        assert (distort(flat, np.random.default_rng(i)) == flat).all()
