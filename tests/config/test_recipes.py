"""`recipe=dpo` brings its own node, and everything that can be known wrong of it is said before a model is loaded."""

import inspect
import re

import pytest
from omegaconf import OmegaConf

from llmkit.config import save, warnings
from llmkit.config.schema import DPO_LOSSES, F_DIVERGENCES
from llmkit.errors import ConfigError

DPO = "recipe=dpo"


@pytest.fixture
def my_yaml(tmp_path):
    """A function that writes my.yaml."""

    def write(text):
        (tmp_path / "my.yaml").write_text(text)
        return tmp_path / "my.yaml"

    return write


def test_the_node_is_there_with_the_recipe_and_only_then(compose):
    assert compose().dpo is None
    assert (compose(DPO).recipe, compose(DPO).dpo.beta) == ("dpo", 0.1)


@pytest.mark.parametrize("words", [["dpo.beta=1"], ["recipe=sft", "dpo.beta=1"], ["dpo.beta=1", "recipe=sft"]], ids=str)
def test_settings_of_a_recipe_that_was_not_chosen_are_an_error_that_names_it(compose, words):
    with pytest.raises(ConfigError, match=r"dpo\.beta=1: recipe=sft has no 'dpo' settings; they belong to recipe=dpo"):
        compose(*words)


def test_an_experiment_without_the_recipe_is_told_the_same(compose):
    with pytest.raises(ConfigError, match="the chosen recipe has no 'dpo' settings; they belong to recipe=dpo"):
        compose("-m", "experiment=demo_full", "dpo.beta=1")


def test_an_unknown_recipe_is_told_the_nearest(compose):
    with pytest.raises(ConfigError, match=r"recipe=dop: unknown. Did you mean 'dpo'\?"):
        compose("recipe=dop")


def test_the_last_choice_of_a_recipe_wins(compose):
    assert compose("recipe=sft", DPO, "dpo.beta=0.2").dpo.beta == 0.2


def test_a_file_chooses_the_recipe_and_its_settings(compose, my_yaml):
    config = compose(my_yaml("recipe: dpo\ndpo: {beta: 0.3, loss_type: [ipo, sft], loss_weights: [1.0, 0.2]}"))

    assert (config.recipe, config.dpo.beta, config.dpo.loss_type) == ("dpo", 0.3, ["ipo", "sft"])


def test_a_recipe_on_the_command_line_leaves_out_what_belongs_to_that_of_the_file(compose, my_yaml):
    config = compose(my_yaml("recipe: dpo\ndpo: {beta: 0.3}\nlora: {r: 4}"), "recipe=sft")

    assert (config.recipe, config.dpo, config.lora.r) == ("sft", None, 4)


def test_an_experiment_file_chooses_a_recipe_like_any_group(compose, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /recipe: dpo\ndpo:\n  beta: 0.7\n"
    )
    (job,) = compose("-m", "--config-dir", tmp_path, "experiment=mine")

    assert (job.recipe, job.dpo.beta) == ("dpo", 0.7)


def test_a_written_config_repeats_the_run(compose, tmp_path):
    config = compose(DPO, "dpo.beta=0.5", "dpo.loss_type=hinge", "method=full")
    save(config, tmp_path)

    assert OmegaConf.load(tmp_path / "config.yaml").dpo.beta == 0.5
    assert compose(tmp_path / "config.yaml") == config
    assert compose(tmp_path / "config.yaml", "recipe=sft").training.learning_rate == 3e-3


def test_settings_are_swept(compose):
    assert [job.dpo.beta for job in compose("-m", DPO, "dpo.beta=0.05,0.1")] == [0.05, 0.1]


def test_recipes_are_swept(compose):
    assert [job.recipe for job in compose("-m", "recipe=sft,dpo")] == ["sft", "dpo"]


@pytest.mark.parametrize(("typed", "losses"), [("ipo", ["ipo"]), ("[ipo,sft]", ["ipo", "sft"])])
def test_losses_are_a_name_or_a_list(compose, typed, losses):
    assert compose(DPO, f"dpo.loss_type={typed}").dpo.loss_type == losses


def test_a_sweep_over_losses_trains_with_one_each(compose):
    assert [job.dpo.loss_type for job in compose("-m", DPO, "dpo.loss_type=ipo,hinge")] == [["ipo"], ["hinge"]]


def test_several_losses_without_brackets_are_asked_what_they_mean(compose):
    with pytest.raises(ConfigError, match=r"is a list. Write 'dpo.loss_type=\[ipo,sft\]'"):
        compose(DPO, "dpo.loss_type=ipo,sft")


def test_our_names_of_losses_and_divergences_are_those_of_trl():
    from trl import DPOTrainer

    code = inspect.getsource(DPOTrainer._compute_loss)

    assert set(re.findall(r'loss_type == "(\w+)"', code)) == set(DPO_LOSSES)
    assert set(re.findall(r'f_divergence_type == "(\w+)"', code)) == set(F_DIVERGENCES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dpo.loss_type=sigmod"], r"must be one of sigmoid, hinge.*Did you mean 'sigmoid'\?"),
        (["dpo.loss_type=[ipo,nonsense]"], "must be one of sigmoid"),
        (["dpo.loss_type=[]"], "loss_type is empty"),
        (["dpo.loss_type=null"], "loss_type is empty"),
        (["dpo.loss_type=5"], "must be one of sigmoid"),
        (["dpo.loss_weights=[1,2]"], r"2 factors for 1 losses \(sigmoid\)"),
        (["dpo.beta=0"], "greater than 0"),
        (["dpo.label_smoothing=1"], "less than 1"),
        (["dpo.ld_alpha=1.5"], "at most 1"),
        (["dpo.loss_type=exo_pair"], "exo_pair needs dpo.label_smoothing above 0"),
        (["dpo.loss_type=robust", "dpo.label_smoothing=0.5"], "less than 0.5"),
        (["dpo.loss_type=apo_zero", "dpo.f_divergence_type=js_divergence"], "not defined for apo_zero; reverse_kl"),
        (["dpo.loss_type=aot", "dpo.use_weighting=true"], "aot sorts the pairs"),
        (["data.packing=bfd"], "pairs, which are not packed"),
        (["lora.bias=all"], r"lora\.bias=none, or dpo\.precompute_ref_log_probs=true"),
        (["dpo.betta=1"], "Did you mean 'dpo.beta'"),
        (["objective=exact_match"], "recipe=dpo measures eval_loss, train_loss, preference_accuracy"),
        (["objective=preference_accuracy", "data.validation=null"], "objective=train_preference_accuracy"),
        (["objective=preference_accuracy", "evaluation.examples=0"], "evaluation.examples=0 measures it on no rows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_said_before_anything_is_loaded(compose, words, message):
    with pytest.raises(ConfigError, match=message):
        compose(DPO, *words)


def test_a_figure_of_another_recipe_is_no_objective(compose):
    with pytest.raises(ConfigError, match="recipe=sft measures eval_loss, train_loss, exact_match"):
        compose("objective=preference_accuracy")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["dpo.label_smoothing=0.1"], "dpo.label_smoothing"),
        (["dpo.discopop_tau=0.1"], "dpo.discopop_tau"),
        (["dpo.f_alpha_divergence_coef=0.3"], "dpo.f_alpha_divergence_coef"),
        (["dpo.precompute_ref_batch_size=4"], "dpo.precompute_ref_batch_size"),
        (["lora.lora_dropout=0.1"], "lora.lora_dropout=0.1"),
        (["data.train_on=all"], "data.train_on=all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_setting_without_effect_is_warned_of(compose, words, named):
    assert [text for text in warnings(compose(DPO, *words)) if text.startswith(named)]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["dpo.loss_type=robust", "dpo.label_smoothing=0.1"],
        ["dpo.loss_type=discopop", "dpo.discopop_tau=0.1"],
        ["lora.lora_dropout=0.1", "dpo.disable_dropout=false"],
    ],
    ids=" ".join,
)
def test_a_setting_with_effect_is_not_warned_of(compose, words):
    assert warnings(compose(DPO, *words)) == []


@pytest.mark.parametrize(("method", "rate"), [("lora", 5e-6), ("qlora", 5e-6), ("full", 5e-7), ("freeze", 5e-7)])
def test_the_learning_rate_follows_recipe_and_method(compose, method, rate):
    config = compose(DPO, f"method={method}", "model=phi2")

    assert config.training.learning_rate == rate
    assert "training.learning_rate" in config.derived


def test_a_large_model_gets_half_the_pairs_at_a_time_since_a_pair_is_two_sequences(compose):
    sizes = [compose(f"recipe={r}", "model=phi2").training.per_device_train_batch_size for r in ("sft", "dpo")]

    assert sizes == [4, 2]
