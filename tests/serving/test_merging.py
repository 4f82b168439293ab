"""A merged model answers as the adapter on its base does, whatever was trained; and is there whole or not at all."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkit import rundir
from llmkit.config import TrainConfig
from llmkit.config.schema import ExportConfig, LoraConfig
from llmkit.errors import ConfigError, LlmkitError
from llmkit.serving import merged_weights
from llmkit.serving.loaded import load_target
from llmkit.serving.merging import merge, merged_directory
from llmkit.serving.target import of_run
from llmkit.worker import merge_if_asked

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's deprecations

CHECKOUT = Path(__file__).parents[2]
QUIET: Callable[[str], None] = lambda _: None  # noqa: E731
TEXT = "<|bos|><|user|>What is 2+2?<|end|><|assistant|>It is 4, I think.<|end|>"


def merged_and_unmerged(run_dir: Path, **settings: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The merged model as plain Transformers loads it, its logits, and those of the model as trained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = of_run(run_dir)
    directory = merged_directory(target)
    merge(target, directory, ExportConfig(**settings), say=QUIET)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    trained = load_target(of_run(run_dir))
    assert tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    ids = torch.tensor([[*tokenizer(TEXT)["input_ids"], len(tokenizer) - 1, len(tokenizer) - 2]])
    with torch.no_grad():
        unmerged = trained.model(input_ids=ids).logits if trained.autocast is None else autocast_logits(trained, ids)
        return model, model.eval()(input_ids=ids).logits, unmerged


def autocast_logits(trained: Any, ids: torch.Tensor) -> torch.Tensor:
    with trained.arithmetic():
        return trained.model(input_ids=ids).logits


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "embeddings": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("base", ["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_merges_to_the_same_logits(make_run, kind, base):
    run_dir = make_run(base, lora=KINDS[kind])

    _, merged, unmerged = merged_and_unmerged(run_dir)

    torch.testing.assert_close(merged, unmerged, atol=2e-5, rtol=0)


@pytest.mark.parametrize("base", ["experts", "transposed"])
def test_other_architectures_merge_to_the_same_logits(make_run, base):
    run_dir = make_run(base)

    _, merged, unmerged = merged_and_unmerged(run_dir)

    torch.testing.assert_close(merged, unmerged, atol=2e-5, rtol=0)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_merged(make_run, bias):
    run_dir = make_run("biased", lora={"bias": bias})

    model, merged, unmerged = merged_and_unmerged(run_dir)

    assert model.model.layers[0].self_attn.q_proj.bias.abs().max() > 0
    torch.testing.assert_close(merged, unmerged, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("base", "modules_to_save"), [("untied", None), ("tied", None), ("untied", ["lm_head", "embed_tokens"])]
)
def test_rows_of_new_tokens_are_merged_into_matrices_that_have_grown(make_run, base, modules_to_save):
    run_dir = make_run(base, lora={"modules_to_save": modules_to_save}, chat_template="chat-ml")

    model, merged, unmerged = merged_and_unmerged(run_dir)

    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 642
    assert model.config.tie_word_embeddings is (base == "tied")
    torch.testing.assert_close(merged, unmerged, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "qlora",
    [{"bits": 4}, {"bits": 4, "bnb_4bit_use_double_quant": False}, {"bits": 4, "bnb_4bit_quant_type": "fp4"}],
    ids=["double quant", "nf4", "fp4"],
)
def test_a_4_bit_base_is_merged_with_the_numbers_it_was_trained_with(make_run, qlora):
    run_dir = make_run(method="qlora", qlora=qlora)

    model, merged, unmerged = merged_and_unmerged(run_dir)

    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(merged, unmerged, atol=2e-5, rtol=0)


def test_an_8_bit_base_is_merged_up_to_the_rounding_of_its_activations(make_run):
    run_dir = make_run(method="qlora", qlora={"bits": 8})

    _, merged, unmerged = merged_and_unmerged(run_dir)

    merged, unmerged = merged.log_softmax(-1), unmerged.log_softmax(-1)
    assert (unmerged.exp() * (unmerged - merged)).sum(-1).mean() < 0.002


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("bf16_pure", torch.bfloat16)])
def test_a_16_bit_run_is_merged_in_its_16_bits(make_run, method, precision, dtype):
    run_dir = make_run(method=method, precision=precision)

    model, merged, unmerged = merged_and_unmerged(run_dir)

    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    torch.testing.assert_close(merged.float(), unmerged.float(), atol=0.1, rtol=0)


def test_the_trained_weights_of_a_freeze_checkpoint_are_merged(make_run, base_weights):
    from llmkit.training.checkpoints import manifest

    run_dir = make_run(method="freeze")
    final = rundir.FINAL
    written = shutil.copytree(run_dir / final, run_dir / "checkpoints" / "written")
    whole = load_file(written / "model.safetensors")
    trained = {name: tensor for name, tensor in whole.items() if name.startswith("model.layers.2.")}
    save_file(trained, written / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(run_dir / rundir.CONFIG, written)
    checkpoint = manifest.commit(written, run_dir, step=4, facts={})

    target = of_run(checkpoint)
    merge(target, merged_directory(target), ExportConfig(), say=QUIET)

    merged = load_file(run_dir / "merged-step-00000004" / "model.safetensors")
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    assert {n for n in merged if not torch.equal(merged[n], base_weights[n])} == set(trained)


@pytest.fixture(scope="module")
def base_weights(tiny_model_dir):
    return load_file(tiny_model_dir / "model.safetensors")


def test_there_is_nothing_to_merge_in_a_whole_model(make_run):
    target = of_run(make_run(method="freeze"))

    with pytest.raises(ConfigError, match="a whole model, with nothing to merge"):
        merge(target, merged_directory(target), ExportConfig(), say=QUIET)


def test_weights_that_a_16_bit_base_keeps_in_32_bits_stay_so(make_run):
    target = of_run(make_run(precision="bf16"))
    model = load_target(target).model
    norm = model.get_base_model().model.norm.weight
    norm.data = norm.data.float() + 1e-5

    merged = merged_weights.merge_weights(model, target, torch.bfloat16)

    dtypes = {name: parameter.dtype for name, parameter in merged.named_parameters()}
    assert dtypes.pop("model.norm.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_what_is_written_is_all_that_plain_libraries_need(make_run, read_json):
    run_dir = make_run(precision="bf16", chat_template="chat-ml")
    target = of_run(run_dir)

    record = merge(target, merged_directory(target), ExportConfig(max_shard_gb=0.0005), say=QUIET)

    merged, final = run_dir / "merged", run_dir / "final"
    assert set(record["files"]) | {"merge.json"} == {path.name for path in merged.iterdir()}
    assert len(list(merged.glob("model-*.safetensors"))) > 2
    assert max(path.stat().st_size for path in merged.glob("model-*.safetensors")) < 510_000
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (merged / name).read_text() == (final / name).read_text()
    ends = [read_json(one / "generation_config.json")["eos_token_id"] for one in (merged, final)]
    assert ends[0] == ends[1]
    card = (merged / "README.md").read_text()
    assert "library_name: transformers" in card
    assert str(target.base.path) not in card
    assert record["made_from"]["base"] == str(target.base.path)


def names(run_dir: Path) -> set[str]:
    """What is in the run's directory, hidden files too."""
    return {path.name for path in run_dir.iterdir()}


def merge_run(run_dir: Path, **settings: Any) -> list[str]:
    """Merge, and return what was said."""
    said: list[str] = []
    target = of_run(run_dir)
    merge(target, merged_directory(target), ExportConfig(**settings), say=said.append)
    return said


def test_the_same_merge_again_leaves_what_is_there_and_a_changed_adapter_merges_anew(make_run):
    run_dir = make_run()
    merge_run(run_dir)
    weights = run_dir / "merged" / "model.safetensors"
    first = weights.stat().st_ino

    assert "is this model already (mean KL" in merge_run(run_dir)[-1]
    assert weights.stat().st_ino == first

    other = make_run(name="other", seed=1)
    shutil.copy(other / "final" / "adapter_model.safetensors", run_dir / "final")
    merge_run(run_dir)
    assert weights.stat().st_ino != first
    merge_run(other)
    assert weights.read_bytes() == (other / "merged" / "model.safetensors").read_bytes()


def test_a_merged_model_that_has_lost_a_file_is_made_again(make_run):
    run_dir = make_run()
    merge_run(run_dir)
    (run_dir / "merged" / "tokenizer.json").unlink()

    merge_run(run_dir)

    assert (run_dir / "merged" / "tokenizer.json").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["Ctrl-C", "full"])
@pytest.mark.parametrize("there", [False, True], ids=["first", "second"])
def test_whatever_ends_a_merge_leaves_what_was_there(make_run, monkeypatch, error, there):
    run_dir = make_run()
    if there:
        merge_run(run_dir)
    before = names(run_dir)
    write = merged_weights.write_model

    def interrupted(*args: Any, **more: Any) -> None:
        write(*args, **more)
        raise error

    monkeypatch.setattr(merged_weights, "write_model", interrupted)
    with pytest.raises((KeyboardInterrupt, LlmkitError)) as raised:
        merge_run(run_dir, max_shard_gb=4.0)

    assert names(run_dir) == before
    if isinstance(error, OSError):
        assert str(raised.value) == f"{run_dir}/merged cannot be written: No space left on device."


def test_a_disk_without_room_is_told_with_numbers_before_anything_is_written(make_run, monkeypatch):
    run_dir = make_run()
    monkeypatch.setattr(merged_weights.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))

    with pytest.raises(LlmkitError, match=r"the merged model needs 3\.02 MB, and that disk has 1 kB free"):
        merge_run(run_dir)


KILLED = """
import os, signal, sys
from pathlib import Path
from llmkit.config.schema import ExportConfig
from llmkit.serving import merging
from llmkit.serving.target import of_run

moment, run_dir = sys.argv[1], Path(sys.argv[2])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "writing":
    merging.rundir.write_json = die
else:
    replace = os.replace
    def once(source, target):
        replace(source, target)
        if Path(target).name == ".merged.former":
            die()
    merging.os.replace = once
merging.merge(of_run(run_dir), run_dir / "merged", ExportConfig(max_shard_gb=1.0), say=print)
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_killed_merge_leaves_nothing_half_written_under_the_name_and_the_next_tidies_up(make_run, moment):
    run_dir = make_run()
    merge_run(run_dir)  # of other settings than the one that is killed
    before = names(run_dir)

    killed = subprocess.run([sys.executable, "-c", KILLED, moment, run_dir], cwd=CHECKOUT, check=False, timeout=300)

    assert killed.returncode == -signal.SIGKILL
    assert ".merged.partial" in names(run_dir)
    assert ("merged" in names(run_dir)) == (moment == "writing")
    assert "is this model already" in merge_run(run_dir)[-1]  # the one from before has its name back
    assert names(run_dir) == before


def test_memory_is_free_of_the_trained_model_before_the_merged_one_is_loaded(make_run, monkeypatch):
    import gc
    import weakref

    run_dir, seen = make_run(), []
    write, load = merged_weights.write_model, merged_weights.load_merged

    def written(model: Any, *args: Any, **more: Any) -> None:
        seen.append(weakref.ref(model))
        write(model, *args, **more)

    def loaded(*args: Any) -> Any:
        gc.collect()
        seen.append(seen[0]())
        return load(*args)

    monkeypatch.setattr(merged_weights, "write_model", written)
    monkeypatch.setattr(merged_weights, "load_merged", loaded)
    merge_run(run_dir)

    assert seen[1] is None


def test_a_run_that_was_stopped_early_has_nothing_to_merge(tmp_path, capsys):
    rundir.write_result(tmp_path, status="stopped", early_stop={"step": 5, "place": 2, "of": 2, "goes_on": False})

    code = merge_if_asked(TrainConfig(lora=LoraConfig(), export=ExportConfig(merge=True)), tmp_path)

    assert code == 0
    assert capsys.readouterr() == ("", "")
