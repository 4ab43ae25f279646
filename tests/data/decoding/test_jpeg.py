"""Torch JPEG decoders give Pillow's pixels; files they treat differently are decoded by Pillow."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.data.decoding import jpeg as decoders
from maskwise.data.decoding.image import CorruptImage, decode
from maskwise.data.decoding.jpeg import JpegHeader, read_header
from maskwise.errors import UserError

TORCH = ("torchvision", "torchcodec")


def jpeg(mode="RGB", size=(61, 43), quality=90, **options):
    rng = np.random.default_rng(3)
    y, x = np.mgrid[: size[1], : size[0]]
    field = (
        127 + 80 * np.sin(0.2 * x + 0.1 * y + rng.uniform(0, 6, (3, 1, 1))) + rng.normal(0, 9, (3, size[1], size[0]))
    )
    buffer = io.BytesIO()
    Image.fromarray(field.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).convert(mode).save(
        buffer, "JPEG", quality=quality, **options
    )
    return buffer.getvalue()


def with_exif(**options):
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(exif=exif, **options)


KINDS = {
    "plain": jpeg(),
    "full chroma": jpeg(subsampling=0),
    "halved chroma": jpeg(subsampling=1),
    "progressive": jpeg(progressive=True),
    "gray": jpeg("L"),
    "coarse": jpeg(quality=20),
    "cmyk": jpeg("CMYK"),
    "turned": with_exif(),
    "one pixel": jpeg(size=(1, 1)),
}


@pytest.fixture(params=TORCH)
def decoder(request):
    if decoders.unavailable_reason(request.param):
        pytest.skip(f"{request.param}: {decoders.unavailable_reason(request.param)}")
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_equal_pillow(kind, decoder):
    gap = (decode(KINDS[kind], decoder=decoder).int() - decode(KINDS[kind]).int()).abs()
    assert gap.max() <= 3 and gap.float().mean() <= 0.1


def test_headers():
    assert read_header(jpeg()) == JpegHeader(43, 61, 3, False)
    assert read_header(jpeg(progressive=True)) == JpegHeader(43, 61, 3, False)
    assert read_header(jpeg("CMYK")).components == 4 and read_header(jpeg("L")).components == 1
    assert read_header(with_exif()).exif
    for data in (b"", b"\xff\xd8", jpeg()[:20], b"\xff\xd8\xff\xe0\xff\xff" + bytes(20), b"\x89PNG" + bytes(40)):
        assert read_header(data) is None


def record(monkeypatch, answer=None):
    """Replace the torchvision decoder by one that records its calls."""
    given = []

    def stand_in(data):
        given.append(data)
        if answer is None:
            raise RuntimeError("damaged")
        return answer

    monkeypatch.setattr(decoders, "load_decoder", lambda name: stand_in)
    return given


def test_which_files_reach_a_torch_decoder(monkeypatch):
    answer = torch.zeros(3, 43, 61, dtype=torch.uint8)
    given = record(monkeypatch, answer)
    assert decode(KINDS["plain"], decoder="torchvision") is answer
    assert tuple(decode(KINDS["turned"], decoder="torchvision").shape) == (3, 61, 43) and len(given) == 2
    for kind, name in (("cmyk", "torchvision"), ("cmyk", "torchcodec"), ("turned", "torchcodec")):
        assert torch.equal(decode(KINDS[kind], decoder=name), decode(KINDS[kind]))
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (9, 8, 7)).save(buffer, "PNG")
    assert decode(buffer.getvalue(), decoder="torchcodec")[:, 0, 0].tolist() == [9, 8, 7]
    assert decode(KINDS["plain"], decoder="torchvision", shrink=2).shape == (3, 22, 31)  # only Pillow scales
    with pytest.raises(CorruptImage, match="max_pixels"):
        decode(KINDS["plain"], decoder="torchvision", max_pixels=43 * 61 - 1)
    assert len(given) == 2


def test_pillow_decodes_where_a_torch_decoder_fails(monkeypatch):
    given = record(monkeypatch)
    assert torch.equal(decode(KINDS["plain"], decoder="torchvision"), decode(KINDS["plain"])) and len(given) == 1
    with pytest.raises(CorruptImage):
        decode(KINDS["plain"][:900], decoder="torchvision")


def test_shrinking_rounds_up_and_preserves_the_image():
    whole = decode(KINDS["plain"]).float()
    for by in (2, 4, 8):
        small = decode(KINDS["plain"], shrink=by)
        assert tuple(small.shape) == (3, -(-43 // by), -(-61 // by))
        blocks = torch.nn.functional.avg_pool2d(whole, by)
        assert (small[:, : blocks.shape[1], : blocks.shape[2]] - blocks).abs().mean() < 4
    assert tuple(decode(jpeg(size=(9, 8)), shrink=8).shape) == (3, 1, 2)


def test_resolve_decoder(monkeypatch):
    assert decoders.resolve_decoder("pil") == "pil" and decoders.unavailable_reason("pil") == ""
    assert decoders.resolve_decoder("auto") in decoders.PREFERRED
    monkeypatch.setattr(decoders, "unavailable_reason", lambda name: "" if name == "pil" else "not installed")
    assert decoders.resolve_decoder("auto") == "pil"
    with pytest.raises(UserError) as caught:
        decoders.resolve_decoder("torchcodec")
    assert (
        "not installed" in str(caught.value)
        and "data.decoder=auto" in str(caught.value)
        and "\n" not in str(caught.value)
    )
    monkeypatch.setattr(decoders, "unavailable_reason", lambda name: "")
    assert decoders.resolve_decoder("auto") == "torchcodec"
    with pytest.raises(UserError, match="pil, torchvision"):
        decoders.resolve_decoder("opencv")


def test_unavailable_reason_is_one_line_without_warnings(recwarn, capfd):
    for name in TORCH:
        assert "\n" not in decoders.unavailable_reason(name)
    assert not recwarn.list and capfd.readouterr() == ("", "")
