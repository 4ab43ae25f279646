"""Frames of videos: which are read, and their content."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.data.decoding.video import frame_count, is_video, read_frames, spread
from maskwise.errors import UserError

LEVELS = range(0, 250, 25)  # gray of the ten frames


def test_numbers_are_spread_with_both_ends():
    assert spread(10, None) == spread(10, 10) == list(range(10))
    assert spread(10, 4) == [0, 3, 6, 9] and spread(10, 1) == [0] and spread(0, 3) == []


def gif(path):
    frames = [Image.new("L", (20, 12), level) for level in LEVELS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40)


def test_animations_by_pillow(tmp_path):
    gif(tmp_path / "a.gif")
    Image.new("RGB", (5, 5)).save(tmp_path / "still.png")
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    assert is_video(tmp_path / "a.gif") and frame_count(tmp_path / "a.gif") == 10
    assert not is_video(tmp_path / "still.png") and not is_video(tmp_path / "broken.gif")
    frames = dict(read_frames(tmp_path / "a.gif", [0, 4, 9]))
    assert list(frames) == [0, 4, 9]
    for number, frame in frames.items():
        assert frame.dtype == torch.uint8 and frame.shape == (3, 12, 20) and (frame == LEVELS[number]).all()


def test_files_by_opencv(tmp_path):
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "a.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    if not writer.isOpened():
        pytest.skip("this build of OpenCV writes no AVI")
    for level in LEVELS:
        writer.write(np.full((48, 64, 3), (level, 40, 90), np.uint8))  # blue, green, red
    writer.release()
    assert is_video(path) and frame_count(path) == 10
    frames = dict(read_frames(path, [2, 7]))
    assert list(frames) == [2, 7]
    for number, frame in frames.items():
        color = torch.tensor([90, 40, LEVELS[number]]).view(3, 1, 1)
        assert frame.shape == (3, 48, 64) and (frame.int() - color).abs().max() <= 12


def test_a_file_that_is_no_video_and_a_missing_library_are_one_line(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="cannot read the video .*a.mp4: convert it to MP4"):
        frame_count(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"needs OpenCV: pip install 'maskwise\[video\]'"):
        frame_count(tmp_path / "a.mp4")
