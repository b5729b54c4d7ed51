// Where everything stands: lanes of devices from top to bottom, the step from left to right.

const chart = document.getElementById("chart");
const canvas = chart.querySelector("canvas");
const LEFT = isCompared ? 218 : 156, RIGHT = 14, TOP = 24;
// Heights of the parts of a lane and the gap between devices; in between, as far as all fit.
const LEAST = { tasks: 14, transfers: 5, memory: 18, gap: 2 };
const MOST = { tasks: 27, transfers: 8, memory: 40, gap: 12 };
const MOST_OF_WINDOW = 0.82;

const view = { from: 0, to: longest_s }; // seconds
const shown = { memory: hasMemory, transfers: hasTransfers };
let lanes = []; // one for each device of each timeline
let width = 0, height = 0; // of the canvas: the browser is slow to say
let plotWidth = 0;
let scrolled = 0; // of the chart, downwards
let ratio = 1; // pixels of the screen in one of the page
let awaited = false;

function layOut() {
  const room = Math.max(240, innerHeight * MOST_OF_WINDOW);
  const least = stack(LEAST);
  const share = Math.min(1, Math.max(0, (room - least) / (stack(MOST) - least)));
  const between = ([part, high]) => [part, Math.floor(high + share * (MOST[part] - high))];
  const bottom = stack(Object.fromEntries(Object.entries(LEAST).map(between)));
  height = Math.round(Math.min(bottom, room));
  chart.style.height = `${height + 2}px`;
  ratio = window.devicePixelRatio || 1;
  width = chart.clientWidth;
  plotWidth = width - LEFT - RIGHT;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  document.getElementById("space").style.height = `${Math.ceil(bottom - height)}px`;
  redraw();
}

// Put the lanes below each other; return where the last ends.
function stack(sizes) {
  lanes = [];
  let top = TOP + 4;
  for (let device = 0; device < numDevices; device++) {
    for (const timeline of timelines) {
      const lane = { timeline, device, top, tasks: sizes.tasks };
      lane.transfers = shown.transfers ? sizes.transfers : 0;
      lane.memory = shown.memory && timeline.devices[device].memory ? sizes.memory : 0;
      lane.height = lane.tasks + lane.transfers + lane.memory;
      lanes.push(lane);
      top += lane.height + 3;
    }
    top += sizes.gap;
  }
  return top;
}

function redraw() {
  if (awaited) return;
  awaited = true;
  requestAnimationFrame(() => {
    awaited = false;
    draw();
  });
}

function toX(time_s) {
  return LEFT + ((time_s - view.from) / (view.to - view.from)) * plotWidth;
}

function toTime(x) {
  return view.from + ((x - LEFT) / plotWidth) * (view.to - view.from);
}

// Show `from` to `to`, kept inside of the step.
function show(from, to) {
  const span = Math.min(longest_s, Math.max(longest_s * 1e-7, to - from));
  view.from = Math.min(longest_s - span, Math.max(0, from));
  view.to = view.from + span;
  redraw();
}

function zoom(factor, at_s = (view.from + view.to) / 2) {
  const span = Math.min(longest_s, (view.to - view.from) * factor);
  const from = at_s - ((at_s - view.from) / (view.to - view.from)) * span;
  show(from, from + span);
}

function move(share) {
  const by = share * (view.to - view.from);
  show(view.from + by, view.to + by);
}

// The lane of a device, where it is on the canvas now.
function topOf(lane) {
  return lane.top - scrolled;
}

function laneOf(timeline, device) {
  return lanes[device * timelines.length + timelines.indexOf(timeline)];
}

function isVisible(lane) {
  return topOf(lane) < height && topOf(lane) + lane.height > TOP;
}

// What is under a point of the canvas.
function pick(x, y) {
  const lane = lanes.find((each) => y >= topOf(each) - 1 && y < topOf(each) + each.height + 1);
  if (!lane || x < LEFT || x > width - RIGHT || y < TOP) return null;
  const time_s = toTime(x);
  const below = y - topOf(lane) - lane.tasks;
  if (below < 0) return { lane, time_s, ...pickTask(lane, time_s) };
  if (below < lane.transfers) return { lane, time_s, transfer: pickTransfer(lane, time_s, below) };
  return { lane, time_s, memory: true };
}

function pickTask({ timeline, device }, time_s) {
  const near = 2 * ((view.to - view.from) / plotWidth); // two pixels, for narrow boxes
  const last = timeline.first[device + 1];
  const task = firstAbove((i) => timeline.end[i], time_s, timeline.first[device], last);
  if (task < last && timeline.start[task] <= time_s + near) return { task };
  if (task > timeline.first[device] && timeline.end[task - 1] > time_s - near) return { task: task - 1 };
  return { idleUntil: task < last ? task : -1 };
}

function pickTransfer({ timeline, device, transfers }, time_s, below) {
  const near = 2 * ((view.to - view.from) / plotWidth);
  const list = timeline.transfersOf[device][below < transfers / 2 ? "sent" : "received"];
  const { start_s, end_s } = timeline.transfers;
  return list.findLast((i) => start_s[i] <= time_s + near && end_s[i] >= time_s - near) ?? -1;
}
