"""Guidance, refused where a model knows none or where it would mean nothing."""

import pytest

from bench.errors import BenchError
from bench.models.catalogue import load_model, repository
from bench.models.random_weights import write
from bench.settings import ModelConfig, SamplerConfig


def test_a_negative_prompt_needs_guidance(bench, hub):
    for model, settings, words in (
        ("emoji", ["sampler.guidance=1"], "does nothing without guidance"),
        ("ring", ["sampler.guidance=2"], "no guidance of 'ring'"),
        ("flux_dev", [], "no guidance of 'flux_dev'"),
    ):
        if model == "flux_dev":
            write([repository("flux_dev")], hub, "tiny")
        sets = [word for setting in (*settings, "model.negative_prompt=dull") for word in ("--set", setting)]
        status, text = bench("run", "draft_1", "--model", model, "--dry-run", *sets)
        assert (status, words in " ".join(text.split())) == (2, True), text


@pytest.mark.parametrize(
    ("method", "model", "words"),
    [
        ("ddpo", "emoji", "very predictions of its rollouts"),
        ("draft_1", "emoji", "very predictions of its rollouts"),
        ("nft", "ring", "knows no guidance"),
        ("nft", "emoji", ""),
    ],
)
def test_losses_with_another_guidance_are_refused_where_they_mean_nothing(bench, untried, method, model, words):
    status, text = bench("run", method, "--model", model, "--dry-run", "--set", "train.guidance=2")
    assert status == (2 if words else 0), text
    assert words in " ".join(text.split())


def test_a_distilled_model_has_no_guidance(hub):
    write([repository("flux_schnell")], hub, "tiny")
    with pytest.raises(BenchError, match=r"use sampler\.guidance=1"):
        load_model(ModelConfig(name="flux_schnell"), SamplerConfig(guidance=3.0))
