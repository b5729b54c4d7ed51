// The title, the sentences, the legend and the tables; then the first drawing.

const PARTS = ["#4f628c", "#8090b3", "#b4bed1", "#7b2cbf", "#b185db", "#e08fc0", "#c9ada7"];
const partColors = [...new Set(curves.flatMap((each) => Object.keys(each.parts)))]
  .map((name, i) => [name, PARTS[i % PARTS.length]])
  .filter(([name]) => curves.some((each) => each.parts[name]));
const PART_WORDS = {
  saved: "by forwards, for their backwards",
  kept: "from input gradients on, for weight gradients",
  transfers: "what is on its way between stages",
  temporaries: "of the task that runs",
  other: "the batch, constants, results",
};
const inTime = inUnit(TIMES, longest_s, 3), inSize = inUnit(SIZES_OF_MEMORY, mostBytes, 2);
const IDLE = [["warm_up_s", "warm-up", "#c9ced6"], ["steady_s", "steady", "#8c95a3"], ["cool_down_s", "cool-down", "#dfe2e7"]];

function writeHead() {
  document.querySelector("h1").textContent = data.title;
  const steps = timelines.map((each) => `step ${duration(each.step_s)} ${each.name}`.trim());
  steps.unshift(count(numDevices, "device"), count(timelines[0].numMicrobatches, "microbatch", "es"));
  if (isCompared) steps.push(`predicted/measured ${(timelines[0].step_s / timelines[1].step_s).toFixed(3)}`);
  document.getElementById("steps").textContent = steps.join(" · ");
  for (const { name, bottleneck, sentences } of timelines) {
    sentences.forEach((sentence, i) => {
      const words = name ? `${name[0].toUpperCase()}${name.slice(1)}: ${sentence}` : sentence;
      document.getElementById("sentences").append(make("p", words, i || !bottleneck.length ? "" : "flag"));
    });
  }
}

function writeTools() {
  const tools = document.getElementById("tools");
  const isUsed = (kind) => timelines.some((each) => each.kind.includes(kind));
  for (const { kind, words } of data.kinds.filter((each) => isUsed(each.kind))) {
    const shades = [...new Set(data.stages.map((each) => each.colors[kind]?.[0]).filter(Boolean))];
    tools.append(keyOf(shades, `${kind} ${words}`));
  }
  if (palette.length > KINDS.filter(isUsed).length) tools.append(make("span", "lighter: a later stage of the device", "note"));
  if (hasTransfers) tools.append(toggle("transfers", "transfers: sent above received"));
  if (hasMemory) tools.append(toggle("memory", "memory"));
}

function keyOf(colors, words) {
  const key = make("span", "", "key");
  const swatches = make("span", "", "swatches");
  for (const color of colors) swatches.append(swatch(color));
  key.append(swatches, make("span", words));
  return key;
}

function swatch(color) {
  const element = make("span", "", "swatch");
  element.style.background = color;
  return element;
}

function toggle(what, words) {
  const label = make("label"), box = make("input");
  box.type = "checkbox";
  box.checked = shown[what];
  box.onchange = () => {
    shown[what] = box.checked;
    layOut();
  };
  label.append(box, keyOf([`var(--${what})`], words));
  return label;
}

function writeTables() {
  const tables = document.getElementById("tables");
  tables.append(make("h2", "What every device does with the step"), timeTable());
  tables.append(make("p", "It idles before its first task (warm-up), between tasks (steady) and after its last (cool-down). "
    + "Its transfers are hidden while it computes, and exposed, a part of the idle time, while it does not.", "note"));
  if (!hasMemory) return;
  tables.append(make("h2", "Memory at the peak of every device"), memoryTable());
  const parts = partColors.filter(([name]) => name in PART_WORDS).map(([name]) => `${name}: ${PART_WORDS[name]}`);
  tables.append(make("p", parts.join("; "), "note"));
}

// Of a column: its head, what stands in it, and whether that is words.
function timeTable() {
  const columns = [
    { head: "stages and layers", isWords: true, cell: ({ facts }) => stageWords(facts) },
    { head: `computes, ${inTime.unit}`, cell: ({ facts }) => inTime(facts.busy_s) },
    { head: "of the step", cell: ({ facts, timeline }) => percent(facts.busy_s / timeline.step_s) },
  ];
  for (const [name, words, color] of IDLE) {
    columns.push({ head: keyOf([color], `${words}, ${inTime.unit}`), cell: ({ facts }) => inTime(facts[name]) });
  }
  if (hasTransfers) {
    columns.push({ head: `transfers hidden, ${inTime.unit}`, cell: ({ facts }) => inTime(facts.hidden_s) });
    columns.push({ head: `exposed, ${inTime.unit}`, cell: ({ facts }) => inTime(facts.exposed_s) });
  }
  columns.push({ head: "the step", isWords: true, cell: ({ facts }) => bar(timeParts(facts), longest_s, duration) });
  return table(columns, ({ timeline, device }) => timeline.bottleneck.includes(device));
}

function timeParts(facts) {
  const tasks = data.kinds.map(({ kind, color, words }) => [words, facts.kind_s[kind] ?? 0, color]);
  return [...tasks, ...IDLE.map(([name, words, color]) => [words, facts[name], color])];
}

function stageWords({ stage_s }) {
  const words = make("span", "", "layers");
  for (const stage of Object.keys(stage_s)) {
    const { layers } = data.stages[stage];
    words.append(make("span", layers.length ? `${stage}: ${layerWords(layers, 3)}` : stage, "stage"), " ");
  }
  return words;
}

function memoryTable() {
  const columns = [
    { head: `peak, ${inSize.unit}`, cell: ({ facts }) => inSize(facts.memory.peak_bytes) },
    { head: `at, ${inTime.unit}`, cell: ({ facts }) => inTime(facts.memory.peak_s) },
  ];
  for (const [name, color] of partColors) {
    const head = keyOf([color], `${name}, ${inSize.unit}`);
    columns.push({ head, cell: ({ facts }) => inSize(facts.memory.parts[name] ?? 0) });
  }
  columns.push({ head: "the peak", isWords: true, cell: ({ facts }) => bar(memoryParts(facts), mostBytes, size) });
  const differ = curves.some((each) => each.peak_bytes < mostBytes);
  return table(columns, ({ facts }) => differ && facts.memory.peak_bytes === mostBytes, ({ facts }) => facts.memory);
}

function memoryParts({ memory }) {
  return partColors.map(([name, color]) => [name, memory.parts[name] ?? 0, color]);
}

// Writes the numbers of a column in one unit, with decimals for four digits of the largest.
function inUnit(units, largest, mostDecimals) {
  const [unit, each] = units.find((one) => largest >= one[1]) ?? units.at(-1);
  const decimals = Math.max(0, 3 - Math.floor(Math.log10(largest / each)));
  const write = (number) => (number / each).toFixed(Math.min(decimals, mostDecimals));
  return Object.assign(write, { unit });
}

function table(columns, isMarked, isShown = () => true) {
  const all = [{ head: "device", cell: ({ device }) => String(device) }];
  if (isCompared) all.push({ head: "", isWords: true, cell: ({ timeline }) => timeline.name });
  all.push(...columns);
  const element = make("table"), scroll = make("div", "", "scroll");
  element.append(row("th", all, (column) => column.head));
  for (let device = 0; device < numDevices; device++) {
    for (const timeline of timelines) {
      const subject = { timeline, device, facts: timeline.devices[device] };
      if (!isShown(subject)) continue;
      const line = row("td", all, (column) => column.cell(subject));
      if (isMarked(subject)) line.classList.add("marked");
      element.append(line);
    }
  }
  scroll.append(element);
  return scroll;
}

function row(tag, columns, contentOf) {
  const line = make("tr");
  for (const column of columns) {
    const cell = make(tag, "", column.isWords ? "words" : "");
    cell.append(contentOf(column)); // an element, or a string, which becomes text
    line.append(cell);
  }
  return line;
}

function bar(parts, all, words) {
  const element = make("div", "", "bar");
  for (const [name, number, color] of parts) {
    const part = make("span");
    part.style.width = `${(100 * number) / all}%`;
    part.style.background = color;
    part.title = `${name} ${words(number)}`;
    element.append(part);
  }
  return element;
}

writeHead();
writeTools();
writeTables();
readTheme();
layOut();
