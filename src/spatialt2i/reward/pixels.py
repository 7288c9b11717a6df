"""From image files and arrays to the pixel patches that the vision tower reads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

ImageLike = Image.Image | np.ndarray | bytes | str | Path


def decode(image: ImageLike, name: str) -> np.ndarray:
    """Any form of image as uint8 [H, W, 3].

    Args:
        image: PIL image, uint8 array [H, W, 3], bytes of an image file, or a path.
        name: how the error message calls it.

    Raises:
        ValueError: it cannot be read as an image; the message names it.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{name}: expected a uint8 array [H, W, 3], got {image.dtype} {list(image.shape)}")
        return image
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    source = io.BytesIO(image) if isinstance(image, bytes) else image
    where = name if isinstance(image, bytes) else f"{name} ({image})"
    try:
        with Image.open(source) as opened:
            return np.asarray(opened.convert("RGB"))
    except FileNotFoundError as e:
        raise ValueError(f"{where}: there is no such image file") from e
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as e:  # SyntaxError: a broken PNG chunk
        raise ValueError(f"{where}: not a readable image ({e}); replace it or leave it out") from e


class PixelReader:
    """Turns decoded images into patches, exactly as the image processor of the backbone does.

    Images whose size the processor keeps go through one gather per size, from a table of its own values for each of
    the 256 levels; the others go through the processor.

    Args:
        processor: a `Qwen2VLImageProcessorPil`.
        max_pixels: pixels of every image, up to whole patches: a larger one is reduced to it and a smaller one
            enlarged, with its aspect kept, as in HPSv3 (arXiv 2508.03789).
    """

    def __init__(self, processor, *, max_pixels: int) -> None:
        self.processor = processor
        processor.size = {"shortest_edge": max_pixels, "longest_edge": max_pixels}  # the names mean numbers of pixels
        levels = np.repeat(np.arange(256, dtype=np.uint8)[None, None], 3, axis=0)  # [3, 1, 256]
        values = processor.normalize(processor.rescale(levels, processor.rescale_factor), processor.image_mean,
                                     processor.image_std)
        self.table = torch.from_numpy(np.ascontiguousarray(values[:, 0], dtype=np.float32).T.copy())  # [256, 3]

    def __call__(self, pictures: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Patches of B images.

        Returns:
            float32 [N, C*T*P*P], all images one after another, and int64 [B, 3], patches in time, height and width.
        """
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, picture in enumerate(pictures):
            by_size.setdefault(picture.shape[:2], []).append(i)
        patches: list[Tensor] = [torch.empty(0)] * len(pictures)
        grids = torch.ones(len(pictures), 3, dtype=torch.long)
        for size, index in by_size.items():
            found = self._kept(np.stack([pictures[i] for i in index])) if self._keeps(*size) else None
            for j, i in enumerate(index):
                if found is None:
                    done = self.processor(images=[pictures[i]], return_tensors="pt")
                    patches[i], grids[i] = done["pixel_values"], done["image_grid_thw"][0]
                else:
                    patches[i] = found[j]
                    grids[i, 1:] = torch.tensor(size) // self.processor.patch_size
        return torch.cat(patches), grids

    def _keeps(self, height: int, width: int) -> bool:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
        p = self.processor
        return smart_resize(height, width, factor=p.patch_size * p.merge_size, min_pixels=p.size["shortest_edge"],
                            max_pixels=p.size["longest_edge"]) == (height, width)

    def _kept(self, images: np.ndarray) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, patches, C*T*P*P], in the order of the merged 2 x 2 blocks."""
        p, m, t = self.processor.patch_size, self.processor.merge_size, self.processor.temporal_patch_size
        b, h, w, _ = images.shape
        blocks = torch.from_numpy(images).view(b, h // p // m, m, p, w // p // m, m, p, 3)
        blocks = blocks.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(b, h * w // p**2, 3, 1, p * p)  # [B, N, C, 1, P*P]
        channel = torch.arange(3).view(3, 1, 1)
        values = self.table[blocks.long(), channel]
        return values.expand(-1, -1, -1, t, -1).reshape(b, h * w // p**2, 3 * t * p * p)
