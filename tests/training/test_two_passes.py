"""Losses whose weights depend on a whole update, in one pass and in two."""

import pytest
import torch
from torch import Tensor

from bench import two_passes

INPUTS = torch.linspace(-1, 2, 7, dtype=torch.float64)


@pytest.mark.parametrize(("size", "passes"), [(7, 1), (3, 2), (1, 2)])
def test_a_softmax_over_an_update_has_its_gradient_whatever_the_micro_batch(size: int, passes: int) -> None:
    """`Σ_i softmax_i(v) v_i`, the softmax detached; what has no gradient is computed once."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    computed: list[tuple[str, bool]] = []

    def constant(part: Tensor) -> Tensor:
        computed.append(("constant", torch.is_grad_enabled()))
        return part**2

    def values(first):
        for i, part in enumerate(INPUTS.split(size)):
            offset = first[i][1] if first else constant(part)
            found = torch.sin(weight * part) + offset
            computed.append(("values", found.requires_grad))
            yield found, (found.detach(), offset)

    def weigh(kept):
        assert len(kept) == len(INPUTS.split(size))
        return torch.cat([found for found, _ in kept]).softmax(0).split(size)

    total = 0.0
    for found, weights in two_passes(values, weigh, complete=size == 7):
        assert not weights.requires_grad
        loss = (weights * found).sum()
        loss.backward()
        total += loss.item()
    whole = torch.sin(weight * INPUTS) + INPUTS**2
    expected = (whole.detach().softmax(0) * whole).sum()
    assert total == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(weight.grad, torch.autograd.grad(expected, weight)[0], rtol=1e-12)
    parts = len(INPUTS.split(size))
    assert [name for name, _ in computed].count("constant") == parts
    assert [with_gradient for name, with_gradient in computed if name == "values"] == (
        [True] * parts if passes == 1 else [False] * parts + [True] * parts
    )


def test_complete_micro_batches_are_weighed_one_by_one() -> None:
    def values(first):
        assert first is None
        for part in INPUTS[:6].split(2):
            yield part, part

    for found, weights in two_passes(values, lambda kept: [part.mean() for part in kept], complete=True):
        assert weights == found.mean()
