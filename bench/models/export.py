"""A finetuned pipeline in the layouts of other programs."""

from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors.torch import save_file

from bench.models.lora import LORA_FILE, LoraAdapter
from bench.models.pipeline import PipelineModel


def export_layouts(model: PipelineModel, folder: Path) -> dict[str, str]:
    """Write the finetuned weights in the layouts of other programs: `peft/`, `kohya/`, and the pipeline `merged/`.

    Returns the Python line that reads each into a pipeline `pipe`, by the layout. Ends the model: its adapter is
    part of its weights afterwards. `merged` has the precision in which the model was loaded, and adds in float32.
    """
    lines = {}
    if isinstance(adapter := model._lora, LoraAdapter):
        adapter.save_peft(folder / "peft")
        part = f"pipe.{model.denoiser}"
        lines["peft"] = f'from peft import PeftModel; {part} = PeftModel.from_pretrained({part}, "peft")'
        if _save_kohya(model, adapter, folder / "kohya"):
            lines["kohya"] = f'pipe.load_lora_weights("kohya", weight_name="{LORA_FILE}")'
        adapter.merge()
    else:
        model.network.to(model._prior_dtype)
    model._load_encoders()
    pipe = model.pipeline
    pipe.save_pretrained(folder / "merged")
    absent = [name for name, part in pipe.components.items() if part is None]
    left_out = "".join(f", {name}=None" for name in absent if name not in pipe._optional_components)
    return lines | {"merged": f'pipe = {model.pipeline_class.__name__}.from_pretrained("merged"{left_out})'}


def _save_kohya(model: PipelineModel, adapter: LoraAdapter, folder: Path) -> bool:
    """Write kohya's layout; False, and no file, if diffusers' reader of it would not give the adapter back."""
    state = {f"{model.denoiser}.{name}": tensor.contiguous() for name, tensor in adapter.state().items()}
    written = {name: tensor.clone() for name, tensor in convert_state_dict_to_kohya(dict(state)).items()}
    try:
        read, _ = model.pipeline_class.lora_state_dict(dict(written), unet_config=model.network.config)
        again = convert_unet_state_dict_to_peft(read)
    except (ValueError, KeyError, AttributeError):  # it reads plain LoRA of a U-Net
        return False
    same = again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    if same:
        folder.mkdir()
        save_file(written, folder / LORA_FILE, {"format": "pt"})
    return same
