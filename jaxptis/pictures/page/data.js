"use strict";
// The data of the page, and questions to it. A task is its index among all tasks of a timeline.

const data = JSON.parse(document.getElementById("data").textContent);
const KINDS = data.kinds.map((each) => each.kind);
const palette = []; // [fill, ink] of tasks
const timelines = data.timelines.map(prepare);
const longest_s = Math.max(...timelines.map((each) => each.step_s));
const numDevices = timelines[0].devices.length;
const isCompared = timelines.length > 1;
const curves = timelines.flatMap((each) => each.devices.map((device) => device.memory)).filter(Boolean);
const hasMemory = curves.length > 0;
const mostBytes = Math.max(1, ...curves.map((each) => each.peak_bytes));
const hasTransfers = timelines.some((each) => each.transfers.start_s.length > 0);

function prepare(given) {
  const timeline = { ...given, start: Float64Array.from(given.start_s), end: Float64Array.from(given.end_s) };
  timeline.fill = Uint16Array.from(given.stage, (stage, task) => fillOf(stage, given.kind[task]));
  timeline.numMicrobatches = given.microbatch.reduce((most, each) => Math.max(most, each + 1), 0);
  timeline.taskAt = new Int32Array(data.stages.length * KINDS.length * timeline.numMicrobatches).fill(-1);
  for (let task = 0; task < given.stage.length; task++) {
    timeline.taskAt[place(timeline, given.stage[task], given.kind[task], given.microbatch[task])] = task;
  }
  timeline.transfersOf = given.devices.map(() => ({ sent: [], received: [], longest_s: 0 }));
  for (let i = 0; i < given.transfers.start_s.length; i++) {
    const took_s = given.transfers.end_s[i] - given.transfers.start_s[i];
    for (const [end, list] of [["source", "sent"], ["target", "received"]]) {
      const own = timeline.transfersOf[given.transfers[end][i]];
      own[list].push(i);
      own.longest_s = Math.max(own.longest_s, took_s);
    }
  }
  return timeline;
}

function fillOf(stage, kind) {
  const [fill, ink] = data.stages[stage].colors[kind];
  let index = palette.findIndex((each) => each[0] === fill);
  if (index < 0) index = palette.push([fill, ink]) - 1;
  return index;
}

function place(timeline, stage, kind, microbatch) {
  return (stage * KINDS.length + KINDS.indexOf(kind)) * timeline.numMicrobatches + microbatch;
}

// The task of `other` that does what `task` does in `timeline`, or -1.
function sameTask(timeline, task, other) {
  if (timeline.microbatch[task] >= other.numMicrobatches) return -1;
  return other.taskAt[place(other, timeline.stage[task], timeline.kind[task], timeline.microbatch[task])];
}

// The first index from `low` to `high` whose value is above `limit`; values ascend.
function firstAbove(valueAt, limit, low, high) {
  while (low < high) {
    const middle = (low + high) >> 1;
    if (valueAt(middle) > limit) high = middle;
    else low = middle + 1;
  }
  return low;
}

function deviceOf(timeline, task) {
  return firstAbove((device) => timeline.first[device], task, 0, numDevices + 1) - 1;
}

// The tasks that read what `task` makes.
function readersOf(timeline, task) {
  if (!timeline.readers) {
    timeline.readers = timeline.needs.map(() => []);
    timeline.needs.forEach((needed, reader) => needed.forEach((each) => timeline.readers[each].push(reader)));
  }
  return timeline.readers[task];
}

// The transfer that brings what `maker` makes to the stage of `task`, or -1.
function transferTo(timeline, maker, task) {
  const { sent } = timeline.transfersOf[deviceOf(timeline, maker)];
  const { made_by, reader } = timeline.transfers;
  return sent.find((i) => made_by[i] === maker && reader[i] === timeline.stage[task]) ?? -1;
}

// When what `maker` makes is there for `task`.
function arrival_s(timeline, maker, task) {
  const transfer = transferTo(timeline, maker, task);
  return transfer < 0 ? timeline.end[maker] : timeline.transfers.end_s[transfer];
}

function neighbour(timeline, task, step) {
  const device = deviceOf(timeline, task);
  const other = task + step;
  return other >= timeline.first[device] && other < timeline.first[device + 1] ? other : -1;
}

// The bytes that a device holds at a time, or null.
function memoryAt(timeline, device, time_s) {
  const memory = timeline.devices[device].memory;
  if (!memory) return null;
  const after = firstAbove((i) => memory.times_s[i], time_s, 0, memory.times_s.length);
  return memory.num_bytes[Math.max(0, after - 1)];
}
