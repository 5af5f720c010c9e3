/* Zooms all charts of a page that have data-zoom to the same steps, by buttons, two fields or dragging; and, where a server
   shows the page while runs train, loads it again when their files have changed. Positions are those of svg.py: 2% of the
   width are free on either side. */
(() => {
"use strict";
const form = document.querySelector("form.zoom"), PAD = 0.02, KEEP = 1 - 2 * PAD;
let charts = [], whole = [0, 1], shown = null;

const pair = text => text.split(" ").map(Number);

function read(svg) {
  const [left, right] = pair(svg.dataset.x), [low, high] = pair(svg.dataset.y);
  const plot = svg.querySelector("svg"), height = Number(svg.getAttribute("height"));
  const step = x => right > left ? left + (x / 100 - PAD) / KEEP * (right - left) : left;
  const value = y => high - y / height * (high - low);
  const lines = [...plot.children].map(each => (each.getAttribute("points") || "").split(" ").filter(Boolean)
    .map(point => point.split(",").map(Number)).map(([x, y]) => [step(x), value(y)]));
  const dots = [...svg.querySelectorAll("circle")].map(dot =>
    ({dot, at: [step(parseFloat(dot.getAttribute("cx"))), value(Number(dot.getAttribute("cy")))]}));
  const rows = svg.querySelector(".rows"), columns = svg.querySelector(".columns");
  return {svg, plot, height, left, right, low, high, lines, dots, rows, columns,
          before: [rows.innerHTML, columns.innerHTML]};
}

function ticks(low, high, isWhole) {
  let least = (high - low) / 5 || Math.abs(high) / 5 || 1;
  if (isWhole) least = Math.max(1, least);
  const power = 10 ** Math.floor(Math.log10(least));
  const size = [1, 2, 5, 10].map(each => each * power).find(each => each >= least * (1 - 1e-9));
  const first = Math.floor(low / size + 1e-9), last = Math.max(first + 1, Math.ceil(high / size - 1e-9));
  return Array.from({length: last - first + 1}, (_, n) => (first + n) * size);
}

/* A function that writes values so that those at a distance of size differ. */
function writer(kind, size) {
  const digits = value => Math.min(15, Math.max(1, 1 + Math.round(Math.log10(Math.abs(value) / size || 1))));
  if (kind === "count") return value => {
    const [unit, letter] = [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(each => Math.abs(value) >= each[0]) || [1, ""];
    return Number((value / unit).toPrecision(Math.max(3, digits(value)))) + letter;
  };
  const places = Math.max(0, -Math.floor(Math.log10(kind === "percent" ? 100 * size : size) + 1e-9));
  if (kind === "percent") return value => (100 * value).toFixed(Math.min(places, 3)) + "%";
  return places < 7 ? value => value.toFixed(places) : value => value.toPrecision(digits(value));
}

/* The values that lie between two steps; the lines' neighbours outside of them count too, since the curve runs to them. */
function visible(chart, from, to) {
  const found = chart.dots.filter(each => each.at[0] >= from && each.at[0] <= to).map(each => each.at[1]);
  for (const line of chart.lines) line.forEach(([step, value], n) => {
    const near = [line[n - 1], line[n + 1]].some(each => each && each[0] >= from && each[0] <= to);
    if (near || (step >= from && step <= to)) found.push(value);
  });
  return found;
}

function draw(chart, from, to) {
  const {height, left, right, low, high} = chart, values = visible(chart, from, to);
  const rows = values.length ? ticks(values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b)))
                             : ticks(low, high);
  const bottom = rows[0], top = rows[rows.length - 1];
  const x = step => 100 * (PAD + KEEP * (step - from) / (to - from)), y = value => height * (top - value) / (top - bottom);
  const place = step => 100 * (PAD + KEEP * (step - left) / (right - left || 1));
  const wide = (place(to) - place(from)) / KEEP, tall = height * (top - bottom) / (high - low || 1);
  chart.plot.setAttribute("viewBox", [place(from) - PAD * wide, height * (high - top) / (high - low || 1), wide, tall].join(" "));
  const write = writer(chart.svg.dataset.zoom, rows[1] - rows[0]);
  chart.rows.innerHTML = rows.map((value, n) => `<line class="${n ? "grid" : "axis"}" x1="0" x2="100%" y1="${y(value)}"
    y2="${y(value)}"/><text x="-8" y="${y(value) + 4}" text-anchor="end">${write(value)}</text>`).join("");
  chart.columns.innerHTML = ticks(from, to, true).filter(step => step >= from && step <= to).map(step =>
    `<line class="axis" x1="${x(step)}%" x2="${x(step)}%" y1="${height}" y2="${height + 4}"/><text x="${x(step)}%"
     y="${height + 18}" text-anchor="${x(step) > 90 ? "end" : "middle"}">${step.toLocaleString("en")}</text>`).join("");
  for (const {dot, at} of chart.dots) {
    dot.setAttribute("cx", x(at[0]) + "%");
    dot.setAttribute("cy", y(at[1]));
    dot.style.display = at[0] >= from && at[0] <= to && at[1] >= bottom && at[1] <= top ? "" : "none";
  }
}

function reset(chart) {
  chart.plot.setAttribute("viewBox", `0 0 100 ${chart.height}`);
  [chart.rows.innerHTML, chart.columns.innerHTML] = chart.before;
  for (const {dot, at} of chart.dots) {
    dot.setAttribute("cx", 100 * (PAD + KEEP * (at[0] - chart.left) / (chart.right - chart.left || 1)) + "%");
    dot.setAttribute("cy", chart.height * (chart.high - at[1]) / (chart.high - chart.low || 1));
    dot.style.display = "";
  }
}

/* Shows the steps between two, or all of them without arguments. */
function show(from, to) {
  if (from === undefined) shown = null;
  else {
    const size = Math.min(Math.max(to - from, 1), whole[1] - whole[0]);
    from = Math.min(Math.max(Math.round(from), whole[0]), whole[1] - Math.round(size));
    shown = [from, from + Math.round(size)];
  }
  const [first, last] = shown || whole;
  charts.forEach(chart => shown ? draw(chart, first, last) : reset(chart));
  form.from.value = first;
  form.to.value = last;
  form.querySelector("output").textContent = shown ? `steps ${first.toLocaleString("en")} to ${last.toLocaleString("en")}` : "all steps";
}

function dragging(chart) {
  const {svg} = chart, box = svg.querySelector("rect.pick");
  let start = null;
  const share = event => {
    const area = svg.getBoundingClientRect();
    return Math.min(1, Math.max(0, (event.clientX - area.left) / area.width));
  };
  const step = at => { const [from, to] = shown || whole; return from + (at - PAD) / KEEP * (to - from); };
  svg.addEventListener("pointerdown", event => { if (event.button === 0) { start = share(event); svg.setPointerCapture(event.pointerId); } });
  svg.addEventListener("pointermove", event => {
    if (start === null) return;
    const now = share(event);
    box.setAttribute("x", 100 * Math.min(start, now) + "%");
    box.setAttribute("width", 100 * Math.abs(now - start) + "%");
  });
  const stop = () => { start = null; box.setAttribute("width", 0); };
  svg.addEventListener("pointerup", event => {
    const [from, to] = [start, share(event)].sort((a, b) => a - b), drawn = start !== null && to - from > 0.01;
    stop();
    if (drawn) show(step(from), step(to));
  });
  svg.addEventListener("pointercancel", stop);
  svg.addEventListener("dblclick", () => show());
}

function begin() {
  charts = [...document.querySelectorAll("svg[data-zoom]")].map(read);
  if (!charts.length) return;
  whole = [Math.min(...charts.map(each => each.left)), Math.max(...charts.map(each => each.right))];
  charts.forEach(chart => {
    chart.svg.insertAdjacentHTML("beforeend", `<rect class="pick" y="0" width="0" height="${chart.height}"/>`);
    dragging(chart);
  });
  form.hidden = false;
  shown ? show(...shown) : show();
}

form.addEventListener("submit", event => {
  event.preventDefault();
  show(Math.min(form.from.valueAsNumber || 0, form.to.valueAsNumber || 0), Math.max(form.from.valueAsNumber || 0, form.to.valueAsNumber || 0));
});
form.addEventListener("click", event => {
  const [from, to] = shown || whole, size = to - from, middle = (from + to) / 2;
  const actions = {
    in: () => show(middle - size / 4, middle + size / 4), out: () => size >= (whole[1] - whole[0]) / 2 ? show() : show(middle - size, middle + size),
    earlier: () => shown && show(from - size / 2, to - size / 2), later: () => shown && show(from + size / 2, to + size / 2),
    all: () => show(),
  };
  if (event.target.name in actions) actions[event.target.name]();
});
begin();

const main = document.querySelector("main");
if (main.dataset.live) {
  let version = main.dataset.live;
  setInterval(async () => {
    try {
      const now = await (await fetch("version")).text();
      if (now === version) return;
      const page = new DOMParser().parseFromString(await (await fetch(".")).text(), "text/html");
      const fresh = page.querySelector("#runs");
      if (!fresh) return;
      document.querySelector("#runs").replaceWith(fresh);
      document.title = page.title;
      version = now;
      begin();
    } catch (error) { form.querySelector("output").textContent = "the server has ended; this is its last page"; }
  }, 2000);
}
})();
