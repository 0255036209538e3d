"""The command line: what a run leaves behind, resuming, and one clear sentence for every mistake."""

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, version

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from rich.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bench import config, registry
from bench.cli.app import application
from bench.config import resolve
from bench.diagnose import doctor
from bench.errors import BenchError
from bench.prompts import SPLITS, load_prompts
from bench.reporting.rows import read_rows
from bench.runs import probe
from bench.runs.build import build_core
from bench.sampling.noise import Noise


def test_help_answers_without_heavy_imports():
    code = (
        "import sys, bench.cli.app; sys.exit(bool({'torch', 'diffusers', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_writes_everything_and_reports_without_recomputing(tiny_run, bench, pipeline_folder):
    folder = tiny_run("nabla_gfn", *(options := ("--set", "prompts.limit=2")))
    for name in ("config.yaml", "environment.json", "log.jsonl", "rows.parquet", "samples.png", "curves.png"):
        assert (folder / name).stat().st_size > 0, name
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["update"] for record in log] == [1, 2]
    assert {"loss", "reward", "gradient_norm/policy", "gradient_norm/flow", "seconds/rollout"} <= log[-1].keys()
    rows = read_rows(folder / "rows.parquet").set_index("metric")
    assert {"reward/train", "reward/test", "path_kl", "fid_prior/efficientnet_lite0"} <= set(rows.index)
    assert rows["network_forwards"].iloc[0] == log[-1]["network_forwards"]  # evaluation is not a method's cost
    # each update trains on as many samples of both prompts, so the prior's mean over them is that of the evaluation
    for record in log:
        assert record["reward_over_prior"] == pytest.approx(record["reward"] - rows.loc["reward/train", "prior"])
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"loss", "reward_over_prior", "evaluation/reward/train"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("samples/finetuned")] == [2]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    tiny_run("nabla_gfn", *options)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_the_saved_adapter_loads_with_diffusers(undrawn, tiny_run, pipeline_folder):
    folder = tiny_run("draft", "--set", "optimizer.lr=0.05")
    modes = {path.stat().st_mode & 0o777 for path in (folder / "adapter").iterdir()}
    assert modes == {(folder / "config.yaml").stat().st_mode & 0o777}  # who may read the run may read the weights
    stored = config.read(folder / "config.yaml")
    core = build_core(stored)
    (settings,) = set(read_rows(folder / "rows.parquet")["settings"])
    assert json.loads(settings)["model.fingerprint"] == core.model.fingerprint()[:12]
    core.model.load(folder / "adapter")
    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    noise = Noise(0, "evaluate", [("cat", 0)])

    def latents() -> torch.Tensor:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        return pipe(
            "cat",
            num_inference_steps=3,
            guidance_scale=stored.sampler.guidance,
            eta=0.0,
            latents=noise(0, core.model.latent_shape),
            output_type="latent",
        ).images

    core = replace(core, kernel=replace(core.kernel, eta=0.0))
    ours = core.rollout(core.batch([("cat", 0)]), purpose="evaluate").latents[:, -1]
    untouched = latents()
    pipe.load_lora_weights(folder / "adapter")
    assert torch.allclose(ours, latents(), atol=1e-4)
    assert not torch.allclose(ours, untouched, atol=1e-2)


def test_eval_with_other_settings_goes_beside_the_run(undrawn, tiny_run, bench):
    folder = tiny_run("draft_1")
    before = (folder / "rows.parquet").read_bytes()
    status, text = bench("eval", folder, "--set", "evaluation.samples_per_prompt=3")
    assert status == 0, text
    (rows,) = folder.glob("eval-*/rows.parquet")
    assert read_rows(rows).set_index("metric").loc["reward/train", "n"] == 6
    assert (folder / "rows.parquet").read_bytes() == before
    status, text = bench("eval", folder, "--set", "train.updates=9")
    assert status == 2
    assert "evaluation.* settings only" in text


def test_another_configuration_is_refused_and_force_moves_it_aside(undrawn, tiny_run, bench, tmp_path, pipeline_folder):
    folder = tiny_run("prior")
    rows = (folder / "rows.parquet").read_bytes()
    status, text = bench("run", "--method", "prior", "--seed", 5, "--out", folder)
    assert status == 2
    assert "holds a run of another configuration" in text
    assert "--force" in text
    tiny_run("prior", "--force", "--seed", 5)
    assert (tmp_path / "run.old1" / "rows.parquet").read_bytes() == rows
    assert config.read(folder / "config.yaml").seed == 5


def test_dry_run_prints_a_configuration_that_loads(bench, untried, tmp_path):
    status, text = bench("run", "--method", "ddpo", "--dry-run", "--out", tmp_path / "x", "--set", "method.clip=0.5")
    assert status == 0, text
    tree = yaml.safe_load(text[: text.index("trajectories per round")])
    assert tree["method"]["clip"] == 0.5
    assert tree["optimizer"]["lr"] == resolve("ddpo").optimizer.lr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "nabla_gnf"], ["unknown method 'nabla_gnf'", "did you mean 'nabla_gfn'?", "ddpo"]),
        (["--method", "ddpo", "--reward", "emoji_clp"], ["unknown reward 'emoji_clp'", "'emoji_clip'"]),
        (["--method", "ddpo", "--model", "emojy"], ["unknown model 'emojy'", "'emoji'", "local folder"]),
        (["--method", "ddpo", "--prompts", "emoij"], ["unknown prompt set 'emoij'", "'emoji'"]),
        (["--method", "ddpo", "--suite", "emojis"], ["unknown suite 'emojis'", "'emoji'"]),
        (
            ["--method", "ddpo", "--set", "evaluation.metrics=[fid_priorr]"],
            ["unknown metric 'fid_priorr'", "did you mean 'fid_prior'?"],
        ),
        (
            ["--method", "ddpo", "--set", "method.clp=1", "--set", "train.updates=many", "--set", "optimizer.lr=-1"],
            ["unknown setting 'method.clp'", "'method.clip'", "train.updates = 'many'", "optimizer.lr = -1", "greater"],
        ),
        (["--method", "ddpo", "--set", "nonsense"], ["key=value", "'nonsense'"]),
        (
            ["--method", "draft", "--reward", "jpeg_compressibility"],
            ["'draft'", "'jpeg_compressibility'", "gradient", "ddpo"],
        ),
        (["--method", "ddpo", "--set", "sampler.eta=0"], ["'ddpo'", "sampler.eta > 0"]),
        (["--method", "ddpo", "--model", "org/absent"], ["hf download org/absent", "--model emoji"]),
    ],
)
def test_one_clear_sentence(bench, tmp_path, arguments, words):
    status, text = bench("run", *arguments, "--out", tmp_path / "out")
    assert status == 2
    assert "Traceback" not in text
    for word in words:
        assert word in text
    assert not (tmp_path / "out").exists()


def test_a_flow_setting_without_a_flow_is_refused(bench, tmp_path, pipeline_folder):
    status, text = bench(
        "run", "--method", "draft", "--reward", "colorfulness", "--model", pipeline_folder, "--out", tmp_path / "out",
        "--set", "optimizer.networks.flow.lr=0.1",
    )  # fmt: skip
    assert status == 2
    assert "optimizer.networks.flow" in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "\n  \n", "holds no prompt"),
        ("broken.json", "{", "cannot read prompts"),
        ("table.csv", "a,b\n1,2\n", "no column named prompt"),
        ("absent.txt", None, "check how it is written"),
        ("picture.png", "x", "unknown file type '.png'"),
    ],
)
def test_bad_prompt_files(bench, tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    status, text = bench("run", "--method", "prior", "--prompts", path, "--out", tmp_path / "out")
    assert status == 2
    assert words in text
    assert name in text


@pytest.mark.parametrize("command", ["verify {}", "merge {}.zip ring"])
def test_what_is_not_there_is_said_to_be_missing(bench, tmp_path, command):
    status, text = bench(*command.format(tmp_path / "absent").split())
    assert status == 2
    assert "absent" in text
    assert "there is no" in text or "holds no finished run" in text


def test_help_has_a_line_for_each_paragraph_and_each_example():
    for command in application.registered_commands:
        given, shown = inspect.cleandoc(command.callback.__doc__).split("\n\n"), command.help.split("\n\n")
        for before, after in zip(given, shown, strict=True):
            verbatim = before.startswith((" ", "bench "))
            after = Text.from_markup(after).plain
            assert after == before if verbatim else after.split() == before.split() and "\n" not in after


@pytest.mark.slow
def test_an_unreachable_hub_is_told_within_seconds(tmp_path):
    """Not only `HF_HUB_OFFLINE`: a hub that refuses connections must not be retried for half a minute."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "bench", "run", "--method", "ddpo", "--model", "org/absent"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "the hub cannot be reached" in done.stderr


def test_a_broken_plugin_stays_listed_and_is_named(bench, monkeypatch):
    broken = EntryPoint("mymethod", "no_such_module:Thing", "bench.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken] if group == "bench.methods" else [])
    registry.plugins.cache_clear()
    try:
        status, text = bench("ls", "methods")
        assert status == 0
        assert "mymethod" in text
        assert "broken" in text
        assert "nabla_gfn" in text
        status, text = bench("run", "--method", "mymethod")
        assert status == 2
        assert "no_such_module" in text
    finally:
        registry.plugins.cache_clear()


def test_equal_settings_hash_equal_and_survive_yaml(tmp_path):
    one = resolve("ddpo", assignments=["train.updates=7"])
    two = resolve("ddpo", overrides={"train.updates": 7})
    assert one.hash() == two.hash() != resolve("ddpo").hash()
    (tmp_path / "c.yaml").write_text(one.to_yaml())
    assert config.read(tmp_path / "c.yaml").hash() == one.hash()
    with pytest.raises(BenchError, match=r"'train\.update'"):
        resolve("ddpo", assignments=["train.update=7"])


def test_the_terms_of_a_weighted_sum_are_reported(undrawn, tiny_run):
    folder = tiny_run("prior", "--reward", "colorfulness+0.5*jpeg_incompressibility")
    rows = read_rows(folder / "rows.parquet").set_index("metric")["value"]
    parts = rows["reward/colorfulness/train"], rows["reward/jpeg_incompressibility/train"]
    assert rows["reward/train"] == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-5)


def test_doctor_says_what_is_missing_and_how_to_get_it(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    status, text = bench("doctor")
    assert status == 0
    lines = {line[:34].strip(): line[34:] for line in text.splitlines()}
    assert "present" in lines["model emoji"]
    assert "xswu/HPSv2 (1.97 GB)" in lines["reward hps"]
    assert "present" in lines["reward colorfulness"]
    assert "missing" in lines["features inception_v3"]
    assert "float32" in lines["gpu"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["option", "accelerate"])
def test_a_whole_run_in_two_processes(tiny_run, tmp_path, pipeline_folder, launcher):
    """Sampling, training, evaluation, files: as one process makes them, but for the order of sums."""
    shards = ["--set", "train.micro_batch=1", "--set", "train.sample_batch=2"]
    one = tiny_run("nabla_gfn", *shards)
    stored = config.read(one / "config.yaml")
    settings = [word for key, value in _leaves(stored.model_dump(mode="json")) for word in ("--set", f"{key}={value}")]
    start = [sys.executable, "-m", "bench"]
    if launcher == "accelerate":
        start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
                 "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "-m", "bench"]  # fmt: skip
    command = [*start, "run", "--method", "nabla_gfn", "--reward", "colorfulness", "--suite", "emoji", *settings]
    command += ["--out", str(tmp_path / "two")] + (["--num-processes", "2"] if launcher == "option" else [])
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "other"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Results in") == 1  # one process speaks
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
    assert {path.name for path in one.iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    frames = [read_rows(folder / "rows.parquet").set_index("metric") for folder in (one, tmp_path / "two")]
    assert frames[0]["config_hash"].iloc[0] == frames[1]["config_hash"].iloc[0]
    for name in ("reward/train", "path_kl"):
        assert frames[1].loc[name, "value"] == pytest.approx(frames[0].loc[name, "value"], rel=1e-3)
    for name in ("network_forwards", "reward_calls", "reward_gradients"):
        assert frames[1][name].iloc[0] == frames[0][name].iloc[0] > 0
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (one, tmp_path / "two")]
    for a, b in zip(*logs, strict=True):
        assert b["reward"] == pytest.approx(a["reward"], rel=1e-4)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)


def _leaves(tree: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted key and YAML value of every setting."""
    found = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found += _leaves(value, f"{prefix}{key}.")
        elif key not in ("suite", "name") or prefix in ("model.", "prompts."):
            found.append((prefix + key, json.dumps(value)))
    return found


@pytest.mark.slow
def test_two_processes_stop_together_and_one_speaks(bench, tmp_path, pipeline_folder):
    """A loss that is not finite in one of them: one sentence, a row that says failed, the status of a mistake."""
    settings = ("reward.beta=1e30", "sampler.steps=2", "train.prompts_per_round=2", "train.micro_batch=2",
                "method.channels=[32,32]")  # fmt: skip
    command = [sys.executable, "-m", "bench", "run", "--method", "nabla_gfn", "--reward", "colorfulness",
               "--model", str(pipeline_folder), "--out", str(tmp_path / "run"), "--num-processes", "2"]  # fmt: skip
    command += [word for setting in settings for word in ("--set", setting)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.count("Error:") == 1
    assert "not finite" in done.stderr
    assert "Traceback" not in done.stderr
    assert set(read_rows(tmp_path / "run" / "rows.parquet")["status"]) == {"failed"}


def test_more_updates_extend_the_run(bench, tmp_path, monkeypatch):
    """A neighbour with fewer updates is gone on from, to the bit; not where a run of so many would have differed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    small = ("--set", "evaluation.samples_per_prompt=64", "--set", "evaluation.metrics=[reward]")
    small += ("--set", "evaluation.at=[0.5]")
    ring = ("run", "--method", "rtb", "--model", "ring", *small)
    status, text = bench(*ring, "--updates", 4, "--out", "straight")
    assert status == 0, text
    assert bench(*ring, "--updates", 2)[0] == 0
    status, text = bench(*ring, "--updates", 4)
    assert status == 0, text
    assert "Going on from" in text
    assert "Resuming after update 2 of 4" in text
    (longer,) = [p.parent for p in tmp_path.glob("runs/ring/*/*/config.yaml") if config.read(p).train.updates == 4]
    adapters = [
        (folder / "adapter" / "analytic.safetensors").read_bytes() for folder in (tmp_path / "straight", longer)
    ]
    assert adapters[0] == adapters[1]
    decay = ("--set", "optimizer.decay=0.5")
    assert bench(*ring, *decay, "--updates", 1)[0] == 0
    status, text = bench(*ring, *decay, "--updates", 2)
    assert status == 0, text
    assert "optimizer.decay is a share of all updates: starting anew" in text
    at = ("--set", "evaluation.at=[1]")
    assert bench(*ring, *at, "--updates", 2)[0] == 0
    status, text = bench(*ring, *at, "--updates", 4)
    assert status == 0, text
    assert "has 2 updates of the same settings, but this run is also evaluated after 1: starting anew" in text
    stages = ("--set", "method.stage_rounds=null")
    tilt = ("run", "--method", "tilt_matching", "--model", "ring", *small, *stages, "--updates")
    assert bench(*tilt, 1)[0] == 0
    status, text = bench(*tilt, 2)
    assert status == 0, text
    assert "a stage of the method is a share of all updates: starting anew" in text


def test_a_sampler_with_one_step_that_counts_is_warned_of(bench, tmp_path, caplog):
    run = ("run", "rtb", "--model", "ring_flow", "--updates", 1, "--out")
    few = ("--set", "evaluation.at=[]", "--set", "evaluation.samples_per_prompt=64")
    sets = ("--set", "sampler.spacing=sd3", "--set", "sampler.final_noise=null")
    assert bench(*run, tmp_path / "one", *few, *sets)[0] == 0
    assert "step 19 of 20 holds 98 % of the sampler's weights" in caplog.text
    caplog.clear()
    assert bench(*run, tmp_path / "all", *few, "--set", "sampler.final_noise=0.06")[0] == 0
    assert "of the sampler's weights" not in caplog.text


def test_a_first_noise_that_decides_and_stages_beyond_the_end_are_warned_of(bench, tmp_path, caplog):
    few = ("--set", "evaluation.at=[]", "--set", "evaluation.samples_per_prompt=64", "--updates", 3)
    run = ("run", "tilt_matching", "--model", "ring", *few, "--out", tmp_path / "tilt")
    assert bench(*run, "--set", "method.stages=3", "--set", "method.stage_rounds=2")[0] == 0
    assert "the run has 3 rounds, and the 3 stages after which 'old' follows have 2 each" in caplog.text
    assert bench(*run, "--set", "method.stages=3", "--set", "method.stage_rounds=null", "--force")[0] == 0
    assert caplog.text.count("stages") == 1 and "the first noise" not in caplog.text
    assert bench("run", "rtb", "--model", "ring", *few, "--set", "sampler.eta=0.5", "--out", tmp_path / "rtb")[0] == 0
    assert "the first noise decides 13 % of a finished sample's variance" in caplog.text


def test_prompts_cut_by_the_encoder_are_counted(undrawn, tiny_run, tmp_path, caplog):
    path = tmp_path / "long.txt"
    path.write_text("cat\ndog\n" + "many letters " * 9 + "\n")
    tiny_run("prior", "--prompts", path)
    assert "1 of 3 prompts are longer than the 16 tokens" in caplog.text


def test_the_method_is_an_argument_too(bench, untried):
    plans = [bench("run", *way, "--dry-run", "--model", "ring") for way in (["ddpo"], ["--method", "ddpo"])]
    assert plans[0] == plans[1]
    assert plans[0][0] == 0
    for arguments, words in {
        ("ddpo", "--method", "draft"): "two methods are given",
        (): "which method?",
        ("ddpo", "--probe"): "--dry-run",
        ("ddpo", "--metric", "vendy"): "did you mean 'vendi'?",
    }.items():
        status, text = bench("run", *arguments)
        assert status == 2
        assert words in text
    assert bench("--version") == (0, f"nabla-bench {version('nabla-bench')}\n")


def test_the_shell_completes_names():
    """Through typer's own protocol, in a process of its own."""
    environment = os.environ | {"_BENCH_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    for words, names in {
        "bench run nabla_": {name for name in registry.BUILT_IN["methods"] if name.startswith("nabla_")},
        "bench ls m": {"methods", "metrics", "models"},
    }.items():
        code = "import sys; sys.argv = ['bench']; from bench.cli.app import application; application(prog_name='bench')"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | {"COMP_WORDS": words}, capture_output=True, text=True
        )
        assert set(done.stdout.split()) == names, done.stderr


def test_methods_are_listed_without_torch_each_with_a_line_of_its_own():
    code = (
        "import sys; from bench.diagnose.listing import describe; rows = list(describe('methods'));"
        "print(len({str(text) for _, text, _ in rows}), len(rows), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines, methods, torch_loaded = done.stdout.split()
    assert lines == methods
    assert torch_loaded == "False"


def test_listing_marks_gpu_and_downloads(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    lines = {line.split()[0]: line for line in bench("ls", "models")[1].splitlines() if line.strip()}
    assert "a GPU, 4.27 GB to download" in lines["sd15"]
    assert "GPU" not in lines["emoji"] + lines["ring"]
    lines = {line.split()[0]: line for line in bench("ls", "rewards")[1].splitlines() if line.strip()}
    assert "1.97 GB to download" in lines["hps"]
    assert "download" not in lines["colorfulness"]


def test_metrics_are_added_and_beta_is_not_another_rewards(bench, untried, tmp_path):
    own = resolve("ddpo")
    assert resolve("ddpo", metrics=["vendi", "sampler_gap"]).evaluation.metrics == [
        *own.evaluation.metrics, "sampler_gap"
    ]  # fmt: skip
    assert resolve("ddpo", suite="demo").reward.beta == 2
    assert resolve("ddpo", suite="demo", reward="jpeg_compressibility").reward.beta == 1
    assert config.beta_origin(own) == "the suite 'emoji' has it for 'emoji_clip'"
    assert "knows nothing of 'colorfulness'" in config.beta_origin(resolve("ddpo", reward="colorfulness"))
    assert config.beta_origin(resolve("ddpo", assignments=["reward.beta=7"])) == "as given"
    (tmp_path / "five.txt").write_text("cat\ndog\nlion\nwolf\nfox\n")
    _, text = bench("run", "ddpo", "--dry-run", "--prompts", tmp_path / "five.txt")
    assert "reward.beta: 5 (the suite" in text
    found = load_prompts(str(tmp_path / "five.txt"))
    counts = [len(getattr(found, split)) for split in SPLITS]
    assert "prompts: {} train, {} validation, {} test".format(*counts) in text


def test_the_probe_knows_what_beta_means(bench):
    """Gaussian rewards: the spread is σ, means do not count; the target's KL is `β²σ²/2`, its gain `βσ²`."""
    rng = torch.Generator().manual_seed(0)
    rewards = 3.0 * torch.randn(4, 40_000, generator=rng) + torch.tensor([[0.0], [100.0], [-40.0], [7.0]])
    assert probe.spread(rewards) == pytest.approx(3.0, rel=0.01)
    status, text = bench("run", "prior", "--model", "gaussian", "--dry-run", "--probe")
    assert status == 0, text
    spread = float(re.search(r"spreads by ([\d.]+)", text)[1])
    found = re.findall(r"^ *([\d.]+)(?: \(this run's\))? +([\d.]+) +([\d.]+) +[\d.]+$", text, re.M)
    tilts = {float(beta): (float(kl), float(gain)) for beta, kl, gain in found}
    for beta, (kl, gain) in tilts.items():
        assert kl == pytest.approx(beta**2 * spread**2 / 2, rel=0.15)
        assert gain == pytest.approx(beta * spread**2, rel=0.1)
    assert [kl for beta, (kl, _) in tilts.items() if beta != 2] == [0.1, 0.5, 1, 2]


def test_points_take_one_thread_unless_said_otherwise(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    ring = ("run", "prior", "--model", "ring", "--set", "evaluation.samples_per_prompt=64")
    try:
        torch.set_num_threads(2)
        assert bench(*ring, "--out", tmp_path / "one")[0] == 0
        assert torch.get_num_threads() == 1
        assert bench(*ring, "--set", "train.threads=2", "--out", tmp_path / "two")[0] == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_doctor_warns_of_a_busy_machine(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for load, word in ((0.2, "0.2 on 2 cores"), (1.9, "HIGH")):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0, 0))
        assert dict(doctor._lines())["load"].startswith(word)
