"""Rules for runs of several processes: what does not go together is refused before anything starts."""

from llmkit.config.schema import TrainConfig


def rank_problems(config: TrainConfig) -> list[str]:
    """The problems of processes, machines and engines, each with what to use instead."""
    return [*_machine_problems(config), *_engine_problems(config)]


def _machine_problems(config: TrainConfig) -> list[str]:
    hardware, problems = config.hardware, []
    if hardware.num_nodes == 1 or config.launcher.name not in ("local", "packed"):
        return []
    if hardware.node_rank is None or not hardware.rendezvous:
        problems.append(
            f"hardware.num_nodes={hardware.num_nodes}: say which machine this is and where they meet, "
            "hardware.node_rank=0 hardware.rendezvous=HOST:29500 (HOST: the first machine), or leave it to a "
            "scheduler, launcher=slurm or launcher=ray."
        )
    elif hardware.node_rank >= hardware.num_nodes:
        problems.append(
            f"hardware.node_rank={hardware.node_rank}: {hardware.num_nodes} machines are 0 to {hardware.num_nodes - 1}."
        )
    if hardware.rendezvous and not hardware.rendezvous.rpartition(":")[2].isdigit():
        problems.append(f"hardware.rendezvous={hardware.rendezvous}: HOST:PORT, for example 10.0.0.1:29500.")
    return problems


def _engine_problems(config: TrainConfig) -> list[str]:
    stage, engine = config.deepspeed.stage, f"deepspeed={config.deepspeed.name}"
    fsdp2 = config.distributed.name == "fsdp2"
    problems = []
    if fsdp2 and stage:
        problems.append(f"distributed=fsdp2 and {engine} divide the same weights; choose one of them.")
    if fsdp2 and config.hardware.device == "cpu":
        problems.append(
            "distributed=fsdp2 needs GPUs: on a CPU Accelerate quietly trains with plain DDP; use distributed=ddp, or "
            "deepspeed=zero3, which runs there."
        )
    shards = engine if stage == 3 else "distributed=fsdp2" if fsdp2 else None
    if shards and config.qlora is not None:
        problems.append(
            f"method=qlora with {shards}: 4-bit and 8-bit weights cannot be divided; use deepspeed=zero2, which leaves "
            "them whole, or method=lora."
        )
    if shards and config.training.final == "best":
        problems.append(
            f"training.final=best with {shards}: no process holds the best weights whole; use training.final=last, or "
            "deepspeed=zero2."
        )
    if config.qlora is not None and config.lora is not None and config.lora.use_dora and (stage or fsdp2):
        problems.append(
            f"lora.use_dora=true with method=qlora and {engine if stage else 'distributed=fsdp2'}: its magnitudes are "
            "not trained right there; use distributed=ddp without deepspeed, or method=lora."
        )
    if stage and config.precision.name == "bf16_pure":
        problems.append(
            f"precision=bf16_pure with {engine}: DeepSpeed keeps 32-bit weights of its own; use precision=bf16."
        )
    if fsdp2 and config.precision.name == "fp16":
        problems.append("precision=fp16 with distributed=fsdp2: there is no loss scaler for it; use precision=bf16.")
    if config.deepspeed.offload_param != "none" and stage != 3:
        problems.append(f"deepspeed.offload_param={config.deepspeed.offload_param} is for stage 3: deepspeed=zero3.")
    return problems


def rank_warnings(config: TrainConfig) -> list[str]:
    """Settings of several processes that have no effect."""
    hardware, found = config.hardware, []
    processes = hardware.num_processes * hardware.num_nodes
    if hardware.num_nodes == 1 or config.launcher.name not in ("local", "packed"):
        for key in ("node_rank", "rendezvous"):
            if getattr(hardware, key) is not None:
                found.append(
                    f"hardware.{key} has no effect "
                    + ("with one machine." if hardware.num_nodes == 1 else f"with launcher={config.launcher.name}.")
                )
    if config.distributed.name == "fsdp2" and processes == 1:
        found.append("distributed=fsdp2 has no effect with one process; set hardware.num_processes.")
    if config.distributed.name != "fsdp2":
        for key, default in (("reshard_after_forward", True), ("cpu_offload", False)):
            if getattr(config.distributed, key) != default:
                found.append(f"distributed.{key} has no effect with distributed={config.distributed.name}.")
    return found
