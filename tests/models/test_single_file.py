"""`bench convert`: files named as the original Stable Diffusion code names its tensors, made folders again."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_sdxl import sdxl_folder  # noqa: F401
from torch import Tensor

from bench.models.catalogue import locate

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "samplers.0.conv": "sample.conv",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    **{f"to_{name}": name for name in "qkv"},
}
OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def replaced(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def original_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The blocks are numbered through, one for each resnet and each change of size."""
    down, up = (sum(name.startswith(f"{side}_blocks.0.resnets.") for name in {n.rpartition(".")[0] for n in state}
                    if name.endswith("conv1")) for side in ("down", "up"))  # fmt: skip
    found = {}
    for name, tensor in state.items():
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            side, block, kind, place, rest = match.groups()
            first = 1 + int(block) * (down + 1) if side == "down" else int(block) * up
            attends = any(other.startswith(f"{side}_blocks.{block}.attentions") for other in state)
            number, part = {
                "resnets": (int(place), 0),
                "attentions": (int(place), 1),
                "downsamplers": (down, 0),
                "upsamplers": (up - 1, 1 + attends),
            }[kind]
            rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
            name = f"{'input' if side == 'down' else 'output'}_blocks.{first + number}.{part}.{rest}"
        name = replaced(name, UNET)
        found[name if "transformer_blocks" in name else replaced(name, RESNET)] = tensor
    return found


def original_vae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decoder blocks are counted from the other end; what is linear here is a convolution there."""
    last = max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks"))
    found = {}
    for name, tensor in state.items():
        tensor = tensor[:, :, None, None] if ".attentions." in name and tensor.dim() == 2 else tensor
        name = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{last - int(m[1])}.", name)
        name = re.sub(r"((?:up|down)(?:_blocks)?\.\d+)\.resnets", r"\1.block", name).replace("down_blocks", "down")
        found[replaced(name, VAE)] = tensor
    return found


def original_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value are one tensor, and the projection is transposed."""
    found = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        elif "q_proj" in name:
            whole = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            found[replaced(name, OPEN_CLIP).replace(".q_proj.", ".in_proj_")] = whole
        elif not re.search("[kv]_proj", name):
            found[replaced(name, OPEN_CLIP)] = tensor
    return found


def original(folder: Path, version: str) -> dict[str, Tensor]:
    """The single file's tensors of a pipeline's folder; the versions differ in their text encoders."""
    unet, vae = (load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("unet", "vae"))
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in original_unet(unet).items()}
    whole |= {f"first_stage_model.{name}": tensor for name, tensor in original_vae(vae).items()}
    text = load_file(folder / "text_encoder" / "model.safetensors")
    text = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()}
    if version == "2":
        text, prefix = original_open_clip(text), "cond_stage_model.model"
    else:
        prefix = "conditioner.embedders.0.transformer" if version == "xl" else "cond_stage_model.transformer"
    whole |= {f"{prefix}.{name}": tensor for name, tensor in text.items()}
    if version == "xl":
        second = original_open_clip(load_file(folder / "text_encoder_2" / "model.safetensors"))
        whole |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    return {name: tensor.contiguous() for name, tensor in whole.items()}


def tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*/*.safetensors"))
    return {f"{file.parent.name}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("version", ["1", "2", "xl"])
def test_a_single_file_becomes_the_folder_that_it_was(bench, untried, version, tmp_path, request):
    """To the bit, in the file's 16 bits if all tensors have them; a run takes the folder."""
    folder = request.getfixturevalue("sdxl_folder" if version == "xl" else "pipeline_folder")
    whole, theirs = original(folder, version), tensors(folder)
    halves = {name: tensor.half() for name, tensor in whole.items()}
    if version == "1":  # a buffer that many files hold
        halves["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    mixed = halves | {name: tensor for name, tensor in whole.items() if name.startswith("first_stage_model")}
    for name, stored in {"a model": whole, "half": halves, "mixed": mixed}.items():
        save_file(stored, tmp_path / f"{name}.safetensors")
        status, text = bench("convert", tmp_path / f"{name}.safetensors", "--like", folder)
        assert status == 0, text
        assert f"It predicts epsilon, as {folder} does" in " ".join(text.split())
        ours = tensors(tmp_path / name)
        assert ours.keys() == theirs.keys()
        assert {tensor.dtype for tensor in ours.values()} == {torch.half if name == "half" else torch.float}
        for key, tensor in theirs.items():
            exact = name == "a model" or (name == "mixed" and key.startswith("vae."))
            assert torch.equal(ours[key].float(), tensor if exact else tensor.half().float())
    status, text = bench("run", "--method", "prior", "--model", tmp_path / "a model", "--dry-run")
    assert status == 0, text


@pytest.mark.parametrize(("like", "version", "output"), [("sd15", "1", "epsilon"), ("sd21", "2", "v_prediction")])
def test_configurations_come_from_the_hubs_cache(bench, hub, tmp_path, like, version, output):
    folder = locate(like)
    save_file(original(folder, version), tmp_path / "model.safetensors")
    status, text = bench("convert", tmp_path / "model.safetensors", "--like", like)
    assert status == 0, text
    assert f"It predicts {output}, as {like} does" in " ".join(text.split())
    ours, theirs = tensors(tmp_path / "model"), tensors(folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].float(), tensor.float()) for name, tensor in theirs.items())


def lacking(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda whole: {name: tensor for name, tensor in whole.items() if not name.startswith(part)}


NORM = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
EXTRA = "model.diffusion_model.output_blocks.9.0.in_layers.0.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lacking(NORM), "lacks text_encoder.final_layer_norm.bias"),
        (lacking("first_stage_model.decoder.conv_out"), "tensors of its denoiser or autoencoder are missing"),
        (lacking("cond_stage_model"), "is no pipeline like"),
        (lacking("model.diffusion_model"), "no whole checkpoint of Stable Diffusion"),
        (lambda whole: whole | {NORM: torch.zeros(3)}, "is no pipeline like"),
        (lambda whole: whole | {EXTRA: torch.zeros(3)}, "tensors of a denoiser"),
        (lambda whole: whole | {"v_pred": torch.zeros(())}, "says that it predicts v"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(bench, pipeline_folder, tmp_path, change, words):
    file = tmp_path / "model.safetensors"
    save_file(change(original(pipeline_folder, "1")), file)
    status, text = bench("convert", file, "--like", pipeline_folder)
    assert status == 2, text
    assert words in " ".join(text.split())
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ("ring", "is no pipeline"),
        ("emoji_flow", "is a StableDiffusion3Pipeline"),
        ("emoji", "is no pipeline like 'emoji'"),
        ("sdxl", "hf download stabilityai/stable-diffusion-xl-base-1.0"),
    ],
)
def test_what_a_file_is_like_has_to_be_like_it(bench, pipeline_folder, tmp_path, monkeypatch, like, words):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    file = tmp_path / "model.safetensors"
    save_file(original(pipeline_folder, "1"), file)
    status, text = bench("convert", file, "--like", like)
    assert status == 2, text
    assert words in " ".join(text.split())


SANA = {
    "patch_embed.": "x_embedder.",
    "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.linear": "t_block.1",
    "caption_projection.linear_": "y_embedder.y_proj.fc",
    "caption_norm": "attention_y_norm",
    "transformer_blocks": "blocks",
    "ff.conv_inverted": "mlp.inverted_conv.conv",
    "ff.conv_depth": "mlp.depth_conv.conv",
    "ff.conv_point": "mlp.point_conv.conv",
    "attn1.to_out.0": "attn.proj",
    "attn1": "attn",
    "attn2.to_out.0": "cross_attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2": "cross_attn",
    "proj_out": "final_layer.linear",
}
WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "scale_shift_table": "modulation",
    "proj_out": "head.head",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm?",
    "norm3": "norm2",
    "norm?": "norm3",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_out.0": "o",
    "to_": "",
}
Z_IMAGE = {
    "all_final_layer.2-1": "final_layer",
    "all_x_embedder.2-1": "x_embedder",
    "to_out.0": "out",
    "norm_k": "k_norm",
    "norm_q": "q_norm",
}


def joined(state: Mapping[str, Tensor], parts: str, name: str) -> dict[str, Tensor]:
    """Projections of one attention as one tensor; `q`, `k`, `v` are the letters of `parts`."""
    found = {}
    for key, tensor in state.items():
        if match := re.match(rf"(.*)\.to_([{parts}])\.(.*)", key):
            if match[2] == parts[0]:
                others = [state[f"{match[1]}.to_{part}.{match[3]}"] for part in parts]
                found[f"{match[1]}.{name}.{match[3]}"] = torch.cat(others)
        else:
            found[key] = tensor
    return found


def original_denoiser(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As the makers' code names the tensors of a transformer."""
    if name == "z-image":
        return joined({replaced(key, Z_IMAGE): tensor for key, tensor in state.items()}, "qkv", "qkv")
    if name == "sana-600m":
        first = {key: tensor for key, tensor in state.items() if ".attn2." not in key}
        second = {key: tensor for key, tensor in state.items() if key not in first and ".to_q." not in key}
        queries = {key: tensor for key, tensor in state.items() if ".attn2.to_q." in key}
        whole = joined(first, "qkv", "qkv") | joined(second, "kv", "kv_linear") | queries
        found = {replaced(key, SANA): tensor for key, tensor in whole.items()}
        found["final_layer.scale_shift_table"] = found.pop("scale_shift_table")
        return found | {"pos_embed": torch.zeros(3), "y_embedder.y_embedding": torch.zeros(3)}
    if name == "wan2.1-t2v-1.3b":
        found = {replaced(key, WAN): tensor for key, tensor in state.items()}
        return found | {"head.modulation": found.pop("modulation")}
    return dict(state)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", ["z-image", "qwen-image", "sana-600m", "wan2.1-t2v-1.3b"], indirect=True)
def test_a_file_of_a_denoiser_becomes_a_pipeline_with_it(bench, family, prefix, tmp_path):
    """The denoiser's tensors to the bit, the other parts those of the pipeline that is named."""
    folder = locate(family)
    theirs = tensors(folder)
    state = {name: 2 * tensor for name, tensor in theirs.items() if name.startswith("transformer.")}
    wanted = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    file = {prefix + name: tensor.contiguous() for name, tensor in original_denoiser(family, wanted).items()}
    save_file(file, tmp_path / "mine.safetensors")
    status, text = bench("convert", tmp_path / "mine.safetensors", "--like", family)
    assert status == 0, text
    ours = tensors(tmp_path / "mine")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, state.get(name, theirs[name])) for name, tensor in ours.items())
    for change in (dict(list(file.items())[1:]), file | {f"{prefix}layers.9.weight": torch.zeros(3)}):
        save_file(change, tmp_path / "other.safetensors")
        status, text = bench("convert", tmp_path / "other.safetensors", "--like", family)
        assert status == 2 and "other.safetensors" in text, text
        assert not (tmp_path / "other").exists()


def test_only_a_whole_safetensors_file_is_read(bench, pipeline_folder, tmp_path):
    for name, content, words in [
        ("old.ckpt", b"PK", "pickled ones (.ckpt) are not loaded"),
        ("absent.safetensors", None, "is missing"),
        ("cut.safetensors", b"PK", "not a whole file"),
    ]:
        if content:
            (tmp_path / name).write_bytes(content)
        status, text = bench("convert", tmp_path / name, "--like", pipeline_folder)
        assert status == 2, text
        assert words in " ".join(text.split())
    (tmp_path / "there").mkdir()
    status, text = bench("convert", tmp_path / "old.ckpt", "--like", pipeline_folder, "--out", tmp_path / "there")
    assert status == 2
    assert "exists already: choose another --out" in " ".join(text.split())
