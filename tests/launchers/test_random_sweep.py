"""`sweeper=random`: what is drawn, that it is drawn again alike, and what is said of what cannot be drawn."""

import math

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from llmkit.config.arguments import parse_arguments
from llmkit.errors import ConfigError
from llmkit.launchers.random_sweep import draw_jobs

RATE = "training.learning_rate=tag(log,interval(1e-5,1e-3))"


def drawn(n: int, *words: str, seed: int = 0) -> list[tuple[str, ...]]:
    """The values of `n` jobs, in the order of the keys."""
    jobs = draw_jobs(OverridesParser.create().parse_overrides(list(words)), n=n, seed=seed)
    return [tuple(word.partition("=")[2] for word in job) for job in jobs]


def rates(n: int, word: str) -> list[float]:
    return [float(rate) for (rate,) in drawn(n, word)]


def test_every_job_has_values_from_what_was_given_and_no_two_are_alike(compose):
    words = (RATE, "lora.r=choice(4,8,16)", "training.warmup_steps=range(0,100,10)", "seed=1,2", "training.max_steps=9")

    configs = compose("sweeper=random", "sweeper.n=12", *words)

    assert {config.training.max_steps for config in configs} == {9}
    values = [(c.training.learning_rate, c.lora.r, c.training.warmup_steps, c.seed) for c in configs]
    assert len(set(values)) == 12
    assert all(1e-5 <= rate <= 1e-3 for rate, *_ in values)
    assert {r for _, r, *_ in values} == {4, 8, 16}
    assert {warmup for *_, warmup, _ in values} <= set(range(0, 100, 10))
    assert {seed for *_, seed in values} == {1, 2}


def test_more_jobs_keep_those_that_were_drawn_and_another_key_changes_no_values():
    twenty, thirty = (drawn(n, RATE, "lora.r=choice(4,8,16)") for n in (20, 30))
    beside = drawn(20, RATE, "lora.r=choice(4,8,16)", "seed=range(0,1000)")

    assert thirty[:20] == twenty
    assert len(set(thirty)) == 30
    assert [job[:2] for job in beside] == twenty


def test_the_seed_decides_what_is_drawn():
    first, again, other = (drawn(5, RATE, seed=seed) for seed in (0, 0, 1))

    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize(
    ("word", "measure"), [(RATE, math.log), ("training.learning_rate=interval(1e-5,1e-3)", float)], ids=["log", "plain"]
)
def test_a_logarithmic_interval_is_drawn_from_evenly_by_its_logarithm_and_a_plain_one_by_its_value(word, measure):
    low, high = measure(1e-5), measure(1e-3)

    parts = [(measure(rate) - low) / (high - low) for rate in rates(400, word)]

    assert [sum(i / 4 <= part < (i + 1) / 4 for part in parts) / 400 for i in range(4)] == pytest.approx(
        [0.25] * 4, abs=0.07
    )


def test_numbers_are_short_enough_to_be_typed_and_stay_within_their_bounds():
    drawn_rates = rates(6, "training.learning_rate=interval(0.00012345,0.00012999)")

    assert all(rate in (0.00012345, 0.00012999) or float(f"{rate:.3g}") == rate for rate in drawn_rates)
    assert all(0.00012345 <= rate <= 0.00012999 for rate in drawn_rates)


@pytest.mark.parametrize(
    "word", ["interval(2,5)", "int(interval(2,5))", "tag(int,interval(2,5))", "tag(int,log,interval(2,5))"]
)
def test_a_key_of_whole_numbers_is_given_whole_numbers_both_bounds_included(word):
    assert sorted(drawn(4, f"lora.r={word}")) == [("2",), ("3",), ("4",), ("5",)]


def test_a_combination_that_was_drawn_is_not_drawn_again_until_all_are_there():
    jobs = drawn(6, "lora.r=choice(4,8,16)", "seed=1,2")

    assert set(jobs) == {(r, seed) for r in ("4", "8", "16") for seed in ("1", "2")}


def test_the_order_of_shuffled_values_does_not_matter():
    assert drawn(3, "lora.r=shuffle(4,8,16,32)") == drawn(3, "lora.r=shuffle(4,8,16,32)")


def test_groups_and_globs_are_drawn_from_too(compose):
    configs = compose(
        "sweeper=random", "sweeper.n=2", "training.max_steps=5", "method=glob(lor*)", "precision=fp32,bf16"
    )

    assert {config.precision.name for config in configs} == {"fp32", "bf16"}
    assert {config.method.name for config in configs} == {"lora"}


@pytest.mark.parametrize(
    "words", [("sweeper=random",), ("hydra/sweeper=random",), ("-m", "sweeper=random")], ids=" ".join
)
def test_to_name_a_sweeper_is_to_ask_for_a_sweep(words):
    arguments = parse_arguments([*words, "sweeper.n=2", RATE])

    assert arguments.multirun
    assert "sweeper=random" in arguments.overrides


def test_its_config_can_be_looked_at(run_llmkit):
    done = run_llmkit("train", "sweeper=random", "sweeper.n=7", "--cfg", "job")

    assert done.returncode == 0, done.stderr
    assert "sweeper:\n  name: random\n  'n': 7\n  seed: 0" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((RATE,), ["sweeper=random: say how many runs to draw, sweeper.n=20."]),
        (("sweeper.n=0", RATE), ["sweeper.n=0: must be at least 1."]),
        (("sweeper.n=3",), ["no key has values to draw from", "lora.r=choice(4,8,16)"]),
        (("sweeper.n=9", "lora.r=2,4", "seed=1,2"), ["there are only 4 combinations", "sweeper.n=4", "sweeper=grid"]),
        (("sweeper.n=5", "lora.r=interval(2,5)"), ["there are only 4 combinations"]),
        (("sweeper.n=5", "lora.lora_dropout=tag(log,interval(0,0.5))"), ["begins above 0, not at 0"]),
        (("sweeper.n=5", "training.learning_rate=interval(1e-3,1e-5)"), ["from the smaller to the greater"]),
        (
            ("sweeper.n=5", "training.learning_rate=tag(lag,interval(1e-5,1e-3))"),
            ["unknown tag lag; tags are log and int"],
        ),
        (("sweeper.n=5", "lora.r=tag(log,choice(4,8,16,32,64))"), ["tags are for interval(FROM,TO); leave log out"]),
        (("sweeper.n=5", "lora.r=interval(2.5,5)"), ["whole"]),
        (("sweeper.n=5", "lora.r=interval(0,5)"), ["lora.r=0: must be at least 1"]),
        (("sweeper.n=5", "lora.r=range(4,2)"), ["there is no value in it"]),
        (
            ("sweeper.n=2000", "training.learning_rate=interval(1e-5,1.1e-5)"),
            ["nothing new is drawn", "wider intervals"],
        ),
        (("sweeper.nn=5", RATE), ["sweeper.nn", "Did you mean"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_drawn_is_explained(compose, words, said):
    with pytest.raises(ConfigError) as error:
        compose("sweeper=random", *words)

    assert all(one in str(error.value) for one in said), error.value


def test_all_problems_are_told_at_once(compose):
    with pytest.raises(ConfigError) as error:
        compose("sweeper=random", "lora.lora_dropout=tag(log,interval(0,0.5))", "lora.r=range(4,2)")

    assert len(error.value.problems) == 3


@pytest.mark.parametrize("words", [("-m",), ("-m", "sweeper=grid")], ids=" ".join)
def test_an_interval_has_no_grid(compose, words):
    with pytest.raises(ConfigError, match=r"no end of values; draw from it with sweeper=random sweeper.n=20, or list"):
        compose(*words, RATE)


def test_an_interval_without_a_sweep_names_the_sweeper(compose):
    with pytest.raises(ConfigError, match=r"several values are a sweep; add sweeper=random sweeper.n=20\."):
        compose(RATE)


def test_without_a_sweeper_the_values_make_a_grid(compose):
    assert len(compose("-m", "lora.r=2,4", "seed=1,2")) == 4
