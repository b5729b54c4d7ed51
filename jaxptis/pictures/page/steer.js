// Mouse, touch pad and keys.

let pointer = null; // where it is on the canvas
let drag = null;

function placeOf(event) {
  const box = canvas.getBoundingClientRect();
  return { x: event.clientX - box.left, y: event.clientY - box.top };
}

let zoomed_ms = -Infinity; // when the wheel was last used

chart.addEventListener("wheel", (event) => {
  // Where nothing is left to zoom out of the wheel scrolls, unless it is still turning from a zoom.
  const isWhole = view.from === 0 && view.to === longest_s;
  const scrolls = isWhole && event.deltaY > 0 && event.timeStamp - zoomed_ms > 400;
  if (scrolls || !event.cancelable) return; // the browser lets no one stop a scroll under way
  event.preventDefault();
  zoomed_ms = event.timeStamp;
  const unit = event.deltaMode === 1 ? 16 : event.deltaMode === 2 ? 400 : 1; // lines, pages, pixels
  const sideways = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
  if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) move((sideways * unit) / plotWidth);
  else zoom(Math.exp(event.deltaY * unit * (event.ctrlKey ? 0.01 : 0.002)), toTime(Math.max(LEFT, placeOf(event).x)));
}, { passive: false });

canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  drag = { x: event.clientX, y: event.clientY, from: view.from, to: view.to, scroll: chart.scrollTop, moved: false };
});

canvas.addEventListener("pointermove", (event) => {
  pointer = placeOf(event);
  if (drag) {
    const x = event.clientX - drag.x, y = event.clientY - drag.y;
    drag.moved ||= Math.hypot(x, y) > 3;
    if (drag.moved) {
      chart.classList.add("dragged");
      const by = (x / plotWidth) * (drag.to - drag.from);
      show(drag.from - by, drag.to - by);
      chart.scrollTop = drag.scroll - y;
    }
  }
  tellHovered(drag?.moved ? null : pick(pointer.x, pointer.y), event);
  redraw();
});

canvas.addEventListener("pointerup", (event) => {
  if (drag && !drag.moved) {
    const { x, y } = placeOf(event);
    const found = pick(x, y);
    select(found?.lane.timeline, found?.task ?? -1);
  }
  endDrag();
});
canvas.addEventListener("pointercancel", endDrag);

function endDrag() {
  drag = null;
  chart.classList.remove("dragged");
}

canvas.addEventListener("pointerleave", () => {
  pointer = null;
  tellHovered(null);
  redraw();
});

canvas.addEventListener("dblclick", () => show(0, longest_s));
chart.addEventListener("scroll", redraw);
addEventListener("resize", layOut);

const KEYS = {
  "+": () => zoom(1 / 1.5), "=": () => zoom(1 / 1.5), "-": () => zoom(1.5), 0: () => show(0, longest_s),
  ArrowLeft: () => move(-0.2), ArrowRight: () => move(0.2), Escape: () => select(null, -1),
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readTheme();
  redraw();
});
