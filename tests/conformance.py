"""Compare what the client reports with what the service charged, in every test with both in its process."""

from collections import Counter
from typing import Any

import attrs
import pytest

from nanobanana_async import ApiError, ConfigurationError, NotSent, SubmissionUnknown
from nanobanana_async.api.submit import SubmitLoop
from nanobanana_async.protocols import Verdict
from nanobanana_async.simulator.service import SimulatedService


@attrs.define
class ChargeAudit:
    """Reported submits and recorded charges."""

    accepted: list[str] = attrs.field(factory=list)
    unknown: int = 0
    abandoned: int = 0
    """Submits whose caller was cancelled before an outcome."""
    declared: int = 0
    """Possible duplicates that the client reported."""
    services: list[SimulatedService] = attrs.field(factory=list)

    def check(self) -> None:
        """Assert that each accepted submit is exactly one charge, and that all charges are declared."""
        charges = Counter(charge.task_id for service in self.services for charge in service.charges)
        known = {task_id for item in self.services for task_id in item.tasks}
        for task_id, times in Counter(self.accepted).items():
            if task_id in known:
                assert charges[task_id] == times, f"{task_id} was accepted {times} times, charged {charges[task_id]}"
        excess = sum(charges.values()) - len(self.accepted) - self.unknown - self.abandoned - self.declared
        assert excess <= 0, f"{excess} undeclared charges"


def watch_charges(monkeypatch: pytest.MonkeyPatch) -> ChargeAudit:
    """Record every submit and every simulated service from now on."""
    audit = ChargeAudit()
    submit, begin = SubmitLoop.submit, SimulatedService.__init__
    on_abandoned = SubmitLoop._on_abandoned  # noqa: SLF001 - the last place that knows how often it was sent

    async def watched_submit(self: SubmitLoop, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - any arguments
        try:
            done = await submit(self, *args, **options)
        except SubmissionUnknown as exc:
            audit.unknown += 1
            audit.declared += exc.possible_duplicates
            raise
        except (ApiError, NotSent, ConfigurationError, ValueError):
            raise
        except BaseException:
            audit.abandoned += 1
            raise
        audit.accepted.append(done.task_id)
        audit.declared += done.possible_duplicates
        return done

    def watched_end(self: SubmitLoop, sent: Any, attempt: Any) -> None:  # noqa: ANN401 - both are private
        possible = sent.possible_charges + (attempt.rule.verdict is Verdict.ACCEPTED)
        audit.declared += max(0, possible - 1)  # one is counted as abandoned
        on_abandoned(self, sent, attempt)

    def watched_begin(self: SimulatedService, *args: Any, **options: Any) -> None:  # noqa: ANN401 - passed through
        begin(self, *args, **options)
        audit.services.append(self)

    monkeypatch.setattr(SubmitLoop, "submit", watched_submit)
    monkeypatch.setattr(SubmitLoop, "_on_abandoned", watched_end)
    monkeypatch.setattr(SimulatedService, "__init__", watched_begin)
    return audit
