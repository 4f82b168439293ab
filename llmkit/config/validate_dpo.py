"""Rules of `recipe=dpo`: losses and settings that go together, as TRL demands or silently assumes (trl 1.16)."""

from llmkit.config.schema import DpoConfig, TrainConfig

# Losses built on the difference of the two rewards, the only ones other divergences are defined for.
LOSSES_OF_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
LOSSES_WITH_SMOOTHING = ("robust", "exo_pair", "aot", "aot_unpaired")
LOSSES_THAT_SORT = ("aot", "aot_unpaired")


def dpo_problems(config: TrainConfig) -> list[str]:
    """What TRL would refuse after the model is loaded, or compute wrongly."""
    settings = config.dpo
    if not isinstance(settings, DpoConfig):
        return []
    problems = _loss_problems(settings)
    if config.data.packing != "none":
        problems.append(f"data.packing={config.data.packing}: recipe=dpo compares pairs, which are not packed; none.")
    if config.data.on_overlong == "split":
        problems.append(
            "data.on_overlong=split: a pair cannot be split; truncate_prompt shortens it, drop leaves it out."
        )
    if config.lora is not None and config.lora.bias != "none" and not settings.precompute_ref_log_probs:
        problems.append(
            f"lora.bias={config.lora.bias}: biases train in the model itself, so switching the adapter off does not "
            "give the reference back; lora.bias=none, or dpo.precompute_ref_log_probs=true."
        )
    return problems


def _loss_problems(settings: DpoConfig) -> list[str]:
    losses, weights, smoothing = settings.loss_type, settings.loss_weights, settings.label_smoothing
    if not losses:
        return ["dpo.loss_type is empty: name a loss, for example sigmoid."]
    if not isinstance(losses, list):
        return []  # its range says what is legal
    problems = []
    if weights is not None and len(weights) != len(losses):
        problems.append(
            f"dpo.loss_weights={weights}: {len(weights)} factors for {len(losses)} losses ({', '.join(losses)})."
        )
    if "exo_pair" in losses and smoothing == 0:
        problems.append("dpo.loss_type=exo_pair needs dpo.label_smoothing above 0; its paper recommends 1e-3.")
    if "robust" in losses and smoothing >= 0.5:
        problems.append(f"dpo.label_smoothing={smoothing:g}: with loss_type=robust it must be less than 0.5.")
    if settings.f_divergence_type != "reverse_kl" and (other := _not_in(losses, LOSSES_OF_DIFFERENCES)):
        problems.append(
            f"dpo.f_divergence_type={settings.f_divergence_type}: not defined for {other}; reverse_kl, or the losses "
            f"{', '.join(LOSSES_OF_DIFFERENCES)}."
        )
    if settings.use_weighting and (sorting := [loss for loss in losses if loss in LOSSES_THAT_SORT]):
        problems.append(f"dpo.use_weighting: {sorting[0]} sorts the pairs, which leaves no weight to a pair.")
    return problems


def _not_in(losses: list[str], known: tuple[str, ...]) -> str:
    return ", ".join(loss for loss in losses if loss not in known)


def dpo_warnings(config: TrainConfig) -> list[str]:
    """Settings of DPO, or beside it, that have no effect as they stand."""
    settings = config.dpo
    if not isinstance(settings, DpoConfig):
        return []
    losses: list[str] = settings.loss_type
    without = []
    if settings.label_smoothing and not set(losses) & set(LOSSES_WITH_SMOOTHING):
        without.append(("label_smoothing", f"loss_type={losses}; {', '.join(LOSSES_WITH_SMOOTHING)} use it"))
    if settings.discopop_tau != DpoConfig().discopop_tau and "discopop" not in losses:
        without.append(("discopop_tau", f"loss_type={losses}; discopop uses it"))
    if (
        settings.f_alpha_divergence_coef != DpoConfig().f_alpha_divergence_coef
        and settings.f_divergence_type != "alpha_divergence"
    ):
        without.append(("f_alpha_divergence_coef", f"f_divergence_type={settings.f_divergence_type}"))
    if settings.precompute_ref_batch_size and not settings.precompute_ref_log_probs:
        without.append(("precompute_ref_batch_size", "precompute_ref_log_probs=false"))
    found = [f"dpo.{key} has no effect with dpo.{why}." for key, why in without]
    if config.data.train_on != "assistant":
        found.append(f"data.train_on={config.data.train_on} has no effect with recipe=dpo: it compares whole answers.")
    if config.lora is not None and config.lora.lora_dropout and settings.disable_dropout:
        found.append(
            f"lora.lora_dropout={config.lora.lora_dropout:g} has no effect with dpo.disable_dropout=true, the default."
        )
    return found
