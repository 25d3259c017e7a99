import { bar, byId, el, say, spark, stack } from "./draw.js";
import { Flagged } from "./flagged.js";
import { HISTORY_S, MIX_S, Series, WINDOW_S, totals } from "./series.js";
import * as words from "./words.js";

const EVERY_MS = 1000;
const AGAIN_MS = 2000; // after a failure
const ANSWER_WITHIN_MS = 4000;

const series = new Series();
const flagged = new Flagged({ get, announce });
let paused = false;
let failedSince = null; // performance.now() of the first poll of a row that failed
let answeredAt = null; // Date.now() of the last answer
let timer = 0;
let turn = 0; // of asking; what an earlier one began does not go on
let flaggedAt = -Infinity;

/** Fetch JSON, by GET or with a form by POST; null for "nothing new". Throws but for an answer. */
async function get(path, form) {
  const how = form ? { method: "POST", body: form } : {};
  const response = await fetch(path, { ...how, signal: AbortSignal.timeout(ANSWER_WITHIN_MS) });
  if (response.status === 401) {
    location.assign("/login");
    return new Promise(() => {}); // until the browser is there
  }
  if (response.status === 204) return null;
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error ?? `status ${response.status}`);
  return response.json();
}

/** Tell a screen reader, once. */
function announce(text) {
  say("announce", text);
}

async function poll(mine) {
  const began = performance.now();
  try {
    const status = await get("/api/status");
    if (mine !== turn) return;
    answered();
    series.add(status);
    show(status);
    if (began - flaggedAt >= 2 * EVERY_MS - 50) {
      flaggedAt = began;
      await flagged.refresh(status.started);
    }
  } catch {
    if (mine === turn) failed(began);
  } finally {
    if (mine === turn) {
      const wait = failedSince === null ? EVERY_MS : AGAIN_MS;
      timer = setTimeout(poll, Math.max(wait - (performance.now() - began), 50), mine);
    }
  }
}

function answered() {
  answeredAt = Date.now();
  if (failedSince === null) return;
  failedSince = null;
  byId("stale").hidden = true;
  byId("main").classList.remove("old");
  announce("The flow answers again.");
}

function failed(began) {
  failedSince ??= began;
  byId("stale").hidden = false;
  byId("main").classList.add("old");
  say("stale-what", "The flow does not answer.");
  pulse();
}

/** The seconds that pass are shown, but not spoken. */
function pulse() {
  const link = byId("pulse");
  if (failedSince !== null) {
    link.dataset.state = "lost";
    say("pulse-text", "no answer");
    const silent = words.span(Math.round((Date.now() - (answeredAt ?? performance.timeOrigin)) / 1000));
    say(
      "stale-since",
      answeredAt === null
        ? `Nothing has been heard of it for ${silent}; it is asked again every two seconds.`
        : `It has been silent for ${silent}; what you see is from ${words.timeOfDay(answeredAt)}. ` +
          "It is asked again every two seconds.",
    );
  } else if (paused) {
    link.dataset.state = "paused";
    say("pulse-text", answeredAt === null ? "paused" : `paused at ${words.timeOfDay(answeredAt)}`);
  } else if (answeredAt !== null) {
    link.dataset.state = "live";
    say("pulse-text", "live");
  }
}

function setPaused(value) {
  paused = value;
  stop();
  const button = byId("pause");
  button.setAttribute("aria-pressed", String(paused));
  pulse();
  if (!paused) resume();
}

function stop() {
  turn += 1;
  clearTimeout(timer);
}

function resume() {
  stop();
  flaggedAt = -Infinity;
  poll(turn);
}

// --- what is shown -------------------------------------------------------------------------------

function show(status) {
  pulse();
  say("about", about(status));
  const news = [level(status), health(status)].filter(Boolean);
  if (news.length) announce(news.join(" "));
  partitions(status);
  say("process", processLine(status));
  const recent = series.window(WINDOW_S);
  if (!recent) return;
  tiles(status, recent);
  stages(recent.stages);
  mixes(status, series.window(MIX_S));
}

function about(status) {
  const parts = [];
  if (status.model_version) parts.push(`model ${status.model_version}`);
  if (status.delivery) parts.push(status.delivery.replaceAll("_", " "));
  if (status.started) parts.push(`up for ${words.span(status.time - status.started)}`);
  return parts.join(" · ") || "–";
}

let levelSaid = null;

/** Return what is to be told of the level: that it is another kind of trouble, not each step. */
function level(status) {
  const n = status.overload_level;
  const late = n === 0 && series.late;
  const state = n === null ? "unknown" : n === 0 ? (late ? "warn" : "ok") : n <= 2 ? "warn" : "bad";
  byId("level").dataset.state = state;
  byId("level").title = status.overload_policy ? `Policy: ${status.overload_policy}` : "";
  // Under `block` there is no deadline.
  const why = status.overload_policy === "block" ? "catching up" : "catching up, or past the deadline";
  const name = n === null ? "not known" : `${n} · ${late ? why : status.overload_name}`;
  say("level-name", name);
  const changed = levelSaid !== null && levelSaid !== state;
  levelSaid = state;
  return changed ? `Overload: ${name}.` : "";
}

function tiles(status, recent) {
  say("rate-in", words.number(recent.in));
  say("rate-out", `${words.number(recent.out)}/s`);
  say("batch", words.number(recent.batch));
  const [p50, p95, p99, p999] = recent.percentiles.map(words.latency);
  say("p99", p99[0]);
  say("p99-unit", p99[1]);
  say("p50", p50.join(" "));
  say("p95", p95.join(" "));
  say("p999", p999.join(" "));
  say("lag", words.count(series.lag));
  say("lag-seconds", words.age(series.lagSeconds));
  say("age", words.age(status.record_age_s));
  say("busy", words.share(recent.busy));
  say("throttled", words.share(recent.throttled));
  say("memory", words.bytes(status.resident_bytes));
  chart("rate", "in", (x) => `${words.number(x)}/s`, 1);
  chart("latency", "p99", (x) => words.latency(x).join(" "), 0.001);
  chart("lag", "lag", words.count, 10);
  chart("busy", "busy", words.share, 0.01, 1);
}

/** Draw a sparkline and say in words what it shows. `least` is the lowest top of its scale. */
function chart(id, key, format, least, top = null) {
  const points = series.points.map((p) => [p.time, p[key]]);
  const values = points.map(([, v]) => v).filter((v) => v !== null && Number.isFinite(v));
  if (!values.length) {
    say(`range-${id}`, "not known yet");
    return;
  }
  const [low, high] = [Math.min(...values), Math.max(...values)];
  spark(byId(`spark-${id}`), points, series.now.time, HISTORY_S, top ?? Math.max(high * 1.1, least));
  const seconds = series.points.at(-1).time - series.points[0].time;
  const [from, to] = [format(low), format(high)];
  say(
    `range-${id}`,
    `${from === to ? from : `${from} to ${to}`} in the last ${seconds >= HISTORY_S - 5 ? "2 minutes" : words.span(Math.max(Math.round(seconds), 1))}`,
  );
}

function stages(found) {
  const rows = found.filter((stage) => stage.us !== null);
  const most = Math.max(...rows.map((stage) => stage.us), 0);
  byId("stages").replaceChildren(
    ...(rows.length
      ? rows.map((stage) =>
          el("tr", {},
            el("th", { scope: "row" }, stage.name),
            el("td", { class: "wide" }, bar(most ? stage.us / most : 0, "stage")),
            el("td", { class: "number" }, words.number(stage.us)),
          ),
        )
      : [el("tr", {}, el("td", { colspan: 3, class: "empty" }, "No events in the last 10 seconds."))]),
  );
  say("stages-sum", rows.length ? words.number(rows.reduce((sum, stage) => sum + stage.us, 0)) : words.NONE);
}

function mixes(status, minute) {
  mix("mix-outcome", words.OUTCOMES, minute.events, totals(status.events));
  mix("mix-decision", words.DECISIONS, minute.decisions, status.decisions);
  mix("mix-mode", words.MODES, minute.modes, status.score_modes);
  say("account", account(totals(status.events), status.dead_letters));
}

/** Say whether what was read is accounted for, and what was refused for what. */
function account({ read, ...outcomes }, refused) {
  if (read === undefined) return "";
  const ended = Object.keys(words.OUTCOMES).reduce((sum, outcome) => sum + (outcomes[outcome] ?? 0), 0);
  const reasons = Object.entries(refused)
    .filter(([, n]) => n)
    .sort((a, b) => b[1] - a[1])
    .map(([why, n]) => `${why.replaceAll("_", " ")} (${words.count(n)})`);
  return (
    `${words.count(read)} events read since the start, ${words.count(Math.max(read - ended, 0))} of them still under way.` +
    (reasons.length ? ` Dead-lettered for: ${reasons.join(", ")}.` : "")
  );
}

function mix(id, names, minute, ever) {
  const kinds = [...Object.keys(names), ...Object.keys(ever).filter((kind) => !(kind in names) && kind !== "read")];
  const shown = kinds.filter((kind) => kind in ever);
  const all = shown.reduce((sum, kind) => sum + Math.max(minute[kind] ?? 0, 0), 0);
  const parts = shown.map((kind) => [kind, minute[kind] ?? 0]);
  const rows = parts.map(([kind, n]) =>
    el("tr", {},
      el("th", { scope: "row" }, el("span", { class: "swatch", "data-kind": kind, "aria-hidden": "true" }), names[kind] ?? kind.replaceAll("_", " ")),
      el("td", { class: "number" }, words.count(n)),
      el("td", { class: "number" }, all ? words.share(n / all) : words.NONE),
      el("td", { class: "number" }, words.count(ever[kind])),
    ),
  );
  const box = byId(id);
  box.hidden = !rows.length;
  box.querySelector(".stack").replaceWith(stack(parts));
  box.querySelector("tbody").replaceChildren(...rows);
}

let healthSaid = null;

/** Return what is to be told of the health, if it changed. */
function health(status) {
  const rank = (item) => (item.ok === false ? 0 : item.ok === null ? 1 : 2);
  const items = status.health.toSorted((a, b) => rank(a) - rank(b)).map((item) =>
    el("li", { "data-state": item.ok === null ? "unknown" : item.ok ? "ok" : "bad" },
      el("span", { class: "mark", "aria-hidden": "true" }, item.ok === null ? "?" : item.ok ? "✓" : "!"),
      el("span", {},
        el("b", {}, item.name),
        el("span", { class: item.ok ? "unseen" : "verdict" }, item.ok === null ? "not known yet." : item.ok ? "well." : "not well."),
        " ",
        item.sentence,
      ),
    ),
  );
  byId("health").replaceChildren(...(items.length ? items : [el("li", { class: "empty" }, "Nothing is known yet.")]));
  const bad = status.health.filter((item) => item.ok === false).map((item) => item.name);
  const sentence = bad.length ? `Not well: ${bad.join(", ")}.` : "All is well.";
  const changed = healthSaid !== null && healthSaid !== sentence;
  healthSaid = sentence;
  return changed ? sentence : "";
}

function partitions(status) {
  const details = byId("partitions");
  details.hidden = !status.partitions.length;
  if (!details.open) return;
  byId("partition-rows").replaceChildren(
    ...status.partitions.map((p) =>
      el("tr", {},
        el("th", { scope: "row" }, `${p.topic} ${p.partition}`),
        el("td", { class: "number" }, words.count(p.records)),
        el("td", { class: "number" }, words.age(p.seconds)),
        el("td", { class: "number" }, words.span(p.headroom_s)),
      ),
    ),
  );
}

function processLine(status) {
  const parts = [];
  if (status.started) parts.push(`Running since ${words.fullTime(status.started * 1000)}`);
  if (status.schema_hash) parts.push(`feature schema ${status.schema_hash}`);
  if (status.recovery_bytes) parts.push(`recovery store ${words.bytes(status.recovery_bytes)}`);
  if (status.epoch_age_s !== null) parts.push(`last epoch ${words.span(status.epoch_age_s)} ago`);
  return parts.length ? `${parts.join(" · ")}.` : "";
}

byId("pause").addEventListener("click", () => setPaused(!paused));
byId("partitions").addEventListener("toggle", () => series.now && partitions(series.now));
document.addEventListener("visibilitychange", () => {
  if (document.hidden) stop();
  else if (!paused) resume();
});
setInterval(pulse, 1000);
resume();
