"""`regenerate`: make an image, and make it again as far as the policy allows. `generate` does so with a session."""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import anyio
import attrs

from nanobanana_async.calls import SubmitCall
from nanobanana_async.errors import LedgerError, NanoBananaError, NoImage, NotSent, SubmissionUnknown, TaskFailed
from nanobanana_async.images.delivered import RequestedImage, compare
from nanobanana_async.images.formats import read_info
from nanobanana_async.models import Task
from nanobanana_async.policies import RegenerateOn, RegeneratePolicy
from nanobanana_async.saved import MismatchKind, SavedImage
from nanobanana_async.session import Session

_log: Final = logging.getLogger("nanobanana_async")


@attrs.frozen
class Generated:
    """A task with an image."""

    task: Task
    files: tuple[SavedImage, ...] = ()
    """Its saved images; () if they are not saved here."""
    earlier: tuple[Task, ...] = ()
    """Final tasks of the other attempts."""


async def regenerate(
    policy: RegeneratePolicy,
    attempt: Callable[[int], Awaitable[Generated]],
    is_wrong: Callable[[Generated], Awaitable[bool]],
) -> Generated:
    """Return the first image that is as requested, else the last one.

    *attempt* is called with 1, 2 and so on, and makes one charged task. *is_wrong* says whether its image has the wrong
    size. An image of the wrong size is kept if no later
    attempt has one. An attempt that provably was not charged ends the series, whose last end is the outcome.

    Raises what the last attempt raises. `exc.earlier` contains the tasks of the others.
    """
    ended: list[Task] = []
    kept: Generated | None = None
    error: TaskFailed | NoImage | None = None
    for number in range(1, policy.attempts + 2):
        try:
            kept = await attempt(number)
            ended.append(kept.task)
            is_last = number > policy.attempts or RegenerateOn.WRONG_SIZE not in policy.on
            if is_last or not await is_wrong(kept):
                break
            reason = "has the wrong size"
        except (TaskFailed, NoImage) as exc:
            error = exc
            ended.append(exc.task)
            if number > policy.attempts or not policy.applies_to(exc.reason_kind):
                break
            reason = f"has no image ({exc.reason_kind})"
        except NanoBananaError as exc:
            exc.earlier = tuple(ended)
            if not ended or exc.task_id is not None or isinstance(exc, SubmissionUnknown):
                raise
            _log.warning("task %s is not followed by another one: %s", ended[-1].task_id, exc)
            break
        _log.warning("task %s %s: submitting again, %d of %d", ended[-1].task_id, reason, number, policy.attempts)
    if kept is not None:
        return attrs.evolve(kept, earlier=tuple(task for task in ended if task is not kept.task))
    assert error is not None  # noqa: S101 - an attempt ends in one or the other
    error.earlier = tuple(task for task in ended if task is not error.task)
    raise error


async def has_wrong_size(made: Generated) -> bool:
    """Return whether a saved image has not the requested size."""
    return any(one.kind is MismatchKind.SIZE for file in made.files for one in file.mismatch)


async def generate(session: Session, call: SubmitCall) -> Generated:
    """Submit, wait, and submit again as the policy of the client says. See `NanoBananaClient.generate`."""
    policy = session.options.regenerate
    if not policy.attempts:  # ten thousand calls may wait here, and each frame takes 300 bytes
        return Generated(await _generate_once(session, call))

    async def attempt(number: int) -> Generated:
        eta = session.queued(call).eta if number > 1 else None
        if eta is not None and call.deadline_s - anyio.current_time() < eta.median_s:
            raise NotSent("the time left is shorter than what half of the tasks take")
        mine = call if number == 1 else attrs.evolve(call, key=f"{call.key}.{number}")
        return Generated(await _generate_once(session, mine))

    async def is_wrong(made: Generated) -> bool:
        return call.request.image_size is not None and await _has_wrong_size(session, call, made.task)

    try:
        made = await regenerate(policy, attempt, is_wrong)
    except (TaskFailed, NoImage) as exc:  # after another error, an earlier task may be all there is
        await _acknowledge(session, exc.earlier)
        raise
    await _acknowledge(session, made.earlier)
    return made


async def _generate_once(session: Session, call: SubmitCall) -> Task:
    handle = await session.submit(call)
    try:
        return await handle.result(timeout_s=max(0.0, call.deadline_s - anyio.current_time()))
    except anyio.get_cancelled_exc_class() as exc:
        session.leave_task(handle, exc)
        raise
    except NanoBananaError as exc:
        exc.task_id = exc.task_id or handle.task_id  # every error carries the id of the charged task
        raise


async def _has_wrong_size(session: Session, call: SubmitCall, task: Task) -> bool:
    """Download the first image of *task* and compare its size. Return False if it cannot be had in time."""
    with anyio.CancelScope(deadline=call.deadline_s):
        try:
            info = read_info(await session.downloader.download(task.images[0]))
        except NanoBananaError:
            return False
        found = () if info is None else compare(RequestedImage.from_request(call.request), info)
        return any(one.kind is MismatchKind.SIZE for one in found)
    return False


async def _acknowledge(session: Session, tasks: tuple[Task, ...]) -> None:
    """Acknowledge *tasks*, which other ones have replaced."""
    for task in tasks if session.ledger is not None else ():
        try:
            await session.handle(task.task_id).ack()
        except LedgerError as exc:
            _log.warning("task %s cannot be acknowledged: %s", task.task_id, exc)
