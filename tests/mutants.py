"""Plant one bug at a time in a copy of the package, and check that the tests find it.

python -m tests.mutants

Prints a line per bug. Returns 1 if a bug is not found, or if the code that it changes no longer exists.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import attrs

ROOT: Final = Path(__file__).parent.parent
AT_ONCE: Final = 2
OPTIONS: Final = ("-q", "-x", "-n0", "-p", "no:cacheprovider", "-m", "slow or not slow")


@attrs.frozen
class Mutant:
    """One planted bug, and the tests that find it."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS: Final = (
    Mutant(
        "M1: a price is learned from a failed task",
        "ledger/budget.py",
        "            if is_success:\n                self.learn_price(reservation",
        "            if True:\n                self.learn_price(reservation",
        "test_budget.py",
    ),
    Mutant(
        "M1: a price is learned from a charge of zero",
        "ledger/budget.py",
        "        if consumed > 0:\n            self._prices",
        "        if True:\n            self._prices",
        "test_budget.py",
    ),
    Mutant(
        "M2: a price is borrowed from another size",
        "ledger/budget.py",
        "        return self._prices.get(priced_as, self._max_price)\n",
        "        return self._prices.get(priced_as, max(self._prices.values(), default=self._max_price))\n",
        "test_money_properties.py",
    ),
    Mutant(
        "M3: a charge that is not stated counts as nothing",
        "ledger/budget.py",
        "        self._decide(consumed, is_held=consumed is None, is_success=is_success)\n",
        "        self._decide(consumed, is_held=False, is_success=is_success)\n",
        "test_money_properties.py",
    ),
    Mutant(
        "M4: a 408 is called not charged, and sent again",
        "wire/classify.py",
        'Rule("not processed", Verdict.UNKNOWN, RetryRule.ONCE,',
        'Rule("not processed", Verdict.NOT_CHARGED, RetryRule.SAFE,',
        "test_money_properties.py",
    ),
    Mutant(
        "M6: the attempts before the last one are not counted",
        "ledger/schema.py",
        '    about["may_be_charged"] = end.verdict is Verdict.UNKNOWN\n',
        '    about["may_be_charged"] = False\n',
        "test_money_properties.py",
    ),
    Mutant(
        "M6: a service's own 500 is called rejected",
        "wire/classify.py",
        'Rule("service\'s own 5xx", Verdict.UNKNOWN,',
        'Rule("service\'s own 5xx", Verdict.REJECTED,',
        "test_money_properties.py",
    ),
    Mutant(
        "M7: the lock is not held",
        "ledger/lock.py",
        "            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "test_ledger_identity.py",
    ),
    Mutant(
        "M8: the lock file's knowledge is ignored",
        "ledger/restored.py",
        '        if self._found.commits > int(meta["commits"]):\n',
        "        if False:\n",
        "test_ledger_identity.py",
    ),
    Mutant(
        "M11: a failed commit is tried again",
        "ledger/sqlite.py",
        "                if isinstance(exc, sqlite3.Error) and not isinstance(exc, _OWN_ERRORS):\n",
        "                if False:\n",
        "test_ledger.py::test_after_a_failed_write_every_write_fails",
    ),
    Mutant(
        "a submit is resubmitted after a lost response",
        "wire/classify.py",
        'Rule("response lost or cut", Verdict.UNKNOWN, RetryRule.ALWAYS',
        'Rule("response lost or cut", Verdict.UNKNOWN, RetryRule.SAFE',
        "test_api.py",
    ),
    Mutant(
        "a gateway's 502 is taken for the service's own error",
        "wire/classify.py",
        'Rule("gateway", Verdict.UNKNOWN, RetryRule.ANY_5XX',
        'Rule("gateway", Verdict.UNKNOWN, RetryRule.API_5XX',
        "test_api.py",
    ),
    Mutant(
        "every failure counts as never sent",
        "transport/httpx.py",
        "    if sent:\n        return state.to_error(reason)\n",
        "",
        "test_transports.py",
    ),
    Mutant(
        "cancelling the caller interrupts the POST",
        "_concurrency/background.py",
        "        self._start_soon(lambda: self._run_shielded(work, result, on_abandoned))\n        try:\n",
        "        try:\n            await self._run_shielded(work, result, on_abandoned)\n",
        "test_api.py",
    ),
    Mutant(
        "an id that arrives as its caller is cancelled is lost",
        "_concurrency/background.py",
        "        if result.abandoned and result.error is None:\n",
        "        if False:\n",
        "test_api.py",
    ),
    Mutant(
        "a redirect of a POST is followed",
        "transport/_connections.py",
        "follow_redirects=False",
        "follow_redirects=True",
        "test_transports.py",
    ),
    Mutant(
        "a 404 within the grace ends the wait",
        "tracking/tracker.py",
        "        if tracked.submit.is_estimate and tracked.snapshot is None:\n",
        "        if True:\n",
        "test_tracker.py::test_a_new_task_may_be_invisible_for_a_while",
    ),
    Mutant(
        "a failed poll ends the wait",
        "tracking/tracker.py",
        "            if isinstance(exc, InvalidRequest) and exc.status in (400, 422) and exc.code is not None:\n",
        "            if True:\n",
        "test_tracker.py::test_a_transient_error_does_not_end_the_wait",
    ),
    Mutant(
        "each callback triggers a poll",
        "tracking/state.py",
        "        self.confirm_at_s = max(now_s, self.confirm_at_s + CONFIRM_INTERVAL_S)\n",
        "        self.confirm_at_s = now_s\n",
        "test_tracker_callbacks_and_outages.py",
    ),
    Mutant(
        "only the first waiter is woken",
        "tracking/state.py",
        "        for waiter in self.waiters:\n",
        "        for waiter in self.waiters[:1]:\n",
        "test_tracker.py",
    ),
    Mutant(
        "the last waiter that leaves keeps the task tracked",
        "tracking/tracker.py",
        "        if not tracked.waiters and self._tasks.get(tracked.task_id) is tracked:\n",
        "        if False:\n",
        "test_tracker.py::test_the_last_waiter_that_leaves_ends_the_polling",
    ),
    Mutant(
        "a task is dropped when a poll fails",
        "tracking/tracker.py",
        "        self._schedule_poll(tracked, failures=max(self._consecutive_errors, errors))\n",
        "        pass\n",
        "test_tracker.py::test_a_transient_error_does_not_end_the_wait",
    ),
    Mutant(
        "a response in flight counts as newer than the callback",
        "tracking/tracker.py",
        "        if tracked.confirm_at_s > tracked.history.sent_s:\n",
        "        if False:\n",
        "test_tracker_callbacks_and_outages.py",
    ),
    Mutant(
        "pressure changes nothing",
        "tracking/tracker.py",
        "        if (pressure := self._pressure()) > 1:\n",
        "        if (pressure := self._pressure()) > 1e9:\n",
        "test_tracker_callbacks_and_outages.py",
    ),
    Mutant(
        "deadlines have no timer",
        "tracking/tracker.py",
        "                group.start_soon(self._deadlines.run)\n",
        "",
        "test_tracker_callbacks_and_outages.py",
    ),
    Mutant(
        "unfinished tasks teach nothing",
        "tracking/latency.py",
        "                self._at_risk_s[k] += self._observation_weight * (end_s - start_s)\n\n",
        "                pass\n\n",
        "test_latency.py",
    ),
    Mutant(
        "each 429 of a series cuts the rate again",
        "api/rate_limit.py",
        "        self._cut_at_s = now_s\n",
        "",
        "test_throttling.py",
    ),
    Mutant(
        "nothing is salvaged from a truncated body",
        "wire/task_ids.py",
        "    found = {first or second for first, second in _SALVAGED.findall(text)}\n",
        "    return None\n",
        "test_codec.py",
    ),
    Mutant(
        "bytes received before a failure are dropped",
        "transport/_exchange.py",
        "        if self.head is not None:\n",
        "        if False:\n",
        "test_transports.py",
    ),
    Mutant(
        "the key is in an error",
        "transport/httpx.py",
        '    detail = "" if quotes else str(causes[-1]) or str(exc)\n',
        "    detail = str(causes[-1]) or str(exc)\n",
        "test_transports.py::test_an_error_contains_nothing_of_the_request",
    ),
    Mutant(
        "the key is shown by a traceback with local variables",
        "wire/endpoint.py",
        "    value: str = attrs.field(repr=False)\n",
        "    value: str\n",
        "test_secrecy.py",
    ),
    Mutant(
        "a submit uses a reused connection",
        "transport/httpx.py",
        "        idle = [] if request.kind is RequestKind.SUBMIT else self._idle_connections[_pool_key(request)]\n",
        "        idle = self._idle_connections[_pool_key(request)]\n",
        "test_transports.py::test_reads_reuse_a_connection_and_submits_never_do",
    ),
    Mutant(
        "bytes that aiohttp holds when a response breaks are dropped",
        "transport/aiohttp.py",
        "            if not chunk:\n                raise\n",
        "            raise\n",
        "test_aiohttp_transport.py",
    ),
    Mutant(
        "a submit over aiohttp counts as sent before it has a connection",
        "transport/aiohttp.py",
        "        if request.kind is not RequestKind.SUBMIT:  # the phase of a submit follows from trace events\n",
        "        if True:\n",
        "test_transports.py",
    ),
    Mutant(
        "a submit over aiohttp uses a reused connection",
        "transport/aiohttp.py",
        "force_close=is_submit,\n                keepalive_timeout=None if is_submit else _KEEP_ALIVE_S",
        "keepalive_timeout=_KEEP_ALIVE_S",
        "test_transports.py::test_reads_reuse_a_connection_and_submits_never_do",
    ),
    Mutant(
        "aiohttp resolves the host of an image itself",
        "transport/aiohttp.py",
        'resolver=_CheckedResolver(check, self._connect_s) if use == "checked" and check is not None else None',
        "resolver=None",
        "test_transports.py",
    ),
    Mutant(
        "the breaker never trips",
        "api/submit.py",
        "            self._breaker.trip(attempt.refusal)\n",
        "            pass\n",
        "test_api.py",
    ),
    Mutant(
        "false counts as code 0",
        "wire/codec.py",
        '        ok=(type(code) is int and code == 0) or code == "0",\n',
        '        ok=code == 0 or code == "0",\n',
        "test_codec.py",
    ),
    Mutant(
        "possible duplicates are not counted",
        "api/submit.py",
        "            submit.possible_charges += 1\n",
        "            submit.possible_charges = 1\n",
        "test_api.py",
    ),
    Mutant(
        "a cancelled caller keeps its slot",
        "api/operations.py",
        "        except BaseException:\n            slot.release()\n            raise\n",
        "        except ZeroDivisionError:\n            raise\n",
        "test_cancellation.py",
    ),
    Mutant(
        "a private address is contacted",
        "wire/addresses.py",
        "        and parsed.is_global\n",
        "        and True\n",
        "test_transports.py::test_a_guarded_request_never_reaches_a_private_address",
    ),
    Mutant(
        "a submit is sent without an attempt in the ledger",
        "batch/submitter.py",
        "        await self._ledger.begin_attempt("
        "self.row.key, resubmit=self._is_unknown, is_again=self.is_again, nonce=nonce)\n",
        "",
        "test_batch.py::test_each_step_is_durable_before_the_next",
    ),
    Mutant(
        "cancelling a batch interrupts a submit in flight",
        "batch/submitter.py",
        "        self.scope.shield = True\n",
        "        self.scope.shield = False\n",
        "test_batch.py::test_cancelling_lets_a_submit_in_flight_reach_the_ledger",
    ),
    Mutant(
        "the budget is reserved too late",
        "ledger/budget.py",
        "        self._held[priced_as] += 1\n        return self._open",
        "        return self._open",
        "test_batch.py::test_the_budget_holds_and_may_be_raised_later",
    ),
    Mutant(
        "rows are used up during an outage",
        "batch/outage.py",
        "        return not self._has_worked or self.is_down\n",
        "        return False\n",
        "test_batch.py::test_an_early_outage_costs_three_rows_and_not_all",
    ),
    Mutant(
        "an unknown row is submitted again",
        "batch/resume.py",
        "    if record.state in (RowState.UNKNOWN, RowState.SUBMITTING):\n",
        "    if False:\n",
        "test_batch.py::test_a_lost_response_is_unknown_until_it_is_resolved",
    ),
    Mutant(
        "a full disk is taken for a bad image",
        "batch/run_state.py",
        "            if isinstance(exc.__cause__, OSError):  # the disk: every other image would fail, too\n",
        "            if False:\n",
        "test_batch.py::test_a_full_disk_stops_the_submits",
    ),
    Mutant(
        "a commit is not synced",
        "ledger/database.py",
        'db.execute("PRAGMA synchronous=FULL")',
        'db.execute("PRAGMA synchronous=NORMAL")',
        "test_ledger.py::test_the_file_is_private_and_every_commit_is_synced",
    ),
    Mutant(
        "a failed write is retried",
        "ledger/sqlite.py",
        "                if self._failure is None:\n",
        "                if True:\n",
        "test_ledger.py::test_after_a_failed_write_every_write_fails",
    ),
    Mutant(
        "a partial image is left behind by a kill",
        "images/files.py",
        "        part.unlink(missing_ok=True)\n\n\nclass",
        "        pass\n\n\nclass",
        "test_batch_cli.py::test_twenty_kills_lose_nothing_and_charge_nothing_twice",
    ),
    Mutant(
        "a forged callback is accepted",
        "callbacks.py",
        "        return nonce if any(matches) else None\n",
        "        return nonce\n",
        "test_callbacks.py::test_responses_to_posts_reveal_nothing",
    ),
    Mutant(
        "a valid path is accepted for another task",
        "callbacks.py",
        "            return self.task_id == task_id\n",
        "            return True\n",
        "test_callbacks.py::test_responses_to_posts_reveal_nothing",
    ),
    Mutant(
        "a task id invented by a callback is accepted",
        "handle.py",
        "                await handle.query()\n                return handle\n",
        "                return handle\n",
        "test_callbacks.py::test_a_submit_whose_response_was_lost_is_recovered_by_its_callback",
    ),
    Mutant(
        "a transport that hangs is awaited without end",
        "transport/checked.py",
        "        limit_s = max(timeout_s, 0) + _GRACE_S\n",
        "        limit_s = 1e6\n",
        "test_checked_transport.py::test_a_transport_that_hangs_holds_its_slot_until_the_timeout",
    ),
    Mutant(
        "a single task is submitted without an attempt in the ledger",
        "ledger/entry.py",
        "            refusal = await self.file.commit(work, is_checked=self._check_budget is not None)\n",
        "            self.file.enqueue(work)\n            refusal = None\n",
        "test_task_ledger.py",
    ),
    Mutant(
        "a finished task is not resumed",
        "ledger/tasks.py",
        'UNACKNOWLEDGED: Final = "acknowledged_at IS NULL AND task_id IS NOT NULL"',
        "UNACKNOWLEDGED: Final = \"acknowledged_at IS NULL AND task_id IS NOT NULL AND state = 'submitted'\"",
        "test_task_ledger.py",
    ),
    Mutant(
        "an acknowledgement is not durable when it returns",
        "ledger/entry.py",
        "            await self.file.commit(lambda db: tasks.acknowledge(db, self.key))\n",
        "            pass\n",
        "test_task_ledger.py",
    ),
    Mutant(
        "the budget of an owner ignores other processes",
        "ledger/folder.py",
        "            found += read_elsewhere(self.folder, [file.path for file in held], read)\n",
        "",
        "test_owner_budgets.py",
    ),
    Mutant(
        "two processes compare with the budget of an owner at once",
        "ledger/task_file.py",
        "        with exclusive(self.path.with_name(_BUDGET_LOCK_NAME)) if is_checked else contextlib.nullcontext():\n",
        "        with contextlib.nullcontext():\n",
        "test_owner_budgets.py::test_processes_share_the_budget_of_an_owner",
    ),
    Mutant(
        "an owner with many submits goes first",
        "api/fair_queue.py",
        "            self._turns.append(owner)\n",
        "            self._turns.appendleft(owner)\n",
        "test_owners.py",
    ),
    Mutant(
        "a failed submit keeps the place of its owner",
        "session.py",
        "            self.queue.leave(call.waiter)\n            if isinstance(exc, NanoBananaError):\n",
        "            if isinstance(exc, NanoBananaError):\n",
        "test_owners.py",
    ),
    Mutant(
        "a dropped client goes on for ever",
        "session.py",
        "            background.abandon(drain_s=self.options.timeouts.submit_s)\n",
        "",
        "test_dropped_client.py",
    ),
    Mutant(
        "background work keeps the context of its first caller",
        "_concurrency/background.py",
        "        contextvars.Context().run(self._start_soon, work)\n",
        "        self._start_soon(work)\n",
        "test_dropped_client.py",
    ),
    Mutant(
        "a cancelled wait is no orphan",
        "session.py",
        "            exc.task_id = handle.task_id  # type: ignore[attr-defined]  # an instance of another library\n"
        "        self.report_orphan(handle)\n",
        "            exc.task_id = handle.task_id  # type: ignore[attr-defined]  # an instance of another library\n",
        "test_dropped_client.py",
    ),
    Mutant(
        "the CONNECT of a tunnel counts as a submit that has left",
        "transport/httpx.py",
        ' and not _is_tunnel(info.get("request")):\n',
        ":\n",
        "test_transports.py",
    ),
    Mutant(
        "a submit that is cancelled before its POST stays unresolved",
        "ledger/entry.py",
        "            with contextlib.suppress(LedgerError):  # checked, too, to stay behind the attempt\n",
        "            with contextlib.suppress(LedgerError):\n                raise\n",
        "test_task_ledger.py",
    ),
    Mutant(
        "a fake address is taken in any network",
        "transport/addresses.py",
        " and await self._is_behind_fake_ips()",
        "",
        "test_transports.py",
    ),
    Mutant(
        "an owner is forgotten while it is in turn",
        "api/fair_queue.py",
        "        if owner.waiting or owner.in_flight or owner.is_in_turn:\n",
        "        if owner.waiting or owner.in_flight:\n",
        "test_owners.py",
    ),
    Mutant(
        "D1: an image replaces a file of the user's",
        "batch/runner.py",
        "FileImageStore(ledger.folder, replace=False)",
        "FileImageStore(ledger.folder)",
        "test_own_files.py::test_d1_a_file_that_appears_before_the_image_is_saved_is_left_alone",
    ),
    Mutant(
        "D1: a row takes the name of a photo that was there first",
        "ledger/batch_rows.py",
        "    while stem.lower() in foreign or ",
        "    while ",
        "test_own_files.py::test_d1_the_users_own_files_are_left_alone",
    ),
    Mutant(
        "S1: the key is redacted in plain text only",
        "wire/redaction.py",
        "    if any(key in variant for variant in _variants(text)):\n",
        "    if False:\n",
        "test_secrecy.py",
    ),
    Mutant(
        "E2: a finished batch is bought again without a word",
        "batch/preview.py",
        "        return self.unlisted >= _FEW_ROWS and are_many and are_as_many\n",
        "        return False\n",
        "test_batch_preview.py::test_e2_rows_that_replace_charged_ones_are_confirmed_first",
    ),
    Mutant(
        "E2: a blank at the end of a prompt makes a new row",
        "batch/rows.py",
        '    prompt = " ".join(normalize(request.prompt).split())\n',
        "    prompt = request.prompt\n",
        "test_rows.py",
    ),
    Mutant(
        "E6: a truncated reference is sent",
        "images/references.py",
        "    if not image_format.is_complete(data):\n",
        "    if False:\n",
        "test_rows.py",
    ),
    Mutant(
        "A2: submits go on while no image can be downloaded",
        "batch/run_state.py",
        "        return self.saving > self._max_downloads or (self._download_outage.is_down and self.in_flight > 0)\n",
        "        return self.saving > self._max_downloads\n",
        "test_download_outage.py::test_a2_a_host_that_recovers_is_waited_for",
    ),
    Mutant(
        "B3: a response that arrived while the process was stopped is dropped",
        "_concurrency/timeouts.py",
        "    if anyio.current_time() - due_s > _LATE_S:\n",
        "    if False:\n",
        "test_stopped_process.py",
    ),
    Mutant(
        "N3: a callback during a hiccup of the service is forgotten",
        "recovery.py",
        "            self._background.start_soon(partial(self._retry, nonce, task_id, bind))\n",
        "            pass\n",
        "test_callbacks.py",
    ),
    Mutant(
        "a throttled submit keeps its slot",
        "api/submit.py",
        "        submit.turn.give_back()\n",
        "        submit.turn.slot = None\n",
        "test_api.py",
    ),
    Mutant(
        "a throttled submit goes to the end of the line",
        "_concurrency/slots.py",
        "        if not waiter.number:\n",
        "        if True:\n",
        "test_api.py",
    ),
    Mutant(
        "N5: a callback after a decision ends the run",
        "ledger/schema.py",
        "state IN ('unknown', 'requeued', 'abandoned')",
        "state IN ('unknown')",
        "test_callbacks.py",
    ),
    Mutant(
        "a refused task is followed by another",
        "policies.py",
        "        return ends.get(kind) in self.on\n",
        "        return kind is not ReasonKind.UNKNOWN\n",
        "test_regenerate.py::test_a_refused_task_and_one_without_a_reason_are_not_followed_by_another",
    ),
    Mutant(
        "a row whose second submit was not charged is submitted by the next run",
        "ledger/schema.py",
        "        _fall_back(db, key, RowState.SAVED, RowState.FAILED)\n",
        "        pass\n",
        "test_ledger.py::test_a_charged_row_whose_next_attempt_was_not_charged_is_not_ready",
    ),
    Mutant(
        "a saved image is lost from the books when a later attempt has none",
        "ledger/schema.py",
        "    if state is RowState.FAILED:\n        _fall_back(db, key, RowState.SAVED)\n",
        "",
        "test_ledger.py::test_a_saved_image_survives_an_attempt_that_has_none",
    ),
    Mutant(
        "a row of an earlier run is submitted again",
        "batch/row_runner.py",
        "self._client.regenerate if entry.state.is_submittable else RegeneratePolicy()",
        "self._client.regenerate",
        "test_regenerate.py::test_a_row_of_an_earlier_run_is_only_waited_for",
    ),
    Mutant(
        "a second submit of unknown outcome is silent",
        "regenerate.py",
        "or exc.task_id is not None or isinstance(exc, SubmissionUnknown):",
        "or exc.task_id is not None:",
        "test_regenerate.py::test_a_later_submit_of_unknown_outcome_is_raised_with_the_earlier_task",
    ),
    Mutant(
        "an image of another size passes",
        "images/delivered.py",
        "_AREA_FACTOR: Final = 2.1\n",
        "_AREA_FACTOR: Final = 21.0\n",
        "test_delivered.py::test_in_a_batch_of_200_every_mismatch_is_found_and_none_falsely",
    ),
    Mutant(
        "a photo is sent sideways",
        "images/fit.py",
        "_to_srgb(ImageOps.exif_transpose(image))",
        "_to_srgb(image)",
        "test_fit.py::test_a_large_photo_that_lies_on_its_side_is_sent_upright_and_small_enough",
    ),
)


def _result(mutant: Mutant) -> str:
    """Return "killed", or the reason why it was not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("nanobanana_async", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        file = folder / "nanobanana_async" / mutant.file
        source = file.read_text()
        if source.count(mutant.old) != 1:
            return f"NOT PLANTED: its code stands {source.count(mutant.old)} times in {mutant.file}"
        file.write_text(source.replace(mutant.old, mutant.new))
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", *OPTIONS, f"tests/{mutant.tests}"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
    is_found = ran.returncode == 1 and " failed" in ran.stdout
    return "killed" if is_found else f"LIVES (pytest exited with {ran.returncode})"


def main() -> int:
    """Plant all bugs, and return 1 unless each is found."""
    if importlib.util.find_spec("pytest") is None:
        sys.exit("tests.mutants: pytest is missing. To install it, run: pip install -e '.[dev]'")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        fates = list(pool.map(_result, MUTANTS))
    for mutant, fate in zip(MUTANTS, fates, strict=True):
        print(f"{fate:8} {mutant.name}")
    killed = fates.count("killed")
    print(f"{killed} of {len(MUTANTS)} planted bugs were found")
    return int(killed < len(MUTANTS))


if __name__ == "__main__":
    sys.exit(main())
