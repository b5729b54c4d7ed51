// What is said of the thing under the pointer, and of the task that was clicked.

const hover = document.getElementById("hover");
const selectedPanel = document.getElementById("selected");
let selected = null;

function tellHovered(found, event) {
  const lines = found ? linesOn(found) : [];
  hover.hidden = !lines.length;
  if (!lines.length) return;
  hover.replaceChildren(...lines.map((line) => make("p", line)));
  const [width, height] = [hover.offsetWidth, hover.offsetHeight];
  const right = event.clientX + 14 + width > innerWidth, low = event.clientY + 18 + height > innerHeight;
  hover.style.left = `${Math.max(4, right ? event.clientX - 14 - width : event.clientX + 14)}px`;
  hover.style.top = `${Math.max(4, low ? event.clientY - 12 - height : event.clientY + 18)}px`;
}

function linesOn({ lane, time_s, task, idleUntil, transfer, memory }) {
  const { timeline, device } = lane;
  if (task !== undefined) return linesOnTask(timeline, task);
  if (idleUntil !== undefined) return linesOnIdle(timeline, device, idleUntil, time_s);
  if (transfer !== undefined) return transfer < 0 ? [] : linesOnTransfer(timeline, transfer);
  return memory ? linesOnMemory(timeline, device, time_s) : [];
}

function linesOnTask(timeline, task) {
  const device = deviceOf(timeline, task);
  const lines = [taskWords(timeline, task)];
  const { layers } = data.stages[timeline.stage[task]];
  if (layers.length) lines.push(`layers: ${layerWords(layers)}`);
  lines.push(`${times(timeline, task)} on ${deviceWords(timeline, device)}`);
  for (const other of timelines) {
    const same = other === timeline ? -1 : sameTask(timeline, task, other);
    if (same >= 0) lines.push(`${other.name}: ${times(other, same)}`);
  }
  const bytes = memoryAt(timeline, device, timeline.start[task]);
  if (bytes !== null) lines.push(`the device then holds ${size(bytes)}`);
  return lines;
}

function times({ start, end }, task) {
  return `${moment(start[task])} to ${moment(end[task])}, takes ${duration(end[task] - start[task])}`;
}

function linesOnIdle(timeline, device, next, time_s) {
  if (time_s > timeline.step_s) return [];
  const before = next < 0 ? timeline.first[device + 1] - 1 : next - 1;
  const from_s = before < timeline.first[device] ? 0 : timeline.end[before];
  const to_s = next < 0 ? timeline.step_s : timeline.start[next];
  const when = next < 0 ? "cool-down" : before < timeline.first[device] ? "warm-up" : "steady";
  const lines = [`${deviceWords(timeline, device)} idles ${duration(to_s - from_s)} (${when})`];
  if (next < 0) return lines;
  const last = lastNeed(timeline, next);
  lines.push(`until ${taskName(timeline, next)}, ${taskWords(timeline, next)}`);
  return last < 0 ? lines : [...lines, `which needs ${needWords(timeline, last, next)}`];
}

// The need of a task that is there last, or -1.
function lastNeed(timeline, task) {
  let last = -1;
  for (const each of timeline.needs[task]) {
    if (last < 0 || arrival_s(timeline, each, task) > arrival_s(timeline, last, task)) last = each;
  }
  return last;
}

function needWords(timeline, maker, task) {
  const words = `${taskName(timeline, maker)} of device ${deviceOf(timeline, maker)}, done at ${moment(timeline.end[maker])}`;
  const isSent = transferTo(timeline, maker, task) >= 0;
  return isSent ? `${words}, here at ${moment(arrival_s(timeline, maker, task))}` : words;
}

function linesOnTransfer(timeline, i) {
  const { source, target, made_by, reader, start_s, end_s, num_bytes } = timeline.transfers;
  return [
    `transfer from device ${source[i]} to device ${target[i]}`,
    `what ${taskName(timeline, made_by[i])} made, for stage ${reader[i]}: ${size(num_bytes[i])}`,
    `${moment(start_s[i])} to ${moment(end_s[i])}, takes ${duration(end_s[i] - start_s[i])}`,
  ];
}

function linesOnMemory(timeline, device, time_s) {
  const { memory } = timeline.devices[device];
  const parts = Object.entries(memory.parts).filter(([, bytes]) => bytes).sort((a, b) => b[1] - a[1]);
  return [
    `${deviceWords(timeline, device)} holds ${size(memoryAt(timeline, device, time_s))} at ${moment(time_s)}`,
    `peak: ${size(memory.peak_bytes)} at ${moment(memory.peak_s)}`,
    ...parts.map(([name, bytes]) => `${name} ${size(bytes)}`),
  ];
}

// Highlight a task with what it waited for and what waits for it; -1 for none.
function select(timeline, task) {
  selected = task < 0 ? null : { timeline, task, same: -1 };
  if (selected) {
    selected.needed = timeline.needs[task];
    selected.readers = readersOf(timeline, task);
    selected.before = neighbour(timeline, task, -1);
    selected.after = neighbour(timeline, task, 1);
    selected.last = lastNeed(timeline, task);
    selected.other = timelines.find((each) => each !== timeline);
    if (selected.other) selected.same = sameTask(timeline, task, selected.other);
  }
  tellSelected();
  redraw();
}

function tellSelected() {
  selectedPanel.hidden = !selected;
  if (!selected) return;
  const { timeline, task, needed, readers, before, after } = selected;
  const [first, ...more] = linesOnTask(timeline, task);
  const title = make("p");
  title.append(make("b", `${taskName(timeline, task)}: ${first}`), make("span", `. ${more.join("; ")}.`));
  selectedPanel.replaceChildren(title, make("p", whyThen()));
  for (const [words, tasks] of [
    ["needs", needed], ["needed by", readers], ["before it on the device", [before]], ["after it", [after]],
  ]) {
    const there = tasks.filter((each) => each >= 0);
    if (there.length) selectedPanel.append(lineOfTasks(words, timeline, there));
  }
}

// Why the task starts when it starts: its device was at work, or something was not there yet.
function whyThen() {
  const { timeline, task, before, last } = selected;
  const start_s = timeline.start[task];
  const free_s = before < 0 ? 0 : timeline.end[before];
  if (last < 0 || arrival_s(timeline, last, task) <= free_s) {
    return before < 0 ? "It starts the step." : `It starts when its device is free: after ${taskName(timeline, before)}.`;
  }
  return `Its device waited ${duration(start_s - free_s)} for ${needWords(timeline, last, task)}.`;
}

function lineOfTasks(words, timeline, tasks) {
  const line = make("p", `${words}: `, "tasks");
  for (const each of tasks) {
    const button = make("button", `${taskName(timeline, each)} on device ${deviceOf(timeline, each)}`);
    button.onclick = () => {
      reveal(timeline, each);
      select(timeline, each);
    };
    line.append(button);
  }
  return line;
}

// Move the view so that a task is in it.
function reveal(timeline, task) {
  const [start_s, end_s] = [timeline.start[task], timeline.end[task]];
  const half = (view.to - view.from) / 2;
  if (start_s < view.from || end_s > view.to) show((start_s + end_s) / 2 - half, (start_s + end_s) / 2 + half);
  const lane = laneOf(timeline, deviceOf(timeline, task));
  if (topOf(lane) < TOP) chart.scrollTop = lane.top - TOP;
  if (topOf(lane) + lane.height > height) chart.scrollTop = lane.top + lane.height - height;
}
