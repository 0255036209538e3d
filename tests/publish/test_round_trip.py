"""A run of every method, packed, merged and evaluated again from the pack."""

import io
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console
from scaffold import BUILT_IN, by_family
from test_published import change

from bench import registry
from bench.config import resolve
from bench.environment import revision
from bench.publish.merge import Merged, merge_packs
from bench.publish.pack import pack_runs
from bench.publish.reproduce import verify
from bench.reporting.rows import read_rows
from bench.runs import evaluate
from bench.runs.run import Run
from bench.runtime.meter import COUNTS
from bench.settings import JUDGED

SMALL = (
    "train.updates=2", "train.samples_per_prompt=8", "train.threads=1", "sampler.steps=6", "evaluation.at=[]",
    "evaluation.samples_per_prompt=8", "evaluation.metrics=[reward,path_kl]",
)  # fmt: skip


@pytest.mark.parametrize("method", by_family([name for name in BUILT_IN if name != JUDGED]))
def test_a_packed_run_has_what_it_takes_to_evaluate_it(
    method: str, undrawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Methods that train adapters are evaluated by a copy, so that it and the policy must be in the pack."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    needs = registry.load("methods", method).needs
    copied = needs.training and needs.adapters
    weights = ["train.ema=0.5", "evaluation.weights=ema"] if copied else []
    suite, small = "ring", SMALL
    if needs.teacher:
        suite, small = "ring_flow_turbo", [text for text in SMALL if "steps" not in text and "path_kl" not in text]
    config = resolve(method, suite=suite, assignments=[*small, *weights])
    console = Console(file=io.StringIO())
    with ExitStack() as held:
        Run(config, tmp_path / "runs" / "one", console).go(False, held)
    change(tmp_path / "runs" / "one", dirty=False, revision=revision()[0])

    assert pack_runs(tmp_path / "runs", tmp_path / "pack") == (1, [])
    packed = tmp_path / "pack" / "one"
    assert not (packed / "checkpoints").exists()
    expected = {"adapter": needs.training, "adapter-ema": copied}
    assert {path.name for path in packed.glob("adapter*")} == {name for name, there in expected.items() if there}
    assert merge_packs([tmp_path / "pack"], tmp_path / "published") == Merged(added=1, extended=0, present=0)
    rows = read_rows(packed / "rows.parquet")
    assert verify(packed, [], console), console.file.getvalue()
    assert f"{len(rows)} values: {len(rows)} equal." in console.file.getvalue()
    if copied:
        out = evaluate.evaluate_again(packed, ["evaluation.weights=policy"], console)
        other = read_rows(out / "rows.parquet")
        assert not other.set_index("metric")["value"].equals(rows.set_index("metric")["value"])
        costs = [*COUNTS, "train_seconds"]
        assert other[costs].drop_duplicates().to_dict("records") == rows[costs].drop_duplicates().to_dict("records")


def test_a_packed_copy_draws_images_and_can_be_pushed(
    pipeline_folder: Path, tmp_path: Path, bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # a pack may hold no absolute path
    shutil.copytree(pipeline_folder, "model")
    Path("prompts.txt").write_text("cat\ndog\nred bird\nfish\nbear\napple\n")
    settings = (
        "train.updates=1", "train.prompts_per_round=1", "train.samples_per_prompt=2", "sampler.steps=2",
        "train.updates_per_round=1", "train.ema=0.5", "evaluation.weights=ema", "evaluation.at=[]",
        "evaluation.train_prompts=1", "evaluation.test_prompts=1", "evaluation.samples_per_prompt=2",
        "evaluation.metrics=[reward]", "evaluation.rewards=[]",
    )  # fmt: skip
    sets = [word for setting in settings for word in ("--set", setting)]
    run = ("run", "draft_1", "--reward", "colorfulness", "--model", "./model", "--prompts", "./prompts.txt")
    status, text = bench(*run, "--out", tmp_path / "runs" / "one", *sets)
    assert status == 0, text
    assert bench("pack", tmp_path / "runs", "--out", tmp_path / "pack")[0] == 0
    packed = tmp_path / "pack" / "one"
    status, text = bench("verify", packed)
    assert (status, "3 values: 3 equal." in text) == (0, True), text
    status, text = bench("sample", packed, "--n", 2)
    assert status == 0, text
    assert (packed / "drawn" / "samples.png").is_file()
    status, text = bench("push", packed, "me/adapter")
    assert (status, f"so {packed / 'adapter-ema'} was not uploaded" in text) == (2, True), text


def test_points_have_no_images_to_draw(tmp_path: Path, bench) -> None:
    (tmp_path / "config.yaml").write_text(resolve("rtb", suite="ring").to_yaml())
    for command in (["sample", tmp_path], ["push", tmp_path, "me/adapter"]):
        status, text = bench(*command)
        assert (status, "draws points, no images" in text) == (2, True), text
