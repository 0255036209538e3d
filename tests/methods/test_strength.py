"""The declared strength of every method: one of its settings, with values that hold it nearer to the prior or less."""

import pytest

from bench import registry
from bench.config import resolve
from bench.method import STRENGTHS, TILT, Strength
from bench.options import leaves

TRAINED = [n for n in registry.BUILT_IN["methods"] if registry.load("methods", n).needs.training]
ONLY_EARLY_STOPPING: set[str] = set()  # trained methods with nothing to hold them near the prior


@pytest.mark.parametrize("name", TRAINED)
def test_every_trained_method_declares_its_strength(name: str) -> None:
    strength = registry.load("methods", name).strength
    assert (strength is None) == (name in ONLY_EARLY_STOPPING)
    if strength is not None:
        configured = dict(leaves(resolve(name, suite="ring").model_dump()))
        assert strength.setting in configured
        for value in strength.values:
            value = value * configured[strength.setting] if strength.relative else value
            config = resolve(name, suite="ring", assignments=[f"{strength.setting}={value}"])
            assert dict(leaves(config.model_dump()))[strength.setting] == value


@pytest.mark.parametrize("values", [(), (1.0, 2.0), (0.0, 1.0, 1.0, 2.0), (2.0, 1.0, 3.0, 4.0), (-1.0, 0.0, 1.0, 2.0)])
def test_every_method_gets_as_many_values(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=rf"give {STRENGTHS} different ones from 0 on, rising"):
        Strength("method.kl", values)
    assert len(TILT.values) == STRENGTHS
