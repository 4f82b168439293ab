"""What tests of serving share: a finished run, and finished runs of every method made without training."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
TUNED = ("training.max_steps=20", "training.save_steps=10", "lora.r=4", "evaluation=off")


@pytest.fixture(scope="session")
def tuned_run(closed_world: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory `.../runs/tuned` of a finished run: 20 steps of lora (r=4, float32) of model=tiny on data=demo.

    It keeps both its checkpoints, step-00000010 and step-00000020. Read only: copy it (shutil.copytree) to change it.
    """
    directory = tmp_path_factory.mktemp("tuned")
    subprocess.run(
        [sys.executable, "-m", "llmkit", "train", "name=tuned", *TUNED],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        check=True,
        capture_output=True,
        timeout=300,
    )
    return directory / "runs" / "tuned"


@pytest.fixture(scope="session")
def bases(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shape -> a tiny model's directory.

    `untied` (model=tiny), `tied` (its head is its embeddings), `biased` (its attention has biases), `experts` (a
    mixture of them), `transposed` (GPT-2, whose linear layers are the other way round).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

    own = AutoConfig.from_pretrained(tiny_model_dir)
    tied = AutoConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=True)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
    shared = {name: getattr(own, name) for name in same}
    tokens = {name: value for name, value in shared.items() if name.endswith("_token_id")}
    configs = {
        "tied": tied,
        "biased": LlamaConfig(**shared, attention_bias=True),
        "experts": MixtralConfig(**shared, num_local_experts=4),
        "transposed": GPT2Config(vocab_size=own.vocab_size, n_embd=64, n_layer=2, n_head=4, **tokens),
    }
    found = {"untied": tiny_model_dir}
    for shape, config in configs.items():
        found[shape] = Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("bases") / shape))
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(found[shape])
    return found


MadeRun = Callable[..., Path]


@pytest.fixture
def make_run(bases: dict[str, Path], tmp_path: Path) -> MadeRun:
    """A function: base, method and settings -> the directory of a finished run whose trained weights are random.

    What would have been trained moves by `change`, in standard deviations of a normal distribution.
    """
    import torch
    from transformers import set_seed

    from llmkit.config import save
    from llmkit.config.schema import (
        DataConfig,
        FreezeConfig,
        LoraConfig,
        MethodConfig,
        ModelConfig,
        PrecisionConfig,
        QloraConfig,
        TrainConfig,
        TrainingConfig,
    )
    from llmkit.model.loading import fit_embeddings, load_model
    from llmkit.model.methods import apply_method, loading_dtype
    from llmkit.model.precision import KINDS
    from llmkit.model.tokenizer import load_run_tokenizer
    from llmkit.rundir import write_result
    from llmkit.training.delivery import model_card, save_final

    def make(
        base: str | Path = "untied",
        method: str = "lora",
        *,
        name: str = "made",
        precision: str = "fp32",
        lora: dict[str, Any] | None = None,
        qlora: dict[str, Any] | None = None,
        change: float = 0.05,
        seed: int = 0,
        **data: Any,
    ) -> Path:
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        kind = KINDS[precision]
        config = TrainConfig(
            model=ModelConfig(path=str(bases.get(str(base), base))),
            data=DataConfig(path="rows.jsonl", **data),
            method=MethodConfig(name=method),
            precision=PrecisionConfig(name=precision),
            training=TrainingConfig(learning_rate=1e-3, weight_decay=0.0),
        )
        if method in ("lora", "qlora"):
            config.lora = LoraConfig(**{"r": 4, "lora_alpha": 8} | (lora or {}))
        config.qlora = QloraConfig(**qlora or {}) if method == "qlora" else None
        config.freeze = FreezeConfig(last_n_layers=1) if method == "freeze" else None
        set_seed(seed)
        tokenizer = load_run_tokenizer(config)
        model = load_model(
            config.model,
            dtype=loading_dtype(config, kind),
            device=torch.device("cpu"),
            quantization=config.qlora,
            precision=kind,
        )
        rows = fit_embeddings(model, tokenizer, config)
        trained: Any = apply_method(model, config, kind, new_rows=rows)
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data += change * torch.randn_like(parameter)
        save(config, run_dir)
        save_final(trained, tokenizer, config, run_dir, model_card(config, {}, model=trained))
        write_result(run_dir, status="completed")
        return run_dir

    return make


@pytest.fixture
def read_json() -> Callable[[Path], dict[str, Any]]:
    """A function: the JSON object in a file."""
    return lambda path: json.loads(path.read_text(encoding="utf-8"))
