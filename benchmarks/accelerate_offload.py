"""transformers with what does not fit offloaded to disk by accelerate.

    python -m benchmarks.accelerate_offload MODEL FOLDER

transformers keeps a layer's experts as two tensors, and makes those while it loads a checkpoint:
for that it needs more than twice a layer, which a small control group does not give. So every
parameter is written as transformers wants it beforehand, outside any group, and a run opens that.
Peak memory of writing: the model, and twice a layer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

INDEX_FILE = "index.json"


def write_offload(model: Path, folder: Path) -> None:
    """Every parameter of a checkpoint in a safetensors file of its own, with accelerate's index."""
    import torch
    import transformers  # noqa: TID251 - a peer here
    from safetensors.torch import save_file

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for name, parameter in loaded.named_parameters():
        path = folder / f"{name}.safetensors"
        save_file({name: parameter.detach()}, path)
        index[name] = {"safetensors_file": str(path), "weight_name": name, "dtype": "bfloat16"}
    (folder / INDEX_FILE).write_text(json.dumps(index))


def open_offloaded(model: Path, folder: Path, cpu_bytes: int) -> Any:
    """The model with its first layers in memory and the rest on disk.

    Parameters
    ----------
    cpu_bytes
        What may be kept; accelerate leaves out of it the largest layer that comes back from disk.
    """
    import accelerate
    import torch
    import transformers  # noqa: TID251 - a peer here
    from accelerate.utils import set_module_tensor_to_device
    from safetensors import safe_open

    index = json.loads((folder / INDEX_FILE).read_text())
    config = transformers.AutoConfig.from_pretrained(model)
    with accelerate.init_empty_weights(include_buffers=False):
        empty: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    devices = accelerate.infer_auto_device_map(
        empty,
        max_memory={"cpu": cpu_bytes},
        no_split_module_classes=list(empty._no_split_modules),
    )
    kept = tuple(f"{module}." if module else "" for module, at in devices.items() if at == "cpu")
    for name, place in index.items():
        if name.startswith(kept):
            with safe_open(place["safetensors_file"], "pt") as file:
                set_module_tensor_to_device(empty, name, "cpu", file.get_tensor(name).clone())
    empty.eval()
    return accelerate.dispatch_model(
        empty, devices, offload_dir=str(folder), offload_index=index, force_hooks=True
    )


if __name__ == "__main__":
    write_offload(Path(sys.argv[1]), Path(sys.argv[2]))
