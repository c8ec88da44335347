"""Picture files that anyone may have made: opened with a limit of pixels, broken ones as one error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fluxrun.errors import one_line
from fluxrun.reading import Unreadable, check_plain

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 100_000_000
"""A picture of more (10000x10000) is not decoded: a file of a few kilobytes can claim any size."""


@contextmanager
def open_picture(path: Path) -> Iterator[Image]:
    """The picture in a file, decoded while the block runs. Raises FileNotFoundError or Unreadable, also in the block.

    The limit is looked at before anything is decoded, so that a decompression bomb takes no memory.
    """
    from PIL import Image as PillowImage

    try:
        check_plain(path)
        # Pillow warns from 89 million pixels on and raises from twice as many; only the limit here counts.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PillowImage.DecompressionBombWarning)
            with PillowImage.open(path) as picture:
                _check_size(picture)
                yield picture
    except (FileNotFoundError, Unreadable):
        raise
    except PillowImage.DecompressionBombError as error:
        raise Unreadable(f"has more than {MOST_PIXELS:,} pixels, the most that are read") from error
    # Pillow's readers raise these for broken files; MemoryError for a length that a chunk claims.
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, EOFError, OverflowError, MemoryError) as error:
        raise Unreadable(f"cannot be read as an image: {shortened(error)}") from error


def shortened(error: BaseException) -> str:
    """What Pillow says, without the path that the message names anyway."""
    text = one_line(error, 150)
    return "its format is not known" if text.startswith("cannot identify image file") else text


def _check_size(picture: Image) -> None:
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise Unreadable(f"has {width}x{height} pixels, more than the {MOST_PIXELS:,} that are read")
