"""Why a task has no image is read from the words of the service and of the model, in the languages of their users."""

import time

import pytest

from nanobanana_async import ReasonKind, Task, TaskStatus, classify_reason
from nanobanana_async.wire.refusals import says_empty_account

REFUSED_REASONS = [
    "IMAGE_SAFETY",
    "Gemini API error: IMAGE_PROHIBITED_CONTENT",
    "finishReason: SAFETY",
    "RECITATION",
    "blocked [IMAGE_SAFETY]: the image was blocked due to safety policy violation, modify your prompt and try again",
    "The output could not be generated. It contains sensitive words that violate Responsible AI practices.",
    "Your request was flagged by our moderation system",
    "prompt was rejected",
    "内容违规",
]
REFUSED_TEXTS = [
    "I'm sorry, but I can't help with that.",
    "I can\N{RIGHT SINGLE QUOTATION MARK}t create that image.",
    "I cannot create images of real people.",
    "I'm unable to generate this.",
    "我无法生成这张图片。",
    "申し訳ありませんが、その画像は生成できません。",
    "죄송합니다. 그 이미지는 생성할 수 없습니다.",
    "No puedo generar esa imagen.",
    "Não posso criar essa imagem.",
    "Je ne peux pas créer cette image.",
    "Ich kann dieses Bild leider nicht erstellen.",
    "Non posso generare questa immagine.",
    "Я не могу создать такое изображение.",
]
ERRORS = [
    "Internal error, please try again",
    "the image could not be generated, please try again later",
    "upstream timed out",
    "Request failed with status 502",
    "model overloaded",
    "IMAGE_OTHER",
    "请稍后重试",
]
UNKNOWNS = [None, "", "x", "a fire safety poster", "prompt has 512 characters"]


def failed(reason: str | None) -> Task:
    """Return a failed task."""
    return Task(task_id="ta-1", status=TaskStatus.FAILED, reason=reason)


def empty(*texts: str, reason: str | None = None) -> Task:
    """Return a task that has succeeded with texts."""
    return Task(task_id="ta-1", status=TaskStatus.SUCCESS, texts=texts, reason=reason)


@pytest.mark.parametrize("reason", REFUSED_REASONS)
def test_a_refusal_is_read_from_the_words_of_the_service(reason: str) -> None:
    """Even if they advise to try again."""
    assert classify_reason(failed(reason)) is ReasonKind.REFUSED


@pytest.mark.parametrize("text", REFUSED_TEXTS)
def test_a_refusal_is_read_from_the_words_of_the_model(text: str) -> None:
    """It comes as a success, and is charged."""
    assert classify_reason(empty(text)) is ReasonKind.REFUSED


@pytest.mark.parametrize("reason", ERRORS)
def test_an_error_of_the_service_is_read_from_its_words(reason: str) -> None:
    """It may be gone the next time."""
    assert classify_reason(failed(reason)) is ReasonKind.ERROR


@pytest.mark.parametrize("reason", UNKNOWNS)
def test_a_failure_without_telling_words_is_unknown(reason: str | None) -> None:
    """The kind is never guessed."""
    assert classify_reason(failed(reason)) is ReasonKind.UNKNOWN


@pytest.mark.parametrize("text", ["", "Here is your image!", "A page about internal errors. Shall I try again?"])
def test_a_success_without_an_image_is_empty(text: str) -> None:
    """The model chats about anything."""
    assert classify_reason(empty(text)) is ReasonKind.EMPTY


def test_no_image_in_the_words_of_a_failure_is_empty() -> None:
    """The finish reason NO_IMAGE of the model."""
    assert classify_reason(failed("NO_IMAGE")) is ReasonKind.EMPTY


@pytest.mark.parametrize(
    "text", ["\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}" * 10**6, "'" * 10**6, "kann " * 10**5]
)
def test_a_hostile_text_takes_no_time(text: str) -> None:
    """It is read on the event loop."""
    began_s = time.perf_counter()
    classify_reason(failed(text))
    classify_reason(empty(text))
    says_empty_account("insufficient" + "_" * 10**5)
    assert time.perf_counter() - began_s < 1


@pytest.mark.parametrize("quoted", ["'{}'", '"{}"', "“{}”", "«{}»", "「{}」"])
def test_quoted_words_are_not_read(quoted: str) -> None:
    """They may be the prompt."""
    poster = quoted.format("I cannot create: content policy violation")
    assert classify_reason(empty(f"Here is your poster {poster}")) is ReasonKind.EMPTY
    assert classify_reason(failed(f"internal error for {poster}")) is ReasonKind.ERROR
