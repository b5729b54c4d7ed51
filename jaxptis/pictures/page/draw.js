// Draws what is visible.

const pen = canvas.getContext("2d");
let theme = {};

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const names = ["paper", "ink", "soft", "line", "idle", "transfers", "memory", "mark", "waited"];
  theme = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  theme.font = getComputedStyle(document.body).fontFamily;
}

function draw() {
  scrolled = chart.scrollTop;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.fillStyle = theme.paper;
  pen.fillRect(0, 0, width, height);
  pen.save();
  pen.beginPath();
  pen.rect(LEFT, TOP, plotWidth, height);
  pen.clip();
  const visible = lanes.filter(isVisible);
  drawTasks(visible);
  for (const lane of visible) {
    if (lane.transfers) drawTransfers(lane);
    if (lane.memory) drawMemory(lane);
  }
  if (shown.transfers) drawArrows(visible);
  if (selected) drawSelected();
  drawPointer();
  pen.restore();
  for (const lane of visible) drawHead(lane);
  drawAxis();
}

// Upper half sent, lower half received. Those less than a pixel apart are drawn as one.
function drawTransfers({ timeline, device, tasks, transfers, top }) {
  const own = timeline.transfersOf[device];
  const { start_s, end_s } = timeline.transfers;
  const scale = plotWidth / (view.to - view.from);
  pen.fillStyle = theme.transfers;
  for (const [row, list] of [own.sent, own.received].entries()) {
    const y = top - scrolled + tasks + 1 + (row * transfers) / 2, high = transfers / 2 - 1;
    let left = -10, right = -10;
    let i = firstAbove((k) => start_s[list[k]], view.from - own.longest_s, 0, list.length);
    for (; i < list.length && start_s[list[i]] < view.to; i++) {
      const x = LEFT + (start_s[list[i]] - view.from) * scale;
      if (x > right + 1) {
        pen.fillRect(left, y, right - left, high);
        left = x;
      }
      right = Math.max(right, x + 1.5, LEFT + (end_s[list[i]] - view.from) * scale);
    }
    pen.fillRect(left, y, right - left, high);
  }
}

function drawMemory(lane) {
  const { times_s, num_bytes, peak_s, peak_bytes } = lane.timeline.devices[lane.device].memory;
  const bottom = topOf(lane) + lane.height;
  const toY = (bytes) => bottom - (bytes / mostBytes) * (lane.memory - 4);
  const last = times_s.length - 1;
  let i = Math.max(0, firstAbove((k) => times_s[k], view.from, 0, times_s.length) - 1);
  pen.beginPath();
  pen.moveTo(toX(view.from), bottom);
  while (i <= last && times_s[i] < view.to) {
    // Of what changes within a pixel, the most.
    const left = Math.max(LEFT, toX(times_s[i])), edge = toTime(left + 1);
    let bytes = num_bytes[i];
    for (; i < last && times_s[i + 1] < edge; i++) bytes = Math.max(bytes, num_bytes[i + 1]);
    pen.lineTo(left, toY(bytes));
    pen.lineTo(toX(i < last ? times_s[i + 1] : lane.timeline.step_s), toY(bytes));
    i++;
  }
  pen.lineTo(Math.min(toX(lane.timeline.step_s), toX(view.to)), bottom);
  pen.fillStyle = pen.strokeStyle = theme.memory;
  pen.globalAlpha = 0.25;
  pen.fill();
  pen.globalAlpha = 1;
  pen.lineWidth = 1;
  pen.stroke();
  drawPeak(toX(peak_s), toY(peak_bytes), size(peak_bytes), peak_bytes === mostBytes);
}

function drawPeak(x, y, text, isMost) {
  if (x < LEFT - 1 || x > LEFT + plotWidth + 1) return;
  pen.fillStyle = theme.ink;
  pen.beginPath();
  pen.arc(x, y, 2.6, 0, 7);
  pen.fill();
  pen.font = `${isMost ? "700 " : ""}11px ${theme.font}`;
  pen.textBaseline = "middle";
  const isRight = x > LEFT + plotWidth - 90;
  pen.textAlign = isRight ? "right" : "left";
  pen.lineWidth = 3;
  pen.strokeStyle = theme.paper;
  pen.strokeText(text, x + (isRight ? -6 : 6), y + 5);
  pen.fillText(text, x + (isRight ? -6 : 6), y + 5);
}

function drawPointer() {
  if (!pointer || pointer.x < LEFT) return;
  pen.strokeStyle = theme.soft;
  pen.lineWidth = 0.5;
  pen.beginPath();
  pen.moveTo(pointer.x, TOP);
  pen.lineTo(pointer.x, height);
  pen.stroke();
}

// The name of the device to the left, with what matters most of it.
function drawHead(lane) {
  const { timeline, device } = lane;
  const facts = timeline.devices[device], top = topOf(lane);
  const isFirst = timeline === timelines[0], isMarked = timeline.bottleneck.includes(device);
  pen.save();
  pen.beginPath();
  pen.rect(0, TOP, LEFT, height);
  pen.clip();
  pen.textBaseline = "middle";
  if (isMarked) {
    pen.fillStyle = theme.mark;
    pen.fillRect(0, top, 5, lane.height);
  }
  const write = (text, x, y, font, color, align = "left") => {
    pen.font = `${font} ${theme.font}`;
    pen.fillStyle = color;
    pen.textAlign = align;
    pen.fillText(text, x, y);
  };
  const middle = top + lane.tasks / 2;
  if (isFirst) write(`device ${device}`, 12, middle, "600 12.5px", theme.ink);
  if (isCompared) write(timeline.name, 78, middle, "11px", theme.soft);
  write(`${percent(facts.busy_s / timeline.step_s)} busy`, LEFT - 8, middle, isMarked ? "600 11px" : "11px", isMarked ? theme.mark : theme.ink, "right");
  if (lane.memory) write("memory", LEFT - 8, top + lane.height - lane.memory / 2 + 1, "10.5px", theme.soft, "right");
  pen.restore();
}

function drawAxis() {
  pen.fillStyle = theme.paper;
  pen.fillRect(0, 0, width, TOP);
  const each = tickStep((view.to - view.from) / (plotWidth / 110));
  pen.font = `11px ${theme.font}`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineWidth = 1;
  for (let k = Math.ceil(view.from / each); k * each <= view.to; k++) {
    const x = toX(k * each);
    pen.strokeStyle = theme.soft;
    pen.beginPath();
    pen.moveTo(x, TOP - 5);
    pen.lineTo(x, TOP);
    pen.stroke();
    pen.fillStyle = theme.soft;
    if (x < LEFT + plotWidth - 20) pen.fillText(tick(k * each, each), x, TOP / 2 - 2);
  }
  pen.strokeStyle = theme.line;
  pen.strokeRect(LEFT, TOP - 0.5, plotWidth, 0);
}

// The smallest of 1, 2 and 5 times a power of ten that is not below `least`.
function tickStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].find((each) => each * power >= least) * power;
}
