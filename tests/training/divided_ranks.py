"""One rank of a model divided by FSDP2 over gloo: what torchrun starts in test_divided.py.

    python -m torch.distributed.run --nproc-per-node 2 tests/training/divided_ranks.py FOLDER lora|full

It trains three steps, saves as a checkpoint does, trains two more; then puts the saved state into a new model, trains
the two steps again, and leaves the losses of both in FOLDER/losses-<rank>.json. Accelerate would fall back to DDP on a
CPU, so the trainer itself cannot be used.
"""

import json
import os
import signal
import sys
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from llmkit.processes import die_with_parent
from llmkit.training.checkpoints.contents import ADAPTER_WEIGHTS, WEIGHTS, _weights, load_divided, whole_state

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def divided(method: str, *, seed: int):
    torch.manual_seed(0)  # the base, the same each time
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **SIZES))
    torch.manual_seed(seed)
    if method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    elif seed:
        torch.nn.init.normal_(model.lm_head.weight)
    for layer in model.get_decoder().layers if method == "full" else model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return model, optimizer


def train(model, optimizer, batches):
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(folder: Path, method: str) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    numbers = torch.Generator().manual_seed(rank)
    batches = [torch.randint(50, (2, 16), generator=numbers) for _ in range(5)]

    model, optimizer = divided(method, seed=0)
    train(model, optimizer, batches[:3])
    trained, state = whole_state(model, optimizer)
    if rank == 0:
        name = ADAPTER_WEIGHTS if method == "lora" else WEIGHTS
        save_file({key: value.contiguous() for key, value in _weights(model, trained)[name].items()}, folder / name)
        torch.save(state, folder / "optimizer.bin")
    distributed.barrier()
    first = train(model, optimizer, batches[3:])

    model, optimizer = divided(method, seed=1)
    load_divided(model, folder)
    saved = torch.load(folder / "optimizer.bin", weights_only=True) if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    set_optimizer_state_dict(model, optimizer, saved, options=options)
    again = train(model, optimizer, batches[3:])
    (folder / f"losses-{rank}.json").write_text(json.dumps({"first": first, "again": again}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    die_with_parent(os.getppid(), signal.SIGKILL)
    main(Path(sys.argv[1]), sys.argv[2])
