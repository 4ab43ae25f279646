"""Which files are images, the same for folders and tar files, and the line about those that are left out."""

import io
import os

import pytest
from PIL import Image

from data.datasets.test_tar import pack, png
from maskwise.data.datasets import Folder, ImageList, Tar
from maskwise.data.decoding.image import CorruptImage, decode
from maskwise.data.notes import notes
from maskwise.imaging.formats import endings

# ending -> Pillow's format to write it
WRITTEN = {
    **{".jpg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".JPEG": "JPEG", ".png": "PNG", ".apng": "PNG"},
    **{".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM", ".pnm": "PPM"},
    **{".avif": "AVIF", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".tga": "TGA", ".qoi": "QOI", ".pcx": "PCX"},
    **{".dib": "DIB", ".ico": "ICO"},
}


def encoded(form):
    held = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 40, 40)).save(held, form)
    return held.getvalue()


@pytest.fixture
def files(tmp_path):
    """One file of each ending that is read, by name."""
    content = {f"{k:02d}{ending}": encoded(form) for k, (ending, form) in enumerate(WRITTEN.items())}
    (tmp_path / "photos").mkdir()
    for name, data in content.items():
        (tmp_path / "photos" / name).write_bytes(data)
    return content


def test_every_readable_ending_is_listed_and_decoded(tmp_path, files):
    (tmp_path / "rows.txt").write_text("".join(f"photos/{name}\n" for name in sorted(files)))
    pack(tmp_path / "a.tar", {f"photos/{name}": files[name] for name in sorted(files)})
    for data in (Folder(tmp_path / "photos"), ImageList(tmp_path / "rows.txt"), Tar(tmp_path / "a.tar")):
        assert len(data) == len(WRITTEN) and data.notes == []
        for k in range(len(data)):
            red, green, _ = data.image(k)[:, 16, 16].tolist()
            assert abs(red - 200) < 6 and abs(green - 40) < 6, data.name(k)


OTHERS = ["a.heic", "b.HEIC", "c.dng", "d.svg", "noending", "e.npy", "f.zip", "g.jpg.part"]
QUIET = ["a.txt", "b.json", "README", "LICENSE", "Thumbs.db", "._a.jpg", "h.mp4", "desktop.ini"]
LINE = (
    "8 of 9 files in {} are left out: 2 .heic, 1 .dng, 1 .npy, 1 .part, 1 .svg, 1 .zip, 1 no extension (pip install "
    "pillow-heif to read HEIC; arrays are read with data.bits=16, or where data.mean has other than three numbers; "
    "unpack archives)"
)


@pytest.mark.skipif(".heic" in endings(), reason="HEIC is read here")
def test_files_that_are_left_out_are_counted_in_one_line(tmp_path):
    names = ["1.png", *OTHERS, *QUIET]
    (tmp_path / "photos").mkdir()
    for name in names:
        (tmp_path / "photos" / name).write_bytes(png(1))
    pack(tmp_path / "a.tar", {f"photos/{name}": png(1) for name in names})
    folder, packed = Folder(tmp_path / "photos"), Tar(tmp_path / "a.tar")
    assert len(folder) == len(packed) == 1
    assert folder.notes == [LINE.format(tmp_path / "photos")] and packed.notes == [LINE.format(tmp_path / "a.tar")]
    assert notes({"data": packed, "test": None}) == [f"data: {packed.notes[0]}"]
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    for name in ("1.png", *QUIET):
        (quiet / name).write_bytes(png(1))
    assert Folder(quiet).notes == []
    assert len(Folder(tmp_path / "photos", channels=1)) == 2  # the array too


def test_a_heic_image_under_another_name_says_what_it_is():
    with pytest.raises(CorruptImage, match="a HEIC image: pip install pillow-heif to read it"):
        decode(b"\0\0\0\x24ftypheic\0\0\0\0mif1", "a.jpg")


def test_hidden_and_system_files_make_no_class(tmp_path):
    paths = ["cat/1.png", "dog/2.png", "__MACOSX/cat/._1.png", "__MACOSX/x.png", ".ipynb_checkpoints/3.png"]
    paths += ["cat/@eaDir/1.png/SYNO.jpg", "dog/.2.png", "dog/._2.png", "lost+found/9.png"]
    for path in paths:
        (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / path).write_bytes(png(1))
    data = Folder(tmp_path / "set")
    assert data.classes == ["cat", "dog"] and list(data.files) == ["cat/1.png", "dog/2.png"]
    line = f"1 of 3 files in {tmp_path / 'set'} are left out: 1 hidden image (its name begins with a dot)"
    assert data.notes == [line]
    packed = Tar(pack(tmp_path / "a.tar", {path: png(1) for path in paths}))
    assert packed.classes == ["cat", "dog"] and packed.names == ["cat/1.png", "dog/2.png"]
    relative = Tar(pack(tmp_path / "b.tar", {f"./{path}": png(1) for path in paths}))
    assert relative.classes == ["cat", "dog"]


def test_links_folders_named_like_images_and_pipes(tmp_path):
    root = tmp_path / "set"
    (root / "b" / "x.jpg").mkdir(parents=True)  # a folder
    (root / "b" / "x.jpg" / "1.png").write_bytes(png(1))
    (root / "b" / "2.png").write_bytes(png(2))
    (root / "b" / "up").symlink_to(root)
    (root / "a").symlink_to(root / "b")
    (root / "c").symlink_to(root / "b")
    (root / "b" / "linked.png").symlink_to(root / "b" / "2.png")
    (root / "b" / "gone.png").symlink_to("nowhere")
    (root / "b" / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "b" / "pipe.png")
    data = Folder(root)
    assert list(data.files) == ["b/2.png", "b/linked.png", "b/x.jpg/1.png"] and data.classes == ["b"]
    counts = data.notes[0].split(": ")[1].split(", ")
    assert sorted(counts) == ["1 pipe or device", "2 broken link", "2 link to a folder that is listed already"]


def test_linked_class_folders_are_followed_in_the_order_of_their_names(tmp_path):
    (tmp_path / "all" / "cat").mkdir(parents=True)
    (tmp_path / "all" / "cat" / "1.png").write_bytes(png(1))
    (tmp_path / "set").mkdir()
    for name in ("z", "m", "a"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "all" / "cat")
    assert list(Folder(tmp_path / "set").files) == ["a/1.png"]


def test_rows_that_repeat_a_file_are_counted(tmp_path):
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "rows.csv").write_text("path,box\n1.png,a\n1.png,b\n1.png,c\n")
    data = ImageList(tmp_path / "rows.csv")
    assert len(data) == 3
    line = f"2 of 3 rows of {tmp_path / 'rows.csv'} name a file that an earlier row names (the first: 1.png)"
    assert data.notes == [line]
