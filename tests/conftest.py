"""A small wardrobe and a tiny architecture, so that whole runs take seconds."""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the entry scripts do: see cliplab/cli.py

import pytest

from cliplab.data.wardrobe import WardrobeSpec, render_wardrobe

ROOT = Path(__file__).parent.parent
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def small_wardrobe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training triplets and 20 validation queries per category."""
    root = tmp_path_factory.mktemp("data") / "wardrobe"
    spec = WardrobeSpec(
        train_images=40, val_images=30, test_images=10, train_triplets=48, val_triplets=20, test_triplets=5
    )
    render_wardrobe(root, spec)
    return root


@pytest.fixture(scope="session")
def tiny_config(small_wardrobe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of a whole run on the small wardrobe: two epochs of nine steps."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    path = folder / "tiny.yaml"
    path.write_text(
        f"""# A run of seconds.
model: {{arch: {folder / "tiny.json"}, composer: {{name: combiner, dropout: 0.1}}}}
data: {{name: wardrobe, root: {small_wardrobe}, batch_size: 16, num_workers: 0}}
optim: {{lr: 1.0e-3}}
trainer: {{max_epochs: 2, accelerator: cpu}}
output_dir: {folder / "runs"}
"""
    )
    return path
