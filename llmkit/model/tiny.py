"""The embedded demo model (`model=tiny`): a small random Mistral, made on first use, that needs no network and no GPU.

It knows nothing before training, has a byte-level tokenizer (so it takes any text) and learns `data=demo` in seconds.
It is an ordinary model directory: `AutoModelForCausalLM` and `AutoTokenizer` load it, and vLLM serves it.

The files are written without torch and transformers, from numpy's generator, which gives the same numbers on every
machine: all ranks of a job, and a run resumed elsewhere, start from the same weights.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.storage import build_once, cache_dir

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

SEED = 0
VOCAB_SIZE = 640
BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
# The order gives the token ids 0, 1, ... Padding has a token of its own: were it END, hiding padding from the loss
# would hide the end of every answer too, and the model would never learn to stop.
SPECIAL_TOKENS = (PAD, BOS, END, "<|system|>", "<|user|>", "<|assistant|>")

# ChatML with one token per marker: <|bos|><|user|>Who are you?<|end|><|assistant|>A tiny model.<|end|>
# The part between the generation tags (the answer and its end-of-turn token) is what is trained on.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('The tiny model knows the roles system, user and assistant, not ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

# All dimensions are multiples of 64, the block size of 4-bit quantization; vLLM on CPU wants heads of 32 or more.
CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "dtype": "float32",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    # Wide for a Mistral (0.02): with 128 dimensions and a frozen head, as in LoRA, narrow rows of the head would keep
    # the logits so close together that no adapter could make the model sure of an answer.
    "initializer_range": 0.09,
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
    "bos_token_id": SPECIAL_TOKENS.index(BOS),
    "eos_token_id": SPECIAL_TOKENS.index(END),
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": PAD,
    "bos_token": BOS,
    "eos_token": END,
    "clean_up_tokenization_spaces": False,
    "model_max_length": CONFIG["max_position_embeddings"],
}
GENERATION_CONFIG = {key: CONFIG[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}

# The tokenizer learns its merges here. The file ships with the package, so it is there on every machine.
TOKENIZER_TEXT = Path(__file__).parents[1] / "data" / "demo" / "train.jsonl"


def tiny_model() -> Path:
    """The directory of the demo model, made now if this machine's cache does not hold it yet (well under a second)."""
    return build_once(cache_dir() / "models" / f"tiny-{_recipe_digest()}", _build)


def _recipe_digest() -> str:
    """Changes with everything that decides what the files hold: a cache never serves another version's model."""
    recipe = [SEED, SPECIAL_TOKENS, CHAT_TEMPLATE, CONFIG, TOKENIZER_CONFIG, GENERATION_CONFIG]
    digest = hashlib.sha256(json.dumps(recipe).encode())
    digest.update(TOKENIZER_TEXT.read_bytes())
    return digest.hexdigest()[:12]


def _build(directory: Path) -> None:
    from safetensors.numpy import save

    # Not save_file: it gives the file mode 0600, which would lock other users out of a shared cache.
    (directory / "model.safetensors").write_bytes(save(dict(_weights()), metadata={"format": "pt"}))
    _tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, content in {
        "config.json": CONFIG,
        "generation_config.json": GENERATION_CONFIG,
        "tokenizer_config.json": TOKENIZER_CONFIG,
    }.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _weights() -> "Iterator[tuple[str, np.ndarray]]":
    """Yield every parameter of MistralForCausalLM as (name, float32 array), always in the same order."""
    import numpy as np

    generator = np.random.Generator(np.random.PCG64(SEED))

    def matrix(rows: int, columns: int) -> "np.ndarray":
        return generator.standard_normal((rows, columns), dtype=np.float32) * np.float32(CONFIG["initializer_range"])

    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    queries = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    yield "model.embed_tokens.weight", matrix(vocab, hidden)
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", np.ones(hidden, np.float32)
        yield f"{prefix}.self_attn.q_proj.weight", matrix(queries, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", matrix(keys, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", matrix(keys, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", matrix(hidden, queries)
        yield f"{prefix}.post_attention_layernorm.weight", np.ones(hidden, np.float32)
        yield f"{prefix}.mlp.gate_proj.weight", matrix(inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", matrix(inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", matrix(hidden, inner)
    yield "model.norm.weight", np.ones(hidden, np.float32)
    yield "lm_head.weight", matrix(vocab, hidden)


def _tokenizer() -> "Tokenizer":
    """A byte-level BPE: all 256 bytes are tokens, so that no text in any language is unknown to it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # It adds no BOS on its own: the chat template writes it, and two of them would be one too many.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rows = map(json.loads, TOKENIZER_TEXT.read_text(encoding="utf-8").splitlines())
    tokenizer.train_from_iterator((turn["content"] for row in rows for turn in row["messages"]), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "the demo text has too few merges for this vocabulary"
    return tokenizer
