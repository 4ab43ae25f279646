"""Style and script of the page."""

STYLE = """
header { display: flex; gap: 1rem; align-items: flex-start; justify-content: space-between; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; } h2 { font-size: 1.15rem; margin: 0 0 .8rem; }
h3 { font-size: .92rem; margin: 0; } p { margin: .2rem 0; } .soft, figcaption, .remark { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 1rem 0 1.4rem; font-size: .9rem; }
a { color: var(--c0); text-decoration: none; } a:hover { text-decoration: underline; }
button { font: inherit; font-size: .85rem; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .3rem .7rem; cursor: pointer; flex: none; }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
section { border-top: 1px solid var(--line); padding: 1.2rem 0 1.6rem; }
.state { display: inline-block; font-size: .8rem; font-weight: 600; padding: .1rem .6rem; border-radius: 1rem;
  border: 1px solid currentColor; margin-right: .5rem; }
.complete { color: var(--c2); } .running { color: var(--c0); } .preempted { color: var(--c1); }
.failed, .alarm { color: var(--alarm); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .8rem;
  margin-bottom: 1.4rem; }
.tile { background: var(--card); border-radius: 8px; padding: .7rem .9rem; min-width: 0; }
.tile .name { color: var(--soft); font-size: .8rem; }
.tile .value { font-size: 1.45rem; font-weight: 600; line-height: 1.3; }
.tile .more { color: var(--soft); font-size: .8rem; }
.bar { height: 5px; border-radius: 3px; background: var(--line); margin-top: .45rem; overflow: hidden; }
.bar div { height: 100%; background: var(--c0); }
.charts { display: grid; gap: 1.4rem 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20.5rem), 1fr)); }
section > * + * { margin-top: 1.2rem; } section > h2 + * { margin-top: 0; }
.wide { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); align-items: start; }
@media (max-width: 50rem) { .wide { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; min-width: 0; } figcaption { font-size: .82rem; } .remark { font-size: .8rem; margin-top: .2rem; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; } svg text { font-family: inherit; }
.legend { display: flex; flex-wrap: wrap; gap: 0 .9rem; font-size: .82rem; margin: .1rem 0 .3rem; min-height: 1.25rem; }
.legend span::before { content: ""; display: inline-block; width: 1rem; height: 0; border-top: 3px solid var(--c);
  margin-right: .35rem; vertical-align: middle; }
.legend .level::before { border-top-style: dashed; border-top-width: 2px; }
.legend .second::before { border-top-style: dashed; } .legend .third::before { border-top-style: dotted; }
#tip { position: fixed; z-index: 2; pointer-events: none; background: var(--paper); border: 1px solid var(--line);
  border-radius: 6px; padding: .35rem .6rem; font-size: .8rem; box-shadow: 0 2px 10px #0003;
  max-width: min(20rem, 90vw); }
#tip b { display: block; } #tip span { display: block; } #tip i { display: inline-block; width: .7rem; height: .7rem;
  border-radius: 50%; background: var(--c); margin-right: .4rem; vertical-align: -1px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.scroll td, .scroll th { white-space: nowrap; } .fit th { overflow-wrap: normal; }
.keys td:first-child { min-width: 10rem; } .keys th { overflow-wrap: anywhere; }
.facts th { width: 11rem; } @media (max-width: 40rem) { .facts th { width: 7rem; } }
pre { font: .82rem/1.45 ui-monospace, monospace; background: var(--card); border-radius: 8px; padding: .8rem 1rem;
  overflow-x: auto; margin: .6rem 0; }
details summary { cursor: pointer; font-size: .92rem; margin-top: .8rem; }
.film { margin-bottom: 1.4rem; } .frames { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); align-items: start; }
.film img { display: block; max-width: 100%; height: auto; border-radius: 6px; background: #fff; }
.film label { display: flex; gap: .8rem; align-items: center; font-size: .87rem; margin: .5rem 0 .7rem; }
.film label { max-width: 40rem; }
.film input { flex: 1; min-width: 0; accent-color: var(--c0); } .film output { min-width: 6.5rem; }
ul.notes { padding-left: 1.1rem; margin: .4rem 0 0; }
footer { color: var(--soft); font-size: .82rem; border-top: 1px solid var(--line); padding-top: 1rem; }
[hidden] { display: none !important; }
@media print { button, nav, label { display: none !important; } figure, .tile { break-inside: avoid; } }
"""

SCRIPT = """
"use strict";
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const shown = () => root.dataset.theme || (system.matches ? "dark" : "light");
  const label = () => { button.textContent = shown() === "dark" ? "Light" : "Dark"; };
  try { const kept = localStorage.getItem("maskwise-theme"); if (kept) root.dataset.theme = kept; } catch {}
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = shown() === "dark" ? "light" : "dark";
    try { localStorage.setItem("maskwise-theme", root.dataset.theme); } catch {}
    label();
  });
  system.addEventListener("change", label);
  label();

  const charts = JSON.parse(document.getElementById("data").textContent).charts;
  const tip = document.getElementById("tip");
  const number = (value) => String(Number(value.toPrecision(4)));
  const part = (name, text, color) => {
    const node = document.createElement(name);
    if (color !== undefined) {
      const dot = node.appendChild(document.createElement("i"));
      dot.style.setProperty("--c", `var(--c${color})`);
    }
    node.append(text);
    return node;
  };
  const nearest = (points, x) => {
    let low = 0, high = points.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; if (points[mid][0] < x) low = mid; else high = mid; }
    return low < high && Math.abs(points[high][0] - x) < Math.abs(points[low][0] - x) ? high : low;
  };
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const chart = charts[figure.dataset.chart], svg = figure.querySelector("svg");
    const [left, top, right, bottom] = chart.box, [first, last] = chart.x;
    const scale = chart.log ? Math.log : (value) => value;
    const [low, high] = chart.y.map(scale);
    const all = chart.series.flatMap((series) => series.points.map((point) => point[0]));
    const places = [...new Set(all)].sort((a, b) => a - b);
    const near = (last - first) / 60;
    const layer = svg.appendChild(document.createElementNS(svg.namespaceURI, "g"));
    const draw = (name, attributes) => {
      const node = layer.appendChild(document.createElementNS(svg.namespaceURI, name));
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    };
    let at = -1;
    const show = (index, clientX, clientY) => {
      at = Math.max(0, Math.min(places.length - 1, index));
      const x = places[at], across = (value) => left + (right - left) * (value - first) / (last - first);
      layer.replaceChildren();
      draw("line", { x1: across(x), x2: across(x), y1: top, y2: bottom, stroke: "var(--soft)", "stroke-width": 0.8 });
      const lines = [part("b", `${chart.unit} ${x.toLocaleString("en")}`)];
      for (const series of chart.series) {
        const point = series.points[nearest(series.points, x)];
        if (Math.abs(point[0] - x) > near) continue;
        const down = bottom - (bottom - top) * (scale(point[1]) - low) / (high - low);
        draw("circle", { cx: across(point[0]), cy: down, r: 3.5, fill: `var(--c${series.color})` });
        lines.push(part("span", `${series.name}: ${number(point[1])}`, series.color));
      }
      for (const level of chart.levels) lines.push(part("span", `${level.name}: ${number(level.value)}`, level.color));
      for (const [place, text] of chart.marks) if (Math.abs(place - x) <= near) lines.push(part("span", text));
      tip.replaceChildren(...lines);
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(4, Math.min(clientX + 14, innerWidth - box.width - 4))}px`;
      tip.style.top = `${Math.max(4, clientY - box.height - 12)}px`;
    };
    const hide = () => { layer.replaceChildren(); tip.hidden = true; };
    const follow = (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / (right - left);
      show(nearest(places.map((place) => [place]), first + x * (last - first)), event.clientX, event.clientY);
    };
    if (!places.length) continue;
    svg.addEventListener("pointermove", follow);
    svg.addEventListener("pointerdown", follow);
    svg.addEventListener("pointerleave", hide);
    figure.addEventListener("blur", hide);
    figure.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -places.length, End: places.length }[event.key];
      if (!steps) { if (event.key === "Escape") hide(); return; }
      event.preventDefault();
      const box = svg.getBoundingClientRect();
      show(at < 0 ? (steps > 0 ? 0 : places.length) : at + steps, box.left + box.width / 2, box.top + 20);
    });
  }

  for (const film of document.querySelectorAll(".film")) {
    const frames = [...film.querySelectorAll("figure")], label = film.querySelector("label");
    if (!label) continue;
    const slider = label.querySelector("input"), output = label.querySelector("output");
    const show = () => {
      frames.forEach((frame, index) => { frame.hidden = index !== 0 && index !== Number(slider.value); });
      output.textContent = frames[slider.value].dataset.step;
    };
    label.hidden = false;
    slider.addEventListener("input", show);
    show();
  }
})();
"""
