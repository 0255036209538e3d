"""A setting is taken as it is written, or refused in one sentence before anything loads."""

import math
from importlib.metadata import EntryPoint

import pytest

from bench import registry
from bench.config import SUITES, resolve
from bench.errors import BenchError
from bench.options import leaves
from bench.runs.preflight import check


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("reward.name=hps", "use --reward hps"),
        ("method.name=rtb", "use --method rtb"),
        ("suite=ring", "use --suite ring"),
        ("no.such.key=1", "unknown setting 'no.such.key'"),
        ("seed=1:30", "seed = '1:30'"),
        ("seed=[1", "cannot read"),
        (f"seed={'9' * 5000}", "cannot read"),
        ("train={1: 2}", "unknown setting 'train.1'"),
        ("prompts=mine.txt", "prompts = 'mine.txt'"),
        ("seed=9223372036854775808", "less than"),
        ("evaluation.seed=-1", "greater than"),
        ("optimizer.betas=[1,1]", "optimizer.betas.0 = 1: input should be less than 1"),
        ("evaluation.at=[0]", "evaluation.at.0 = 0"),
        ("evaluation.at=[1.5]", "neither an update nor a share"),
        ("evaluation.at=[150,151]", r"evaluation.at = \[151\] lies beyond train.updates = 150"),
        ("train.updates_per_round=49", "a round of 48 trajectories cannot feed updates_per_round = 49"),
        ("train.threads=100000", "train.threads = 100000: this machine has"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(assignment: str, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        check(resolve("ddpo", assignments=[assignment]))


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("grpo", ["train.samples_per_prompt=1"], "'grpo' could do nothing.*samples_per_prompt ≥ 2"),
        ("alignprop", ["method.start=[0,0]"], r"'alignprop' could do nothing.*draws no step from 1 to 19"),
        ("alignprop", ["method.start=[1,0]"], "draws no step"),
        ("alignprop", ["method.start=[0.5,100]"], "from 0 to 1"),
    ],
)
def test_a_method_that_could_do_nothing_is_refused(method: str, settings: list[str], words: str) -> None:
    with pytest.raises(BenchError, match=words):
        check(resolve(method, assignments=settings))


@pytest.mark.parametrize(("reward", "option"), [("linear", "direction"), ("quadratic", "center")])
def test_a_vector_of_another_length_is_refused(reward: str, option: str) -> None:
    for value in ("[1]", "[1, 2, 3]"):
        config = resolve("rtb", reward=reward, suite="ring", assignments=[f"reward.{option}={value}"])
        with pytest.raises(BenchError, match=rf"reward.{option} has \d numbers, and a point has 2"):
            check(config)


@pytest.mark.parametrize("method", ["nabla_gfn", "rtb"])
def test_no_setting_takes_a_number_that_is_none(method: str) -> None:
    known = dict(leaves(resolve(method, suite="ring").model_dump()))
    words = ("nan", ".nan", "inf", "-.inf", "1e999")
    for key in known.keys() - {"suite", "method.name", "reward.name"}:
        for given in (*({"assignments": [f"{key}={word}"]} for word in words), {"overrides": {key: math.nan}}):
            try:
                config = resolve(method, suite="ring", **given)
            except BenchError as error:
                assert key in str(error), given
            else:
                values = [value for _, value in leaves(config.model_dump()) if isinstance(value, float)]
                assert all(map(math.isfinite, values)), given


def test_a_weight_of_a_sum_that_is_no_number_is_refused() -> None:
    with pytest.raises(BenchError, match=r"cannot read the reward 'linear\+1e999\*quadratic' at"):
        resolve("rtb", suite="ring", reward="linear+1e999*quadratic")


def test_values_are_read_as_written() -> None:
    config = resolve("ddpo", assignments=["seed=010", "optimizer.lr=1e-4", "evaluation.at=[]", "prompts.limit="])
    assert (config.seed, config.optimizer.lr, config.prompts.limit) == (10, 1e-4, None)


def test_what_a_suite_says_of_parts_is_for_its_own_prompts() -> None:
    other = {"prompts.name": "mine.txt"}
    own, mine = resolve("ddpo", suite="demo"), resolve("ddpo", suite="demo", overrides=other)
    assert (own.prompts.split, own.evaluation.test_prompts) == ("every_fifth", 0)
    assert (mine.prompts.split, mine.evaluation.test_prompts > 0) == ("hash", True)
    sets = ["prompts.name=mine.txt", "evaluation.test_prompts=3", "prompts.limit=2"]
    asked = resolve("ddpo", suite="demo", assignments=sets)
    assert (asked.evaluation.test_prompts, asked.prompts.limit, asked.prompts.split) == (3, 2, "hash")
    nested = resolve("ddpo", suite="demo", assignments=["evaluation={test_prompts: 2}"], overrides=other)
    assert nested.evaluation.test_prompts == 2


def test_a_suites_limit_is_for_its_own_prompts() -> None:
    assert resolve("ddpo").prompts.limit == 12
    assert resolve("ddpo", overrides={"prompts.name": "mine.txt"}).prompts.limit is None
    assert resolve("ddpo", assignments=["prompts.name=mine.txt"]).prompts.limit is None
    mine = resolve("ddpo", overrides={"prompts.name": "mine.txt"}, assignments=["prompts.limit=3"])
    assert mine.prompts.limit == 3


def test_a_plugin_with_a_taken_name_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    entry = EntryPoint("ddpo", "elsewhere:DDPO", "bench.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == "bench.methods" else [])
    registry.plugins.cache_clear()
    try:
        assert registry.find("methods", "ddpo").target == "bench.methods.policy_gradient.ddpo:DDPO"
        assert "'ddpo'" in caplog.text
        assert "already taken" in caplog.text
    finally:
        registry.plugins.cache_clear()


def test_a_plugin_that_ends_the_program_on_import_ends_itself(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.BUILT_IN["methods"], "leaving", registry.Plugin("leaving:X"))
    registry.plugins.cache_clear()
    try:
        with pytest.raises(BenchError, match=r"'leaving'.*SystemExit"):
            registry.load("methods", "leaving")
    finally:
        registry.plugins.cache_clear()


def test_a_misspelt_metric_of_a_report_is_told(bench, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = ("--set", "evaluation.samples_per_prompt=64", "--set", "evaluation.metrics=[reward]")
    status, text = bench("run", "--method", "prior", "--model", "ring", *small, "--out", tmp_path / "run")
    assert status == 0, text
    status, text = bench("report", tmp_path / "run", "--metrics", "reward/trian")
    assert status == 2
    assert "'reward/trian'; did you mean 'reward/train'?" in text


@pytest.mark.parametrize("model", ["ring", "emoji", "emoji_flow"])
@pytest.mark.parametrize(
    ("method", "setting", "words"),
    [
        ("nabla_gfn", "optimizer.networks.flwo.lr=0.1", "'optimizer.networks.flwo'; did you mean 'flow'?"),
        ("nabla_gfn_noflow", "optimizer.networks.flow.lr=0.1", "unknown setting 'optimizer.networks.flow'"),
    ],
)
def test_a_network_that_there_is_not_is_refused_by_a_dry_run(bench, method, model, setting, words) -> None:
    status, text = bench("run", "--method", method, "--model", model, "--dry-run", "--set", setting)
    assert status == 2, text
    assert words in text


def test_every_suite_but_the_demo_has_a_curve() -> None:
    found = {
        suite: resolve("draft", suite=suite).evaluated_at() for suite in (path.stem for path in SUITES.glob("*.yaml"))
    }
    assert found.pop("demo") == [20]
    assert all(len(updates) >= 4 for updates in found.values())
    shares = resolve("rtb", suite="ring", assignments=["train.updates=3"])
    assert shares.evaluated_at() == [1, 3]
