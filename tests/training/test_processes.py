"""Several processes give the numbers of one, whoever holds the weights, and a run goes on with another number."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from two_processes import METHODS, SHARDED, train

from bench.runtime import processes
from bench.training import checkpoint

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(pipeline_folder, tmp_path_factory):
    """`<method>/{one,two}`: trained by one and by two processes; `nabla_gfn/{first-one,first-two}`: half by each."""
    root = tmp_path_factory.mktemp("processes")
    with one_thread():
        for method in METHODS:
            train(pipeline_folder, root / method / "one", method)
        train(pipeline_folder, root / "nabla_gfn" / "first-one", "nabla_gfn", stop=1)
        tasks = [f"{method}:{root / method / 'two'}:0" for method in METHODS]
        tasks += [f"nabla_gfn:{root}/nabla_gfn/first-one:0", f"nabla_gfn:{root}/nabla_gfn/first-two:1"]
        by_two(pipeline_folder, tasks)
        train(pipeline_folder, root / "nabla_gfn" / "first-two", "nabla_gfn")
    return root


@pytest.fixture(scope="module")
def sharded(pipeline_folder, tmp_path_factory):
    """`<method>/whole`: trained by one process, and `sharded`: by two that share the weights; `stopped`: in two goes.

    `<error>-<process>.txt`: what a process says if one shard fails.
    """
    root = tmp_path_factory.mktemp("sharded")
    tasks = []
    with one_thread():
        for method, options in SHARDED.items():
            train(pipeline_folder, root / method / "whole", method, stop=2, **dict.fromkeys(options, True))
            tasks.append(f"{method}:{root / method / 'sharded'}:2:{':'.join(options)}")
        tasks += [f"nabla_gfn:{root}/nabla_gfn/stopped:{stop}:shard" for stop in (1, 2)]
        tasks += [f"{error}:{root / error}:2:shard" for error in ("nonfinite", "exhausted")]  # the last ends a process
        by_two(pipeline_folder, tasks)
    return root


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_two(pipeline_folder: Path, tasks: list[str]) -> None:
    """Let two processes do the tasks of two_processes.py."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "two_processes.py"), str(pipeline_folder), *tasks]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same(one: Path, two: Path, stop: int = 0, rtol: float = 1e-5) -> None:
    """Losses, rewards, gradient norms, adapters and networks to 1e-5, and moments to `rtol`; accounting exactly."""
    records = [
        pd.DataFrame(json.loads((path / f"records-{stop}.json").read_text())).set_index("update") for path in (one, two)
    ]
    names = [name for name in records[0] if name.startswith(("loss", "reward", "gradient_norm", "network"))]
    assert {"loss", "gradient_norm/policy"} <= set(names)
    both = records[1].index
    pd.testing.assert_frame_equal(
        records[0].loc[both, names], records[1][names], rtol=1e-5, atol=1e-6, check_dtype=False
    )
    states = [checkpoint.load(path / "checkpoints") for path in (one, two)]
    counts = [{k: v for k, v in s["meter"].items() if k.startswith(("network", "reward"))} for s in states]
    assert counts[0] == counts[1]
    assert counts[0]["network_forwards"] > 0
    for name in states[0]["parameters"]:
        for a, b in zip(states[0]["parameters"][name], states[1]["parameters"][name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        a, b = (_moments(state["optimizers"][name]) for state in states)
        assert float((a - b).norm()) <= rtol * float(a.norm())
        assert float(a.norm()) > 0


def _moments(state: dict) -> torch.Tensor:
    """Mean gradients of an optimiser: unlike Adam's steps they show a wrong scale."""
    return torch.cat([own["exp_avg"].flatten() for own in state["state"].values()])


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_numbers_of_one(folder, method):
    """Three shards for two processes; draft samples inside its loss, dag_kl's loss is one shard."""
    assert {record["processes"] for record in json.loads((folder / method / "two/records-0.json").read_text())} == {2}
    assert_same(folder / method / "one", folder / method / "two")


@pytest.mark.parametrize("begun", ["first-one", "first-two"])
def test_a_run_goes_on_with_another_number_of_processes(folder, begun):
    assert_same(folder / "nabla_gfn" / "one", folder / "nabla_gfn" / begun)


@pytest.mark.slow
@pytest.mark.parametrize("method", SHARDED)
def test_processes_that_share_the_weights_give_the_numbers_of_one(sharded, method):
    """Each has half of the frozen weights; three shards for two processes, so that one repeats a shard."""
    records = json.loads((sharded / method / "sharded/records-2.json").read_text())
    assert {record["processes"] for record in records} == {2}
    assert all(0.5 <= record["share"] < 0.55 for record in records)  # rows that do not divide are filled up
    # a whole network samples with the adapter merged into it, which rounds differently
    assert_same(sharded / method / "whole", sharded / method / "sharded", stop=2, rtol=1e-4)


@pytest.mark.slow
def test_a_run_that_shares_the_weights_resumes_to_the_bit(sharded):
    straight, stopped = (checkpoint.load(sharded / "nabla_gfn" / way / "checkpoints") for way in ("sharded", "stopped"))
    for name, group in straight["parameters"].items():
        assert all(torch.equal(a, b) for a, b in zip(group, stopped["parameters"][name], strict=True))


@pytest.mark.slow
def test_an_error_of_one_process_ends_those_that_wait_for_its_weights(sharded):
    told = {path.stem: path.read_text() for path in sharded.glob("*.txt")}
    assert told["nonfinite-0"] == told["nonfinite-1"]
    assert told["nonfinite-0"].startswith("NonFiniteError: update 1 stopped: not finite")
    errors = sorted(told[f"exhausted-{process}"] for process in (0, 1))
    assert errors[0] == "BenchError: another process of this run has ended, and has said why."
    assert errors[1].startswith("OutOfMemoryError: out of memory")


@given(st.lists(st.integers(1, 3), max_size=9), st.sampled_from(["free", "even", "alike"]), st.integers(1, 4))
def test_every_part_counts_once_and_turns_are_equal_in_step(lengths, pace, count):
    own = [processes.turns(lengths, pace, place, count) for place in range(count)]
    assert sorted(number for one in own for number, counts in one if counts) == list(range(len(lengths)))
    if pace != "free":
        for turn in zip(*own, strict=True):
            assert len({lengths[number] for number, _ in turn}) == 1
    if pace == "alike":
        assert all([number for number, _ in one] == list(range(len(lengths))) for one in own) or len(set(lengths)) > 1
