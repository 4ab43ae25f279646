"""Writing of exported folders: atomic, whatever fails."""

from pathlib import Path

import pytest

from export.folder.test_folder import build
from export.folder.test_local_paths import files_of
from maskwise.errors import UserError
from maskwise.export import write
from maskwise.export.folder import model_card


@pytest.mark.parametrize("place", ["files", "comparison", "card", "exchange"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_what_was_there(tmp_path, monkeypatch, place, error):
    write.write(build(), tmp_path / "out")
    before = dict(files_of(tmp_path / "out"))

    def fail(*args, **kwargs):
        raise error

    if place == "exchange":
        rename, calls = Path.rename, []

        def second_fails(self, target):
            calls.append(target)
            return fail() if len(calls) == 2 else rename(self, target)

        monkeypatch.setattr(Path, "rename", second_fails)
    else:
        module, name = {"files": (write, "preprocessor"), "comparison": (write.verify, "compare"),
                        "card": (model_card, "write")}[place]  # fmt: skip
        monkeypatch.setattr(module, name, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        write.write(build(init_values=0.5), tmp_path / "out")
    if isinstance(error, OSError):
        assert "No space left on device): free some space" in str(caught.value)
    assert dict(files_of(tmp_path / "out")) == before
    if place != "exchange":
        with pytest.raises((UserError, KeyboardInterrupt)):
            write.write(build(), tmp_path / "deep" / "er" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
