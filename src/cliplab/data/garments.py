"""The garments of the wardrobe data set: what tells them apart, and how one is drawn on a mannequin.

Lengths in this file are in units of 1/64 of the picture's side, x to the right and y down, from the picture's centre.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

CATEGORIES = ("dress", "shirt", "toptee")

# No grey and no beige: those belong to the background and to the mannequin.
COLOURS: dict[str, Colour] = {
    "red": (205, 28, 36),
    "orange": (250, 128, 20),
    "yellow": (250, 214, 40),
    "green": (38, 142, 58),
    "teal": (20, 176, 170),
    "blue": (52, 122, 240),
    "navy": (26, 36, 104),
    "purple": (128, 48, 168),
    "pink": (250, 136, 186),
    "brown": (112, 66, 36),
    "black": (26, 26, 28),
    "white": (248, 248, 246),
}

# The attributes a modification can change, each with its values; sleeves and length in ascending order.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "pattern": ("solid", "striped", "dotted", "checked"),
    "sleeves": ("sleeveless", "short", "long"),
    "length": ("short", "medium", "long"),
    "neckline": ("round", "v", "square"),
}


@dataclass(frozen=True)
class Garment:
    """One garment; two garments are the same when all six values are."""

    category: str
    colour: str
    pattern: str
    sleeves: str
    length: str
    neckline: str

    def changes(self, other: "Garment") -> tuple[str, ...]:
        """Names of the attributes whose values differ, in the order of ATTRIBUTES."""
        return tuple(name for name in ATTRIBUTES if getattr(self, name) != getattr(other, name))


def all_garments(category: str) -> list[Garment]:
    """Every garment of a category, 1,296 of them."""
    return [Garment(category, *values) for values in itertools.product(*ATTRIBUTES.values())]


def draw(garment: Garment, size: int, rng: np.random.Generator) -> Image.Image:
    """Draw a garment on a mannequin, RGB, size x size; the same generator state gives the same pose and light.

    Colour, pattern, sleeves, length and neckline stay legible at 64 pixels whatever the generator draws: the jitter
    of pose, scale and light is small beside the differences between the values.
    """
    scene = _Scene.sample(rng)
    frame = _Frame.of(garment, scene, size * _SUPERSAMPLING)
    garment_mask = _garment_mask(garment, scene, frame)
    figure = frame.blank("RGB", scene.mannequin)
    figure.paste(_fabric(garment, scene, frame), mask=garment_mask)
    figure_mask = _body_mask(scene, frame)
    figure_mask.paste(255, mask=garment_mask)
    return _compose(figure.reduce(_SUPERSAMPLING), figure_mask.reduce(_SUPERSAMPLING), scene)


_SUPERSAMPLING = 3
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_LIGHT_COLOURS = ("yellow", "pink", "white")  # their patterns are dark, those of all others light
_SHOULDER_Y = -21.5
_EDGE_WIDTH = 1.6  # of these lines only the half inside the garment shows
_TRIM_WIDTH = 2.8  # around the neckline, the smallest of the attributes
_HEMS = {
    "dress": {"short": 9.0, "medium": 18.5, "long": 28.0},
    "shirt": {"short": -2.0, "medium": 7.0, "long": 16.0},
    "toptee": {"short": -2.0, "medium": 7.0, "long": 16.0},
}
_ZOOM = {"dress": 1.0, "shirt": 1.18, "toptee": 1.18}
_SLEEVE_LENGTHS = {"short": 9.5, "long": 25.0}


@dataclass(frozen=True)
class _Scene:
    """What varies between two pictures of the same garment."""

    scale: float
    angle: float
    shift: Point
    arms: Point
    phase: Point
    shade: float
    light: Point
    mannequin: Colour
    background: tuple[Colour, Colour]

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Self:
        """Sample a scene; it takes no garment, so that attributes and jitter are independent."""
        u = rng.random(18).tolist()
        tone = 0.88 + 0.14 * u[0]
        return cls(
            scale=0.96 + 0.07 * u[1],
            angle=math.radians(-5 + 10 * u[2]),
            shift=(-2 + 4 * u[3], -1 + 2 * u[4]),
            arms=(math.radians(22 + 18 * u[5]), math.radians(22 + 18 * u[6])),
            phase=(u[7], u[8]),
            shade=0.88 + 0.16 * u[9],
            light=(-0.12 + 0.24 * u[10], -0.10 * u[11]),
            mannequin=(round(214 * tone), round(188 * tone), round(164 * tone)),
            background=(_pastel(u[12:15]), _pastel([u[12] + 0.1, *u[15:17]])),
        )


def _pastel(u: list[float]) -> Colour:
    """A dull colour of hue u[0], lighter than the dark garments and darker than the white ones."""
    value = 150 + 66 * u[1]
    red, green, blue = (value * (1 - 0.13 * u[2] * (1 + math.cos(math.tau * (u[0] + k / 3)))) for k in range(3))
    return round(red), round(green), round(blue)


@dataclass(frozen=True)
class _Frame:
    """The map from units to pixels: zoom about the shoulders, rotate, shift."""

    pixels: int
    unit: float
    cos: float
    sin: float
    shift: Point

    @classmethod
    def of(cls, garment: Garment, scene: _Scene, pixels: int) -> Self:
        """The frame of a picture with the given side in pixels."""
        zoom = _ZOOM[garment.category]
        unit, grow = pixels / 64, zoom * scene.scale
        drop = _SHOULDER_Y * (1 - zoom)  # the shoulders stay where they are, so that tops do not leave the picture
        shift = (pixels / 2 + unit * scene.shift[0], pixels / 2 + unit * (scene.shift[1] + drop))
        return cls(pixels, unit * grow, math.cos(scene.angle), math.sin(scene.angle), shift)

    def place(self, points: list[Point]) -> list[Point]:
        """Pixel coordinates of points in units."""
        a, b = self.unit * self.cos, self.unit * self.sin
        dx, dy = self.shift
        return [(a * x - b * y + dx, b * x + a * y + dy) for x, y in points]

    def blank(self, mode: str, colour: int | Colour) -> Image.Image:
        """A picture of one colour."""
        return Image.new(mode, (self.pixels, self.pixels), colour)

    def line(self, brush: ImageDraw.ImageDraw, points: list[Point], colour: Colour, width: float) -> None:
        """Draw a line through points in units."""
        brush.line(self.place(points), fill=colour, width=max(1, round(width * self.unit)), joint="curve")


def _mirror(points: list[Point]) -> list[Point]:
    """Close a right half, given from top to bottom, with its mirror image."""
    return points + [(-x, y) for x, y in reversed(points)]


def _limb(side: int, angle: float, corners: list[Point]) -> list[Point]:
    """A polygon given along an arm, as (distance from the shoulder, distance outwards); side is 1 or -1."""
    sin, cos = math.sin(angle), math.cos(angle)
    return [(side * (8.8 + sin * along + cos * out), -18 + cos * along - sin * out) for along, out in corners]


def _body_mask(scene: _Scene, frame: _Frame) -> Image.Image:
    """The mannequin: neck, trunk, legs and arms; the head is outside the picture."""
    mask = frame.blank("L", 0)
    brush = ImageDraw.Draw(mask)
    trunk = [(3.2, -40.0), (3.4, -25.0), (9.5, -22.3), (11.6, -20.0), (9.2, -13.0), (6.6, -3.0), (8.8, 6.0)]
    legs = [(8.4, 10.0), (5.8, 40.0), (2.0, 40.0), (0.4, 11.0)]
    brush.polygon(frame.place(_mirror(trunk + legs)), fill=255)
    for side, angle in zip((-1, 1), scene.arms, strict=True):
        brush.polygon(frame.place(_limb(side, angle, [(0, 3), (30, 2.1), (30, -2.1), (0, -3)])), fill=255)
    return mask


def _outline(garment: Garment) -> list[Point]:
    """The trunk of the garment without its sleeves, as a closed polygon."""
    hem = _HEMS[garment.category][garment.length]
    shoulder = [(0.0, -23.4), (6.6, -23.4)]
    shoulder += [(9.4, -22.2), (8.6, -17.5)] if garment.sleeves == "sleeveless" else [(11.8, -20.6)]
    if garment.category == "dress":
        side = [(9.6, -13.0), (7.4, -4.0), (8.6 + 0.36 * (hem + 4), hem - 1), (0.0, hem + 1)]
    elif garment.category == "shirt":
        side = [(10.8, -13.0), (10.8, hem), (0.0, hem)]
    else:
        flare = 8.2 + 0.34 * (hem + 6)
        side = [(9.4, -13.0), (8.0, -6.0), (flare, hem - 2.0), (flare * 0.6, hem + 0.6), (0.0, hem + 1.4)]
    return _mirror(shoulder + side)


def _sleeves(garment: Garment, scene: _Scene) -> list[list[Point]]:
    """The polygons of both sleeves, from shoulder to armpit; none on a sleeveless garment."""
    if garment.sleeves == "sleeveless":
        return []
    end, wide = _SLEEVE_LENGTHS[garment.sleeves], 4.6 if garment.category == "shirt" else 4.1
    corners = [(-1, wide), (end, wide - 0.6), (end, 0.6 - wide), (6.5, -wide)]
    return [_limb(side, angle, corners) for side, angle in zip((-1, 1), scene.arms, strict=True)]


def _opening(neckline: str) -> list[Point]:
    """The hole for the neck, open at the top."""
    if neckline == "v":
        return _mirror([(6.0, -25.0), (5.4, -23.0), (0.0, -7.5)])
    if neckline == "square":
        return _mirror([(6.8, -25.0), (6.8, -13.5)])
    turns = [math.pi / 2 * k / 8 for k in range(9)]
    return _mirror([(5.6, -25.0)] + [(5.6 * math.cos(t), -22.5 + 5.2 * math.sin(t)) for t in turns])


def _garment_mask(garment: Garment, scene: _Scene, frame: _Frame) -> Image.Image:
    mask = frame.blank("L", 0)
    brush = ImageDraw.Draw(mask)
    for polygon in [_outline(garment), *_sleeves(garment, scene)]:
        brush.polygon(frame.place(polygon), fill=255)
    brush.polygon(frame.place(_opening(garment.neckline)), fill=0)
    return mask


def _fabric(garment: Garment, scene: _Scene, frame: _Frame) -> Image.Image:
    """Cloth, pattern and seams over the whole picture; the garment's mask cuts it to shape."""
    base = COLOURS[garment.colour]
    fabric = frame.blank("RGB", base)
    brush = ImageDraw.Draw(fabric)
    pattern = _mix(base, _BLACK, 0.55) if garment.colour in _LIGHT_COLOURS else _mix(base, _WHITE, 0.74)
    _PATTERNS[garment.pattern](brush, frame, scene.phase, pattern)
    edge = _mix(base, _WHITE, 0.35) if garment.colour == "black" else _mix(base, _BLACK, 0.42)
    for polygon, width in [(_outline(garment), _EDGE_WIDTH), (_opening(garment.neckline), _TRIM_WIDTH)]:
        frame.line(brush, [*polygon, polygon[0]], edge, width)
    for sleeve in _sleeves(garment, scene):
        frame.line(brush, sleeve, edge, _EDGE_WIDTH)
    if garment.category == "dress":
        frame.line(brush, [(-12, -4), (12, -4)], edge, 1.3)
    return fabric


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    """The colour that lies the given share of the way from the first to the second."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _steps(period: float, phase: float) -> list[float]:
    """Positions of a repeated mark across the picture."""
    count = math.ceil(36 / period)
    return [period * (k + phase) for k in range(-count, count)]


def _solid(brush: ImageDraw.ImageDraw, frame: _Frame, phase: Point, colour: Colour) -> None:
    """No pattern."""


def _stripes(brush: ImageDraw.ImageDraw, frame: _Frame, phase: Point, colour: Colour) -> None:
    for y in _steps(5.0, phase[1]):
        frame.line(brush, [(-40, y), (40, y)], colour, 1.7)


def _checks(brush: ImageDraw.ImageDraw, frame: _Frame, phase: Point, colour: Colour) -> None:
    _stripes(brush, frame, phase, colour)
    for x in _steps(5.0, phase[0]):
        frame.line(brush, [(x, -40), (x, 40)], colour, 1.7)


def _dots(brush: ImageDraw.ImageDraw, frame: _Frame, phase: Point, colour: Colour) -> None:
    radius = 1.35 * frame.unit
    for row, y in enumerate(_steps(4.4, phase[1])):
        for x, py in frame.place([(x + 2.6 * (row % 2), y) for x in _steps(5.2, phase[0])]):
            brush.ellipse((x - radius, py - radius, x + radius, py + radius), fill=colour)


_PATTERNS = {"solid": _solid, "striped": _stripes, "dotted": _dots, "checked": _checks}


def _compose(figure: Image.Image, mask: Image.Image, scene: _Scene) -> Image.Image:
    """Light the figure and set it before a graded background."""
    ramp = np.linspace(-1, 1, figure.width, dtype=np.float32)
    across, down = ramp[None, :, None], ramp[:, None, None]
    lit = np.asarray(figure, np.float32) * (scene.shade + scene.light[0] * across + scene.light[1] * down)
    top, bottom = (np.array(colour, np.float32) for colour in scene.background)
    wall = top + (bottom - top) * (down + 1) / 2
    share = np.asarray(mask, np.float32)[:, :, None] / 255
    pixels = wall + (lit - wall) * share
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
