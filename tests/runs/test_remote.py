"""Runs at a URL: mirrored there, resumed from there on another machine, and compared from there."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from bench import python
from bench.errors import BenchError
from bench.reporting.rows import read_rows
from bench.runs.log import read_log
from bench.runs.remote import MANIFEST, Mirror, readable
from bench.training.trainer import Trainer

SETTINGS = (
    "evaluation.samples_per_prompt=8", "evaluation.metrics=[reward,path_kl]", "evaluation.at=[2]",
    "train.samples_per_prompt=8", "train.updates_per_round=1", "train.checkpoint_every=1", "sampler.steps=4",
)  # fmt: skip


@pytest.fixture
def ring(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """A run of four updates at a place, on the machine of a name, which shares no files with others."""

    def call(out: object, *options: object, machine: str = "one") -> tuple[int, str]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        sets = [word for setting in SETTINGS for word in ("--set", setting)]
        return bench("run", "rtb", "--model", "ring", "--updates", 4, "--out", out, *sets, *options)

    return call


@pytest.fixture
def memory() -> Iterator[str]:
    """A URL of fsspec's file system in memory."""
    files = fsspec.filesystem("memory")
    yield "memory://bucket/run"
    files.rm("/bucket", recursive=True)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket of an S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
             "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()


def numbers(rows: Path) -> object:
    """What a run measured, without times."""
    frame = read_rows(rows / "rows.parquet")
    return frame[["metric", "value", "prior", "difference"]].to_dict("list")


def losses(folder: Path) -> list[float]:
    return read_log(folder)["loss"].to_list()


def stop_at(update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Trainer.step

    def step(self: Trainer) -> dict:
        if self.update == update:
            raise BenchError("the machine is gone")
        return whole(self)

    monkeypatch.setattr(Trainer, "step", step)


def test_another_machine_goes_on_from_s3_to_the_same_bits(ring, bench, s3: str, tmp_path: Path, monkeypatch) -> None:
    assert ring(tmp_path / "here")[0] == 0
    url = f"{s3}/runs/run"
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert "the machine is gone" in ring(url)[1]
    files = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    names = {path.removeprefix("bucket/runs/run/") for path in files.find("bucket/runs/run")}
    assert {"config.yaml", "log.jsonl", "rows-at-0000002.parquet", "error.log", MANIFEST} <= names
    assert sorted(name[:26] for name in names if "update" in name) == [f"checkpoints/update-000000{i}" for i in (2, 3)]
    status, text = ring(url, machine="two")
    assert status == 0, text
    assert "Resuming after update 3 of 4." in text
    assert f"Results in {url}: " in text
    folder = readable(url)
    assert numbers(folder) == numbers(tmp_path / "here")
    assert losses(Mirror(url).folder) == losses(tmp_path / "here")
    status, text = ring(url, machine="one")  # whose own files are older
    assert (status, "This run is finished; nothing was computed." in text) == (0, True)
    status, text = bench("report", f"{s3}/runs", "--format", "csv", "--metrics", "reward/train")
    assert status == 0, text
    assert "rtb" in text
    assert len(python.report(url)) == len(python.report(tmp_path / "here"))


def test_what_could_not_be_stored_is_stored_the_next_time(ring, memory: str, monkeypatch, caplog) -> None:
    kind = type(fsspec.filesystem("memory"))
    with monkeypatch.context() as patch:
        whole = kind.put_file

        def put(self, path: str, *arguments: object, **options: object) -> None:
            if "update-0000004" in path or "rows.parquet" in path:
                raise OSError("the network is down")
            whole(self, path, *arguments, **options)

        patch.setattr(kind, "put_file", put)
        status, text = ring(memory)
        assert (status, "Traceback" in text) == (2, False)
        assert f"cannot reach {memory} (the network is down): check the address" in text
    assert f"What is new is in {Mirror(memory).folder}" in caplog.text
    assert not (readable(memory) / "rows.parquet").exists()
    status, text = ring(memory)
    assert (status, "This run is finished; nothing was computed." in text) == (0, True)
    assert numbers(readable(memory)) == numbers(Mirror(memory).folder)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://absent/run", "cannot reach s3://absent/run ("),
        ("nowhere://a/run", "pip install 'nabla-bench[remote]' brings S3"),
    ],
)
def test_a_url_that_cannot_be_used_is_named_before_training(ring, bench, s3: str, url: str, told: str) -> None:
    status, text = ring(url)
    assert (status, "Traceback" in text, told in text) == (2, False, True), text
    status, text = bench("report", url)
    assert (status, "Traceback" in text) == (2, False)
    assert told in text or f"{url} holds no run: check the address." in text


def test_missing_credentials_are_told(ring, s3: str, monkeypatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    status, text = ring(f"{s3}/other")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert (status, "Traceback" in text) == (2, False)
    assert "credentials" in text


def test_nothing_of_others_is_touched(ring, memory: str) -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/bucket/run/thesis.tex", b"mine")
    status, text = ring(memory)
    assert (status, f"{memory} is not empty and holds no run: choose another --out." in text) == (2, True)
    assert files.find("/bucket") == ["/bucket/run/thesis.tex"]
    files.rm_file("/bucket/run/thesis.tex")
    assert "--force would replace the run at" in ring(memory, "--force")[1]
    outside = Path(os.environ["XDG_CACHE_HOME"]) / "outside"
    files.pipe_file("/bucket/run/" + MANIFEST, b'{"../../../../../outside": "0"}')
    status, text = ring(memory)
    assert (status, "which is outside the run: it was tampered with" in text) == (2, True)
    assert not outside.exists()


def test_a_plan_needs_no_network(ring, untried: None) -> None:
    status, text = ring("s3://absent/run", "--dry-run")
    assert status == 0, text
    assert "folder: s3://absent/run" in text
