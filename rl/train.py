"""`python -m rl.train RECIPE.yaml [key.path=value ...]`: the whole run, and the loop that reads like the algorithm.

who        consumes                 waits for                        unblocked by             produces
Rollouts   prompts                  a place in the buffer            advance(), drop()        groups in the buffer
train()    a step's worth of        enough groups, with those whose  their last sample's      one optimizer step per
           groups                   staleness bound is reached       rewards                  mini-batch
publish()  the learner's weights    a moment between two decode      every engine's           engines on the next
                                    steps of every engine            checksums                version, verified
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from rl.advantage import group_advantages
from rl.buffer import GroupBuffer
from rl.canary import Canary
from rl.checkpoint import Saved
from rl.cluster import check_runs_last, settled
from rl.cold_start import ColdStart, encode_demonstrations
from rl.config import Recipe
from rl.data import RunData, load_data
from rl.demonstrations import fingerprint
from rl.doctor import Doctor
from rl.environ import conceal_environment
from rl.errors import LearnerFailed, RunStopped, UserError
from rl.evaluate import evaluate
from rl.fault_log import FaultLog
from rl.loop_state import Loop
from rl.plan_text import add_plan_arguments, show_plan
from rl.progress import Progress, Stage
from rl.recipe import load_recipe, to_yaml
from rl.rehearsal import rehearse
from rl.report import build_report
from rl.resume import bring_back, open_run
from rl.rollouts import Rollouts
from rl.run_directory import FINISHED, RunDirectory
from rl.saver import Saver
from rl.secrets import redact, redact_tracebacks
from rl.step_log import StepClock, StepLog
from rl.stop import Interrupted, Stop
from rl.system import System, check_model, check_plugins, join_cluster, open_conversation, prepare_model, start
from rl.utilization import Utilization
from rl.wandb_mirror import check_wandb, mirrored
from trainer.pack import pack

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


async def train(
    recipe: Recipe, data: RunData, system: System, log: StepLog, stop: Stop, saver: Saver, saved: Saved | None
) -> None:
    """GRPO: ``recipe.steps`` rollout batches, each trained on and published before the next one is taken.

    Goes on after the step that was ``saved``. Raises Interrupted between two steps when it is asked to stop, and
    RunStopped for an alarm that stops the run; both are saved first.
    """
    buffer = GroupBuffer(
        prompts_per_step=recipe.prompts_per_step, max_staleness=recipe.rollout.max_staleness, steps=recipe.steps
    )
    rollouts = Rollouts(recipe, system, data.stream, buffer)
    timeline = log.run.timeline
    shuffle = np.random.default_rng([recipe.seed, 1])
    canary = Canary(recipe, system, data.training)
    loop = Loop(prompts=data.stream, buffer=buffer, rollouts=rollouts, shuffle=shuffle, learner=system.learner)
    first = 1 if saved is None else saved.restore(loop, data.training)
    utilization = Utilization(system.plan)
    utilization.begin(await system.pool.stats())
    async with beside(rollouts.run()):
        for step in range(first, recipe.steps + 1):
            clock = StepClock()
            replies = await canary.generate(step)
            clock.lap("canary")
            with timeline.span("driver", "rollout", step=step):
                groups = await stop.unless(buffer.take(recipe.prompts_per_step))
            if groups is None:
                log.progress.say(f"interrupted; {await saver.stop(loop, system)}")
                raise Interrupted
            clock.lap("rollout")

            advantages = [
                recipe.domains[group.prompt.domain].advantage_scale
                * group_advantages(group.rewards, divide_by_std=recipe.objective.divide_by_std)
                for group in groups
            ]
            minibatches = pack(
                groups,
                advantages,
                kl_betas={name: domain.kl_beta for name, domain in recipe.domains.items()},
                ranks=recipe.learner.ranks,
                minibatches=recipe.learner.minibatches,
                micro_tokens=recipe.learner.micro_tokens,
                rng=shuffle,
                attention_span=system.learner.attention_span,
            )
            clock.lap("learn")
            await system.learners_turn()
            clock.lap("handover")
            checks = await canary.compare(replies, version=step - 1)
            clock.lap("canary")
            with timeline.span("learner", "step", step=step):
                result = await system.learner.step(minibatches)
            clock.lap("learn")

            sync = await system.publish(version=step)
            buffer.advance(step)
            clock.lap("sync")
            checks |= utilization.metrics(clock.seconds, minibatches, await system.pool.stats())

            evaluation = None
            if is_due(recipe.evaluation.every, step, recipe.steps) and data.evaluation:
                with timeline.span("driver", "evaluate", step=step):
                    evaluation = await evaluate(recipe, data.evaluation, system)
                clock.lap("evaluate")
                utilization.begin(await system.pool.stats())
            tally = rollouts.take_tally(groups)
            if is_due(recipe.checkpoint.every, step, recipe.steps):
                await saver.copy(step, loop, system, sync.checksums)
                clock.lap("checkpoint")
                utilization.begin(await system.pool.stats())
            checks |= system.faults.take() | saver.metrics()
            row = log.step(step, groups, advantages, tally, result, sync, clock, checks, evaluation)
            saver.write(step, row, sync.checksums)
            if (alarm := log.alarms.stopping) is not None:
                raise RunStopped(f"{alarm}; {await saver.stop(loop, system)}")
    await saver.settle()


async def run_recipe(
    recipe: Recipe, data: RunData, run: RunDirectory, progress: Progress, saved: Saved | None = None
) -> None:
    """The whole run, or what is left of it after ``saved``; a learner that fails costs the steps since it was saved."""
    stop, saver, faults = Stop(recipe.checkpoint.grace_s), Saver(recipe, run, progress), FaultLog(progress.warn)
    while True:
        try:
            await run_once(recipe, data, run, progress, stop, saver, faults, saved)
            return
        except LearnerFailed as failure:
            rows = run.rows()
            saved = await saver.restore(failure)
            faults.put_back(rows[len(run.rows()) :])
            await settled()


async def run_once(
    recipe: Recipe,
    data: RunData,
    run: RunDirectory,
    progress: Progress,
    stop: Stop,
    saver: Saver,
    faults: FaultLog,
    saved: Saved | None,
) -> None:
    """Cold start, evaluation, training, evaluation, and the model that comes out."""
    cold_start = recipe.supervised.steps > 0 and (saved is None or saved.cold_start)
    model_dir = saved.model_dir if saved else prepare_model(recipe, run.path)
    conversation = open_conversation(recipe, data.prompts, model_dir)
    demonstrations = encode_demonstrations(recipe, data, conversation) if cold_start else []
    data.stream.restart()
    join_cluster(recipe)
    stop.listen()
    timeline = run.timeline
    async with (
        start(recipe, model_dir, conversation, timeline, faults, cold_start=cold_start) as system,
        doctored(recipe, system, run),
    ):
        await system.episodes.check_window(data.prompts)
        if cold_start:
            progress.enter(Stage.COLD_START)
            await system.publisher.hold()
            await system.pool.sleep()
            stage = ColdStart(
                recipe=recipe,
                demonstrations=demonstrations,
                contents=fingerprint(data.demonstrations),
                system=system,
                run=run,
                progress=progress,
                stop=stop,
                saver=saver,
            )
            with timeline.span("learner", "cold start"), stop.orderly():
                model_dir, saved = await stage.train(model_dir, saved), None
        saver.follow(model_dir, saved)
        await bring_back(saved, system) if saved else await saver.start((await system.publish(version=0)).checksums)
        log = StepLog(recipe, conversation, run, progress)
        if data.evaluation and run.last_step < 0 and (saved is None or saved.step == 0):
            progress.enter(Stage.EVALUATING)
            with timeline.span("driver", "evaluate", step=0):
                before = await evaluate(recipe, data.evaluation, system)
            log.before(before)
        progress.enter(Stage.TRAINING)
        with stop.orderly():
            await train(recipe, data, system, log, stop, saver, saved)
        progress.enter(Stage.SAVING)
        await system.publisher.hold()
        await system.pool.sleep()
        with timeline.span("learner", "save"):
            await system.learner.save_model(run.model)
        conversation.tokenizer.save_pretrained(run.model)


@asynccontextmanager
async def doctored(recipe: Recipe, system: System, run: RunDirectory) -> AsyncIterator[None]:
    """The block, under the eyes of the hang doctor."""
    async with beside(Doctor(recipe.doctor, system, notes=run.path / "doctor.txt").watch()):
        yield


def is_due(every: int, step: int, last: int) -> bool:
    """Whether something happens after ``step``: every so many steps (0 never), and always after the last."""
    return step == last or (every > 0 and step % every == 0)


@asynccontextmanager
async def beside(background: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs ``background`` while the block runs; if it raises, so does the block, with the same exception."""
    try:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(background)
            yield
            task.cancel()
    except BaseExceptionGroup as group:
        raise first_error(group) from None


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The exception that tells most: what the user can mend before anything else."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.append(first_error(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((leaf for leaf in leaves if isinstance(leaf, UserError)), leaves[0])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 for what a user can mend, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m rl.train", description="Run a recipe.")
    parser.add_argument("recipe", help="a YAML file, for example recipes/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="settings that replace the recipe's"
    )
    parser.add_argument("--show", action="store_true", help="print the whole resolved recipe and stop")
    parser.add_argument("--check", action="store_true", help="read the data, try the rewards, start nothing and stop")
    add_plan_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    conceal_environment()
    redact_tracebacks()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if arguments.show:
            print(to_yaml(recipe), end="")
            return 0
        if arguments.plan:
            return show_plan(recipe, arguments)
        check_runs_last(recipe)
        check_model(recipe)
        check_plugins(recipe)
        check_wandb(recipe)
        data = load_data(recipe)
        return rehearse(recipe, data) if arguments.check else launch(recipe, data)
    except UserError as error:
        print(f"keel: {redact(str(error))}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError, Interrupted):
        print("keel: interrupted", file=sys.stderr)
        return 130


def launch(recipe: Recipe, data: RunData) -> int:
    """Runs a checked recipe in its own directory; the report is written however the run ends.

    A run that ends before its first step leaves nothing behind, so that its name is free for the next attempt.
    """
    resumption = open_run(recipe, data)
    run, saved = resumption.run, resumption.saved
    supervised = recipe.supervised.steps
    progress = Progress(recipe.name, steps=recipe.steps, supervised_steps=supervised, timeline=run.timeline)
    try:
        try:
            with mirrored(recipe, run, progress), run, progress:
                resumption.tell(progress)
                asyncio.run(run_recipe(recipe, data, run, progress, saved))
        finally:
            has_steps = run.metrics.exists() or run.supervised.exists()
            if has_steps:
                write_report(run, progress)
            if has_steps or run.status.status == FINISHED or resumption.is_old:
                progress.summary(run)
            else:
                run.discard()
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise RunStopped(f"{run.path} cannot be written: {error.strerror}") from error
    return 0


def write_report(run: RunDirectory, progress: Progress) -> None:
    """A report that cannot be made is worth a warning; it must not hide how the run itself ended."""
    try:
        build_report(run.path)
    except (UserError, OSError) as error:
        progress.warn(f"the report was not written: {error}")


if __name__ == "__main__":
    sys.exit(main())
