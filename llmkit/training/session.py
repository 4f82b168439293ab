"""One run from the first measurement to the delivered model, for any recipe that has a trainer and data."""

import contextlib
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from llmkit import rundir
from llmkit.config import TrainConfig
from llmkit.config.schema import FIGURES_OF_RECIPE
from llmkit.errors import Stopped
from llmkit.serving.probe import PROBED_ROWS, make_probe
from llmkit.training.arguments import total_steps
from llmkit.training.callbacks import AtBegin, BestWeights, Reporting, Samples
from llmkit.training.checkpoints.manifest import latest, rotate, step_of
from llmkit.training.console import RunConsole
from llmkit.training.delivery import base_model, model_card, save_final
from llmkit.training.engine import engine_in_use, is_sharded, whole_weights
from llmkit.training.estimate import in_words
from llmkit.training.facts import device_name
from llmkit.training.figures import Figure, questions
from llmkit.training.final_test import measure_test
from llmkit.training.generation import AnswerGenerator
from llmkit.training.metrics import MetricsFile, draw_losses, eval_loss_interval, last_tokens, mean_loss
from llmkit.training.pack.pack import compare_in_pack, join_pack, peak_of_process
from llmkit.training.ranks import any_rank, gathered, is_main, on_main
from llmkit.training.ready import Ready
from llmkit.training.rungs import Behind, RungFiles, Rungs, compares, rung_steps
from llmkit.training.saves import Saves
from llmkit.training.stopping import StopRequest
from llmkit.training.tracking import NoTracker, start_tracker
from llmkit.training.trainer import EvaluationStopped
from llmkit.training.versions import versions


class Session:
    """Measures, trains, measures again and delivers; as a context manager it closes files and trackers in any case.

    Args:
        figures: what the recipe measures beside the loss, given the session.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        trainer: Any,
        ready: Ready,
        console: RunConsole,
        stop: StopRequest,
        *,
        figures: "Callable[[Session], list[Figure]]",
    ):
        self.config, self.run_dir, self.trainer, self.data = config, run_dir, trainer, ready.data
        self.tokenizer, self.console, self.stop = ready.tokenizer, console, stop
        self.saves = Saves(config, run_dir, ready, console)
        goes_on = self.saves.origin is not None
        self.asked = figures(self)
        self.metrics = MetricsFile(run_dir, origin=self.saves.origin, written=is_main())
        earlier = [r for r in self.metrics.records if r["step"] == 0]
        names = ["eval_loss", *(figure.name for figure in self.asked)]
        self.base: dict[str, float] = {k: r[k] for r in earlier for k in names if k in r}
        self.figures: dict[str, float] = {}
        self.test: dict[str, Any] | None = None
        self.stopped = False  # before the last step
        self._saved = False  # the last step
        self.final_is = "last"
        self.tracker = NoTracker()
        if is_main():
            (run_dir / rundir.NON_FINITE_BATCH).unlink(missing_ok=True)
            self.tracker = start_tracker(config, run_dir, run_id=self.saves.earlier.get("tracker"))
        self.generator = AnswerGenerator(
            trainer.model,
            self.tokenizer,
            max_new_tokens=config.evaluation.max_new_tokens,
            autocast=ready.autocast,
            synced=is_sharded(trainer),
        )
        if self.data.validation is not None:
            origins = self.data.validation.origins
            trainer.rows_are_draws = len(np.unique(origins)) == len(origins)
        prompts = questions(self.data.validation or self.data.train, config.evaluation.samples)
        trainer.remove_callback(PrinterCallback)
        self.engine: str | None = self.saves.earlier.get("engine")  # of a run with no step left to train
        trainer.add_callback(Reporting(self.metrics, console, self.tracker))
        trainer.add_callback(Samples(self.generator, prompts, run_dir, console, self.tracker, goes_on=goes_on))
        self.best: BestWeights | None = None
        if config.training.final == "best" and self.data.validation:
            self.best = BestWeights(trainer.model, run_dir, goes_on=goes_on)
            trainer.add_callback(self.best)
        self.saves.begin(trainer, stop, self.metrics, self.tracker)
        self._at_begin = AtBegin(self._state_engine, lambda: join_pack(trainer))
        trainer.add_callback(self._at_begin)
        self.rungs: Rungs | None = None
        if config.early_stop.name == "halving" and on_main(lambda: compares(run_dir)):
            steps = rung_steps(config.early_stop, total_steps(config.training, len(self.data.train.dataset)))
            compare = compare_in_pack() or RungFiles(run_dir, config.early_stop)
            self.rungs = Rungs(run_dir, steps, compare, self.metrics.eval_loss_at, self._measure_at_rung)
            trainer.add_callback(self.rungs)
            if steps:
                at = ", ".join(map(str, steps))
                by = config.early_stop.metric
                console.fact("rungs", f"compared with the sweep's other runs by {by}, after {at} steps")
            else:
                console.warn(f"early_stop.min_steps={config.early_stop.min_steps:g} is no step before the last one")
        if self.tracker.where:
            console.fact("tracking", self.tracker.where)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.console.end()
        self.trainer.writer.settle("the run goes on from the one before")
        self.saves.end()
        self.metrics.close()
        plot = draw_losses(self.metrics.records, self.run_dir) if is_main() else None
        summary = {**self.figures, "train_loss": mean_loss(self.metrics.records)}
        self.tracker.finish(plots=[plot] if plot else [], summary=summary, failed=kind is not None)

    def measure_base(self) -> None:
        """The figures of the model as it starts, which those after training stand beside."""
        if self.saves.origin or not self.config.evaluation.baseline:
            return
        if is_sharded(self.trainer):  # there is no model to measure before the engine has it
            self._at_begin.do.append(self._measure_base)
        else:
            self._measure_base()

    def _measure_base(self) -> None:
        self.console.fact("before", "figures and answers of the model as it starts")
        try:
            self.base = self._measure()
        except EvaluationStopped as error:
            raise Stopped(f"stopped by {self.stop.signal} before the first step; the same command begins.") from error

    def _state_engine(self) -> None:
        self.engine = engine_in_use(self.trainer)
        processes = self.trainer.args.world_size
        assert processes == 1 or self.engine != "single", "each process would train for itself"
        if self.engine != "single":
            self.console.fact("engine", f"{self.engine}, {processes} process{'es' if processes > 1 else ''}")

    def train(self) -> None:
        """Train to the end, or to the step at which a stop was asked for; every checkpoint is then on the disk."""
        steps = total_steps(self.config.training, len(self.data.train.dataset))
        origin = self.saves.origin
        if origin is not None and self.saves.step >= steps:
            self._take_up_the_last_step(origin)
        else:
            with contextlib.suppress(Behind):
                self.trainer.train(resume_from_checkpoint=str(origin) if origin else None)
        self.console.end()
        state = self.trainer.state
        self.stopped = state.global_step < state.max_steps or self.trainer.evaluation_pending
        self.trainer.may_stop = self._last_step_is_saved

    def _take_up_the_last_step(self, checkpoint: Path) -> None:
        """Go on from a checkpoint behind which no step is left: Transformers would train one more (5.19)."""
        self.trainer._load_from_checkpoint(str(checkpoint))
        self.trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.trainer.state.max_steps = self.trainer.state.global_step  # fewer than once, where that is allowed
        if self.saves.earlier["evaluation_pending"]:
            try:
                self.trainer.evaluate()
            except EvaluationStopped:
                self.trainer.evaluation_pending = True
        # The process that saved it may have ended before this, and no save follows.
        rotate(self.run_dir, keep=self.config.checkpoint.keep)

    def _last_step_is_saved(self) -> bool:
        """As the process knows that saves; never on the others."""
        if not self._saved and is_main():
            saved = latest(self.run_dir)
            self._saved = saved is not None and step_of(saved) == self.trainer.state.global_step
        return self._saved

    def _stop_is_asked(self) -> bool:
        """Whether to end before what is left: only where the last step is saved, which the run then goes on from."""
        asked = self.stop.signal is not None
        self.stopped |= all(any_rank(asked, self._last_step_is_saved(), device=self.trainer.args.device))
        return self.stopped

    def measure_result(self) -> None:
        """The same figures for what will be delivered: the last weights or the best."""
        if self._stop_is_asked():
            return
        if self.best and (step := self.best.restore()):
            self.final_is = "best"
            self.console.fact("final", f"the weights of step {step}, the best evaluation")
        try:
            self.figures = self._measure()
        except EvaluationStopped:
            self.stopped = True
            return
        self._print_comparison()

    def measure_test(self) -> None:
        """The figures of what will be delivered on `data.test`, which nothing has looked at until now."""
        if self._stop_is_asked() or self.data.test is None:
            return
        examples = self.config.evaluation.examples
        self.test = measure_test(self.trainer, self.data.test, self.generator, examples=examples)
        self.console.fact("test", "; ".join(in_words(name, figure) for name, figure in self.test.items()))

    def deliver(self) -> dict[str, Any]:
        """Write `final/` and return the contents of result.json."""
        if self.stopped:
            self.trainer.writer.wait()
            if self.rungs is not None and self.rungs.verdict is not None:
                self.console.fact(
                    "stopped", f"{self.rungs.verdict.in_words()}, saved; with early_stop=none the same command goes on"
                )
                return self._result()
            by, step = self.stop.signal or "a signal to another rank", self.trainer.state.global_step
            self.console.fact("stopped", f"by {by} at step {step}, saved; llmkit resume {self.run_dir} goes on")
            return self._result()
        self.trainer.writer.settle("the run is finished without it")
        result = self._result()
        weights = whole_weights(self.trainer)
        probe = make_probe(
            self.trainer.model,
            self.tokenizer,
            questions(self.data.validation or self.data.train, PROBED_ROWS),
            precision=self.config.precision.name,
            arithmetic=self.generator.arithmetic(),
        )
        if is_main():
            shutil.rmtree(Path(self.trainer.args.output_dir), ignore_errors=True)
            figures = {"train_loss": result["train_loss"]} | self.figures
            card = model_card(self.config, figures, model=self.trainer.model)
            save_final(self.trainer.model, self.tokenizer, self.config, self.run_dir, card, weights=weights)
            probe.write(self.run_dir)
        if self.best:
            self.best.discard()
        self.console.fact("final", f"{self.run_dir / rundir.FINAL}")
        repeat = shlex.join(["llmkit", "train", str(self.run_dir / rundir.CONFIG)])
        self.console.fact("repeat", repeat)
        if self.config.lora is not None and not self.config.init_from:  # an adapter that is continued keeps its rank
            self.console.fact("sweep", f"{repeat} -m lora.r=4,8,16")
        self.console.fact("serve", shlex.join(["llmkit", "serve", f"run={self.run_dir}"]))
        return result

    def _measure(self) -> dict[str, float]:
        """The figures of the model as it is now. metrics.jsonl gets them unless it has moved back to its best step."""
        figures: dict[str, float] = {}
        state = self.trainer.state
        if self.best and self.final_is == "best":
            figures["eval_loss"] = self.best.best
        elif self.data.validation:
            logged = [r for r in self.metrics.records if r["step"] == state.global_step and "eval_loss" in r]
            figures["eval_loss"] = logged[-1]["eval_loss"] if logged else self.trainer.evaluate()["eval_loss"]
        shares = {figure.name: value for figure in self.asked if (value := figure.of(self)) is not None}
        if shares and self.final_is == "last":
            self._log(shares)
        return figures | shares

    def _measure_at_rung(self) -> dict[str, float]:
        """What early_stop compares runs by beside the loss, of the model as it is now; measured once."""
        figure = next((one for one in self.asked if one.name == self.config.early_stop.metric), None)
        if figure is None:
            return {}
        if not (share := self._logged_at_rung()) and (value := figure.of(self)) is not None:
            share = {figure.name: value}
            self._log(share)
        return share or {figure.name: 0.0}  # no row asks for an answer: the loss decides

    def _logged_at_rung(self) -> dict[str, float]:
        name, step = self.config.early_stop.metric, self.trainer.state.global_step
        logged = [record[name] for record in self.metrics.records if record["step"] == step and name in record]
        return {name: logged[-1]} if name and logged else {}

    def _log(self, figures: dict[str, float]) -> None:
        state = self.trainer.state
        self.tracker.log(self.metrics.append(figures, step=state.global_step, epoch=state.epoch) or {})

    def _print_comparison(self) -> None:
        def shown(name: str, value: float | None) -> str:
            if value is None:
                return "-"
            return f"{value:.4f}" if name == "eval_loss" else f"{value:.1%}"

        rows = [
            [label, *([shown(name, self.base.get(name))] if self.base else []), shown(name, self.figures[name])]
            for name, label in [("eval_loss", "loss, held out"), *((one.name, one.label) for one in self.asked)]
            if name in self.figures
        ]
        if rows:
            self.console.table(str(self.run_dir), ["", *(["before"] if self.base else []), "after"], rows)

    def _result(self) -> dict[str, Any]:
        config, state, seconds = self.config, self.trainer.state, self.saves.seconds
        records = self.metrics.records
        unlogged = self.trainer.since_last_log()  # of a run that was stopped between two log events
        rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
        train_loss = mean_loss([*records, unlogged] if unlogged else records)
        figures = {**self.figures, "train_loss": train_loss}
        devices = config.hardware.num_processes * config.hardware.num_nodes
        used = self.saves.device_seconds(seconds) * devices
        price = config.hardware.price_per_hour
        delivered = self.best.step if self.best and self.final_is == "best" else state.global_step
        verdict = self.rungs.verdict if self.rungs is not None else None
        if verdict is not None:
            figures["eval_loss"] = self.metrics.eval_loss_at(state.global_step)
            figures |= self._logged_at_rung()
        ended = "stopped" if verdict is not None else "preempted" if self.stopped else "completed"
        return {
            "status": ended,
            "error": verdict.in_words() if verdict is not None else None,
            "early_stop": asdict(verdict) if verdict is not None else None,
            "steps": state.global_step,
            "train_loss": train_loss,
            "eval_loss": figures.get("eval_loss"),
            "eval_loss_interval": eval_loss_interval(records, step=delivered) if "eval_loss" in figures else None,
            **{name: figures.get(name) for names in FIGURES_OF_RECIPE.values() for name in names},
            "test": self.test,
            "objective": figures.get(config.objective),
            "objective_name": config.objective,
            "base": self.base,
            "tokens": max(last_tokens(records), state.num_input_tokens_seen),
            "tokens_per_second": sorted(rates)[len(rates) // 2] if rates else None,
            "peak_memory_bytes": max(gathered(peak_of_process(self.trainer.args.device))),
            "seconds": round(seconds, 2),
            "device": (f"{devices} x " if devices > 1 else "") + device_name(self.trainer.args.device),
            "engine": self.engine,
            "device_seconds": round(used, 2),
            "cost": None if price is None else round(used / 3600 * price, 4),
            "base_model": base_model(config),
            "final_is": self.final_is,
            "final_step": None if self.stopped else delivered,
            "method": config.method.name,
            "model_dir": None if self.stopped else rundir.FINAL,
            "dataset_fingerprint": self.data.fingerprint,
            "versions": versions(),
        }
