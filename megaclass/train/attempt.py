"""One attempt at a run: resumes, trains, evaluates, saves and reports; everything around the steps of `loop.py`.

The order of things is the content of this file; each thing is done by a file of its own.
"""

from __future__ import annotations

import logging
import resource
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megaclass import checkpoint
from megaclass.config import Config, with_defaults
from megaclass.data.batch import Batch
from megaclass.errors import CheckpointError, UserError
from megaclass.evaluate.embed import score_on_main
from megaclass.evaluate.judge import lookup, table
from megaclass.evaluate.split import EvaluationSet, evaluate_backbone, evaluate_baselines, open_evaluation
from megaclass.observe.journal import Journal, next_attempt, read_lines, replayed_steps
from megaclass.observe.logging import log_to_run
from megaclass.observe.metrics import StepMeter
from megaclass.observe.progress import ProgressLine
from megaclass.observe.prometheus import Exporter
from megaclass.observe.report import write_report
from megaclass.observe.skipped import SkippedList
from megaclass.parallel.collectives import broadcast_from_main
from megaclass.parallel.process import World
from megaclass.plan import check_fits, number_of_classes
from megaclass.train import build, loop, state
from megaclass.train.account import SampleAccount, SampleCounts
from megaclass.train.failure import told_failure
from megaclass.train.guard import FiniteGuard, StopSignal, check_progress
from megaclass.train.outcome import PREEMPTED, agent_run
from megaclass.train.recorder import Recorder
from megaclass.train.watchdog import Watchdog, end_process

_log = logging.getLogger(__name__)


class Attempt:
    """The state of one attempt around its `Training`: what is written, shown and watched.

    Made on every rank alike, within the ownership of the run directory.
    """

    def __init__(self, config: Config, w: World) -> None:
        self.config = config
        self.world = w
        self.step: int | None = None
        self.started = time.monotonic()
        self.seconds = {"step": 0.0, "data_wait": 0.0, "checkpoint": 0.0, "evaluation": 0.0}
        self.directory = config.run.dir / "checkpoints"
        self._open: list[Any] = []
        self._enter(log_to_run(config.run.dir, w.rank))
        self.stop = self._enter(StopSignal(w))
        end = end_process(config.run.dir, w.rank)
        self.watchdog = self._enter(Watchdog(config.run.hang_seconds, end, lambda: told_failure(w)))

    def _enter(self, context: Any) -> Any:
        entered = context.__enter__()
        self._open.append(lambda: context.__exit__(None, None, None))
        return entered

    def close(self) -> None:
        """Release everything in the reverse order it was opened."""
        while self._open:
            self._open.pop()()

    def go(self) -> int:
        """Resume or start, train, evaluate, report; 0 when done, 75 when stopped by a signal and saved."""
        with self.watchdog.pause("start"):
            self._prepare()
        is_complete = loop.fit(
            self.training,
            loop.Hooks(self._should_stop, self._before_update, self._after_step, [self._record, self._between]),
        )
        self.progress.close()
        if not is_complete:
            self._save()
            self._write_summary("preempted", PREEMPTED, None, self._settle())
            _log.info("stopped by a signal at step %d and saved; the same command continues", self.training.step)
            return PREEMPTED
        final = self._finish()
        self._write_summary("completed", 0, final, self._settle())
        self._write_report()
        return 0

    def write_failure(self, error: UserError) -> None:
        """Note in `summary.json` that the run failed, with what is known; asks no other rank."""
        if not hasattr(self, "finite"):  # it never came to train
            return
        try:
            self._write_summary("failed", error.exit_code, None, self.account.settled)
        except OSError as problem:
            _log.warning("summary.json could not be written: %s", problem)

    def _write_report(self) -> None:
        if not self.world.is_main:
            return
        try:
            report = write_report(self.config.run.dir)
            _log.info("done: %d steps; see %s", self.training.step, report)
        except OSError as error:
            _log.warning("done: %d steps; but report.html could not be written: %s", self.training.step, error)

    def _prepare(self) -> None:
        """Build the parts, find out together where to continue, open what is written."""
        config, w = self.config, self.world
        build.check_batch(config, w.size)
        found: dict[str, Any] = score_on_main(w, "resume", self._find)
        self.attempt: int = found["attempt"]
        # Before anything is built: a start that dies while building counts as one without progress.
        facts = {"agent_run": agent_run(), "start_step": found["start_step"]}
        self.journal = Journal(config.run.dir, self.attempt, w, facts)
        self._open.append(self.journal.close)
        score_on_main(w, "plan", self._check_fits)
        self.evaluation = open_evaluation(config)
        self.training = build.build(config, w)
        self._open.append(self.training.reader.close)
        if self.training.classifier.host_rows is not None:
            self._open.append(self.training.classifier.host_rows.close)
        self.replayed = found["replayed_steps"] * config.train.global_batch_size
        self.extra: dict[str, Any] = {"best": None}
        if found["path"] is not None:
            self._resume(Path(found["path"]))
        self.step = self.training.step
        self.account = SampleAccount(
            w, self.training.reader.num_samples, config.dataset.bad_sample_budget, position=self.training.position,
            step=self.step, extra=self.extra,
        )  # fmt: skip
        self.skipped = SkippedList(config.run.dir, self.attempt, w.rank)
        self.saved_step = self.training.step if found["path"] is not None else -1
        self.saved_path = Path(found["path"] or "")
        self.finite = FiniteGuard(config.train.non_finite_limit)
        self.meter = StepMeter(self.training.num_steps - self.training.step)
        self.exporter = None
        if config.observe.metrics_port is not None:
            name = config.run.dir.name
            self.exporter = Exporter(
                config.observe.metrics_host, config.observe.metrics_port, w.rank, w.size, name, w.local_rank
            )
            self._open.append(self.exporter.close)
        if w.is_main:
            (config.run.dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            self._announce()
        self.recorder = Recorder(config.run, w, self.step, self.training.num_steps)
        self._open.append(self.recorder.close)
        self.progress = ProgressLine(self.training.num_steps, self.training.step, w.is_main)
        self._open.append(self.progress.close)

    def _check_fits(self) -> int:
        """On rank 0, before any rank allocates: refuse a run that needs more memory than there is."""
        return check_fits(self.config, number_of_classes(self.config), self.world.size, self.world.device).peak_bytes

    def _announce(self) -> None:
        training, shard = self.training, self.training.classifier.shard
        _log.info(
            "attempt %d: %d classes (%d rows here), %d samples, %d ranks on %s, preset %s, steps %d to %d",
            self.attempt, shard.num_classes, shard.num_rows, training.reader.num_samples, self.world.size,
            self.world.device, self.config.classifier.preset, training.step, training.num_steps,
        )  # fmt: skip
        if self.exporter is not None and self.exporter.port is not None:
            _log.info("metrics at http://%s:%d/metrics", self.config.observe.metrics_host, self.exporter.port)

    def _find(self) -> dict[str, Any]:
        """On rank 0: the attempt's number, the checkpoint to continue from, the newest step earlier attempts logged."""
        checkpoint.remove_leftovers(self.directory)
        path = checkpoint.find_latest(self.directory)
        step = 0 if path is None else checkpoint.step_of(path)
        attempts = read_lines(self.config.run.dir / "attempts.jsonl")
        check_progress(attempts, agent_run(), step)
        number = max(next_attempt(self.config.run.dir), checkpoint.latest_attempt(self.directory) + 1)
        return {
            "start_step": step,
            "attempt": number,
            "path": None if path is None else str(path),
            "replayed_steps": replayed_steps(attempts, read_lines(self.config.run.dir / "metrics.jsonl"), number, step),
        }

    def _resume(self, path: Path) -> None:
        snapshot = checkpoint.load(path, self.training.classifier.shard)
        different = checkpoint.compare_config(with_defaults(snapshot.config), self.config.model_dump(mode="json"))
        if different:
            raise CheckpointError(
                f"run directory {self.config.run.dir} was trained with another configuration: {'; '.join(different)}; "
                "give the old values, or another run.dir"
            )
        state.restore(self.training, snapshot)
        self.extra.update(snapshot.extra)
        _log.info("continuing from %s at step %d", path.name, snapshot.step)

    def _should_stop(self, step: int) -> bool:
        self.watchdog.beat("step", step)
        return self.stop.agreed(step)

    def _before_update(self, batches: list[Batch]) -> None:
        if self.config.run.log_sample_ids:
            step, position = self.training.step + 1, batches[-1].position
            epoch = (position - 1) // self.training.reader.num_samples
            ids = [int(sample) for batch in batches for sample in batch.ids]
            self.journal.write_samples(step=step, epoch=epoch, position=position, ids=ids)

    def _after_step(self, result: loop.StepResult) -> None:
        training, size = self.training, self.config.train.global_batch_size
        self.step = step = training.step
        self.seconds["step"] += result.step_seconds
        self.seconds["data_wait"] += result.data_wait_seconds
        output = result.output
        self.meter.add(
            loss=output.loss, intra=output.intra, inter=output.inter, positive_cosine=output.positive_cosine,
            samples=size, data_wait_seconds=result.data_wait_seconds, step_seconds=result.step_seconds,
            head_cpu_seconds=result.head_cpu_seconds, grad_norm=result.grad_norm, monitors=output.monitors,
        )  # fmt: skip
        skipped = [sample for batch in result.batches for sample in batch.skipped]
        self.account.count(result.batches, self.skipped.add(step, skipped))
        for sample in skipped:
            _log.warning("sample %d skipped (%s): %s", sample.sample_id, sample.reason, sample.detail)
            if self.exporter is not None:
                self.exporter.count_skipped_sample(sample.reason)
        if self.exporter is not None:
            self.exporter.observe_step(
                samples=size // self.world.size, step_seconds=result.step_seconds,
                data_wait_seconds=result.data_wait_seconds,
            )  # fmt: skip
            if not result.is_taken:
                self.exporter.count_skipped_step()
        if not result.is_taken:
            scaler = training.scaler
            scale = "" if scaler is None else f"; the scale of the loss is now {scaler.scale:g}"
            _log.warning(
                "step %d: the gradient norm is %s; the step is skipped on all ranks%s", step, result.grad_norm, scale
            )
        self.finite.record(step, result.is_taken)
        self.progress.advance(step)
        if step % self.config.run.log_every == 0 or step == training.num_steps:
            self._log_step(result)

    def _log_step(self, result: loop.StepResult) -> None:
        training, rates = self.training, result.learning_rates
        snapshot = self.meter.snapshot()
        self.progress.update(training.step, snapshot, rates["backbone"])
        self.journal.write_metrics(
            snapshot, step=training.step, epoch=training.epoch, position=training.position, lr=rates["backbone"],
            class_lr=rates["classes"],
        )  # fmt: skip
        if self.exporter is not None:
            self.exporter.observe_snapshot(training.step, snapshot, rates)
            if self.world.device.type == "cuda":
                self.exporter.observe_gpu_memory(torch.cuda.max_memory_allocated())

    def _record(self) -> None:
        """After a step: the timeline of the steps that `run.profile` asks for."""
        with self.watchdog.pause("profile") if self.recorder.is_due(self.training.step) else nullcontext():
            self.recorder.record(self.training.step)

    def _between(self) -> None:
        """After a step: close the books of an epoch, evaluate and save where they are due."""
        step, config = self.training.step, self.config
        if self.account.is_end_of_epoch(self.training.position, config.train.global_batch_size):
            self._settle(is_end_of_epoch=True)
        if step == self.training.num_steps:
            return
        is_best = False
        if self.evaluation is not None and config.evaluate.every and step % config.evaluate.every == 0:
            is_best = self._is_best(self._evaluate(self.evaluation))
        if is_best or step % config.train.checkpoint_every == 0:
            self._save(is_best)

    def _evaluate(self, evaluation: EvaluationSet) -> dict[str, Any]:
        """Judge the backbone (its moving average where there is one) over all ranks."""
        start = time.monotonic()
        step, average = self.training.step, self.training.average
        applied = nullcontext() if average is None else average.applied()
        # The average first: what is made whole is then the averaged backbone.
        with self.watchdog.pause("evaluation"), applied, self.training.strategy.whole() as backbone:
            if self.config.backbone.batch_norm == "local":
                # Running statistics differ between ranks; the ones judged are those that are saved, rank 0's.
                for buffer in backbone.buffers():
                    broadcast_from_main(buffer, self.world.group)
            outcome = evaluate_backbone(evaluation, backbone, self.world, f"evaluate/{step}")
        self.journal.write_evaluation(step, outcome)
        self.seconds["evaluation"] += time.monotonic() - start
        return outcome

    def _is_best(self, outcome: dict[str, Any]) -> bool:
        metric = self.config.evaluate.best_metric
        value, best = lookup(outcome, metric), self.extra["best"]
        if self.world.is_main:
            _log.info("step %d: %s %.4f", self.training.step, metric, value)
        if best is not None and best["metric"] == metric and value <= best["value"]:
            return False
        self.extra["best"] = {"metric": metric, "value": value, "step": self.training.step}
        return True

    def _save(self, is_best: bool = False) -> None:
        if self.saved_step == self.training.step:
            return
        start = time.monotonic()
        with self.watchdog.pause("checkpoint"):
            counts = self._settle()
            extra = {**self.extra, "skipped": counts.skipped, "samples": counts.to_state()}
            snapshot = state.take(self.training, self.attempt, extra)
            keep = self.config.train.keep_checkpoints
            self.saved_path = checkpoint.save(
                self.directory, snapshot, self.training.classifier.shard, self.world, keep=keep, best=is_best
            )
        self.saved_step = self.training.step
        seconds = time.monotonic() - start
        self.seconds["checkpoint"] += seconds
        if self.exporter is not None:
            self.exporter.observe_checkpoint(seconds)

    def _finish(self) -> dict[str, Any] | None:
        """The last checkpoint, then the last evaluation, with the baselines where they are wanted.

        In this order, so that nothing that happens while judging can cost the trained network.
        """
        self._save()
        if self.evaluation is None:
            return None
        outcome = self._evaluate(self.evaluation)
        metric = self.config.evaluate.best_metric.split(".")[0].replace("_", "-")
        if metric in self.config.evaluate.protocols and self._is_best(outcome) and self.world.is_main:
            checkpoint.mark_best(self.directory, self.saved_path)
        results = {"trained": outcome}
        if self.config.evaluate.baselines:
            with self.watchdog.pause("baselines"):
                made = evaluate_baselines(
                    self.evaluation, lambda: build.build_backbone(self.config, self.world), self.world, "baselines"
                )
            results |= made
        if self.world.is_main:
            Console().print(table(results))
        return results

    def _settle(self, is_end_of_epoch: bool = False) -> SampleCounts:
        """The checked counts of samples over all ranks and attempts; a collective, called by all ranks."""
        return self.account.settle(self.training.step, self.training.position, is_end_of_epoch)

    def _write_summary(self, status: str, code: int, evaluation: dict[str, Any] | None, counts: SampleCounts) -> None:
        if not self.world.is_main:
            return
        training = self.training
        self.journal.write_summary(
            {
                "status": status,
                "exit_code": code,
                "step": training.step,
                "epoch": training.epoch,
                "world_size": self.world.size,
                "attempts": self.attempt,
                "samples": counts.to_summary() | {"replayed": self.replayed},
                "goodput": self._goodput(),
                # Linux counts in KiB.
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "peak_gpu_bytes": torch.cuda.max_memory_allocated() if self.world.device.type == "cuda" else 0,
                "best": self.extra["best"],
                "evaluation": evaluation,
            }
        )

    def _goodput(self) -> dict[str, float]:
        """How this attempt's wall time divides, and the share of it in which steps were computed."""
        wall = time.monotonic() - self.started
        parts = {**self.seconds, "compute": self.seconds["step"] - self.seconds["data_wait"]}
        parts["other"] = wall - sum(seconds for name, seconds in self.seconds.items() if name != "data_wait")
        del parts["step"]
        return {
            "share": parts["compute"] / wall,
            "wall_seconds": wall,
            **{f"{name}_seconds": parts[name] for name in sorted(parts)},
        }
