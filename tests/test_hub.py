"""What a setting needs from elsewhere: found, missed within seconds, downloaded, and tried on random weights."""

import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import torch
from bench.rewards.aesthetic import HEAD

from bench import hub as hubs
from bench.config import load_suite, resolve
from bench.errors import BenchError
from bench.hub import Download, Repository
from bench.models.random_weights import write
from bench.prompts import load_prompts
from bench.reporting.rows import RANDOM, read_rows
from bench.runs.requirements import requirements

SUITES = ["sd15-hps", "sd15-aesthetic", "sd15-imagereward"]


def write_dataset(cache: Path, name: str, files: dict[str, str | bytes], ref: str = "main") -> None:
    """Files of a data set in the layout of the hub's cache."""
    root = cache / f"datasets--{name.replace('/', '--')}"
    for file, content in files.items():
        path = root / "snapshots" / ("a" * 40) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text("a" * 40)


def write_prompts(cache: Path, prompts: Sequence[str]) -> None:
    """Stand-ins of the two prompt data sets, laid out like the real ones."""
    half, table = len(prompts) // 2, io.BytesIO()
    pd.DataFrame({"Prompts": prompts, "Category": "x"}).to_parquet(table)
    files = {"benchmark/photo.json": json.dumps(prompts[:half]), "benchmark/paintings.json": json.dumps(prompts[half:])}
    write_dataset(cache, "zhwang/HPDv2", files)
    write_dataset(
        cache, "sayakpaul/drawbench", {"default/train/0000.parquet": table.getvalue()}, "refs/convert/parquet"
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Empty caches of the hub and of this project."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "hub"


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_a_dry_run_says_everything_without_weights(bench, cache, tmp_path, suite):
    status, text = bench("run", "--method", "nabla_gfn", "--suite", suite, "--dry-run", "--out", tmp_path / "out",
                         "--set", "model.dtype=bfloat16", "--num-processes", 2)  # fmt: skip
    assert status == 0, text
    shards = re.search(r"shards of an update: (\d+), shared by 2 processes\n", text)
    assert int(shards[1]) >= 2, text
    assert "NFE of training rollouts: 640,000" in text
    assert "estimated memory a process: " in text
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in text
    total = sum(need.size for need in requirements(resolve("nabla_gfn", suite=suite)))
    assert f"To download: {hubs.size_text(total)}." in text
    assert total > 14e9
    assert not (tmp_path / "out").exists()


def test_the_three_settings_differ_in_reward_prompts_and_tilt():
    resolved = [resolve("nabla_gfn_published", suite=suite) for suite in SUITES]
    assert [c.reward.name for c in resolved] == ["hps", "aesthetic", "image_reward"]
    assert [c.prompts.name for c in resolved] == ["hpdv2_photo_painting", "simple_animals", "drawbench"]
    assert [c.reward.beta for c in resolved] == [1e4, 1e4, 1e3]
    assert [c.method.trust for c in resolved] == [1e2, 2e3, 1e3]
    assert {c.sampler.steps for c in resolved} == {50}
    assert "base" not in load_suite("sd15-aesthetic")


def test_a_reward_alone_selects_its_setting():
    assert resolve("nabla_gfn", reward="hps").suite == "sd15-hps"
    assert resolve("nabla_gfn", reward="hps + 0.1*aesthetic").reward.name == "hps+0.1*aesthetic"


def test_random_weights_of_another_size_are_not_taken_for_these(cache):
    """In one cache: the size that was asked for last is the one that is found."""
    widths = []
    for size in ("tiny", "full", "tiny"):
        write([HEAD], cache, size)
        assert hubs.is_random([HEAD]) and HEAD.path().name == hubs.RANDOM[size]
        state = torch.load(HEAD.path(HEAD.files[0]), weights_only=True)
        widths.append(state["layers.0.weight"].shape[1])
    assert widths == [16, 768, 16]


@pytest.mark.slow
def test_full_size_runs_of_every_setting_on_random_weights(bench, hub, tmp_path, monkeypatch):
    """End to end through the real loading code, reduced; and their rows are in no leaderboard."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts = ("a cat in a hat", "two dogs", "a red apple", "the sea at night", "an old house", "a green bird")
    write_prompts(hub, prompts)
    settings = {
        "sampler.steps": 3, "train.prompts_per_round": 2, "train.samples_per_prompt": 2, "train.updates_per_round": 1,
        "evaluation.train_prompts": 2, "evaluation.test_prompts": 1, "evaluation.samples_per_prompt": 2,
        "evaluation.features": "clip_vitl14", "method.channels": "[32,32]",
        "evaluation.rewards": "[jpeg_compressibility]",
        "evaluation.metrics": "[reward,fid_prior,fid_prior_per_prompt,kid_prior,diversity_clip,vendi,path_kl]",
    }  # fmt: skip
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    for suite in SUITES:
        status, text = bench(
            "run", "--method", "nabla_gfn", "--suite", suite, "--updates", 1, "--out", tmp_path / suite, *sets
        )
        assert status == 0, text
        rows = read_rows(tmp_path / suite / "rows.parquet").set_index("metric")
        assert set(rows["status"]) == {RANDOM}
        assert {"reward/train", "fid_prior_per_prompt/clip_vitl14", "diversity_clip/clip_vitl14", "path_kl"} <= set(
            rows.index
        )
        assert rows.loc["path_kl", "value"] > 0
        assert json.loads((tmp_path / suite / "environment.json").read_text())["random_weights"] is True
    status, text = bench("report", *(tmp_path / suite for suite in SUITES))
    assert status == 2
    assert "random weights" in text


def test_profile_of_random_weights(bench, cache, tmp_path):
    out = tmp_path / "profile.json"
    status, text = bench("profile", "--model", "sd21", "--reward", "hps+0.5*image_reward", "--method", "draft_1",
                         "--random-weights", "--size", "tiny", "--repeats", 1, "--out", out, "--set", "sampler.steps=2",
                         "--set", "train.prompts_per_round=2", "--set", "train.samples_per_prompt=1",
                         "--set", "train.sample_batch=16")  # fmt: skip
    assert status == 0, text
    stored = json.loads(out.read_text())
    assert {"rollout", "diffusers pipeline"} == stored["sampling"].keys()
    for rows in stored["sampling"].values():
        assert rows[0]["network_forwards"] == 2 * 2 * 16  # steps, guidance, sample_batch
        assert rows[0]["peak_memory"] > 0
    assert len(stored["updates"]) == 2
    assert stored["updates"][0]["reward_gradients"] == 1
    assert os.environ["HF_HUB_CACHE"] == str(cache)
    status, text = bench("profile", "--model", "emoji", "--random-weights")
    assert status == 2
    assert "--random-weights is for models from the hub" in text


def test_random_weights_of_an_unknown_architecture(tmp_path):
    with pytest.raises(BenchError, match="no architecture of org/absent"):
        write([Repository("org/absent", ())], tmp_path)


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["emoji", "simple_animals", "hpdv2_photo_painting", "drawbench"])
def test_the_parts_of_the_prompts_are_disjoint(cache, name):
    numbered = [f"prompt {i}, with a comma" for i in range(40)]
    write_prompts(cache, numbered)
    found = load_prompts(name)
    whole = found.all
    assert len(set(whole)) == len(whole) == {"emoji": 123, "simple_animals": 45}.get(name, 40)
    assert min(len(found.train), len(found.validation), len(found.test)) > 0
    assert found == load_prompts(name)


def test_the_simple_animals_are_the_45_of_ddpo():
    found = load_prompts("simple_animals")
    assert {"cat", "hedgehog", "kangaroo", "llama", "raccoon"} <= {*found.all}


# --- missing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9", pytest.param("http://10.255.255.1", marks=pytest.mark.slow)]
)
def test_missing_weights_are_told_within_ten_seconds(tmp_path, endpoint):
    """A hub that refuses, and one that never answers; left alone its client takes 23 seconds to give up."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-m", "bench", "run", "--method", "nabla_gfn", "--reward", "hps"]
    start = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    seconds = time.monotonic() - start
    assert done.returncode == 2
    for words in ("xswu/HPSv2 --include HPS_v2.1_compressed.pt  # 1.97 GB", "stable-diffusion-v1-5", "# 4.27 GB",
                  "zhwang/HPDv2 --repo-type dataset", "bench fetch", "--model emoji"):  # fmt: skip
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 20, seconds  # imports included; ten on an idle machine


# --- downloading ----------------------------------------------------------------------------------------------------


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download uses, over the files of `content`."""

    content: dict[str, bytes] = {}

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path and path.startswith("/org/gated"):
            self._send(b"", body, {"X-Error-Code": "GatedRepo"}, 403)
        elif path.startswith("/api/models/org/absent"):
            self._send(b"", body, {"X-Error-Code": "RepoNotFound"}, 404)
        elif path.startswith("/api/models/org/"):
            files = [
                {"rfilename": n, "path": n, "type": "file", "size": len(c), "oid": "0"} for n, c in self.content.items()
            ]
            whole = {"id": path.removeprefix("/api/models/"), "sha": "b" * 40, "siblings": files}
            self._send(json.dumps(files if "/tree/" in path else whole).encode(), body)
        elif (name := path.rpartition("/resolve/")[2].partition("/")[2]) in self.content:
            self._send(self.content[name], body, {"X-Repo-Commit": "b" * 40})
        elif path.strip("/") in self.content:
            self._send(self.content[path.strip("/")], body)
        else:
            self._send(b"", body, status=200 if path == "/" else 404)

    def _send(self, data: bytes, body: bool, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        tag = hashlib.sha256(data).hexdigest()
        for key, value in {"Content-Length": str(len(data)), "ETag": f'"{tag}"', **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


class Server(NamedTuple):
    """A hub that runs."""

    address: str
    handler: type[FakeHub]


@pytest.fixture
def server():
    """A fake hub with two wanted files, one unwanted, and an archive."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("inner/weights.bin", b"1234")
    content = {
        "config.json": b"{}",
        "sub/weights.bin": b"abc",
        "unwanted.bin": b"x" * 100,
        "box.zip": archive.getvalue(),
    }
    handler = type("Handler", (FakeHub,), {"content": content})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield Server(f"http://127.0.0.1:{running.server_port}", handler)
        running.shutdown()


def test_a_repository_is_downloaded_once_and_only_what_is_needed(server, tmp_path):
    """In a process of its own: the hub's client reads its endpoint when it is imported."""
    code = (
        "from bench.hub import Repository, obtain\n"
        "need = Repository('org/tiny', ('config.json', 'sub/weights.bin'))\n"
        "assert need.missing() == ['config.json', 'sub/weights.bin']\n"
        "obtain([need]); assert not need.missing()\n"
        "assert need.path('sub/weights.bin').read_bytes() == b'abc'\n"
        "assert need.path().name == 'b' * 40 and not (need.path() / 'unwanted.bin').exists()\n"
        "wrong = Repository('org/tiny', ('absent.bin',))\n"
        "try: obtain([wrong])\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "the hub repository 'org/tiny' has no absent.bin" in done.stdout
    assert "hf download org/tiny --include absent.bin" in done.stdout


@pytest.mark.slow
def test_a_pipeline_is_fetched_by_what_its_index_names(server, pipeline_folder, tmp_path):
    """Configurations first; weights of a class that is supported only; and a gated repository is no missing one."""
    files = {str(p.relative_to(pipeline_folder)): p.read_bytes() for p in pipeline_folder.rglob("*.*") if p.is_file()}
    content = server.handler.content
    content |= files | {"unet/diffusion_pytorch_model.fp16.safetensors": b"x", "sd.ckpt": b"x"}
    code = (
        "import sys\n"
        "from bench.errors import BenchError\n"
        "from bench.models.catalogue import locate\n"
        "from bench.models.folder import family_of\n"
        "try:\n"
        "    folder = locate(sys.argv[1])\n"
        "    print(family_of(folder).__name__, sorted(str(p.relative_to(folder)) for p in folder.rglob('*.*')))\n"
        "except BenchError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)

    def located(name: str) -> str:
        command = [sys.executable, "-c", code, name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = located("org/tiny")
    assert text.startswith("StableDiffusion ")
    assert "'unet/diffusion_pytorch_model.safetensors'" in text
    assert "fp16" not in text and "ckpt" not in text
    assert "is gated: ask for access at https://huggingface.co/org/gated" in located("org/gated")
    assert "the hub has no model 'org/absent', or it is private" in located("org/absent")
    content["model_index.json"] = json.dumps({"_class_name": "KandinskyPipeline"}).encode()
    assert "'KandinskyPipeline' is not supported; supported are StableDiffusionPipeline" in located("org/other")
    assert not list(tmp_path.rglob("models--org--other/**/*.safetensors"))


def test_an_archive_is_downloaded_and_unpacked(server, cache, monkeypatch):
    monkeypatch.setattr(hubs, "reachable", lambda: True)
    need = Download(f"{server.address}/box.zip", "box", ("inner/weights.bin",), size=4)
    assert need.missing()
    hubs.obtain([need])
    assert (need.path / "inner/weights.bin").read_bytes() == b"1234"
    with pytest.raises(BenchError, match=r"does not hold absent\.bin"):
        hubs.obtain([Download(f"{server.address}/box.zip", "box", ("absent.bin",))])
    with pytest.raises(BenchError, match=r"downloading .* failed"):
        hubs.obtain([Download(f"{server.address}/nothing.zip", "nothing", ("x",))])


def test_fetch_says_sizes_first(bench, cache):
    status, text = bench("fetch", "--suite", "sd15-aesthetic", "--dry-run")
    assert status == 0
    assert "4.27 GB" in text
    status, text = bench("fetch", "--suite", "sd15-aesthetic")
    assert status == 2
    assert text.index("To download: ") < text.index("the hub cannot be reached")
    assert bench("fetch")[1].strip().endswith("Everything is here.")  # the embedded setting needs nothing


def test_requirements_name_each_file_once(cache):
    needs = requirements(resolve("nabla_gfn", suite="sd15-aesthetic"))
    assert len(needs) == len(set(needs))
    assert [need.source for need in needs if "clip-vit-large" in need.source] == ["openai/clip-vit-large-patch14"]
    assert hubs.is_random(needs) is False
