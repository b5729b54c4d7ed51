import builtins
import re
from dataclasses import replace

import pytest

from jaxptis.performance import Span, Timeline
from jaxptis.plan import Task
from tests.pictures.timelines import even, jittered, uneven

BEGINS = {
    ".html": b"<!doctype html>",
    ".json": b'{"traceEvents":[',
    ".png": b"\x89PNG\r\n\x1a\n",
    ".svg": b"<?xml",
    ".pdf": b"%PDF-",
    ".txt": b"device 0 ",
}
suffixes = pytest.mark.parametrize("suffix", BEGINS)


@pytest.fixture
def needs_matplotlib(suffix):
    if suffix in (".png", ".svg", ".pdf"):
        pytest.importorskip("matplotlib", reason="needs the extra 'pictures'")


@suffixes
@pytest.mark.parametrize("strategy", ["1f1b", "zb-v"])
def test_every_form(tmp_path, suffix, strategy, needs_matplotlib):
    plan, timeline = even(strategy, 4, 8, transfer_s=1e-4)
    alone, both = tmp_path / f"alone{suffix}", tmp_path / f"both{suffix.upper()}"
    timeline.save(str(alone))
    timeline.save(both, measured=jittered(timeline), plan=plan)
    for path in alone, both:
        assert path.read_bytes().startswith(BEGINS[suffix])
    assert both.stat().st_size > alone.stat().st_size


@suffixes
def test_the_title_is_in_every_form(tmp_path, suffix, needs_matplotlib):
    _, timeline = uneven(4)
    timeline.save(tmp_path / f"plain{suffix}")
    timeline.save(tmp_path / f"titled{suffix}", title="A $title_")
    titled = (tmp_path / f"titled{suffix}").read_bytes()
    assert titled != (tmp_path / f"plain{suffix}").read_bytes()
    if suffix not in (".png", ".pdf"):  # there the text is packed
        assert b"A $title_" in titled


@suffixes
def test_what_does_not_belong_together_is_refused(tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    plan, timeline = uneven(4)
    _, other = even("zb-v", 4, 8)
    with pytest.raises(ValueError, match="device 0 runs stage 7, in the plan it does not"):
        other.save(path, plan=plan)
    with pytest.raises(ValueError, match=r"the measured timeline device 0 runs stage 7"):
        timeline.save(path, measured=other, plan=plan)
    moved = replace(timeline, spans=(timeline.spans[1], timeline.spans[0], *timeline.spans[2:]))
    with pytest.raises(ValueError, match="device 0 runs stage 1, in the plan it does not"):
        moved.save(path, plan=plan)
    with pytest.raises(ValueError, match="has 4 devices, the plan 2"):
        timeline.save(path, plan=even("1f1b", 2, 4)[0])
    with pytest.raises(ValueError, match="measured timeline has 2 devices, the predicted 4"):
        timeline.save(path, measured=even("1f1b", 2, 4)[1])
    with pytest.raises(ValueError, match="the timeline takes 0 s"):
        Timeline(((Span(Task(0, "F", 0), 0.0, 0.0),),)).save(path)
    assert not path.exists()


@pytest.mark.parametrize("name", ["picture", "picture.jpeg", "html"])
def test_an_unknown_suffix_is_refused(tmp_path, name):
    _, timeline = uneven(4)
    known = ".html, .json, .png, .svg, .pdf, .txt"
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*{re.escape(known)}"):
        timeline.save(tmp_path / name)


@suffixes
def test_a_device_without_tasks_and_memory(tmp_path, suffix, needs_matplotlib):
    _, timeline = uneven(4)
    idle = replace(timeline, spans=(*timeline.spans, ()), memory=())
    idle.save(tmp_path / f"picture{suffix}")


def test_a_chart_of_text_says_what_holds_up(tmp_path):
    plan, timeline = uneven(8)
    timeline.save(tmp_path / "step.txt", measured=jittered(timeline), plan=plan)
    text = (tmp_path / "step.txt").read_text(encoding="utf-8")
    assert re.search(r"^predicted: Device 3 computes .* has norm and head\.$", text, re.MULTILINE)
    assert re.search(r"^measured: Device 3 computes", text, re.MULTILINE)
    assert re.search(r"^predicted: Device 0 needs the most memory", text, re.MULTILINE)


def test_a_figure_has_text_and_boxes(tmp_path):
    """In an SVG text is text: the devices, their bubbles and the microbatch in each box."""
    pytest.importorskip("matplotlib", reason="needs the extra 'pictures'")
    plan, timeline = even("gpipe", 4, 12)
    timeline.save(tmp_path / "step.svg", plan=plan)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "step.svg").read_text())
    assert [each for each in texts if each.startswith("device")] == [
        f"device {device}: 2 layers" for device in range(4)
    ]
    assert texts.count("20 %") == 4
    assert "lighter: a later stage of the device" not in texts
    # A forward and a backward on each of 4 devices; 0 may stand at the axis, too.
    assert [texts.count(str(m)) for m in (1, 7, 11)] == [8, 8, 8]


def test_a_figure_explains_lighter_boxes_and_many_become_pixels(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'pictures'")
    few, many = tmp_path / "few.svg", tmp_path / "many.svg"
    even("zb-v", 2, 4)[1].save(few)
    even("zb-v", 8, 512)[1].save(many)  # 24,576 tasks
    for path in few, many:
        assert "lighter: a later stage of the device" in path.read_text()
    assert "<image" in many.read_text() and "<image" not in few.read_text()
    assert many.stat().st_size < 2**20


def test_without_matplotlib_a_figure_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    _, timeline = uneven(4)
    with pytest.raises(ValueError, match=r"pip install 'jaxptis\[pictures\]'"):
        timeline.save(tmp_path / "step.png")
    timeline.save(tmp_path / "step.html")
