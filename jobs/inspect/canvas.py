"""A little drawing on pixels: pictures with lettering as PNG, without a plotting library."""

from __future__ import annotations

import struct
import zlib

import numpy as np

Colour = tuple[int, int, int]
WHITE, INK, FAINT = (255, 255, 255), (27, 31, 36), (210, 214, 219)

# Letters of 5 by 7 pixels: seven rows from the top, each a digit of base 32 whose bits are the pixels.
_LETTERS = {
    pair[0]: pair[1:]
    for pair in (
        "AEHHVHHH BUHHUHHU CEHGGGHE DSIHHHIS EVGGUGGV FVGGUGGG GEHGNHHF HHHHVHHH IE44444E J72222IC KHIKOKIH LGGGGGGV "
        "MHRLLHHH NHHPLJHH OEHHHHHE PUHHUGGG QEHHHLID RUHHUKIH SFGGE11U TV444444 UHHHHHHE VHHHHHA4 WHHHLLLA XHHA4AHH "
        "YHHHA444 ZV1248GV 0EHJLPHE 14C4444E 2EH1248V 3V2421HE 426AIV22 5VGU11HE 668GUHHE 7V124888 8EHHEHHE 9EHHF12C "
        ".00000CC ,0000C48 :0CC0CC0 %OP248J3 -000V000 /0124 8G0 (2488842 )8422248"
    )
    .replace("4 8", "48")
    .split()
}
ADVANCE, TALL = 6, 7


class Canvas:
    """RGB pixels, uint8 [height, width, 3], origin at the top left."""

    def __init__(self, width: int, height: int, colour: Colour = WHITE) -> None:
        self.pixels = np.full((height, width, 3), colour, np.uint8)

    def rectangle(self, left: int, top: int, width: int, height: int, colour: Colour) -> None:
        """A filled rectangle, cut off at the edges."""
        self.pixels[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)] = colour

    def frame(self, left: int, top: int, width: int, height: int, colour: Colour = FAINT) -> None:
        """A line of one pixel around a rectangle."""
        self.rectangle(left - 1, top - 1, width + 2, 1, colour)
        self.rectangle(left - 1, top + height, width + 2, 1, colour)
        self.rectangle(left - 1, top - 1, 1, height + 2, colour)
        self.rectangle(left + width, top - 1, 1, height + 2, colour)

    def image(self, left: int, top: int, image: np.ndarray, scale: int = 1) -> None:
        """An image, uint8 [h, w, 3], each pixel a square of `scale`."""
        large = image.repeat(scale, 0).repeat(scale, 1)
        self.pixels[top : top + large.shape[0], left : left + large.shape[1]] = large

    def text(self, left: int, top: int, text: str, scale: int = 2, colour: Colour = INK, align: str = "left") -> None:
        """Capital letters, digits and . , : % - / ( ). align: where `left` is: left, centre or right of the text."""
        mask = lettering(text)
        width = mask.shape[1] * scale
        left -= {"left": 0, "centre": width // 2, "right": width}[align]
        self._stamp(left, top, mask.repeat(scale, 0).repeat(scale, 1), colour)

    def text_up(self, left: int, bottom: int, text: str, scale: int = 2, colour: Colour = INK) -> None:
        """The same, read from bottom to top; centred on `bottom`."""
        mask = np.rot90(lettering(text)).repeat(scale, 0).repeat(scale, 1)
        self._stamp(left, bottom - mask.shape[0] // 2, mask, colour)

    def _stamp(self, left: int, top: int, mask: np.ndarray, colour: Colour) -> None:
        cut = mask[max(0, -top) :, max(0, -left) :]
        area = self.pixels[max(0, top) : max(0, top) + cut.shape[0], max(0, left) : max(0, left) + cut.shape[1]]
        area[cut[: area.shape[0], : area.shape[1]]] = colour

    def png(self) -> bytes:
        """The picture as the bytes of a PNG file."""
        height, width, _ = self.pixels.shape
        rows = np.concatenate([np.zeros((height, 1), np.uint8), self.pixels.reshape(height, width * 3)], axis=1)
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )


def lettering(text: str) -> np.ndarray:
    """bool [7, width]: a line of text. A character that there is no letter for is a blank."""
    mask = np.zeros((TALL, max(1, len(text) * ADVANCE - 1)), bool)
    for place, character in enumerate(text.upper()):
        for row, digit in enumerate(_LETTERS.get(character, "")):
            bits = int(digit, 32)
            for column in range(5):
                if bits >> (4 - column) & 1:
                    mask[row, place * ADVANCE + column] = True
    return mask


def mixed(low: Colour, high: Colour, share: np.ndarray) -> np.ndarray:
    """uint8 [..., 3]: colours between two."""
    ends = np.array(low, float), np.array(high, float)
    return (ends[0] + (ends[1] - ends[0]) * share[..., None]).round().astype(np.uint8)
