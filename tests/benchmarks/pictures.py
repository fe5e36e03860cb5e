"""JPEGs of realistic sizes, and a small vision transformer with random weights; both the same on every run."""

from __future__ import annotations

import io
import random
import shutil
import tempfile
from pathlib import Path

SIZES = ((320, 240), (640, 480), (800, 600), (1024, 768), (1280, 720), (1600, 900), (1920, 1080))
LABELS = ("harbour", "forest", "street", "kitchen", "meadow", "station", "library", "desert", "market", "bridge")
_LAYOUT = 1
"""Part of the model folder's name: raised whenever `small_vit` writes something else."""


def pictures(count: int, seed: int) -> dict[str, bytes]:
    """`count` JPEGs by name: drawn shapes on a gradient with noise, so that a file is about as long as a photo's."""
    source = random.Random(seed)
    return {f"{index:05d}.jpg": _picture(source) for index in range(count)}


def _picture(source: random.Random) -> bytes:
    import numpy as np
    from PIL import Image, ImageDraw

    width, height = source.choice(SIZES)
    noise = np.random.default_rng(source.getrandbits(32))
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    draw = ImageDraw.Draw(image)
    for _ in range(source.randint(10, 40)):
        left, right = sorted(source.choices(range(width), k=2))
        top, bottom = sorted(source.choices(range(height), k=2))
        shape = source.choice((draw.ellipse, draw.rectangle))
        shape((left, top, right, bottom), fill=tuple(source.choices(range(256), k=3)))
    pixels = np.asarray(image, dtype=np.int16) + noise.normal(0, 6, (height, width, 1)).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def small_vit(cache: Path) -> Path:
    """A folder under `cache` with a ViT of 5.5 M parameters (the shape of ViT-Tiny), written on the first call."""
    folder = cache / f"vit-tiny-random-{_LAYOUT}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=cache, prefix=f".{folder.name}-"))
        _write_vit(staged)
        try:
            staged.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(staged)
    return folder


def _write_vit(folder: Path) -> None:
    import torch
    import transformers as hf

    from tests.checkpoints.parts import amplify, image_processor, labels, save

    config = hf.ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, **labels(*LABELS)
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1234)
        model = hf.ViTForImageClassification(config)
    processor = image_processor("ViTImageProcessor", size={"height": 224, "width": 224})
    # The head of a random model answers nearly the same to every picture, which would hide a mixed-up batch.
    save(folder, amplify(model, "classifier", 20.0), processor)
