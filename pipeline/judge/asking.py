"""Ask the judge about every item, many in parallel, and write each verdict to a file as soon as it arrives.

A file is named by a digest of the item and its prompt, so a restarted stage asks about exactly the missing items.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event

from pydantic import ValidationError

from capgap.pipeline.judge.endpoint import JudgeEndpoint
from capgap.pipeline.judge.items import Task
from capgap.pipeline.judge.prompts import rating_in, reminded, winner_in
from capgap.pipeline.models.endpoint import RefusedError
from capgap.pipeline.stage.progress import progress
from capgap.pipeline.store.files import write_atomically
from capgap.schemas.errors import InputError, MachineError
from capgap.schemas.judge_results import Ask, Verdict
from capgap.schemas.run_judge import JudgeSettings


def kept_verdicts(tasks: Sequence[Task], folder: Path) -> dict[str, Verdict]:
    """Return the verdicts that a folder holds on the given tasks, by the tasks' keys."""
    found = {}
    for task in tasks:
        try:
            found[task.key] = Verdict.model_validate_json(_path(folder, task).read_bytes())
        except (FileNotFoundError, ValidationError):
            continue
    return found


def ask_about(
    tasks: Sequence[Task],
    endpoint: JudgeEndpoint,
    settings: JudgeSettings,
    folder: Path,
    earlier: Collection[Verdict] = (),
) -> dict[str, Verdict]:
    """Ask the judge about all tasks, and return the verdicts by the tasks' keys. Each verdict is kept in the folder.

    Args:
        tasks: tasks to ask about.
        endpoint: the judge's endpoint.
        settings: settings of the judge.
        folder: folder for the verdicts.
        earlier: verdicts on other tasks that the same judge gave before.

    Raises:
        MachineError: the judge cannot be reached, is too slow or fails; verdicts so far are kept.
        SettingError: the endpoint rejects the key, or does not serve the model.
        InputError: the judge refuses every request, and refused all earlier ones.
    """
    found: dict[str, Verdict] = {}
    pool = ThreadPoolExecutor(settings.num_parallel, thread_name_prefix="judge")
    stop = Event()
    try:
        with progress("judge", len(tasks), "verdicts") as meter:
            waiting = {pool.submit(_ask_and_keep, task, endpoint, settings, folder, stop): task for task in tasks}
            for done in as_completed(waiting):
                if (verdict := done.result()) is not None:
                    found[waiting[done].key] = verdict
                    meter.advance()
        pool.shutdown()
    except Exception:
        # requests in progress may still finish, and their verdicts are kept
        pool.shutdown(cancel_futures=True)
        raise
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        endpoint.close()
        raise
    if found and all(_is_refused(verdict) for verdict in (*found.values(), *earlier)):
        raise InputError(
            "the judge refuses every request",
            where=settings.base_url,
            found=next(iter(found.values())).invalid,
            fix="change judge.model, judge.max_tokens or judge.temperature, as the judge's message says",
        )
    for task in tasks:
        _keep(folder, task, found[task.key])
    return found


def with_what_is_kept(error: MachineError, num_kept: int, num_all: int) -> MachineError:
    """Return the same error with the number of verdicts that are kept."""
    return MachineError(
        error.what,
        where=error.where,
        found=error.found,
        expected=error.expected,
        fix=f"{error.fix}; {num_kept} of {num_all} verdicts are kept",
    )


def _ask_and_keep(
    task: Task, endpoint: JudgeEndpoint, settings: JudgeSettings, folder: Path, stop: Event
) -> Verdict | None:
    """Ask about one task and keep the verdict; None if another request has failed in a way that ends the stage."""
    if stop.is_set():
        return None
    try:
        verdict = _ask(task, endpoint, settings.num_asks)
    except BaseException:
        stop.set()
        raise
    if not _is_refused(verdict):
        _keep(folder, task, verdict)
    return verdict


def _ask(task: Task, endpoint: JudgeEndpoint, num_asks: int) -> Verdict:
    asks: list[Ask] = []
    messages = task.messages
    for _ in range(num_asks):
        try:
            ask = endpoint.ask(messages)
        except RefusedError as error:
            asks.append(Ask(messages=messages, reply="", finish=None, answered_by=""))
            return Verdict(item=task.item, asks=tuple(asks), invalid=f"refused: {error}")
        asks.append(ask)
        is_cut = ask.finish == "length"
        if task.item.kind == "single" and (rating := rating_in(ask.reply, is_cut=is_cut)) is not None:
            return Verdict(item=task.item, asks=tuple(asks), rating=rating)
        if task.item.kind == "pairwise" and (winner := winner_in(ask.reply, is_cut=is_cut)) is not None:
            return Verdict(item=task.item, asks=tuple(asks), winner=winner)
        messages = reminded(task.item.kind, task.messages, ask.reply)
    said = "rating" if task.item.kind == "single" else "winner"
    return Verdict(item=task.item, asks=tuple(asks), invalid=f"no {said} could be read in {num_asks} replies")


def _is_refused(verdict: Verdict) -> bool:
    """Return whether the judge refused the first request about an item, so that there is no reply at all."""
    return len(verdict.asks) == 1 and verdict.invalid.startswith("refused: ")


def _keep(folder: Path, task: Task, verdict: Verdict) -> None:
    write_atomically(_path(folder, task), verdict.model_dump_json())


def _path(folder: Path, task: Task) -> Path:
    return folder / f"{task.key}.json"
