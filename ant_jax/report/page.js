"use strict";

const content = JSON.parse(document.getElementById("content").textContent);
const runs = content.runs;

// Ten colours that differ also in print; from the eleventh run on, lines are dashed.
const PALETTE = [
  "#4269d0", "#e07b00", "#2f9e62", "#d6456b", "#8a5cd1",
  "#0d94a8", "#9c6b4e", "#6b7280", "#b59a00", "#c26ad6",
];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const VIRIDIS = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [187, 223, 39]];
const PLASMA = [[13, 8, 135], [106, 0, 168], [177, 42, 144], [225, 100, 98], [252, 166, 54]];
const DIVERGING = [
  [0, "#b2453c"], [0.25, "#e8a58f"], [0.5, "#f7f7f5"], [0.75, "#8fb4dc"], [1, "#2f5fa8"],
];
const MAIN_FIGURES = ["fid", "frechet_distance", "label_accuracy", "validation_loss"];
const TOUCH = matchMedia("(pointer: coarse)").matches;

runs.forEach((run, i) => {
  run.colour = PALETTE[i % PALETTE.length];
  run.dash = DASHES[Math.floor(i / PALETTE.length) % DASHES.length];
  run.shown = true;
  run.k = run.tasks.length || (run.curves.cluster_losses || []).length;
});

const state = { x: "step", scale: "log", figure: null, at: 1 };

// --- small things -------------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function swatch(run) {
  const node = element("span", { className: "swatch" });
  node.style.background = run.colour;
  return node;
}

function between(colours, share) {
  const place = share * (colours.length - 1);
  const low = Math.min(Math.floor(place), colours.length - 2);
  const mixed = colours[low].map((c, i) => Math.round(c + (colours[low + 1][i] - c) * (place - low)));
  return `rgb(${mixed})`;
}

const taskColour = (i, k) => between(VIRIDIS, k > 1 ? i / (k - 1) : 0);
const gapColour = (gap, k) => between(PLASMA, k > 2 ? (gap - 1) / (k - 2) : 0);

function number(value) {
  if (value === null || value === undefined) return "";
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size >= 1e5 || (size < 1e-3 && size > 0) ? value.toExponential(2) : String(+value.toPrecision(4));
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${(seconds / 60).toFixed(1)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

function taskName(run, i) {
  const task = run.tasks[i];
  if (!task) return `task ${i}`;
  const whole = run.tasks.every((each) => Number.isInteger(each.low) && Number.isInteger(each.high));
  // Real levels of a continuous process share their ends.
  const continuous = !whole || run.tasks[run.tasks.length - 1].high <= 1;
  const high = continuous ? number(task.high) : task.high - 1;
  return `${i}: t = ${number(task.low)}..${high}`;
}

const spaced = (name) => name.replaceAll("_", " ");
const last = (list) => (list && list.length ? list[list.length - 1] : null);
const shown = () => runs.filter((run) => run.shown);

function select(label, options, value, change) {
  const node = element("select");
  for (const [key, text] of options) node.append(new Option(text, key, false, key === value));
  node.addEventListener("change", () => change(node.value));
  return element("label", {}, label, node);
}

function section(title, text, ...controls) {
  const head = element("div", { className: "head" }, element("h2", {}, title), ...controls);
  const node = element("section", {}, head);
  if (text) node.append(element("p", {}, text));
  document.querySelector("main").append(node);
  return node;
}

// --- charts: drawn when they come into view -----------------------------------------------------

const charts = [];
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const chart = charts.find((each) => each.node === entry.target);
      chart.inView = entry.isIntersecting;
      draw(chart);
    }
  },
  { rootMargin: "300px" },
);

function draw(chart) {
  if (!chart.inView || chart.drawn) return;
  chart.drawn = true;
  const { traces, layout } = chart.build();
  chart.node.style.minHeight = `${layout.height || chart.height}px`;
  const axis = { gridcolor: "#eef0f4", zerolinecolor: "#98a2b3", linecolor: "#cfd4dd", automargin: true };
  Plotly.react(
    chart.node,
    traces,
    {
      height: chart.height,
      margin: { l: 10, r: 12, t: 8, b: 8 },
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif", size: 11, color: "#475467" },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      showlegend: false,
      hovermode: traces.length > 12 ? "closest" : "x unified",
      hoverlabel: { font: { size: 11 }, namelength: 40 },
      // On a phone, a finger scrolls the page.
      dragmode: TOUCH ? false : "zoom",
      ...layout,
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    },
    { displayModeBar: false, responsive: true },
  );
}

function chart(parent, caption, height, build, kind = "") {
  const node = element("div", { className: "chart" });
  node.style.minHeight = `${height}px`;
  parent.append(
    element("figure", {}, caption ? element("figcaption", {}, caption) : null, node),
  );
  const added = { node, build, height, kind, drawn: false, inView: false };
  charts.push(added);
  watcher.observe(node);
}

function redraw(kind = null) {
  for (const each of charts) {
    if (kind !== null && each.kind !== kind) continue;
    each.drawn = false;
    draw(each);
  }
}

// The unit of time that suits the longest run.
function timeUnit() {
  const longest = Math.max(0, ...runs.map((run) => last(run.curves.seconds) || 0));
  if (longest >= 7200) return [3600, "hours"];
  return longest >= 120 ? [60, "minutes"] : [1, "seconds"];
}

function xOf(points) {
  if (state.x === "step") return points.step;
  const [unit] = timeUnit();
  return (points.seconds || []).map((value) => (value === null ? null : value / unit));
}

function ends(values, positive) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value === null || (positive && value <= 0)) continue;
    [low, high] = [Math.min(low, value), Math.max(high, value)];
  }
  return [low, high];
}

const heights = (traces) => traces.flatMap((trace) => trace.y);

// On a logarithmic axis, labels at 1, 2 and 5 of each power of ten, if these are enough.
function yAxis(log, values) {
  if (!log) return { type: "linear" };
  const [low, high] = ends(values, true);
  return { type: "log", tickformat: "~g", ...(high > 4 * low ? { dtick: "D2" } : { nticks: 6 }) };
}

const xAxis = () => ({
  title: { text: state.x === "step" ? "step" : `${timeUnit()[1]} of training`, standoff: 6 },
});

function line(points, values, name, colour, more = {}) {
  return {
    type: "scatter",
    mode: values.length > 1 ? "lines" : "markers",
    x: xOf(points),
    y: values,
    name,
    line: { color: colour, width: 1.6, ...more.line },
    marker: { color: colour, size: 6 },
    hovertemplate: "%{y:.4g}",
    ...Object.fromEntries(Object.entries(more).filter(([key]) => key !== "line")),
  };
}

// --- the parts of the page ----------------------------------------------------------------------

function header() {
  const title = runs.length === 1 ? runs[0].name : `${runs.length} runs side by side`;
  const where = runs.length === 1 ? `${runs[0].workdir}, ` : "";
  document.querySelector("header").append(
    element("h1", {}, title),
    element("p", {}, `${where}${content.made}, ant-jax`),
  );
  if (runs.length === 1) {
    document.querySelector("nav").remove();
    return;
  }
  const chips = element("div", { className: "chips" });
  const all = element("button", { className: "chip" }, "all / none");
  all.addEventListener("click", () => {
    const some = runs.some((run) => !run.shown);
    runs.forEach((run) => { run.shown = some; });
    update();
  });
  if (runs.length > 3) chips.append(all);
  for (const run of runs) {
    run.chip = element("button", { className: "chip" }, swatch(run), run.name);
    run.chip.addEventListener("click", () => {
      run.shown = !run.shown;
      update();
    });
    chips.append(run.chip);
  }
  document.querySelector("nav").append(chips);
}

// Hides what belongs to runs that are not shown.
function update() {
  for (const run of runs) {
    if (run.chip) run.chip.setAttribute("aria-pressed", run.shown);
    for (const node of run.nodes || []) node.hidden = !run.shown;
  }
  redraw();
}

function belongs(run, node) {
  (run.nodes ||= []).push(node);
  return node;
}

function overview() {
  const several = runs.length > 1;
  const node = section("Overview", several ? "With the settings that differ. A click on a heading sorts." : "");
  const figures = MAIN_FIGURES.filter((name) => runs.some((run) => run.measured.some((each) => name in each.figures)));
  const columns = [
    ["step", (run) => last(run.curves.step), (value, run) => (value === null ? "none yet" : `${value} of ${run.num_steps}`)],
    ["time", (run) => last(run.curves.seconds), duration],
    ["loss", (run) => last(run.curves.loss), number],
    ...figures.map((name) => [
      spaced(name),
      (run) => last(run.measured.map((each) => last(each.figures[name])).filter((value) => value !== null)),
      number,
    ]),
  ];
  if (runs.some((run) => run.best)) {
    const text = (value, { best }) => (best ? `${spaced(best.figure)} ${number(value)} at step ${best.step}` : "");
    columns.push(["best", (run) => run.best?.value ?? null, text, "text"]);
  }
  if (several) {
    content.settings.forEach(({ name, values }) => {
      columns.push([name, (run) => values[runs.indexOf(run)], (value) => value ?? "", "text"]);
    });
  }
  const body = element("tbody");
  const heads = element("tr", {}, element("th", {}, "run"));
  const rows = runs.map((run) => {
    const row = element("tr", {}, element("th", { scope: "row", title: run.workdir }, swatch(run), run.name));
    for (const [, value, text, kind] of columns) {
      row.append(element("td", { className: kind || "" }, text(value(run), run)));
    }
    return belongs(run, row);
  });
  columns.forEach(([name, value, , kind]) => {
    const button = element("button", {}, name);
    let up = false;
    button.addEventListener("click", () => {
      up = !up;
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        const [m, n] = [Number(x), Number(y)];
        const order = Number.isNaN(m) || Number.isNaN(n) ? String(x).localeCompare(String(y)) : m - n;
        return up ? order : -order;
      };
      body.append(...runs.slice().sort(compare).map((run) => rows[runs.indexOf(run)]));
    });
    heads.append(element("th", { className: kind || "" }, button));
  });
  body.append(...rows);
  node.append(
    element("div", { className: "card scroll" }, element("table", {}, element("thead", {}, heads), body)),
  );
  if (several) return;
  const items = content.settings.map(({ name, values }) =>
    element("tr", {}, element("th", {}, name), element("td", { className: "text" }, values[0] ?? "")),
  );
  if (!items.length) return;
  const more = section("Settings", "The method, the clusters, and what does not have its default.");
  more.append(
    element("div", { className: "card scroll" }, element("table", {}, element("tbody", {}, ...items))),
  );
}

function losses() {
  const scale = select("scale", [["log", "logarithmic"], ["linear", "linear"]], state.scale, (value) => {
    state.scale = value;
    redraw();
  });
  const x = select("against", [["step", "steps"], ["seconds", "time"]], state.x, (value) => {
    state.x = value;
    redraw();
  });
  const perPoint = Math.max(1, ...runs.map((run) => run.curves.per_point));
  const means = perPoint > 1
    ? `Each point is the mean of up to ${perPoint} logged lines; the band reaches from the lowest to the highest. `
    : "";
  const node = section(
    "Training",
    `${means}Time is that of the steps, without compilation and drawing samples. These controls hold for all curves.`,
    x,
    scale,
  );
  const grid = element("div", { className: "grid" });
  node.append(grid);
  const overlay = (caption, name, yaxis) => {
    if (!runs.some((run) => run.curves[name])) return;
    const card = element("div", { className: "card" });
    grid.append(card);
    chart(card, caption, 300, () => {
      const traces = [];
      for (const run of shown().filter((each) => each.curves[name])) {
        const points = run.curves;
        if (name === "loss" && points.loss_low) {
          const edge = { line: { width: 0 }, hoverinfo: "skip", hovertemplate: null };
          traces.push(line(points, points.loss_low, "", run.colour, edge));
          traces.push(line(points, points.loss_high, "", run.colour, { ...edge, fill: "tonexty", fillcolor: `${run.colour}26` }));
        }
        traces.push(line(points, points[name], run.name, run.colour, { line: { dash: run.dash } }));
      }
      return { traces, layout: { xaxis: xAxis(), yaxis: yaxis(traces) } };
    });
  };
  overlay("Loss", "loss", (traces) => yAxis(state.scale === "log", heights(traces)));
  overlay("Norm of the combined gradient", "grad_norm", (traces) => yAxis(state.scale === "log", heights(traces)));
  overlay("Share of steps with a conflict: two task gradients with a negative cosine", "conflict", () => ({ range: [-0.03, 1.03] }));
}

function measurements() {
  const names = [...new Set(runs.flatMap((run) => run.measured.flatMap((each) => Object.keys(each.figures))))];
  if (!names.length) {
    section("Measurements", "None yet: --mode evaluate makes them, or config.evaluation.every during training.");
    return;
  }
  state.figure = MAIN_FIGURES.find((name) => names.includes(name)) || names[0];
  const choice = select("", names.map((name) => [name, spaced(name)]), state.figure, (value) => {
    state.figure = value;
    redraw("figure");
  });
  const stars = runs.some((run) => run.best) ? " A star marks the step that --step best uses." : "";
  const node = section("Measurements", `Of samples of the moving average.${stars}`, choice);
  const card = element("div", { className: "card" });
  node.append(card);
  const title = () => ({ text: spaced(state.figure), standoff: 6 });
  chart(card, "", 320, () => {
    const found = shown().flatMap((run) =>
      run.measured
        .filter((each) => each.figures[state.figure])
        .map((each) => [run, each, each.label ? `${run.name} (${each.label})` : run.name]),
    );
    // A curve of one point says less than a bar.
    if (found.every(([, each]) => each.step.length === 1)) {
      const bars = {
        type: "bar",
        orientation: "h",
        y: found.map(([, each, name]) => `${name}, step ${each.step[0]}`),
        x: found.map(([, each]) => each.figures[state.figure][0]),
        text: found.map(([, each]) => number(each.figures[state.figure][0])),
        marker: { color: found.map(([run]) => run.colour) },
        hovertemplate: "%{y}: %{x:.4g}<extra></extra>",
      };
      return {
        traces: [bars],
        layout: {
          height: 70 + 30 * Math.max(1, found.length),
          bargap: 0.3,
          hovermode: "closest",
          xaxis: { title: title(), rangemode: "tozero" },
          yaxis: { type: "category", autorange: "reversed", showgrid: false, ticksuffix: " " },
        },
      };
    }
    const traces = found.map(([run, each, name]) =>
      line(each, each.figures[state.figure], name, run.colour, { mode: "lines+markers", line: { dash: run.dash } }),
    );
    for (const [run, each, name] of found) {
      const at = each.has_best ? each.step.indexOf(run.best.step) : -1;
      if (at < 0) continue;
      const marker = { symbol: "star", size: 15, color: run.colour, line: { color: "#fff", width: 1 } };
      const point = { step: [each.step[at]], seconds: [each.seconds[at]] };
      const text = `best step by ${spaced(run.best.figure)}: ${run.best.step}<br>%{y:.4g}`;
      traces.push(line(point, [each.figures[state.figure][at]], name, run.colour, { marker, hovertemplate: text }));
    }
    const [low, high] = ends(heights(traces), false);
    const log = low > 0 && high > 5 * low;
    return {
      traces,
      layout: { xaxis: xAxis(), yaxis: { ...yAxis(log, heights(traces)), title: title() }, hovermode: "closest" },
    };
  }, "figure");
}

function clusters() {
  const known = runs.filter((run) => run.tasks.some((task) => task.log_snr));
  if (!known.length) return;
  const node = section(
    "Tasks",
    "The clusters of noise levels over log-SNR: data on the left, noise on the right. The colours of the tasks are those of the curves below.",
  );
  const card = element("div", { className: "card" });
  node.append(card);
  const height = 70 + 26 * known.length;
  chart(card, "", height, () => {
    const rows = known.filter((run) => run.shown);
    const traces = [];
    for (const run of rows) {
      run.tasks.forEach((task, i) => {
        const [left, right] = task.log_snr;
        traces.push({
          type: "bar",
          orientation: "h",
          y: [run.name],
          x: [right - left],
          base: [left],
          marker: { color: taskColour(i, run.k), line: { color: "#fff", width: 1 } },
          text: [String(i)],
          textposition: "inside",
          insidetextanchor: "middle",
          textangle: 0,
          constraintext: "none",
          name: taskName(run, i),
          hovertemplate: `task ${taskName(run, i)}<br>log-SNR ${number(left)} to ${number(right)}<extra></extra>`,
        });
      });
    }
    return {
      traces,
      layout: {
        barmode: "overlay",
        bargap: 0.25,
        hovermode: "closest",
        height: 70 + 26 * Math.max(1, rows.length),
        xaxis: { title: { text: "log-SNR", standoff: 6 }, zeroline: false, autorange: "reversed" },
        yaxis: { autorange: "reversed", type: "category", showgrid: false, ticksuffix: " " },
      },
    };
  });
}

// The axis that the curves of all shown runs have in common.
function sharedAxis(name, log) {
  const values = shown().flatMap((run) => (run.curves[name] || []).flat());
  let [low, high] = ends(values, log);
  if (low > high) return {};
  if (log) [low, high] = [Math.log10(low), Math.log10(high)];
  const room = 0.04 * (high - low) || 0.1;
  return { ...yAxis(log, values), range: [low - room, high + room] };
}

function xRange() {
  return [0, Math.max(0, ...shown().map((run) => last(xOf(run.curves)) || 0)) || 1];
}

function pairs(k) {
  const found = [];
  for (let i = 0; i < k; i++) for (let j = i + 1; j < k; j++) found.push([i, j]);
  return found;
}

// The point of a run that the slider chooses: the last one up to that step.
function pointAt(run) {
  const steps = run.curves.step;
  const at = state.at * Math.max(...runs.map((each) => last(each.curves.step) || 0));
  let point = 0;
  while (point + 1 < steps.length && steps[point + 1] <= at) point += 1;
  return point;
}

function matrix(run) {
  const z = Array.from({ length: run.k }, (_, i) => Array.from({ length: run.k }, (_, j) => (i === j ? 1 : null)));
  const point = pointAt(run);
  pairs(run.k).forEach(([i, j], n) => {
    z[i][j] = z[j][i] = run.curves.cosines[n][point];
  });
  return z;
}

function tasks() {
  const steps = Math.max(...runs.map((run) => last(run.curves.step) || 0));
  const some = runs.some((run) => run.curves.cosines);
  let slider = null;
  if (some) {
    const at = element("output", {}, `step ${steps}`);
    const input = element("input", { type: "range", min: 0, max: 1000, value: 1000, "aria-label": "step of the cosines" });
    input.addEventListener("input", () => {
      state.at = input.value / 1000;
      at.textContent = `step ${Math.round(state.at * steps)}`;
      redraw("matrix");
    });
    slider = element("label", {}, "cosines at", input, at);
  }
  const node = section(
    "Task by task",
    "The curves of one column share their axes. Cosines are those between the gradients of two tasks: dark lines are neighbours, light lines are far apart.",
    slider,
  );
  for (const run of runs) {
    const card = element("div", { className: "card run" }, element("h3", {}, swatch(run), run.name));
    node.append(belongs(run, card));
    const curves = run.curves;
    if (!curves.step.length) {
      card.append(element("div", { className: "empty" }, "No line is logged yet."));
      continue;
    }
    const panels = element("div", { className: "panels" });
    card.append(panels);
    const ofTasks = (caption, name) => {
      if (!curves[name]) return;
      chart(panels, caption, 240, () => {
        const log = state.scale === "log";
        const traces = curves[name].map((values, i) => line(curves, values, taskName(run, i), taskColour(i, run.k)));
        return { traces, layout: { xaxis: { ...xAxis(), range: xRange() }, yaxis: sharedAxis(name, log) } };
      });
    };
    ofTasks("Losses", "cluster_losses");
    ofTasks("Weights", "weights");
    if (!curves.cosines) {
      const why = run.k > 1 ? "This method needs no Gram matrix: config.method.cosines = True logs the cosines." : "One task has no cosines.";
      panels.append(element("div", { className: "empty" }, why));
      continue;
    }
    chart(panels, "Cosines", 240, () => ({
      traces: pairs(run.k).map(([i, j], n) =>
        line(curves, curves.cosines[n], `${i} and ${j}`, gapColour(j - i, run.k), { line: { width: 1.2 } }),
      ),
      layout: { xaxis: { ...xAxis(), range: xRange() }, yaxis: sharedAxis("cosines", false) },
    }));
    const names = Array.from({ length: run.k }, (_, i) => String(i));
    chart(panels, "Gram matrix, as cosines", 240, () => ({
      traces: [{
        type: "heatmap",
        z: matrix(run),
        x: names,
        y: names,
        zmin: -1,
        zmax: 1,
        colorscale: DIVERGING,
        showscale: false,
        xgap: 2,
        ygap: 2,
        texttemplate: run.k <= 6 ? "%{z:.2f}" : "",
        hovertemplate: "tasks %{y} and %{x}: %{z:.3f}<extra></extra>",
      }],
      layout: {
        hovermode: "closest",
        xaxis: { type: "category", showgrid: false, constrain: "domain", title: { text: `step ${curves.step[pointAt(run)]}`, standoff: 6 } },
        yaxis: { type: "category", showgrid: false, autorange: "reversed", scaleanchor: "x", constrain: "domain" },
      },
    }), "matrix");
  }
}

function samples() {
  const steps = [...new Set(runs.flatMap((run) => run.samples.map((each) => each.step)))].sort((a, b) => a - b);
  if (!steps.length) {
    section("Samples", "None yet.");
    return;
  }
  const at = element("output", {});
  const input = element("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": "step of the samples" });
  const node = section("Samples", "", element("label", {}, "at", input, at));
  const grid = element("div", { className: "shots" });
  node.append(grid);
  const shots = runs.filter((run) => run.samples.length).map((run) => {
    const image = element("img", { alt: `samples of ${run.name}` });
    const text = element("p");
    grid.append(belongs(run, element("div", { className: "card shot" }, element("h3", {}, swatch(run), run.name), image, text)));
    return { run, image, text };
  });
  const show = () => {
    const step = steps[input.value];
    at.textContent = `step ${step}`;
    for (const { run, image, text } of shots) {
      const found = run.samples.filter((each) => each.step <= step).pop() || run.samples[0];
      if (image.src !== found.source) image.src = found.source;
      text.textContent = `step ${found.step}`;
    }
  };
  input.addEventListener("input", show);
  show();
}

header();
overview();
losses();
measurements();
clusters();
tasks();
samples();
