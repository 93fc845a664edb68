import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from job.config import UserError
from job.data.image_files import (
    STDIN,
    ImageFile,
    decode_batches,
    find_images,
    read_image,
    require_no_image,
)
from tests.conftest import REPOSITORY

SHAPE = (32, 32, 3)
RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


@pytest.fixture
def pixels() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)


def halves(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Create an image that is red above and blue below."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (0, height // 2, width, height))
    return image.convert(mode)


def is_near(pixel: npt.NDArray[Any], colour: tuple[int, int, int], tolerance: int = 8) -> bool:
    return bool((np.abs(pixel.astype(int) - colour) <= tolerance).all())


def test_folders_are_searched_in_order_without_hidden_and_other_files(tmp_path: Path) -> None:
    names = ["b/2.png", "b/10.jpg", "b/c/1.webp", "a.JPEG", "c.mpo"]
    others = [".hidden.png", ".cache/1.png", "README.md", "cifar10_model.h5", "b/labels", "x.pdf"]
    for name in (*names, *others):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    root = str(tmp_path)
    sorted_names = ["a.JPEG", "b/10.jpg", "b/2.png", "b/c/1.webp", "c.mpo"]
    assert find_images([root]) == [ImageFile(f"{root}/{name}") for name in sorted_names]
    given = ["notes.txt", f"{root}/b", "-"]
    assert [source.name for source in find_images(given)] == [
        "notes.txt",
        *(f"{root}/b/{name}" for name in ("10.jpg", "2.png", "c/1.webp")),
        "-",
    ]


@pytest.mark.parametrize(
    "suffix",
    ["heic", "HEIF", "jxl", "svg", "cr2", "dng", "raw", "iiq", "fff", "gpr", "mos", "cap", "jph"],
)
def test_photographs_in_unsupported_formats_are_reported(tmp_path: Path, suffix: str) -> None:
    for name in ("Thumbs.db", ".DS_Store", "notes.txt"):
        (tmp_path / name).touch()
    path = tmp_path / f"a.{suffix}"
    # Raw files of cameras begin like TIFF files, mostly with a small preview.
    halves(8, 8).save(path, "TIFF")
    (file,) = find_images([str(tmp_path)])
    assert file == ImageFile(str(path))
    with pytest.raises(UserError, match=r"^unknown image format; convert it to JPEG or PNG$"):
        read_image(str(path), SHAPE)
    # Phones and programs sometimes keep the suffix of a file that they converted to JPEG.
    halves(32, 32).save(path, "JPEG")
    assert is_near(read_image(str(path), SHAPE)[4, 16], RED, 20)


def test_a_folder_without_images_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (source,) = find_images([str(tmp_path)])
    assert source.problem == "no file in this folder has the suffix of an image format"


def test_a_folder_that_cannot_be_read_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "open.png").touch()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)  # root can read every folder
    closed, opened = find_images([str(tmp_path)])
    assert closed == ImageFile(f"{tmp_path}/closed", "Permission denied")
    assert opened.problem is None


def test_a_picture_does_not_overwrite_an_image_under_any_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Path(name).touch()
    (tmp_path / "link.png").symlink_to("a.png")
    for target in ("a.png", "./a.png", str(tmp_path / "a.png"), "link.png"):
        with pytest.raises(UserError) as error:
            require_no_image(
                Path(target), [ImageFile("b.png"), ImageFile("../" + tmp_path.name + "/a.png")]
            )
        assert f"received --png {Path(target)}, which is one of the images" in str(error.value)
    with Path("a.png").open() as file:
        standard_input = os.dup(0)
        os.dup2(file.fileno(), 0)
        try:
            with pytest.raises(UserError, match="which is one of the images"):
                require_no_image(Path("a.png"), [ImageFile(STDIN)])
        finally:
            os.dup2(standard_input, 0)
            os.close(standard_input)
    for target in ("a.png", "new.png"):
        require_no_image(
            Path(target), [ImageFile("b.png"), ImageFile("missing.png"), ImageFile("\0")]
        )


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp", "a.ppm", "a.PNG"])
def test_lossless_files_of_the_networks_size_keep_their_exact_pixels(
    tmp_path: Path, pixels: npt.NDArray[np.uint8], name: str
) -> None:
    Image.fromarray(pixels).save(tmp_path / name, lossless=True)
    read = read_image(str(tmp_path / name), SHAPE)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, pixels)


def test_an_opaque_alpha_channel_changes_no_pixel(
    tmp_path: Path, pixels: npt.NDArray[np.uint8]
) -> None:
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), SHAPE), pixels)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (7, 5), (4000, 3000)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_any_size_is_resized(tmp_path: Path, size: tuple[int, int], suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", size, GREEN).save(path)
    read = read_image(str(path), SHAPE)
    assert read.shape == (32, 32, 3)
    assert is_near(read, GREEN)


def test_the_centre_is_cut_out_and_every_pixel_of_it_counts(tmp_path: Path) -> None:
    wide = Image.new("RGB", (3000, 1000), RED)
    fine = np.indices((1000, 1000)).sum(axis=0) % 2 * 255  # a chequerboard of single pixels
    wide.paste(Image.fromarray(fine.astype(np.uint8)), (1000, 0))
    wide.save(tmp_path / "a.png")
    read = read_image(str(tmp_path / "a.png"), SHAPE)
    assert is_near(read[:, 1:-1], (127, 127, 127), 3)


@pytest.mark.parametrize("side", [200, 1200])
def test_a_jpeg_read_at_a_fraction_of_its_size_looks_like_the_whole(
    tmp_path: Path, side: int
) -> None:
    rows, columns = np.indices((side, side)) * 40 / side
    waves = [127 + 100 * np.sin(rows + k) * np.cos(columns) for k in range(3)]
    image = Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.jpg", quality=95)
    png, jpeg = (read_image(str(tmp_path / name), SHAPE).astype(int) for name in ("a.png", "a.jpg"))
    assert np.abs(png - jpeg).max() <= 6


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_a_rotated_photograph_is_turned_upright(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # its right side is up
    path = tmp_path / f"a.{suffix}"
    halves(64, 64).save(path, exif=exif)
    read = read_image(str(path), SHAPE)
    assert is_near(read[16, 30], RED, 24)
    assert is_near(read[16, 1], BLUE, 24)


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((*GREEN, 255), (0, 0, 16, 32))
    image.save(tmp_path / "rgba.png")
    image.convert("LA").save(tmp_path / "la.png")
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([*GREEN, *RED])
    palette.paste(0, (0, 0, 16, 32))
    palette.save(tmp_path / "palette.png", transparency=1)
    palette.save(tmp_path / "palette.gif", transparency=1)
    key = halves(32, 32).rotate(90)
    key.save(tmp_path / "key.png", transparency=BLUE)
    for path in sorted(tmp_path.iterdir()):
        read = read_image(str(path), SHAPE)
        assert is_near(read[16, 24], (255, 255, 255), 0), path
        assert not is_near(read[16, 8], (255, 255, 255), 50), path


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65_535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "a.pgm")
    Image.fromarray(ramp / np.float32(65_535)).save(tmp_path / "float.tiff")
    for path in sorted(tmp_path.iterdir()):
        read = read_image(str(path), SHAPE)
        np.testing.assert_array_equal(read, np.rint(ramp / 257)[..., None].repeat(3, -1), str(path))


def test_grey_values_of_an_unknown_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 200.0, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="received grey values from 200 to 200, expected 0 to 1"):
        read_image(str(tmp_path / "a.tiff"), SHAPE)
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="from nan to nan"):
        read_image(str(tmp_path / "a.tiff"), SHAPE)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.tiff")
    halves(64, 64, mode).save(path)
    read = read_image(str(path), SHAPE)
    if mode in ("1", "L"):
        assert (read == read[..., :1]).all()
    else:
        assert is_near(read[4, 16], RED, 20)
        assert is_near(read[28, 16], BLUE, 20)


def test_the_first_frame_of_an_animation_is_used(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, BLUE)]
    for name in ("a.gif", "a.webp", "a.png", "a.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert is_near(read_image(str(tmp_path / name), SHAPE), RED), name


def chunk(kind: bytes, content: bytes, *, damage: int = 0) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content) ^ damage)
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(size: tuple[int, int], bits: int, colours: int, rows: bytes, *chunks: bytes) -> bytes:
    """Create a PNG file; each of the rows begins with the number of its filter."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colours, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + end


def bomb(width: int, height: int) -> bytes:
    """Create a PNG file that contains only a size and no pixels."""
    return png((width, height), 8, 2, b"")


METADATA = {
    "text over 1 MiB": chunk(b"zTXt", b"notes\0\0" + zlib.compress(bytes(2**21))),
    "international text": chunk(b"iTXt", b"notes\0\1\0\0\0" + zlib.compress(bytes(2**21))),
    "text over 64 MiB in all": chunk(b"tEXt", b"notes\0" + b"." * 2**23) * 9,
    "colour profile": chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2**21))),
    "wrong checksum": chunk(b"gAMA", struct.pack(">I", 45_455), damage=1),
    "wrong checksum of a transparent value": chunk(b"tRNS", bytes((0, 9) * 3), damage=1),
    "broken orientation": chunk(b"eXIf", b"neither II nor MM"),
    "short chunk": chunk(b"cHRM", b""),
    "text with a name of Pillow's": chunk(b"tEXt", b"transparency\0no"),
    "broken animation": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", bytes(26)) * 2,
}


def test_images_with_unusual_or_broken_metadata_are_read(tmp_path: Path) -> None:
    for name, chunks in METADATA.items():
        rows = b"\0" + bytes((9, 9, 9) * 2)
        (tmp_path / name).write_bytes(png((2, 2), 8, 2, rows * 2, chunks))
        read = read_image(str(tmp_path / name), SHAPE)
        np.testing.assert_array_equal(read, np.full(SHAPE, 9), name)
    halves(64, 64).save(tmp_path / "a.webp", exif=b"Exif\0\0broken")
    assert is_near(read_image(str(tmp_path / "a.webp"), SHAPE)[4, 16], RED, 8)
    # The orientation is read even next to such metadata.
    exif = Image.Exif()
    exif[0x0112] = 3
    (tmp_path / "a.png").write_bytes(
        png(
            (1, 2),
            8,
            0,
            b"\0\0\0\xff",
            METADATA["text over 1 MiB"],
            chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")),
        )
    )
    read = read_image(str(tmp_path / "a.png"), (2, 1, 1))
    np.testing.assert_array_equal(read.ravel(), [255, 0])


@pytest.mark.parametrize(
    ("bits", "colours", "row", "value", "right"),
    [
        (1, 0, b"\x40", b"\0\0", 255),
        (2, 0, b"\x10", b"\0\0", 85),
        (2, 0, b"\x40", b"\0\1", 0),
        (4, 0, b"\x12", b"\0\1", 34),
        (8, 0, b"\x12\x13", b"\0\x12", 0x13),
        (16, 0, b"\x12\x34\x80\x80", b"\x12\x34", 0x80),
        (2, 3, b"\x10", b"\0", 0x66),
    ],
)
def test_a_transparent_value_is_applied_at_every_bit_depth(
    tmp_path: Path, bits: int, colours: int, row: bytes, value: bytes, right: int
) -> None:
    """The left one of two pixels has the transparent value."""
    palette = chunk(b"PLTE", bytes((1, 1, 1, 0x66, 0x66, 0x66)))
    chunks = (palette,) * (colours == 3) + (chunk(b"tRNS", value),)
    (tmp_path / "a.png").write_bytes(png((2, 1), bits, colours, b"\0" + row, *chunks))
    read = read_image(str(tmp_path / "a.png"), (1, 2, 3))
    np.testing.assert_array_equal(read[0], [[255] * 3, [right] * 3])


@pytest.mark.parametrize(
    ("bits", "colours", "row", "value"),
    [
        (8, 0, b"\x33\x33", b"\0"),
        (8, 2, b"\x33" * 6, b"\0\x33\0\x33\0"),
        (8, 0, b"\x33\x33", b"\0\x33\0"),
        (8, 3, b"\1\1", b"\0" * 3),
        (8, 3, b"\1\1", b"\0" * 300),
        (8, 3, b"\1\1", b""),
        (16, 2, b"\x33\xff" * 6, b"\x33\0" * 3),
    ],
    ids=[
        "short grey",
        "short RGB",
        "long grey",
        "longer than the palette by one",
        "longer than the palette",
        "empty",
        "16 bits, unlike",
    ],
)
def test_an_invalid_transparent_value_hides_no_pixel(
    tmp_path: Path, bits: int, colours: int, row: bytes, value: bytes
) -> None:
    palette = chunk(b"PLTE", bytes((1, 1, 1, 0x33, 0x33, 0x33)))
    chunks = (palette,) * (colours == 3) + (chunk(b"tRNS", value),)
    (tmp_path / "a.png").write_bytes(png((2, 1), bits, colours, b"\0" + row, *chunks))
    np.testing.assert_array_equal(
        read_image(str(tmp_path / "a.png"), (1, 2, 3)), [[[0x33] * 3] * 2]
    )


def test_a_large_image_is_rotated_like_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns = np.indices((60, 90))
    image = Image.fromarray((3 * rows + columns / 2).astype(np.uint8))
    for orientation in range(1, 9):
        for suffix in ("png", "tiff"):
            exif = Image.Exif()
            exif[0x0112] = orientation
            path = str(tmp_path / f"{orientation}.{suffix}")
            image.save(path, exif=exif)
            read = []
            for limit in (2**24, 1):
                monkeypatch.setattr("job.data.image_files._LARGE_PIXELS", limit)
                read.append(read_image(path, (20, 12, 3)).astype(int))
            assert np.abs(read[0] - read[1]).max() <= 2, path


def test_a_large_image_takes_little_more_memory_than_its_pixels(tmp_path: Path) -> None:
    side = 3800
    path = tmp_path / "a.png"
    image = Image.new("RGBA", (side + 800, side), (*RED, 0))
    image.paste((*RED, 51), (400, side // 4, 400 + side, side))
    exif = Image.Exif()
    exif[0x0112] = 5  # rows and columns are exchanged
    image.save(path, compress_level=1, exif=exif)
    script = f"""if True:
        from pathlib import Path
        from job.data.image_files import read_image

        def peak():
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

        before = peak()
        print(read_image({str(path)!r}, (4, 4, 3)).tolist())
        print(peak() - before)
    """
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    turned, kib = map(json.loads, result.stdout.splitlines())
    pixels = np.swapaxes(turned, 0, 1)
    assert kib * 1024 < 1.5 * 4 * image.width * image.height
    assert is_near(pixels[0], (255, 255, 255), 12)  # no red from transparent pixels
    assert is_near(pixels[2:], (255, 204, 204), 12)


def broken_files(folder: Path) -> dict[str, str]:
    """Create broken files, and return the expected problem of each."""
    whole = io.BytesIO()
    halves(64, 64).save(whole, "JPEG")
    (folder / "truncated.jpg").write_bytes(whole.getvalue()[:-40])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "bomb.png").write_bytes(bomb(20_000, 20_000))
    halves(64, 64).save(whole := io.BytesIO(), "PNG")
    (folder / "cut.png").write_bytes(whole.getvalue()[:100])
    (folder / "noise.gif").write_bytes(b"GIF89a" + bytes(range(50)))
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    return {
        "bomb.png": "exceeds limit",
        "cut.png": "truncated",
        "empty.png": "the file is empty",
        "link.png": "No such file or directory",
        "noise.gif": "",
        "text.jpg": "unknown image format",
        "truncated.jpg": "truncated",
    }


def test_each_broken_file_has_a_problem_and_the_others_are_read(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    expected = broken_files(tmp_path)
    halves(64, 64).save(tmp_path / "good.png")
    sources = find_images([str(tmp_path)])
    (batch,) = decode_batches(sources, 100, SHAPE)
    results = {Path(decoded.name).name: decoded for decoded in batch}
    assert results.keys() == {*expected, "good.png"}
    for name, problem in expected.items():
        assert problem in (results[name].problem or ""), name
        assert results[name].problem
        assert results[name].pixels is None
    assert results["good.png"].pixels is not None
    assert results["good.png"].problem is None
    assert not recwarn.list


def test_an_image_below_the_bomb_limit_causes_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    halves(64, 64).save(tmp_path / "a.png")  # above the limit and below twice the limit
    with warnings.catch_warnings(action="error"):
        (batch,) = decode_batches([ImageFile(str(tmp_path / "a.png"))], 1, SHAPE)
    assert batch[0].pixels is not None


@pytest.mark.parametrize("name", ["nowhere.png", "folder.png", "x" * 300])
def test_a_path_that_is_not_a_file_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"No such file|Is a directory|File name too long"):
        read_image(str(tmp_path / name), SHAPE)


def test_standard_input_can_be_a_pipe(pixels: npt.NDArray[np.uint8]) -> None:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    reader, writer = os.pipe()
    os.write(writer, content.getvalue())
    os.close(writer)
    before = os.dup(0)
    os.dup2(reader, 0)
    try:
        np.testing.assert_array_equal(read_image(STDIN, SHAPE), pixels)
        with pytest.raises(UserError, match="the file is empty"):
            read_image(STDIN, SHAPE)
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(reader)


def test_a_grey_network_receives_grey_images(tmp_path: Path) -> None:
    ramp = np.arange(0, 256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp).convert("RGB").save(tmp_path / "rgb.png")
    Image.fromarray(ramp).convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for path in sorted(tmp_path.iterdir()):
        read = read_image(str(path), (16, 16, 1))
        np.testing.assert_array_equal(read, ramp[..., None], str(path))
    halves(400, 300).save(tmp_path / "a.jpg")
    read = read_image(str(tmp_path / "a.jpg"), (24, 20, 1))
    assert read.shape == (24, 20, 1)
    assert np.abs(read[2].astype(int) - 76).max() < 5  # red, as weighted in ITU-R 601


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def iptc(content: bytes) -> bytes:
    """Create an IPTC file with another file inside."""

    def field(record: int, number: int, value: bytes) -> bytes:
        return bytes((0x1C, record, number)) + struct.pack(">H", len(value)) + value

    fields = ((3, 20, b"\0\x08"), (3, 30, b"\0\x08"), (3, 60, b"\x01\0"), (3, 120, b"\0\x01"))
    return b"".join(field(*one) for one in fields) + field(8, 10, content)


@pytest.mark.parametrize("suffix", ["eps", "ps", "png", "iim"])
def test_no_other_program_is_started_for_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # Pillow searches once per process
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(iptc(POSTSCRIPT) if suffix == "iim" else POSTSCRIPT)
    expected = "unknown image format" if suffix == "iim" else "PostScript is not supported"
    assert find_images([str(tmp_path)]) == [ImageFile(str(path))]
    with pytest.raises(UserError, match=expected):
        read_image(str(path), SHAPE)
    assert not (tmp_path / "started").exists()


def test_batches_keep_the_order_of_the_sources(tmp_path: Path) -> None:
    sources = []
    for number in range(130):
        path = tmp_path / f"{number}.png"
        side = 400 if number % 7 == 0 else 8  # some take longer
        Image.new("RGB", (side, side), (number, 0, 0)).save(path)
        sources.append(ImageFile(str(path)))
    batches = list(decode_batches(sources, 60, SHAPE))
    assert [len(batch) for batch in batches] == [60, 60, 10]
    decoded = [decoded for batch in batches for decoded in batch]
    assert [replace(one, pixels=None) for one in decoded] == sources
    assert [int(one.pixels[0, 0, 0]) for one in decoded if one.pixels is not None] == [*range(130)]
