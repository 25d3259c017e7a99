// Elements and small pictures. Text only ever becomes text, never markup.

/** Make an element: `el("td", {class: "number"}, "12", child)`. */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    if (value !== null && value !== undefined && value !== false)
      element.setAttribute(key, value === true ? "" : value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Set a text where it changed, so that nothing is drawn or spoken for nothing. */
export function say(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

const WIDTH = 240;
const HEIGHT = 44;

/** Draw [time, value] points ending at `now`, `span` seconds wide; a gap or a null breaks the line. */
export function spark(svg, points, now, span, top) {
  const x = (t) => (WIDTH * (1 - (now - t) / span)).toFixed(1);
  const y = (v) => (HEIGHT - 2 - ((HEIGHT - 4) * Math.min(v, top)) / (top || 1)).toFixed(1);
  const runs = [];
  let last = -Infinity;
  for (const [t, v] of points) {
    if (v === null || v === undefined) {
      last = -Infinity;
      continue;
    }
    if (t - last > 5) runs.push([]);
    runs.at(-1).push([x(t), y(v)]);
    last = t;
  }
  const line = (run) => run.map(([a, b], i) => `${i ? "L" : "M"}${a} ${b}`).join("");
  svg.querySelector(".line").setAttribute("d", runs.map(line).join(""));
  svg
    .querySelector(".area")
    .setAttribute("d", runs.map((run) => `${line(run)}L${run.at(-1)[0]} ${HEIGHT}L${run[0][0]} ${HEIGHT}Z`).join(""));
}

/** A bar of a share of its track, 0 to 1. */
export function bar(share, kind) {
  const fill = el("span", { class: "fill", "data-kind": kind });
  fill.style.width = `${(100 * Math.min(Math.max(share || 0, 0), 1)).toFixed(2)}%`;
  return el("span", { class: "track", "aria-hidden": "true" }, fill);
}

/** A bar from zero to the right or, where it is negative, to the left. */
export function signedBar(value, most, both) {
  const share = most > 0 ? Math.min(Math.abs(value) / most, 1) : 0;
  const fill = el("span", { class: "fill", "data-kind": value < 0 ? "lowers" : "raises" });
  const half = both ? 50 : 100;
  fill.style.width = `${(half * share).toFixed(2)}%`;
  fill.style.marginLeft = both ? `${(value < 0 ? 50 - 50 * share : 50).toFixed(2)}%` : "0";
  return el("span", { class: both ? "track both" : "track", "aria-hidden": "true" }, fill);
}

/** One bar of several parts, each with its share of the whole. */
export function stack(parts) {
  const track = el("span", { class: "stack", "aria-hidden": "true" });
  for (const [kind, n] of parts) {
    if (!(n > 0)) continue;
    const part = el("span", { "data-kind": kind });
    part.style.flexGrow = n;
    track.append(part);
  }
  return track;
}
