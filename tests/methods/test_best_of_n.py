"""Best of n: which sample is kept."""

from dataclasses import replace

import pytest
import torch
from bench.methods.best_of_n import BestOfN, BestOfNConfig

from bench.diagnose.selftest.scaffold import DIRECTION, gaussian_core


def test_best_of_n_keeps_the_best_of_its_own_candidates():
    core, n = gaussian_core(4), 5
    batch = core.batch((f"prompt {i}", 0) for i in range(600))
    options = {"purpose": "evaluate", "seed": 3, "record": frozenset({"model_output", "prior_output"})}
    with torch.no_grad():
        own = core.rollout(batch, **options).latents[:, -1]
        core = replace(core, micro_batch=7, sample_batch=7)  # the choice does not depend on how a batch is cut
        best = BestOfN(BestOfNConfig(n=n)).sample(core, batch, **options)
        alone = BestOfN(BestOfNConfig(n=1)).sample(core, batch, **options)
    assert best.model_output is None
    assert torch.equal(alone.latents[:, -1], own)
    rewards, kept = own @ DIRECTION, best.latents[:, -1] @ DIRECTION
    assert (kept >= rewards).all()
    assert 0.1 < (kept == rewards).double().mean() < 0.3  # the own noise wins one time in five
    normal = (kept - rewards.mean()) / rewards.std()
    assert normal.mean() == pytest.approx(1.163, abs=0.12)  # expected maximum of five standard normals


def test_a_missing_score_is_never_the_best(monkeypatch):
    core = gaussian_core(4)
    batch = core.batch((f"prompt {i}", 0) for i in range(50))
    reward = type(core).reward
    calls = []

    def sometimes(self, clean, prompts):
        calls.append(1)
        scores = reward(self, clean, prompts)
        return scores if len(calls) % 2 else torch.full_like(scores, torch.nan)

    monkeypatch.setattr(type(core), "reward", sometimes)
    with torch.no_grad():
        best = BestOfN(BestOfNConfig(n=3)).sample(core, batch, purpose="evaluate").latents[:, -1] @ DIRECTION
        names = [[(prompt, i + (draw << 32)) for prompt, i in batch.samples] for draw in (0, 2)]
        known = [core.rollout(core.batch(one), purpose="evaluate").latents[:, -1] @ DIRECTION for one in names]
    assert torch.equal(best, torch.maximum(*known))
