"""What can be known before a server is started: memory, lengths, heads, GPUs, the port, the key, vLLM's own words."""

import errno
import os
import socket
from dataclasses import replace

from llmkit.config.schema import HardwareConfig
from llmkit.errors import ConfigError, did_you_mean
from llmkit.serving.fit import cpu_cache_gib, estimate, visible_gpus
from llmkit.serving.model_facts import ModelFacts, read_model
from llmkit.serving.plan import KEY, LOCAL_HOSTS, Plan

LONG = 0.8  # of a model's context; beyond it prompts and answers get worse
# Words of vLLM's that llmkit sets itself, and the setting each belongs to.
OURS = {
    "--model": "run= or model=",
    "--host": "serve.host",
    "--port": "serve.port",
    "--served-model-name": "serve.served_model_name",
    "--api-key": f"{KEY} in the environment",
    "--uds": "serve.host and serve.port",
    "--root-path": "a proxy in front",
    "--ssl-keyfile": "a proxy in front",
    "--ssl-certfile": "a proxy in front",
    "--chat-template": "the template the model was trained with",
}


def check(plan: Plan, hardware: HardwareConfig) -> tuple[Plan, list[str], list[str]]:
    """The plan with what follows from model and machine filled in; facts; warnings.

    Raises ConfigError with everything that would keep the server from starting, and what to change.
    """
    model = read_model(plan.measured_model, plan.measured, plan.revision)
    if plan.environment.for_cpu and plan.serve.kv_cache_gib is None:
        plan = replace(plan, serve=replace(plan.serve, kv_cache_gib=cpu_cache_gib()))
    plan = replace(plan, names_modules=not model.has_experts)
    memory = estimate(plan, model, hardware)
    problems = [
        *_address_problems(plan),
        *_word_problems(plan),
        *_quantization_problems(plan, model),
        *_head_problems(plan, model),
        *_gpu_problems(plan),
        *_length_problems(plan, model),
        *([memory.problem] if memory.problem else []),
    ]
    if problems:
        raise ConfigError(*problems)
    warnings = [*_length_warnings(plan, model), *_gpu_warnings(plan), *([memory.warning] if memory.warning else [])]
    return plan, [memory.fact], warnings


def _address_problems(plan: Plan) -> list[str]:
    serve, problems = plan.serve, []
    if serve.host not in LOCAL_HOSTS and not os.environ.get(KEY):
        problems.append(
            f"serve.host={serve.host}: others reach that address, so a key is needed: set {KEY} in the environment "
            "(clients send it as Authorization: Bearer KEY), or leave serve.host out."
        )
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does: a port that was just left is free
        try:
            probe.bind((serve.host, serve.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                problems.append(f"serve.port={serve.port}: is in use; choose another, or stop what listens there.")
            else:
                problems.append(f"serve.host={serve.host} serve.port={serve.port}: {error.strerror}.")
    return problems


def _word_problems(plan: Plan) -> list[str]:
    words = [str(word).partition("=")[0] for word in plan.serve.extra_args]
    return [f"serve.extra_args: {word} is llmkit's to set: {OURS[word]}." for word in words if word in OURS]


def _quantization_problems(plan: Plan, model: ModelFacts) -> list[str]:
    wanted = plan.serve.quantization
    if wanted is None:
        return []
    known = plan.environment.quantizations()
    if wanted not in known:
        return [
            f"serve.quantization={wanted}: vLLM {plan.environment.version} does not list it."
            f"{did_you_mean(wanted, known)} It has {', '.join(known)}; fp8 needs no checkpoint made for it."
        ]
    made_so = any(kind in wanted for kind in ("awq", "gptq", "compressed", "modelopt", "quark"))
    if made_so and not model.is_quantized:
        return [f"serve.quantization={wanted}: is for checkpoints made so, and this one is not; fp8 takes any."]
    return []


def _head_problems(plan: Plan, model: ModelFacts) -> list[str]:
    degree = plan.serve.tensor_parallel_size
    if not model.heads or model.heads % degree == 0:
        return []
    fitting = [n for n in range(1, model.heads + 1) if model.heads % n == 0]
    return [
        f"serve.tensor_parallel_size={degree}: the model has {model.heads} attention heads, which do not divide; "
        f"{', '.join(map(str, fitting))} do."
    ]


def _gpu_problems(plan: Plan) -> list[str]:
    serve = plan.serve
    needed, there = serve.tensor_parallel_size * serve.pipeline_parallel_size, visible_gpus(serve)
    if plan.environment.for_cpu or there is None or needed <= there:
        return []
    return [
        f"serve.tensor_parallel_size={serve.tensor_parallel_size} x serve.pipeline_parallel_size="
        f"{serve.pipeline_parallel_size}: needs {needed} GPUs, and there are {there}."
    ]


def _gpu_warnings(plan: Plan) -> list[str]:
    serve = plan.serve
    if serve.devices is None:
        return []
    if plan.environment.for_cpu:
        return [f"serve.devices={serve.devices} has no effect: this vLLM is for CPUs."]
    needed, there = serve.tensor_parallel_size * serve.pipeline_parallel_size, visible_gpus(serve) or 0
    if needed < there:
        return [f"serve.devices={serve.devices}: {there} GPUs, of which {needed} are used; serve.tensor_parallel_size."]
    return []


def _length_problems(plan: Plan, model: ModelFacts) -> list[str]:
    length, context = plan.serve.max_model_len, model.context
    if length is None or context is None or length <= context:
        return []
    return [f"serve.max_model_len={length}: the model takes at most {context:,} tokens."]


def _length_warnings(plan: Plan, model: ModelFacts) -> list[str]:
    length, context = plan.serve.max_model_len, model.context
    if length is None or context is None or length <= LONG * context:
        return []
    return [
        f"serve.max_model_len={length:,} is more than {LONG:.0%} of the model's context of {context:,} tokens: where "
        "prompts and answers use that much, quality falls."
    ]
