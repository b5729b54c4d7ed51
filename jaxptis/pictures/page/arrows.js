// Arrows of transfers, and the task that was clicked with what it waited for and what waits for it.

const MOST_ARROWS = 150;

// From sender to receiver, where there are few enough to tell apart.
function drawArrows(visible) {
  const arrows = [];
  for (const { timeline, device } of visible) {
    const { start_s, end_s } = timeline.transfers;
    const { sent, longest_s: most_s } = timeline.transfersOf[device];
    let k = firstAbove((each) => start_s[sent[each]], view.from - most_s, 0, sent.length);
    for (; k < sent.length && start_s[sent[k]] < view.to; k++) {
      if (end_s[sent[k]] > view.from) arrows.push([timeline, sent[k]]);
      if (arrows.length > MOST_ARROWS) return;
    }
  }
  pen.globalAlpha = selected ? 0.2 : 0.6;
  for (const [timeline, i] of arrows) drawTransferArrow(timeline, i, theme.transfers, 0.8);
  pen.globalAlpha = 1;
}

function drawTransferArrow(timeline, i, color, width) {
  const { source, target, start_s, end_s } = timeline.transfers;
  const [from, to] = [laneOf(timeline, source[i]), laneOf(timeline, target[i])];
  const down = from.top < to.top;
  arrow(toX(start_s[i]), topOf(from) + (down ? from.tasks : 0), toX(end_s[i]), topOf(to) + (down ? 0 : to.tasks), color, width);
}

function arrow(x0, y0, x1, y1, color, width) {
  const length = Math.hypot(x1 - x0, y1 - y0) || 1;
  const [along, across] = [(x1 - x0) / length, (y1 - y0) / length];
  pen.strokeStyle = pen.fillStyle = color;
  pen.lineWidth = width;
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1);
  pen.stroke();
  pen.beginPath();
  pen.moveTo(x1, y1);
  for (const side of [1, -1]) pen.lineTo(x1 - 6 * along + side * 2.5 * across, y1 - 6 * across - side * 2.5 * along);
  pen.fill();
}

// The selected task, what it waited for and what waits for it, on top of the faint rest.
function drawSelected() {
  const { timeline, task, needed, readers, before, after } = selected;
  for (const each of [before, after]) if (each >= 0) drawBox(timeline, each, 0);
  for (const each of [...needed, ...readers]) drawBox(timeline, each, 1.5);
  drawBox(timeline, task, 3);
  for (const each of needed) drawLink(timeline, each, task, each === selected.last ? 2.4 : 1.2);
  for (const each of readers) drawLink(timeline, task, each, 1.2);
  if (selected.same >= 0) drawBox(selected.other, selected.same, 1.5);
}

function drawBox(timeline, task, outline) {
  const lane = laneOf(timeline, deviceOf(timeline, task));
  const x = toX(timeline.start[task]), width = Math.max(1.5, toX(timeline.end[task]) - x);
  const [fill, ink] = palette[timeline.fill[task]];
  const text = String(timeline.microbatch[task]);
  pen.fillStyle = fill;
  pen.fillRect(x, topOf(lane), width, lane.tasks);
  if (outline) {
    pen.strokeStyle = theme.waited;
    pen.lineWidth = outline;
    pen.strokeRect(x, topOf(lane), width, lane.tasks);
  }
  if (text.length * LETTER + 3 > width) return;
  pen.fillStyle = ink;
  pen.font = `10px ${theme.font}`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.fillText(text, x + width / 2, topOf(lane) + lane.tasks / 2 + 0.5);
}

function drawLink(timeline, maker, reader, width) {
  const transfer = transferTo(timeline, maker, reader);
  if (transfer >= 0) return drawTransferArrow(timeline, transfer, theme.waited, width);
  const [from, to] = [maker, reader].map((task) => laneOf(timeline, deviceOf(timeline, task)));
  const x0 = toX(timeline.end[maker]), x1 = toX(timeline.start[reader]);
  if (from !== to) return arrow(x0, topOf(from) + from.tasks / 2, x1, topOf(to) + to.tasks / 2, theme.waited, width);
  pen.strokeStyle = theme.waited; // on one device: over the boxes in between
  pen.lineWidth = width;
  pen.beginPath();
  pen.moveTo(x0, topOf(from));
  pen.quadraticCurveTo((x0 + x1) / 2, topOf(from) - 9, x1, topOf(from));
  pen.stroke();
}
