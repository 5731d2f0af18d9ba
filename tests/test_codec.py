"""What is said and what is understood: every variant of the wire, and no byte sequence that breaks it."""

import base64
import gzip
import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanobanana_async import (
    ApiError,
    AuthenticationError,
    GenerationRequest,
    InsufficientCredits,
    InvalidRequest,
    NanoBananaError,
    ProtocolError,
    RateLimited,
    ServiceUnavailable,
    TaskNotFound,
    TaskStatus,
    WireResponse,
)
from nanobanana_async.wire import codec
from tests.fakes import accepted, finished, rejected, response, state


def sent(request: GenerationRequest) -> dict[str, object]:
    """Return the JSON document that goes out for *request*."""
    document: dict[str, object] = json.loads(codec.encode_submit("https://a.example", request).body or b"")
    return document


def test_unset_fields_are_left_out_never_null() -> None:
    """The service was never seen to take a null."""
    assert sent(GenerationRequest("a fox")) == {"model": "google/gempix2", "prompt": "a fox"}


def test_every_field_goes_out_under_its_own_name() -> None:
    """The names are the vendor's."""
    request = GenerationRequest(
        "a fox",
        images=["https://a.example/1.png"],
        model="google/nano-banana-2",
        aspect_ratio="16:9",
        image_size="2K",
        callback_url="https://app.example/hook",
        extra={"seed": 7},
    )
    assert sent(request) == {
        "prompt": "a fox",
        "images": ["https://a.example/1.png"],
        "model": "google/nano-banana-2",
        "aspect_ratio": "16:9",
        "image_size": "2k",
        "callback_url": "https://app.example/hook",
        "seed": 7,
    }


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}], ids=["nan", "object", "set"])
def test_extra_that_is_no_json_is_refused_by_name(value: object) -> None:
    """Before anything is paid."""
    with pytest.raises(ValueError, match="extra: cannot be encoded as JSON"):
        codec.encode_submit("https://a.example", GenerationRequest("a fox", extra={"x": value}))  # type: ignore[dict-item]


def test_a_task_id_cannot_change_the_query() -> None:
    """Ids are opaque, and somebody will paste one with an ampersand."""
    assert codec.encode_query("https://a.example", "a&b=c/../d").url.endswith("?task_id=a%26b%3Dc%2F..%2Fd")


def test_a_finished_task_is_read_whole() -> None:
    """Images, words, credits as Decimal, dates with a zone, unknown fields in raw."""
    fields: dict[str, Any] = {
        "result": [{"image": "https://f.example/1.png"}, {"text": "as asked"}, {"image": "https://f.example/2.png"}],
        "consumed": "0.123456789",
        "created_at": "2026-11-21T01:02:03Z",
        "status_reason": {"message": None},
        "seed": 7,
    }
    task = codec.decode_task(state("success", **fields), "ta-1")
    assert task.status is TaskStatus.SUCCESS
    assert [image.url for image in task.images] == ["https://f.example/1.png", "https://f.example/2.png"]
    assert task.texts == ("as asked",)
    assert task.consumed == Decimal("0.123456789")
    assert task.created_at == datetime(2026, 11, 21, 1, 2, 3, tzinfo=UTC)
    assert task.reason is None
    assert task.raw["seed"] == 7


@pytest.mark.parametrize(
    ("result", "images", "texts"),
    [
        pytest.param(None, 0, 0, id="null"),
        pytest.param([], 0, 0, id="empty"),
        pytest.param({}, 0, 0, id="empty-object"),
        pytest.param({"image": "https://f.example/1.png"}, 1, 0, id="object"),
        pytest.param("https://f.example/1.png", 1, 0, id="string"),
        pytest.param(["https://f.example/1.png"] * 2, 2, 0, id="strings"),
        pytest.param([{"image": ""}, {"image": None}, {"image": 7}], 0, 0, id="no-image-in-it"),
        pytest.param([{"text": "sorry"}], 0, 1, id="words"),
        pytest.param([{"image": "https://f.example/1.png", "text": "here"}, None, 3], 1, 1, id="mixed"),
    ],
)
def test_every_shape_of_result_is_normalised(result: object, images: int, texts: int) -> None:
    """Null, one object, strings and mixtures have all been seen."""
    task = codec.decode_task(state("success", result=result), "ta-1")
    assert (len(task.images), len(task.texts)) == (images, texts)


@pytest.mark.parametrize(
    ("consumed", "expected"),
    [
        pytest.param("0.500000", Decimal("0.5"), id="string"),
        pytest.param(2, Decimal(2), id="integer"),
        pytest.param(0.1, Decimal("0.1"), id="float-is-exact"),
        pytest.param("1" * 40, Decimal("1" * 40), id="forty-digits"),
        pytest.param(None, None, id="null"),
        pytest.param("abc", None, id="words"),
        pytest.param("-1", None, id="negative"),
        pytest.param("NaN", None, id="nan"),
        pytest.param(True, None, id="boolean"),
        pytest.param([], None, id="list"),
        pytest.param("1e999999999", None, id="billions-of-digits"),
    ],
)
def test_credits_are_decimal_or_nothing(consumed: object, expected: Decimal | None) -> None:
    """An odd price never spoils a paid picture."""
    assert codec.decode_task(state("success", consumed=consumed), "ta-1").consumed == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("SUCCESS", "success"),
        (" Failed ", "failed"),
        ("queued", "unrecognized"),
        ("", "unrecognized"),
        (None, "unrecognized"),
        (7, "unrecognized"),
    ],
)
def test_an_unknown_status_counts_as_still_running(word: object, expected: str) -> None:
    """Spelling does not matter; new words do no harm."""
    assert codec.decode_task(state(word), "ta-1").status.value == expected


@pytest.mark.parametrize("spelling", ["standard", "url-safe", "unpadded", "newlines"])
def test_inline_pictures_are_decoded_however_they_are_spelled(spelling: str) -> None:
    """Data URIs come in several dialects of base64."""
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    text = {
        "standard": text,
        "url-safe": base64.urlsafe_b64encode(data).decode(),
        "unpadded": text.rstrip("="),
        "newlines": "\n".join(text[i : i + 60] for i in range(0, len(text), 60)),
    }[spelling]
    (image,) = codec.decode_task(state("success", result=[{"image": f"data:image/png;base64,{text}"}]), "ta-1").images
    assert (image.data, image.media_type, image.url) == (data, "image/png", None)


@pytest.mark.parametrize("uri", ["data:image/png;base64", "data:image/png;base64,###", "data:image/png,abc"])
def test_a_damaged_inline_picture_does_not_hide_the_others(uri: str) -> None:
    """The task is paid; what is whole of it must be reachable."""
    task = codec.decode_task(state("success", result=[{"image": uri}, {"image": "https://f.example/1.png"}]), "ta-1")
    assert [image.url for image in task.images] == [uri, "https://f.example/1.png"]


def test_an_answer_that_names_no_task_is_about_the_one_that_was_asked_for() -> None:
    """Its pictures are saved under that name, and its errors carry it."""
    assert codec.decode_task(response(200, {"code": 0, "data": {"status": "success"}}), "ta-7").task_id == "ta-7"


def test_an_error_quotes_the_service_at_a_bearable_length() -> None:
    """Sixty megabytes of words have no place in a log."""
    with pytest.raises(InvalidRequest) as caught:
        codec.decode_balance(rejected(400, 1, "x" * 100_000))
    assert len(str(caught.value)) < 1100


@pytest.mark.parametrize("depth", range(880, 1000, 7))
def test_nesting_near_the_limit_of_the_stack_breaks_nothing(depth: int) -> None:
    """It can be read, and not be written again."""
    codec.decode_envelope(
        WireResponse(status=400, body=b'{"code":1,"detail":' + b"[" * depth + b"1" + b"]" * depth + b"}")
    )


def test_an_answer_about_another_task_is_refused() -> None:
    """Proxies and caches mix things up."""
    with pytest.raises(ProtocolError, match="got 'ta-2'"):
        codec.decode_task(finished("ta-2"), "ta-1")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        pytest.param(rejected(400, 1, "prompt is required"), InvalidRequest, id="400"),
        pytest.param(rejected(401, 1, "Invalid API key"), AuthenticationError, id="401-code-1"),
        pytest.param(rejected(401, 401, "Invalid API key"), AuthenticationError, id="401-code-401"),
        pytest.param(rejected(200, 401, "Invalid API key"), AuthenticationError, id="200-code-401"),
        pytest.param(response(401, body=b"<html>401</html>"), AuthenticationError, id="401-html"),
        pytest.param(rejected(402), InsufficientCredits, id="402"),
        pytest.param(rejected(400, 1, "Insufficient balance"), InsufficientCredits, id="400-wording"),
        pytest.param(rejected(200, 1, "quota exceeded"), InsufficientCredits, id="200-wording"),
        pytest.param(
            rejected(400, 1, "You don't have a credit left, it's all spent"), InsufficientCredits, id="apostrophes"
        ),
        pytest.param(rejected(400, 1, "the prompt 'a credit' breaks the rules"), InvalidRequest, id="quotes-a-prompt"),
        pytest.param(rejected(404, 1, "task not found"), TaskNotFound, id="404"),
        pytest.param(response(404, body=b"<html>nginx</html>"), InvalidRequest, id="404-html"),
        pytest.param(rejected(429), RateLimited, id="429"),
        pytest.param(rejected(500), ServiceUnavailable, id="500"),
        pytest.param(response(502, body=b"<html>Bad gateway</html>"), ServiceUnavailable, id="502-html"),
        pytest.param(response(200, {"code": False, "data": {}}), InvalidRequest, id="code-false"),
        pytest.param(response(200, {"code": None, "data": {}}), InvalidRequest, id="code-null"),
        pytest.param(response(503, {"statusCode": 503, "error": "busy"}), ServiceUnavailable, id="other-shape"),
        pytest.param(response(302, body=b"", location="https://evil.example/x"), InvalidRequest, id="redirect"),
    ],
)
def test_refusals_are_classified_by_status_then_code_then_wording(answer: WireResponse, kind: type[ApiError]) -> None:
    """Each with its HTTP status as an attribute."""
    with pytest.raises(ApiError) as caught:
        codec.decode_task(answer, "ta-1")
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.task_id) == (answer.status, "ta-1")


def test_a_refusal_says_what_the_service_said() -> None:
    """`detail` before `message`, with the status, and what to do."""
    with pytest.raises(AuthenticationError, match=r"Invalid API key \(HTTP 401, code 401\). Check the API key"):
        codec.decode_balance(rejected(401, 401, "Invalid API key"))


def test_a_refused_redirect_names_the_host_it_pointed_to() -> None:
    """And nothing more of it."""
    with pytest.raises(InvalidRequest, match=r"redirected to evil\.example, not followed"):
        codec.decode_balance(response(307, body=b"", location="https://evil.example/steal?q=1"))


@pytest.mark.parametrize("credit", ["12.50", 12.5, 12])
def test_the_balance_is_a_decimal(credit: object) -> None:
    """String or number on the wire."""
    answer = response(200, {"code": 0, "message": "ok", "data": {"credit": credit}})
    assert codec.decode_balance(answer) == Decimal(str(credit))


def test_a_balance_without_a_number_is_a_protocol_error() -> None:
    """Nothing is guessed about money."""
    with pytest.raises(ProtocolError):
        codec.decode_balance(response(200, {"code": 0, "data": {"credit": None}}))


@pytest.mark.parametrize("content_type", ["text/html", "", "application/json"])
def test_content_is_read_by_content(content_type: str) -> None:
    """Content types on this host are not reliable."""
    answer = WireResponse(status=200, body=accepted().body, headers={"content-type": content_type})
    assert codec.decode_envelope(answer).task_id == "ta-1"


@pytest.mark.parametrize("code", [0, "0"])
def test_code_zero_is_success(code: object) -> None:
    """As integer or as text."""
    assert codec.decode_envelope(response(200, {"code": code, "data": {"task_id": "ta-1"}})).ok


@pytest.mark.parametrize("code", [False, True, None, 0.0, 1, "1", [], "zero"])
def test_nothing_else_is_success(code: object) -> None:
    """`false == 0` in Python, and it must not be here."""
    assert not codec.decode_envelope(response(200, {"code": code, "data": {}})).ok


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(accepted().body[:-2], id="cut-json"),
        pytest.param(b"\xff\xfe garbage " + accepted().body, id="garbage-before"),
        pytest.param(accepted().body + b"<html>", id="garbage-behind"),
        pytest.param(gzip.compress(accepted().body), id="gzip"),
        pytest.param(gzip.compress(accepted().body + bytes(50))[:-12], id="cut-gzip"),
        pytest.param(gzip.compress(accepted().body + bytes(50))[:-8] + b"damaged!", id="gzip-with-a-bad-checksum"),
    ],
)
def test_a_task_id_is_salvaged_from_what_arrived(body: bytes) -> None:
    """An id that was paid for is never dropped because the rest is broken."""
    coding = "gzip" if body.startswith(b"\x1f\x8b") else ""
    assert (
        codec.decode_envelope(WireResponse(status=200, body=body, headers={"content-encoding": coding})).task_id
        == "ta-1"
    )


def test_half_a_task_id_is_no_task_id() -> None:
    """A cut id would be asked about for ever."""
    assert codec.decode_envelope(response(200, body=b'{"code":0,"data":{"task_id":"ta-1')).task_id is None


def test_a_compression_bomb_is_inflated_to_the_cap_and_no_further() -> None:
    """One layer, one mebibyte."""
    bomb = gzip.compress(gzip.compress(bytes(200 * 2**20)))
    envelope = codec.decode_envelope(WireResponse(status=200, body=bomb, headers={"content-encoding": "gzip"}))
    assert envelope.task_id is None
    assert len(envelope.message) < 300


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[" * 200_000, id="nested-lists"),
        pytest.param(b'{"a":' * 200_000, id="nested-objects"),
        pytest.param(b'{"code":' + b"1" * 5000 + b"}", id="huge-integer"),
        pytest.param(b'{"code":0,"data":{"task_id":"ta-1","consumed":NaN}}', id="nan"),
        pytest.param(b'{"code":0,"data":{"task_id":"ta-1","consumed":1e999999999999999999}}', id="huge-exponent"),
        pytest.param(b'{"code":0,"data":{"task_id":"\\ud800"}}', id="lone-surrogate"),
        pytest.param('{"code":0,"data":{}}'.encode("utf-16"), id="utf-16"),
        pytest.param(b'\xef\xbb\xbf{"code":0,"data":{}}', id="bom"),
        pytest.param(b"\xff\xff\xff", id="bad-utf-8"),
        pytest.param(b"null", id="null"),
        pytest.param(b"<html>" * 1000, id="html"),
    ],
)
@pytest.mark.parametrize("status", [200, 500])
def test_hostile_bodies_raise_only_our_errors(body: bytes, status: int) -> None:
    """Each of these once broke somebody's client."""
    for decode in (codec.decode_balance, lambda answer: codec.decode_task(answer, "ta-1")):
        try:
            decode(WireResponse(status=status, body=body))
        except NanoBananaError as exc:
            assert len(str(exc)) < 600  # noqa: PT017 - the type is what `except` asserts


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("task_id", "status", "result", "consumed", "created_at", "status_reason", "credit"), JSON),
)
REPLIES = st.fixed_dictionaries({}, optional={"code": JSON, "message": JSON, "detail": JSON, "data": FIELDS | JSON})


@given(status=st.sampled_from([200, 201, 302, 400, 401, 404, 429, 500, 503]), document=REPLIES | JSON)
def test_every_json_document_is_a_task_or_one_of_our_errors(status: int, document: object) -> None:
    """Whatever the service answers; what is read can be written again."""
    answer = WireResponse(status=status, body=json.dumps(document).encode())
    try:
        task = codec.decode_task(answer, "ta-1")
    except NanoBananaError as exc:
        str(exc).encode()
    else:
        repr(task).encode()


@given(
    status=st.integers(200, 599), body=st.binary(max_size=300), coding=st.sampled_from(["", "gzip", "deflate", "br"])
)
def test_no_bytes_break_the_reader(status: int, body: bytes, coding: str) -> None:
    """`read` is total."""
    codec.decode_envelope(WireResponse(status=status, body=body, headers={"content-encoding": coding}))
