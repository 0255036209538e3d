"""`bench judge`: models that other code trained, beside numbers of diffusers' own pipelines."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from outside import save_diffusers, save_kohya, save_peft
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from bench.environment import revision
from bench.evaluation import evaluator
from bench.evaluation.scores import load_reward
from bench.models.catalogue import load_model, make_kernel
from bench.models.pipeline import PipelineModel
from bench.reporting.rows import read_rows, write_rows
from bench.runs.evaluate import evaluate_stored
from bench.sampling.noise import Noise
from bench.settings import ModelConfig, SamplerConfig

pytestmark = pytest.mark.usefixtures("undrawn")

STEPS = 3
SETTINGS = [
    f"sampler.steps={STEPS}", "evaluation.train_prompts=2", "evaluation.test_prompts=1", "evaluation.at=[]",
    "evaluation.samples_per_prompt=2", "evaluation.metrics=[reward,path_kl,output_norm,tilt_gap]",
    "evaluation.rewards=[]", "evaluation.features=efficientnet_lite0", "sampler.spacing=auto", "sampler.eta=1",
    "train.micro_batch=4", "train.sample_batch=4",
]  # fmt: skip
FAMILIES = ["sdxl", "sd35_medium", "flux_dev", "flux2_klein"]


@pytest.fixture
def judge(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Call `bench judge` with small settings and the reward colorfulness."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("cat\ndog\nred bird\nfish\nbear\napple\n")

    def call(*words: object, settings: tuple[str, ...] = (), **options: object) -> tuple[int, str]:
        named = {"reward": "colorfulness", "prompts": tmp_path / "prompts.txt", "out": tmp_path / "judged"} | options
        given = [word for key, value in named.items() if value is not None for word in (f"--{key}", value)]
        return bench("judge", *words, *given, *(w for one in (*SETTINGS, *settings) for w in ("--set", one)))

    return call


def rows_of(folder: Path) -> Any:
    """Metric → row of a run."""
    return read_rows(folder / "rows.parquet").set_index("metric")


def two_rows(folder: Path) -> tuple[Any, Any, Path]:
    """The rows with noise, those without, and the folder of the latter."""
    both = {json.loads((rows := rows_of(path))["settings"].iloc[0])["evaluation.sampler.eta"]: (rows, path)
            for path in folder.iterdir()}  # fmt: skip
    return both[None][0], *both[0.0]


def fresh(name: str | Path) -> tuple[PipelineModel, Any]:
    """The prior, and its pipeline as diffusers alone reads it."""
    model = load_model(ModelConfig(name=str(name), finetune="none"), SamplerConfig(guidance=3.0))
    return model, model.open()


def by_diffusers(model: PipelineModel, pipe: Any, samples: list[tuple[str, int]], **inputs: object) -> torch.Tensor:
    """Images in [0, 1] that the pipeline's own call draws from the evaluation's first noise, without noise between."""
    prompts = [prompt for prompt, _ in samples]
    kernel = make_kernel(model.spec, SamplerConfig(steps=STEPS, eta=0.0, guidance=3.0))
    model.pipeline_inputs = lambda conditioning: {"prompt": prompts, "guidance_scale": 3.0, **inputs}  # type: ignore
    z = Noise(0, "evaluate", samples)(0, model.latent_shape)
    with torch.no_grad():
        return model.call_pipeline(pipe, model.encode(prompts), z, kernel, "pt")


def require_the_images_of_diffusers(
    folder: Path, rows: Any, name: str | Path, load: Callable[[Any], object], **inputs: object
) -> None:
    """Images and rewards of a judged row without noise are those of diffusers' call, the prior's too."""
    index = list(csv.DictReader((folder / "images" / "index.csv").open()))
    samples = [(line["prompt"], int(line["sample"])) for line in index]
    train = [line["split"] == "train" for line in index]
    model, pipe = fresh(name)
    drawn = {"prior": by_diffusers(model, pipe, samples, **inputs)}
    load(pipe)
    drawn["finetuned"] = by_diffusers(model, pipe, samples, **inputs)
    assert (drawn["finetuned"] - drawn["prior"]).abs().max() > 0.02
    reward, prompts = load_reward("colorfulness"), [prompt for prompt, _ in samples]
    for which, column in (("prior", "prior"), ("finetuned", "value")):
        images = (drawn[which] * 255).round().byte()
        for line, image in zip(index, images, strict=True):
            kept = np.asarray(Image.open(folder / "images" / line[which]).convert("RGB")).astype(int)
            assert np.abs(kept - image.permute(1, 2, 0).numpy()).max() <= (1 if kept.shape[0] <= 128 else 255)
        scores = reward(images.float() / 255, prompts)[torch.tensor(train)]
        assert rows.loc["reward/train", column] == pytest.approx(float(scores.mean()), rel=2e-3, abs=2e-2)


SHORT = ("flux2_klein",)  # Stable Diffusion and its third version are in the tests below


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=() if one in SHORT else pytest.mark.slow) for one in FAMILIES], indirect=True
)
def test_an_adapter_of_diffusers_draws_the_images_of_diffusers(family, judge, tmp_path):
    """Every family: an adapter that diffusers stores, with a scale in its metadata, at scale 0.5."""
    model, pipe = fresh(family)
    adapter = save_diffusers(pipe, model.denoiser, tmp_path / "lora")
    status, text = judge(adapter, "--ode", model=family, scale=0.5, settings=("sampler.guidance=3",))
    assert status == 0, text
    noisy, rows, folder = two_rows(tmp_path / "judged")

    def load(pipe: Any) -> None:
        pipe.load_lora_weights(adapter, adapter_name="theirs")
        pipe.set_adapters(["theirs"], [0.5])

    require_the_images_of_diffusers(folder, rows, family, load)
    assert noisy.loc["path_kl", "value"] > 0
    assert not np.isnan(noisy.loc["tilt_gap", "difference"])
    assert np.isnan(rows.loc["path_kl", "value"])
    assert rows.loc["output_norm", "value"] != 1
    assert noisy["method"].iloc[0] == "0.5*lora (judged; training cost unknown)"


def test_peft_on_the_flow_prior(judge, tmp_path):
    """An adapter as peft's own `save_pretrained` stores it; its alpha is in adapter_config.json."""
    _, pipe = fresh("emoji_flow")
    adapter = save_peft(pipe.transformer, tmp_path / "checkpoint-400" / "adapter")
    prompts = {
        "model": "emoji_flow",
        "prompts": "emoji",
        "settings": ("sampler.guidance=3", "sampler.final_noise=0.005"),
    }
    status, text = judge(adapter, "--ode", "--cost", "nfe=1.5e6,gpu_hours=2", **prompts)
    assert status == 0, text
    noisy, rows, folder = two_rows(tmp_path / "judged")

    state = load_file(adapter / "adapter_model.safetensors")

    def load(pipe: Any) -> None:
        pipe.transformer.load_lora_adapter(
            {k.removeprefix("base_model.model."): v for k, v in state.items()},
            prefix=None,
            metadata={"r": 2, "lora_alpha": 8, "target_modules": ["to_q", "to_v"]},
        )

    require_the_images_of_diffusers(folder, rows, "emoji_flow", load, max_sequence_length=0)
    assert set(noisy["method"]) == {"checkpoint-400/adapter (judged; training cost as stated)"}
    assert (noisy["network_forwards"] == 1_500_000).all() and (noisy["train_seconds"] >= 7200).all()
    assert (noisy["updates"] == 0).all()


def test_kohya_with_a_text_encoder(judge, pipeline_folder, tmp_path):
    """Both the denoiser and the text encoder are changed: the prior's prompts are encoded without."""
    _, pipe = fresh(pipeline_folder)
    file = save_kohya({"lora_unet": pipe.unet, "lora_te": pipe.text_encoder}, tmp_path / "kohya.safetensors")
    status, text = judge(file, "--ode", model=pipeline_folder, settings=("sampler.guidance=3",))
    assert status == 0, text
    noisy, rows, folder = two_rows(tmp_path / "judged")
    require_the_images_of_diffusers(folder, rows, pipeline_folder, lambda pipe: pipe.load_lora_weights(file))
    assert noisy.loc["path_kl", "value"] > 0


def test_whole_weights_and_their_adapter_are_the_same_model(judge, pipeline_folder, tmp_path):
    """An adapter, and its sum with the weights in four forms that diffusers stores: equal path KL and rewards."""
    _, pipe = fresh(pipeline_folder)
    adapter = save_diffusers(pipe, "unet", tmp_path / "lora")
    other = save_diffusers(fresh(pipeline_folder)[1], "unet", tmp_path / "other", seed=1)
    _, pipe = fresh(pipeline_folder)
    for name, folder in {"one": adapter, "two": other}.items():
        pipe.load_lora_weights(folder, adapter_name=name)
    pipe.set_adapters(["one", "two"], [1.0, 0.5])
    pipe.fuse_lora(adapter_names=["one", "two"])
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "merged")
    shutil.copytree(tmp_path / "merged" / "unet", tmp_path / "alone")
    shutil.copy(tmp_path / "alone" / "diffusion_pytorch_model.safetensors", tmp_path / "file.safetensors")
    settings = {"model": pipeline_folder, "settings": ("sampler.guidance=3",)}
    together = ("--together", "--scale", "1", "--scale", "0.5")
    status, text = judge(adapter, other, *together, **settings | {"out": tmp_path / "sum"})
    assert status == 0, text
    whole = [tmp_path / name for name in ("merged", "alone", "file.safetensors")]
    status, text = judge(*whole, **settings)
    assert status == 0, text
    rows = {
        json.loads(one["settings"].iloc[0])["method.label"]: one
        for one in map(rows_of, (tmp_path / "judged").iterdir())
    }
    assert rows.keys() == {"merged", "alone", "file"}
    expected = rows_of(tmp_path / "sum")
    assert expected["method"].iloc[0].startswith("lora+0.5*other (judged")
    for one in rows.values():
        for metric in ("path_kl", "reward/train", "reward/test", "output_norm"):
            values = [frame.loc[metric, ["value", "prior"]].astype(float).to_numpy() for frame in (one, expected)]
            np.testing.assert_allclose(*values, rtol=2e-3, atol=1e-4)


def test_a_few_step_model_has_its_own_sampler(judge, pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder / "unet", tmp_path / "distilled")
    more = ("evaluation.sampler.steps=2", "evaluation.sampler.guidance=1", "evaluation.metrics=[path_kl,path_kl_steps]")
    status, text = judge(tmp_path / "distilled", model=pipeline_folder, settings=more)
    assert status == 0, text
    rows = rows_of(tmp_path / "judged")
    assert [name for name in rows.index if name.startswith("path_kl_steps")] == ["path_kl_steps/01", "path_kl_steps/02"]
    assert rows.loc["path_kl", "value"] == 0  # the weights are the prior's
    assert "2 steps of ddim, guidance 1, η = 1" in text


@pytest.mark.parametrize("method", ["draft_1", "ring"])
def test_an_adapter_of_a_run_gives_the_rows_of_the_run(method, judge, bench, tiny_run, tmp_path):
    """To the bit, of a pipeline and of points; the run's own settings need not be repeated."""
    if method == "ring":
        out, words = tmp_path / "run", ("rtb", "--model", "ring", "--updates", 2, "--out", tmp_path / "run")
        sets = ("evaluation.at=[]", "evaluation.samples_per_prompt=64", "train.samples_per_prompt=8")
        status, text = bench("run", *words, *(word for one in sets for word in ("--set", one)))
        assert status == 0, text
    else:
        out = tiny_run(method, "--set", "model.lora.alpha=3", "--set", "optimizer.lr=0.05")
    for source in [out] if method == "ring" else [out, out / "adapter"]:
        status, text = bench("judge", source, "--out", tmp_path / f"judged-{source.name}", "--label", "mine")
        assert status == 0, text
        ours = rows_of(tmp_path / f"judged-{source.name}")
        theirs = pd.DataFrame(evaluate_stored(out, [], Console(file=io.StringIO())).rows).set_index("metric")
        for column in ("value", "prior", "difference", "standard_error", "degrees", "n", "evaluation"):
            pd.testing.assert_series_equal(ours[column], theirs[column], check_exact=True, check_dtype=False)
        status, text = bench("verify", tmp_path / f"judged-{source.name}")
        assert status == 0, text
        assert "rounding" not in text
    status, text = judge(out, "--scale", 0.5, model="gaussian" if method == "ring" else None, prompts=None, reward=None)
    assert status == (2 if method == "ring" else 0), text


def damage(kind: str, pipe: Any, folder: Path) -> Path:
    """A source that cannot be judged."""
    file = save_diffusers(pipe, "unet", folder / kind) / "pytorch_lora_weights.safetensors"
    state = load_file(file)
    first = sorted(state)[0]
    match kind:
        case "empty":
            save_file({}, file)
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100])
        case "not finite":
            save_file(state | {first: torch.full_like(state[first], torch.nan)}, file)
        case "untrained":
            save_file({k: v * ("lora_A" in k) for k, v in state.items()}, file)
        case "a layer too many":
            save_file(state | {f"unet.mid_block.strange.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}, file)
        case "another size":
            save_file({k: torch.cat([v, v], 1 if "lora_A" in k else 0) for k, v in state.items()}, file)
        case "half a layer":
            save_file({k: v for k, v in state.items() if k != first}, file)
        case "another family":
            save_file({k.replace("unet.", "transformer."): v for k, v in state.items()}, file)
        case "text encoder alone":
            return save_kohya({"lora_te": pipe.text_encoder}, folder / f"{kind}.safetensors")
        case "DoRA of LyCORIS":
            file = save_kohya(
                {"lora_unet": fresh(pipe.config["_name_or_path"])[1].unet}, folder / f"{kind}.safetensors"
            )
            state = load_file(file)
            save_file(state | {f"{sorted(state)[0].split('.')[0]}.dora_scale": torch.ones(4)}, file)
            return file
        case "LoHa":
            save_file({f"lora_unet_x.hada_w{i}_{x}": torch.ones(2, 2) for i in (1, 2) for x in "ab"}, file)
        case "pickled":
            (folder / kind / "pytorch_lora_weights.bin").write_bytes(b"x")
            file.unlink()
            return folder / kind
        case "several":
            shutil.copy(file, file.with_name("other.safetensors"))
            return folder / kind
        case "nothing":
            return folder / "nowhere"
    return file


BROKEN = {
    "empty": "is empty", "truncated": "not a whole file", "not finite": "holds NaN", "untrained": "changes nothing",
    "a layer too many": "mid_block.strange", "another size": "Is it of another family or size?",
    "half a layer": "did not match", "another family": "are of no part", "text encoder alone": "text_encoder alone",
    "DoRA of LyCORIS": "DoRA in the layout of LyCORIS", "LoHa": "LoHa in the layout", "pickled": "never loaded",
    "several": "holds several adapters", "nothing": "there is no ",
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_judged_is_told_in_a_sentence(kind, judge, pipeline_folder, tmp_path):
    """And never judged as the prior that is left."""
    _, pipe = fresh(pipeline_folder)
    status, text = judge(damage(kind, pipe, tmp_path), model=pipeline_folder)
    assert (status, BROKEN[kind] in " ".join(text.split())) == (2, True), text
    assert "Traceback" not in text
    assert not (tmp_path / "judged" / "rows.parquet").exists()


def test_whole_weights_of_another_kind(judge, pipeline_folder, tmp_path):
    pipe = fresh(pipeline_folder)[1]
    other = type(pipe.unet).from_config(pipe.unet.config, cross_attention_dim=8)
    other.save_pretrained(tmp_path / "wide")
    pipe.vae.save_pretrained(tmp_path / "vae")
    shutil.copytree(pipeline_folder, tmp_path / "retold")
    file = tmp_path / "retold" / "text_encoder" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    for source, words in {
        "wide": "of another shape",
        "vae": "holds a AutoencoderKL",
        "retold": "its text_encoder",
    }.items():
        status, text = judge(tmp_path / source, model=pipeline_folder, out=tmp_path / f"judged-{source}")
        assert (status, words in " ".join(text.split())) == (2, True), text


def test_judged_rows_are_packed_merged_verified_and_resumed(judge, bench, pipeline_folder, tmp_path, monkeypatch):
    """A pack holds what was judged; the same command again draws nothing; another file there is no longer that row."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pipeline_folder, "model")
    save_diffusers(fresh(pipeline_folder)[1], "unet", tmp_path / "lora")
    options = {"model": "./model", "prompts": "./prompts.txt", "out": "runs/one"}
    status, text = judge("./lora", "--cost", "reward_calls=1e4", **options)
    assert status == 0, text
    before = rows_of(Path("runs/one"))
    Path("runs/one/rows.parquet").unlink()
    monkeypatch.setattr(evaluator, "draw", lambda *arguments, **options: pytest.fail("drawn again"))
    status, text = judge("./lora", "--cost", "reward_calls=1e4", **options)
    assert status == 0, text
    assert rows_of(Path("runs/one"))["value"].equals(before["value"])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    rows = read_rows(Path("runs/one/rows.parquet")).assign(dirty=False, revision=revision()[0]).astype(object)
    write_rows(Path("runs/one/rows.parquet"), rows.where(rows.notna(), None).to_dict("records"))
    status, text = bench("pack", "runs", "--out", "pack")
    assert status == 0, text
    status, text = bench("merge", "pack", "published")
    assert (status, "1 runs added" in text) == (0, True), text
    shutil.rmtree("lora")
    status, text = bench("verify", "pack/one")
    assert (status, f"{len(before)} values: {len(before)} equal" in text) == (0, True), text
    status, text = bench("report", "published", "--at-reward-calls", "1e4")
    assert (status, "lora (judged; training cost as stated)" in " ".join(text.split())) == (0, True), text
    (file,) = Path("pack/one/adapter/0").glob("*.safetensors")
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    status, text = bench("verify", "pack/one")
    assert (status, "are not those that were judged" in " ".join(text.split())) == (2, True), text


def test_a_repository_of_the_hub_is_named_by_its_commit(judge, pipeline_folder, hub, tmp_path):
    """From the cache, without a network; a file inside may be named."""
    commit = "c0ffee" + "0" * 34
    place = hub / "models--me--lora"
    folder = save_diffusers(fresh(pipeline_folder)[1], "unet", place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    for number, words in enumerate(("me/lora", f"me/lora@main:{next(folder.iterdir()).name}")):
        status, text = judge(words, model=pipeline_folder, out=tmp_path / f"judged{number}")
        assert status == 0, text
        row = rows_of(tmp_path / f"judged{number}").iloc[0]
        assert json.loads(row["settings"])["method.sources"][0].startswith(f"me/lora@{commit}")
    status, text = judge("me/other", model=pipeline_folder)
    assert (status, "the hub cannot be reached" in " ".join(text.split())) == (2, True), text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "what is judged?"),
        (("a", "--cost", "nfe=many"), "it takes nfe, reward_calls, gpu_hours"),
        (("a", "--cost", "hours=1"), "it takes nfe, reward_calls, gpu_hours"),
        (("a", "b", "--scale", 1, "--scale", 2, "--scale", 3), "given 3 times for 2 sources"),
        (("a", "b", "--label", "one"), "--label names one model"),
        (("whole", "--scale", 0.5), "a scale is of adapters alone"),
        (("whole", "a", "--together"), "which do not add up"),
        (("weights.bin",), "is pickled"),
    ],
)
def test_mistakes_of_the_command_line(judge, pipeline_folder, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole").symlink_to(pipeline_folder)
    (tmp_path / "weights.bin").write_bytes(b"x")
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({"unet.x.lora_A.weight": torch.ones(1)}, tmp_path / name / "pytorch_lora_weights.safetensors")
    status, text = judge(*words, model=pipeline_folder)
    assert (status, told in " ".join(text.split())) == (2, True), text
