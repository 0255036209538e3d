"""What an evaluation is expected to measure is what it measures."""

from pathlib import Path

import pytest

from bench.config import resolve
from bench.evaluation.evaluator import Evaluator
from bench.evaluation.expected import expected
from bench.prompts import load_prompts
from bench.runs.build import build_core, evaluation_core


@pytest.mark.parametrize(
    ("method", "reward", "settings"),
    [
        ("rtb", "quadratic", []),
        ("rtb", "quadratic+2*linear", ["evaluation.metrics=[reward,path_kl_steps,diversity,fid_prior]"]),
        ("draft", "quadratic", ["sampler.eta=0", "evaluation.rewards=[linear]"]),
    ],
)
def test_names_and_missing_values_are_those_of_an_evaluation(
    method: str, reward: str, settings: list[str], tmp_path: Path
) -> None:
    small = ["evaluation.samples_per_prompt=64", "sampler.steps=4"]
    config = resolve(method, suite="ring", reward=reward, assignments=[*small, *settings])
    core, prompts = build_core(config), load_prompts(config.prompts.name)
    found = Evaluator(evaluation_core(core, config), config, prompts, tmp_path).evaluate()[1]
    told = expected(config)
    assert not told.unknown
    assert list(told.names) == [one.name for one in found]
    assert {name for name, note in told.names.items() if note} == {one.name for one in found if one.value is None}
