"""The page as a person uses it. Skipped where no Chromium is on PATH or named by $CHROMIUM."""

from operator import mul

import pytest

from jaxptis.pictures import find_bottleneck, say_memory
from jaxptis.plan import Plan, StagePlan, Task
from tests.pictures.browser import Browser, find_chromium
from tests.pictures.timelines import costs_of, even, jittered, timeline_of, uneven

DRAWN = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = find_chromium()
    if executable is None:
        pytest.skip("needs Chromium on PATH, or its path in $CHROMIUM")
    browser = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Return a function that saves a page, opens it and waits until it is drawn."""

    def open_page(timeline, **options):
        timeline.save(tmp_path / "page.html", **options)
        browser.open(tmp_path / "page.html")
        browser.run(DRAWN)
        assert browser.faults() == []
        return browser

    yield open_page
    assert browser.faults() == []
    # The page itself, and nothing else.
    assert [url.partition(":")[0] for url in browser.requests()] == ["file"]


def box_of(browser, timeline, name):
    """Return a point of a task's box, in the middle but for a part of a pixel, and its width."""
    task = Task.parse(name)
    left, right, y = browser.run(
        f"""(() => {{
          const timeline = timelines[{timeline}], box = canvas.getBoundingClientRect();
          const at = place(timeline, {task.stage}, "{task.kind}", {task.microbatch});
          const task = timeline.taskAt[at], lane = laneOf(timeline, deviceOf(timeline, task));
          const [left, right] = [toX(timeline.start[task]), toX(timeline.end[task])];
          return [box.left + left, box.left + right, box.top + topOf(lane) + lane.tasks / 2];
        }})()"""
    )
    return int((left + right) / 2), int(y), right - left


def color_at(browser, x, y):
    """Return the colour that is drawn at a point of the window."""
    red, green, blue = browser.run(
        f"""(() => {{
          const box = canvas.getBoundingClientRect();
          const [x, y] = [{x} - box.left, {y} - box.top].map((each) => Math.round(each * ratio));
          return [...pen.getImageData(x, y, 1, 1).data].slice(0, 3);
        }})()"""
    )
    return f"#{red:02x}{green:02x}{blue:02x}"


def hovered(browser, x, y):
    browser.mouse("Moved", x, y)
    return browser.run("hover.hidden ? [] : [...hover.children].map((line) => line.innerText)")


def test_boxes_are_drawn_where_the_tasks_are(opened):
    plan, timeline = uneven(4, transfer_s=0.2e-3)
    browser = opened(timeline, plan=plan)
    for name, color in ("3F0", "#0072b2"), ("3B1", "#d55e00"), ("0B3", "#d55e00"):
        x, y, width = box_of(browser, 0, name)
        assert color_at(browser, x - width / 2 + 2, y) == color
        assert color_at(browser, x + width / 2 - 2, y) == color
    # Device 0 idles before its first backward: there is no box.
    x, y, width = box_of(browser, 0, "0B0")
    assert color_at(browser, x - width / 2 - 4, y) not in ("#0072b2", "#d55e00")


def test_pointing_tells(opened):
    """0F1 runs from 1.1 to 2.2 ms; 2F0 ends at 5.5 ms and is on device 3 a fifth later."""
    plan, timeline = uneven(4, transfer_s=0.2e-3)
    browser = opened(timeline, measured=jittered(timeline), plan=plan)
    x, y, _ = box_of(browser, 0, "0F1")
    words, layers, times, measured, memory = hovered(browser, x, y)
    assert words == "forward of stage 0, microbatch 1"
    assert layers == "layers: embed, layers_0"
    assert times == "1.10 ms to 2.20 ms, takes 1.1 ms on device 0, predicted"
    assert measured.startswith("measured: 1.13 ms to ")
    assert memory.startswith("the device then holds ")

    x, y, width = box_of(browser, 0, "3F0")
    idle = hovered(browser, x - width / 2 - 8, y)
    assert idle[0] == "device 3, predicted idles 5.7 ms (warm-up)"
    assert idle[2] == "which needs 2F0 of device 2, done at 5.50 ms, here at 5.70 ms"

    top, at = browser.run("[canvas.getBoundingClientRect().top + topOf(lanes[0]), toX(0.0012)]")
    left = browser.run("canvas.getBoundingClientRect().left")
    transfer = hovered(browser, left + at, top + browser.run("lanes[0].tasks") + 2)
    assert transfer[0] == "transfer from device 0 to device 1"
    assert transfer[1] == "what 0F0 made, for stage 1: 16 MiB"

    below = browser.run("topOf(lanes[2]) - topOf(lanes[0]) + lanes[2].tasks + lanes[2].transfers")
    assert hovered(browser, left + at, top + below - 1) == transfer  # where it is received

    height = browser.run("lanes[0].height")
    assert hovered(browser, left + at, top + height - 2)[1] == "peak: 4.09 GiB at 3.30 ms"
    browser.mouse("Moved", 5, 5)
    assert browser.run("hover.hidden")


def test_a_click_shows_what_is_waited_for(opened):
    plan, timeline = uneven(4, transfer_s=0.2e-3)
    browser = opened(timeline, plan=plan)
    browser.click(*box_of(browser, 0, "1B0")[:2])
    text = browser.run("document.getElementById('selected').innerText").split("\n")
    assert text[0].startswith("1B0: backward of stage 1, microbatch 0.")
    assert "Its device waited" in "".join(text)
    assert "for 2B0 of device 2, done at " in "".join(text)
    buttons = browser.run(
        "[...document.querySelectorAll('#selected button')].map((b) => b.innerText)"
    )
    # Needs a forward and a gradient; the stage before needs it; in 1F1B forwards stand around it.
    names = [each.partition(" ")[0] for each in buttons]
    assert names == ["1F0", "2B0", "0B0", "1F2", "1F3"]

    browser.run("document.querySelectorAll('#selected button')[1].click()")
    assert browser.run("taskName(selected.timeline, selected.task)") == "2B0"
    browser.key("Escape")
    assert browser.run("selected === null && document.getElementById('selected').hidden")


def test_the_wheel_zooms_about_the_pointer_and_dragging_moves(opened):
    plan, timeline = even("zb-v", 4, 8)
    browser = opened(timeline, plan=plan)
    x, y, _ = box_of(browser, 0, "3F4")
    left = browser.run("canvas.getBoundingClientRect().left")
    before_s = browser.run(f"toTime({x - left})")
    for _ in range(4):
        browser.mouse("Wheel", x, y, deltaX=0, deltaY=-300)
    from_s, to_s = browser.run("[view.from, view.to]")
    assert to_s - from_s < timeline.step_s / 8
    assert browser.run(f"toTime({x - left})") == pytest.approx(before_s)

    browser.mouse("Wheel", x, y, deltaX=0, deltaY=100)
    again_s = browser.run("view.to - view.from")
    assert to_s - from_s < again_s < timeline.step_s

    browser.mouse("Pressed", x, y, button="left", clickCount=1)
    browser.mouse("Moved", x + 60, y, button="left", buttons=1)
    browser.mouse("Released", x + 60, y, button="left", clickCount=1)
    assert browser.run(f"toTime({x + 60 - left})") == pytest.approx(before_s)
    assert browser.run("selected === null")

    browser.click(x, y, count=2)
    assert browser.run("[view.from, view.to]") == [0, pytest.approx(timeline.step_s)]


def test_the_wheel_scrolls_the_page_where_there_is_nothing_to_zoom_out_of(opened):
    plan, timeline = even("zb-v", 4, 8)
    browser = opened(timeline, plan=plan)
    browser.run(
        "taken = []; addEventListener('wheel', (event) => taken.push(event.defaultPrevented))"
    )
    x, y, _ = box_of(browser, 0, "3F4")
    browser.mouse("Wheel", x, y, deltaX=0, deltaY=200)
    assert browser.run("taken") == [False]
    assert browser.run("[view.from, view.to]") == [0, pytest.approx(timeline.step_s)]


def test_keys(opened):
    plan, timeline = even("zb-v", 4, 8)
    browser = opened(timeline, plan=plan)

    def view():
        from_s, to_s = browser.run("[view.from, view.to]")
        return from_s, to_s - from_s

    browser.key("+")
    browser.key("+")
    start_s, span_s = view()
    assert span_s == pytest.approx(timeline.step_s / 1.5**2)
    browser.key("ArrowRight")
    assert view() == (pytest.approx(start_s + span_s / 5), pytest.approx(span_s))
    browser.key("ArrowLeft")
    browser.key("-")
    assert view()[1] == pytest.approx(timeline.step_s / 1.5)
    browser.key("0")
    assert view() == (0, pytest.approx(timeline.step_s))
    for _ in range(60):  # no further in than a ten-millionth, and no further out than the step
        browser.key("+")
    assert view()[1] == pytest.approx(timeline.step_s / 1e7, rel=1e-3)


def test_the_tables_and_sentences_are_written(opened):
    plan, timeline = uneven(8, transfer_s=0.2e-3)
    measured = jittered(timeline)
    browser = opened(timeline, measured=measured, plan=plan, title="A <b>title</b>")
    assert browser.run("document.querySelector('h1').innerText") == "A <b>title</b>"
    sentences = browser.run(
        "[...document.querySelectorAll('#sentences p')].map((p) => p.innerText)"
    )
    assert sentences == [
        f"Predicted: {find_bottleneck(timeline, plan).sentence}",
        f"Predicted: {say_memory(timeline)}",
        f"Measured: {find_bottleneck(measured, plan).sentence}",
    ]
    steps = browser.run("document.getElementById('steps').innerText")
    assert steps.startswith("4 devices · 8 microbatches · step ")
    assert browser.run("tick(0.05, 0.01)") == "50 ms"
    rows = browser.run(
        """[...document.querySelectorAll("table")].map((table) =>
          [...table.rows].map((row) => [...row.cells].map((cell) => cell.innerText.trim())))"""
    )
    head, *times = rows[0]
    assert head[:5] == ["device", "", "stages and layers", "computes, ms", "of the step"]
    assert [each[:2] for each in times[:2]] == [["0", "predicted"], ["0", "measured"]]
    step_ms = timeline.step_s * 1e3
    # 8 times F and B of 3.1 ms; its first starts at 5.7 ms, and it never waits in between.
    assert times[6][:8] == [
        *("3", "predicted", "3: norm, head", "74.40", f"{round(7440 / step_ms)} %"),
        *("5.70", "0.00", f"{step_ms - 5.7 - 74.4:.2f}"),
    ]
    _, *memory = rows[1]
    assert [each[:2] for each in memory] == [[str(device), "predicted"] for device in range(4)]
    # What lasts of 2 layers; what these save of 4 microbatches; 16 MiB between the layers of each,
    # and for the fourth's result and the third's, which is on its way.
    assert memory[0][2] == f"{2 + 4 * 2 / 4 + (4 + 2) * 16 / 1024:.2f}"
    marked = browser.run(
        "[...document.querySelectorAll('tr.marked')].map((row) => row.cells[0].innerText)"
    )
    assert marked == ["3", "3", "0"]


@pytest.mark.parametrize("strategy", ["1f1b", "zb-v"])
def test_tables_are_not_cut(opened, strategy):
    """Nor do a few short names of layers need more than a line."""
    plan, timeline = even(strategy, 4, 8)
    browser = opened(timeline, measured=jittered(timeline), plan=plan)
    tables = "[...document.querySelectorAll('.scroll')]"
    assert browser.run(f"{tables}.every((each) => each.scrollWidth <= each.clientWidth)")
    stages = "[...document.querySelectorAll('.stage')]"
    assert browser.run(f"{stages}.every((each) => each.offsetHeight < 25)")  # a line


def test_names_of_users_do_nothing(opened):
    names = ("</script><script>document.title='x'</script>", "<img/src=x/onerror=alert(1)>")
    stages = tuple(StagePlan(layers=(name,), device=d) for d, name in enumerate(names))
    rows = tuple((Task(d, "F", 0), Task(d, "B", 0)) for d in range(2))
    plan = Plan(stages=stages, schedule=rows)
    browser = opened(timeline_of(plan, costs_of(plan), 0.0), plan=plan, title="plain")
    assert browser.run("document.title") == "plain"
    assert names[1] in browser.run("document.getElementById('tables').innerText")
    x, y, _ = box_of(browser, 0, "0F0")
    assert hovered(browser, x, y)[1] == f"layers: {names[0]}"
    browser.click(x, y)
    assert browser.run("document.images.length + document.scripts.length") == 2


def test_many_tasks_are_merged_into_pixels(opened):
    """24,576 tasks: no more boxes than pixels, and colours as frequent as the kinds."""
    plan, timeline = even("zb-v", 16, 256)
    browser = opened(timeline, plan=plan)
    boxes, width = browser.run(
        """(() => {
          const boxes = palette.map(() => []);
          lanes.forEach((lane) => gather(lane, boxes, []));
          return [boxes, plotWidth];
        })()"""
    )
    # Four numbers a box: left, top, width, height.
    counted = sum(len(flat) // 4 for flat in boxes)
    areas = [sum(map(mul, flat[2::4], flat[3::4])) for flat in boxes]
    assert 24_576 > 16 * width > counted > 0
    fills = browser.run("palette.map((each) => each[0])")
    shares = dict.fromkeys("FIW", 0)
    for kind in browser.run("data.kinds"):
        for stage in 0, 31:
            fill = browser.run(f"data.stages[{stage}].colors['{kind['kind']}'][0]")
            if fill in fills:
                shares[kind["kind"]] += areas[fills.index(fill)] / sum(areas)
    # What is left are pixels at the edges of tasks, and those that are not full.
    assert shares == pytest.approx({"F": 1.0 / 3, "I": 1.2 / 3, "W": 0.8 / 3}, abs=0.02)


def test_dark_and_light(opened):
    plan, timeline = uneven(4)
    browser = opened(timeline, plan=plan)
    papers = []
    for scheme in "light", "dark":
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.send("Emulation.setEmulatedMedia", features=[feature])
        browser.run(DRAWN)
        papers.append(browser.run("[...pen.getImageData(2, 2, 1, 1).data].slice(0, 3)"))
    browser.send("Emulation.setEmulatedMedia", features=[])
    assert min(papers[0]) > 240
    assert max(papers[1]) < 40


def test_lanes_can_be_hidden(opened):
    plan, timeline = uneven(4, transfer_s=0.2e-3)
    browser = opened(timeline, plan=plan)
    height = browser.run("lanes[0].height")
    browser.run("[...document.querySelectorAll('#tools input')].forEach((box) => box.click())")
    browser.run(DRAWN)
    assert (
        browser.run("lanes[0].height === lanes[0].tasks")
        and browser.run("lanes[0].height") < height
    )
