"""The data of one run: prepared while the user sees how far it is, and kept on record."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmkit import rundir
from llmkit.config import TrainConfig
from llmkit.data.audit_words import tell
from llmkit.data.prepare import PreparedData, prepare_data
from llmkit.data.progress import now_and_then
from llmkit.data.reading.sources import Source
from llmkit.data.template_date import DATE_VARIABLES
from llmkit.errors import Stopped
from llmkit.training.console import RunConsole
from llmkit.training.ranks import is_main
from llmkit.training.stopping import StopRequest

SAID_EVERY = 10.0  # seconds


def prepare_run_data(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: Path,
    console: RunConsole,
    stop: StopRequest,
    *,
    opened: list[Source],
    preference: bool = False,
) -> PreparedData:
    """Conversations, or pairs for DPO. The audit goes to data_audit.json, the commits of hub data into the config.

    Args:
        opened: the training sources.

    Raises:
        DataError: what keeps the data from being trained on.
        Stopped: a signal asked for it.
    """
    say = now_and_then(lambda line: console.fact("preparing", line), seconds=SAID_EVERY)

    def progress(name: str, rows: int) -> None:
        if stop.signal:
            raise Stopped(f"stopped by {stop.signal} while {name} was prepared; the same command begins again.")
        say(name, rows)

    assert config.data.max_length is not None, "complete_config() fills it in"
    data = prepare_data(
        config.data,
        tokenizer,
        max_length=config.data.max_length,
        context_length=config.model.context_length,
        preference=preference,
        opened=opened,
        progress=progress,
    )
    if is_main():
        rundir.write_json(run_dir / rundir.DATA_AUDIT, data.audit)
    for name in set(DATE_VARIABLES) & config.data.chat_template_kwargs.keys():
        date = config.data.chat_template_kwargs[name]
        console.fact("date", f"{date}, the same for the whole run and what is served (chat_template_kwargs.{name})")
    tell(data.audit, fact=console.fact, warn=console.warn)
    return data
