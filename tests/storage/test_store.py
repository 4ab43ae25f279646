"""Requests to storage: repeated by a clock, until they succeed, cannot succeed, or the time is over."""

import errno

import pytest

from maskwise.errors import UserError
from maskwise.storage import faults, store
from maskwise.storage.store import Patience, Store


class Clock:
    """A clock that sleeping moves."""

    def __init__(self):
        self.now, self.pauses = 0.0, []

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds

    def patience(self, seconds, draw=1.0):
        return Patience(seconds, first=0.1, longest=10, clock=lambda: self.now, sleep=self.sleep, draw=lambda: draw)


class Files:
    """A filesystem whose answers are listed: bytes or errors, the last for ever."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), 0

    def cat_file(self, path, start=0, end=None, timeout=None):
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def serve(monkeypatch):
    def put(*answers):
        files = Files(*answers)
        monkeypatch.setattr(store, "filesystem", lambda address, key: files)
        return files

    return put


def test_pauses_double_up_to_the_longest_and_end_within_the_time(serve):
    clock = Clock()
    files = serve(OSError(errno.EREMOTEIO, "injected"))
    with pytest.raises(faults.Lost, match=r"s3://b/x could not be reached for 60 s \(OSError.*injected") as caught:
        Store("data.path", clock.patience(60)).read("s3://b/x", 0, 3)
    doubled = [min(10.0, 0.1 * 2**k) for k in range(20)]
    fitting = [pause for k, pause in enumerate(doubled) if sum(doubled[: k + 1]) < 60]
    assert clock.pauses == pytest.approx(fitting) and files.asked == len(fitting) + 1
    assert "\n" not in str(caught.value) and "speed.remote_timeout" in str(caught.value)


def test_the_lower_half_of_a_pause_is_never_drawn_away(serve):
    clock = Clock()
    serve(ConnectionResetError("cut"), ConnectionResetError("cut"), b"abc")
    assert Store("data.path", clock.patience(60, draw=0.0)).read("s3://b/x", 0, 3) == b"abc"
    assert clock.pauses == pytest.approx([0.05, 0.1])


def test_short_bodies_are_read_again_and_long_ones_refused(serve):
    clock = Clock()
    serve(b"ab", b"abc")
    assert Store("data.path", clock.patience(60)).read("s3://b/x", 5, 3) == b"abc" and len(clock.pauses) == 1
    serve(b"abcdef")
    with pytest.raises(UserError, match="does not serve ranges"):
        Store("data.path", clock.patience(60)).read("http://h/x", 5, 3)
    assert len(clock.pauses) == 1


class Answered(Exception):
    """An error as botocore raises it."""

    def __init__(self, status, code):
        super().__init__(f"{code} of https://b.host/x?X-Amz-Signature=secret")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


Answered.__module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    "error, words",
    [
        (FileNotFoundError("x"), "does not exist"),
        (PermissionError("x"), "no permission to read"),
        (Answered(403, "ExpiredToken"), r"no permission to read it \(ExpiredToken\)"),
        (Answered(404, "NoSuchBucket"), "there is no bucket s3://b"),
        (Answered(400, "InvalidArgument"), "cannot be read"),
        (OSError(errno.EINVAL, "bad"), "cannot be read"),
        (
            type("NoCredentialsError", (Exception,), {"__module__": "botocore"})("x"),
            "no credentials for s3://b; set AWS_",
        ),
    ],
)
def test_errors_that_cannot_pass_end_at_once_in_one_line(serve, error, words):
    clock = Clock()
    serve(error)
    with pytest.raises(faults.StorageError, match=words) as caught:
        Store("data.path", clock.patience(60)).read("s3://b/x", 0, 3)
    text = str(caught.value)
    assert not clock.pauses and "\n" not in text and "secret" not in text and text.startswith("data.path: s3://b/x")


@pytest.mark.parametrize("error", [Answered(500, "InternalError"), Answered(429, "x"), Answered(400, "IncompleteBody")])
def test_errors_that_may_pass_are_repeated(serve, error):
    clock = Clock()
    serve(error, error, b"abc")
    assert Store("data.path", clock.patience(60)).read("s3://b/x", 0, 3) == b"abc" and len(clock.pauses) == 2


def test_a_mistake_in_code_is_not_repeated(serve):
    clock = Clock()
    serve(TypeError("mistake"))
    with pytest.raises(TypeError):
        Store("data.path", clock.patience(60)).read("s3://b/x", 0, 3)
    assert not clock.pauses


def test_a_web_server_that_fails_is_not_taken_for_a_missing_file():
    missing = FileNotFoundError("x")
    missing.__cause__ = type("E", (Exception,), {"status": 503, "__module__": "aiohttp"})("x")
    assert faults.passes(faults.original(missing))
    missing.__cause__.status = 404
    assert not faults.passes(faults.original(missing))
