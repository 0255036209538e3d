"""Rewards that are services, against real HTTP servers on this machine: answers, failures, and what is asked."""

import base64
import io
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bench.rewards.remote import Remote
from bench.rewards.vlm import VLM, log_odds, number
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scaffold import ROOT
from torch import Tensor

from bench.config import resolve
from bench.diagnose.selftest import selftest
from bench.errors import BenchError
from bench.prompts import load_prompts
from bench.runs.rows import comparable_settings
from bench.service import Missing, ServiceConfig
from bench.settings import RunConfig

KEY = "sk-a-secret-of-the-tests"
QUICK = {"wait": 0.01, "tries": 3, "timeout": 0.5}


class Server(ThreadingHTTPServer):
    """`answer`: from the request's JSON to status and body. plan: what goes wrong with the next requests, in order."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Callable[[dict], Any]):
        self.answer, self.plan, self.asked, self.headers_seen = answer, [], [], []
        self.lock, self.busy, self.most, self.hold = threading.Lock(), 0, 0, 0.0
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, body))
            self.server.headers_seen.append(dict(self.headers))
            fault = self.server.plan.pop(0) if self.server.plan else None
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
        time.sleep(self.server.hold)
        with self.server.lock:
            self.server.busy -= 1
        if fault == "hang up":
            return
        if fault == "slow":
            time.sleep(2 * QUICK["timeout"])
        if isinstance(fault, int):
            self.reply(fault, f"no: you sent {self.headers['Authorization']}".encode())
        elif isinstance(fault, bytes):
            self.reply(200, fault)
        else:
            self.reply(200, json.dumps(fault if isinstance(fault, dict) else self.server.answer(body)).encode())

    def reply(self, status: int, data: bytes) -> None:
        try:
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "1")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client has given up
            pass

    def log_message(self, *words: object) -> None:
        pass


def picture(body: dict) -> np.ndarray:
    """The image in a request of OpenAI's protocol."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def question(body: dict) -> str:
    return body["messages"][0]["content"][1]["text"]


def completion(text: str, **logprobs: float) -> dict:
    tokens = [{"token": token, "logprob": value, "bytes": None} for token, value in logprobs.items()]
    content = [{"token": text, "logprob": max(logprobs.values(), default=0.0), "top_logprobs": tokens}]
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
    return {"object": "chat.completion", "model": "judge", "choices": [choice | {"logprobs": {"content": content}}]}


def redness(body: dict) -> dict:
    """Yes with the image's mean red as probability; where a number is asked for, that in tenths."""
    share = float(picture(body)[..., 0].mean()) / 255
    if not body.get("logprobs"):
        return completion(f"{10 * share:.0f}")
    return completion("Yes", Yes=math.log(share + 1e-6), No=math.log(1 - share + 1e-6), The=-20.0)


def serve(answer: Callable[[dict], Any]) -> Iterator[Server]:
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def judge(tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield from serve(redness)


@pytest.fixture
def scorer() -> Iterator[Server]:
    yield from serve(lambda body: {"scores": [float(len(prompt)) for prompt in body["prompts"]]})


def vlm(server: Server, **options: Any) -> VLM:
    return VLM(VLM.Config(endpoint=f"{server.address}/v1", model="judge", **QUICK | options))


def remote(server: Server, **options: Any) -> Remote:
    return Remote(Remote.Config(endpoint=server.address, **QUICK | options))


def images(count: int = 3, height: int = 8, width: int = 12) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_the_judge_sees_the_image_and_the_prompt(judge):
    x = images()
    scores = vlm(judge)(x, ["a cat", "a dog", "a fox"])
    seen = {question(body): body for path, body in judge.asked if path == "/v1/chat/completions"}
    assert scores.dtype == torch.float32
    for image, prompt, score in zip(x, ("a cat", "a dog", "a fox"), scores.tolist(), strict=True):
        body = seen[f'Does this image show "{prompt}"? Answer Yes or No.']
        eight_bit = (255 * image).round().permute(1, 2, 0).numpy()
        assert np.array_equal(picture(body), eight_bit)
        assert score == pytest.approx(eight_bit[..., 0].mean() / 255, abs=1e-5)
        assert (body["model"], body["temperature"], body["max_tokens"], body["top_logprobs"]) == ("judge", 0, 1, 20)


def test_a_question_of_ones_own_and_a_number_as_answer(judge):
    reward = vlm(judge, question="Count {object} in {prompt}.", scale=(0, 10))
    reward.set_metadata({"a cat": {"object": "cats"}})
    score = reward(images(1), ["a cat"])
    assert question(judge.asked[0][1]) == "Count cats in a cat."
    assert float(score) == round(10 * float(picture(judge.asked[0][1])[..., 0].mean()) / 255)
    with pytest.raises(BenchError, match="column 'object' of the prompt file, which has nothing there for 'a dog'"):
        reward(images(1), ["a dog"])


@given(yes=st.lists(st.floats(-30, 0), max_size=3), no=st.lists(st.floats(-30, 0), max_size=3))
@settings(max_examples=40)
def test_log_odds_sum_over_spellings_and_have_the_returned_floor(yes, no):
    tokens = [{"token": name, "logprob": value} for name, value in zip(("Yes", " yes", "YES"), yes, strict=False)]
    tokens += [{"token": name, "logprob": value} for name, value in zip(("No", " no", "NO"), no, strict=False)]
    tokens += [{"token": "The", "logprob": -31.0}]
    if not yes and not no:
        with pytest.raises(Missing, match="neither Yes nor No but 'The'"):
            log_odds(tokens)
        return
    either = [math.log(sum(map(math.exp, values))) if values else -31.0 for values in (yes, no)]
    assert log_odds(tokens) == pytest.approx(either[0] - either[1], abs=1e-9)


@pytest.mark.parametrize("text", ["", "I cannot say", "11", "-1", "4/5", "between 3 and 4"])
def test_an_answer_that_is_not_one_number_of_the_scale_is_missing(text):
    assert number("Score: 4.5.", 0, 5) == 4.5
    with pytest.raises(Missing, match="is not one number from 0 to 5"):
        number(text, 0, 5)


@pytest.mark.parametrize("faults", [[503, "hang up"], [b"<html>busy", b'{"choices": [{"mess'], ["slow", 500], [429]])
def test_what_may_pass_is_asked_again(judge, faults):
    judge.plan = list(faults)
    started = time.monotonic()
    score = vlm(judge)(images(1), ["a cat"])
    assert float(score) == pytest.approx(float(picture(judge.asked[0][1])[..., 0].mean()) / 255, abs=1e-5)
    assert len(judge.asked) == len(faults) + 1
    assert time.monotonic() - started > (1 if 429 in faults else 0)  # as long as the server asks for


def test_no_answer_is_a_missing_score_and_is_not_remembered(judge, caplog):
    judge.plan = [503] * 6
    reward = vlm(judge)
    with caplog.at_level(logging.WARNING):
        assert reward(images(2), ["a cat", "a dog"]).isnan().all()
    assert len(judge.asked) == 6
    (record,) = caplog.records
    assert "2 of 2 requests brought no score" in record.message
    assert "gave no answer in 3 tries, at last status 503" in record.message
    assert reward(images(2), ["a cat", "a dog"]).isfinite().all()


def test_nobody_there_is_a_missing_score():
    reward = VLM(VLM.Config(endpoint="http://127.0.0.1:9", **QUICK))
    assert reward(images(1), ["a cat"]).isnan().all()


@pytest.mark.parametrize(
    "answer",
    [{}, {"choices": []}, {"choices": [{"message": {"content": "Yes"}}]}, {"choices": [{"logprobs": None}]},
     completion("Maybe", Maybe=-0.1, Perhaps=-2.0), {"choices": [{"logprobs": {"content": []}}]}],
)  # fmt: skip
def test_an_answer_that_cannot_be_read_is_missing_and_is_asked_for_once(judge, answer):
    judge.plan = [answer]
    reward = vlm(judge)
    assert reward(images(1), ["a cat"]).isnan().all()
    assert len(judge.asked) == 1
    assert reward(images(1), ["a cat"]).isfinite().all()  # nothing was remembered


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_one_sentence_without_the_key(judge, monkeypatch, status):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge.plan = [status] * 9
    with pytest.raises(BenchError, match=f"refuses the request with status {status}.*check the reward's") as error:
        vlm(judge, key_variable="JUDGE_KEY")(images(1), ["a cat"])
    assert KEY not in str(error.value) and "***" in str(error.value)
    assert judge.headers_seen[0]["Authorization"] == f"Bearer {KEY}"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(BenchError, match="the environment variable JUDGE_KEY holds no key"):
        vlm(judge, key_variable="JUDGE_KEY")


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://host", "http://me:word@host", "http://host/v1?key=1", ""])
def test_an_address_is_an_address_without_secrets(address):
    with pytest.raises(ValueError, match=r"no address of a server|belongs in the address"):
        ServiceConfig(endpoint=address)


def test_an_answer_is_remembered_by_all_that_it_depends_on(judge):
    x = images(1)

    def asked(reward: VLM, x: Tensor, prompt: str = "a cat") -> int:
        before = len(judge.asked)
        reward(x, [prompt])
        return len(judge.asked) - before

    assert [asked(vlm(judge), x), asked(vlm(judge), x)] == [1, 0]
    assert asked(vlm(judge), torch.cat([x, x])[:1]) == 0
    others = [vlm(judge, question="Is it {prompt}?"), vlm(judge, scale="log_odds"), vlm(judge, cache=False)]
    assert [asked(reward, x) for reward in others] == [1, 1, 1]
    assert asked(VLM(VLM.Config(endpoint=f"{judge.address}/v1", model="other", **QUICK)), x) == 1
    assert asked(vlm(judge), x, "a dog") == 1
    assert asked(vlm(judge), 1 - x) == 1
    flat = torch.full((1, 3, 4, 8), 0.5)  # the same bytes in another size
    assert [asked(vlm(judge), flat), asked(vlm(judge), flat.view(1, 3, 8, 4))] == [1, 1]
    before = len(judge.asked)
    scores = vlm(judge)(torch.cat([1 - images(2)[1:]] * 3), ["a fox"] * 3)
    assert len(judge.asked) == before + 1 and len(set(scores.tolist())) == 1  # within a call, too


def test_requests_are_concurrent_up_to_a_bound_and_a_rate(judge):
    judge.hold = 0.05
    x, prompts = images(12), [f"prompt {i}" for i in range(12)]
    vlm(judge, concurrency=4)(x, prompts)
    assert 1 < judge.most <= 4
    judge.hold = 0.0
    started = time.monotonic()
    vlm(judge, concurrency=4, rate=40.0, cache=False)(x, prompts)
    assert time.monotonic() - started >= 11 / 40


def test_services_keep_the_contract_of_a_reward(judge, scorer, monkeypatch):
    for name, address in (("vlm", f"{judge.address}/v1"), ("remote", scorer.address)):
        kind = {"vlm": VLM, "remote": Remote}[name]
        monkeypatch.setattr(kind, "Config", type("Here", (kind.Config,), {"__annotations__": {"endpoint": str},
                                                                          "endpoint": address}))  # fmt: skip
        outcomes = list(selftest("rewards", name))
        assert {one.status for one in outcomes} <= {"passed", "skipped"}, outcomes


# A service of one's own ----------------------------------------------------------------------------------------------


def test_a_service_gets_images_prompts_and_metadata_in_batches(scorer):
    reward = remote(scorer, batch=2)
    reward.set_metadata({"a cat": {"count": "1"}})
    x, prompts = images(5), ["a cat", "a dog", "", "red bird", "fish"]
    assert reward(x, prompts).tolist() == [5.0, 5.0, 0.0, 8.0, 4.0]
    bodies = sorted((body for _, body in scorer.asked), key=lambda body: prompts.index(body["prompts"][0]))
    assert [len(body["images"]) for body in bodies] == [2, 2, 1]
    assert bodies[0]["metadata"] == [{"count": "1"}, {}]
    seen = [Image.open(io.BytesIO(base64.b64decode(one))) for body in bodies for one in body["images"]]
    expected = (255 * x).round().byte().permute(0, 2, 3, 1).numpy()
    assert all(np.array_equal(np.asarray(image), rows) for image, rows in zip(seen, expected, strict=True))


def test_a_service_may_have_no_score(scorer):
    scorer.plan = [{"scores": [None, 2]}]
    scores = remote(scorer)(images(2), ["a", "b"])
    assert scores.isnan().tolist() == [True, False] and float(scores[1]) == 2
    scorer.plan = [503] * 3
    assert remote(scorer)(images(2), ["a", "b"]).isnan().all()


@pytest.mark.parametrize("answer", [{"scores": [1.0]}, {"scores": ["1", "2"]}, {"score": [1, 2]}, [1, 2]])
def test_an_answer_of_another_form_is_named(scorer, answer):
    scorer.plan = [json.dumps(answer).encode()]
    with pytest.raises(BenchError, match=r"it must answer .* with a number or null for each"):
        remote(scorer)(images(2), ["a", "b"])


def test_the_example_of_a_server_works():
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "services.md").read_text("utf8"), re.M | re.S)
    assert len(block.splitlines()) <= 32
    names: dict[str, Any] = {"__name__": "server"}
    exec(block, names)
    server = names["ThreadingHTTPServer"](("127.0.0.1", 0), names["Rewards"])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        reward = Remote(Remote.Config(endpoint=f"http://127.0.0.1:{server.server_port}", **QUICK))
        x = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
        assert reward(x, ["a", "b"]).tolist() == [0.0, 1.0]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# A run ---------------------------------------------------------------------------------------------------------------


def test_a_run_counts_what_is_missing_and_stores_no_key(judge, tiny_run, bench, monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    known = load_prompts(str(tmp_path / "prompts.txt")).train
    judge.answer = lambda body: completion("?") if f'show "{known[0]}"' in question(body) else redness(body)
    options = {"endpoint": f"{judge.address}/v1", "key_variable": "JUDGE_KEY", "wait": 0.01, "tries": 2}
    sets = [word for key, value in options.items() for word in ("--set", f"reward.{key}={value}")]
    sets += ["--suite", "emoji", "--reward", "vlm", "--set", "evaluation.metrics=[reward,reward_prompts,tilt_gap]"]
    sets += ["--set", f"train.prompts_per_round={len(known)}", "--set", "evaluation.train_prompts=5"]
    folder = tiny_run("ddpo", *sets)
    missing = [json.loads(line)["missing_scores"] for line in (folder / "log.jsonl").read_text().splitlines()]
    rows = pd.read_parquet(folder / "rows.parquet").set_index("metric")
    assert missing[-1] > 0 and f"in training {missing[-1]} samples had no score" in rows.loc["reward/train", "note"]
    assert f"2 of {2 * len(known)} samples are left out: there or" in rows.loc["reward/train", "note"]
    assert rows.loc["reward/train", "n"] == 2 * len(known) - 2 and math.isfinite(rows.loc["reward/train", "value"])
    assert f"reward_prompts/train/{known[0]}" not in rows.index and f"reward_prompts/train/{known[1]}" in rows.index
    assert rows.loc["tilt_gap", "status"] == "refused" and "nan" in rows.loc["tilt_gap", "note"]
    places = [path for root in (folder, tmp_path / "cache") for path in root.rglob("*") if path.is_file()]
    assert len(places) > 10
    assert not [path for path in places if KEY.encode() in path.read_bytes()]


def test_a_method_that_scores_within_its_losses_refuses_a_reward_that_may_miss(bench, untried):
    status, text = bench("run", "db", "--reward", "vlm", "--model", "emoji", "--prompts", "emoji", "--dry-run")
    assert status == 2
    assert "may have none: use one of the methods" in " ".join(text.split())


def test_the_list_of_rewards_says_what_they_need(bench):
    status, text = bench("ls", "rewards")
    assert status == 0, text
    assert all(words in text for words in ("a server", "a service", "nabla-bench[ocr]"))


@pytest.mark.parametrize("name", ["vlm", "colorfulness+2*vlm"])
def test_how_a_service_is_asked_makes_no_other_run(name):
    """Another address, bound or number of tries: the same hash, row and folder. Another question is another run."""
    prefix = "reward." if name == "vlm" else "reward.vlm."

    def config(**options: Any) -> RunConfig:
        return resolve("grpo", reward=name, suite="emoji", overrides={prefix + key: v for key, v in options.items()})

    plain = config()
    for change in (
        {"endpoint": "http://elsewhere/v1"},
        {"tries": 9},
        {"concurrency": 2},
        {"rate": 1.5},
        {"cache": False},
    ):
        assert config(**change).hash() == plain.hash()
        assert comparable_settings(config(**change)) == comparable_settings(plain)
        assert config(**change).execution() != plain.execution()
    for change in ({"model": "other"}, {"question": "Is it {prompt}?"}, {"scale": "log_odds"}):
        assert config(**change).hash() != plain.hash()
        assert comparable_settings(config(**change)) != comparable_settings(plain)
