"""Finding image files, decoding them, and adapting them to the input of a network."""

import contextlib
import functools
import io
import itertools
import os
import re
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL import ImageFile as PillowFile

from job.config import UserError

STDIN = "-"
"""Stands for standard input instead of a path."""

UNREAD_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
"""Formats whose pixels Pillow cannot read at all, or only on Windows."""

ImageShape = tuple[int, int, int]
"""Height, width and channels of a network's images: 1 for grey ones, 3 for RGB."""

BACKGROUND = "white"
"""The colour behind transparent pixels."""

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for each number of channels."""

# Formats that an external program draws, or that can contain an image in such a format.
_REFUSED_FORMATS = {*UNREAD_FORMATS, "EPS", "IPTC"}
_POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")
_PNG = b"\x89PNG\r\n\x1a\n"
# Suffixes of photographs and drawings in formats that Pillow does not read; raw formats last.
_FOREIGN_SUFFIX = re.compile(
    r"\.(bpg|djvu?|dpx|emf|exr|flif|hei[cf]s?|hif|jls|jp[hm]|jx[lrs]|kra|pam|psb|svgz?|wbmp|wdp|wmf|xcf"
    r"|3fr|arw|bay|cap|cr[23w]|dc[rs]|dng|eip|erf|fff|gpr|iiq|k25|kdc|mef|mos|mrw|nef|nrw|orf|pef|raf"
    r"|raw|rw[2lz]|sr[2fw]|x3f)"
)
# JPEGs are decoded at an eighth, a quarter or half of their size if that leaves at least this many
# times the requested pixels in each direction: a photograph is decoded three times as fast.
_DRAFT_FACTOR = 4
# An image with more pixels than the first number is converted in strips of about the second number
# of pixels. It then needs little more memory than its decoded pixels.
_LARGE_PIXELS = 2**24
_STRIP_PIXELS = 2**20
_IMAGES_A_TASK = 25
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class ImageFile:
    """A path from the command line, or a file found in a folder from the command line.

    Attributes:
        name: Its path, as `os.fsdecode` returns it, or `STDIN`.
        problem: Why no image can be read; None if no problem is known.
        pixels: [height, width, channels] uint8; None until it is decoded.
    """

    name: str
    problem: str | None = None
    pixels: npt.NDArray[np.uint8] | None = None


def find_images(names: Sequence[str]) -> list[ImageFile]:
    """List files as given, and replace each folder with the images in it and in its subfolders.

    In folders, every file with the suffix of an image format counts as an image, even if the format
    cannot be read. So no photograph is skipped silently. Hidden files and folders are skipped,
    links to folders are not followed, and the files are sorted by name.

    Args:
        names: Paths of files and folders, and `STDIN`.
    """
    files: list[ImageFile] = []
    for name in names:
        if name == STDIN or not os.path.isdir(name):  # noqa: PTH112 (a `Path` drops a leading ./)
            files.append(ImageFile(name))
        else:
            problem = "no file in this folder has the suffix of an image format"
            files += list(_walk(name)) or [ImageFile(name, problem)]
    return files


def require_no_image(target: Path, files: Sequence[ImageFile]) -> None:
    """Make sure that writing a file does not overwrite an image, even under another spelling.

    Raises:
        UserError: If the target is one of the images.
    """
    # The functions of `os.path` also accept a descriptor, and a name that no file can have.
    for file in files if os.path.exists(target) else ():  # noqa: PTH110
        with contextlib.suppress(OSError, ValueError):  # reading the file reports the problem
            if os.path.samefile(0 if file.name == STDIN else file.name, target):  # noqa: PTH121
                raise UserError(
                    f"received --png {target}, which is one of the images to predict and would be "
                    f"overwritten; pass another file with --png"
                )


def _walk(folder: str) -> Iterator[ImageFile]:
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        yield ImageFile(folder, error.strerror)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        # Reading a pipe would wait for its writer, so pipes are skipped. A broken link counts as a
        # broken image.
        elif (entry.is_file() or entry.is_symlink()) and _has_suffix(entry.name):
            yield ImageFile(entry.path)


def _has_suffix(name: str) -> bool:
    suffix = _suffix(name)
    kind = Image.registered_extensions().get(suffix)
    return bool(_FOREIGN_SUFFIX.fullmatch(suffix)) or (
        kind is not None and kind not in UNREAD_FORMATS
    )


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (`Path.suffix` makes a path first)


def decode_batches(
    files: Sequence[ImageFile], batch_size: int, shape: ImageShape
) -> Iterator[list[ImageFile]]:
    """Decode images in threads, a few batches ahead of the caller.

    Args:
        files: The files to decode.
        batch_size: Files in each batch; the last one can be smaller.
        shape: Shape of the pixels.

    Yields:
        The batches in the order of the files, each file with its pixels or its problem.
    """

    def decode_all(part: Sequence[ImageFile]) -> list[ImageFile]:
        return [_decode(file, shape) for file in part]

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "decode")
    ahead: deque[Iterator[list[ImageFile]]] = deque()
    # Pillow warns about damaged metadata, and then still returns the pixels or raises an error.
    with warnings.catch_warnings(action="ignore"):
        try:
            for batch in _parts(files, batch_size):
                ahead.append(pool.map(decode_all, _parts(batch, _IMAGES_A_TASK)))
                if len(ahead) > _BATCHES_AHEAD:
                    yield list(itertools.chain.from_iterable(ahead.popleft()))
            for parts in ahead:
                yield list(itertools.chain.from_iterable(parts))
        finally:
            pool.shutdown(cancel_futures=True)


def _parts(files: Sequence[ImageFile], size: int) -> Iterator[Sequence[ImageFile]]:
    return (files[start : start + size] for start in range(0, len(files), size))


def _decode(file: ImageFile, shape: ImageShape) -> ImageFile:
    if file.problem:
        return file
    try:
        return replace(file, pixels=read_image(file.name, shape))
    except UserError as error:
        return replace(file, problem=str(error))


def read_image(name: str, shape: ImageShape) -> npt.NDArray[np.uint8]:
    """Read one image, turn it upright, and resize it to a shape.

    The largest centred part with the proportions of the shape is resized with a bicubic filter that
    uses every pixel of it. If an image already has the shape, its pixels stay unchanged. No other
    program is started.

    Args:
        name: Path of the file, or `STDIN`.
        shape: The shape to resize to.

    Returns:
        [height, width, channels] uint8, grey or RGB.

    Raises:
        UserError: If there is no image, or it is damaged, too large or of an unknown format.
    """
    is_stdin = name == STDIN
    try:
        with open(0 if is_stdin else name, "rb", closefd=not is_stdin) as file:
            start = file.peek(len(_POSTSCRIPT[-1]))
            if not start:
                raise UserError("the file is empty")
            if start.startswith(_POSTSCRIPT):
                raise UserError("PostScript is not supported; convert it to PNG")
            content: IO[bytes] = file if file.seekable() else io.BytesIO(file.read())
            if content.read(len(_PNG)) == _PNG:
                with contextlib.suppress(Exception):
                    image = Image.open(content, formats=_formats())
                    # If a transparent value is too long, Pillow uses its first bytes.
                    if "transparency" not in image.info:
                        return _pixels(image, shape)
                content = _bare_png(content)
            image = Image.open(content, formats=_formats())
            # Raw files of cameras look like TIFF, with anything from a preview to sensor data.
            if image.format == "TIFF" and _FOREIGN_SUFFIX.fullmatch(_suffix(name)):
                raise UnidentifiedImageError
            return _pixels(image, shape)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        is_foreign = _FOREIGN_SUFFIX.fullmatch(_suffix(name))
        advice = "; convert it to JPEG or PNG" if is_foreign else ""
        raise UserError(f"unknown image format{advice}") from error
    # Pillow's readers raise all kinds of exceptions for damaged files.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(reason) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that Pillow reads without other programs, the common ones first."""
    Image.preinit()
    Image.init()
    return tuple(name for name in Image.ID if name not in _REFUSED_FORMATS)


def _bare_png(file: IO[bytes]) -> IO[bytes]:
    """Copy only the chunks of a PNG file that determine its pixels and its orientation.

    If a text, colour profile or animation is damaged or large, Pillow refuses the file, while
    browsers ignore it. Browsers also ignore a damaged optional chunk, and transparency of a wrong
    length.
    """
    lengths = {b"\0": range(2, 3), b"\2": range(6, 7)}  # of transparency: grey, RGB
    colours = b""
    bare = io.BytesIO()
    bare.write(_PNG)
    file.seek(len(_PNG))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        body = kind + file.read(length)
        checksum = file.read(4)
        is_whole = checksum == zlib.crc32(body).to_bytes(4, "big")
        match kind:
            case b"IHDR":
                colours = body[13:14]
            case b"PLTE":
                lengths[b"\3"] = range(1, length // 3 + 1)
            case b"tRNS":
                is_whole &= length in lengths.get(colours, ())
        # The names of optional chunks begin with a lower-case letter.
        if kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and is_whole):
            bare.write(head[:4] + body + checksum)
    bare.seek(0)
    return bare


def _pixels(image: PillowFile.ImageFile, shape: ImageShape) -> npt.NDArray[np.uint8]:
    height, width, channels = shape
    mode = MODES[channels]
    upright: Image.Image = image
    image.draft(None, (_DRAFT_FACTOR * width, _DRAFT_FACTOR * height))
    if image.format == "PNG":
        _adapt_transparent_value(image)
    image.load()
    # Reading the orientation takes a sixth of the time for a small image. Broken metadata counts as
    # no orientation.
    if image.info:
        with contextlib.suppress(Exception):
            orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
            # A large image is resized first: turning it in full size takes its memory twice.
            if orientation in range(2, 9) and _is_large(image):
                upright = _fit(image, mode, (height, width) if orientation > 4 else (width, height))
                upright.getexif()[ExifTags.Base.Orientation] = orientation
            ImageOps.exif_transpose(upright, in_place=True)
    return np.asarray(_fit(upright, mode, (width, height))).reshape(shape)


def _adapt_transparent_value(image: PillowFile.ImageFile) -> None:
    """Convert the transparent value of a PNG file to 8 bits, as Pillow converts the pixels."""
    value: Any = image.info.get("transparency")
    match image.tile[0].args if value is not None else None:
        case "L;2":
            image.info["transparency"] = value * 85
        case "L;4":
            image.info["transparency"] = value * 17
        case "RGB;16B":
            del image.info["transparency"]  # other colours can have the same upper 8 bits


def _fit(image: Image.Image, mode: str, size: tuple[int, int]) -> Image.Image:
    """Convert an image to a mode, and resize its largest centred part of these proportions."""
    if not _is_in_mode(image, mode) and _is_large(image):
        return _fit_in_strips(image, mode, size)
    image = _in_mode(image, mode)
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.BICUBIC)


def _fit_in_strips(image: Image.Image, mode: str, size: tuple[int, int]) -> Image.Image:
    """The same as `_fit` up to rounding, without converting the whole image at once."""
    (columns, rows), (width, height) = image.size, size
    part_columns = min(columns, rows * width / height)
    part_rows = min(rows, columns * height / width)
    left, top = (columns - part_columns) / 2, (rows - part_rows) / 2
    narrow = Image.new(mode, (width, rows))
    strip_rows = max(1, _STRIP_PIXELS // columns)
    for start in range(0, rows, strip_rows):
        strip = image.crop((0, start, columns, min(rows, start + strip_rows)))
        box = (left, 0, left + part_columns, strip.height)
        part = _in_mode(strip, mode).resize((width, strip.height), Image.Resampling.BICUBIC, box)
        narrow.paste(part, (0, start))
    return narrow.resize(size, Image.Resampling.BICUBIC, (0, top, width, top + part_rows))


def _is_large(image: Image.Image) -> bool:
    return image.width * image.height > _LARGE_PIXELS


def _is_in_mode(image: Image.Image, mode: str) -> bool:
    return image.mode == mode and "transparency" not in image.info


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if _is_in_mode(image, mode):
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, BACKGROUND)
        image = Image.alpha_composite(background, image)
    return image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert grey values of 16 bits, or floating-point ones from 0 to 1; Pillow clips them."""
    values = np.asarray(image)
    white = 1 if image.mode == "F" else 65_535
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= white:
        raise UserError(f"received grey values from {low:g} to {high:g}, expected 0 to {white}")
    grey = Image.fromarray(np.rint(values * np.float32(255 / white)).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(values != image.info["transparency"]).convert("L"))
    return grey
