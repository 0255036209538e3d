"""What `bench profile --all` calls required, against counts by hand, and what it measures beside it."""

import json

import pytest
import torch

from bench import registry
from bench.diagnose.nfe import Rows, required_rows
from bench.diagnose.selftest.scaffold import gaussian_core, method_of

K, B = 4, 3
APART = [[0, 3]] * B  # two transitions a trajectory, with nothing to share
NEXT = [[2, 3]] * B  # the second begins where the first ends

# in predictions a trajectory: rollout, forward and backward of the losses
BY_HAND = {
    # policy and prior at z_0, z_1 (ahead), z_3 | parameters 2, reward and prior's Jacobian at z_1
    "nabla_gfn": (APART, (4, 6, 4)),
    "nabla_gfn_noflow": (APART, (4, 5, 3)),
    # policy at z_0, z_1 (ahead), z_3; prior at z_0, z_3 | parameters 2, rewards at z_0, z_1, z_3, prior's Jacobian 2
    "nabla_gfn_published": (APART, (4, 5, 7)),
    "nabla_gfn_adjoint": (APART, (4, 3 + 4, 5 + 4)),
    "nabla_db": (APART, (4, 3, 5)),
    "res_db": (APART, (4, 4.5, 2)),  # without guidance ahead, half a prediction
    "db": (APART, (4, 2.5, 2)),
    "dag_kl": (APART, (4, 2.5, 2)),
    "ddpo": (APART, (4, 2, 2)),
    "grpo": (APART, (4, 2, 2)),
    "dpok": (APART, (4, 4, 2)),
    "adjoint_matching": (APART, (4, 2 + 4, 2 + 3)),
    "flow_grpo": (APART, (4, 4, 2)),
    "flow_grpo_cps": (APART, (4, 4, 2)),
    "dance_grpo": (APART, (4, 2, 2)),
    "mix_grpo": (APART, (4, 2, 2)),
    "grpo_guard": (APART, (4, 2, 2)),
    "flow_dppo": (APART, (4, 2, 2)),
    "nft": (APART, (4, 6, 2)),  # policy, its past and the prior at each noised sample
    "awm": (APART, (4, 8, 2)),  # and an average
    "ram": (APART, (4, 4, 2)),
    "rvm": (APART, (4, 4, 2)),
    "tilt_matching": (APART, (4, 4, 2)),
    "iterative_tilting": (APART, (4, 4, 2)),
    "dgpo": (APART, (4, 6, 2)),
    "crd": (APART, (4, 6, 2)),
    "tempflow_grpo": (APART, (4, 2, 2)),
    "flash_grpo": (APART, (4, 2, 2)),
    "gardo": (APART, (4, 4, 2)),
    "value_matching": (APART, (4, 0, 0)),  # the prior alone, in the rollout; the losses see the value network
    "online_dpo": (APART, (4, 8, 4)),  # policy and prior at a winner and a loser
    # policy and prior at z_0, z_3, policy at z_1 (ahead) | parameters 2, prior's Jacobian 2
    "vgg_flow": (APART, (4, 5, 4)),
    "vgg_flow_pruned": (APART, (4, 4, 2)),
    "rtb_softmax": ([[0, 1, 2, 3]] * B, (4, 8, 4)),
    "tmpo": ([[0, 1, 2, 3]] * B, (4, 4, 4)),
    "leap_align": ([[0]] * B, (0, 4 + 2, 2)),
    "rtb": ([[0, 1, 2, 3]] * B, (4, 8, 4)),
    "draft_1": ([[3]] * B, (0, 4, 1)),
    "draft": ([[0]] * B, (0, 4, 4)),
    "draft_full": ([[0]] * B, (0, 4, 4)),
    "draft_kl": ([[0]] * B, (0, 8, 4 + 3)),  # the prior at every state, its Jacobian at all but z_0
    "alignprop": ([[2]] * B, (0, 4, 2)),
    "draft_lv": ([[3]] * B, (0, 4 + 2, 2)),
    "refl": ([[2]] * B, (0, 3, 1)),
    "dmdr": (APART, (0, 4 + 2, 4)),  # and the teacher at each noised sample
}
SHARED = {  # z_3 is both ahead and chosen
    "nabla_gfn": (4, 2 + 2, 2 + 2),
    "nabla_gfn_published": (4, 2 + 2, 2 + 1 + 2 + 2),  # the sum with the reverse score is another cotangent
    "nabla_gfn_noflow": (4, 2 + 2, 2 + 1),
    "db": (4, 2, 2),
    "adjoint_matching": (4, 2 + 2, 2 + 1),
    "vgg_flow": (4, 2 + 2, 2 + 2),
}


# of methods whose micro-batches hold what their losses compare
JUST_THAT = ("backprop", "balance", "policy_gradient", "regression", "online_dpo")  # folders or files


def count(name: str, chosen: list[list[int]], rows: int = 2) -> Rows:
    """Of a method whose random choice of steps is replaced by `chosen`."""
    method, core = method_of(name), gaussian_core(K)
    method.steps = lambda core, batch: torch.tensor(chosen)
    core.model.rows = lambda guidance: rows
    return required_rows(core, method, core.batch((str(i), 0) for i in range(len(chosen))))


@pytest.mark.parametrize("name", BY_HAND)
def test_required_rows_by_hand(name):
    chosen, predictions = BY_HAND[name]
    assert count(name, chosen) == Rows(*(2 * B * value for value in predictions))


@pytest.mark.parametrize("name", SHARED)
def test_what_two_transitions_share_is_counted_once(name):
    assert count(name, NEXT) == Rows(*(2 * B * value for value in SHARED[name]))


def test_without_guidance_a_prediction_is_one_row():
    assert count("ddpo", APART, rows=1) == Rows(4 * B, 2 * B, 2 * B)
    assert count("db", APART, rows=1) == Rows(4 * B, 3 * B, 2 * B)


def test_every_trained_method_has_a_count():
    trained = [n for n in registry.BUILT_IN["methods"] if registry.load("methods", n).needs.training]
    assert set(trained) == BY_HAND.keys()


@pytest.mark.slow
def test_profile_of_every_method(bench, tmp_path, pipeline_folder):
    """No method takes less than it is said to need; those of one pass a state take just that."""
    settings = ("sampler.steps=4", "train.prompts_per_round=1", "train.samples_per_prompt=3", "prompts.limit=2")
    sets = [word for setting in settings for word in ("--set", setting)]
    status, text = bench("profile", "--all", "--reward", "colorfulness", "--model", pipeline_folder, "--out",
                         tmp_path / "all.json", *sets)  # fmt: skip
    assert status == 0, text
    stored = json.loads((tmp_path / "all.json").read_text())
    assert stored["updates"].keys() == stored["configs"].keys() == BY_HAND.keys()
    for name, cost in stored["updates"].items():
        parts = {part: (cost[part], needed) for part, needed in cost["required"].items()}
        assert all(measured >= needed for measured, needed in parts.values()), (name, parts)
        if registry.find("methods", name).target.split(":")[0].split(".")[2] in JUST_THAT:
            assert all(measured == needed for measured, needed in parts.values()), (name, parts)
        assert cost["seconds"] > 0
        assert name in text
    assert stored["updates"]["ddpo"]["rollout"] == 2 * 4 * 3
    assert stored["updates"]["draft_1"]["reward_gradients"] == 3


@pytest.mark.slow
def test_profile_of_every_method_leaves_out_what_does_not_fit(bench, tmp_path, pipeline_folder):
    status, text = bench("profile", "--all", "--reward", "jpeg_compressibility", "--model", pipeline_folder, "--out",
                         tmp_path / "all.json", "--set", "sampler.steps=2", "--set", "sampler.eta=0")  # fmt: skip
    assert status == 0, text
    assert "left out: method 'refl' needs the gradient" in text
    stored = json.loads((tmp_path / "all.json").read_text())
    regressions = {n for n, plugin in registry.BUILT_IN["methods"].items() if ".regression." in plugin.target}
    assert stored["updates"].keys() == regressions | {"online_dpo"}  # from finished samples
