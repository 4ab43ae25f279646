"""Frames of videos: animated GIF, PNG and WebP by Pillow, other files by OpenCV (extra `video`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from maskwise.errors import UserError
from maskwise.imaging.pil import opened, to_rgb

ENDINGS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".ogv")
ANIMATED = (".gif", ".webp", ".png", ".apng")


def is_video(path) -> bool:
    """Return whether a file is a video by its ending, or an animation by its number of frames."""
    ending = Path(path).suffix.lower()
    if ending in ENDINGS:
        return True
    if ending not in ANIMATED:
        return False
    try:
        with opened(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # reported where the image is read
        return False


def spread(total: int, limit: int | None) -> list[int]:
    """Return at most `limit` of the numbers 0 .. total - 1, evenly spread, with the first and the last."""
    if limit is None or total <= limit:
        return list(range(total))
    return [round(i * (total - 1) / max(1, limit - 1)) for i in range(limit)]


def frame_count(path) -> int:
    """Return the number of frames of a video. Raises UserError for a file that cannot be read."""
    if Path(path).suffix.lower() in ANIMATED:
        with opened(path) as image:
            return image.n_frames
    capture = opened_capture(path)
    try:
        count = int(capture.get(opencv().CAP_PROP_FRAME_COUNT))
        if count < 1:  # streams do not state it: count by decoding
            count = 0
            while capture.grab():
                count += 1
    finally:
        capture.release()
    if not count:
        raise UserError(f"{path} has no frame that can be read; convert it to MP4, or give a folder of frames")
    return count


def read_frames(path, numbers: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (number, uint8 [3, H, W]) of the frames with these ascending numbers; frames beyond the end are left out.

    Frames are decoded one after another, so that memory holds one of them.
    """
    wanted = set(numbers)
    if Path(path).suffix.lower() in ANIMATED:
        with opened(path) as image:
            for number, frame in enumerate(ImageSequence.Iterator(image)):
                if number in wanted:
                    yield number, as_tensor(np.array(to_rgb(frame)))
        return
    capture, cv2 = opened_capture(path), opencv()
    try:
        for number in range(max(wanted, default=-1) + 1):
            if not capture.grab():
                break
            if number in wanted:
                read, frame = capture.retrieve()
                if read:
                    yield number, as_tensor(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Return pixels [H, W, 3] as a tensor [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def opened_capture(path):
    """Open a video file by OpenCV. Raises UserError for one that it does not read."""
    capture = opencv().VideoCapture(os.fspath(path))
    if not capture.isOpened():
        raise UserError(f"cannot read the video {path}: convert it to MP4 (H.264), or give a folder of frames")
    return capture


def opencv():
    """Return OpenCV. Raises UserError where it is not installed."""
    try:
        import cv2
    except ImportError:
        raise UserError(
            "reading a video file needs OpenCV: pip install 'maskwise[video]', or give a folder of frames or a GIF"
        ) from None
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # the error raised here says it in one line
    return cv2
