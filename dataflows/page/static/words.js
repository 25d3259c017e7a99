// Numbers, times and names as people read them.

const whole = new Intl.NumberFormat(undefined, { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat(undefined, { maximumFractionDigits: 1 });
const hundredths = new Intl.NumberFormat(undefined, { maximumFractionDigits: 2 });
const exact = new Intl.NumberFormat(undefined, { maximumFractionDigits: 4 });
const money = new Intl.NumberFormat(undefined, { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const probability = new Intl.NumberFormat(undefined, { minimumFractionDigits: 3, maximumFractionDigits: 3 });
const signed = new Intl.NumberFormat(undefined, {
  minimumFractionDigits: 2, maximumFractionDigits: 2, signDisplay: "always",
});
const signedExact = new Intl.NumberFormat(undefined, { maximumFractionDigits: 4, signDisplay: "exceptZero" });
const percent = new Intl.NumberFormat(undefined, { style: "percent", maximumFractionDigits: 0 });
const percentFine = new Intl.NumberFormat(undefined, {
  style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1,
});

const shortTime = new Intl.DateTimeFormat(undefined, {
  month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit",
});
const longTime = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });

export const NONE = "–";

const orNone = (format) => (x) => (x === null || x === undefined || !Number.isFinite(x) ? NONE : format(x));

/** 1,234 · 56.7 · 1.23: three digits or so, whole from a hundred up. */
export const number = orNone((x) => (Math.abs(x) >= 100 ? whole : Math.abs(x) >= 10 ? tenths : hundredths).format(x));
export const count = orNone((x) => whole.format(x));
export const value = orNone((x) => exact.format(x));
export const amount = orNone((x) => money.format(x));
export const score = orNone((x) => probability.format(x));
export const contribution = orNone((x) => signed.format(x));
export const contributionExact = orNone((x) => signedExact.format(x));

/** A share as per cent; what is small but there does not read as nothing, nor nearly all as all. */
export const share = orNone((x) => {
  if (x > 0 && x < 0.001) return `< ${percentFine.format(0.001)}`;
  if (x < 1 && x > 0.999) return `> ${percentFine.format(0.999)}`;
  return ((x > 0 && x < 0.1) || (x > 0.9 && x < 1) ? percentFine : percent).format(x);
});

/** A latency in s as [number, unit]. */
export function latency(seconds) {
  if (seconds === null || seconds === undefined) return [NONE, "ms"];
  if (seconds === Infinity) return ["> 60", "s"];
  return seconds < 1 ? [number(seconds * 1000), "ms"] : [number(seconds), "s"];
}

/** 3 s · 5 min · 2 h · 4 days, as the server writes them. */
export const span = orNone((s) => {
  const seconds = Math.max(s, 0);
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
});

/** An age that may be short: 4 ms · 1.5 s · 3 min. */
export const age = orNone((s) => (s < 10 ? latency(Math.max(s, 0)).join(" ") : span(s)));

export const bytes = orNone((n) => {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) [n, i] = [n / 1000, i + 1];
  return `${number(n)} ${units[i]}`;
});

export const timeOfDay = (ms) => clock.format(ms);
export const time = (ms) => shortTime.format(ms);
export const fullTime = (ms) => longTime.format(ms);
export const utc = (ms) => `${new Date(ms).toISOString().replace("T", " ").replace("Z", "")} UTC`;

const UNITS = { ms: "ms", s: "seconds", m: "minutes", h: "hours", d: "days" };

/** `terminal_risk_7d` → “terminal risk, 7 days”. */
export function feature(name) {
  const parts = /^(.+)_(\d+)(ms|s|m|h|d)$/.exec(name);
  const words = (text) => text.replaceAll("_", " ");
  if (!parts) return words(name);
  const unit = parts[2] === "1" ? UNITS[parts[3]].replace(/([a-z]{2,})s$/, "$1") : UNITS[parts[3]];
  return `${words(parts[1])}, ${parts[2]} ${unit}`;
}

export const OUTCOMES = {
  scored: "scored",
  applied: "reports applied",
  duplicate: "duplicates",
  dead_lettered: "dead-lettered",
  shed: "shed",
  rebuilt: "read again",
};
export const DECISIONS = { approve: "approve", review: "review", block: "block" };
export const MODES = { full: "model", cached: "last score", rule: "rule", shed: "not answered: shed" };
export const MODE_SENTENCES = {
  full: "Answered by the model.",
  cached: "Answered with the card’s last score, to save time under load.",
  rule: "Answered by the fallback rule, to save time under load.",
};
