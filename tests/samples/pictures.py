"""Draws the sample pictures: simple scenes with shapes and colours that a test can name."""

import math
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT = 320, 240


def make_pictures(folder: Path) -> None:
    """Draw every picture of this module into `folder`, 320 by 240 pixels, as PNG or JPEG by suffix."""
    for name, draw in _PICTURES.items():
        image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
        draw(ImageDraw.Draw(image))
        image.save(folder / name, quality=85, optimize=True)


def _house(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, 320, 170), fill="skyblue")
    draw.rectangle((0, 170, 320, 240), fill="forestgreen")
    draw.rectangle((90, 100, 230, 200), fill="bisque", outline="sienna", width=3)
    draw.polygon([(75, 100), (160, 40), (245, 100)], fill="firebrick")
    draw.rectangle((145, 145, 180, 200), fill="saddlebrown")
    for left in (104, 194):
        draw.rectangle((left, 118, left + 24, 142), fill="lightyellow", outline="sienna", width=2)
    draw.ellipse((265, 20, 300, 55), fill="gold")


def _sunset(draw: ImageDraw.ImageDraw) -> None:
    for row in range(150):
        share = row / 150
        draw.line((0, row, 320, row), fill=(int(70 + 185 * share), int(40 + 110 * share), int(110 - 50 * share)))
    draw.ellipse((125, 95, 195, 165), fill="orange")
    draw.rectangle((0, 150, 320, 240), fill="midnightblue")
    for row in range(156, 236, 12):
        draw.line((110 + row // 8, row, 210 - row // 8, row), fill="orange", width=3)


def _balloons(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, 320, 240), fill="lightcyan")
    for left, top, colour in ((40, 40, "red"), (125, 20, "blue"), (210, 50, "green")):
        draw.line((left + 35, top + 85, 160, 235), fill="black", width=2)
        draw.ellipse((left, top, left + 70, top + 88), fill=colour)
        draw.ellipse((left + 14, top + 14, left + 28, top + 34), fill="white")


def _chessboard(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, 320, 240), fill="dimgray")
    for row in range(8):
        for column in range(8):
            left, top = 48 + 28 * column, 8 + 28 * row
            colour = "black" if (row + column) % 2 else "white"
            draw.rectangle((left, top, left + 27, top + 27), fill=colour)


def _clock(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle((0, 0, 320, 240), fill="tan")
    draw.ellipse((60, 20, 260, 220), fill="ivory", outline="black", width=6)
    for hour in range(12):
        _hand(draw, 82, 94, hour / 12, width=5)
    _hand(draw, 0, 50, 3 / 12, width=7)
    _hand(draw, 0, 78, 0, width=4)


def _hand(draw: ImageDraw.ImageDraw, start: float, end: float, turn: float, *, width: int) -> None:
    x, y = math.sin(2 * math.pi * turn), -math.cos(2 * math.pi * turn)
    draw.line((160 + start * x, 120 + start * y, 160 + end * x, 120 + end * y), fill="black", width=width)


def _receipt(draw: ImageDraw.ImageDraw) -> None:
    lines = {"RECEIPT": "1843", "3 candles": "0.75", "1 goose": "2.50", "2 quills": "0.40", "TOTAL": "3.65"}
    font = ImageFont.load_default(size=22)
    for number, (name, amount) in enumerate(lines.items()):
        draw.text((30, 20 + 40 * number), name, fill="black", font=font)
        draw.text((290, 20 + 40 * number), amount, fill="black", font=font, anchor="ra")


_PICTURES: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
    "balloons.png": _balloons,
    "chessboard.png": _chessboard,
    "clock.jpg": _clock,
    "house.jpg": _house,
    "receipt.png": _receipt,
    "sunset.jpg": _sunset,
}
