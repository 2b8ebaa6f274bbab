"""Every mode of picture has one meaning: in files, in open images, and in what is exported."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanovlm_fast.cli import parse_config
from nanovlm_fast.config import VLMConfig
from nanovlm_fast.data import prepare
from nanovlm_fast.data.images import load_image
from nanovlm_fast.data.samples import SampleLoader
from nanovlm_fast.data.sources.registry import load_source
from nanovlm_fast.data.text import TextProcessor, Tokenizer
from nanovlm_fast.export import export
from nanovlm_fast.model.packed import VisionLanguageModel
from nanovlm_fast.weights.folder import save_pretrained
from tests.support.samples import SMALL

Row = list[tuple[int, int, int]]
WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)
CLEAR, INK, HALF = (0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 128)


def grey(*levels: int) -> Row:
    return [(level,) * 3 for level in levels]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(bits: int, colour: int, row: bytes, key: bytes = b"", palette: bytes = b"") -> bytes:
    """A PNG of four equal rows of four pixels, since Pillow cannot write all that it reads."""
    header = struct.pack(">IIBBBBB", 4, 4, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header)]
    parts += [chunk(b"PLTE", palette)] if palette else []
    parts += [chunk(b"tRNS", key)] if key else []
    parts += [chunk(b"IDAT", zlib.compress((b"\0" + row) * 4)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rows(pixels: list, kind: type | str = np.uint8) -> np.ndarray:
    """Four equal rows."""
    return np.array([pixels] * 4, kind)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def made(mode: str, *colours: object) -> Image.Image:
    """An image of four columns, each of one colour."""
    image = Image.new(mode, (4, 4))
    for column, colour in enumerate(colours):
        image.paste(colour, (column, 0, column + 1, 4))
    return image


def premultiplied(mode: str) -> Image.Image:
    if mode == "La":
        return made("LA", (0, 0), (0, 255), (0, 128), (0, 255)).convert(mode)
    return made("RGBA", CLEAR, INK, HALF, INK).convert(mode)


def palette_and_alpha() -> Image.Image:
    return made("RGBA", CLEAR, INK, (255, 0, 0, 0), (255, 0, 0, 255)).convert("PA")


def turned() -> bytes:
    """An image that lies on its side: its first row belongs on the right.

    The rest of it is transparent.
    """
    image, exif = Image.new("RGBA", (4, 4), (0, 0, 0, 0)), Image.Exif()
    image.paste((0, 0, 0, 255), (0, 0, 4, 1))
    exif[0x0112] = 6
    return saved(image, "PNG", exif=exif)


def animation() -> bytes:
    frames = [made("RGB", RED, BLACK, RED, WHITE), Image.new("RGB", (4, 4), "blue")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


DEEP = [20000, 255, 256, 65535]
RGB_PALETTE = bytes([*BLACK, *RED, *WHITE, 0, 0, 255])
DEFAULT_PALETTE = [Image.new("P", (1, 1), i).convert("RGB").getpixel((0, 0)) for i in (1, 2)]
HALF_RED = (255, 127, 127)  # alpha 128 of 255 on white
CASES: dict[str, tuple[bytes | Image.Image, Row]] = {
    # transparency
    "RGBA": (
        saved(made("RGBA", CLEAR, INK, HALF, (9, 9, 9, 0)), "PNG"),
        [WHITE, BLACK, HALF_RED, WHITE],
    ),
    "RGBA, WebP": (
        saved(made("RGBA", CLEAR, INK, HALF, (9, 9, 9, 0)), "WEBP", lossless=True),
        [WHITE, BLACK, HALF_RED, WHITE],
    ),
    "LA": (
        saved(made("LA", (0, 0), (0, 255), (0, 128), (200, 255)), "PNG"),
        grey(255, 0, 127, 200),
    ),
    "RGBa": (premultiplied("RGBa"), [WHITE, BLACK, HALF_RED, BLACK]),
    "La": (premultiplied("La"), grey(255, 0, 127, 0)),
    "PA": (palette_and_alpha(), [WHITE, BLACK, WHITE, RED]),
    "P, alpha of each colour": (
        png(2, 3, b"\x1b", key=bytes([0, 128, 255]), palette=RGB_PALETTE),
        [WHITE, HALF_RED, WHITE, (0, 0, 255)],
    ),
    "P, one colour clear": (
        png(2, 3, b"\x1b", key=b"\xff\0", palette=RGB_PALETTE),
        [BLACK, WHITE, WHITE, (0, 0, 255)],
    ),
    "P, opaque": (png(2, 3, b"\x1b", palette=RGB_PALETTE), [BLACK, RED, WHITE, (0, 0, 255)]),
    "GIF, one colour clear": (
        saved(made("P", 0, 1, 2, 0), "GIF", transparency=0),
        [WHITE, *DEFAULT_PALETTE, WHITE],
    ),
    "1, white clear": (png(1, 0, b"\x50", key=b"\0\1"), grey(0, 255, 0, 255)),
    "1, black clear": (png(1, 0, b"\x50", key=b"\0\0"), grey(255, 255, 255, 255)),
    "L of 2 bits, one level clear": (png(2, 0, b"\x1b", key=b"\0\1"), grey(0, 255, 170, 255)),
    "L of 4 bits, one level clear": (png(4, 0, b"\x03\x5f", key=b"\0\3"), grey(0, 255, 85, 255)),
    "L, one level clear": (png(8, 0, bytes([7, 8, 9, 7]), key=b"\0\7"), grey(255, 8, 9, 255)),
    "RGB, one colour clear": (
        png(8, 2, bytes([1, 2, 3, 4, 5, 6, *RED, 1, 2, 3]), key=b"\0\1\0\2\0\3"),
        [WHITE, (4, 5, 6), RED, WHITE],
    ),
    "RGB of 16 bits, one colour clear": (
        png(16, 2, bytes([1, 9, 2, 9, 3, 9, 4, 5, 5, 5, 6, 6] * 2), key=bytes([1, 9, 2, 9, 3, 9])),
        [WHITE, (4, 5, 6)] * 2,
    ),
    "16 bits of grey, one level clear": (
        png(16, 0, b"\x12\x34\x12\x35\0\0\xff\xff", key=b"\x12\x34"),
        grey(255, 18, 0, 255),
    ),
    "16 bits of grey and alpha": (
        png(16, 4, bytes([10, 1, 0, 0, 20, 1, 255, 255] * 2)),
        grey(255, 20, 255, 20),
    ),
    "RGBA of 16 bits": (
        png(16, 6, bytes([10, 1, 9, 9, 8, 8, 0, 0, 10, 1, 9, 9, 8, 8, 255, 255] * 2)),
        [WHITE, (10, 9, 8)] * 2,
    ),
    # depth
    "RGB of 16 bits": (
        png(16, 2, bytes([1, 9, 2, 9, 3, 9, 255, 255, 5, 5, 6, 6] * 2)),
        [(1, 2, 3), (255, 5, 6)] * 2,
    ),
    "16 bits of grey, PNG": (png(16, 0, b"\x4e\x20\0\xff\1\0\xff\xff"), grey(78, 0, 1, 255)),
    "16 bits of grey, all dark": (png(16, 0, b"\0\x05\0\x06\0\x07\0\xff"), grey(0, 0, 0, 0)),
    "16 bits of grey, PGM": (
        b"P5 4 4 65535\n" + b"\x4e\x20\0\xff\1\0\xff\xff" * 4,
        grey(78, 0, 1, 255),
    ),
    "16 bits of grey, TIFF": (
        saved(Image.fromarray(rows(DEEP, "<u2")), "TIFF"),
        grey(78, 0, 1, 255),
    ),
    "16 bits of grey, other byte order": (Image.fromarray(rows(DEEP, ">u2")), grey(78, 0, 1, 255)),
    "I;16L": (Image.frombytes("I;16L", (4, 4), rows(DEEP, "<u2").tobytes()), grey(78, 0, 1, 255)),
    "I;16N": (Image.frombytes("I;16N", (4, 4), rows(DEEP, "<u2").tobytes()), grey(78, 0, 1, 255)),
    "I, TIFF": (
        saved(Image.fromarray(rows([2**20, -5, 100, 2**31 - 1], np.int32)), "TIFF"),
        grey(255, 0, 100, 255),
    ),
    "I": (Image.fromarray(rows([2**20, -5, 100, 255], np.int32)), grey(255, 0, 100, 255)),
    "F in [0, 1], TIFF": (
        saved(Image.fromarray(rows([0, 0.2, 0.5, 1], np.float32)), "TIFF"),
        grey(0, 51, 128, 255),
    ),
    "F in [0, 255]": (Image.fromarray(rows([0, 2, 128, 255], np.float32)), grey(0, 2, 128, 255)),
    "F of any values": (
        Image.fromarray(rows([-3, np.nan, np.inf, 300], np.float32)),
        grey(0, 0, 255, 255),
    ),
    "F, PFM": (b"Pf\n4 4\n-1.0\n" + struct.pack("<4f", 0, 0.2, 0.5, 1) * 4, grey(0, 51, 128, 255)),
    # colour
    "L": (saved(made("L", 0, 7, 200, 255), "PNG"), grey(0, 7, 200, 255)),
    "1": (saved(made("1", 0, 255, 0, 255), "PNG"), grey(0, 255, 0, 255)),
    "RGB": (
        saved(made("RGB", RED, BLACK, WHITE, (1, 2, 3)), "PNG"),
        [RED, BLACK, WHITE, (1, 2, 3)],
    ),
    "RGBX": (made("RGBX", RED, BLACK, WHITE, (1, 2, 3)), [RED, BLACK, WHITE, (1, 2, 3)]),
    "CMYK": (
        saved(
            made("CMYK", (0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255), (255, 255, 255, 255)),
            "TIFF",
        ),
        [WHITE, RED, BLACK, BLACK],
    ),
    "YCbCr": (
        made("YCbCr", (255, 128, 128), (0, 128, 128), (76, 85, 255), (99, 128, 128)),
        [WHITE, BLACK, (254, 0, 0), *grey(99)],
    ),
    "HSV": (
        made("HSV", (0, 255, 255), (9, 0, 255), (9, 9, 0), (0, 0, 50)),
        [RED, WHITE, BLACK, *grey(50)],
    ),
    # order and frames
    "turned, then composited": (turned(), [WHITE, WHITE, WHITE, BLACK]),
    "the first frame": (animation(), [RED, BLACK, RED, WHITE]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_mode_has_its_rule(case, tmp_path):
    source, expected = CASES[case]
    pixels = load_image(source, 4)
    assert pixels.transpose(1, 2, 0).tolist() == [[list(colour) for colour in expected]] * 4
    if isinstance(source, bytes):  # as a file, and as an image that somebody has opened and decoded
        (tmp_path / "picture").write_bytes(source)
        assert (load_image(tmp_path / "picture", 4) == pixels).all()
        opened = Image.open(io.BytesIO(source))
        key = opened.info.get("transparency")
        assert (load_image(opened, 4) == pixels).all() and opened.info.get("transparency") == key


def test_a_transparent_picture_is_composited_before_it_is_made_smaller():
    """Colours of transparent pixels must not enter through the resizing."""
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 32, 64))
    pixels = load_image(image, 8)
    assert (pixels == pixels[:1]).all(), "red where there is only black and white"


# ---- what is exported


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    changes = dict(prompt='Say "{question}"\nA:', image_mean=0.0, image_std=1.0, lm_vocab_size=300)
    model = VisionLanguageModel(VLMConfig(**{**SMALL, **changes}))
    folder = tmp_path_factory.mktemp("pictures")
    save_pretrained(folder / "model", model, Tokenizer.train(["a red cat"] * 9, 281))
    return folder


def code_of(card: Path, with_function: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    return next(block for block in blocks if with_function in block)


def test_the_card_for_transformers_gives_our_pixels_of_every_mode(folder, monkeypatch, capsys):
    """The code in the written card is run, in a folder that holds only a picture."""
    out = export(folder / "model", "transformers", folder / "transformers")
    monkeypatch.chdir(folder)
    (folder / "picture.png").write_bytes(CASES["RGBA"][0])
    names: dict = {}
    exec(code_of(out / "README.md", "to_rgb"), names)
    assert capsys.readouterr().out, "it says something"
    for case, (source, _) in CASES.items():
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))
        read = names["to_rgb"](image)
        inputs = names["processor"](text="<image>", images=read, return_tensors="pt")
        ours = load_image(source, SMALL["vit_img_size"])
        off = np.abs(255 * inputs["pixel_values"][0, 0].numpy() - ours)
        assert off.max() < 1.01 and off.mean() < 0.01, case  # torchvision may round otherwise


@pytest.mark.filterwarnings("ignore:nanoVLM's prompt")
def test_the_card_for_nanovlm_gives_our_pixels_of_every_mode(folder):
    out = export(folder / "model", "nanovlm", folder / "nanovlm")
    names: dict = {}
    exec(code_of(out / "README.md", "to_rgb"), names)
    for case, (source, _) in CASES.items():
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))
        theirs = names["to_rgb"](image).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
        assert (np.asarray(theirs).transpose(2, 0, 1) == load_image(source, 16)).all(), case


# ---- what was prepared


def test_shards_of_another_rule_are_refused(tmp_path, capsys):
    """Such shards were prepared before the rule had a name."""
    sizes = "--vit-img-size 32 --mp-pixel-shuffle-factor 2 --lm-vocab-size 300"
    command = f"--data synthetic:8 --out {tmp_path / 'out'} --workers 0 {sizes}".split()
    assert prepare.main(command) == 0
    file = tmp_path / "out" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["processing"]["pixels"]
    file.write_text(json.dumps(manifest))
    model, config = parse_config(["--data", f"prepared:{tmp_path / 'out'}", *sizes.split()])
    source = load_source(config.data, "train")
    text = TextProcessor(Tokenizer.load(tmp_path / "out"), model.prompt, model.image_tokens)
    with pytest.raises(ValueError, match="prepared with pixels None and not 'rule 2'"):
        SampleLoader(source, model, config, text)
    capsys.readouterr()
    assert prepare.main(command) == 1
    assert "pixels None and not 'rule 2'" in capsys.readouterr().err
