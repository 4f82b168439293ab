"""What a checkpoint holds: collected from a trainer, and given back to one. File names are Transformers' and PEFT's.

| file | content |
|---|---|
| `adapter_model.safetensors`, `adapter_config.json` | the adapter, as PEFT loads it |
| `model.safetensors`, `config.json` | without an adapter: the trained weights; of method=full that is the whole model |
| `optimizer.pt`, `scheduler.pt`, `scaler.pt` | state dicts, read with `weights_only` |
| `optimizer.bin` | in place of `optimizer.pt` with distributed=fsdp2: the whole state by the names of weights |
| `rng_state.pth` (`rng_state_<rank>.pth`) | Python's, NumPy's, torch's random states |
| `tokenizer.json`, `chat_template.jinja`, `generation_config.json`, ... | as in `final/`, so that it can be loaded |
| `trainer_state.json`, `accumulators.json` | step and epoch; the sums behind the next log event, of each rank |
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from llmkit.model.adapters import ADAPTER

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
WEIGHTS, MODEL_CONFIG = "model.safetensors", "config.json"
ACCUMULATORS = "accumulators.json"


def collect(trainer: Any) -> dict[str, Any]:
    """File name -> what is to be written there: tensors (by reference), state dicts, or text. Every rank takes part.

    Tensors go on changing with the next step; copy them before (see saving.py).
    """
    ranks = gather_object([{"rng": _rng_state(trainer), "accumulators": trainer.accumulators()}])
    alone = len(ranks) == 1
    if trainer.is_fsdp_enabled:
        trained, optimizer = whole_state(trainer.model, trainer.optimizer.optimizer)
        contents = _weights(trainer.model, trained) | {OPTIMIZER_NAME_BIN: optimizer}
    else:
        contents = _weights(trainer.model) | {OPTIMIZER_NAME: trainer.optimizer.state_dict()}
    contents[SCHEDULER_NAME] = trainer.lr_scheduler.state_dict()
    if trainer.accelerator.scaler is not None:
        contents[SCALER_NAME] = trainer.accelerator.scaler.state_dict()
    for rank, states in enumerate(ranks):
        contents["rng_state.pth" if alone else f"rng_state_{rank}.pth"] = states["rng"]
    return contents | state_files(trainer, [states["accumulators"] for states in ranks])


def state_files(trainer: Any, accumulators: list[dict[str, Any]]) -> dict[str, str]:
    """The files of JSON: what Transformers keeps of itself, and what it forgets between two log events."""
    trainer.store_flos()
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
    state = json.dumps(dataclasses.asdict(trainer.state), indent=2, sort_keys=True)
    return {TRAINER_STATE_NAME: state + "\n", ACCUMULATORS: json.dumps(accumulators) + "\n"}


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trained weights by name and the optimizer's state, of a model divided by FSDP2, in the host's memory.

    Every rank takes part; only the first gets them.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=whole), get_optimizer_state_dict(model, optimizer, options=whole)


def load_divided(model: Any, checkpoint: Path) -> None:
    """As `load_weights`, into a model that is divided by FSDP2: each rank keeps its part."""
    from torch.distributed.tensor import distribute_tensor

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if (checkpoint / ADAPTER_WEIGHTS).exists():
        saved, names = load_file(checkpoint / ADAPTER_WEIGHTS), _adapter_names(model, trained)
    else:
        saved, names = load_file(checkpoint / WEIGHTS), {name: name for name in trained}
    if missing := sorted(set(names.values()) - saved.keys()):
        raise RuntimeError(f"{checkpoint} holds the weights of another model: {', '.join(missing[:3])}")
    with torch.no_grad():
        for name, parameter in trained.items():
            value = saved[names[name]].to(parameter.device, parameter.dtype)
            parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))


def _adapter_names(model: Any, trained: dict[str, Any]) -> dict[str, str]:
    """How PEFT calls each trained parameter in an adapter's file."""
    from peft import get_peft_model_state_dict

    numbers = {name: torch.tensor(number) for number, name in enumerate(trained)}
    saved = get_peft_model_state_dict(model, numbers, adapter_name=ADAPTER, save_embedding_layers=False)
    return {list(trained)[int(number)]: name for name, number in saved.items()}


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights into the model they came from. Raises RuntimeError if they are another model's."""
    if (checkpoint / ADAPTER_WEIGHTS).exists():
        from peft import set_peft_model_state_dict

        loaded: Any = set_peft_model_state_dict(model, load_file(checkpoint / ADAPTER_WEIGHTS), adapter_name=ADAPTER)
        strangers = loaded.unexpected_keys
    else:
        saved = load_file(checkpoint / WEIGHTS)
        strangers = model.load_state_dict(saved, strict=False).unexpected_keys
        strangers += sorted({name for name, p in model.named_parameters() if p.requires_grad} - saved.keys())
    if strangers:
        raise RuntimeError(f"{checkpoint} holds the weights of another model: {', '.join(strangers[:3])}")


def load_accumulators(trainer: Any, checkpoint: Path) -> None:
    """Give a trainer that has just begun to train the sums of the log interval it was saved in."""
    ranks = json.loads((checkpoint / ACCUMULATORS).read_text(encoding="utf-8"))
    if trainer.args.process_index < len(ranks):  # else it was saved by fewer, and resume_allow lets it go on
        trainer.take_up(ranks[trainer.args.process_index])


def _weights(model: Any, whole: dict[str, Any] | None = None) -> dict[str, Any]:
    """The files of the trained weights; `whole` holds those of a model that is divided among the ranks."""
    if ADAPTER in getattr(model, "peft_config", {}):
        from peft import get_peft_model_state_dict

        settings = model.peft_config[ADAPTER].to_dict() | {"inference_mode": True}
        config = json.dumps(settings, indent=2, sort_keys=True, default=_plain)
        # Rows of new tokens are saved as such, the matrices they stand in are not.
        adapter = get_peft_model_state_dict(model, whole, adapter_name=ADAPTER, save_embedding_layers=False)
        return {ADAPTER_WEIGHTS: adapter, ADAPTER_CONFIG: config + "\n"}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {WEIGHTS: trained if whole is None else whole, MODEL_CONFIG: model.config.to_json_string()}


def _rng_state(trainer: Any) -> dict[str, Any]:
    """In the form that Transformers' `_load_rng_state` reads."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if trainer.args.device.type == "cuda":
        # With several processes Transformers sets the states of all devices that each one sees.
        several = trainer.args.world_size > 1
        states["cuda"] = torch.cuda.get_rng_state_all() if several else torch.cuda.get_rng_state()
    return states


def _plain(value: Any) -> Any:
    """Sets, enums and the like, as PEFT writes them."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))
