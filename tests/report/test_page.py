"""The page of a run against the run's files, by numbers; hostile names, damaged and earlier runs."""

import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from maskwise import cli
from maskwise.build.runs import differences, read_run_folder
from maskwise.errors import UserError
from maskwise.report import charts, page, pictures
from maskwise.report.contents import read_contents
from support.old_files import OLD, restored
from support.run_folders import BASELINES, records_of, run_folder

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(1)">'


class Parsed(HTMLParser):
    """Tags, attributes and texts of a page, as a browser finds them; charts: those of its data by title."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.titles, self.inside = [], [], [], []
        self.data = ""
        self.feed(text)
        self.charts = dict(zip(self.titles, json.loads(self.data)["charts"]))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "figure" and "data-chart" in dict(attributes):
            assert int(dict(attributes)["data-chart"]) == len(self.titles)
            self.titles.append("")
        self.inside.append(tag)

    def handle_data(self, data):
        if self.inside[-1:] == ["script"] and self.tags[-1][1].get("id") == "data":
            self.data += data
        else:
            self.texts.append(data)
        if self.inside[-1:] == ["h3"] and self.titles and not self.titles[-1]:
            self.titles[-1] = data

    def handle_endtag(self, tag):
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def written(capsys, *words):
    """Status, last line and page of `maskwise report`."""
    status = cli.main(["report", *map(str, words)])
    out, error = capsys.readouterr()
    return status, out, error


def curve_of(chart, name):
    return next(series["points"] for series in chart["series"] if series["name"] == name)


def test_numbers_are_those_of_the_files(tmp_path, capsys):
    folder = run_folder(tmp_path / "mine", "optimizer.lr=3e-3", alarm="the features lie on a line", pictures=(8, 200))
    assert written(capsys, folder) == (0, f"page: {folder / 'report.html'}\n", "")
    text = (folder / "report.html").read_text(encoding="utf-8")
    shown, records = Parsed(text), records_of(folder)
    assert not (folder / ".report.html").exists() and len(text) < 400_000

    for title, name, key in (
        ("Training loss", "loss", "loss"),
        ("Training loss", "loss of the CLS token", "cls"),
        ("Loss of masked patches", "patch", "patch"),
        ("Entropy of the CLS targets", "mean entropy", "teacher_entropy"),
        ("Spread of the features", "feature_std", "feature_std"),
        ("Learning rate", "lr", "lr"),
        ("Images per second", "img/s", "img_s"),
    ):
        wanted = [[line["step"], pytest.approx(line[key], rel=1e-4)] for line in records if key in line]
        assert curve_of(shown.charts[title], name) == wanted and len(wanted) == 20, title
    assert "Masked patches" not in shown.charts, "0 at every step"

    accuracy = shown.charts["k-NN top-1 (%)"]
    assert curve_of(accuracy, "teacher") == [[0, 20], [20, 30], [40, 40]]
    assert {level["name"]: level["value"] for level in accuracy["levels"]} == {
        "untrained network": 30.5,
        "raw pixels": 17.25,
        "whitened pixels": 41.75,
        "chance": 12.5,
    }
    assert accuracy["marks"] == [[10, "alarm: rank_collapse"]]
    assert shown.charts["Entropy of the CLS targets"]["levels"][0]["value"] == pytest.approx(math.log(64), rel=1e-4)
    # warm-up of two epochs from .04 to .07: .04 in the first, .07 in the second
    warm = [[step, 0.04 if step <= 20 else 0.07] for step in range(2, 41, 2)]
    assert curve_of(shown.charts["Teacher temperature"], "of whole crops") == warm

    for wanted in (
        "40 / 40",
        "epoch 2 of 2",
        "40.0 %",
        "\N{MINUS SIGN}1.8 against whitened pixels, step 40",
        "k = 1, bank of 64 images, 32 queries",
        "320",  # images seen: 40 steps of 8
        "1:20, evaluations excluded",
        "abc123+ (with local changes)",
        "changed from debug/tiny",
        "the features lie on a line",
        "2 CPU cores, 1 rank, 1 thread",
    ):
        assert wanted in shown.text, wanted
    table = re.search(r"<td>optimizer.lr</td><td>0.016</td><td>0.003</td>", text)
    assert table and "<td>data.count</td><td>64</td><td>160</td>" in text


def test_pictures_are_small_and_span_the_run(tmp_path):
    folder = run_folder(tmp_path / "r", steps=2, pictures=range(0, 200, 10))
    frames = read_contents(folder).frames["attention_and_masks"]
    assert [frame.step for frame in frames] == [0, 30, 50, 80, 110, 140, 160, 190]
    for frame in frames:
        with Image.open(io.BytesIO(frame.jpeg)) as image:
            assert image.format == "JPEG" and image.size == frame.size == (60, 90)
            assert image.getpixel((30, 45)) == pytest.approx((frame.step, 100, 50), abs=4)
    large = tmp_path / "large.png"
    Image.new("RGB", (3000, 1000)).save(large)
    assert pictures.read_frame(1, large, []).size == (760, 253)


def test_no_text_of_a_run_becomes_markup(tmp_path, capsys):
    records = [
        {"step": 4, "loss": 1.0, HOSTILE: 2.0},
        {"step": 4, "report": HOSTILE, "numbers": {HOSTILE: 1.0}},
        {"step": 4, "alarm": HOSTILE, "kind": HOSTILE},
    ]
    name = HOSTILE.replace("/", "\N{DIVISION SLASH}")  # a slash would end a folder's name
    folder = run_folder(tmp_path / name, steps=2, records=records)
    about = json.loads((folder / "run.json").read_text())
    about |= {"command": HOSTILE, "commit": HOSTILE, "started": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    about["starts"] = [{**about["starts"][0], "device": HOSTILE, "threads": HOSTILE}] * 2
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "failed").write_text(HOSTILE)
    other = run_folder(tmp_path / "other", steps=2, records=records)
    for words in ((folder, "--out", tmp_path / "one.html"), (folder, other, "--out", tmp_path / "two.html")):
        assert written(capsys, *words)[0] == 0
        text = (tmp_path / words[-1]).read_text(encoding="utf-8")
        shown = Parsed(text)
        assert [attributes for tag, attributes in shown.tags if tag == "script"] == [
            {"type": "application/json", "id": "data"},
            {},
        ]
        assert not [tag for tag, _ in shown.tags if tag == "img"]
        assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on")]
        assert HOSTILE in shown.text and name in shown.text and "<script>alert" not in text


def test_a_run_in_progress(tmp_path, capsys):
    folder = run_folder(tmp_path / "r", steps=20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 22, "lo')  # being written
    (folder / ".lock").write_text("pid 7 on elsewhere\n")  # its heartbeat is new
    status, out, error = written(capsys, folder)
    assert (status, error) == (0, "") and out.count("\n") == 1
    shown = Parsed((folder / "report.html").read_text(encoding="utf-8"))
    assert "running pid 7 on elsewhere" in shown.text and "20 / 40" in shown.text
    assert "about 0:40 left" in shown.text  # 2 s a step, 20 steps


def test_a_run_without_steps_and_reports(tmp_path, capsys):
    folder = run_folder(tmp_path / "r", steps=0)
    for name in ("metrics.jsonl", "reports/baselines.json", "reports/knn_step_00000040.json"):
        (folder / name).unlink()
    assert written(capsys, folder)[0] == 0
    shown = Parsed((folder / "report.html").read_text(encoding="utf-8"))
    assert "No step was logged yet." in shown.text and not shown.charts


def test_each_damaged_file_is_one_line(tmp_path, capsys):
    folder = run_folder(tmp_path / "r", steps=6, pictures=(1, 2))
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join([*lines[:2], b"\xff\x00[1, 2]\n", *lines[2:]]))
    (folder / "run.json").write_text('{"images": 16, "sta')
    (folder / "reports" / "baselines.json").write_text('{"numbers": {}}')
    (folder / "reports" / "knn_step_00000040.json").write_text("[]")
    picture = folder / "pictures" / "attention_and_masks_step_00000001.png"
    picture.write_bytes(picture.read_bytes()[:60])
    status, out, error = written(capsys, folder)
    assert (status, error) == (0, "")
    assert out.splitlines() == [
        f"{folder}: run.json is missing or cannot be read",
        f"{folder}: metrics.jsonl cannot be read from line 3 on: {len(lines) - 1} lines are left out",
        f"{folder}: reports/baselines.json cannot be read",
        f"{folder}: reports/knn_step_00000040.json cannot be read",
        f"{folder}: pictures/attention_and_masks_step_00000001.png cannot be read",
        f"page: {folder / 'report.html'}",
    ]
    shown = Parsed((folder / "report.html").read_text(encoding="utf-8"))
    assert "from line 3 on" in shown.text and len(curve_of(shown.charts["Training loss"], "loss")) == 1
    (folder / "recipe.yaml").write_text("optimizer: {lr: fast}\n")
    [note] = [note for note in read_contents(folder).notes if "recipe.yaml" in note]
    assert note.startswith("recipe.yaml cannot be read: ") and "optimizer.lr" in note and "\n" not in note


@pytest.mark.parametrize("line", ['["step"]', '{"step": "x"}', '{"step": 3, "report": "knn"}', "7", '{"step": null}'])
def test_lines_that_no_run_writes_end_the_records(tmp_path, line):
    folder = run_folder(tmp_path / "r", steps=4)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    run = read_contents(folder)
    assert len(run.trained) == 2 and run.notes == ["metrics.jsonl cannot be read from line 4 on: 1 line is left out"]


def test_errors_are_one_line_and_leave_the_page_as_it_was(tmp_path, capsys, monkeypatch):
    folder = run_folder(tmp_path / "r", steps=2)
    (tmp_path / "empty").mkdir()
    for words, message in (
        ((tmp_path / "empty",), "is not a run folder"),
        ((tmp_path / "nowhere",), "is not a run folder"),
        ((folder, tmp_path / "empty"), "is not a run folder"),
        ((folder, folder), "a run is named twice"),
        ((folder, "--out", tmp_path / "no" / "x.html"), "its folder does not exist"),
        ((folder, "--out", tmp_path / "empty"), "cannot write"),
    ):
        status, out, error = written(capsys, *words)
        assert (status, out) == (2, "") and message in error and error.count("\n") == 1, words
    (folder / "report.html").write_text("before")
    monkeypatch.setattr("maskwise.engine.atomic_file.os.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["report", str(folder)]) == 130
    capsys.readouterr()
    assert (folder / "report.html").read_text() == "before" and not (folder / ".report.html").exists()


def test_runs_are_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "x" / "a")
    run_folder(tmp_path / "x" / "b", "optimizer.lr=1e-3", "masking.ratio=0.2", pictures=(5, 9))
    run_folder(tmp_path / "c", "optimizer.lr=1e-3", steps=20)
    status, out, error = written(capsys, "x/a", "x/b", "c", "--json")
    result = json.loads(out)
    assert (status, error, result["page"]) == (0, "", "comparison.html")
    assert [row["knn"] for row in result["runs"]] == [40.0, 40.0, 30.0] and result["runs"][0]["notes"] == []
    text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    shown = Parsed(text)
    for name in ("a", "b", "c"):
        folder = tmp_path / ("c" if name == "c" else f"x/{name}")
        wanted = [[line["step"], pytest.approx(line["cls"], rel=1e-4)] for line in records_of(folder) if "cls" in line]
        assert curve_of(shown.charts["Training loss: loss of the CLS token"], name) == wanted
    assert {level["name"] for level in shown.charts["k-NN top-1 (%)"]["levels"]} >= {"whitened pixels", "chance"}
    assert "<td>optimizer.lr</td><td>0.016</td><td>0.001</td><td>0.001</td>" in text
    assert "<td>masking.ratio</td><td>0.3</td><td>0.2</td><td>0.3</td>" in text and "<td>data.count</td>" not in text
    assert "b, step 9" in shown.text and "b, step 5" not in shown.text
    runs = [read_run_folder(tmp_path / name) for name in ("x/a", "x/b", "c")]
    assert differences(*runs[:2]) == runs[0].recipe.changes(runs[1].recipe)
    broken = tmp_path / "c" / "recipe.yaml"
    broken.write_text("optimizer: {lr: fast}\n")
    with pytest.raises(UserError):
        differences(runs[0], read_run_folder(tmp_path / "c"))
    assert written(capsys, "x/a", "c")[0] == 0


def test_baselines_of_other_images_are_not_drawn_for_all(tmp_path):
    run_folder(tmp_path / "a", steps=20)
    report = json.loads((run_folder(tmp_path / "b", steps=20) / "reports" / "baselines.json").read_text())
    report["numbers"] = {**BASELINES, "pixels_top1_k1": 20.0}
    (tmp_path / "b" / "reports" / "baselines.json").write_text(json.dumps(report))
    runs = [read_contents(tmp_path / name) for name in "ab"]
    levels = charts.knn_chart(runs, ["a", "b"]).chart.levels
    assert levels == {"untrained network": 30.5, "whitened pixels": 41.75, "chance": 12.5}


@pytest.mark.parametrize("name", sorted(path.name for path in (OLD / "trained").iterdir()))
def test_runs_of_earlier_versions(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = read_contents(restored("trained", name))
    assert run.notes == [] and run.trained
    topics = [charts.loss_topic([run]), *charts.COLLAPSE, *charts.SCHEDULES, *charts.SPEED, *charts.other_topics([run])]
    drawn = charts.topic_charts(topics, [run], [name])
    assert "Training loss" in {each.title for each in drawn}
    if name == "alarms":
        assert {kind for _, kind, _ in run.raised} >= {"student_equals_teacher", "stale_teacher", "loss_at_log_k"}
        monkeypatch.setattr(charts, "COLLAPSE", charts.COLLAPSE[:1])
        assert "student_equals_teacher" in page.page([run])
