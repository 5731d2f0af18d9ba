"""`ImageSpec`: which image a simulated task renders."""

import math
from collections.abc import Mapping

import attrs


@attrs.frozen(kw_only=True)
class ImageSpec:
    """Prompt and size of an image to render."""

    prompt: str
    width: int
    height: int
    is_blank: bool = False
    """Whether it has one colour all over."""

    def with_flaw(self, flaw: str | None) -> "ImageSpec":
        """Return the image that is delivered instead. *flaw* is one of `profile.FLAWS`, or None."""
        area, ratio = self.width * self.height, self.width / self.height
        if flaw == "wrong_sizes":
            return _spec(self.prompt, area / 4 if area > 2**21 else area * 4, ratio)
        if flaw == "wrong_ratios":
            return _spec(self.prompt, area, 16 / 9 if abs(ratio - 1) < 0.1 else 1.0)
        return attrs.evolve(self, is_blank=flaw == "blank_images")


def requested_spec(request: Mapping[str, object]) -> ImageSpec:
    """Return prompt and size: 1k, 2k or 4k is the area of a square of 1024, 2048 or 4096, and the ratio is N:M."""
    side = {"2k": 2048, "4k": 4096}.get(str(request.get("image_size")), 1024)
    wide, _, high = str(request.get("aspect_ratio", "1:1")).partition(":")
    ratio = int(wide) / int(high) if wide.isdigit() and high.isdigit() and int(high) else 1.0
    return _spec(str(request["prompt"]), side**2, min(max(ratio, 0.25), 4.0))


def _spec(prompt: str, area: float, ratio: float) -> ImageSpec:
    """Return an image of about that area, with sides that are multiples of 16."""
    width, height = (16 * round(math.sqrt(side) / 16) for side in (area * ratio, area / ratio))
    return ImageSpec(prompt=prompt, width=width, height=height)
