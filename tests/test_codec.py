"""Encoding and decoding of every variant of the wire. No byte sequence raises a foreign error."""

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
    """Return the JSON document sent for *request*."""
    document: dict[str, object] = json.loads(codec.encode_submit("https://a.example", request).body or b"")
    return document


def test_unset_fields_are_left_out_never_null() -> None:
    """Unset fields are omitted, because the service was never seen to accept a null."""
    assert sent(GenerationRequest("a fox")) == {"model": "google/gempix2", "prompt": "a fox"}


def test_every_field_has_the_services_name() -> None:
    """The field names are those of the service's documentation."""
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
def test_extra_that_json_cannot_encode_is_rejected_by_name(value: object) -> None:
    """The error is raised before anything is charged."""
    with pytest.raises(ValueError, match="extra: cannot be encoded as JSON"):
        codec.encode_submit("https://a.example", GenerationRequest("a fox", extra={"x": value}))  # type: ignore[dict-item]


def test_a_task_id_cannot_change_the_query() -> None:
    """An id with an ampersand is percent-encoded."""
    assert codec.encode_query("https://a.example", "a&b=c/../d").url.endswith("?task_id=a%26b%3Dc%2F..%2Fd")


def test_a_finished_task_is_decoded_completely() -> None:
    """Images, texts, credits as Decimal, dates with a zone, and unknown fields are kept."""
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
def test_every_shape_of_result_is_normalized(result: object, images: int, texts: int) -> None:
    """Null, one object, strings and mixtures have all been observed."""
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
def test_credits_are_decimal_or_none(consumed: object, expected: Decimal | None) -> None:
    """An invalid price does not hide a charged image."""
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
def test_an_unrecognized_status_is_treated_as_running(word: object, expected: str) -> None:
    """Case and spaces are ignored, and new statuses do no harm."""
    assert codec.decode_task(state(word), "ta-1").status.value == expected


@pytest.mark.parametrize("spelling", ["standard", "url-safe", "unpadded", "newlines"])
def test_inline_images_are_decoded_in_every_base64_variant(spelling: str) -> None:
    """Data URIs use several variants of base64."""
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
def test_a_damaged_inline_image_does_not_hide_the_others(uri: str) -> None:
    """The task is charged, so its other images remain accessible."""
    task = codec.decode_task(state("success", result=[{"image": uri}, {"image": "https://f.example/1.png"}]), "ta-1")
    assert [image.url for image in task.images] == [uri, "https://f.example/1.png"]


def test_a_response_without_a_task_id_gets_the_queried_one() -> None:
    """Files and errors carry the queried id."""
    assert codec.decode_task(response(200, {"code": 0, "data": {"status": "success"}}), "ta-7").task_id == "ta-7"


def test_an_error_quotes_a_bounded_part_of_the_message() -> None:
    """A message of 64 MiB does not end up in a log."""
    with pytest.raises(InvalidRequest) as caught:
        codec.decode_balance(rejected(400, 1, "x" * 100_000))
    assert len(str(caught.value)) < 1100


@pytest.mark.parametrize("depth", range(880, 1000, 7))
def test_nesting_near_the_stack_limit_is_handled(depth: int) -> None:
    """Such a document can be decoded, but not encoded again."""
    codec.decode_envelope(
        WireResponse(status=400, body=b'{"code":1,"detail":' + b"[" * depth + b"1" + b"]" * depth + b"}")
    )


@pytest.mark.parametrize(
    "message",
    [
        "unbalanced brackets in the prompt",
        "closing quotation mark is missing",
        "white balance of the reference image is off",
        "the white balance is too low",
        "a discredited source",
        "not enough detail in the prompt",
        "load balancer timed out",
        "credit the photographer",
        "balance the colours",
        "no balance between light and shade",
        "the prompt exceeded 2000 characters",
    ],
)
def test_words_inside_words_are_no_empty_account(message: str) -> None:
    """M5: only whole phrases say that the account is empty."""
    received = rejected(400, 1, message)
    assert type(codec.to_api_error(received, codec.decode_envelope(received))) is InvalidRequest


@pytest.mark.parametrize(
    "message",
    [
        "insufficient credit",
        "Insufficient account balance",
        "insufficient_user_quota",
        "not enough credits",
        "Your credit balance is too low",
        "You are out of credits",
        "you exceeded your current quota",
        "Quota exceeded",
        "no credits left",
        "You do not have enough credits",
        "余额不足",
    ],
)
def test_whole_phrases_say_that_the_account_is_empty(message: str) -> None:
    """M5: these are the phrases of this and similar services."""
    received = rejected(400, 1, message)
    assert type(codec.to_api_error(received, codec.decode_envelope(received))) is InsufficientCredits


def test_a_response_about_another_task_is_rejected() -> None:
    """Proxies and caches may mix up responses."""
    with pytest.raises(ProtocolError, match="got 'ta-2'"):
        codec.decode_task(finished("ta-2"), "ta-1")


@pytest.mark.parametrize(
    ("received", "kind"),
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
        pytest.param(rejected(400, 1, "the prompt 'insufficient funds' is bad"), InvalidRequest, id="quotes-a-prompt"),
        pytest.param(rejected(500, 1, "insufficient credit"), ServiceUnavailable, id="500-wording"),
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
def test_errors_are_classified_by_status_then_code_then_words(received: WireResponse, kind: type[ApiError]) -> None:
    """Each error carries its HTTP status."""
    with pytest.raises(ApiError) as caught:
        codec.decode_task(received, "ta-1")
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.task_id) == (received.status, "ta-1")


def test_an_error_contains_the_services_message() -> None:
    """`detail` comes before `message`, with the status and the advice."""
    with pytest.raises(AuthenticationError, match=r"Invalid API key \(HTTP 401, code 401\). Check the API key"):
        codec.decode_balance(rejected(401, 401, "Invalid API key"))


def test_a_redirect_error_names_the_target_host() -> None:
    """The rest of the target URL is left out."""
    with pytest.raises(InvalidRequest, match=r"redirected to evil\.example, not followed"):
        codec.decode_balance(response(307, body=b"", location="https://evil.example/steal?q=1"))


@pytest.mark.parametrize("credit", ["12.50", 12.5, 12])
def test_the_balance_is_a_decimal(credit: object) -> None:
    """The balance may be a string or a number on the wire."""
    received = response(200, {"code": 0, "message": "ok", "data": {"credit": credit}})
    assert codec.decode_balance(received) == Decimal(str(credit))


def test_a_balance_without_a_number_is_a_protocol_error() -> None:
    """A missing balance is an error, not zero."""
    with pytest.raises(ProtocolError):
        codec.decode_balance(response(200, {"code": 0, "data": {"credit": None}}))


@pytest.mark.parametrize("content_type", ["text/html", "", "application/json"])
def test_bodies_are_decoded_by_content(content_type: str) -> None:
    """The content types of this service are not reliable."""
    received = WireResponse(status=200, body=accepted().body, headers={"content-type": content_type})
    assert codec.decode_envelope(received).task_id == "ta-1"


@pytest.mark.parametrize("code", [0, "0"])
def test_code_zero_is_success(code: object) -> None:
    """Code 0 may be an integer or text."""
    assert codec.decode_envelope(response(200, {"code": code, "data": {"task_id": "ta-1"}})).ok


@pytest.mark.parametrize("code", [False, True, None, 0.0, 1, "1", [], "zero"])
def test_no_other_code_is_success(code: object) -> None:
    """`false == 0` in Python, and it must not count here."""
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
def test_a_task_id_is_salvaged_from_a_truncated_body(body: bytes) -> None:
    """The id of a charged task is kept even if the rest is damaged."""
    coding = "gzip" if body.startswith(b"\x1f\x8b") else ""
    assert (
        codec.decode_envelope(WireResponse(status=200, body=body, headers={"content-encoding": coding})).task_id
        == "ta-1"
    )


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"code":0,"task_id":"ta-1"}', id="N1-top"),
        pytest.param(b'[{"code":0,"data":{"task_id":"ta-1"}}]', id="N1-list"),
        pytest.param(b'{"code":0,"data":[{"task_id":"ta-1"}]}', id="N1-list-in-data"),
        pytest.param(b'{"code":0,"data":{"task":{"task_id":"ta-1"}}}', id="N1-nested"),
        pytest.param(b'{"code":0,"data":{"task_id":null},"result":{"task_id":"ta-1"}}', id="N1-null-beside"),
        pytest.param(b'{"code":0,"data":{"taskId":"ta-1"}}', id="N1-camel-case"),
        pytest.param(b'"{\\"code\\":0,\\"data\\":{\\"task_id\\":\\"ta-1\\"}}"', id="N1-json-in-a-string"),
        pytest.param(b'{"body":"{\\"task_id\\":\\"ta-1\\"}"}', id="N1-json-in-a-field"),
        pytest.param('{"code":0,"data":{"task_id":"ta-1"'.encode("utf-16-le"), id="N1-cut-utf-16"),
        pytest.param(b'{"data":"{\\"task_id\\":\\"ta-1\\"', id="N1-cut-json-in-a-string"),
    ],
)
def test_n1_a_task_id_is_found_wherever_it_is(body: bytes) -> None:
    """The same bytes cut by one would be salvaged."""
    assert codec.decode_envelope(response(200, body=body)).task_id == "ta-1"


def test_n1_the_id_in_a_callback_is_found_wherever_it_is() -> None:
    """A callback is a path by which an id can come, too."""
    assert codec.decode_callback(b'{"data":{"task_id":"ta-1","status":"success"}}').task_id == "ta-1"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"tasks":[{"task_id":"ta-1"},{"task_id":"ta-2"}]}', id="decoded"),
        pytest.param(b'{"tasks":[{"task_id":"ta-1"},{"task_id":"ta-2"}', id="cut"),
    ],
)
def test_n1_several_ids_say_nothing(body: bytes) -> None:
    """One of them would be the image of another user."""
    assert codec.decode_envelope(response(200, body=body)).task_id is None


@pytest.mark.parametrize("body", [b'{"code":0,"data":{"task_id":"ta-1', b'{"code":0,"data":{"task_id":12'])
def test_half_a_task_id_is_not_salvaged(body: bytes) -> None:
    """A truncated id would be polled without end."""
    assert codec.decode_envelope(response(200, body=body)).task_id is None


def test_a_compression_bomb_is_decompressed_up_to_the_limit() -> None:
    """One layer is decompressed, up to one mebibyte."""
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
def test_hostile_bodies_raise_only_package_errors(body: bytes, status: int) -> None:
    """Each of these bodies has broken some client."""
    for decode in (codec.decode_balance, lambda received: codec.decode_task(received, "ta-1")):
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
RESPONSES = st.fixed_dictionaries({}, optional={"code": JSON, "message": JSON, "detail": JSON, "data": FIELDS | JSON})


@given(status=st.sampled_from([200, 201, 302, 400, 401, 404, 429, 500, 503]), document=RESPONSES | JSON)
def test_every_json_document_is_a_task_or_a_package_error(status: int, document: object) -> None:
    """What is decoded can also be encoded again."""
    received = WireResponse(status=status, body=json.dumps(document).encode())
    try:
        task = codec.decode_task(received, "ta-1")
    except NanoBananaError as exc:
        str(exc).encode()
    else:
        repr(task).encode()


@given(
    status=st.integers(200, 599), body=st.binary(max_size=300), coding=st.sampled_from(["", "gzip", "deflate", "br"])
)
def test_decode_envelope_accepts_any_bytes(status: int, body: bytes, coding: str) -> None:
    """`decode_envelope` is total."""
    codec.decode_envelope(WireResponse(status=status, body=body, headers={"content-encoding": coding}))


def test_t2_an_inline_image_is_kept_once() -> None:
    """T2: its text in `raw` would double the memory."""
    uri = f"data:image/png;base64,{base64.b64encode(bytes(30_000)).decode()}"
    task = codec.decode_task(state("success", result=[{"image": uri, "text": "here"}]), "ta-1")
    assert task.images[0].data == bytes(30_000)
    assert task.raw["result"] == [{"image": f"{uri[:40]}...", "text": "here"}]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"detail": [{"input": {"task_id": "ta-0"}}]}, id="echo-of-the-input"),
        pytest.param(
            {"code": 400, "message": "bad", "data": {"prompt": '{"task_id": "scene-7"}'}}, id="echo-of-a-prompt"
        ),
        pytest.param({"code": 402, "message": "insufficient credits", "data": {"task_id": 0}}, id="zero"),
        pytest.param({"code": 0, "data": {"task_id": -1}}, id="negative"),
    ],
)
def test_n1_an_id_that_a_rejection_quotes_is_no_task(body: object) -> None:
    """The rejected submit would be taken for an accepted one, with the image of another."""
    assert codec.decode_envelope(response(422, body)).task_id is None
