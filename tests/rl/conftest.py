import os
from dataclasses import replace

import pytest
import torch
from rl_parts import make_flux, shake

from spatialt2i.core.config import RLConfig
from spatialt2i.rl.policy import FluxPolicy

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory):
    return str(make_flux(tmp_path_factory.mktemp("flux")))


@pytest.fixture(scope="session")
def config(flux_folder):
    return RLConfig(model=flux_folder, dtype="float32", resolution=16, max_text_tokens=16, steps=4, prompts_per_step=2,
                    group=6, top_k=2, rollout_steps=4, eval_steps=3, noise=0.7, train_from=0, train_steps=3, clip=1e-3,
                    kl=0.01, lr=1e-2, lora_rank=4, lora_alpha=8, ema=0.9, ema_every=1, micro_batch=8, sample_batch=6,
                    save_every=2, gallery_every=100, gallery_prompts=1)


@pytest.fixture
def make_policy(config):
    """A function from changed settings (and the adapter's seed) to a fresh policy."""
    def make(seed=0, **changes):
        return FluxPolicy.from_pretrained(replace(config, **changes), device=torch.device("cpu"), seed=seed)
    return make


@pytest.fixture
def policy(make_policy):
    """A policy whose adapter is not the identity any more."""
    policy = make_policy()
    shake(policy)
    return policy
