"""Requests are validated on construction, before anything is charged."""

import io
import pickle
from decimal import Decimal
from pathlib import Path

import attrs
import pytest
from PIL import Image

from nanobanana_async import GeneratedImage, GenerationRequest, ImageSource, Task, TaskStatus


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        pytest.param({"prompt": ""}, "prompt: expected text", id="empty-prompt"),
        pytest.param({"prompt": " \n"}, "prompt: expected text", id="blank-prompt"),
        pytest.param({"prompt": "\ud800"}, "surrogate", id="half-a-character"),
        pytest.param({"images": ["https://a.example/1.png"] * 5}, "at most 4, got 5", id="five-images"),
        pytest.param({"images": ["fox.png"]}, "pass pathlib.Path", id="path-as-text"),
        pytest.param({"images": ["https://u:p@a.example/1.png"]}, "user name or password", id="credentials-in-url"),
        pytest.param({"aspect_ratio": "16x9"}, "such as '16:9', got '16x9'", id="ratio-with-x"),
        pytest.param({"aspect_ratio": "0:1"}, "aspect_ratio", id="ratio-of-nothing"),
        pytest.param({"aspect_ratio": "16:9\n"}, "aspect_ratio", id="ratio-with-newline"),
        pytest.param({"callback_url": "app.example/hook"}, "absolute http", id="relative-callback"),
        pytest.param({"callback_url": "ftp://app.example/"}, "absolute http", id="ftp-callback"),
        pytest.param({"callback_url": "https://app.example/a b"}, "Percent-encode", id="blank-in-callback"),
        pytest.param({"callback_url": "https://app.example:99999/"}, "not a URL", id="impossible-port"),
        pytest.param({"model": ""}, "model: expected text", id="no-model"),
        pytest.param({"extra": {"prompt": "x", "seed": 1}}, "extra: got prompt", id="extra-overrides"),
    ],
)
def test_an_invalid_value_is_rejected_with_its_name_and_an_action(fields: dict[str, object], says: str) -> None:
    """The error contains the field, the value and what to do."""
    with pytest.raises(ValueError, match=r".") as caught:
        GenerationRequest(**{"prompt": "a fox", **fields})  # type: ignore[arg-type]
    assert says in str(caught.value)


@pytest.mark.parametrize("ratio", ["1:1", "16:9", "21:9", "4:5", "auto", "7:3", None])
def test_auto_and_any_n_to_m_are_valid_ratios(ratio: str | None) -> None:
    """The service adds ratios without notice."""
    assert GenerationRequest("a fox", aspect_ratio=ratio).aspect_ratio == ratio


def test_every_kind_of_reference_image_is_accepted() -> None:
    """URLs, data URIs, paths, bytes and PIL images are accepted."""
    kinds: list[ImageSource] = [
        "https://a.example/1.png",
        "data:image/png;base64,AAAA",
        Path("fox.png"),
        Image.new("RGB", (1, 1)),
    ]
    assert len(GenerationRequest("a fox", images=kinds).images) == 4
    assert GenerationRequest("a fox", images=b"...").images == (b"...",)


def test_a_single_image_is_not_iterated() -> None:
    """A str is iterable, so a single image without a list is wrapped."""
    assert GenerationRequest("a fox", images="https://a.example/1.png").images == ("https://a.example/1.png",)


def test_a_value_that_is_not_an_image_is_a_type_error() -> None:
    """A file object is not a valid image."""
    with pytest.raises(TypeError, match="images: expected URL"):
        GenerationRequest("a fox", images=[io.BytesIO()])  # type: ignore[list-item]


def test_image_size_is_lower_case_on_the_wire() -> None:
    """The service knows 2k, and users write 2K."""
    assert GenerationRequest("a fox", image_size="2K").image_size == "2k"


def test_a_request_does_not_print_its_images() -> None:
    """The repr shows the number of images only."""
    assert repr(GenerationRequest("a fox", images=[b"x" * 10_000])).count("x") < 10


def test_values_are_frozen_comparable_and_picklable() -> None:
    """Requests and tasks are passed between processes."""
    task = Task(
        task_id="ta-1",
        status=TaskStatus.SUCCESS,
        images=(GeneratedImage(url="https://a.example/1.png"),),
        consumed=Decimal("0.5"),
        raw={"a": 1},
    )
    assert pickle.loads(pickle.dumps(task)) == task  # noqa: S301 - pickled here
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        task.status = TaskStatus.FAILED  # type: ignore[misc]


@pytest.mark.parametrize("status", list(TaskStatus))
def test_only_success_and_failed_are_final(status: TaskStatus) -> None:
    """An unrecognized status is not final."""
    assert status.is_final is (status in {TaskStatus.SUCCESS, TaskStatus.FAILED})
