"""`model.shard`: what is gathered as one, and what is refused. training/test_processes.py has two processes."""

import pytest
import torch
from scaffold import pipeline_model
from torch import nn
from torch.distributed import fsdp

from bench.config import resolve
from bench.errors import BenchError
from bench.models.sharded import largest_gathered
from bench.runs.preflight import check


class Block(nn.Module):
    def __init__(self, width: int, inner: nn.Module | None = None):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.empty(width), requires_grad=False), inner
        self.adapter = nn.Parameter(torch.empty(1000))


class Blocks(nn.Module):
    _no_split_modules = ["Block"]

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 3).requires_grad_(False)
        self.blocks = nn.ModuleList([Block(7), Block(5, Block(4)), Block(8)])
        self.blocks10 = Block(6)


def test_a_block_is_whole_together_with_what_is_around_it() -> None:
    """The root's 9 numbers, and 5 + 4 of the block within a block; no adapter."""
    assert largest_gathered(Blocks()) == 9 + 5 + 4
    assert largest_gathered(nn.Linear(2, 3).requires_grad_(False)) == 9


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("model.finetune=full", "model.finetune = full"),
        ("model.finetune=none", "model.finetune = none"),
        ("model.quantize=nf4", "model.quantize = nf4"),
        ("model.compile=true", "model.compile = true"),
    ],
)
def test_what_cannot_be_shared_is_refused(other: str, said: str) -> None:
    with pytest.raises(BenchError, match=rf"model\.shard.*leave out {said}"):
        resolve("draft_1", assignments=["model.shard=true", other])


def test_points_have_no_weights_to_share() -> None:
    with pytest.raises(BenchError, match=r"model\.shard: 'ring' has no weights to share; leave it out"):
        check(resolve("rtb", overrides={"model.name": "ring"}, assignments=["model.shard=true"]))


def test_in_one_process_nothing_is_shared(pipeline_folder) -> None:
    one, other = (pipeline_model(pipeline_folder, shard=shard) for shard in (True, False))
    assert not one.sharded
    assert type(one.network) is type(other.network)
    assert one.fingerprint() == other.fingerprint()


def test_an_old_pytorch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(module: torch.nn.Module, *, mesh: object = None, reshard_after_forward: bool = True) -> None:
        """Its arguments before parameters could be left out."""

    monkeypatch.setattr(fsdp, "fully_shard", older)
    with pytest.raises(BenchError, match=r"model\.shard needs a newer PyTorch than"):
        check(resolve("draft_1", assignments=["model.shard=true"]))
