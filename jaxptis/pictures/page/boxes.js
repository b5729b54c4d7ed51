// The boxes of tasks. Those of one colour are gathered and drawn together; those narrower than a
// pixel are merged, into the colour with the most time and a height that says how full it is. What
// a pixel leaves out counts in the next, so that colours have their shares of the lane.

const LETTER = 6.1; // the width of a digit in the font of the boxes
const merged_s = new Float64Array(palette.length); // of tasks not drawn yet, by colour

function drawTasks(visible) {
  const boxes = palette.map(() => []);
  const numbers = [];
  for (const lane of visible) {
    pen.fillStyle = theme.idle;
    const left = toX(0), right = toX(lane.timeline.step_s);
    pen.fillRect(left, topOf(lane), right - left, lane.tasks);
    gather(lane, boxes, numbers);
  }
  pen.globalAlpha = selected ? 0.35 : 1;
  boxes.forEach((flat, fill) => {
    pen.fillStyle = palette[fill][0];
    for (let i = 0; i < flat.length; i += 4) pen.fillRect(flat[i], flat[i + 1], flat[i + 2], flat[i + 3]);
  });
  pen.font = `10px ${theme.font}`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  for (const [text, fill, x, y] of numbers) {
    pen.fillStyle = palette[fill][1];
    pen.fillText(text, x, y);
  }
  pen.globalAlpha = 1;
}

// Collect the boxes of a lane by colour, and the numbers that have room.
function gather(lane, boxes, numbers) {
  const { timeline, device, tasks } = lane;
  const { start, end, fill } = timeline;
  const last = timeline.first[device + 1];
  const top = topOf(lane), scale = plotWidth / (view.to - view.from);
  merged_s.fill(0);
  let task = firstAbove((i) => end[i], view.from, timeline.first[device], last);
  while (task < last && start[task] < view.to) {
    const x = LEFT + (start[task] - view.from) * scale;
    const wide = (end[task] - start[task]) * scale;
    if (wide < 1) {
      task = merge(lane, task, Math.floor(x), boxes);
      continue;
    }
    const left = snap(x), right = snap(x + wide);
    boxes[fill[task]].push(left, top, wide > 3 ? right - left - 0.7 : right - left, tasks);
    const text = wide > LETTER ? String(timeline.microbatch[task]) : "";
    if (text && text.length * LETTER + 3 <= wide) numbers.push([text, fill[task], x + wide / 2, top + tasks / 2 + 0.5]);
    task++;
  }
}

// The nearest edge between pixels of the screen: boxes that touch have no seam.
function snap(x) {
  return Math.round(x * ratio) / ratio;
}

// Draw as one the tasks narrower than a pixel that start in the pixel at `x`; return the next task.
function merge({ timeline, device, top, tasks }, task, x, boxes) {
  const { start, end, fill } = timeline;
  const first = task, last = timeline.first[device + 1];
  const from = toTime(x), to = toTime(x + 1);
  let takesTime = false;
  // What the task before has in this pixel fills it, too.
  let filled_s = task > timeline.first[device] ? Math.max(0, end[task - 1] - from) : 0;
  do {
    merged_s[fill[task]] += end[task] - start[task];
    takesTime ||= end[task] > start[task];
    filled_s += Math.min(end[task], to) - start[task];
    task++;
  } while (task < last && start[task] < to && end[task] - start[task] < to - from);
  let most = fill[first];
  for (let each = first; each < task; each++) if (merged_s[fill[each]] > merged_s[most]) most = fill[each];
  merged_s[most] -= Math.min(filled_s, to - from);
  const high = Math.round(tasks * Math.max(0.25, Math.min(1, filled_s / (to - from))));
  if (takesTime) addPixel(boxes[most], x, top - scrolled + tasks - high, high);
  return task;
}

// Make the last box wider if the pixel continues it.
function addPixel(flat, x, y, high) {
  const n = flat.length;
  if (n && flat[n - 4] + flat[n - 2] === x && flat[n - 3] === y && flat[n - 1] === high) flat[n - 2]++;
  else flat.push(x, y, 1, high);
}
