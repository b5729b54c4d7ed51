// How times, bytes and tasks are written.

const TIMES = [["s", 1], ["ms", 1e-3], ["µs", 1e-6], ["ns", 1e-9]];
const SIZES_OF_MEMORY = [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10], ["B", 1]];

function digits(number, count) {
  return number < 10 ** count - 0.5 ? String(Number(number.toPrecision(count))) : number.toFixed(0);
}

function duration(seconds) {
  if (seconds < 0) return "−" + duration(-seconds);
  if (!seconds) return "0 s";
  const [unit, each] = TIMES.find((one) => seconds >= one[1] * 0.99995) ?? TIMES.at(-1);
  return `${digits(seconds / each, 4)} ${unit}`;
}

function size(bytes) {
  const [unit, each] = SIZES_OF_MEMORY.find((one) => bytes >= one[1]) ?? SIZES_OF_MEMORY.at(-1);
  return `${digits(bytes / each, 3)} ${unit}`;
}

function percent(share) {
  if (share > 0 && share < 0.005) return "<1 %";
  if (share >= 0.995 && share < 1 - 1e-9) return ">99 %";
  return `${Math.round(share * 100)} %`;
}

// A time in the step, in as many digits as tell a pixel from the next.
function moment(time_s) {
  return tick(time_s, (view.to - view.from) / 1000);
}

// A time in the unit that suits the step, in as many digits as tell it from one `apart_s` away.
function tick(time_s, apart_s) {
  const [unit, each] = TIMES.find((one) => longest_s >= one[1]) ?? TIMES.at(-1);
  const decimals = Math.min(9, Math.max(0, -Math.floor(Math.log10(apart_s / each) + 1e-9)));
  return `${(time_s / each).toFixed(decimals)} ${unit}`;
}

function count(number, noun, ending = "s") {
  return `${number} ${noun}${number === 1 ? "" : ending}`;
}

function taskName(timeline, task) {
  return `${timeline.stage[task]}${timeline.kind[task]}${timeline.microbatch[task]}`;
}

function taskWords(timeline, task) {
  const { words } = data.kinds.find((each) => each.kind === timeline.kind[task]);
  return `${words} of stage ${timeline.stage[task]}, microbatch ${timeline.microbatch[task]}`;
}

function layerWords(layers, most = 6) {
  const shown = layers.slice(0, most).join(", ");
  return layers.length > most ? `${shown} and ${layers.length - most} more` : shown;
}

function deviceWords(timeline, device) {
  return timeline.name ? `device ${device}, ${timeline.name}` : `device ${device}`;
}

// A new element with text, which is never read as HTML: names of users are in it.
function make(tag, text = "", className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  if (className) element.className = className;
  return element;
}
