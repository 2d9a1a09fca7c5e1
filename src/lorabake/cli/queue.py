"""A queue of trainings, run one after the other, each in a process of its own.

  lorabake queue add mira/recipe.toml --set adapter.rank=32
  lorabake queue add noor --into runs/noor
  lorabake queue start
  lorabake queue list

What is queued is the recipe as it is now; later edits do not change it. A start runs until nothing is left; Ctrl-C lets the
running job end after its step, with a save, and the next start continues it there. So does a start after a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorabake.base.events import Event
    from lorabake.cli.terminal import TrainingProgress
    from lorabake.fleet.queue import Job, Queue

HELP = "queue trainings and run them one after the other"
_PREPARING = {
    "encoding": "encoding pictures",
    "encoding_text": "encoding captions",
    "finding_faces": "looking for faces",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``queue`` and of what it can be told to do."""
    from lorabake.base.places import QUEUE_VARIABLE
    from lorabake.cli.arguments import add_json, add_recipe, add_run

    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)

    def action(name: str, help: str, number: str = "") -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=help, description=help) if help else actions.add_parser(name)
        if number:
            made.add_argument("id", type=int, help=number)
        made.add_argument(
            "--queue",
            type=Path,
            metavar="FOLDER",
            help=f"the queue's folder (default: ${QUEUE_VARIABLE}, or among your own data)",
        )
        add_json(made)
        return made

    add = action("add", "check a recipe and put it at the end of the queue")
    add_recipe(add)
    add_run(add)
    action("list", "show all jobs and how far they are")
    action("start", "run everything that is to be done, here in the foreground")
    action("cancel", "end a running job after its step, with a save, or never begin one", "number of the job")
    action("retry", "put a job that failed or was cancelled back; it continues where it had saved", "number of the job")
    action("remove", "forget a job and its log; its run folder stays", "number of the job")
    action("log", "show what a job said", "number of the job")
    action("work", "", "number of the job")  # what a start runs as the job's process


def run(arguments: argparse.Namespace) -> int:
    """Do one of the actions."""
    from lorabake.base.places import queue_folder
    from lorabake.fleet.queue import Queue

    queue = Queue(arguments.queue or queue_folder())
    if arguments.action in ("add", "list", "start"):
        return {"add": _add, "list": _list, "start": _start}[arguments.action](queue, arguments)
    return _OF_ONE[arguments.action](queue, queue.job(arguments.id), arguments)


def _add(queue: Queue, arguments: argparse.Namespace) -> int:
    from lorabake.base.places import expanded, run_folder
    from lorabake.cli.arguments import raw_recipe
    from lorabake.recipe import check_values

    raw = raw_recipe(arguments)
    name = str(check_values(raw, subject=str(arguments.recipe)).recipe.output.name)
    into = expanded(arguments.into or run_folder(name))
    same = [
        job.id for job in queue.jobs() if job.into == into.absolute() and queue.state(job) not in ("done", "cancelled")
    ]
    job = queue.add(name, str(arguments.recipe.absolute()), into, raw, arguments.continue_changed)
    if same:
        print(f"note: job {same[0]} goes into {into} too; this one will find what it leaves there.", file=sys.stderr)
    return _answer(
        arguments,
        _shown(queue, job),
        f"Job {job.id}: {name}, into {job.into}. Run the queue with: lorabake queue start",
    )


def _list(queue: Queue, arguments: argparse.Namespace) -> int:
    from lorabake.cli.terminal import show_json

    jobs = [_shown(queue, job) for job in queue.jobs()]
    if arguments.json:
        show_json(jobs)
        return 0
    if not jobs:
        print(f"{queue.folder} is empty. Put a recipe into it with: lorabake queue add RECIPE")
    for job in jobs:
        steps = f"{job['step']} of {job.get('total_steps', '?')}" if "step" in job else ""
        loss = f"loss {job['loss']:.4f}" if "loss" in job else ""
        print(f"{job['id']:>4}  {job['state']:<12} {steps:>16}  {loss:<12} {job['name']}  {job['into']}".rstrip())
        if job["message"]:
            print("      " + job["message"].replace("\n", "\n      "))
    return 0


def _start(queue: Queue, arguments: argparse.Namespace) -> int:
    """0 if every job was done, 1 if one was not, 130 when stopped."""
    from lorabake.base.events import Events
    from lorabake.cli.terminal import TrainingProgress, interruptible, json_lines
    from lorabake.fleet.runner import run_queue

    with contextlib.ExitStack() as stack:
        if arguments.json:
            show: Callable[[Event], None] = json_lines
            stop = stack.enter_context(interruptible())
        else:
            progress = stack.enter_context(TrainingProgress())
            show = _Show(progress)
            say = "Stopping: the running job ends after its step, with a save. Ctrl-C again kills it."
            stop = stack.enter_context(interruptible(lambda: progress.say(say)))
        counts = run_queue(queue, Events(show), stop)
        stopped = stop()
    if not arguments.json:
        print(", ".join(f"{count} {state}" for state, count in counts.items()) or "Nothing was to be done.")
    return 130 if stopped else int(counts.keys() - {"done", "cancelled"} != set())


class _Show:
    """What a start shows: the running job as ``train`` would, and how each one ended."""

    def __init__(self, progress: TrainingProgress) -> None:
        self._progress = progress

    def __call__(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "job_started":
            how = "is still running" if event["found_running"] else "begins"
            self._progress.say(f"Job {event['job']}: {event['name']} {how}, into {event['into']}")
        elif kind == "job_ended":
            self._progress.say(f"Job {event['job']}: {event['state']}. {event['message']}".rstrip())
        elif kind == "said":
            self._progress.say(event["text"])
        else:
            self._progress(event)


def _cancel(queue: Queue, job: Job, arguments: argparse.Namespace) -> int:
    state = queue.cancel(job)
    how = {"running": "ends after its step, with a save", "stopping": "ends after its step, with a save"}.get(
        state, f"is {state}"
    )
    return _answer(arguments, _shown(queue, queue.job(job.id)), f"Job {job.id} {how}.")


def _retry(queue: Queue, job: Job, arguments: argparse.Namespace) -> int:
    queue.retry(job)
    return _answer(arguments, _shown(queue, queue.job(job.id)), f"Job {job.id} is waiting again.")


def _remove(queue: Queue, job: Job, arguments: argparse.Namespace) -> int:
    queue.remove(job)
    return _answer(arguments, {"id": job.id, "removed": True}, f"Job {job.id} is forgotten. {job.into} stays.")


def _log(queue: Queue, job: Job, arguments: argparse.Namespace) -> int:
    from lorabake.base.errors import UserError
    from lorabake.fleet.runner import event_of

    path = queue.log(job)
    if not path.exists():
        raise UserError(f"Job {job.id} has not said anything yet: it is {queue.state(job)}.")
    events = [event_of(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    if arguments.json:
        from lorabake.cli.terminal import show_json

        show_json(events)
        return 0
    for index, event in enumerate(events):
        following = events[index + 1]["kind"] if index + 1 < len(events) else ""
        if text := _told(event, last=following != event["kind"]):
            print(text)
    return 0


def _told(event: Event, last: bool) -> str:
    """An event in a line; of many steps on end only the last."""
    kind = event["kind"]
    if kind == "step":
        return f"step {event['step']}  epoch {event['epoch']}  loss {event['loss']:.4f}" if last else ""
    if kind in _PREPARING:
        return f"{_PREPARING[kind]}: {event['done']} of {event['total']}" if last else ""
    texts = {"said": "text", "note": "text", "checkpoint": "file", "dropped": "file", "latents_not_kept": "reason"}
    texts |= {"text_not_kept": "reason", "faces_not_kept": "reason"}
    if kind in texts:
        return {"checkpoint": "saved ", "note": "note: ", "dropped": "deleted "}.get(kind, "") + str(event[texts[kind]])
    facts = "  ".join(f"{name} {value}" for name, value in event.items() if name != "kind")
    return f"{kind.replace('_', ' ')}  {facts}".rstrip()


def _work(queue: Queue, job: Job, arguments: argparse.Namespace) -> int:
    """The job's own process. Whatever happens to it, its lock says whether it lives, and its file how it ended."""
    import traceback

    from lorabake.base.errors import Interrupted, LorabakeError
    from lorabake.base.lock import exclusive

    with exclusive(queue.job_lock(job), wait=True):
        begun = queue.begin(job)
        if begun is None:
            return 0
        try:
            finished = _train(queue, begun)
        except Interrupted:
            finished = False
        except LorabakeError as error:
            print(error, flush=True)
            queue.end(begun, "failed", str(error))
            return error.exit_code
        except Exception as error:
            traceback.print_exc()
            queue.end(begun, "failed", f"{type(error).__name__}: {error}. See: lorabake queue log {job.id}")
            return 1
        if finished:
            queue.end(begun, "done")
        elif queue.asked_to_stop(begun) == "cancel":
            queue.end(begun, "cancelled")
    return 0 if finished else 130


def _train(queue: Queue, job: Job) -> bool:
    from lorabake.api import train
    from lorabake.cli.terminal import interruptible, json_lines
    from lorabake.recipe import check_values

    checked = check_values(job.recipe, subject=job.source)
    with interruptible() as stop:
        outcome = train(
            checked,
            job.into,
            json_lines,
            continue_changed=job.continue_changed,
            stop=lambda: stop() or bool(queue.asked_to_stop(job)),
        )
    return outcome.finished


def _shown(queue: Queue, job: Job) -> dict[str, Any]:
    """A job for programs, without its recipe."""
    kept = {name: value for name, value in job.to_dict().items() if name not in ("recipe", "begun", "ended")}
    return {**kept, "state": queue.state(job), "process": queue.process_of(job), **queue.progress(job)}


def _answer(arguments: argparse.Namespace, value: Any, text: str) -> int:
    from lorabake.cli.terminal import show_json

    show_json(value) if arguments.json else print(text)
    return 0


_OF_ONE = {"cancel": _cancel, "retry": _retry, "remove": _remove, "log": _log, "work": _work}
