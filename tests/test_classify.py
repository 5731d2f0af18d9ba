"""The table that decides who pays twice, row by row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async import ExchangeError, Phase, WireResponse
from nanobanana_async.wire import codec
from nanobanana_async.wire.classify import TABLE, RetryRule, SubmitExchange, Verdict, judge
from tests.fakes import accepted, lost, refused, reply

HTML = b"<html>Bad gateway</html>"


def outcome(end: WireResponse | ExchangeError) -> SubmitExchange:
    """Return what the operation would hand to the table."""
    if isinstance(end, WireResponse):
        return SubmitExchange(reply=end, envelope=codec.read(end))
    return SubmitExchange(
        reply=end.reply, envelope=codec.read(end.reply) if end.reply else codec.Envelope(), failure=end
    )


ROWS: list[tuple[str, WireResponse | ExchangeError, Verdict, RetryRule]] = [
    ("never-connected", lost(Phase.CONNECT), Verdict.NOT_SENT, RetryRule.FREE),
    ("bad-certificate", lost(Phase.CONNECT, permanent=True), Verdict.NOT_SENT, RetryRule.NO),
    ("write-failed", lost(Phase.SEND), Verdict.UNKNOWN, RetryRule.ALWAYS),
    ("no-reply", lost(Phase.SEND), Verdict.UNKNOWN, RetryRule.ALWAYS),
    ("cut-with-id", lost(Phase.REPLY, partial=reply(body=accepted().body[:-1])), Verdict.ACCEPTED, RetryRule.NO),
    ("cut-without-id", lost(Phase.REPLY, partial=reply(body=b'{"code":0,"da')), Verdict.UNKNOWN, RetryRule.ALWAYS),
    ("too-long", lost(Phase.REPLY, permanent=True, partial=reply(body=b"xx")), Verdict.UNKNOWN, RetryRule.ALWAYS),
    ("accepted", accepted(), Verdict.ACCEPTED, RetryRule.NO),
    ("id-despite-code", reply(200, {"code": 1, "data": {"task_id": "ta-1"}}), Verdict.ACCEPTED, RetryRule.NO),
    ("id-despite-429", reply(429, {"code": 1, "data": {"task_id": "ta-1"}}), Verdict.ACCEPTED, RetryRule.NO),
    ("id-in-garbage", reply(200, body=b'<!-- "task_id": "ta-1" -->'), Verdict.ACCEPTED, RetryRule.NO),
    ("ok-without-id", reply(200, {"code": 0, "data": {}}), Verdict.UNKNOWN, RetryRule.NO),
    ("ok-with-null-id", reply(200, {"code": 0, "data": {"task_id": None}}), Verdict.UNKNOWN, RetryRule.NO),
    ("ok-with-number-id", reply(200, {"code": 0, "data": {"task_id": 7}}), Verdict.ACCEPTED, RetryRule.NO),
    ("200-html", reply(200, body=HTML), Verdict.UNKNOWN, RetryRule.NO),
    ("200-empty", reply(200, body=b""), Verdict.UNKNOWN, RetryRule.NO),
    ("200-cut-json", reply(200, body=b'{"code":0,"data":{"task_id":"ta-1'), Verdict.UNKNOWN, RetryRule.NO),
    ("200-code-1", refused(200, 1), Verdict.REJECTED, RetryRule.NO),
    ("200-code-false", reply(200, {"code": False, "data": {}}), Verdict.REJECTED, RetryRule.NO),
    ("redirect", reply(307, body=b"", location="https://b.example"), Verdict.REJECTED, RetryRule.NO),
    ("400", refused(400), Verdict.REJECTED, RetryRule.NO),
    ("401", refused(401, 401), Verdict.REJECTED, RetryRule.NO),
    ("401-html", reply(401, body=HTML), Verdict.REJECTED, RetryRule.NO),
    ("402", refused(402), Verdict.REJECTED, RetryRule.NO),
    ("403", refused(403), Verdict.REJECTED, RetryRule.NO),
    ("404-html", reply(404, body=HTML), Verdict.REJECTED, RetryRule.NO),
    ("408", reply(408, body=b""), Verdict.NOT_SENT, RetryRule.ONCE),
    ("421", reply(421, body=b""), Verdict.NOT_SENT, RetryRule.ONCE),
    ("425", reply(425, body=b""), Verdict.NOT_SENT, RetryRule.ONCE),
    ("429", refused(429), Verdict.REJECTED, RetryRule.AFTER_WAIT),
    ("500-envelope", refused(500), Verdict.REJECTED, RetryRule.ENVELOPE),
    ("500-no-credit", refused(500, 1, "insufficient credit"), Verdict.REJECTED, RetryRule.NO),
    ("500-envelope-code-0", reply(500, {"code": 0, "data": {}}), Verdict.UNKNOWN, RetryRule.SERVER_ERRORS),
    ("504-json-with-a-code", reply(504, {"code": 504, "message": "timeout"}), Verdict.UNKNOWN, RetryRule.SERVER_ERRORS),
    ("500-code-in-words", reply(500, {"code": "GATEWAY"}), Verdict.UNKNOWN, RetryRule.SERVER_ERRORS),
    ("500-code-null", reply(500, {"code": None}), Verdict.UNKNOWN, RetryRule.SERVER_ERRORS),
    ("502-html", reply(502, body=HTML), Verdict.UNKNOWN, RetryRule.SERVER_ERRORS),
    ("503-other-json", reply(503, {"statusCode": 503}), Verdict.UNKNOWN, RetryRule.SERVER_ERRORS),
    ("504", reply(504, body=b""), Verdict.UNKNOWN, RetryRule.SERVER_ERRORS),
    ("522", reply(522, body=HTML), Verdict.UNKNOWN, RetryRule.SERVER_ERRORS),
]


@pytest.mark.parametrize(("end", "verdict", "repeat"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_each_outcome_has_its_verdict(end: WireResponse | ExchangeError, verdict: Verdict, repeat: RetryRule) -> None:
    """What became of the money, and whether sending again is in order."""
    row = judge(outcome(end))
    assert (row.verdict, row.repeat) == (verdict, repeat)


def test_every_row_of_the_table_is_reached_by_the_cases_above() -> None:
    """A row that no case reaches is a row that nobody has thought through."""
    assert {judge(outcome(end)).name for _, end, *_ in ROWS} == {row.name for row in TABLE}


@given(status=st.integers(100, 599), body=st.binary(max_size=100), phase=st.none() | st.sampled_from(Phase))
def test_whatever_may_have_arrived_is_repeated_only_under_a_named_policy(
    status: int, body: bytes, phase: Phase | None
) -> None:
    """No combination of status, bytes and failure leads to a silent second payment."""
    answer = WireResponse(status=status, body=body)
    end = answer if phase is None else lost(phase, partial=answer if phase is Phase.REPLY else None)
    row = judge(outcome(end))
    if row.repeat in (RetryRule.FREE, RetryRule.ONCE, RetryRule.AFTER_WAIT):
        assert phase is Phase.CONNECT or status in (408, 421, 425, 429)
    else:
        assert row.repeat is RetryRule.NO or row.repeat.may_pay_twice
