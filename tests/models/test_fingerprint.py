"""A prior's fingerprint: whatever decides what a pipeline computes is in it, and nothing else."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scaffold import pipeline_model
from transformers import CLIPTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from bench.diagnose.selftest.scaffold import perturb
from bench.models.architecture import build
from bench.models.cards import CARDS
from bench.models.catalogue import load_model
from bench.models.emoji import WEIGHTS
from bench.models.fingerprint import BOOKKEEPING, fingerprint
from bench.models.pipeline import PipelineModel
from bench.models.random_weights import TOKENIZERS
from bench.renames import FINGERPRINTS
from bench.sampling.noise import Noise, seeded
from bench.settings import ModelConfig, SamplerConfig

FAMILIES = ["sd15", "sdxl", "sd35_medium", "flux_dev", "flux2_klein"]


def other(value: Any) -> Any:
    """Another value of its type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case dict():
            first = next(iter(value), "x")
            return value | {first: other(value.get(first))}
        case list() | tuple():
            return [*value, 1]
        case _:
            return 1


class Pipeline:
    """Of one part."""

    def __init__(self, part: Any, option: bool = False):
        self.components, self.config = {"part": part}, dict[str, Any]()


def print_of(part: Any, **options: Any) -> str:
    """The fingerprint of a pipeline of this part alone."""
    pipe = Pipeline(part)
    pipe.config = options
    return fingerprint(pipe, {})


def networks(name: str) -> Iterator[tuple[str, Any]]:
    """The networks and the scheduler of a family, small."""
    architecture = CARDS[name].architecture
    with seeded(0, name):
        for part in architecture.networks:
            yield part, architecture.build(part, "tiny")
    yield "scheduler", build(*architecture.scheduler)


def put(part: Any, key: str, value: Any) -> None:
    """Change a configuration past the checks of its class: no network is made of it."""
    if isinstance(part.config, PreTrainedConfig):
        part.config.__dict__[key if key in part.config.__dict__ else f"_{key}"] = value  # the latter of a property
    else:
        part.register_to_config(**{key: value})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_value_of_every_configuration_is_in_it(name: str) -> None:
    for part_name, part in networks(name):
        before, seen = print_of(part), 0
        config = part.config
        values = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config)
        for key, value in values.items():
            if key not in BOOKKEEPING and not key.startswith("_"):
                put(part, key, other(value))
                assert print_of(part) != before, f"{part_name}.{key}"
                put(part, key, value)
                seen += 1
        assert print_of(part) == before
        assert seen >= 10


@pytest.mark.parametrize("option", ["option", "another"])
def test_the_pipelines_own_options_are_in_it(option: str) -> None:
    assert len({print_of(None, **{option: value}) for value in (False, True, 1, 1.0, None)}) == 5
    assert print_of(None, _name_or_path="a", option=True) == print_of(None, option=True)
    assert print_of(None, option=False) == print_of(None)  # stored before the class had the option


@pytest.mark.parametrize("kind", [torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(2)], ids=["parameters", "buffers"])
def test_every_tensor_is_in_it(kind: torch.nn.Module) -> None:
    before = print_of(kind)
    for name, tensor in kind.state_dict().items():
        tensor.view(-1)[-1] += 1
        assert print_of(kind) != before, name
        tensor.view(-1)[-1] -= 1
    assert print_of(kind.bfloat16()) != before


FILES = {  # what is stored of a tokenizer, changed
    "vocab.json": lambda tree: {word: (number + 1) % len(tree) for word, number in tree.items()},
    "merges.txt": lambda text: text.rstrip().rpartition("\n")[0] + "\n",
    "model_max_length": lambda value: 12,
    "padding_side": lambda value: "left",
    "truncation_side": lambda value: "left",
    "pad_token": lambda value: "!",
    "eos_token": lambda value: "b</w>",
    "bos_token": lambda value: "b</w>",
    "unk_token": lambda value: "b</w>",
    "model_input_names": lambda value: ["input_ids"],
    "chat_template": lambda value: "{{ messages }}",
    "add_prefix_space": lambda value: not value,
    "do_lower_case": lambda value: not value,
    "clean_up_tokenization_spaces": lambda value: not value,
    "split_special_tokens": lambda value: True,
    "additional_special_tokens": lambda value: ["cat"],
    "added_tokens_decoder": lambda value: {"53": {"content": "cat", "special": True}},
    "tokenizer_class": lambda value: "CLIPTokenizerFast",
    "name_or_path": lambda value: "elsewhere",
    "errors": lambda value: "ignore",
    "extra_special_tokens": lambda value: {"x": "cat"},
}
TEXTS = ["a cat", "Tiger  and\nfox", "", "cat" * 30, "<|endoftext|> a", "b ü 7"]


def tokens(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What the pipelines make of texts."""
    length = min(tokenizer.model_max_length, 77)
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    return [[*map(tuple, tokenizer(text, **options).values())] for text in TEXTS]


@pytest.mark.parametrize("name", FILES)
def test_whatever_changes_tokens_is_in_it(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(WEIGHTS / "tokenizer", tmp_path / "tokenizer")
    (folder / "tokenizer.json").unlink()  # the same, stored once more
    plain = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    change = FILES[name]
    if name == "merges.txt":
        (folder / name).write_text(change((folder / name).read_text()))
    else:
        file = folder / (name if name == "vocab.json" else "tokenizer_config.json")
        tree = json.loads(file.read_text())
        file.write_text(json.dumps(change(tree) if name == "vocab.json" else tree | {name: change(tree.get(name))}))
    changed = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if print_of(changed) == print_of(plain):
        assert tokens(changed) == tokens(plain)
        assert name not in ("vocab.json", "merges.txt", "model_max_length", "pad_token", "model_input_names")


def outputs(model: PipelineModel) -> list[torch.Tensor]:
    """What a model encodes, predicts and decodes."""
    z = Noise(0, "train", [("cat", 0)])(0, model.latent_shape)
    with torch.no_grad():
        conditioning = model.encode(["cat"])
        return [*conditioning.parts.values(), model.predict(z, torch.tensor(500), conditioning), model.decode(z)]


def same(one: PipelineModel, two: PipelineModel) -> None:
    assert one.fingerprint() == two.fingerprint()
    for ours, theirs in zip(outputs(one), outputs(two), strict=True):
        assert torch.equal(ours, theirs)


def test_where_and_by_what_a_pipeline_was_stored_is_not_in_it(pipeline_folder: Path, tmp_path: Path, model) -> None:
    """In another folder, by other versions; stored again; with a trained adapter, or none."""
    copy = shutil.copytree(pipeline_folder, tmp_path / "copy")
    aside = {key: "x" for key in BOOKKEEPING if "dtype" not in key} | {"dtype": "float16", "_name_or_path": "elsewhere"}
    aside |= {"transformers_version": "4.1.0", "architectures": ["X"], "_diffusers_version": "0.20.0"}
    for file in [*copy.rglob("config.json"), *copy.rglob("*scheduler_config.json"), copy / "model_index.json"]:
        tree = json.loads(file.read_text())
        file.write_text(json.dumps(tree | {key: value for key, value in aside.items() if key in tree or key[0] == "_"}))
    same(pipeline_model(copy), model)
    again = tmp_path / "again"
    model.open().save_pretrained(again)
    same(pipeline_model(again), model)
    before = outputs(model)
    perturb(model, 0.1)
    assert not torch.equal(outputs(model)[-2], before[-2])
    model.save(tmp_path / "adapter")
    assert model.fingerprint() == pipeline_model(again, seed=3, rank=4).fingerprint()
    fresh = pipeline_model(again)
    fresh.load(tmp_path / "adapter")
    assert fresh.fingerprint() == model.fingerprint()
    assert pipeline_model(again, finetune="full").fingerprint() == model.fingerprint()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_of_a_family_stored_again_is_the_same(name: str, tmp_path: Path) -> None:
    for part_name, part in networks(name):
        part.save_pretrained(tmp_path / part_name)
        again = type(part).from_pretrained(tmp_path / part_name, local_files_only=True)
        assert print_of(again) == print_of(part), part_name


@pytest.mark.parametrize("kind", ["CLIPTextModel", "T5EncoderModel", "Qwen3ForCausalLM"])
def test_a_tokenizer_stored_again_is_the_same(kind: str, tmp_path: Path) -> None:
    """After a call too, which leaves its length in the file."""
    made = (
        TOKENIZERS[kind](tmp_path, "tiny")
        if kind != "CLIPTextModel"
        else CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    )
    before = print_of(made)
    tokens(made)
    made.save_pretrained(tmp_path / "again")
    again = type(made).from_pretrained(tmp_path / "again", local_files_only=True)
    assert print_of(again) == print_of(made) == before


CHANGED = {
    "vae/config.json": {"scaling_factor": 0.6},
    "unet/config.json": {"attention_head_dim": 8},
    "text_encoder/config.json": {"hidden_act": "gelu"},
    "scheduler/scheduler_config.json": {"beta_end": 0.02},
    "tokenizer/tokenizer_config.json": {"model_max_length": 8},
}


@pytest.mark.parametrize("file", CHANGED)
def test_a_changed_file_is_another_prior(pipeline_folder: Path, tmp_path: Path, model, file: str) -> None:
    folder = shutil.copytree(pipeline_folder, tmp_path / "copy")
    tree = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(tree | CHANGED[file]))
    assert pipeline_model(folder).fingerprint() != model.fingerprint()


def test_settings_that_change_the_prior_are_in_it(pipeline_folder: Path, model) -> None:
    changed = [pipeline_model(pipeline_folder, **options) for options in (
        {"negative_prompt": "dull"}, {"guidance": 2.0}, {"dtype": "bfloat16"}, {"dtype": "tf32"},
    )]  # fmt: skip
    assert len({one.fingerprint() for one in (model, *changed)}) == 5
    alike = ({"attention": "eager"}, {"vae_slicing": True}, {"checkpointing": True}, {"offload": True})
    assert {pipeline_model(pipeline_folder, **one).fingerprint() for one in alike} == {model.fingerprint()}


@pytest.mark.parametrize("name", ["emoji", "emoji_flow"])
def test_published_rows_are_of_the_priors_that_ship(name: str) -> None:
    found = load_model(ModelConfig(name=name), SamplerConfig(guidance=3.0)).fingerprint()[:12]
    assert found in FINGERPRINTS.values()
