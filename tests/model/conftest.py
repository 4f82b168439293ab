"""The tiny model in the shapes that models come in, and runs of it without a data set."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmkit.config.schema import (
    DataConfig,
    FreezeConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    QloraConfig,
    TrainConfig,
    TrainingConfig,
)

SPARE = 64  # rows without a token, which many models have


@pytest.fixture(scope="session")
def shapes(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shape -> a model directory: the head apart from the embeddings, tied to them, or both with spare rows."""
    from safetensors.numpy import load_file, save_file

    found = {"untied": tiny_model_dir}
    for shape in ("tied", "spare"):
        found[shape] = Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("models") / shape))
        weights = load_file(tiny_model_dir / "model.safetensors")
        config = json.loads((tiny_model_dir / "config.json").read_text())
        if shape == "tied":
            config["tie_word_embeddings"] = True
            del weights["lm_head.weight"]
        else:
            config["vocab_size"] += SPARE
            for name in ("lm_head.weight", "model.embed_tokens.weight"):
                weights[name] = weights[name][[*range(640), *[0] * SPARE]]
        (found[shape] / "config.json").write_text(json.dumps(config))
        save_file(weights, found[shape] / "model.safetensors", metadata={"format": "pt"})
    return found


@pytest.fixture
def start(shapes: dict[str, Path]) -> Callable[..., Any]:
    """A function: shape, method and settings -> config, tokenizer, new rows and model, as a recipe has them."""
    import torch
    from transformers import set_seed

    from llmkit.config.init_from import adopt_init_from
    from llmkit.model.loading import fit_embeddings, load_model
    from llmkit.model.methods import apply_method, loading_dtype
    from llmkit.model.precision import KINDS
    from llmkit.model.tokenizer import load_run_tokenizer

    def make(
        shape: str = "untied",
        method: str = "lora",
        *,
        precision: str = "fp32",
        init_from: Path | None = None,
        lora: dict[str, Any] | None = None,
        freeze: dict[str, Any] | None = None,
        bits: int = 4,
        weight_decay: float = 0.0,
        pad_token: str = "auto",
        **data: Any,
    ) -> Any:
        config = TrainConfig(
            model=ModelConfig(name="custom")
            if init_from
            else ModelConfig(path=str(shapes[shape]), pad_token=pad_token),
            data=DataConfig(path="rows.jsonl", **({} if init_from else {"chat_template": "chat-ml"}) | data),
            method=MethodConfig(name=method),
            training=TrainingConfig(weight_decay=weight_decay, learning_rate=1e-3),
            init_from=str(init_from) if init_from else None,
        )
        if method in ("lora", "qlora"):
            config.lora = LoraConfig(**({} if init_from else {"r": 4}) | (lora or {}))
        if method == "qlora":
            config.qlora = QloraConfig(bits=bits)
        if method == "freeze":
            config.freeze = FreezeConfig(**freeze or {})
        adopt_init_from(config)
        if config.lora is not None:
            config.lora.lora_alpha = config.lora.lora_alpha or 2 * config.lora.r
        set_seed(config.seed)
        tokenizer = load_run_tokenizer(config)
        kind = KINDS[precision]
        model = load_model(
            config.model,
            dtype=loading_dtype(config, kind),
            device=torch.device("cpu"),
            quantization=config.qlora,
            precision=kind,
        )
        rows = fit_embeddings(model, tokenizer, config)
        trained: Any = apply_method(model, config, kind, new_rows=rows)
        return SimpleNamespace(config=config, tokenizer=tokenizer, rows=rows, model=trained)

    return make


CHAT = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A tiny model."}]


@pytest.fixture(scope="session")
def learn() -> Callable[..., Any]:
    """A function: a few steps of AdamW on one chat, by the model's own loss; returns the parameters from before."""
    import torch

    def steps(run: Any, count: int = 3, learning_rate: float = 1e-2) -> dict[str, Any]:
        before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
        ids = run.tokenizer.apply_chat_template(CHAT, return_tensors="pt", return_dict=True)["input_ids"]
        optimizer = torch.optim.AdamW(
            [p for p in run.model.parameters() if p.requires_grad],
            lr=learning_rate,
            weight_decay=run.config.training.weight_decay,
        )
        run.model.train()
        for _ in range(count):
            optimizer.zero_grad()
            run.model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        run.model.eval()
        return before

    return steps


@pytest.fixture(scope="session")
def answers() -> Callable[..., Any]:
    """A function: model and tokenizer -> the logits of the chat and the tokens that are generated greedily."""
    import torch

    def ask(model: Any, tokenizer: Any) -> tuple[Any, list[int]]:
        prompt = tokenizer.apply_chat_template(
            CHAT[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = tokenizer.apply_chat_template(CHAT, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
            generated = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        return logits, generated[0].tolist()

    return ask


@pytest.fixture
def deliver(tmp_path: Path) -> Callable[[Any], Path]:
    """A function: writes the run's directory as a finished run leaves it, and returns it."""
    import dataclasses

    from llmkit.config import save
    from llmkit.rundir import write_result
    from llmkit.training.delivery import model_card, save_final

    def write(run: Any, name: str = "run") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        config = dataclasses.replace(run.config)
        save(config, directory)
        card = model_card(config, {}, model=run.model)
        save_final(run.model, run.tokenizer, config, directory, card)
        write_result(directory, status="completed")
        return directory

    return write
