import base64
import configparser
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import jaxptis.pictures
from jaxptis.performance import Timeline
from jaxptis.pictures import save_html
from jaxptis.plan import Plan, StagePlan, Task
from tests.pictures.timelines import costs_of, even, jittered, timeline_of, uneven

ROOT = Path(jaxptis.pictures.__file__).parents[2]
HOSTILE = ("</script><script>alert(1)</script>", "\"'&lt;<!--<img/src=x>", "h\u00e9ad\U0001f600")


class Page(HTMLParser):
    """What a browser finds: scripts, styles, title and policy; it decodes what HTML escapes."""

    def __init__(self, path):
        super().__init__()
        self.path, self.inside, self.texts, self.tags = path, None, {}, []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.inside = attrs.get("id", tag)
        if attrs.get("http-equiv") == "Content-Security-Policy":
            self.policy = attrs["content"]

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        self.texts[self.inside] = self.texts.get(self.inside, "") + text

    @property
    def data(self):
        return json.loads(self.texts["data"])


def page_of(tmp_path, *args, **options):
    save_html(tmp_path / "page.html", *args, **options)
    return Page(tmp_path / "page.html")


def hostile():
    stages = tuple(StagePlan(layers=(f"{name}{d}",), device=d) for d, name in enumerate(HOSTILE))
    rows = tuple((Task(d, "F", 0), Task(d, "B", 0)) for d in range(len(HOSTILE)))
    plan = Plan(stages=stages, schedule=rows)
    return plan, timeline_of(plan, costs_of(plan), 1e-3)


@pytest.mark.parametrize("title", [*HOSTILE, "\u2028 line \u2029 paragraph"])
def test_names_of_users_stay_data(tmp_path, title):
    """The page has two scripts, ours and the data; the names come out of the data unchanged."""
    plan, timeline = hostile()
    page = page_of(tmp_path, timeline, plan=plan, title=title)
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert "img" not in [tag for tag, _ in page.tags]
    assert page.texts["title"] == page.data["title"] == title
    assert [stage["layers"] for stage in page.data["stages"]] == [
        [f"{name}{d}"] for d, name in enumerate(HOSTILE)
    ]
    assert re.fullmatch(r"[^<>&\u2028\u2029]*", page.texts["data"])


def test_the_page_needs_no_other_file(tmp_path):
    plan, timeline = even("zb-v", 2, 4)
    page = page_of(tmp_path, timeline, plan=plan)
    assert not [attrs for _, attrs in page.tags if {"src", "href"} & attrs.keys()]
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|innerHTML", page.source)


def test_the_policy_allows_just_our_script_and_style(tmp_path):
    plan, timeline = even("zb-v", 2, 4)
    page = page_of(tmp_path, timeline, plan=plan)

    def source_of(name):
        return base64.b64encode(hashlib.sha256(page.texts[name].encode()).digest()).decode()

    assert page.policy == (
        f"default-src 'none'; style-src 'sha256-{source_of('style')}'; "
        f"script-src 'sha256-{source_of('script')}'"
    )


def test_the_page_has_every_task_once(tmp_path):
    plan, timeline = even("zb-v", 4, 8, transfer_s=1e-4)
    page = page_of(tmp_path, timeline, plan=plan)
    (shown,) = page.data["timelines"]
    for device, row in enumerate(timeline.spans):
        for index, (task, start_s, end_s) in enumerate(row, start=shown["first"][device]):
            name = f"{shown['stage'][index]}{shown['kind'][index]}{shown['microbatch'][index]}"
            assert name == str(task)
            assert shown["start_s"][index] == pytest.approx(start_s, rel=1e-8)
            assert shown["end_s"][index] == pytest.approx(end_s, rel=1e-8)
    assert shown["first"][-1] == len(shown["stage"]) == len(shown["needs"]) == 4 * 8 * 2 * 3


def test_tasks_know_what_they_need(tmp_path):
    """In the V of two devices: stage 0 and 3 on device 0, stage 1 and 2 on device 1."""
    plan, timeline = even("zb-v", 2, 3)
    (shown,) = page_of(tmp_path, timeline, plan=plan).data["timelines"]
    columns = zip(shown["stage"], shown["kind"], shown["microbatch"], strict=True)
    names = ["{}{}{}".format(*column) for column in columns]
    needs = {n: {names[i] for i in of} for n, of in zip(names, shown["needs"], strict=True)}
    assert needs["0F2"] == set()
    assert needs["2F1"] == {"1F1"}
    assert needs["3I1"] == {"3F1"}
    assert needs["1I2"] == {"1F2", "2I2"}
    assert needs["1W2"] == {"1I2"}


def test_transfers_name_the_task_that_made_what_is_sent(tmp_path):
    plan, timeline = uneven(2, transfer_s=0.5e-3)
    (shown,) = page_of(tmp_path, timeline, plan=plan).data["timelines"]
    sent = shown["transfers"]
    # To the next stage and back, for each microbatch.
    assert len(sent["start_s"]) == 2 * 3 * 2
    for source, target, task, reader, start_s, end_s in zip(
        *(sent[name] for name in ("source", "target", "made_by", "reader", "start_s", "end_s")),
        strict=True,
    ):
        assert shown["first"][source] <= task < shown["first"][source + 1]
        assert target == reader == source + (1 if shown["kind"][task] == "F" else -1)
        assert start_s == shown["end_s"][task]
        assert end_s - start_s == pytest.approx(0.5e-3)


def test_the_numbers_of_the_tables(tmp_path):
    """A device computes all that is not bubble; the kinds of an even V take 1, 1.2 and 0.8 ms."""
    plan, timeline = even("zb-v", 4, 8, layers_per_stage=3)
    (shown,) = page_of(tmp_path, timeline, plan=plan).data["timelines"]
    for device, facts in enumerate(shown["devices"]):
        kinds = {"F": 1.0, "I": 1.2, "W": 0.8}
        assert facts["kind_s"] == pytest.approx(
            {k: 2 * 8 * 3 * ms / 1e3 for k, ms in kinds.items()}
        )
        each_s = pytest.approx(8 * 3 * 3e-3)
        assert facts["stage_s"] == {str(device): each_s, str(7 - device): each_s}
        assert facts["busy_s"] == pytest.approx(2 * 8 * 3 * 3e-3)
        idle_s = facts["warm_up_s"] + facts["steady_s"] + facts["cool_down_s"]
        assert idle_s == pytest.approx(timeline.step_s - 2 * 8 * 3 * 3e-3)
        memory = facts["memory"]
        assert memory["peak_bytes"] == max(memory["num_bytes"]) == sum(memory["parts"].values())


def test_predicted_and_measured_stand_together(tmp_path):
    plan, timeline = uneven(4)
    page = page_of(tmp_path, timeline, measured=jittered(timeline), plan=plan)
    assert [each["name"] for each in page.data["timelines"]] == ["predicted", "measured"]
    predicted, measured = page.data["timelines"]
    assert predicted["kind"] == measured["kind"]
    assert [each["memory"] is None for each in measured["devices"]] == [True] * 4
    assert predicted["bottleneck"] == measured["bottleneck"] == [3]


def test_tasks_are_in_order_of_time(tmp_path):
    """The page searches by time, but clocks may put what is measured a little out of order."""
    plan, timeline = even("gpipe", 2, 2)
    first, second, *more = timeline.spans[0]
    swapped = Timeline(((second, first, *more), timeline.spans[1]))
    (shown,) = page_of(tmp_path, swapped, plan=plan).data["timelines"]
    for start, end in zip(shown["first"], shown["first"][1:], strict=False):
        assert shown["start_s"][start:end] == sorted(shown["start_s"][start:end])


def test_times_that_json_lacks_are_refused(tmp_path):
    plan, timeline = even("gpipe", 2, 2)
    curve = replace(timeline.memory[0], times_s=(math.nan, *timeline.memory[0].times_s[1:]))
    broken = replace(timeline, memory=(curve, timeline.memory[1]))
    with pytest.raises(ValueError, match="JSON"):
        save_html(tmp_path / "page.html", broken, plan=plan)
    assert not (tmp_path / "page.html").exists()


def test_the_wheel_has_the_parts_of_the_page():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    folder = Path(jaxptis.pictures.__file__).parent
    patterns = config["options.package_data"]["jaxptis.pictures"].split()
    packed = {path for pattern in patterns for path in folder.glob(pattern)}
    assert packed == {p for p in folder.rglob("*") if p.suffix in {".html", ".css", ".js"}}
    assert len(packed) > 5
