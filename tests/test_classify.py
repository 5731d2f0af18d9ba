"""The table that decides about second charges, rule by rule."""

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async import ExchangeError, Phase, Verdict, WireResponse
from nanobanana_async.wire import codec
from nanobanana_async.wire.classify import RULES, RetryRule, SubmitExchange, classify
from tests.fakes import accepted, lost, rejected, response

HTML = b"<html>Bad gateway</html>"


def outcome(end: WireResponse | ExchangeError) -> SubmitExchange:
    """Return what the operation passes to the table."""
    if isinstance(end, WireResponse):
        return SubmitExchange(response=end, envelope=codec.decode_envelope(end))
    return SubmitExchange(
        response=end.response,
        envelope=codec.decode_envelope(end.response) if end.response else codec.Envelope(),
        failure=end,
    )


ROWS: list[tuple[str, WireResponse | ExchangeError, Verdict, RetryRule]] = [
    ("never-connected", lost(Phase.CONNECT), Verdict.NOT_CHARGED, RetryRule.SAFE),
    ("bad-certificate", lost(Phase.CONNECT, permanent=True), Verdict.NOT_CHARGED, RetryRule.NO),
    ("write-failed", lost(Phase.SEND), Verdict.UNKNOWN, RetryRule.ALWAYS),
    ("no-response", lost(Phase.SEND), Verdict.UNKNOWN, RetryRule.ALWAYS),
    ("cut-with-id", lost(Phase.RESPONSE, partial=response(body=accepted().body[:-1])), Verdict.ACCEPTED, RetryRule.NO),
    (
        "cut-without-id",
        lost(Phase.RESPONSE, partial=response(body=b'{"code":0,"da')),
        Verdict.UNKNOWN,
        RetryRule.ALWAYS,
    ),
    ("too-long", lost(Phase.RESPONSE, permanent=True, partial=response(body=b"xx")), Verdict.UNKNOWN, RetryRule.ALWAYS),
    ("accepted", accepted(), Verdict.ACCEPTED, RetryRule.NO),
    ("id-despite-code", response(200, {"code": 1, "data": {"task_id": "ta-1"}}), Verdict.ACCEPTED, RetryRule.NO),
    ("id-despite-429", response(429, {"code": 1, "data": {"task_id": "ta-1"}}), Verdict.ACCEPTED, RetryRule.NO),
    ("id-in-garbage", response(200, body=b'<!-- "task_id": "ta-1" -->'), Verdict.ACCEPTED, RetryRule.NO),
    ("ok-without-id", response(200, {"code": 0, "data": {}}), Verdict.UNKNOWN, RetryRule.NO),
    ("ok-with-null-id", response(200, {"code": 0, "data": {"task_id": None}}), Verdict.UNKNOWN, RetryRule.NO),
    ("ok-with-number-id", response(200, {"code": 0, "data": {"task_id": 7}}), Verdict.ACCEPTED, RetryRule.NO),
    ("200-html", response(200, body=HTML), Verdict.UNKNOWN, RetryRule.NO),
    ("200-empty", response(200, body=b""), Verdict.UNKNOWN, RetryRule.NO),
    ("200-cut-json", response(200, body=b'{"code":0,"data":{"task_id":"ta-1'), Verdict.UNKNOWN, RetryRule.NO),
    ("200-code-1", rejected(200, 1), Verdict.REJECTED, RetryRule.NO),
    ("200-code-false", response(200, {"code": False, "data": {}}), Verdict.REJECTED, RetryRule.NO),
    ("redirect", response(307, body=b"", location="https://b.example"), Verdict.NOT_CHARGED, RetryRule.NO),
    ("400", rejected(400), Verdict.REJECTED, RetryRule.NO),
    ("401", rejected(401, 401), Verdict.NOT_CHARGED, RetryRule.NO),
    ("401-html", response(401, body=HTML), Verdict.NOT_CHARGED, RetryRule.NO),
    ("402", rejected(402), Verdict.NOT_CHARGED, RetryRule.NO),
    ("403", rejected(403), Verdict.REJECTED, RetryRule.NO),
    ("404-html", response(404, body=HTML), Verdict.NOT_CHARGED, RetryRule.NO),
    ("402-html", response(402, body=HTML), Verdict.NOT_CHARGED, RetryRule.NO),
    ("403-html", response(403, body=HTML), Verdict.NOT_CHARGED, RetryRule.NO),
    ("413-html", response(413, body=HTML), Verdict.REJECTED, RetryRule.NO),
    ("no-credit", rejected(400, 1, "Insufficient credits"), Verdict.NOT_CHARGED, RetryRule.NO),
    ("408", response(408, body=b""), Verdict.UNKNOWN, RetryRule.ONCE),
    ("421", response(421, body=b""), Verdict.UNKNOWN, RetryRule.ONCE),
    ("425", response(425, body=b""), Verdict.UNKNOWN, RetryRule.ONCE),
    ("408-envelope", rejected(408), Verdict.UNKNOWN, RetryRule.NO),
    ("429", rejected(429), Verdict.NOT_CHARGED, RetryRule.AFTER_WAIT),
    ("500-envelope", rejected(500), Verdict.UNKNOWN, RetryRule.API_5XX),
    ("500-no-credit", rejected(500, 1, "insufficient credit"), Verdict.UNKNOWN, RetryRule.API_5XX),
    ("500-envelope-code-0", response(500, {"code": 0, "data": {}}), Verdict.UNKNOWN, RetryRule.ANY_5XX),
    ("504-json-with-a-code", response(504, {"code": 504, "message": "timeout"}), Verdict.UNKNOWN, RetryRule.ANY_5XX),
    ("500-code-in-words", response(500, {"code": "GATEWAY"}), Verdict.UNKNOWN, RetryRule.ANY_5XX),
    ("500-code-null", response(500, {"code": None}), Verdict.UNKNOWN, RetryRule.ANY_5XX),
    ("502-html", response(502, body=HTML), Verdict.UNKNOWN, RetryRule.ANY_5XX),
    ("503-other-json", response(503, {"statusCode": 503}), Verdict.UNKNOWN, RetryRule.ANY_5XX),
    ("504", response(504, body=b""), Verdict.UNKNOWN, RetryRule.ANY_5XX),
    ("522", response(522, body=HTML), Verdict.UNKNOWN, RetryRule.ANY_5XX),
]


@pytest.mark.parametrize(("end", "verdict", "repeat"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_each_outcome_has_its_verdict(end: WireResponse | ExchangeError, verdict: Verdict, repeat: RetryRule) -> None:
    """Each outcome has the listed verdict and retry rule."""
    row = classify(outcome(end))
    assert (row.verdict, row.retry) == (verdict, repeat)


DOUBTED: list[tuple[str, WireResponse, Verdict]] = [
    ("408-again", response(408, body=b""), Verdict.UNKNOWN),
    ("redirect-again", response(302, body=b"", location="https://b.example"), Verdict.UNKNOWN),
    ("403-html-again", response(403, body=HTML), Verdict.UNKNOWN),
    ("400", rejected(400), Verdict.REJECTED),
    ("402-html", response(402, body=HTML), Verdict.NOT_CHARGED),
]


@pytest.mark.parametrize(("end", "verdict"), [pytest.param(*row[1:], id=row[0]) for row in DOUBTED])
def test_a_second_response_that_proves_nothing_is_unknown(end: WireResponse, verdict: Verdict) -> None:
    """M4, M9: the first one is excused once per request, over all its attempts."""
    row = classify(attrs.evolve(outcome(end), is_doubted=True))
    assert (row.verdict, row.retry) == (verdict, RetryRule.NO)


def test_every_rule_is_reached_by_the_cases_above() -> None:
    """No rule is untested."""
    reached = {classify(outcome(end)).name for _, end, *_ in ROWS}
    reached |= {classify(attrs.evolve(outcome(end), is_doubted=True)).name for _, end, _ in DOUBTED}
    assert reached == {row.name for row in RULES}


@given(status=st.integers(100, 599), body=st.binary(max_size=100), phase=st.none() | st.sampled_from(Phase))
def test_a_request_that_may_have_arrived_is_resubmitted_only_under_a_named_level(
    status: int, body: bytes, phase: Phase | None
) -> None:
    """No combination of status, body and failure leads to an undeclared second charge."""
    received = WireResponse(status=status, body=body)
    end = received if phase is None else lost(phase, partial=received if phase is Phase.RESPONSE else None)
    row = classify(outcome(end))
    if row.retry in (RetryRule.SAFE, RetryRule.AFTER_WAIT):
        assert phase is Phase.CONNECT or status == 429
        assert row.verdict is Verdict.NOT_CHARGED
    elif row.retry is not RetryRule.NO:
        assert row.verdict is Verdict.UNKNOWN  # each further POST is counted


@given(status=st.integers(500, 599), words=st.text(max_size=40))
def test_words_never_decide_about_a_5xx(status: int, words: str) -> None:
    """M5: a service that charges and then fails may say anything."""
    assert classify(outcome(rejected(status, 1, f"insufficient credit {words}"))).verdict is Verdict.UNKNOWN
