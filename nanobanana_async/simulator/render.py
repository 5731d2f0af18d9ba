"""Render a PNG for a prompt: a seeded landscape with the prompt as caption. Needs Pillow."""

import io
import math
from random import Random
from typing import Final, TypeAlias
from zlib import crc32

# Pillow's types name numpy, which is not installed:
# pyright: reportUnknownMemberType=false
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from nanobanana_async.simulator.specs import ImageSpec

Colour: TypeAlias = tuple[int, int, int]

_PALETTES: Final[tuple[tuple[Colour, Colour, Colour, Colour], ...]] = (
    # sky above, sky at the horizon, sun, hills
    ((38, 58, 112), (250, 176, 128), (255, 236, 190), (58, 46, 88)),
    ((84, 160, 210), (232, 244, 240), (255, 250, 222), (46, 104, 92)),
    ((18, 24, 54), (96, 92, 150), (240, 240, 255), (24, 32, 60)),
    ((226, 122, 96), (255, 224, 160), (255, 248, 214), (112, 62, 74)),
    ((110, 190, 200), (255, 232, 214), (255, 255, 240), (70, 116, 128)),
    ((150, 120, 190), (255, 206, 214), (255, 244, 230), (74, 62, 110)),
    ((240, 190, 90), (255, 240, 196), (255, 255, 236), (120, 96, 48)),
)
_LAYERS: Final = 5


def render_png(spec: ImageSpec) -> bytes:
    """Return an encoded PNG of the requested size. The same spec gives the same image."""
    rng = Random(crc32(spec.prompt.encode()))
    above, horizon, sun, hills = rng.choice(_PALETTES)
    width, height = spec.width, spec.height
    if spec.is_blank:
        return _encoded(Image.new("RGB", (width, height), sun))
    sky = Image.linear_gradient("L").resize((width, height))
    image = ImageOps.colorize(sky, black=above, white=horizon)
    _add_sun(image, rng, sun)
    draw = ImageDraw.Draw(image)
    for layer in range(_LAYERS):
        depth = (layer + 1) / _LAYERS
        colour = _mix(horizon, hills, 0.25 + 0.75 * depth)
        draw.polygon(_ridge(rng, width, height, base=0.5 + 0.36 * depth), fill=colour)
    _add_caption(image, spec.prompt)
    return _encoded(image)


def _encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=3)
    return file.getvalue()


def _add_sun(image: Image.Image, rng: Random, colour: Colour) -> None:
    width, height = image.size
    radius = min(width, height) * rng.uniform(0.06, 0.12)
    x, y = width * rng.uniform(0.2, 0.8), height * rng.uniform(0.18, 0.42)
    # The glow is soft, so a small one looks the same when scaled up, and is much faster to blur.
    small = Image.new("L", (128, 128))
    ImageDraw.Draw(small).ellipse((44, 44, 84, 84), fill=150)
    glow = small.filter(ImageFilter.GaussianBlur(14)).resize((int(radius * 7), int(radius * 7)))
    image.paste(colour, (int(x - radius * 3.5), int(y - radius * 3.5)), glow)
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _ridge(rng: Random, width: int, height: int, *, base: float) -> list[tuple[float, float]]:
    """Return the outline of one row of hills: a sum of three sines, closed along the bottom edge."""
    waves = [(rng.uniform(0.6, 1.6) * 2**n, rng.uniform(0, math.tau), 0.05 / 1.7**n) for n in range(3)]
    line: list[tuple[float, float]] = []
    for step in range(65):
        share = step / 64
        lift = sum(size * math.sin(math.tau * speed * share + phase) for speed, phase, size in waves)
        line.append((width * share, height * (base + lift)))
    return [*line, (width, height), (0, height)]


def _add_caption(image: Image.Image, prompt: str) -> None:
    width, height = image.size
    size = max(14, round(min(width, height) * 0.042))
    font = ImageFont.load_default(size)
    lines = _wrapped(" ".join(prompt.split())[:300], font, width * 0.84)
    line_height = round(size * 1.35)
    top = height - round(height * 0.05) - line_height * len(lines)
    band = Image.new("L", image.size)
    margin = round(size * 0.7)
    box = (width * 0.08 - margin, top - margin, width * 0.92 + margin, top + line_height * len(lines) + margin * 0.6)
    ImageDraw.Draw(band).rounded_rectangle(box, radius=margin, fill=120)
    image.paste((12, 14, 24), (0, 0), band)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((width / 2, top + number * line_height), line, font=font, fill=(255, 255, 255), anchor="ma")


def _wrapped(text: str, font: "ImageFont.ImageFont | ImageFont.FreeTypeFont", width: float) -> list[str]:
    """Return *text* in at most three lines of *width* pixels; the last one ends with dots if text is left."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines[:3]
    if len(lines) > 3 or font.getlength(shown[-1]) > width:
        while shown[-1] and font.getlength(f"{shown[-1]}...") > width:
            shown[-1] = shown[-1][:-1]
        shown[-1] = f"{shown[-1].rstrip()}..."
    return shown


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue
