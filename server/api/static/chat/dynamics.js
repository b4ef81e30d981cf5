// The network's dynamics for each token: experts by layer as a heat map, the norms of mu and velocity as curves.

import { button, download, make } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const CELL = 16, LEFT = 64, LABELS = 84, PANEL = 90, GAP = 30;
const EXPERTS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44bb99"];  // distinct to colour-blind people too
const NORMS = [["mu_norm", "|mu|"], ["velocity_norm", "|velocity|"]];

const colourOf = (expert) => EXPERTS[expert] ?? `hsl(${(expert * 137) % 360} 55% 55%)`;
const shownNorm = (value) => (value < 100 ? value.toPrecision(3) : Math.round(value).toLocaleString("en"));
const shownToken = (token) => token.replaceAll("\n", "⏎").replaceAll(" ", "·");

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The experts of each layer; tokens of older saved chats have one each. */
const routesOf = (token) => token.routed_experts ?? token.experts.map((expert) => [expert]);
const layersOf = (tokens, key) => tokens.reduce((most, token) => Math.max(most, token[key].length), 0);

/** Experts as one path for each, so that thousands of cells are a few elements; several of one layer share its cell. */
function heatMap(tokens, layers, top) {
  const cells = new Map();
  let frames = "";
  tokens.forEach((token, column) => routesOf(token).forEach((routes, layer) => {
    const width = (CELL - 1) / routes.length;
    routes.forEach((expert, index) => {
      const at = `M${LEFT + column * CELL + index * width} ${top + layer * CELL}`;
      cells.set(expert, `${cells.get(expert) ?? ""}${at}h${width}v${CELL - 1}h${-width}z`);
    });
    if (token.rerouted[layer]) frames += `M${LEFT + column * CELL + 1.5} ${top + layer * CELL + 1.5}h${CELL - 4}v${CELL - 4}h${4 - CELL}z`;
  }));
  const paths = [...cells].sort(([a], [b]) => a - b).map(([expert, d]) => svg("path", { d, fill: colourOf(expert), "data-expert": expert }));
  if (frames) paths.push(svg("path", { d: frames, fill: "none", stroke: "currentColor", "stroke-width": 2, class: "rerouted" }));
  for (let layer = 0; layer < layers; layer++) {
    paths.push(svg("text", { x: LEFT - 6, y: top + layer * CELL + CELL - 4, "text-anchor": "end" }, `layer ${layer}`));
  }
  return paths;
}

/** One curve for each layer, on a logarithmic scale: the last layers are a hundred times the first ones. */
function curves(tokens, key, name, top) {
  const layers = layersOf(tokens, key);
  const values = tokens.flatMap((token) => token[key]).filter((value) => value > 0).map(Math.log10);
  if (!values.length) return [];
  const [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  const y = (value) => (top + PANEL - ((Math.log10(Math.max(value, 10 ** low)) - low) / (high - low || 1)) * PANEL).toFixed(1);
  const lines = Array.from({ length: layers }, (_, layer) => {
    const points = tokens.flatMap((token, column) => (token[key].length > layer ? [`${LEFT + (column + 0.5) * CELL},${y(token[key][layer])}`] : []));
    const stroke = `hsl(${210 + (70 * layer) / Math.max(1, layers - 1)} 65% ${60 - (10 * layer) / Math.max(1, layers - 1)}%)`;
    return svg("polyline", { points: points.join(" "), fill: "none", stroke, "stroke-width": 1.5 }, svg("title", {}, `${name}, layer ${layer}`));
  });
  return [
    svg("text", { x: LEFT, y: top - 8 }, `${name}, a line for each of ${layers} layers`),
    svg("text", { x: LEFT - 6, y: top + 8, "text-anchor": "end" }, shownNorm(10 ** high)),
    svg("text", { x: LEFT - 6, y: top + PANEL, "text-anchor": "end" }, shownNorm(10 ** low)),
    ...lines,
  ];
}

/** The picture of some tokens. */
function picture(tokens) {
  const layers = layersOf(tokens, "experts");
  let top = GAP;
  const parts = [];
  if (layers) {
    const experts = [...new Set(tokens.flatMap((token) => routesOf(token).flat()))].sort((a, b) => a - b);
    const title = tokens.some((token) => routesOf(token).some((routes) => routes.length > 1))
      ? "Experts of each layer, by the token's id; the first one on the left"
      : "Expert of each layer; a frame: mu chose it instead of the token's id";
    parts.push(svg("text", { x: LEFT, y: 14 }, title));
    parts.push(...heatMap(tokens, layers, top));
    top += layers * CELL + 8;
    experts.slice(0, 24).forEach((expert, index) => {
      const x = LEFT + index * 34;
      parts.push(svg("rect", { x, y: top, width: 12, height: 12, fill: colourOf(expert) }), svg("text", { x: x + 16, y: top + 11 }, String(expert)));
    });
    top += 2 * GAP;
  }
  for (const [key, name] of NORMS) {
    const drawn = curves(tokens, key, name, top);
    parts.push(...drawn);
    if (drawn.length) top += PANEL + GAP;
  }
  tokens.forEach((token, column) => {
    const x = LEFT + (column + 0.5) * CELL + 4;
    parts.push(svg("text", { transform: `translate(${x} ${top - 12}) rotate(90)`, class: "token-label" }, shownToken(token.token).slice(0, 12)));
  });
  const width = Math.max(LEFT + tokens.length * CELL + 10, 560);
  const height = top + LABELS;
  const moved = tokens.filter((token) => token.rerouted.some(Boolean)).length;
  const dynamics = NORMS.some(([key]) => layersOf(tokens, key)) ? `; ${moved} tokens re-routed by mu; curves of mu and velocity` : "";
  const label = `Experts of ${tokens.length} tokens in ${layers} layers${dynamics}`;
  return svg("svg", {
    xmlns: SVG, width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label,
    "font-family": "ui-monospace, monospace", "font-size": 11, fill: "currentColor",
  }, ...parts);
}

function exportSvg(drawn) {
  const copy = drawn.cloneNode(true);
  copy.setAttribute("color", "#1b1c22");
  copy.prepend(svg("rect", { width: "100%", height: "100%", fill: "#ffffff" }));
  download("dynamics.svg", "image/svg+xml", new XMLSerializer().serializeToString(copy));
}

/** One row for each token and layer. */
export function toCsv(tokens) {
  const rows = [["index", "token_id", "token", "input_token_id", "layer", "expert", "rerouted", "mu_norm", "velocity_norm", "experts", "weights"]];
  tokens.forEach((token, index) => {
    const layers = Math.max(token.experts.length, token.mu_norm.length, token.velocity_norm.length);
    for (let layer = 0; layer < layers; layer++) {
      rows.push([index, token.token_id, token.token, token.input_token_id, layer, token.experts[layer] ?? "",
        token.rerouted[layer] == null ? "" : Number(token.rerouted[layer]), token.mu_norm[layer] ?? "", token.velocity_norm[layer] ?? "",
        (routesOf(token)[layer] ?? []).join(" "), (token.expert_weights?.[layer] ?? []).join(" ")]);
    }
  });
  return rows.map((row) => row.map((cell) => (/[",\r\n]/.test(cell) ? `"${String(cell).replaceAll('"', '""')}"` : cell)).join(",")).join("\r\n") + "\r\n";
}

function tokenTable(token) {
  const columns = [["Mu norm", token.mu_norm], ["Velocity norm", token.velocity_norm]].filter(([, values]) => values.length);
  const layers = Math.max(token.experts.length, ...columns.map(([, values]) => values.length));
  const most = Math.max(0, ...routesOf(token).map((routes) => routes.length));
  const names = ["Layer", ...(most ? [most > 1 ? "Experts and their weights" : "Expert"] : []), ...columns.map(([name]) => name)];
  const rows = Array.from({ length: layers }, (_, layer) => {
    const row = make("tr", {}, make("th", { scope: "row" }, String(layer)));
    if (token.experts.length) {
      const isMoved = Boolean(token.rerouted[layer]);
      const weights = token.expert_weights?.[layer] ?? [];
      const shown = routesOf(token)[layer].map((expert, index) => (most > 1 ? `${expert}: ${weights[index]?.toFixed(2)}` : String(expert)));
      row.append(make("td", { class: isMoved ? "moved" : null }, `${shown.join(", ")}${isMoved ? " (re-routed by mu)" : ""}`));
    }
    for (const [, values] of columns) row.append(make("td", {}, values[layer].toFixed(3)));
    return row;
  });
  return make("table", {},
    make("caption", {}, `Token ${JSON.stringify(token.token)} (id ${token.token_id}), after reading id ${token.input_token_id}`),
    make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)))), make("tbody", {}, ...rows));
}

/** Draw the view of an answer's tokens into `root`. */
export function drawDynamics(root, tokens) {
  const drawn = picture(tokens);
  const table = make("div", { class: "token-table", tabindex: "0", role: "region", "aria-label": "Layers of the chosen token" });
  const strip = make("div", { class: "tokens", role: "group", "aria-label": "Tokens: choose one to see its layers" });
  const choose = (chosen) => {
    for (const other of strip.querySelectorAll('[aria-pressed="true"]')) other.setAttribute("aria-pressed", "false");
    const element = strip.children[chosen];
    element.setAttribute("aria-pressed", "true");
    strip.querySelector('[tabindex="0"]').tabIndex = -1;
    element.tabIndex = 0;
    table.replaceChildren(tokenTable(tokens[chosen]));
  };
  strip.append(...tokens.map((token, index) => {
    const moved = token.rerouted.filter(Boolean).length;
    return button(token.token, () => choose(index), {
      class: moved ? "token rerouted" : "token", tabindex: index ? "-1" : "0", "aria-pressed": "false",
      title: moved ? `re-routed in ${moved} of ${token.rerouted.length} layers` : null,
    });
  }));
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const other = step && event.target[step];
    if (!other) return;
    event.preventDefault();
    other.click();
    other.focus();
  });
  drawn.addEventListener("click", (event) => {
    const column = Math.floor((event.clientX - drawn.getBoundingClientRect().left - LEFT) / CELL);
    if (tokens[column]) choose(column);
  });
  root.replaceChildren(
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Picture of what the model did" }, drawn),
    make("div", { class: "actions" },
      button("Export as SVG", () => exportSvg(drawn)), button("Export as CSV", () => download("dynamics.csv", "text/csv", toCsv(tokens)))),
    strip, table);
}
